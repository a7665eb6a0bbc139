"""Notebook 05_all_writes: the loss when all writes of a cell, or of all heads of a layer, are replaced at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from replication import plots
from replication import statistics as stats
from replication.study import training
from replication.study.study import Study
from writesae.evaluate.all_writes import WITH_SAE, MeanWrites, replace_all_writes
from writesae.files import load_tensors
from writesae.harvesting import harvest
from writesae.hosts.base import Host
from writesae.recurrence import Factors
from writesae.sae.model import SAE
from writesae.text import Windows

SURVEY = "survey"
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
    ("state", "mean"): "states, with the mean",
}
NO_SAE = "no SAE"
COLOURS = dict(zip((*TRAININGS.values(), NO_SAE), (plots.COLOURS[i] for i in (0, 9, 3, 7)), strict=True))
KEYS = ["host", "layer", "head", "target", "centre", "role", "seed", "condition"]


@dataclass
class Case:
    """Heads of one layer, and the SAEs that are tried on each of them.

    together: replace the writes of all heads in the same run, else of one head after another. saes: "ROLE
    TARGET" -> head -> SAE. windows: held-out. training: windows of the SAE split, for mean writes; stored:
    the factors of the only head over these, if notebook 01 has kept them.
    """

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
    """Write results all_writes.csv: a row per (host, cell or layer, SAE, condition); without an SAE, target is empty.

    loss, loss_native, loss_none: nats per token; change: loss - loss_native; recovered: 1 - change / (loss_none
    - loss_native). Intervals (change_low, change_high; ci_low, ci_high): bootstrap by passage. windows, passages
    and n, the predicted tokens. head is empty where all heads of the layer are replaced together.
    """
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


def headline_cases(study: Study, host: str) -> list[Case]:
    """Return one case per cell of the headline, with all variants of its main SAEs."""
    targets, windows = study.profile.saes.targets, study.windows(host, "heldout")
    windows, cases = windows[: study.profile.section("all_writes", host).windows], []
    for layer, head in (study.cell(host, place) for place in study.profile.hosts[host].cells):
        saes = {}
        for _, _, role in training.main_variants(study, host):
            saes |= {f"{role} {target}": {head: study.sae(host, layer, head, target, role)} for target in targets}
        stored = study.harvest_path(host, layer, head)
        cases.append(Case(layer, (head,), False, saes, windows, study.windows(host, "sae"), stored))
    return cases


def survey_cases(study: Study, host: str) -> list[Case]:
    """Return one case per surveyed layer, and one for all heads of a layer together, with the survey SAEs."""
    settings, heads = study.profile.section("all_writes", host), tuple(range(study.host(host).heads))
    heldout, sae_split = study.windows(host, "heldout"), study.windows(host, "sae")
    survey, layers = sae_split[: study.profile.data.survey_windows], study.survey_layers(host)
    whole = [layer for layer in layers if layer == study.cell(host, LAYER_PLACE)[0]]
    cases = []
    for layer, together in [(layer, True) for layer in whole] + [(layer, False) for layer in layers]:
        saes = {
            f"{SURVEY} {target}": {head: study.sae(host, layer, head, target, SURVEY) for head in heads}
            for target in study.profile.saes.targets
        }
        windows = heldout[: settings.windows if together else settings.survey_windows]
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
        rows = recovered(losses, case.windows.tokens.shape[1] - 1, resamples, seed)
        described = pd.DataFrame([_described(name, saes, case.role) for name in rows.sae])
        head = np.nan if case.together else heads[0]
        place = dict(host=host.name, layer=case.layer, head=head)
        tables.append(pd.concat([described.assign(**place), rows.drop(columns="sae")], axis=1))
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
    """Return the losses of `replace_all_writes` as a row per (sae, condition), with the share recovered.

    tokens: predicted in each window.
    """
    none = losses[losses.condition == "none"].set_index("window")

    def row(part: pd.DataFrame) -> dict:
        part = part.set_index("window").loc[none.index]
        change, cost, passages = part.loss - part.loss_native, none.loss - none.loss_native, none.passage
        low, high = stats.cluster_bootstrap(change, passages, resamples=resamples, seed=seed)
        ratio = stats.ratio_bootstrap(change, cost, passages, resamples, seed)
        numbers = dict(windows=len(part), passages=passages.nunique(), n=len(part) * tokens)
        numbers |= dict(loss_native=part.loss_native.mean(), loss=part.loss.mean(), loss_none=none.loss.mean())
        numbers |= dict(change=change.mean(), change_low=low, change_high=high)
        return numbers | dict(recovered=1 - change.mean() / cost.mean(), ci_low=1 - ratio.high, ci_high=1 - ratio.low)

    return stats.per_group(losses, ["sae", "condition"], row)


def _described(name: str, saes: dict[str, dict[int, SAE]], role: str) -> dict:
    """Return the columns of an SAE; `role` is that of rows without one."""
    if not name:
        return dict(target="", centre="", role=role, seed=np.nan)
    config = next(iter(saes[name].values())).config
    return dict(target=config.target, centre=config.centre, role=name.split()[0], seed=config.seed)


# What the notebook shows


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the figure's conditions and trainings, with their names (columns training, shown)."""
    names = [TRAININGS.get(pair) for pair in zip(table.target, table.centre)]
    training_names = pd.Series(names, index=table.index).where(table.target.notna(), NO_SAE)
    table = table.assign(training=training_names, shown=table.condition.map(CONDITIONS))
    return table.dropna(subset=["training", "shown"])


def headline(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the headline's cells, with the place of each cell."""
    places = cells[["host", "layer", "head", "place"]]
    return labelled(table[table.role.str.startswith("main")]).merge(places, on=["host", "layer", "head"])


def surveyed(table: pd.DataFrame, all_cells: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of single surveyed cells, with the cell's half-life and the cost of writing nothing.

    cost: of the cell, in nats per token; counts: whether its interval is above 0, so that a share makes sense.
    """
    cell = ["host", "layer", "head"]
    rows = labelled(table[(table.role == SURVEY) & table["head"].notna()])
    none = table[(table.role == SURVEY) & (table.condition == "none")].rename(columns=dict(change="cost"))
    rows = rows.merge(none.assign(counts=none.change_low > 0)[[*cell, "cost", "counts"]], on=cell)
    return rows.merge(all_cells[[*cell, "half_life_median"]], on=cell)


def means_over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean share recovered per cell, training and condition, with the lowest and highest seed."""
    keys = ["host", "place", "training", "shown"]

    def row(part: pd.DataFrame) -> dict:
        share = part.recovered
        return dict(seeds=len(part), recovered=share.mean(), lowest=share.min(), highest=share.max(), n=part.n.iloc[0])

    return stats.per_group(rows, keys, row)


def trend(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the median share recovered over surveyed cells that count, and its rank correlation with half-life."""

    def row(part: pd.DataFrame) -> dict:
        rho = stats.spearman(part.recovered, part.half_life_median)
        middle = dict(
            cells=len(part), median=part.recovered.median(), worse_than_nothing=int((part.recovered < 0).sum())
        )
        return middle | stats.with_ends("rho", rho.value, rho)

    return stats.per_group(cells[cells.counts], ["training", "shown"], row)


def verdict(rows: pd.DataFrame) -> list[str]:
    """Return one sentence per cell of the headline and per training of its SAEs, and one on reading the state."""
    sentences = []
    for (host, place), cell in rows.groupby(["host", "place"], sort=False):
        cost = cell.loss_none.iloc[0] - cell.loss_native.iloc[0]
        sentences.append(f"{host}, {place} cell: writing nothing costs {1000 * cost:.1f} millinats per token.")
        for name in (*TRAININGS.values(), NO_SAE):
            part = cell[cell.training == name]
            if part.empty:
                continue
            best = "token's mean write" if name == NO_SAE else CONDITIONS["atom"]
            shares = part[part.shown == best]
            sentences.append(f"  {name}: {_shares(shares)} with the {best} in place of every write{_rest(part)}.")
    return sentences


def _shares(part: pd.DataFrame) -> str:
    """Return the mean share recovered over SAEs with the outer ends of their intervals, in words."""
    mean, low, high = part.recovered.mean(), part.ci_low.min(), part.ci_high.max()
    word = (
        "worse than writing nothing" if high < 0 else "better than writing nothing" if low > 0 else "not apart from it"
    )
    return f"{mean:+.2f} of the loss recovered [{low:+.2f}, {high:+.2f}] ({word}; SAEs: {part.seed.count()})"


def _rest(part: pd.DataFrame) -> str:
    others = part[part.condition.isin(WITH_SAE) & (part.condition != "atom")]
    if others.empty:
        return ""
    means = others.groupby("shown", sort=False).recovered.mean()
    return "; " + ", ".join(f"{name} {value:+.2f}" for name, value in means.items())
