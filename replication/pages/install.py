"""Notebook 10: the install experiment over a profile's hosts (the paper's Sec. 4, App. I.6)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from replication.statistics import wilson
from replication.study.profile import Install
from replication.study.study import Suite
from writesae.evaluate.install import doses, draw_targets, native_continuations, setting, trials


def _classes(group: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [("all", group), *group.groupby("target_class", sort=False)]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (host, direction, target class or all, magnitude).

    Columns: inclusion with Wilson's interval of the edited one, the median lift in nats, change of ranks.
    """
    rows = []
    for (host, direction, magnitude), group in table.groupby(["host", "direction", "magnitude"]):
        for name, part in _classes(group):
            low, high = wilson(int(part.included_edited.sum()), len(part))
            row = dict(host=host, direction=direction, target_class=name, magnitude=magnitude, n=len(part))
            row |= dict(included_native=part.included_native.mean(), included_edited=part.included_edited.mean())
            row |= dict(ci_low=low, ci_high=high, median_lift=part.first_step_lift.median())
            row["rank_improved"] = (part.edited_rank < part.native_rank).mean()
            row["median_rank_shift"] = (part.native_rank - part.edited_rank).median()
            rows.append(row)
    return pd.DataFrame(rows)


# The stage of notebook 10.


def run(suite: Suite) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results install.csv (a line a trial) and install_dose.csv (a line a prompt, position, target and direction)."""
    return tuple(
        suite.gather(table, [_stage(suite, name, table, work) for name in suite.profile.hosts])
        for table, work in (("install", trials), ("install_dose", doses))
    )


def _stage(suite: Suite, name: str, table: str, work) -> pd.DataFrame:
    """One of the two tables, a group of trials for each distance from the end of the prompt."""
    profile, settings = suite.profile, suite.profile.section("install", name)
    host, cell = suite.host(name), suite.cell(name, settings.place)
    windows = suite.windows(name, "heldout")
    first = np.unique(windows.passage.numpy(), return_index=True)[1]  # a prompt a passage
    if len(first) < settings.prompts:
        raise ValueError(
            f"{settings.prompts} prompts are asked for and the held-out windows are of {len(first)} passages: "
            "lower install.prompts, or raise data.heldout_windows in the profile."
        )
    picked = np.sort(np.random.default_rng(profile.seed).choice(first, settings.prompts, replace=False))
    prompts = windows[picked].beginnings(settings.prompt_tokens)

    def compute(distance: int) -> pd.DataFrame:
        run = host.run(prompts.tokens)
        with torch.no_grad():
            targets, labels = draw_targets(host.logits(run.final[:, -1]), settings, profile.seed)
        trial = setting(host, run, cell, targets, labels, distance, settings, profile.saes.write)
        if work is trials:
            found = work(host, cell, trial, native_continuations(host, run, settings), settings)
        else:
            found = work(host, cell, trial, settings)
        return found.assign(host=name, layer=cell[0], head=cell[1], distance=distance)

    inputs = dict(settings=settings, data=profile.data, cell=cell, write=profile.saes.write)
    return suite.staged(table, name, list(settings.distances), compute, [__name__], inputs)


def summarise_doses(table: pd.DataFrame, settings: Install) -> pd.DataFrame:
    """Return one row per (host, direction, target class or all): the share of trials that some dose reaches.

    Wilson's interval, and quartiles of the dose, which are infinite beyond the largest dose.
    """
    rows = []
    for (host, direction), group in table.groupby(["host", "direction"]):
        for name, part in _classes(group):
            reached = int(np.isfinite(part.dose).sum())
            low, high = wilson(reached, len(part))
            quartiles = np.quantile(part.dose.to_numpy(), [0.25, 0.5, 0.75], method="inverted_cdf")
            row = dict(host=host, direction=direction, target_class=name, n=len(part), reached=reached / len(part))
            row |= dict(ci_low=low, ci_high=high, largest_dose=max(settings.doses))
            rows.append(row | dict(zip(("dose_p25", "dose_median", "dose_p75"), quartiles, strict=True)))
    return pd.DataFrame(rows)
