"""Compare short convolutions as shifted products with conv1d: `python benchmarks/short_convolution.py`.

The benchmark times the convolution of one layer on random inputs of the width of an embedded host, and the
native run of the host with either version in all layers. Both must give the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import Case, Comparison, main, must_agree
from harvest_speed import load, windows
from torch import Tensor

from replication.study.paths import ROOT
from writesae.hosts.layers import short_convolution
from writesae.hosts.load import adapter

FOLDERS = ("gated_deltanet", "mamba2")
TOLERANCE = 1e-4  # largest difference over the largest number


def with_conv1d(inputs: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do the same as short_convolution with conv1d, which needs channels before time."""
    if before is None:
        before = inputs.new_zeros(len(inputs), weight.shape[-1] - 1, inputs.shape[-1])
    return F.conv1d(torch.cat([before, inputs], 1).mT, weight, bias, groups=len(weight)).mT


def convolution(way: Callable[..., Tensor], folder: str, batch: int, length: int) -> Callable[[], Tensor]:
    """Return one convolution of the host's width on random inputs, as a function."""
    conv = next(part for part in load(ROOT / "models" / folder).model.modules() if isinstance(part, torch.nn.Conv1d))
    inputs = torch.randn(batch, length, conv.in_channels, generator=torch.Generator().manual_seed(0))
    return torch.no_grad()(lambda: way(inputs, None, conv.weight, conv.bias).contiguous())


def native_run(way: Callable[..., Tensor], folder: str, batch: int, length: int) -> Callable[[], Tensor]:
    """Return the native run of the host on random tokens, as a function that gives the last hidden states."""
    host = load(ROOT / "models" / folder)
    tokens = windows(host, batch, length)

    def run() -> Tensor:
        with patch.object(sys.modules[adapter(folder).__module__], "short_convolution", way):
            return host.run(tokens).final

    return run


def same_numbers(results: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest difference over the largest number. Raise ValueError above TOLERANCE."""
    ours, conv1d = results.values()
    largest = ((ours - conv1d).abs().max() / conv1d.abs().max()).item()
    must_agree(largest, TOLERANCE, "Shifted products and conv1d differ")
    return dict(difference=largest)


def comparisons(quick: bool) -> list[Comparison]:
    size, planned = dict(batch=2, length=32) if quick else dict(batch=16, length=256), []
    ways, amount = {"shifted products": short_convolution, "conv1d": with_conv1d}, size["batch"] * size["length"]
    for what, make in dict(convolution=convolution, run=native_run).items():
        for folder in FOLDERS:
            cases = [Case(name, partial(make, way, folder, **size), amount) for name, way in ways.items()]
            planned.append(Comparison(dict(unit="token", what=what, host=folder, **size), cases, same_numbers))
    return planned


if __name__ == "__main__":
    main("short_convolution", comparisons)
