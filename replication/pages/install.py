"""Notebook 10: the install experiment over a profile's hosts (the paper's Sec. 4, App. I.6)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from replication.statistics import wilson
from replication.study.firings import passage_prompts
from replication.study.profile import Install
from replication.study.study import Suite
from writesae.evaluate.install import doses, draw_targets, native_continuations, setting, trials


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One line a (host, direction, class or all, magnitude): inclusion with its Wilson interval, lift, ranks."""
    rows = []
    for (host, direction, magnitude), group in table.groupby(["host", "direction", "magnitude"]):
        for name, part in [("all", group), *group.groupby("target_class", sort=False)]:
            low, high = wilson(int(part.included_edited.sum()), len(part))
            rows.append(
                dict(
                    host=host,
                    direction=direction,
                    target_class=name,
                    magnitude=magnitude,
                    n=len(part),
                    included_native=part.included_native.mean(),
                    included_edited=part.included_edited.mean(),
                    ci_low=low,
                    ci_high=high,
                    median_lift=part.first_step_lift.median(),
                    rank_improved=(part.edited_rank < part.native_rank).mean(),
                    median_rank_shift=(part.native_rank - part.edited_rank).median(),
                )
            )
    return pd.DataFrame(rows)


# The stage of notebook 10.


def run(suite: Suite) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return results install.csv (a row per trial) and install_dose.csv (per prompt, position, target and
    direction)."""
    tables = ("install", "install_dose")
    return tuple(suite.gather(x, [_stage(suite, name, x) for name in suite.profile.hosts]) for x in tables)


def _stage(suite: Suite, name: str, table: str) -> pd.DataFrame:
    """Return one of a host's two tables, a group of trials per distance from the end of the prompt."""
    profile, settings = suite.profile, suite.profile.section("install", name)
    host, cell = suite.host(name), suite.cell(name, settings.place)
    prompts = passage_prompts(suite, name, settings.prompts, settings.prompt_tokens)

    def compute(distance: int) -> pd.DataFrame:
        run = host.run(prompts.tokens)
        with torch.no_grad():
            native = host.logits(run.final[:, -1])
        targets, labels = draw_targets(native, settings.rank_classes, settings.targets_per_class, profile.seed)
        writes = dict(writes=settings.writes, write=profile.saes.write)
        trial = setting(host, run, cell, targets, labels, distance, **writes)
        if table == "install":
            native = native_continuations(host, run, settings.new_tokens)
            options = dict(magnitudes=settings.magnitudes, new_tokens=settings.new_tokens)
            rows = trials(host, cell, trial, native, **options)
        else:
            rows = doses(host, cell, trial, grid=settings.doses, bisections=settings.bisections)
        return rows.assign(host=name, layer=cell[0], head=cell[1], distance=distance)

    inputs = dict(settings=settings, data=profile.data, cell=cell, write=profile.saes.write, seed=profile.seed)
    return suite.staged(table, name, list(settings.distances), compute, [__name__], inputs)


def summarise_doses(table: pd.DataFrame, settings: Install) -> pd.DataFrame:
    """One line a (host, direction, class or all): the share of trials with any dose, and quantiles of the dose; a
    quantile beyond the largest dose is infinite."""
    rows = []
    for (host, direction), group in table.groupby(["host", "direction"]):
        for name, part in [("all", group), *group.groupby("target_class", sort=False)]:
            reached = int(np.isfinite(part.dose).sum())
            low, high = wilson(reached, len(part))
            quantiles = dict(zip(("dose_p25", "dose_median", "dose_p75"), _quantiles(part.dose), strict=True))
            rows.append(
                dict(host=host, direction=direction, target_class=name, n=len(part), reached=reached / len(part))
                | dict(ci_low=low, ci_high=high, largest_dose=max(settings.doses))
                | quantiles
            )
    return pd.DataFrame(rows)


def _quantiles(doses: pd.Series) -> np.ndarray:
    return np.quantile(doses.to_numpy(), [0.25, 0.5, 0.75], method="inverted_cdf")
