"""Notebook 00: the hosts, their loss on held-out text, and the properties of each cell."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication import layout
from replication.statistics import ci, cluster_bootstrap, per_group, with_ends
from replication.study import docstrings
from replication.study.fingerprint import Later
from replication.study.firings import firing_windows
from replication.study.profile import CellRule, HostSection
from replication.study.study import Study
from writesae.evaluate.cells import cost_of_no_writes, survey_cells
from writesae.hosts.base import Host, Run
from writesae.text import Windows


def choose_cells(survey: pd.DataFrame, section: HostSection) -> pd.DataFrame:
    """Return each place's cell by the profile's rules, in their order: no two places have the same cell.

    A rule takes its first choice among the cells that no earlier rule has taken. Columns beside the survey's:
    place; rule, in words; rule_sigma_ratio, missing if the rule has none; instead_of: the place that has the
    rule's first choice, missing if this is the first choice. Raises ValueError if the rule names a layer
    without cells or a head that the layer does not have, and if all of its cells are taken.
    """
    chosen: dict[int, str] = {}  # row of the survey -> place
    cells = []
    for place, rule in section.cells.items():
        ranked = _ranked(survey, place, rule)
        free = ranked[~ranked.isin(chosen)]
        if not len(free):
            raise ValueError(f"The {place} cell, {rule.words}, is already the {chosen[ranked[0]]} cell.")
        columns = dict(place=place, rule=rule.words, rule_sigma_ratio=rule.sigma_ratio or math.nan)
        cells.append(survey.loc[[free[0]]].assign(**columns, instead_of=chosen.get(ranked[0], math.nan)))
        chosen[free[0]] = place
    return pd.concat(cells, ignore_index=True)


def _ranked(survey: pd.DataFrame, place: str, rule: CellRule) -> pd.Index:
    """Return the rows of the survey among which a rule chooses, the first choice first."""
    part = survey if rule.layer is None else survey[survey.layer == rule.layer]
    if part.empty:
        layers = ", ".join(map(str, sorted(survey.layer.unique())))
        wrong = f"The {place} cell's layer {rule.layer} is not recurrent"
        raise ValueError(f"{wrong}: choose one of {layers}.")
    if rule.cost:
        return part.cost.sort_values(ascending=False, kind="stable").index
    if rule.sigma_ratio:
        distance = (part.sigma1_over_sigma2 / rule.sigma_ratio).map(math.log).abs()
        return distance.sort_values(kind="stable").index
    if rule.head not in set(part["head"]):
        wrong = f"The {place} cell's head {rule.head} does not exist"
        raise ValueError(f"{wrong}: layer {rule.layer} has heads 0 to {part['head'].max()}.")
    return part[part["head"] == rule.head].index


CURVE = ["tokens", "training_loss", "heldout_loss"]


def check_corpus(study: Study, host: str) -> list[str]:
    """Return sentences on how the installed text differs from this host's training text."""
    path = Path(study.host_path(host)) / "corpus.json"
    return docstrings.check_manifest(path) if path.is_file() and not study.profile.corpus else []


def training_curve(study: Study, host: str) -> pd.DataFrame:
    """Return tokens, training_loss, heldout_loss of a host that was trained here; else no rows."""
    path = Path(study.host_path(host)) / "training.csv"
    return pd.read_csv(path)[CURVE] if path.is_file() else pd.DataFrame(columns=CURVE, dtype=float)


@torch.no_grad()
def window_losses(host: Host, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats of each window: tokens [N, T] -> [N]."""
    run = host.run(tokens)
    logits = host.logits(run.final[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, run.tokens[:, 1:], reduction="none").mean(1)


def heldout_losses(study: Study) -> pd.DataFrame:
    """Write results heldout_loss.csv: one row per window, its mean loss in nats per token.

    The windows are those that are searched for firings, since a further one makes the mean little safer.
    """
    tables = []
    for name in study.profile.hosts:
        windows, size = firing_windows(study, name), study.profile.data.batch_windows
        given = dict(host=study.host(name), windows=windows, size=size)
        tables.append(study.stage("heldout_loss", name, range(0, len(windows), size), _losses, **given))
    return study.gather("heldout_loss", tables)


def _losses(start: int, host: Host, windows: Windows, size: int) -> pd.DataFrame:
    part = windows[slice(start, start + size)]
    losses, numbers = window_losses(host, part.tokens).double().numpy(), range(start, start + len(part))
    return pd.DataFrame(dict(host=host.name, window=numbers, passage=part.passage, loss=losses))


def describe(study: Study, losses: pd.DataFrame) -> pd.DataFrame:
    """Write results hosts.csv: one row per host, its held-out loss with an interval over passages."""
    rows = []
    for name, section in study.profile.hosts.items():
        host, part = study.host(name), losses[losses.host == name]
        record = Path(study.host_path(name)) / "training.json"
        trained = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        row = dict(host=name, family=host.family, path=section.path)
        row |= dict(parameters=sum(p.numel() for p in host.model.parameters()), heldout_loss=part.loss.mean())
        row |= ci(cluster_bootstrap(part.loss, part.passage, seed=study.profile.seed))
        row |= dict(n_windows=len(part), context=study.profile.data.window, layers=host.layers)
        row |= dict(recurrent_layers=len(host.recurrent_layers), heads=host.heads, d_k=host.d_k, d_v=host.d_v)
        rows.append(row | dict(training_tokens=trained.get("tokens", 0)))
    return study.write("hosts", pd.DataFrame(rows))


def survey(study: Study) -> pd.DataFrame:
    """Write results all_cells.csv: each cell's half-life, spectrum and write ranks, on SAE-split text, and
    the cost of no writes in it, on held-out text."""
    tables, data = [], study.profile.data
    for name in study.profile.hosts:
        host, tokens, heldout = study.host(name), study.windows(name, "sae").tokens, cost_windows(study, name)
        given = dict(host=host, run=Later(_run, host=host, tokens=tokens[: data.cell_windows]))
        given |= dict(heldout=Later(_run, host=host, tokens=heldout.tokens), passage=heldout.passage)
        given |= dict(first=data.first_position, seed=study.profile.seed)
        tables.append(study.stage("all_cells", name, host.recurrent_layers, _survey, **given))
    return study.gather("all_cells", tables)


def cost_windows(study: Study, host: str) -> Windows:
    """Return the held-out windows on which costs are measured: data.cost_windows of them, evenly spaced.

    They come after the windows that are searched for firings if there are enough, so that the rule `cost`
    does not choose a cell on the text of the experiments.
    """
    data, windows = study.profile.data, study.windows(host, "heldout")
    count = min(data.cost_windows, len(windows))
    first = data.firing_windows if len(windows) - data.firing_windows >= count else 0
    return windows[np.linspace(first, len(windows) - 1, count).round().astype(int)]


def _run(host: Host, tokens: torch.Tensor) -> Run:
    return host.run(tokens)


def _survey(layer: int, host: Host, run: Later, heldout: Later, passage, first, seed: int) -> pd.DataFrame:
    cells = [(layer, head) for head in range(host.heads)]
    costs = cost_of_no_writes(host, heldout(), cells)
    costs = per_group(costs, ["layer", "head"], partial(_cost, passage=passage, seed=seed))
    return survey_cells(host, run(), first, cells).merge(costs, on=["layer", "head"]).assign(host=host.name)


def _cost(windows: pd.DataFrame, passage: torch.Tensor, seed: int) -> dict:
    """Return a cell's mean cost in nats per token, and its interval over passages, from a row per window."""
    interval = cluster_bootstrap(windows.cost, passage.numpy()[windows.window], seed=seed)
    return with_ends("cost", windows.cost.mean(), interval) | dict(cost_windows=len(windows))


def choose(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """Write results cells.csv: the cells that the profile's rules pick."""
    hosts = study.profile.hosts.items()
    chosen = [choose_cells(cells[cells.host == name], section) for name, section in hosts]
    return study.write("cells", pd.concat(chosen, ignore_index=True))


def shown(hosts: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `describe` for a reader."""
    layers = [f"{some} of {every}" for some, every in zip(hosts.recurrent_layers, hosts.layers, strict=True)]
    columns = {
        "parameters (millions)": layout.numbers(hosts.parameters / 1e6, ".1f"),
        "held-out loss (nats per token)": layout.plain(hosts, "heldout_loss", "ci_low", "ci_high"),
        "recurrent layers": layers,
        "heads": hosts["heads"],
        "state": [f"{d_k} x {d_v}" for d_k, d_v in zip(hosts.d_k, hosts.d_v, strict=True)],
        "trained on (million tokens)": layout.numbers(hosts.training_tokens / 1e6, ".1f"),
    }
    return layout.shown(hosts, ["host"], columns)


def chosen_table(cells: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen cells for a reader: half-life, ratio, cost with interval, its rank among the host's.

    cells: the table of `survey`; chosen: that of `choose`.
    """
    ranked = cells.assign(rank=cells.groupby("host").cost.rank(ascending=False).astype(int))
    rows = chosen.merge(ranked[["host", "layer", "head", "rank"]], on=["host", "layer", "head"])
    taken = rows.instead_of.map("; its first choice is {}".format, na_action="ignore").fillna("")
    columns = {
        "layer, head": layout.cell_names(rows),
        "rule": rows.rule + taken,
        "half-life (tokens)": layout.numbers(rows.half_life_median, ".1f"),
        "sigma1/sigma2": layout.numbers(rows.sigma1_over_sigma2),
        "cost (millinats per token)": layout.estimates(rows, "cost", digits=1, scale=1000),
        "rank of the cost": [f"{x} of {n}" for x, n in zip(rows["rank"], rows.host.map(cells.host.value_counts()))],
    }
    return layout.shown(rows, ["host", "place"], columns)
