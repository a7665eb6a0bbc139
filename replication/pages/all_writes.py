"""Notebook 06: the loss when all writes of a cell, or of all heads of a layer, are replaced at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from replication import layout, plots
from replication import statistics as stats
from replication.study import training
from replication.study.study import Study
from writesae.evaluate.all_writes import MeanWrites, replace_all_writes
from writesae.files import load_tensors
from writesae.harvesting import harvest
from writesae.hosts.base import Host
from writesae.recurrence import Factors
from writesae.sae.model import SAE
from writesae.text import Windows

SURVEY, POOLED = "survey", "pooled"
LAYER_PLACE = "middle"  # all heads of this cell's layer are also replaced together
CONDITIONS = {  # in the order of the figure
    "atom": "top atom",
    "atom_and_mean": "top atom + mean",
    "projection": "best atom, projected",
    "reconstruction": "whole reconstruction",
    "read": "state read through the SAE",
    "mean_write": "mean write",
    "token_mean_write": "token's mean write",
}
TRAININGS = {  # (target, centre) -> name in the figure
    ("write", "none"): "writes, without the mean",
    ("write", "mean"): "writes, with the mean",
    ("state", "none"): "states, without the mean",
    ("state", "mean"): "states, with the mean",
}
NO_SAE = "no SAE"
COLOURS = dict(zip((*TRAININGS.values(), NO_SAE), (plots.COLOURS[i] for i in (0, 9, 3, 1, 7)), strict=True))
TREND = ["training", "shown", "cells", "median", "worse_than_nothing", "rho", "rho_low", "rho_high"]
DESCRIPTION = ["target", "centre", "role", "seed"]
KEYS = ["host", "layer", "head", *DESCRIPTION, "condition"]


@dataclass
class Case:
    """Heads of one layer, and the SAEs that are tried on each of them.

    together: replace the writes of all heads in the same run, else of one head after another. saes: "ROLE
    TARGET" -> head -> SAE. windows: held-out. training: windows of the SAE split, for mean writes; stored:
    the factors of the only head over these, if notebook 01 has kept them."""

    layer: int
    heads: tuple[int, ...]
    together: bool
    saes: dict[str, dict[int, SAE]]
    windows: Windows
    training: Windows
    stored: Path | None = None

    @property
    def role(self) -> str:
        """The role of the rows without an SAE."""
        return "main" if self.stored else SURVEY


# The table


def all_writes(study: Study) -> pd.DataFrame:
    """Write results all_writes.csv: a row per (host, cell or layer, SAE, condition); without an SAE, target
    is empty.

    loss, loss_native, loss_none: nats per token; change: loss - loss_native; recovered: 1 - change /
    (loss_none - loss_native). Intervals (change_low, change_high; ci_low, ci_high): bootstrap by passage.
    windows, passages and n, the predicted tokens. head is empty where all heads of the layer are replaced
    together. Rows of the role "pooled" are means over the trainings (seeds) of a cell, target and centre;
    their intervals cover retraining."""
    tables, seed = [], study.profile.seed
    for name in study.profile.hosts:
        cases = headline_cases(study, name)
        if name == study.main:
            cases += survey_cases(study, name)
        resamples = study.profile.section("replacement", name).bootstrap
        given = dict(host=study.host(name), cases=cases, write=study.profile.saes.write)
        given |= dict(batch=study.profile.data.batch_windows, resamples=resamples, seed=seed)
        tables.append(study.stage("all_writes", name, range(len(cases)), measure, **given))
    return study.gather("all_writes", tables)


def one_per_passage(windows: Windows, count: int, seed: int) -> Windows:
    """Return a random window of each of `count` random passages (or of all, if there are fewer), in order.

    Intervals are by passage; like this each passage counts once."""
    order = np.random.default_rng(seed).permutation(len(windows))
    passages = pd.Series(windows.passage.numpy()[order], index=order)
    return windows[np.sort(passages.drop_duplicates().index[:count])]


def headline_cases(study: Study, host: str) -> list[Case]:
    """Return one case per cell of the headline, with all variants of its main SAEs."""
    targets, count = study.profile.saes.targets, study.profile.section("all_writes", host).windows
    windows, cases = one_per_passage(study.windows(host, "heldout"), count, study.profile.seed), []
    for place in study.profile.hosts[host].cells:
        (layer, head), saes = study.cell(host, place), {}
        for _, _, role in training.main_variants(study, host, place):
            saes |= {f"{role} {target}": {head: study.sae(host, layer, head, target, role)} for target in targets}
        stored = study.harvest_path(host, layer, head)
        cases.append(Case(layer, (head,), False, saes, windows, study.windows(host, "sae"), stored))
    return cases


def survey_cases(study: Study, host: str) -> list[Case]:
    """Return one case per surveyed layer, and one for all heads of a layer together, with the survey SAEs."""
    settings, heads = study.profile.section("all_writes", host), tuple(range(study.host(host).heads))
    survey, layers = study.windows(host, "sae")[: study.profile.data.survey_windows], study.survey_layers(host)
    whole = [layer for layer in layers if layer == study.cell(host, LAYER_PLACE)[0]]
    cases = []
    for layer, together in [(layer, True) for layer in whole] + [(layer, False) for layer in layers]:
        saes = {
            f"{SURVEY} {target}": {head: study.sae(host, layer, head, target, SURVEY) for head in heads}
            for target in study.profile.saes.targets
        }
        count = settings.windows if together else settings.survey_windows
        windows = one_per_passage(study.windows(host, "heldout"), count, study.profile.seed)
        cases.append(Case(layer, heads, together, saes, windows, survey))
    return cases


def measure(number: int, host: Host, cases: list[Case], write: str, batch: int, resamples: int, seed: int):
    """Return the rows of one case."""
    case, tables = cases[number], []
    means = mean_writes(host, case, write, batch)
    for heads in [case.heads] if case.together else [(head,) for head in case.heads]:
        saes = {name: {head: of_heads[head] for head in heads} for name, of_heads in case.saes.items()}
        chosen = {head: means[head] for head in heads}
        losses = replace_all_writes(host, case.windows, saes, chosen, layer=case.layer, write=write, batch=batch)
        described = pd.DataFrame([_described(name, saes, case.role) for name in losses.sae])
        losses = pd.concat([losses, described], axis=1)
        options = dict(tokens=case.windows.tokens.shape[1] - 1, resamples=resamples, seed=seed)
        rows = recovered(losses, **options)
        if case.stored:
            rows = pd.concat([rows, pooled(losses, **options)])
        tables.append(rows.assign(host=host.name, layer=case.layer, head=np.nan if case.together else heads[0]))
    table = pd.concat(tables, ignore_index=True)
    return table[KEYS + [name for name in table if name not in KEYS]]


def mean_writes(host: Host, case: Case, write: str, batch: int) -> dict[int, MeanWrites]:
    """Return the mean writes of each head of a case over its windows of the SAE split."""
    if case.stored:
        factors = {case.heads[0]: Factors(query=None, **load_tensors(case.stored)[0])}
    else:
        cells = [(case.layer, head) for head in case.heads]
        harvested = harvest(host, case.training, cells, batch, progress=False)
        factors = {head: harvested[case.layer, head] for head in case.heads}
    tokens, wanted = case.training.tokens, case.windows.tokens.unique()
    return {head: MeanWrites.of(f.history("write", write), tokens, wanted) for head, f in factors.items()}


def recovered(losses: pd.DataFrame, tokens: int, resamples: int, seed: int) -> pd.DataFrame:
    """Return a row per SAE and condition: the columns of `_described`, losses, and the share recovered.

    losses: of `replace_all_writes`, with the columns of `_described`. tokens: predicted in each window."""
    none = losses[losses.condition == "none"].set_index("window")
    cost, passages = none.loss - none.loss_native, none.passage

    def row(part: pd.DataFrame) -> dict:
        part = part.set_index("window").loc[none.index]
        change = part.loss - part.loss_native
        interval = stats.cluster_bootstrap(change, passages, resamples=resamples, seed=seed)
        ratio = stats.ratio_bootstrap(change, cost, passages, resamples, seed)
        numbers = part.iloc[0][DESCRIPTION].to_dict() | _losses(part, none, tokens)
        return numbers | stats.with_ends("change", change.mean(), interval) | _share(change.mean() / cost.mean(), ratio)

    return stats.per_group(losses, ["sae", "condition"], row).drop(columns="sae")


def pooled(losses: pd.DataFrame, tokens: int, resamples: int, seed: int) -> pd.DataFrame:
    """Return a row per target, centre and condition, of all trainings together; arguments: of `recovered`."""
    none = losses[losses.condition == "none"].set_index("window")

    def row(part: pd.DataFrame) -> dict:
        own = none.loc[part.window]
        change = part.loss.to_numpy() - own.loss_native.to_numpy()
        cost, options = own.loss.to_numpy() - own.loss_native.to_numpy(), dict(resamples=resamples, seed=seed)
        change, ratio = (
            stats.over_trainings(values, own.passage, trainings=part.sae, **options)
            for values in (change, np.stack([change, cost], 1))
        )
        numbers = dict(role=POOLED, seed=np.nan) | _losses(part, none, tokens)
        numbers |= stats.with_ends("change", change.value, change.interval())
        return numbers | _share(ratio.value, ratio.interval())

    by_sae = losses[losses.sae != ""]
    return stats.per_group(by_sae, ["target", "centre", "condition"], row)


def _losses(part: pd.DataFrame, none: pd.DataFrame, tokens: int) -> dict:
    """Return counts and mean losses of one condition; none: the losses of the windows without writes."""
    numbers = dict(seeds=part.seed.nunique(), windows=len(none), passages=none.passage.nunique())
    numbers |= dict(n=len(none) * tokens, loss_native=none.loss_native.mean())
    return numbers | dict(loss=part.loss.mean(), loss_none=none.loss.mean())


def _share(ratio: float, interval: stats.Interval) -> dict:
    """Return the share recovered, 1 - ratio, with its interval."""
    return dict(recovered=1 - ratio, ci_low=1 - interval.high, ci_high=1 - interval.low)


def _described(name: str, saes: dict[str, dict[int, SAE]], role: str) -> dict:
    """Return the columns DESCRIPTION of an SAE; `role` is that of rows without one."""
    if not name:
        return dict(zip(DESCRIPTION, ("", "", role, np.nan), strict=True))
    config = next(iter(saes[name].values())).config
    return dict(zip(DESCRIPTION, (config.target, config.centre, name.split()[0], config.seed), strict=True))


# What the notebook shows


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the figure's conditions and trainings, with their names (training, shown)."""
    names = [TRAININGS.get(pair) for pair in zip(table.target, table.centre)]
    training_names = pd.Series(names, index=table.index).where(table.target.notna(), NO_SAE)
    table = table.assign(training=training_names, shown=table.condition.map(CONDITIONS))
    return table.dropna(subset=["training", "shown"])


def headline(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the pooled rows of the chosen cells and those without an SAE, with the cell's name (cell)."""
    rows = labelled(table[(table.role == POOLED) | (table.role == "main") & table.target.isna()])
    rows = rows.merge(cells[["host", "layer", "head", "place"]], on=["host", "layer", "head"])
    return rows.assign(cell=rows.host.map(lambda name: plots.HOST.get(name, name)) + ", " + rows.place)


def surveyed(table: pd.DataFrame, all_cells: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of single surveyed cells, with the cell's half-life and the cost of writing nothing.

    cost: of the cell, in nats per token; counts: whether its interval is above 0."""
    cell = ["host", "layer", "head"]
    rows = labelled(table[(table.role == SURVEY) & table["head"].notna()])
    none = table[(table.role == SURVEY) & (table.condition == "none")].rename(columns=dict(change="cost"))
    rows = rows.merge(none.assign(counts=none.change_low > 0)[[*cell, "cost", "counts"]], on=cell)
    return rows.merge(all_cells[[*cell, "half_life_median"]], on=cell)


def trend(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the median share recovered over surveyed cells, and its rank correlation with the half-life.

    Only cells in which writing nothing costs loss; worse_than_nothing: the number of cells below 0."""

    def row(part: pd.DataFrame) -> dict:
        share, rho = part.recovered, stats.spearman(part.recovered, part.half_life_median)
        numbers = dict(cells=len(part), median=share.median(), worse_than_nothing=int((share < 0).sum()))
        return numbers | stats.with_ends("rho", rho.value, rho)

    return stats.per_group(cells[cells.counts], ["training", "shown"], row).reindex(columns=TREND)


BY = dict(training="SAE trained on", shown="in place of every write")


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the share of the loss recovered in the chosen cells, for a reader."""
    shares = layout.plain(rows, "recovered", "ci_low", "ci_high")
    return layout.across(rows.rename(columns=BY), ["cell", BY["shown"]], BY["training"], shares)


def shown_layer(layer: pd.DataFrame) -> pd.DataFrame:
    """Return the share of the loss recovered with all heads of a layer together, for a reader."""
    return layout.across(layer.rename(columns=BY), [BY["shown"]], BY["training"], layout.numbers(layer.recovered))


def shown_trend(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `trend` for a reader."""
    columns = {"cells": table.cells, "median loss recovered": layout.numbers(table["median"])}
    columns |= {"cells worse than nothing": table.worse_than_nothing}
    columns |= {"rank correlation with half-life": layout.plain(table, "rho")}
    return layout.shown(table.rename(columns=BY), [*BY.values()], columns)
