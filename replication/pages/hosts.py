"""Notebook 00: the hosts, their loss on held-out text, and the properties of each cell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from replication.statistics import ci, cluster_bootstrap
from replication.study import docstrings
from replication.study.fingerprint import Later
from replication.study.profile import HostSection
from replication.study.study import Study
from writesae.evaluate.cells import survey_cells
from writesae.hosts.base import Host, Run
from writesae.text import Windows


def choose_cells(survey: pd.DataFrame, section: HostSection) -> pd.DataFrame:
    """Return each place's cell: the rule's head, or the head nearest to the rule's sigma1/sigma2, in ratio.

    rule_sigma_ratio is missing if the rule names the head. Raises ValueError if the rule names a layer
    without cells, or a head that the layer does not have."""
    chosen = []
    for place, rule in section.cells.items():
        layer = survey[survey.layer == rule.layer]
        if layer.empty:
            layers = ", ".join(map(str, sorted(survey.layer.unique())))
            wrong = f"The {place} cell's layer {rule.layer} is not recurrent"
            raise ValueError(f"{wrong}: choose one of {layers}.")
        if rule.head is None:
            distance = (layer.sigma1_over_sigma2 / rule.sigma_ratio).map(math.log).abs()
            cell = layer.loc[[distance.idxmin()]]
        elif (cell := layer[layer["head"] == rule.head]).empty:
            wrong = f"The {place} cell's head {rule.head} does not exist"
            raise ValueError(f"{wrong}: layer {rule.layer} has heads 0 to {layer['head'].max()}.")
        chosen.append(cell.assign(place=place, rule_sigma_ratio=rule.sigma_ratio or math.nan))
    return pd.concat(chosen, ignore_index=True)


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
    """Write results heldout_loss.csv: one row per held-out window, its mean loss in nats per token."""
    tables = []
    for name in study.profile.hosts:
        windows, size = study.windows(name, "heldout"), study.profile.data.batch_windows
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
        trained = json.loads(record.read_text()) if record.is_file() else {}
        row = dict(host=name, family=host.family, path=section.path)
        row |= dict(parameters=sum(p.numel() for p in host.model.parameters()), heldout_loss=part.loss.mean())
        row |= ci(cluster_bootstrap(part.loss, part.passage, seed=study.profile.seed))
        row |= dict(n_windows=len(part), context=study.profile.data.window, layers=host.layers)
        row |= dict(recurrent_layers=len(host.recurrent_layers), heads=host.heads, d_k=host.d_k, d_v=host.d_v)
        rows.append(row | dict(training_tokens=trained.get("tokens", 0)))
    return study.write("hosts", pd.DataFrame(rows))


def survey(study: Study) -> pd.DataFrame:
    """Write results all_cells.csv: each cell's half-life, spectrum and write ranks, on SAE-split text."""
    tables, count = [], study.profile.data.cell_windows
    for name in study.profile.hosts:
        host, tokens = study.host(name), study.windows(name, "sae").tokens[:count]
        given = dict(host=host, run=Later(_run, host=host, tokens=tokens), first=study.profile.data.first_position)
        tables.append(study.stage("all_cells", name, host.recurrent_layers, _survey, **given))
    return study.gather("all_cells", tables)


def _run(host: Host, tokens: torch.Tensor) -> Run:
    return host.run(tokens)


def _survey(layer: int, host: Host, run: Later, first: int) -> pd.DataFrame:
    return survey_cells(host, run(), first, [layer]).assign(host=host.name)


def choose(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """Write results cells.csv: the cells that the profile's rule picks for the headline."""
    hosts = study.profile.hosts.items()
    chosen = [choose_cells(cells[cells.host == name], section) for name, section in hosts]
    return study.write("cells", pd.concat(chosen, ignore_index=True))
