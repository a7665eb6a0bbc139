"""All parts on a GPU at the shape of Qwen3.5-0.8B: `python benchmarks/gpu.py`.

Forward, harvest and training are measured with fp32 products, with TF32 products, and in bf16 (model weights,
or products of the trainer). Replacement, edits of all cells, closed form and attribution are measured in fp32
and TF32, each beside its plain way (see the file of that name): bf16 is too coarse for single writes.
results/bench/gpu.csv has one row per case, with the columns of benchmarks/common.py and

    part, products  what was measured, and the precision of its matrix products
    gflop           matrix products of one run, without those inside compiled kernels of other packages
    of_peak         their rate, as a share of the rate of one large product in the same precision
    difference      of the result from that of the same case in fp32 (norm of the difference over norm); for a
                    plain way, from the result of the fast way
    agrees          for training steps: whether the loss equals that of fp32 to 1e-4
    device_mib      largest allocated memory during one run, including the model

Without CUDA it prints a sentence and writes nothing. `--shape tiny --device cpu` (or `--quick`) runs the same
code in seconds and writes to build/bench.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import attribution
import closed_form
import common
import many_cells
import pandas as pd
import replacement
import torch
import training_step
import yaml
from common import Case, Comparison
from harvest_speed import windows
from torch import Tensor

from replication.study.paths import ROOT
from replication.study.study import use_every_core
from writesae.harvesting import harvest
from writesae.hosts import load
from writesae.hosts.base import Host
from writesae.hosts.load import without_triton
from writesae.sae import losses
from writesae.sae.losses import tf32

PRODUCTS = ("fp32", "tf32", "bf16")
PAIRS = {  # part: the unit of its work, its fast and its plain way, and their names in the table
    "replacement": ("firing", {"batched": "batched replacement", "plain": "plain replacement"}),
    "many_cells": ("trial", {"edited": "edits of all cells", "plain": "plain edits of all cells"}),
    "closed_form": ("atom", {"layer": "closed form", "one by one": "forward per atom"}),
    "attribution": ("token", {"map": "attribution map", "plain": "plain attribution map"}),
}
UNITS = dict(firing="firings", trial="trials", atom="atoms", token="length")  # sizes that count them
TOLERANCE = 1e-4  # largest relative difference of a training loss from fp32 that counts as agreement
MODELS = yaml.safe_load((ROOT / "profiles" / "dryrun" / "hosts.yaml").read_text(encoding="utf-8"))
SHAPES = {
    "qwen3.5-0.8b": dict(
        host=MODELS["Qwen/Qwen3.5-0.8B"]["architecture"],
        tokens=(2, 1024),
        training=dict(side=128, n_atoms=2048, k=32, windows=4, tokens=1024, silent=300),
        replacement=dict(depth="late", windows=2, length=256, firings=32, conditions=3),
        many_cells=dict(length=256, trials=16, steps=4),
        closed_form=dict(length=256, atoms=32),
        attribution=dict(side=128, length=256),
        side=8192,
        rounds=5,
    ),
    "tiny": dict(
        host=dict(
            vocab_size=300,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            tie_word_embeddings=True,
        ),
        tokens=(2, 32),
        training=dict(side=16, n_atoms=64, k=4, windows=2, tokens=64, silent=12),
        replacement=dict(depth="late", windows=1, length=24, firings=2, conditions=2),
        many_cells=dict(length=24, trials=2, steps=2),
        closed_form=dict(length=24, atoms=3),
        attribution=dict(side=16, length=24),
        side=64,
        rounds=1,
    ),
}


def under(kind: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return `run` with TF32 products allowed if `kind` is "tf32". For bf16, the tensors are bf16."""

    def wrapped() -> Any:
        with tf32(kind == "tf32"):
            return run()

    return wrapped


@lru_cache
def host_of(shape: str, bf16: bool) -> Host:
    """Return a host with random weights on the device, in fp32 or (the same weights) in bf16."""
    if bf16:
        model = copy.deepcopy(host_of(shape, False).model).bfloat16()
    else:
        torch.manual_seed(0)
        with torch.device(common.device()):
            model = load.adapter("gated_deltanet").build(SHAPES[shape]["host"])
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.mul_(3)  # with smaller weights, an edit hardly changes the layers above
    return load.adapter("gated_deltanet")(model.to(common.device()), None, shape)


def host_and_tokens(shape: str, kind: str) -> tuple[Host, Tensor]:
    """Return the host in the precision of `kind`, and random tokens [count, length]."""
    host = host_of(shape, kind == "bf16")
    return host, windows(host, *SHAPES[shape]["tokens"])


def harvesting(shape: str, kind: str) -> Callable[[], Tensor]:
    """Harvest all heads of the last recurrent layer. The result is the values of the first head."""
    host, tokens = host_and_tokens(shape, kind)
    cells = [(host.recurrent_layers[-1], head) for head in range(host.heads)]
    run = under(kind, lambda: harvest(host, tokens, cells, len(tokens), progress=False))
    return lambda: run()[cells[0]].added


def forward(shape: str, kind: str) -> Callable[[], Tensor]:
    """Run transformers' forward on the same windows. The result is the logits at the last position."""
    host, tokens = host_and_tokens(shape, kind)

    @torch.no_grad()
    def run() -> Tensor:
        ids = tokens.to(host.device)
        return host.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    return under(kind, run)


def in_one_way(shape: str, part: str, way: str, kind: str) -> Callable[[], Tensor]:
    """Do a part of PAIRS in one way. The result is KLs, logits, logit shifts or the map."""
    size = SHAPES[shape][part]
    if part == "attribution":
        return under(kind, attribution.case(way, common.device(), **size))
    module = dict(replacement=replacement, many_cells=many_cells, closed_form=closed_form)[part]
    return under(kind, module.ready(host_of(shape, False), way, **size))


def training(shape: str, kind: str, compiled: bool = False) -> Callable[[], Tensor]:
    """Do a training step on fp32 factors with some dead atoms. The result is the loss [1].

    No parameter changes (see training_step.py). compiled: the loss goes through torch.compile."""
    sizes, loss_of = SHAPES[shape]["training"], losses.factored_loss
    loss_of = torch.compile(loss_of) if compiled else loss_of
    run = training_step.new_run(**sizes)
    run.settings = run.settings.model_copy(update=dict(products=kind))

    def step() -> Tensor:
        with mock.patch.object(losses, "factored_loss", loss_of):
            return training_step.first_step(run, sizes["silent"]).clone()

    return step


def product(shape: str, kind: str) -> Callable[[], Tensor]:
    """Do one large matrix product, which gives the peak rate of its precision."""
    side = SHAPES[shape]["side"]
    a = torch.randn(side, side, device=common.device())
    a = a.bfloat16() if kind == "bf16" else a
    return under(kind, lambda: a @ a)


def comparisons(shape: str) -> list[Comparison]:
    """Return the comparisons. Each case is named "PART PRODUCTS"."""
    sizes = SHAPES[shape]
    harvested = math.prod(sizes["tokens"])
    trained = sizes["training"]["windows"] * sizes["training"]["tokens"]

    def case(part: str, make, units: float, kind: str, against: str | None = None) -> Case:
        return Case(f"{part} {kind}", make, units, against and f"{against} {kind}", dict(part=part, products=kind))

    def in_each(part: str, make, units: float, against: str | None = None) -> list[Case]:
        return [case(part, partial(make, shape, kind), units, kind, against) for kind in PRODUCTS]

    def in_both_ways(part: str) -> list[Case]:
        unit, ways = PAIRS[part]
        units, fast = sizes[part][UNITS[unit]], next(iter(ways.values()))
        return [
            case(name, partial(in_one_way, shape, part, way, kind), units, kind, fast)
            for way, name in ways.items()
            for kind in ("fp32", "tf32")
        ]

    groups = [
        ("product", in_each("peak", product, 1)),
        ("token", in_each("forward", forward, harvested) + in_each("harvest", harvesting, harvested, "forward")),
        *((unit, in_both_ways(part)) for part, (unit, _) in PAIRS.items()),
        ("token", in_each("training step", training, trained)),
    ]
    # On two CPU cores, compiling took half a minute and did not make the step faster.
    if common.device().type == "cuda":
        make = partial(training, compiled=True)
        groups[-1][1].extend(in_each("compiled step", make, trained, "training step"))
    rounds = sizes["rounds"]
    return [Comparison(dict(unit=unit), cases, differences, rounds, count_products=True) for unit, cases in groups]


def differences(results: dict[str, Tensor]) -> dict[str, float]:
    """Return, in column "difference CASE", how far each case is from the same case in fp32.

    Plain ways are compared with fast ones, compiled steps with the fp32 training step."""
    columns, fast_ways = {}, {plain: fast for _, ways in PAIRS.values() for fast, plain in [ways.values()]}
    for name, result in results.items():
        part, kind = name.rsplit(" ", 1)
        if part in ("peak", "matrix"):
            continue
        compared = f"{fast_ways[part]} {kind}" if part in fast_ways else f"{part} fp32"
        wanted = results["training step fp32" if part == "compiled step" else compared]
        columns[f"difference {name}"] = replacement.apart(result.double().cpu(), wanted.double().cpu())
    return columns


def memory_of(case: Case) -> float:
    """Return the largest allocated GPU memory of one run, in MiB (nan on a CPU)."""
    run = case.prepare()
    if common.device().type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def tidy(table: pd.DataFrame, peaks: dict[str, float]) -> pd.DataFrame:
    """Return the rows of one comparison with one column `difference`, and `of_peak` computed from `peaks`.

    peaks: the peak rate of each precision, in GFLOP/s."""
    table = table[table.case != "matrix product"]
    rows = table.to_dict("records")
    table = table.assign(
        difference=[row.get(f"difference {row['case']}", math.nan) for row in rows],
        of_peak=table.gflop / table.seconds / table.products.map(peaks),
    )
    is_training = table.part.isin(["training step", "compiled step"])
    table["agrees"] = (table.difference <= TOLERANCE).where(is_training, None)
    return table[[name for name in table if not name.startswith(("difference ", "of_peak_"))]]


def measure(shape: str) -> pd.DataFrame:
    """Return all rows. A comparison that does not fit into GPU memory is skipped with a message."""
    common.PEAK_SIDE, peaks, tables = SHAPES[shape]["side"], {}, []
    for comparison in comparisons(shape):
        try:
            table = common.measure(comparison)
            memory = {case.name: memory_of(case) for case in comparison.cases}
        except torch.OutOfMemoryError as error:
            names = ", ".join(case.name for case in comparison.cases)
            print(f"Skipped, because the GPU has too little memory: {names} ({error})")
            continue
        if not peaks:
            peak = table[table.part == "peak"]
            peaks = dict(zip(peak.products, peak.gflop / peak.seconds, strict=True))
        tables.append(tidy(table, peaks).assign(device_mib=table.case.map(memory)))
        print(tables[-1].drop(columns=["against", "rounds", "fastest", "slowest"]).to_string(index=False), flush=True)
    return pd.concat(tables, ignore_index=True).assign(shape=shape)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status 0, also without a GPU."""
    parser = argparse.ArgumentParser(description="Measure speed and memory on a GPU.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-0.8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the same as --shape tiny, on a GPU or a CPU")
    options, began = parser.parse_args(arguments), time.monotonic()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first use of CUDA
    elif not torch.cuda.is_available() and not options.quick:
        print("There is no CUDA device here: nothing was measured (--shape tiny --device cpu shows that it runs).")
        return 0
    without_triton()
    use_every_core()
    shape = "tiny" if options.quick else options.shape
    common.save("gpu", measure(shape), shape == "tiny", time.monotonic() - began)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
