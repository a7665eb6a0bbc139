"""Shared code of the benchmarks: time cases in turn, compare them within each round, and write a table.

The cases of a comparison take turns, so that noise on the machine slows all of them equally. After one
warm-up round, every case runs once per round (a short case several times). results/bench/NAME.csv has one row
per case:

    seconds, fastest, slowest  time of one run: median, minimum and maximum over the rounds
    rate                       units of work (tokens, firings, atoms) per second
    against                    the case that this one is compared with
    ratio, low, high           time per unit over that of `against`, per round: median, minimum, maximum
    gflop                      matrix products of one run (only where count_products is set)
    of_peak                    their rate, as a share of the rate of one large fp32 product in the same round
    peak_mib                   largest resident size of a new process that prepares the case and runs it once
    device_mib                 the same for GPU memory; empty without a GPU
    imports_mib                largest resident size of a process that only does the imports

With `--quick` every benchmark runs at toy size and writes to build/bench; this only shows that it runs.
OMP_NUM_THREADS sets the number of threads; the default is the number of cores.
"""

from __future__ import annotations

import argparse
import json
import math
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
from replication.study.study import use_every_core

ROUNDS = 5
SHORTEST = 0.2  # seconds: in each round, a case repeats until it has taken this long
MAX_REPEATS = 20
PEAK_SIDE = 2048  # side of the square matrices whose product gives the peak rate


@dataclass
class Case:
    """One thing to time. `prepare()` returns the function to time, which takes no arguments.

    amount: units of work per call. against: name of the case to compare with (default: the first one).
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    amount: float
    against: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """Cases that take turns. `agree` checks the results (by case name) and returns extra columns."""

    labels: dict[str, Any]
    cases: list[Case]
    agree: Callable[[dict[str, Any]], dict[str, float]] = lambda results: {}
    rounds: int = ROUNDS
    count_products: bool = False


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the model name of the GPU if there is one, else of the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def _processor() -> str:
    """Return the model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def must_agree(difference: float, tolerance: float, problem: str) -> None:
    """Raise ValueError, with the problem, unless a relative difference is below the tolerance."""
    if not difference < tolerance:
        raise ValueError(f"{problem} (relative difference {difference:.1e}, allowed {tolerance:.0e}).")


def _seconds(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Return the seconds per call and the last result."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats, result


def _product() -> Case:
    """Return the case that measures the peak rate: one large fp32 matrix product."""
    a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device())
    return Case("matrix product", lambda: lambda: a @ a, 1)


def measure(comparison: Comparison) -> pd.DataFrame:
    """Return the rows of one comparison, without the memory columns."""
    cases = comparison.cases + ([_product()] if comparison.count_products else [])
    runs = {case.name: case.prepare() for case in cases}
    repeats, results, gflop = {}, {}, {}
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            took, results[name] = _seconds(run)
        gflop[name] = counter.get_total_flops() / 1e9
        if took < 10 * SHORTEST:  # time again: the first call also allocates memory and selects kernels
            took, _ = _seconds(run)
        repeats[name] = min(MAX_REPEATS, math.ceil(SHORTEST / took))
    columns = comparison.agree(results)
    del results
    times = pd.DataFrame(
        [{name: _seconds(run, repeats[name])[0] for name, run in runs.items()} for _ in range(comparison.rounds)]
    )
    unit = times / [case.amount for case in cases]
    rows = []
    for case in cases:
        seconds, against = times[case.name], case.against or cases[0].name
        row = comparison.labels | case.labels | dict(case=case.name, rounds=len(times), seconds=seconds.median())
        row |= dict(fastest=seconds.min(), slowest=seconds.max(), rate=case.amount / seconds.median())
        if case.name != "matrix product":
            row |= dict(against=against) | _spread(unit[case.name] / unit[against], "ratio", "low", "high")
        if comparison.count_products:
            speed, peak = gflop[case.name] / seconds, gflop["matrix product"] / times["matrix product"]
            row |= dict(gflop=gflop[case.name]) | _spread(speed / peak, "of_peak", "of_peak_low", "of_peak_high")
        rows.append(row | columns)
    return pd.DataFrame(rows)


def _spread(values: pd.Series, *names: str) -> dict[str, float]:
    """Return the median, minimum and maximum under these names."""
    return dict(zip(names, (values.median(), values.min(), values.max()), strict=True))


def _largest() -> float:
    """Return the largest resident size of this process in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where ru_maxrss starts at the value of the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_of(case: Case | None) -> dict[str, float]:
    """Run the case once and return the peak memory of this process in MiB."""
    if case is not None:
        case.prepare()()
    peaks = dict(peak_mib=_largest())
    if torch.cuda.is_available():
        peaks["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def _peak(number: int, case: str, quick: bool) -> dict[str, float]:
    """Return the peak memory of a new process that runs the case of this name in comparison `number`.

    With no such case, the process only does the imports."""
    command = [sys.executable, sys.argv[0], "--peak", str(number), case] + ["--quick"] * quick
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    return json.loads(output.splitlines()[-1])


def start() -> argparse.Namespace:
    """Read the options and set up torch. Every benchmark but gpu.py calls this first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="run at toy size, to check that it runs")
    parser.add_argument("--peak", nargs=2, metavar=("NUMBER", "CASE"), help=argparse.SUPPRESS)
    use_every_core()
    torch.backends.cuda.matmul.allow_tf32 = False
    return parser.parse_args()


def main(name: str, comparisons: Callable[[bool], list[Comparison]]) -> None:
    """Measure `comparisons(quick)`, then print and write the rows."""
    options, began = start(), time.monotonic()
    planned = comparisons(options.quick)
    if options.peak:
        number, name_of_case = int(options.peak[0]), options.peak[1]
        case = next((case for case in planned[number].cases if case.name == name_of_case), None)
        print(json.dumps(_peak_of(case)))
        return
    tables, imports_mib = [], _peak(0, "", options.quick)["peak_mib"]
    for number, comparison in enumerate(planned):
        if options.quick:
            comparison.rounds = 1
        table = measure(comparison).assign(imports_mib=imports_mib)
        measured = [case.name for case in comparison.cases][: 1 if options.quick else None]
        peaks = pd.DataFrame([dict(case=case) | _peak(number, case, options.quick) for case in measured])
        tables.append(table.merge(peaks, on="case", how="left"))
        print(tables[-1].drop(columns=["against", "rounds"]).to_string(index=False), flush=True)
    save(name, pd.concat(tables, ignore_index=True), options.quick, time.monotonic() - began)


def save(name: str, table: pd.DataFrame, quick: bool, seconds: float) -> None:
    """Write results/bench/NAME.csv and its provenance. A quick run writes to build/bench instead."""
    paths = paths_module.Paths("bench")
    folder = paths.build if quick else paths.results
    table = table.assign(device=device_name(), threads=torch.get_num_threads())
    provenance = dict(profile="bench", config="", host="", seed=0, seconds=round(seconds, 3))
    stages.write_table(table, folder / f"{name}.csv", provenance)
