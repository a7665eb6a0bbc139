"""The firings of a study's SAEs on held-out text, and the measurement of drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd

from replication.study.study import Suite
from writesae.evaluate.firings import CellSAE, Places, all_firings, encode_cell
from writesae.evaluate.replacement import STEPS, replace
from writesae.harvesting import Cell, harvest
from writesae.hosts.base import Host
from writesae.text import Windows

CONDITIONS_OF_SURVEYS = (
    "delete",
    "atom",
    "random",
    "mean_write",
)  # of the replacement test, where many SAEs are tested


def encoded_saes(suite: Suite, host_name: str, cells: Iterable[Cell], role: str, windows: Windows) -> list[CellSAE]:
    """Return the SAE of each cell and target, with its active atoms on the windows."""
    profile, saes = suite.profile, []
    factors = harvest(suite.host(host_name), windows.tokens, list(cells), profile.data.batch_windows)
    for layer, head in cells:
        for target in profile.saes.targets:
            sae = suite.sae(host_name, layer, head, target, role)
            cell_sae = encode_cell((layer, head), target, profile.saes.write, sae, factors[layer, head])
            if role == "main" and target == "state":
                cell_sae.flat = suite.sae(host_name, layer, head, target, "flat")
                cell_sae.states = factors[layer, head].history(target)
            saes.append(cell_sae)
    return saes


def firings_of(suite: Suite, cell_sae: CellSAE, windows: Windows) -> pd.DataFrame:
    """Return all firings of an SAE that leave room for the tokens that the replacement test reads."""
    first, last = suite.profile.data.first_position, windows.tokens.shape[1] - STEPS
    return all_firings(cell_sae, windows.passage, first, last)


def measure_windows(
    start: int,
    host: Host,
    windows: Windows,
    drawn: list[tuple[CellSAE, pd.DataFrame]],
    size: int,
    seed: int,
    measure: Callable[..., pd.DataFrame] = replace,
    options: Mapping = MappingProxyType({}),
) -> pd.DataFrame:
    """Return `measure` of the drawn firings in `size` windows from `start` on; one native run serves all of them."""
    tables, run = [], None
    for cell_sae, firings in drawn:
        part = firings[(firings.window >= start) & (firings.window < start + size)]
        if len(part):
            run = run or host.run(windows[slice(start, start + size)].tokens)
            places = Places.of(part, part.window.to_numpy() - start)
            tables.append(measure(host, run, cell_sae, part, places, seed, **options))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"host": []})


def run_firings(
    study: Suite,
    host_name: str,
    name: str,
    windows: Windows,
    drawn: list[tuple[CellSAE, pd.DataFrame]],
    measure: Callable[..., pd.DataFrame] = replace,
    **options,
) -> pd.DataFrame:
    """Return the host's part of the table NAME: `measure` of every drawn firing, one group of windows after another.

    drawn: made before any outcome is measured.
    """
    size = study.profile.data.batch_windows
    given = dict(host=study.host(host_name), windows=windows, drawn=drawn, size=size, seed=study.profile.seed)
    groups = range(0, len(windows), size)
    return study.stage(name, host_name, groups, measure_windows, **given, measure=measure, options=options)


def firing_windows(suite: Suite, host_name: str) -> Windows:
    """Return the held-out windows in which firings are looked for."""
    return suite.windows(host_name, "heldout")[slice(0, suite.profile.data.firing_windows)]


def passage_prompts(suite: Suite, host_name: str, count: int, tokens: int) -> Windows:
    """Return the beginnings of `count` held-out passages, drawn at random. ValueError for fewer, or shorter, passages."""
    windows = suite.windows(host_name, "heldout")
    first = np.unique(windows.passage.numpy(), return_index=True)[1]
    if len(first) < count:
        raise ValueError(
            f"{count} prompts are asked for and the held-out windows are of {len(first)} passages: ask for fewer prompts, "
            "or raise data.heldout_windows in the profile."
        )
    picked = np.sort(np.random.default_rng(suite.profile.seed).choice(first, count, replace=False))
    return windows[picked].beginnings(tokens)
