"""Harvest, replacement and training on a GPU at Qwen3.5-0.8B's shape: `python benchmarks/gpu.py`.

Each part is measured with fp32 and TF32 products, and in bf16 (the weights of the model, or the products of
the trainer). results/bench/gpu.csv has one line per case, with the columns of benchmarks/common.py and

    part, products     what was measured, and how its matrix products were taken
    kernel             what the case's recurrence ran on: the project's own is torch's, the library's forward may have another
    gflop, of_peak     matrix products of one run (those of other packages' kernels are not seen), and their rate over that of
                       one large product in the same precision, also measured here (part peak)
    difference         from the same case in fp32 (its loss, its factors, its logits: norm of the difference over the norm);
                       of plain replacements from the batched ones, of the KLs
    agrees             of training steps: whether the loss is fp32's to 1e-4
    device_mib         largest allocated memory during one run, the model's included

Without CUDA it prints that, and writes nothing. `--shape tiny --device cpu` (or `--quick`) runs the same code
in seconds, into build/bench.
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

import common
import pandas as pd
import replacement
import torch
import training_step
from common import Case, Comparison
from torch import Tensor

from writesae.harvesting import harvest
from writesae.hosts import load
from writesae.hosts.base import Host
from writesae.hosts.load import without_triton
from writesae.sae import losses
from writesae.sae.losses import tf32

PRODUCTS = ("fp32", "tf32", "bf16")
TOLERANCE = 1e-4  # of the training loss, against fp32
PERIOD = ["linear_attention"] * 3 + ["full_attention"]
SHAPES = {
    "qwen3.5-0.8b": dict(  # its config.json, vision tower left out
        host=dict(
            vocab_size=248320,
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            tie_word_embeddings=True,
            layer_types=PERIOD * 6,
        ),
        tokens=(2, 1024),
        training=dict(side=128, n_atoms=2048, k=32, windows=4, tokens=1024, silent=300),
        replacement=dict(windows=2, length=256, firings=32, conditions=3),
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
            layer_types=PERIOD,
        ),
        tokens=(2, 32),
        training=dict(side=16, n_atoms=64, k=4, windows=2, tokens=64, silent=12),
        replacement=dict(windows=1, length=24, firings=2, conditions=2),
        side=64,
        rounds=1,
    ),
}


def under(kind: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with TF32 allowed for that kind; fp32 is what it is, and bf16 a matter of the tensors."""

    def wrapped() -> Any:
        with tf32(kind == "tf32"):
            return run()

    return wrapped


@lru_cache
def host_of(shape: str, bf16: bool) -> Host:
    """Return a host with random weights on the device, in fp32, or the same host in bf16."""
    if bf16:
        model = copy.deepcopy(host_of(shape, False).model).bfloat16()
    else:
        torch.manual_seed(0)
        with torch.device(common.device()):
            model = load.adapter("gated_deltanet").build(SHAPES[shape]["host"])
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.mul_(3)  # as they are built, the layers above hardly read an edit
    return load.adapter("gated_deltanet")(model.to(common.device()), None, shape)


def windows(shape: str) -> Tensor:
    """Return random tokens [count, length]."""
    size = SHAPES[shape]["tokens"]
    tokens = torch.randint(SHAPES[shape]["host"]["vocab_size"], size, generator=torch.Generator().manual_seed(0))
    return tokens.to(common.device())


def harvesting(shape: str, kind: str) -> Callable[[], Tensor]:
    """Harvest all heads of the last recurrent layer; the case returns the values of one. bf16: the model's
    weights."""
    host, tokens = host_of(shape, kind == "bf16"), windows(shape)
    cells = [(host.recurrent_layers[-1], head) for head in range(host.heads)]
    run = under(kind, lambda: harvest(host, tokens, cells, len(tokens), progress=False))
    return lambda: run()[cells[0]].added


def forward(shape: str, kind: str) -> Callable[[], Tensor]:
    """Run transformers' forward on the same windows; the case returns the logits of the last position."""
    host, tokens = host_of(shape, kind == "bf16"), windows(shape)

    @torch.no_grad()
    def run() -> Tensor:
        return host.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    return under(kind, run)


def replacing(shape: str, way: str, kind: str) -> Callable[[], Tensor]:
    """Run replacements in batches or one by one; the case returns the KLs."""
    host = host_of(shape, kind == "bf16")
    *where, left, right = replacement.problem(host, "late", **SHAPES[shape]["replacement"])
    if way == "batched":
        run = partial(replacement.batched, host, *where, left, right)
    else:
        run = partial(replacement.plain, host, *where, left.mT @ right)
    return under(kind, run)


def training(shape: str, kind: str, compiled: bool = False) -> Callable[[], Tensor]:
    """A step of the trainer on fp32 factors, some atoms silent; returns the loss. Nothing moves
    (training_step.py). compiled: the loss goes through torch.compile."""
    sizes, loss_of = SHAPES[shape]["training"], losses.factored_loss
    loss_of = torch.compile(loss_of) if compiled else loss_of
    run = training_step.new_run(**sizes)
    run.settings = run.settings.model_copy(update=dict(products=kind))

    def step() -> Tensor:
        run.step = 0
        run.silent.zero_()
        run.silent[: sizes["silent"]] = run.settings.dead_after
        with mock.patch.object(losses, "factored_loss", loss_of):
            run.advance()
        return run.losses[0, :1].clone()

    return step


def product(shape: str, kind: str) -> Callable[[], Tensor]:
    """Return the case of one large matrix product."""
    side = SHAPES[shape]["side"]
    a = torch.randn(side, side, device=common.device())
    a = a.bfloat16() if kind == "bf16" else a
    return under(kind, lambda: a @ a)


def comparisons(shape: str) -> list[Comparison]:
    """Cases named "part kind products"; the difference of each comes back as a column of that name."""
    sizes = SHAPES[shape]
    amount, firings = sizes["tokens"][0] * sizes["tokens"][1], sizes["replacement"]["firings"]
    steps, rounds = sizes["training"]["windows"] * sizes["training"]["tokens"], sizes["rounds"]

    def case(part: str, make, units: float, kind: str, against: str | None = None) -> Case:
        return Case(f"{part} {kind}", make, units, against and f"{against} {kind}", dict(part=part, products=kind))

    def several(part: str, make, units: float, against: str | None = None) -> list[Case]:
        return [case(part, partial(make, shape, kind), units, kind, against) for kind in PRODUCTS]

    def replaced(way: str) -> list[Case]:
        kinds, make = ("fp32", "tf32"), partial(replacing, shape, way)  # bf16 cannot tell KLs of single writes
        name, against = f"{way} replacement", "batched replacement"
        return [case(name, partial(make, kind), firings, kind, against) for kind in kinds]

    found = [
        ("product", several("peak", product, 1)),
        ("token", several("forward", forward, amount) + several("harvest", harvesting, amount, "forward")),
        ("firing", replaced("batched") + replaced("plain")),
        ("token", several("training step", training, steps)),
    ]
    # On two cores of a CPU compiling took half a minute, and steps as long as without.
    if common.device().type == "cuda":
        make = partial(training, compiled=True)
        found[-1][1].extend(several("compiled step", make, steps, "training step"))
    return [Comparison(dict(unit=unit), cases, differences, rounds, count_products=True) for unit, cases in found]


def differences(results: dict[str, Tensor]) -> dict[str, float]:
    """Return the difference of each case from the same case in fp32, and of plain replacements from batched
    ones."""
    found = {}
    for name, result in results.items():
        part, kind = name.rsplit(" ", 1)
        if part in ("peak", "matrix"):
            continue
        others = {"plain replacement": f"batched replacement {kind}", "compiled step": "training step fp32"}
        wanted = results[others.get(part, f"{part} fp32")]
        found[f"difference {name}"] = replacement.apart(result.double().cpu(), wanted.double().cpu())
    return found


def memory_of(case: Case) -> float:
    """Return the largest allocated device memory of one run, in MiB; nan on a CPU."""
    run = case.prepare()
    if common.device().type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def tidy(table: pd.DataFrame, peaks: dict[str, float]) -> pd.DataFrame:
    """Return the lines of one comparison with a single column `difference` and the share of the peak of their
    precision."""
    table = table[table.case != "matrix product"]
    rows = table.to_dict("records")
    table = table.assign(
        difference=[row.get(f"difference {row['case']}", math.nan) for row in rows],
        of_peak=table.gflop / table.seconds / table.products.map(peaks),
    )
    trained = table.part.isin(["training step", "compiled step"])
    table["agrees"] = (table.difference <= TOLERANCE).where(trained, None)
    return table[[name for name in table if not name.startswith(("difference ", "of_peak_"))]]


def measure(shape: str) -> pd.DataFrame:
    """Return all lines. A part that does not fit into the GPU's memory is left out, and a printed line says
    so."""
    common.PEAK_SIDE, peaks, tables = SHAPES[shape]["side"], {}, []
    for comparison in comparisons(shape):
        try:
            table = common.measure(comparison)
            memory = {case.name: memory_of(case) for case in comparison.cases}
        except torch.OutOfMemoryError as error:
            print(f"{comparison.cases[-1].name} and what it is compared with do not fit this card: {error}")
            continue
        if not peaks:
            own = table[table.part == "peak"]
            peaks = dict(zip(own.products, own.gflop / own.seconds, strict=True))
        tables.append(tidy(table, peaks).assign(device_mib=table.case.map(memory)))
        print(tables[-1].drop(columns=["against", "rounds", "fastest", "slowest"]).to_string(index=False), flush=True)
    return pd.concat(tables, ignore_index=True).assign(shape=shape)


def main(arguments: list[str] | None = None) -> int:
    """0, also where there is no card."""
    parser = argparse.ArgumentParser(description="Measure the GPU paths.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-0.8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="--shape tiny, on whatever there is")
    options, began = parser.parse_args(arguments), time.monotonic()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a card
    elif not torch.cuda.is_available() and not options.quick:
        print("There is no CUDA device here: nothing was measured (--shape tiny --device cpu shows that it runs).")
        return 0
    without_triton()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    shape = "tiny" if options.quick else options.shape
    common.save("gpu", measure(shape), shape == "tiny", time.monotonic() - began)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
