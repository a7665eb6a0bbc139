"""Notebook 12: the install experiment over a profile's hosts (the paper's Sec. 4, App. I.6)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from replication import layout
from replication.statistics import ci, share_of_trials
from replication.study.firings import passage_prompts
from replication.study.profile import Install
from replication.study.study import Study
from writesae.evaluate.install import doses, draw_targets, native_continuations, setting, trials


def _classes(group: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [("all", group), *group.groupby("target_class", sort=False)]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return inclusion, lift in nats and ranks per (host, direction, class or all, magnitude)."""
    rows = []
    for (host, direction, magnitude), group in table.groupby(["host", "direction", "magnitude"]):
        for name, part in _classes(group):
            row = dict(host=host, direction=direction, target_class=name, magnitude=magnitude, n=len(part))
            row |= dict(included_native=part.included_native.mean(), included_edited=part.included_edited.mean())
            row |= ci(share_of_trials(part.included_edited, part))
            row["median_lift"] = part.first_step_lift.median()
            row["rank_improved"] = (part.edited_rank < part.native_rank).mean()
            rows.append(row | dict(median_rank_shift=(part.native_rank - part.edited_rank).median()))
    return pd.DataFrame(rows)


def run(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write results install (per trial) and install_dose (per prompt, position, target and direction)."""
    tables = ("install", "install_dose")
    return tuple(study.gather(x, [_stage(study, name, x) for name in study.profile.hosts]) for x in tables)


def _stage(study: Study, name: str, table: str) -> pd.DataFrame:
    """Return one of a host's two tables; one group of trials per distance from the end of the prompt."""
    profile, settings = study.profile, study.profile.section("install", name)
    prompts = passage_prompts(study, name, settings.prompts, settings.prompt_tokens)
    given = dict(host=study.host(name), prompts=prompts, cell=study.cell(name, settings.place), settings=settings)
    given |= dict(write=profile.saes.write, seed=profile.seed, dose=table == "install_dose")
    return study.stage(table, name, settings.distances, _trials, **given)


def _trials(distance: int, host, prompts, cell, write, settings, seed, dose: bool) -> pd.DataFrame:
    """Return the trials, or the doses, of writes at a distance from the end of the prompts."""
    run = host.run(prompts.tokens)
    with torch.no_grad():
        native = host.logits(run.final[:, -1])
    targets, labels = draw_targets(native, settings.rank_classes, settings.targets_per_class, seed)
    trial = setting(host, run, targets, labels, distance, writes=settings.writes, write=write)
    if dose:
        rows = doses(host, cell, trial, grid=settings.doses, bisections=settings.bisections)
    else:
        native = native_continuations(host, run, settings.new_tokens)
        rows = trials(host, cell, trial, native, magnitudes=settings.magnitudes)
    return rows.assign(host=host.name, layer=cell[0], head=cell[1], distance=distance)


def summarise_doses(table: pd.DataFrame, settings: Install) -> pd.DataFrame:
    """Return the share of trials that some dose reaches, per (host, direction, target class or all).

    With its interval, and quartiles of the dose, which are infinite beyond the largest dose."""
    rows = []
    for (host, direction), group in table.groupby(["host", "direction"]):
        for name, part in _classes(group):
            reached = np.isfinite(part.dose)
            quartiles = np.quantile(part.dose.to_numpy(), [0.25, 0.5, 0.75], method="inverted_cdf")
            row = dict(host=host, direction=direction, target_class=name, n=len(part), reached=reached.mean())
            row |= ci(share_of_trials(reached, part)) | dict(largest_dose=max(settings.doses))
            rows.append(row | dict(zip(("dose_p25", "dose_median", "dose_p75"), quartiles, strict=True)))
    return pd.DataFrame(rows)


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Return inclusion and lift for a reader."""
    columns = {"n": layout.numbers(summary.n, ",.0f")}
    columns |= {"said without the writes (%)": layout.numbers(summary.included_native, ".1f", 100)}
    columns |= {"with them (%)": layout.estimates(summary, "included_edited", "ci_low", "ci_high", digits=1)}
    columns |= {"median lift (nats)": layout.numbers(summary.median_lift)}
    columns |= {"median ranks gained": layout.numbers(summary.median_rank_shift, ".0f")}
    return layout.shown(summary, ["direction", "target_class", "magnitude"], columns)


def shown_doses(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the share of targets that some dose makes the next token, for a reader."""
    columns = {"n": layout.numbers(summary.n, ",.0f"), "largest dose": summary.largest_dose}
    columns |= {"come next (%)": layout.estimates(summary, "reached", "ci_low", "ci_high", digits=1)}
    return layout.shown(summary, ["direction", "target_class"], columns)
