"""Comparisons as ratios within one run: the cases take turns, so that a noisy machine slows all of them
equally.

A benchmark lists its comparisons, and `main` measures them: one round to warm up, then the rounds, in each of
which every case runs once (a short one several times in a row). results/bench/NAME.csv has one line per case:

    seconds, fastest, slowest      of one run: median, minimum and maximum over the rounds
    rate                           units of work (tokens, firings, atoms) per second
    against, ratio, low, high      time per unit over that of the case `against`, in the same round: median, minimum, maximum
    gflop, of_peak                 fp32 matrix products of one run, and their rate over that of one large product measured
                                   in the same rounds (only where asked for)
    peak_mib                       largest resident size of a fresh process that prepares the case and runs it once
    device_mib                     the same for the GPU's memory; empty without a GPU
    imports_mib                    largest resident size of a process that only imports the same

Every benchmark has the option `--quick`: everything tiny, written to build/bench, to see only that it runs.
OMP_NUM_THREADS sets the number of threads; the default is the number of cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from replication.study import paths as paths_module
from replication.study import stages

ROUNDS = 5
SHORTEST = (
    0.2  # seconds for which a case runs in each round, at least, by running it again (MOST_REPEATS times at most)
)
MOST_REPEATS = 20
PEAK_SIDE = 2048  # of the matrices whose product is the machine's peak


@dataclass
class Case:
    """`prepare()` returns what is timed, a function without arguments; `amount`: units of work of one call.

    `against`: the case that its time is compared with; by default the first case of the comparison.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    amount: float
    against: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """Cases that take turns. `agree(results by case)` raises where they should be equal and are not; it
    returns columns."""

    labels: dict[str, Any]
    cases: list[Case]
    agree: Callable[[dict[str, Any]], dict[str, float]] = lambda results: {}
    rounds: int = ROUNDS
    count_products: bool = False


def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def _seconds(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats, result


def _product() -> Case:
    a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device())
    return Case("matrix product", lambda: lambda: a @ a, 1)


def measure(comparison: Comparison) -> pd.DataFrame:
    """Return the lines of one comparison, without memory."""
    cases = comparison.cases + ([_product()] if comparison.count_products else [])
    runs = {case.name: case.prepare() for case in cases}
    repeats, results, gflop = {}, {}, {}
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            took, results[name] = _seconds(run)
        gflop[name] = counter.get_total_flops() / 1e9
        if took < 10 * SHORTEST:  # the first call pays for allocations and the choice of kernels
            took, _ = _seconds(run)
        repeats[name] = min(MOST_REPEATS, math.ceil(SHORTEST / took))
    columns = comparison.agree(results)
    del results
    times = pd.DataFrame(
        [{name: _seconds(run, repeats[name])[0] for name, run in runs.items()} for _ in range(comparison.rounds)]
    )
    unit = times / [case.amount for case in cases]
    rows = []
    for case in cases:
        own, against = times[case.name], case.against or cases[0].name
        row = comparison.labels | case.labels | dict(case=case.name, rounds=len(times), seconds=own.median())
        row |= dict(fastest=own.min(), slowest=own.max(), rate=case.amount / own.median())
        if case.name != "matrix product":
            row |= dict(against=against) | _spread(unit[case.name] / unit[against], "ratio", "low", "high")
        if comparison.count_products:
            speed, peak = gflop[case.name] / own, gflop["matrix product"] / times["matrix product"]
            row |= dict(gflop=gflop[case.name]) | _spread(speed / peak, "of_peak", "of_peak_low", "of_peak_high")
        rows.append(row | columns)
    return pd.DataFrame(rows)


def _spread(values: pd.Series, *names: str) -> dict[str, float]:
    return dict(zip(names, (values.median(), values.min(), values.max()), strict=True))


def _largest() -> float:
    """Return the largest resident size of this process in MiB. On Linux ru_maxrss starts at the parent's
    value."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_of(case: Case | None) -> dict[str, float]:
    """Return the largest resident size, in MiB, of a new process that runs the case once."""
    if case is not None:
        case.prepare()()
    found = dict(peak_mib=_largest())
    if torch.cuda.is_available():
        found["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _peak(number: int, case: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, sys.argv[0], "--peak", str(number), case] + ["--quick"] * quick
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def start() -> argparse.Namespace:
    """Read the options and set threads and memory; every benchmark calls this first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="everything tiny, to see that it runs")
    parser.add_argument("--peak", nargs=2, metavar=("NUMBER", "CASE"), help=argparse.SUPPRESS)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    torch.backends.cuda.matmul.allow_tf32 = False
    return parser.parse_args()


def main(name: str, comparisons: Callable[[bool], list[Comparison]]) -> None:
    """Measure `comparisons(quick)`, print the lines and write them."""
    options, began = start(), time.monotonic()
    listed = comparisons(options.quick)
    if options.peak:
        number, wanted = int(options.peak[0]), options.peak[1]
        case = next((case for case in listed[number].cases if case.name == wanted), None)
        print(json.dumps(_peak_of(case)))
        return
    tables, idle = [], _peak(0, "", options.quick)["peak_mib"]
    for number, comparison in enumerate(listed):
        if options.quick:
            comparison.rounds = 1
        table = measure(comparison).assign(imports_mib=idle)
        measured = [case.name for case in comparison.cases][: 1 if options.quick else None]
        peaks = pd.DataFrame([dict(case=case) | _peak(number, case, options.quick) for case in measured])
        tables.append(table.merge(peaks, on="case", how="left"))
        print(tables[-1].drop(columns=["against", "rounds"]).to_string(index=False), flush=True)
    save(name, pd.concat(tables, ignore_index=True), options.quick, time.monotonic() - began)


def save(name: str, table: pd.DataFrame, quick: bool, seconds: float) -> None:
    """Write results/bench/NAME.csv with its provenance; a quick run is written to build/bench."""
    paths = paths_module.Paths("bench")
    folder = paths.build if quick else paths.results
    table = table.assign(device=device_name(), threads=torch.get_num_threads())
    provenance = dict(profile="bench", config="", host="", seed=0, seconds=round(seconds, 3))
    stages.write_table(table, folder / f"{name}.csv", provenance)
