"""The cost of the paper's sizes, from the rates of the other benchmarks: `python benchmarks/plan.py`.

The plan: TOKENS tokens harvested once and passed once through the training of every cell, LAYERS layers of
HEADS heads of 128 x 128, 2,048 atoms, on a model of PARAMETERS parameters of which the harvest runs DEPTH.
Two ways: this project's (factors in shards, factored training) and the paper's (states on disk, its training
step). One line per way and machine:

    disk_gb          data on disk, in fp32, for all cells and for those of one layer at a time
    harvest_hours    2 operations per parameter and token, at the share of the matrix-product rate that the embedded Gated
                     DeltaNet's harvest was measured at
    training_hours   all cells, one after the other, at the measured rate of the step at 128 x 128
    memory_gib       peak of a training step, as measured (both ways read their data from disk)

The first machine is the one of the measurements. The card is estimated, none was measured, twice: once as if
all time went into matrix products (the same share of its peak, TF32), once as if all went into moving memory
(the same share of its bandwidth; this machine's is measured here, by copying). Both peaks are the data
sheet's. The truth should lie between.
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
COPIED, COPIES = 2**28, 9  # bytes


def rate(table: pd.DataFrame, **where) -> float:
    """Return the units of work per second of the one row with these values."""
    return float(stages.rows_with(table, **where).rate.item())


def bandwidth() -> float:
    """Return the GB/s read and written while memory is copied: the median of some copies."""
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
    """The lines, from the tables training_step, harvest_speed and storage; `parameters` of the embedded host;
    GB/s that this machine moves."""
    cells = LAYERS * HEADS
    product = training[training.case == "matrix product"].iloc[0]
    peak = product.gflop / product.seconds  # GFLOP/s of this machine
    harvest = rate(harvests, host="gated_deltanet", case="harvest, last layer")
    share = harvest * 2 * parameters / 1e9 / peak
    here = str(product.device)
    machines = [(here, "measured", 1), (CARD, "products", CARD_GFLOPS / peak), (CARD, "memory", CARD_BANDWIDTH / moved)]
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
    if quick:  # the sides of a quick run stand in for 128
        tables[0] = tables[0].assign(side=tables[0].side.replace(32, 128))
    table = plan(*tables, count, bandwidth())
    print(table.to_string(index=False))
    save("plan", table, quick, time.monotonic() - began)


if __name__ == "__main__":
    main()
