"""Notebook 11 (ablations): would another direction do as well as the atom (the paper's App. I.1)?"""

from __future__ import annotations

import pandas as pd
import torch

from replication.statistics import beats, cliffs_delta, cluster_bootstrap, paired_wilcoxon, rate_row, wider
from replication.study.firings import firing_windows, firings_of, heldout_subjects, run_firings
from replication.study.study import Suite
from replication.study.training import ablation_hosts
from writesae.edit import kl
from writesae.evaluate.firings import atom_names, draw_in_rounds
from writesae.evaluate.replacement import AMPLITUDES, STEPS, Subject, changes, rank_one, terms
from writesae.hosts.base import Host, Run

CONTROLS = ("random", "orthogonal")
PLACEMENTS = (*AMPLITUDES, "added")


# Selectivity


def directions(firings: pd.DataFrame, d: int, seed: int) -> torch.Tensor:
    """Two Gaussian vectors [n, 2, d] for each firing, that follow from (seed, window, position)."""
    found = []
    for window, position in zip(firings.window, firings.position, strict=True):
        generator = torch.Generator().manual_seed(((seed + 1) * 1_000_003 + window) * 4_099 + position)
        found.append(torch.randn(2, d, generator=generator))
    return torch.stack(found)


def across(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """What of x [n, d] is orthogonal to the unit vectors [n, d]."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def overlap(a: torch.Tensor, b: torch.Tensor, top: int) -> torch.Tensor:
    """[n]: the share of the `top` largest |a| of [n, V] that are among those of |b|."""
    first, second = (x.abs().topk(top, dim=-1).indices for x in (a, b))
    return (first[:, :, None] == second[:, None]).any(-1).double().mean(-1)


@torch.no_grad()
def compare(
    host: Host, run: Run, subject: Subject, firings: pd.DataFrame, seed: int, tops: list[int], batch_rows: int = 512
) -> pd.DataFrame:
    """Atom and controls at the firings, whose column `row` says their window within `run`: a line a firing and placement,
    with kl_delete, kl_atom, kl_random, kl_orthogonal, and where added overlap_CONTROL_K for each K of `tops`."""
    at_once = max(1, batch_rows // (1 + len(PLACEMENTS) * (1 + len(CONTROLS))))
    parts = [firings.iloc[i : i + at_once] for i in range(0, len(firings), at_once)]
    found = pd.concat([_compare(host, run, subject, part, seed, tops) for part in parts], ignore_index=True)
    return found.assign(host=host.name, layer=subject.layer, head=subject.head, target=subject.target)


def _compare(host: Host, run: Run, subject: Subject, firings: pd.DataFrame, seed: int, tops: list[int]):
    factors = host.factors(run, subject.layer, subject.head)
    row, position, atom = (torch.tensor(firings[name].to_numpy()) for name in ("row", "position", "atom"))
    key, write = factors.key[row, position], factors.write(subject.write)[row, position]
    own_key, own_value = (x[atom] for x in subject.sae.atoms())
    random_key, random_value = (directions(firings, host.d_k + host.d_v, seed)[:, 0].to(key)).split(
        [host.d_k, host.d_v], -1
    )
    put_in = dict(
        atom=rank_one(own_key, own_value),
        random=rank_one(random_key, random_value),
        orthogonal=rank_one(across(random_key, own_key), across(random_value, own_value)),
    )
    norm = key.norm(dim=-1) * write.norm(dim=-1)
    scales = dict.fromkeys(PLACEMENTS, norm) | dict(coefficient=torch.tensor(firings.coefficient.to_numpy()).to(norm))
    nothing = key[:, None], torch.zeros_like(write)[:, None]
    native = key[:, None], -write[:, None]
    scope, found = "write", []
    found.append(changes(factors, row, position, native, *(x[:, None] for x in nothing), scope))
    for placement in PLACEMENTS:
        taken = nothing if placement == "added" else native
        there = terms(put_in, put_in, dict.fromkeys(put_in, scales[placement]))
        found.append(changes(factors, row, position, taken, *there, scope))
    change = torch.cat(found, 1)
    rows, starts = (x.repeat_interleave(change.shape[1]) for x in (row, position))
    hidden, _ = host.branch(run, subject.layer, subject.head, rows, starts, change.flatten(0, 1))
    patched = host.logits(hidden[:, -1]).unflatten(0, (len(row), -1))
    before = host.logits(run.final[row, position + STEPS - 1])
    divergence = kl(before[:, None], patched)
    tables = []
    for number, placement in enumerate(PLACEMENTS):
        first = 1 + number * len(put_in)
        columns = dict(zip(put_in, range(first, first + len(put_in)), strict=True))
        table = firings.drop(columns="row").assign(placement=placement, kl_delete=divergence[:, 0].numpy())
        table = table.assign(**{f"kl_{name}": divergence[:, c].numpy() for name, c in columns.items()})
        if placement == "added":
            shift = {name: patched[:, c] - before for name, c in columns.items()}
            for name in CONTROLS:
                for top in tops:
                    table[f"overlap_{name}_{top}"] = overlap(shift["atom"], shift[name], top).numpy()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def selectivity(suite: Suite) -> pd.DataFrame:
    """results selectivity.csv: a line a firing and placement, in every cell of the hosts that are asked."""
    parts = []
    for name, own in ablation_hosts(suite).items():
        windows = firing_windows(suite, name)[slice(0, own.selectivity.windows)]
        cells = [suite.cell(name, place) for place in suite.profile.hosts[name].cells]
        drawn = []
        for subject in heldout_subjects(suite, name, cells, "main", windows):
            firings = firings_of(suite, subject, windows)
            drawn.append((subject, draw_in_rounds(firings, own.selectivity.firings, suite.profile.seed)))
        inputs = dict(settings=own.selectivity, data=suite.profile.data, saes=suite.sae_files(name), cells=cells)
        options = dict(tops=own.selectivity.tops, batch_rows=suite.profile.section("replacement", name).batch_rows)
        parts.append(
            run_firings(suite, name, "selectivity", windows, drawn, inputs, compare, modules=(__name__,), **options)
        )
    return suite.gather("selectivity", parts)


def selectivity_tables(suite: Suite, firings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write and return results selectivity_summary.csv (atom against controls) and selectivity_overlap."""
    resamples, seed = suite.profile.ablations.bootstrap, suite.profile.seed
    named = firings.merge(suite.cells[["host", "layer", "head", "place"]], on=["host", "layer", "head"])
    rows, overlaps = [], []
    for (host, target, placement), group in named.groupby(["host", "target", "placement"], sort=False):
        for cells, part in [("pooled", group), *group.groupby("place", sort=False)]:
            where = dict(host=host, target=target, cells=cells)
            for control in CONTROLS:
                line = where | dict(placement=placement, control=control)
                rows.append(line | against(part, control, resamples, seed))
                if placement == "added":
                    overlaps += [where | dict(control=control) | x for x in _overlaps(part, control, resamples, seed)]
    tables = dict(selectivity_summary=rows, selectivity_overlap=overlaps)
    return tuple(suite.write(name, pd.DataFrame(table)) for name, table in tables.items())


def against(part: pd.DataFrame, control: str, resamples: int, seed: int) -> dict:
    """Return how often the atom's KL is below the control's, with Wilson's interval (ci) and the bootstrap by
    atom (boot).

    Also the p-value of a paired Wilcoxon test, and Cliff's delta, which is positive where the control's KL is
    larger.
    """
    other, atoms = part[f"kl_{control}"], atom_names(part)
    return dict(
        n=len(part),
        n_atoms=atoms.nunique(),
        **rate_row(beats(part, "atom", control), resamples, seed, "atom_closer", boot=atoms),
        kl_atom=part.kl_atom.median(),
        kl_control=other.median(),
        kl_delete=part.kl_delete.median(),
        wilcoxon_p=paired_wilcoxon(part.kl_atom, other).p,
        cliffs_delta=cliffs_delta(other, part.kl_atom),
    )


def _overlaps(part: pd.DataFrame, control: str, resamples: int, seed: int) -> list[dict]:
    """Return one row per K: 1 - overlap, with the wider of the bootstraps by atom and by passage."""
    rows, prefix = [], f"overlap_{control}_"
    for column in [name for name in part if name.startswith(prefix)]:
        selective = 1 - part[column]
        by = (cluster_bootstrap(selective, c, resamples=resamples, seed=seed) for c in (atom_names(part), part.passage))
        low, high = wider(*by)
        top = int(column[len(prefix) :])
        rows.append(dict(top=top, selectivity=selective.mean(), ci_low=low, ci_high=high, n=len(part)))
    return rows
