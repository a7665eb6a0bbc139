"""Estimate the cost of the paper's sizes from the other benchmarks: `python benchmarks/plan.py`.

The plan: TOKENS tokens are harvested once and used once to train every cell (LAYERS layers of HEADS heads
with 128 x 128 states, 2,048 atoms). The model has PARAMETERS parameters, and the harvest runs the share DEPTH
of its layers. There are two ways: this project's (factors in shards, factored training) and the paper's
(states on disk, its training step). There is one row per way and machine:

    disk_gb          data on disk in fp32 for all cells (disk_gb_a_layer: for the cells of one layer)
    harvest_hours    at 2 operations per parameter and token, and the share of the matrix-product peak that
                     the harvest of the embedded Gated DeltaNet reaches
    training_hours   all cells one after the other, at the measured rate of the step at 128 x 128
    memory_gib       measured peak memory of a training step

The first machine is the one that ran the benchmarks. The GPU was not measured. It is estimated twice: as if
all time went into matrix products (the same share of the TF32 peak), and as if all time went into moving
memory (the same share of the bandwidth). The peaks of the GPU are from its data sheet; the bandwidth of the
first machine is measured here by copying memory. The true cost is probably between the two estimates.
"""

from __future__ import annotations

import statistics
import time

import pandas as pd
import torch
from common import save, start

from replication.study import paths as paths_module
from replication.study import stages
from writesae.hosts.load import load_host

TOKENS, LAYERS, HEADS = 5_000_000, 3, 16
PARAMETERS, DEPTH = 752.4e6, 18 / 24  # Qwen3.5-0.8B's text model, up to its layer 17
CARD, CARD_GFLOPS, CARD_BANDWIDTH = "H100 SXM", 494.7e3, 3350  # NVIDIA's data sheet: TF32, dense; GB/s
COPIED, COPIES = 2**28, 9  # bytes per copy, number of copies


def rate(table: pd.DataFrame, **where) -> float:
    """Return the units of work per second of the only row with these values."""
    return float(stages.rows_with(table, **where).rate.item())


def bandwidth() -> float:
    """Return the GB/s read and written while memory is copied (median of COPIES copies)."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target, seconds = torch.empty_like(source), []
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / 1e9 / statistics.median(seconds)


def plan(
    training: pd.DataFrame, harvests: pd.DataFrame, storage: pd.DataFrame, parameters: float, moved: float
) -> pd.DataFrame:
    """Return the rows, from the tables of training_step, harvest_speed and storage.

    parameters: of the embedded host. moved: memory bandwidth of this machine in GB/s."""
    cells = LAYERS * HEADS
    product = training[training.case == "matrix product"].iloc[0]
    peak = product.gflop / product.seconds  # GFLOP/s of this machine
    harvest = rate(harvests, host="gated_deltanet", case="harvest, last layer")
    share = harvest * 2 * parameters / 1e9 / peak
    machines = [(str(product.device), "measured", 1)]
    machines += [(CARD, "products", CARD_GFLOPS / peak), (CARD, "memory", CARD_BANDWIDTH / moved)]
    rows = []
    for way in ("factored", "plain"):
        step = stages.rows_with(training, method=way, side=128).iloc[0]
        stored = stages.rows_with(storage, host="gated_deltanet_128", kept="both").iloc[0]
        size = stored.bytes if way == "factored" else stored.state_bytes
        for machine, by, faster in machines:
            row = dict(way=way, machine=machine, by=by, faster=faster, tokens=TOKENS, cells=cells)
            row |= dict(disk_gb=TOKENS * cells * size / 1e9, disk_gb_a_layer=TOKENS * HEADS * size / 1e9)
            row |= dict(harvest_hours=TOKENS * DEPTH * 2 * PARAMETERS / 1e9 / (share * peak) / faster / 3600)
            row |= dict(training_hours=TOKENS * cells / step.rate / faster / 3600)
            rows.append(row | dict(memory_gib=step.peak_mib / 1024, harvest_of_peak=share, gb_a_second=moved))
    return pd.DataFrame(rows)


def main() -> None:
    quick, began, paths = start().quick, time.monotonic(), paths_module.Paths("bench")
    folder = paths.build if quick else paths.results
    tables = [stages.read_table(folder / f"{name}.csv") for name in ("training_step", "harvest_speed", "storage")]
    host = load_host(paths_module.ROOT / "models" / "gated_deltanet")
    count = sum(x.numel() for x in host.model.parameters())
    if quick:  # a quick run has no side 128: use its largest side instead
        tables[0] = tables[0].assign(side=tables[0].side.replace(32, 128))
    table = plan(*tables, count, bandwidth())
    print(table.to_string(index=False))
    save("plan", table, quick, time.monotonic() - began)


if __name__ == "__main__":
    main()
