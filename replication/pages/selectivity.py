"""Page 13_ablations, selectivity: would another direction do as well as the atom (the paper's App. I.1)?

| control    | what                                                                           |
|------------|--------------------------------------------------------------------------------|
| random     | a rank-1 matrix of Gaussian factors                                            |
| orthogonal | the same with key and value each orthogonal to those of the atom               |

Each replaces the native write at the atom's coefficient or at the write's norm, or is added to the state at
the write's norm beside the native write ("added"). The latter also has the paper's measure: 1 - |A and B| /
K, for the K tokens A whose logits the atom moves most and the K tokens B that the control moves most."""

from __future__ import annotations

from itertools import product

import pandas as pd
import torch

from replication import layout
from replication.statistics import beats, ci, cliffs_delta, cluster_bootstrap, paired_wilcoxon, rate_row, wider
from replication.study.firings import by_place, encoded_saes, firing_windows, firings_of, run_firings
from replication.study.study import Study
from replication.study.training import ablation_hosts
from writesae.edit import kl
from writesae.evaluate.firings import CellSAE, Places, atom_names, draw_in_rounds
from writesae.evaluate.replacement import AMPLITUDES, STEPS, changes, patched_logits, rank_one, side_by_side
from writesae.hosts.base import Host, Run

CONTROLS = ("random", "orthogonal")
PLACEMENTS = (*AMPLITUDES, "added")


def directions(places: Places, d: int, seed: int) -> torch.Tensor:
    """Return a Gaussian vector [n, d] per firing that depends only on the seed and the firing."""
    return places.draw(seed + 1, lambda generator: torch.randn(2, d, generator=generator)[0])


def across(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the part of x [n, d] that is orthogonal to the unit vectors [n, d]."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def overlap(a: torch.Tensor, b: torch.Tensor, top: int) -> torch.Tensor:
    """Return the share [n] of the `top` largest |a| of [n, V] that are among those of |b|."""
    first, second = (x.abs().topk(top, dim=-1).indices for x in (a, b))
    return (first[:, :, None] == second[:, None]).any(-1).double().mean(-1)


@torch.no_grad()
def compare(host: Host, run: Run, cell_sae: CellSAE, firings, places: Places, seed, tops, batch_rows=512):
    """Return kl_delete, kl_atom, kl_random, kl_orthogonal in nats per (firing, placement).

    Where the direction is added beside the native write, also overlap_CONTROL_K for each K of `tops`. places:
    where the firings are in the run."""
    pieces = places.pieces(1 + len(PLACEMENTS) * (1 + len(CONTROLS)), batch_rows)
    tables = [_compare(host, run, cell_sae, firings.iloc[x], some, seed, tops) for x, some in pieces]
    where = dict(host=host.name, layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target)
    return pd.concat(tables, ignore_index=True).assign(**where)


def _compare(host, run, cell_sae, firings, places, seed, tops) -> pd.DataFrame:
    factors = host.factors(run, cell_sae.layer, cell_sae.head)
    native = factors.at(places.row, places.position)
    key, write = native.key, native.write(cell_sae.write)
    atom_key, atom_value = (x[places.atom] for x in cell_sae.sae.atoms())
    sides = [host.d_k, host.d_v]
    random_key, random_value = directions(places, sum(sides), seed).to(key).split(sides, -1)
    put_in = dict(
        atom=rank_one(atom_key, atom_value),
        random=rank_one(random_key, random_value),
        orthogonal=rank_one(across(random_key, atom_key), across(random_value, atom_value)),
    )
    norm = key.norm(dim=-1) * write.norm(dim=-1)
    scales = dict.fromkeys(PLACEMENTS, norm) | dict(coefficient=places.coefficient.to(norm))
    nothing, take_out = (key[:, None], torch.zeros_like(write)[:, None]), (key[:, None], -write[:, None])
    parts = [changes(factors, places, take_out, [x[:, None] for x in nothing], "write")]  # deletion
    for placement in PLACEMENTS:
        terms = side_by_side(put_in, list(put_in), dict.fromkeys(put_in, scales[placement]))
        parts.append(changes(factors, places, nothing if placement == "added" else take_out, terms, "write"))
    patched = patched_logits(host, run, cell_sae, places, torch.cat(parts, 1))
    before = host.logits(run.final[places.row, places.position + STEPS - 1])
    divergence, tables = kl(before[:, None], patched).numpy(), []
    for number, placement in enumerate(PLACEMENTS):
        columns = {name: 1 + number * len(put_in) + i for i, name in enumerate(put_in)}
        table = firings.assign(placement=placement, kl_delete=divergence[:, 0])
        tables.append(table.assign(**{f"kl_{name}": divergence[:, c] for name, c in columns.items()}))
    shift = {name: patched[:, c] - before for name, c in columns.items()}  # of the last placement, "added"
    for name, top in product(CONTROLS, tops):
        tables[-1][f"overlap_{name}_{top}"] = overlap(shift["atom"], shift[name], top).numpy()
    return pd.concat(tables, ignore_index=True)


def selectivity(study: Study) -> pd.DataFrame:
    """Write results selectivity.csv, one row per (firing, placement), for the hosts with ablations."""
    parts = []
    for name, section in ablation_hosts(study).items():
        settings, drawn = section.selectivity, []
        windows = firing_windows(study, name)[slice(0, settings.windows)]
        cells = [study.cell(name, place) for place in study.profile.hosts[name].paper_places]
        for cell_sae in encoded_saes(study, name, cells, "main", windows):
            firings = firings_of(study, cell_sae, windows)
            drawn.append((cell_sae, draw_in_rounds(firings, settings.firings, study.profile.seed)))
        options = dict(tops=settings.tops, batch_rows=study.profile.section("replacement", name).batch_rows)
        parts.append(run_firings(study, name, "selectivity", windows, drawn, compare, **options))
    return study.gather("selectivity", parts)


def selectivity_tables(study: Study, firings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write and return results selectivity_summary.csv (atom against controls) and selectivity_overlap."""
    resamples, seed = study.profile.ablations.bootstrap, study.profile.seed
    rows, overlaps = [], []
    for (host, target, placement), group in firings.groupby(["host", "target", "placement"], sort=False):
        for cells, part in by_place(group, study.cells).groupby("cells", sort=False):
            where = dict(host=host, target=target, cells=cells)
            for control in CONTROLS:
                line = where | dict(placement=placement, control=control)
                rows.append(line | against(part, control, resamples, seed))
                if placement == "added":
                    overlaps += [where | dict(control=control) | x for x in _overlaps(part, control, resamples, seed)]
    tables = dict(selectivity_summary=rows, selectivity_overlap=overlaps)
    return tuple(study.write(name, pd.DataFrame(table)) for name, table in tables.items())


def against(part: pd.DataFrame, control: str, resamples: int, seed: int) -> dict:
    """Return how often the atom's KL is below the control's (Wilson, bootstrap by atom), and tests.

    Cliff's delta is positive if the control's KL is larger."""
    other, atoms = part[f"kl_{control}"], atom_names(part)
    row = dict(n=len(part), n_atoms=atoms.nunique())
    row |= rate_row(beats(part, "atom", control), resamples, seed, "atom_closer", boot=atoms)
    row |= dict(kl_atom=part.kl_atom.median(), kl_control=other.median(), kl_delete=part.kl_delete.median())
    wilcoxon_p = paired_wilcoxon(part.kl_atom, other)
    return row | dict(wilcoxon_p=wilcoxon_p, cliffs_delta=cliffs_delta(other, part.kl_atom))


def _overlaps(part: pd.DataFrame, control: str, resamples: int, seed: int) -> list[dict]:
    """Return one row per K: 1 - overlap, with the wider of the bootstraps by atom and by passage."""
    rows, prefix = [], f"overlap_{control}_"
    for column in part.filter(regex=f"^{prefix}"):
        selective = 1 - part[column]
        by = (cluster_bootstrap(selective, c, resamples=resamples, seed=seed) for c in (atom_names(part), part.passage))
        row = dict(top=int(column.removeprefix(prefix)), selectivity=selective.mean())
        rows.append(row | ci(wider(*by)) | dict(n=len(part)))
    return rows


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Return how often the atom's KL is below the control's, for a reader."""
    sizes = zip(1000 * summary.kl_atom, 1000 * summary.kl_control, strict=True)
    columns = {"firings": summary.n}
    columns |= {"atom nearer (%)": layout.estimates(summary, "atom_closer", "boot_low", "boot_high")}
    columns |= {"KL atom, control (millinats)": [f"{atom:.2f}, {control:.2f}" for atom, control in sizes]}
    columns |= {"p": layout.p_values(summary.wilcoxon_p)}
    columns |= {"Cliff's delta": layout.numbers(summary.cliffs_delta)}
    return layout.shown(summary, ["target", "placement", "control"], columns)
