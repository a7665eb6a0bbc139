"""The firings of a study's SAEs on held-out text, and the measurement of drawn ones."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from replication.study.study import Suite
from writesae.evaluate.firings import all_firings
from writesae.evaluate.replacement import STEPS, Subject, make_subject, replace
from writesae.harvesting import harvest
from writesae.hosts.base import Host
from writesae.text import Windows


def heldout_subjects(suite: Suite, host_name: str, cells, role: str, windows: Windows) -> list[Subject]:
    """A Subject for each (cell, target), its SAE's firings encoded on the windows."""
    host, profile = suite.host(host_name), suite.profile
    found = harvest(host, windows.tokens, list(cells), profile.data.batch_windows)
    subjects = []
    for layer, head in cells:
        factors = found[layer, head]
        for target in profile.saes.targets:
            sae = suite.sae(host_name, layer, head, target, role)
            subject = make_subject((layer, head), target, profile.saes.write, sae, factors)
            if role == "main" and target == "state":
                subject.flat = suite.sae(host_name, layer, head, target, "flat")
                subject.states = factors.history(target)
            subjects.append(subject)
    return subjects


def firings_of(suite: Suite, subject: Subject, windows: Windows) -> pd.DataFrame:
    """All of a subject's firings that leave room for the tokens that the test reads."""
    first, last = suite.profile.data.first_position, windows.tokens.shape[1] - STEPS
    return all_firings(subject.encoded, windows.passage, first, last)


def measure_group(
    host: Host,
    windows: Windows,
    drawn: list[tuple[Subject, pd.DataFrame]],
    start: int,
    size: int,
    seed: int,
    measure: Callable[..., pd.DataFrame] = replace,
    **options,
) -> pd.DataFrame:
    """`measure` those of the drawn firings that are in `size` windows from `start` on; one native run serves them all."""
    tables, run = [], None
    for subject, firings in drawn:
        here = firings[(firings.window >= start) & (firings.window < start + size)]
        if len(here):
            run = run or host.run(windows[slice(start, start + size)].tokens)
            tables.append(measure(host, run, subject, here.assign(row=here.window - start), seed, **options))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"host": []})


def run_firings(
    suite: Suite,
    host_name: str,
    name: str,
    windows: Windows,
    drawn: list,
    inputs: dict,
    measure: Callable[..., pd.DataFrame] = replace,
    modules: tuple[str, ...] = (__name__,),
    **options,
) -> pd.DataFrame:
    """`measure` every drawn firing, window group by window group; the host's part of the table NAME.

    drawn: (subject, firings) pairs, made before any outcome is seen; modules: those that decide what `measure` gives.
    """
    host, size = suite.host(host_name), suite.profile.data.batch_windows

    def compute(start: int) -> pd.DataFrame:
        return measure_group(host, windows, drawn, start, size, suite.profile.seed, measure, **options)

    groups = list(range(0, len(windows), size))
    return suite.staged(name, host_name, groups, compute, modules, inputs)


def firing_windows(suite: Suite, host_name: str) -> Windows:
    """The held-out windows in which firings are looked for."""
    return suite.windows(host_name, "heldout")[slice(0, suite.profile.data.firing_windows)]
