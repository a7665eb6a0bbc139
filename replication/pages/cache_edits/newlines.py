"""Amplify the atoms of line ends during generation (the paper's Table 4, Fig. 6).

| mode   | heads                       | added at each new token                  | this token | later ones |
|--------|-----------------------------|------------------------------------------|------------|------------|
| offset | the cell                    | dose x the atoms' mean at line ends      | reads it   | do not     |
| scale  | the cell                    | (dose - 1) x the atoms' own coefficients | reads it   | read it    |
| kept   | each of the layer with SAEs | dose x the atoms' mean at line ends      | does not   | read it    |

`kept` is the edit of the author's code: the cache is changed after each token, in every head, and the next
token continues from the changed cache. What a token adds decays; each token adds again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from replication import layout
from replication.pages.cache_edits.site import Site, interval
from replication.statistics import paired_wilcoxon, with_ends
from writesae.history import History
from writesae.hosts.past import Record, extend
from writesae.recurrence import Factors
from writesae.sae.model import SAE
from writesae.sae.sparsity import Active

PER = 400  # newlines are counted per this many generated tokens
MEANS = ["heads", "state_norm", "paragraphs", "word_length", "distinct"]  # columns averaged in the summary


@dataclass
class Amplifier:
    """Extra writes of A atoms per row, in addition to the native writes, while R rows are generated.

    prompt [R]: the run's row that each row continues; key [R, A, d_k], value [R, A, d_v]: unit atoms. Each is
    written with the amount gain [R] x c + offset [R, A], where c is the coefficient of the atom `watched` [A]
    when `sae` encodes the native write. kept [R] bool: whether the extra write stays in the state; if not,
    only the token itself reads it."""

    prompt: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gain: torch.Tensor
    offset: torch.Tensor
    kept: torch.Tensor
    watched: torch.Tensor
    sae: SAE | None = None

    def amounts(self, now: Factors, write: str) -> torch.Tensor:
        """Return the amounts [R, A] written at this token. now: the cell's factors [R, 1, ...]."""
        if self.sae is None:
            return self.offset
        indices, coefficients = self.sae.encode_history(History(now.key, now.write(write)))
        active = (coefficients * (indices == self.watched[:, None, None, None])).sum((-1, -2)).T
        return self.gain[:, None] * active + self.offset

    def write_on(self, record: Record, site: Site) -> torch.Tensor:
        """Add a token's extra write to the head's output and state; return the amounts [R, A]."""
        now = site.host.cell_factors(record, site.head).to("cpu")
        amounts = self.amounts(now, site.write)
        extra = ((self.key * amounts[..., None]).mT @ self.value).to(record.outputs.device)
        record.outputs[:, :, site.head] += now.query.to(extra.device) @ extra
        record.end[:, site.head] += extra * self.kept[:, None, None].to(extra.device)
        return amounts


@dataclass
class KeptOffsets:
    """A matrix per head of a layer, added to the layer's states after each token, while R rows are generated.

    prompt [R]: the run's row that each row continues; condition [R]: the index of its condition; extra
    [conditions, heads, d_k, d_v]: the matrices, 0 for heads that are not edited."""

    prompt: torch.Tensor
    condition: torch.Tensor
    extra: torch.Tensor

    def write_on(self, record: Record, site: Site) -> torch.Tensor:
        """Add the matrices to the states after a token; return their Frobenius norms [R, heads]."""
        record.end += self.extra[self.condition].to(record.end.device)
        return self.extra.norm(dim=(-2, -1))[self.condition]


def choose(logits: torch.Tensor, prompt: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Return the next token of each row [R] from logits [R, V]: the likeliest at temperature 0, else drawn.

    Rows of one prompt share their noise, so that conditions differ by their logits only."""
    if not temperature:
        return logits.argmax(-1)
    waits = -torch.rand(int(prompt.max()) + 1, logits.shape[-1], generator=generator).log()
    return (logits / temperature - waits.log()[prompt]).argmax(-1)


class Generated(NamedTuple):
    """Continuations, tokens [R, count], and what was edited.

    written [R, count - 1, ...]: what the plan's `write_on` returned at each token that is read (nothing reads
    the last one). states [R, heads, d_k, d_v]: of the edited layer, after the last token that is read."""

    tokens: torch.Tensor
    written: torch.Tensor
    states: torch.Tensor


@torch.no_grad()
def generate_amplified(site: Site, plan: Amplifier | KeptOffsets, count: int, temperature=0.0, seed=0) -> Generated:
    """Return continuations of the run's prompts by `count` tokens, at least 2.

    Without amplification and at temperature 0 their tokens are those of `Host.decode`."""
    host, length = site.host, site.run.tokens.shape[1]
    ends, generator = torch.full_like(plan.prompt, length), torch.Generator().manual_seed(seed)
    pasts = [host.past_at(record, plan.prompt, ends) for record in site.run.records]
    first = host.logits(site.run.final[:, -1])[plan.prompt]
    chosen, written = [choose(first, plan.prompt, temperature, generator)], []
    for step in range(count - 1):
        hidden = host.embed(chosen[-1][:, None].to(host.device))
        for layer in range(host.layers):
            device = host.device_of(layer)
            record = host.mix(layer, hidden.to(device), pasts[layer], (ends[:, None] + step).to(device))
            if layer == site.layer:
                written.append(plan.write_on(record, site))
            hidden = host.finish(layer, record, pasts[layer])
            pasts[layer] = extend(pasts[layer], record)
        chosen.append(choose(host.logits(hidden[:, -1]), plan.prompt, temperature, generator))
    return Generated(torch.stack(chosen, 1), torch.stack(written, 1), pasts[site.layer].states.cpu())


def boundary_means(active: Active, ends: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Return [2, n_atoms]: each atom's mean coefficient where `ends` [N, T] is true, and elsewhere."""
    means = torch.zeros(2, n_atoms, dtype=torch.float64)
    for side, at in enumerate((ends, ~ends)):
        means[side].index_add_(0, active.indices[at].flatten(), active.coefficients[at].flatten().double())
        means[side] /= at.sum()
    return means


def choose_boundary(means: torch.Tensor, count: int, seed: int) -> pd.DataFrame:
    """Return the `count` atoms that are most active at line ends relative to elsewhere, and random atoms."""
    boundary = (means[0] - means[1]).topk(count).indices.numpy()
    means = means.numpy()
    rest = np.setdiff1d(np.flatnonzero(means.sum(0)), boundary)
    chosen = dict(boundary=boundary, random=np.random.default_rng(seed).choice(rest, count, replace=False))
    columns = [dict(role=r, atom=a, at_ends=means[0, a], elsewhere=means[1, a]) for r, a in chosen.items()]
    return pd.concat([pd.DataFrame(x) for x in columns], ignore_index=True)


def conditions(modes, doses) -> list[tuple[str, str, float]]:
    """Return (mode, role, dose): baseline, boundary atoms at all doses, random ones at the largest."""
    each = [("boundary", dose) for dose in doses] + [("random", max(doses))]
    return [("baseline", "baseline", 0.0)] + [(mode, role, dose) for mode in modes for role, dose in each]


def generations(modes, doses) -> dict[str, list[tuple[str, str, float]]]:
    """Return the conditions (mode, role, dose) of each generation, by its name.

    single: `conditions` of the modes that edit the cell; controls: random atoms at the other doses of
    `offset`; kept: boundary and random atoms at all doses."""
    lists = dict(single=conditions([mode for mode in modes if mode != "kept"], doses))
    if "kept" in modes:
        lists["controls"] = [("offset", "random", dose) for dose in doses if dose < max(doses)]
        lists["kept"] = [("kept", role, dose) for role in ("boundary", "random") for dose in doses]
    return {name: wanted for name, wanted in lists.items() if wanted}


def amplifier(saes: dict[str, SAE], atoms: dict[str, pd.DataFrame], wanted: list[tuple], prompts: int) -> Amplifier:
    """Return every condition with every prompt. saes, atoms (rows of `choose_boundary`): by mode.

    offset: at every new token the state is read as if the boundary atoms' coefficients were higher by dose x
    their mean at line ends; this is not kept in the state, or it would accumulate. scale: in each native
    write the boundary atoms' coefficients are multiplied by dose: dose - 1 times the coefficient is added and
    kept. Random atoms are written with the amounts of the boundary atoms."""
    rows = []
    for mode, role, dose in wanted:
        source = mode if mode in atoms else next(iter(atoms))  # any for the baseline, which writes nothing
        by_role = dict(list(atoms[source].groupby("role")))
        atom = torch.tensor(by_role.get(role, by_role["boundary"]).atom.to_numpy())
        key, value = (x[atom] for x in saes[source].atoms())
        at_ends = torch.tensor(by_role["boundary"].at_ends.to_numpy()).to(key)
        gain = torch.tensor(dose - 1.0 if mode == "scale" else 0.0).to(key)
        rows.append((key, value, gain, at_ends * (dose if mode == "offset" else 0.0), torch.tensor(mode == "scale")))
    parts = [torch.stack(x).repeat_interleave(prompts, 0) for x in zip(*rows, strict=True)]
    watched = atoms["scale"].query("role == 'boundary'").atom.to_numpy() if "scale" in atoms else []
    return Amplifier(torch.arange(prompts).repeat(len(wanted)), *parts, torch.tensor(watched), saes.get("scale"))


def at_line_ends(sae: SAE, atoms: pd.DataFrame, role: str) -> torch.Tensor:
    """Return the sum [d_k, d_v] of a role's atoms, each times the mean at line ends of a boundary atom.

    atoms: rows of `choose_boundary`."""
    by_role = dict(list(atoms.groupby("role")))
    key, value = (side[torch.tensor(by_role[role].atom.to_numpy())] for side in sae.atoms())
    amounts = torch.tensor(by_role["boundary"].at_ends.to_numpy()).to(key)
    return (key * amounts[:, None]).T @ value


def kept_offsets(
    saes: dict[int, SAE], atoms: pd.DataFrame, wanted: list[tuple], prompts: int, heads: int
) -> KeptOffsets:
    """Return every condition with every prompt, for a layer with `heads` heads.

    saes: by head; atoms: rows of `choose_boundary` with a column head. Random atoms are written with the
    amounts of the boundary atoms of their head."""
    by_head, extra = dict(list(atoms.groupby("head"))), []
    for _, role, dose in wanted:
        sums = {head: dose * at_line_ends(sae, by_head[head], role) for head, sae in saes.items()}
        nothing = torch.zeros_like(next(iter(sums.values())))
        extra.append(torch.stack([sums.get(head, nothing) for head in range(heads)]))
    condition = torch.arange(len(wanted)).repeat_interleave(prompts)
    return KeptOffsets(torch.arange(prompts).repeat(len(wanted)), condition, torch.stack(extra))


def surface(text: str) -> dict:
    """Return the count of blank lines and the mean length of words."""
    words = text.split()
    return dict(paragraphs=len(re.findall(r"\n[ \t]*\n", text)), word_length=sum(map(len, words)) / max(1, len(words)))


def summarise_newlines(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return newlines per 400 tokens and their change from the baseline per (host, mode, role, dose).

    beyond_random: boundary atoms minus random ones of the same mode and dose, for those that have such a
    control. Bootstrap intervals by prompt; paired Wilcoxon p, Cohen's d; means of the surface measures."""
    rows, keys = [], ["mode", "role", "dose"]
    for host, of_host in table.groupby("host", sort=False):
        baseline = of_host[of_host.role == "baseline"].set_index("prompt").newlines
        controls = dict(list(of_host[of_host.role == "random"].groupby(["mode", "dose"])))
        for values, part in of_host.groupby(keys, sort=False):
            part = part.set_index("prompt").loc[baseline.index]
            row, change = dict(host=host) | dict(zip(keys, values, strict=True), n=len(part)), part.newlines - baseline
            compared = dict(newlines=part.newlines, change=change)
            if (mode_and_dose := values[::2]) in controls and values[1] == "boundary":
                compared["beyond_random"] = part.newlines - controls[mode_and_dose].set_index("prompt").newlines
            for label, series in compared.items():
                row |= with_ends(label, series.mean(), interval(series, series.index, seed=seed))
            row["wilcoxon_p"] = paired_wilcoxon(part.newlines, baseline)
            row["cohens_d"] = change.mean() / change.std() if change.std() > 0 else 0.0
            rows.append(row | part[MEANS].mean().to_dict())
    return pd.DataFrame(rows)


def side_by_side(summary: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column with its interval as text, one row per (host, n, role, dose) and one column per mode.

    summary: of `summarise_newlines`. Rows without a value, and the baseline, are left out."""
    rows = summary[summary[column].notna() & (summary.role != "baseline")]
    numbers = rows[[column, f"{column}_low", f"{column}_high"]].itertuples(index=False)
    texts = [f"{'+' if x > 0 else ''}{layout.interval(x, low, high, '.1f')}" for x, low, high in numbers]
    return layout.across(rows, ["host", "n", "role", "dose"], "mode", texts)
