"""The replacement test (the paper's Sec. 3.2, Table 2): take a native write out, put something in, compare the output.

Per firing, amplitude and read scope, the KL(native, patched) in nats of the next token's distribution, and of each
condition also the loss on the token after it; of the native run, deletion and atom also the most likely token:

| condition       | put in the write's place                                                   |
|-----------------|----------------------------------------------------------------------------|
| delete          | nothing                                                                    |
| atom            | the firing's atom                                                          |
| random          | another alive atom                                                         |
| reconstruction  | the SAE's whole reconstruction (all k active atoms; with the mean for write-trained SAEs) |
| mean_write      | the cell's mean write                                                      |
| resampled       | the native write of another position                                       |
| native_rescaled | the native write itself, at the atom's norm                                |
| flat_svd        | the top singular pair of a flat SAE's reconstruction of the state (App. F.4; not with target "write") |
| whole_atom      | the firing's atom as it is, where it is not rank 1: its "atom" is the top singular pair (only on request) |

amplitude "coefficient": the atom and its controls have the atom's own coefficient as their norm (the reconstruction
its own); "matched_norm": all have the Frobenius norm of the native write. flat_svd takes the same norms as the atom.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F

from writesae.edit import SCOPES, head_change, kl, make_edit
from writesae.evaluate.firings import Encoded, encode
from writesae.history import History
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors
from writesae.sae.model import SAE
from writesae.sae.parts import RankOneDecoder
from writesae.sae.train import top_singular_pair

AMPLITUDES = ("coefficient", "matched_norm")
CONDITIONS = ("delete", "atom", "random", "reconstruction", "mean_write", "resampled", "native_rescaled", "flat_svd")
STEPS = 2  # the writing token and the next one


@dataclass
class Subject:
    """A cell with its SAE and all that the conditions draw on: the native writes of the windows, their mean
    [d_k, d_v], the alive atoms [A], of which a random one is drawn, and a flat SAE with the states it is to see."""

    layer: int
    head: int
    target: str
    write: str
    sae: SAE
    encoded: Encoded
    writes: History
    mean_write: torch.Tensor
    alive: torch.Tensor
    flat: SAE | None = None
    states: History | None = None


def rank_one(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms (left [n, 1, d_k], right [n, 1, d_v]) of unit Frobenius norm."""
    return F.normalize(key, dim=-1)[:, None], F.normalize(value, dim=-1)[:, None]


def full_rank(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms (left [n, d_k, d_k], right [n, d_k, d_v]) of any matrices [n, d_k, d_v]."""
    return torch.eye(matrices.shape[1], dtype=matrices.dtype).expand(len(matrices), -1, -1), matrices


def replacements(subject: Subject, firings: pd.DataFrame, factors: Factors, rows: torch.Tensor, seed: int) -> dict:
    """What each condition puts in: name -> (left, right) of unit norm, or the reconstruction in its own norm.

    `rows`: the firing's window within the run of `factors`. Random draws follow from seed and the firing alone.
    """
    position, atom = torch.tensor(firings.position.to_numpy()), torch.tensor(firings.atom.to_numpy())
    window = torch.tensor(firings.window.to_numpy())
    key, value = subject.sae.atoms()
    others = torch.stack(
        [random_choices(seed, w, p, 2) for w, p in zip(window.tolist(), position.tolist(), strict=True)]
    )
    candidates = subject.alive
    other = candidates[(others[:, 0] * len(candidates)).long()]
    neighbour = candidates[(torch.searchsorted(candidates, atom) + 1) % len(candidates)]
    other = torch.where(other == atom, neighbour, other)
    pool = [x.flatten(0, 1) for x in (subject.writes.key, subject.writes.value)]
    drawn = (others[:, 1] * len(pool[0])).long()
    mean = subject.mean_write.expand(len(firings), -1, -1)
    put_in = {
        "atom": rank_one(key[atom], value[atom]),
        "random": rank_one(key[other], value[other]),
        "reconstruction": full_rank(reconstruction(subject, window, position)),
        "mean_write": full_rank(mean / subject.mean_write.norm()),
        "resampled": rank_one(pool[0][drawn], pool[1][drawn]),
        "native_rescaled": rank_one(factors.key[rows, position], factors.write(subject.write)[rows, position]),
    }
    if subject.flat is not None:
        seen = subject.flat.encode(subject.states.matrices(window, position))
        put_in["flat_svd"] = rank_one(*top_singular_pair(subject.flat.decode(*seen)))
    if not isinstance(subject.sae.decoder, RankOneDecoder):
        whole = subject.sae.decoder.weight()[atom].detach()
        put_in["whole_atom"] = full_rank(whole / whole.flatten(1).norm(dim=1)[:, None, None])
    return put_in


def random_choices(seed: int, window: int, position: int, count: int) -> torch.Tensor:
    """`count` uniform numbers that follow from (seed, window, position)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + window) * 4_099 + position)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def reconstruction(subject: Subject, window: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[n, d_k, d_v]: all active atoms at their coefficients; for a write-trained SAE its mean write as well."""
    found = subject.encoded
    decoded = subject.sae.decode(found.indices[window, position], found.coefficients[window, position])
    return decoded if subject.target == "write" else decoded - subject.sae.mean


def terms(put_in: dict, conditions, scales: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditions of one rank side by side: left, right [n, conditions, r, d], scaled to their norms."""
    left = torch.stack([put_in[name][0] for name in conditions], 1)
    right = torch.stack([put_in[name][1] * scales[name][:, None, None] for name in conditions], 1)
    return left, right


def changes(factors: Factors, rows, position, take_out, left, right, scope) -> torch.Tensor:
    """The head's change [n * conditions, STEPS, d_v] where each condition stands in the native write's place."""
    n, count = left.shape[:2]
    left = torch.cat([take_out[0][:, None].expand(-1, count, -1, -1), left], 2).flatten(0, 1)
    right = torch.cat([take_out[1][:, None].expand(-1, count, -1, -1), right], 2).flatten(0, 1)
    edit = make_edit(rows.repeat_interleave(count), position.repeat_interleave(count), left, right, scope)
    return head_change(factors, edit, STEPS)[0].view(n, count, STEPS, -1)


@torch.no_grad()
def replace(
    host: Host,
    run: Run,
    subject: Subject,
    firings: pd.DataFrame,
    seed: int,
    conditions: tuple[str, ...] = CONDITIONS,
    scopes: tuple[str, ...] = SCOPES,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Run every condition on the firings, whose column `row` says their window within `run`: one line a firing,
    amplitude and scope, ordered by scope, amplitude, firing. Losses are read on the token that the next one predicts."""
    if subject.flat is None:
        conditions = tuple(name for name in conditions if name != "flat_svd")
    if isinstance(subject.sae.decoder, RankOneDecoder):
        conditions = tuple(name for name in conditions if name != "whole_atom")
    at_once = max(1, batch_rows // (len(scopes) * len(AMPLITUDES) * len(conditions)))
    pieces = [
        _replace(host, run, subject, firings.iloc[i : i + at_once], seed, conditions, scopes)
        for i in range(0, len(firings), at_once)
    ]
    where = dict(host=host.name, layer=subject.layer, head=subject.head, target=subject.target, write=subject.write)
    return pd.concat(pieces, ignore_index=True).assign(**where)


def _replace(host, run, subject, firings, seed, conditions, scopes) -> pd.DataFrame:
    factors = host.factors(run, subject.layer, subject.head)
    rows, position = torch.tensor(firings.row.to_numpy()), torch.tensor(firings.position.to_numpy())
    key, write = factors.key[rows, position], factors.write(subject.write)[rows, position]
    put_in = replacements(subject, firings, factors, rows, seed)
    norms = dict(
        coefficient=torch.tensor(firings.coefficient.to_numpy(), dtype=torch.float32),
        matched_norm=key.norm(dim=-1) * write.norm(dim=-1),
    )
    own = put_in["reconstruction"][1].flatten(1).norm(dim=1)
    groups = [
        [name for name in conditions if name in members]
        for members in (
            ("atom", "random", "resampled", "native_rescaled", "flat_svd"),
            ("reconstruction", "mean_write", "whole_atom"),
        )
    ]
    take_out = key[:, None], -write[:, None]
    nothing = key.new_zeros(len(rows), 1, 1, host.d_k), key.new_zeros(len(rows), 1, 1, host.d_v)
    labels, found = [], []
    for scope in scopes:
        labels.append((scope, "", "delete"))
        found.append(changes(factors, rows, position, take_out, *nothing, scope))
        for amplitude in AMPLITUDES:
            scales = dict.fromkeys(conditions, norms[amplitude])
            scales["reconstruction"] = norms[amplitude] / own if amplitude == "matched_norm" else torch.ones_like(own)
            for group in filter(None, groups):
                labels += [(scope, amplitude, name) for name in group]
                found.append(changes(factors, rows, position, take_out, *terms(put_in, group, scales), scope))
    change = torch.cat(found, 1)

    repeat = change.shape[1]
    hidden, _ = host.branch(
        run,
        subject.layer,
        subject.head,
        rows.repeat_interleave(repeat),
        position.repeat_interleave(repeat),
        change.flatten(0, 1),
    )
    patched = host.logits(hidden[:, -1]).unflatten(0, (len(rows), repeat))
    native, following = host.logits(run.final[rows, position + 1]), run.tokens[rows, position + 2]
    divergence = kl(native[:, None], patched)
    loss = F.cross_entropy(patched.flatten(0, 1), following.repeat_interleave(repeat), reduction="none").view(
        len(rows), -1
    )

    top = patched.argmax(-1)

    key_a, value_a = (x[:, 0] for x in put_in["atom"])
    cosine = (key_a * F.normalize(key, dim=-1)).sum(-1) * (value_a * F.normalize(write, dim=-1)).sum(-1)
    shared = firings.drop(columns="row").assign(
        native_norm=norms["matched_norm"].numpy(),
        cosine=cosine.numpy(),
        top1_native=native.argmax(-1).numpy(),
        nll_native=F.cross_entropy(native, following, reduction="none").numpy(),
    )
    tables = []
    for scope in scopes:
        for amplitude in AMPLITUDES:
            table = shared.assign(amplitude=amplitude, read=scope)
            for column, label in enumerate(labels):
                if label[0] == scope and label[1] in ("", amplitude):
                    table[f"kl_{label[2]}"] = divergence[:, column].numpy()
                    table[f"nll_{label[2]}"] = loss[:, column].numpy()
                    if label[2] in ("delete", "atom"):
                        table[f"top1_{label[2]}"] = top[:, column].numpy()
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


# The stages of notebooks 05 and 07, over a suite's cells.


def make_subject(cell: tuple[int, int], target: str, write: str, sae: SAE, factors: Factors) -> Subject:
    """The Subject of a cell from its harvested factors, its firings encoded."""
    writes, encoded = factors.history("write", write), encode(sae, factors.history(target, write))
    return Subject(*cell, target, write, sae, encoded, writes, writes.mean(), encoded.alive())
