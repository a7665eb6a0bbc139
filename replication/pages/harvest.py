"""Notebook 01: the harvest of a profile's cells."""

from __future__ import annotations

import time

import pandas as pd
import torch

from replication.study import fingerprint
from replication.study.study import Study
from writesae import files
from writesae.harvesting import harvest


def harvest_cells(study: Study) -> pd.DataFrame:
    """Harvest the headline's cells over the SAE windows into one file per cell; write results harvest.csv."""
    data, rows = study.profile.data, []
    for name in study.profile.hosts:
        cells = [study.cell(name, place) for place in study.profile.hosts[name].cells]
        paths = [study.harvest_path(name, *cell) for cell in cells]
        inputs = dict(host=study.host_fingerprint(name), data=data, cells=cells)
        expected = fingerprint.fingerprint(["writesae.harvesting"], **inputs)
        if not files.up_to_date(paths, expected):
            windows, start = study.windows(name, "sae"), time.monotonic()
            harvested = harvest(study.host(name), windows.tokens, cells, data.batch_windows)
            seconds = time.monotonic() - start
            for cell, path in zip(cells, paths, strict=True):
                for target in ("state", "write"):
                    harvested[cell].history(target)  # refuses values that are not finite
                content = {"fingerprint": expected, "seconds": seconds}
                files.save_tensors(path, harvested[cell].tensors(), content)
        for cell, path in zip(cells, paths, strict=True):
            factors, seconds = study.harvested(name, *cell), files.read_sidecar(path)["metadata"]["seconds"]
            cell_history = factors.history("state")
            tokens = cell_history.shape[0] * cell_history.shape[1]
            rows.append(
                dict(
                    host=name,
                    layer=cell[0],
                    head=cell[1],
                    tokens=tokens,
                    numbers_per_token=sum(x.numel() for x in cell_history.tensors().values()) // tokens,
                    numbers_per_state=cell_history.d_k * cell_history.d_v,
                    median_write_norm=_median_norm(factors.added),
                    median_effective_norm=_median_norm(factors.effective),
                    tokens_per_second=tokens / seconds,
                )
            )
    return study.write("harvest", pd.DataFrame(rows))


def _median_norm(value: torch.Tensor | None) -> float:
    return float("nan") if value is None else float(value.norm(dim=-1).median())
