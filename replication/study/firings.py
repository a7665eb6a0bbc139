"""Firings of the SAEs of a study on held-out text, and measurements of a sample of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import product

import numpy as np
import pandas as pd

from replication.study.profile import PAPER_PLACES
from replication.study.study import Study
from replication.study.training import main_variants
from writesae.evaluate.firings import CellSAE, all_firings, draw_positions, encode_cell
from writesae.evaluate.replacement import STEPS, measure_group, replace
from writesae.harvesting import Cell, harvest
from writesae.hosts.base import Host
from writesae.text import Windows

CONDITIONS_OF_SURVEYS = ("delete", "atom", "random", "mean_write")  # of tests with many SAEs


Wanted = tuple[Cell, str, str]  # an SAE of a study: its cell, target and role


def saes_on(
    study: Study, host_name: str, windows: Windows, wanted: Sequence[Wanted], flat: Collection[Cell] = ()
) -> list[CellSAE]:
    """Return SAEs in the order of `wanted`, applied to the windows, with one harvest of their cells.

    flat: the cells whose main SAE of states gets the flat SAE beside it.
    """
    profile, saes = study.profile, []
    cells = list(dict.fromkeys(cell for cell, _, _ in wanted))
    factors = harvest(study.host(host_name), windows.tokens, cells, profile.data.batch_windows, progress=False)
    for cell, target, role in wanted:
        sae = study.sae(host_name, *cell, target, role)
        saes.append(encode_cell(cell, target, profile.saes.write, sae, factors[cell]))
        if role == "main" and target == "state" and cell in flat:
            saes[-1].flat = study.sae(host_name, *cell, target, "flat")
            saes[-1].states = factors[cell].history(target)
    return saes


def encoded_saes(study: Study, host_name: str, cells: Iterable[Cell], role: str, windows) -> list[CellSAE]:
    """Return the SAE of each cell and target, with its active atoms on the windows."""
    flat = {study.cell(host_name, place) for place in study.profile.hosts[host_name].paper_places}
    wanted = [(cell, target, role) for cell, target in product(cells, study.profile.saes.targets)]
    return saes_on(study, host_name, windows, wanted, flat)


def headline_saes(study: Study, host_name: str, windows: Windows) -> list[CellSAE]:
    """Return the SAEs of all centres and seeds of each chosen cell and target, applied to the windows."""
    wanted = [
        (study.cell(host_name, place), target, variant.role)
        for place, target in product(study.profile.hosts[host_name].cells, study.profile.saes.targets)
        for variant in main_variants(study, host_name, place)
    ]
    return saes_on(study, host_name, windows, wanted)


def drawn_positions(study: Study, windows: Windows, count: int) -> pd.DataFrame:
    """Return places of the draw `positions`: the same for every cell, SAE, seed and target of a host."""
    first, last = study.profile.data.first_position, windows.tokens.shape[1] - STEPS
    return draw_positions(windows.passage, first, last, count, study.profile.seed)


def firings_of(study: Study, cell_sae: CellSAE, windows: Windows) -> pd.DataFrame:
    """Return all firings of an SAE that are followed by the tokens of the replacement test."""
    first, last = study.profile.data.first_position, windows.tokens.shape[1] - STEPS
    return all_firings(cell_sae, windows.passage, first, last)


def run_firings(
    study: Study,
    host_name: str,
    name: str,
    windows: Windows,
    drawn: list[tuple[CellSAE, pd.DataFrame]],
    measure: Callable[..., pd.DataFrame] = replace,
    **options,
) -> pd.DataFrame:
    """Return the host's part of the table NAME: `measure` of the firings `drawn`, by groups of windows."""
    size = study.profile.data.batch_windows
    given = dict(host=study.host(host_name), windows=windows, drawn=drawn, size=size, seed=study.profile.seed)
    groups = range(0, len(windows), size)
    return study.stage(name, host_name, groups, _measure, **given, measure=measure, options=options)


def _measure(start: int, host: Host, windows, drawn, size, seed, measure, options: dict) -> pd.DataFrame:
    return measure_group(host, windows, drawn, start, size, seed, measure, **options)


def firing_windows(study: Study, host_name: str) -> Windows:
    """Return the held-out windows that are searched for firings."""
    return study.windows(host_name, "heldout")[: study.profile.data.firing_windows]


def by_place(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with their place as `cells`; before them those of the paper's cells, as "pooled".

    cells: cells.csv.
    """
    keys = ["host", "layer", "head"]
    named = table.merge(cells[[*keys, "place"]], on=keys).rename(columns=dict(place="cells"))
    return pd.concat([named[named.cells.isin(PAPER_PLACES)].assign(cells="pooled"), named])


def passage_prompts(study: Study, host_name: str, count: int, tokens: int) -> Windows:
    """Return the beginnings of `count` random held-out passages. Raises ValueError if there are fewer."""
    windows = study.windows(host_name, "heldout")
    first = np.unique(windows.passage.numpy(), return_index=True)[1]
    if len(first) < count:
        raise ValueError(
            f"{count} prompts are asked for and the held-out windows are of {len(first)} passages: ask for "
            "fewer prompts, or increase data.heldout_windows in the profile."
        )
    picked = np.sort(np.random.default_rng(study.profile.seed).choice(first, count, replace=False))
    return windows[picked].beginnings(tokens)
