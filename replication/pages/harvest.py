"""Notebook 01: the harvest of a profile's cells."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import torch

from replication import layout
from replication.study import fingerprint
from replication.study.study import Study
from writesae import files
from writesae.harvesting import Cell, harvest
from writesae.recurrence import Factors


def harvest_cells(study: Study) -> pd.DataFrame:
    """Harvest the chosen cells over the SAE windows into one file per cell; write results harvest.csv."""
    rows = []
    for name in study.profile.hosts:
        for cell, path in _harvested(study, name).items():
            factors, seconds = study.harvested(name, *cell), files.read_sidecar(path)["metadata"]["seconds"]
            states = factors.history("state")
            tokens = states.shape[0] * states.shape[1]
            row = dict(host=name, layer=cell[0], head=cell[1], tokens=tokens)
            row |= dict(numbers_per_token=sum(x.numel() for x in states.tensors().values()) // tokens)
            norms = [float(write_norms(factors, write).median()) for write in ("added", "effective")]
            row |= dict(numbers_per_state=states.d_k * states.d_v, median_write_norm=norms[0])
            row |= dict(median_effective_norm=norms[1], tokens_per_second=tokens / seconds)
            rows.append(row)
    return study.write("harvest", pd.DataFrame(rows))


def _harvested(study: Study, name: str) -> dict[Cell, Path]:
    """Return the file of each cell of a host, harvested where it is not up to date."""
    data, cells = study.profile.data, [study.cell(name, place) for place in study.profile.hosts[name].cells]
    paths = {cell: study.harvest_path(name, *cell) for cell in cells}
    inputs = dict(host=study.host_fingerprint(name), data=data, cells=cells)
    expected = fingerprint.fingerprint(["writesae.harvesting"], **inputs)
    if not files.up_to_date(list(paths.values()), expected):
        windows, start = study.windows(name, "sae"), time.monotonic()
        harvested = harvest(study.host(name), windows.tokens, cells, data.batch_windows)
        content = {"fingerprint": expected, "seconds": time.monotonic() - start}
        for cell, path in paths.items():
            for target in ("state", "write"):
                harvested[cell].history(target)  # refuses values that are not finite
            files.save_tensors(path, harvested[cell].tensors(), content)
    return paths


def write_norms(factors: Factors, write: str) -> torch.Tensor:
    """Return the Frobenius norms [N, T] of the writes by a definition; nan where it has none of rank 1."""
    value, norm = getattr(factors, write), factors.key.norm(dim=-1)
    return norm * (torch.nan if value is None else value.norm(dim=-1))


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `harvest_cells` for a reader."""
    columns = {"layer, head": layout.cell_names(table), "tokens": layout.numbers(table.tokens, ",.0f")}
    columns |= {"numbers per token": table.numbers_per_token, "numbers per state": table.numbers_per_state}
    columns |= {"median norm, added write": layout.numbers(table.median_write_norm)}
    columns |= {"median norm, effective write": layout.numbers(table.median_effective_norm)}
    columns |= {"tokens per second": layout.numbers(table.tokens_per_second, ",.0f")}
    return layout.shown(table, ["host"], columns)
