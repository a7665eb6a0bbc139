"""Notebook 01: the harvest of a profile's cells."""

from __future__ import annotations

import time

import pandas as pd
import torch

from replication.study import fingerprint
from replication.study.study import Suite
from replication.study.training import harvest_path, load_harvest
from writesae import files
from writesae.harvesting import harvest


def harvest_cells(suite: Suite) -> pd.DataFrame:
    """Factors of the headline's cells over the SAE windows, one file a cell; results harvest.csv."""
    data, rows = suite.profile.data, []
    for name in suite.profile.hosts:
        cells = [suite.cell(name, place) for place in suite.profile.hosts[name].cells]
        paths = [harvest_path(suite, name, *cell) for cell in cells]
        expected = fingerprint.fingerprint(
            modules=["writesae.harvesting"], host=suite.host_fingerprint(name), data=data, cells=cells
        )
        if not files.up_to_date(paths, expected):
            windows, start = suite.windows(name, "sae"), time.monotonic()
            found = harvest(suite.host(name), windows.tokens, cells, data.batch_windows)
            seconds = time.monotonic() - start
            for cell, path in zip(cells, paths, strict=True):
                found[cell].history("state"), found[cell].history("write")  # refuses values that are not finite
                files.save_tensors(path, found[cell].tensors(), {"fingerprint": expected, "seconds": seconds})
        for cell, path in zip(cells, paths, strict=True):
            factors, seconds = load_harvest(suite, name, *cell), files.read_sidecar(path)["metadata"]["seconds"]
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
    return suite.write("harvest", pd.DataFrame(rows))


def _median_norm(value: torch.Tensor | None) -> float:
    return float("nan") if value is None else float(value.norm(dim=-1).median())
