"""The firings of a study's SAEs on held-out text, and the measurement of drawn ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from replication.study.study import Suite
from writesae.evaluate.firings import CellSAE, all_firings, encode_cell
from writesae.evaluate.replacement import STEPS, measure_group, replace
from writesae.harvesting import Cell, harvest
from writesae.text import Windows


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


def run_firings(
    suite: Suite,
    host_name: str,
    name: str,
    windows: Windows,
    drawn: list[tuple[CellSAE, pd.DataFrame]],
    inputs: dict,
    measure: Callable[..., pd.DataFrame] = replace,
    **options,
) -> pd.DataFrame:
    """Return the host's part of the table NAME: `measure` of every drawn firing, window group by window
    group.

    drawn: made before any outcome is measured. The table depends on them, on the code of `measure`, its
    options and `inputs`, which name the SAEs' files.
    """
    host, size = suite.host(host_name), suite.profile.data.batch_windows
    places = [hashlib.sha256(firings.to_csv().encode()).hexdigest() for _, firings in drawn]
    inputs = inputs | dict(drawn=places, options=options)

    def compute(start: int) -> pd.DataFrame:
        return measure_group(host, windows, drawn, start, size, suite.profile.seed, measure, **options)

    groups = list(range(0, len(windows), size))
    return suite.staged(name, host_name, groups, compute, [__name__, measure.__module__], inputs)


def firing_windows(suite: Suite, host_name: str) -> Windows:
    """Return the held-out windows in which firings are looked for."""
    return suite.windows(host_name, "heldout")[slice(0, suite.profile.data.firing_windows)]


def passage_prompts(suite: Suite, host_name: str, count: int, tokens: int) -> Windows:
    """Return the beginnings of `count` random held-out passages. ValueError for fewer, or shorter,
    passages."""
    windows = suite.windows(host_name, "heldout")
    first = np.unique(windows.passage.numpy(), return_index=True)[1]
    if len(first) < count:
        raise ValueError(
            f"{count} prompts are asked for and the held-out windows are of {len(first)} passages: ask for fewer "
            "prompts, or raise data.heldout_windows in the profile."
        )
    picked = np.sort(np.random.default_rng(suite.profile.seed).choice(first, count, replace=False))
    return windows[picked].beginnings(tokens)
