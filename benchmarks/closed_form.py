"""Logit shifts from one backward against one forward per atom: `python benchmarks/closed_form.py`.

The shift of a token's logit, four tokens after each of n unit atoms is written at a tenth of the native
write's norm:

- backward: the exact first-order form of writesae.shift, one gradient for all atoms;
- one by one: transformers' whole model from a deep copy of the prefix's cache, one atom at a time;
- batched: the exact edited runs of this project, all atoms in one batch.

The first one predicts what the others measure: `r2` is the R2 of its predictions for the one-by-one shifts,
with nothing fitted. Such small shifts are noisy in fp32, so that R2 is also given in fp64. The two measured
ways must agree in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Case, Comparison, main
from replacement import FOLDER, apart, load, logits_after, prefix_cache
from torch import Tensor

from writesae.edit import edited_hidden, make_edit
from writesae.hosts.base import Host
from writesae.shift import cache_gamma, logit_gradient

HORIZON = 4  # tokens from the write to the logit
EPS = 0.1  # of the native write's norm
TOLERANCE = 1e-3


@torch.no_grad()
def backward(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the predicted shifts [n] of the logit of `token`, HORIZON tokens after atoms key [n, d_k], value
    [n, d_v] at `position`."""
    run = host.run(tokens)
    row, start, wanted = (torch.tensor([x], device=host.device) for x in (0, position, token))
    gradient, _ = logit_gradient(host, run, layer, head, row, start + 1, HORIZON, wanted)
    influence = cache_gamma(host.factors(run, layer, head), row, start, gradient)[0]
    return ((key @ influence) * value).sum(-1)


@torch.no_grad()
def batched(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the same shifts from edited runs, all at once."""
    run, n = host.run(tokens), len(key)
    rows = torch.zeros(n, dtype=torch.int64, device=host.device)
    edit = make_edit(rows, rows + position, key[:, None], value[:, None], "cache")
    patched = host.unembed(edited_hidden(host, run, layer, head, edit, HORIZON + 1)[:, -1])[:, token]
    return patched - host.unembed(run.final[0, position + HORIZON])[token]


@torch.no_grad()
def one_by_one(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the same shifts from transformers' model, one forward per atom."""
    where = host, prefix_cache(host, tokens, position), tokens, position, layer, head
    native = logits_after(*where, torch.zeros_like(key[0, :, None] * value[0]), HORIZON)[token]
    found = [logits_after(*where, k[:, None] * v, HORIZON)[token] for k, v in zip(key, value, strict=True)]
    return torch.stack(found) - native


WAYS = {"backward": backward, "one by one": one_by_one, "batched": batched}


def problem(host: Host, length: int, atoms: int) -> tuple:
    """Return (tokens, position, token, layer, head, key, value): a random window and random atoms of the
    wanted size."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(host.vocabulary, (1, length), generator=generator).to(host.device)
    position, layer, head = length - HORIZON - 1, host.recurrent_layers[len(host.recurrent_layers) // 2], 0
    factors = host.factors(host.run(tokens), layer, head)
    size = EPS * factors.key[0, position].norm() * factors.added[0, position].norm()
    unit = torch.nn.functional.normalize
    key, value = (unit(torch.randn(atoms, d, generator=generator), dim=-1).to(size) for d in (host.d_k, host.d_v))
    token = int(host.logits(host.run(tokens).final[0, -1]).argmax())
    return tokens, position, token, layer, head, key, size * value


def case(way: str, dtype: torch.dtype = torch.float32, **size: int) -> Callable[[], Tensor]:
    """Return one of the ways, ready to run."""
    host = load(FOLDER, None, dtype)
    given = problem(host, **size)
    return lambda: WAYS[way](host, *given)


def r_squared(predicted: Tensor, measured: Tensor) -> float:
    return 1 - ((measured - predicted).square().sum() / (measured - measured.mean()).square().sum()).item()


def agreement(size: dict[str, int], results: dict[str, Tensor]) -> dict[str, float]:
    """Return the R2 of the prediction in fp32 and fp64, and the difference of the measured ways in fp64.
    Raises AssertionError where they do not agree."""
    predicted, measured, ours = (case(way, torch.float64, **size)() for way in WAYS)
    off = apart(ours, measured)
    assert off < TOLERANCE, f"the measured shifts differ by {off:.1e}: the two ways do not do the same edit"
    r2 = r_squared(results["backward"], results["one by one"])
    return dict(r2=r2, r2_fp64=r_squared(predicted, measured), difference_fp64=off)


def comparisons(quick: bool) -> list[Comparison]:
    size = dict(length=32, atoms=6) if quick else dict(length=128, atoms=256)
    cases = [Case(way, partial(case, way, **size), size["atoms"]) for way in WAYS]
    labels = dict(unit="atom", horizon=HORIZON, eps=EPS, **size)
    return [Comparison(labels, cases, partial(agreement, size), rounds=3)]


if __name__ == "__main__":
    main("closed_form", comparisons)
