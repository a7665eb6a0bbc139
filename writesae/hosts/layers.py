"""What the layers of several families are made of."""

from __future__ import annotations

import math

import torch


def slow_decays(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A_log, dt_bias), each [heads]: A uniform in [1, 16], dt log-uniform in [1e-3, 0.1], as in Mamba's training.

    With alpha = exp(-A softplus(. + dt_bias)) heads then start with half-lives from about 1 to 600 tokens; the
    classes' own initial values give alphas near zero, and a state that holds a single write.
    """
    step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
    inverse_softplus = step + torch.log(-torch.expm1(-step))
    return torch.empty(heads).uniform_(1, 16).log(), inverse_softplus


def unit(x: torch.Tensor) -> torch.Tensor:
    """The library's L2 norm over the last dimension, in fp32 or better."""
    x = wide(x)
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32, or as it is where that is no less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def normalized(x: torch.Tensor, eps: float, groups: int = 1) -> torch.Tensor:
    """x over its root mean square, in each of `groups` equal parts of the last dimension, in fp32 or better.

    The library's norms take it in fp32 in fp64 models too, and the gates that multiply it. There the last bit depends on
    where an element stands among those that the processor takes at once, so that a row's result depends on the others.
    """
    parts = wide(x).unflatten(-1, (groups, -1))
    return (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)


def short_convolution(
    inputs: torch.Tensor, before: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The causal convolution of each channel over inputs [B, T, C], after the last inputs before them [B, K - 1, C] (None:
    zeros). weight [C, 1, K] and bias [C] are those of an nn.Conv1d.

    A sum of K shifted products, taken in fp32 or better and returned in the inputs' type. The channels stay last, where
    the layers before and after have them: on a CPU 1.5 to 1.7 times as fast as conv1d on transposed inputs, of which a
    whole run sees next to nothing (benchmarks/short_convolution.py).
    """
    taps, length = wide(weight[:, 0].T).contiguous(), inputs.shape[1]
    if before is None:
        before = inputs.new_zeros(len(inputs), len(taps) - 1, inputs.shape[-1])
    padded = wide(torch.cat([before, inputs], 1))
    mixed = padded[:, :length] * taps[0]
    for place, tap in enumerate(taps[1:], 1):
        mixed = torch.addcmul(mixed, padded[:, place : place + length], tap)
    return (mixed if bias is None else mixed + wide(bias)).to(inputs.dtype)
