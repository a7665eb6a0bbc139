"""Logit shifts from one backward pass or from one forward per atom: `python benchmarks/closed_form.py`.

Each of n unit atoms is written at a tenth of the native write's norm. The benchmark measures how much the
logit of a token shifts four tokens later, in four ways:

- backward: the exact first-order formula of writesae.shift, with one gradient for all atoms;
- layer: the formula that takes the edited layer exactly (`predict_shift`), with the same one gradient;
- one by one: transformers' whole model from a copy of the cache of the prefix, one atom at a time;
- batched: the exact edited runs of this project, all atoms in one batch.

"backward" and "layer" predict what the other two measure: `r2` and `r2_layer` are the R2 of their predictions
for the one-by-one shifts, with no fitted parameter. Such small shifts are noisy in fp32, so there is also an R2 in fp64. The two
measured ways must agree in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Case, Comparison, main, must_agree
from replacement import FOLDER, apart, load, logits_after, prefix_cache
from torch import Tensor

from writesae.edit import edited_hidden, make_edit
from writesae.hosts.base import Host
from writesae.shift import cache_gamma, logit_gradient, predict_shift

HORIZON = 4  # tokens from the write to the logit
EPS = 0.1  # norm of each written atom, in native write norms
TOLERANCE = 1e-3


@torch.no_grad()
def backward(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the predicted shifts [n] of the logit of `token`, HORIZON tokens after `position`.

    The atoms key [n, d_k], value [n, d_v] are written at `position`, one at a time."""
    run = host.run(tokens)
    row, start, wanted = (torch.tensor([x]) for x in (0, position, token))
    gradient, _ = logit_gradient(host, run, layer, head, row, start + 1, HORIZON, wanted)
    influence = cache_gamma(host.factors(run, layer, head), row, start, gradient)[0]
    return ((key @ influence) * value).sum(-1)


def through_layer(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the shifts [n] predicted through the edited layer."""
    rows = torch.zeros(len(key), dtype=torch.int64)
    edit = make_edit(rows, rows + position, key[:, None], value[:, None], "cache")
    return predict_shift(host, tokens, edit, token, layer=layer, head=head, steps=HORIZON + 1)


@torch.no_grad()
def batched(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the same shifts from edited runs, all atoms in one batch."""
    run, n = host.run(tokens), len(key)
    rows = torch.zeros(n, dtype=torch.int64)
    edit = make_edit(rows, rows + position, key[:, None], value[:, None], "cache")
    patched = host.unembed(edited_hidden(host, run, layer, head, edit, HORIZON + 1)[:, -1])[:, token]
    return patched - host.unembed(run.final[0, position + HORIZON])[token]


@torch.no_grad()
def one_by_one(host: Host, tokens: Tensor, position: int, token: int, layer: int, head: int, key, value) -> Tensor:
    """Return the same shifts from transformers' model, one forward per atom."""
    where = host, prefix_cache(host, tokens, position), tokens, position, layer, head
    native = logits_after(*where, torch.zeros_like(key[0, :, None] * value[0]), HORIZON)[token]
    edited = [logits_after(*where, k[:, None] * v, HORIZON)[token] for k, v in zip(key, value, strict=True)]
    return torch.stack(edited) - native


WAYS = {"backward": backward, "layer": through_layer, "one by one": one_by_one, "batched": batched}


def problem(host: Host, length: int, atoms: int) -> tuple:
    """Return (tokens, position, token, layer, head, key, value): a random window and atoms of norm EPS."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(host.vocabulary, (1, length), generator=generator)
    position, layer, head = length - HORIZON - 1, host.recurrent_layers[len(host.recurrent_layers) // 2], 0
    factors = host.factors(host.run(tokens), layer, head)
    size = EPS * factors.key[0, position].norm() * factors.added[0, position].norm()
    unit = torch.nn.functional.normalize
    key, value = (unit(torch.randn(atoms, d, generator=generator), dim=-1).to(size) for d in (host.d_k, host.d_v))
    token = int(host.logits(host.run(tokens).final[0, -1]).argmax())
    return tokens, position, token, layer, head, key, size * value


def ready(host: Host, way: str, **size: int) -> Callable[[], Tensor]:
    """Return one of the ways as a function without arguments."""
    return partial(WAYS[way], host, *problem(host, **size))


def case(way: str, dtype: torch.dtype = torch.float32, **size: int) -> Callable[[], Tensor]:
    """Return the same for the embedded host."""
    return ready(load(FOLDER, None, dtype), way, **size)


def r_squared(predicted: Tensor, measured: Tensor) -> float:
    """Return R2 = 1 - (squared error) / (variance of `measured`)."""
    return 1 - ((measured - predicted).square().sum() / (measured - measured.mean()).square().sum()).item()


def agreement(size: dict[str, int], results: dict[str, Tensor]) -> dict[str, float]:
    """Return the R2 of the prediction in fp32 and fp64, and the difference of the measured ways in fp64.

    Raises ValueError if that difference exceeds TOLERANCE."""
    predicted, by_layer, one_at_a_time, in_batch = (case(way, torch.float64, **size)() for way in WAYS)
    difference = apart(in_batch, one_at_a_time)
    must_agree(difference, TOLERANCE, "The measured shifts differ: the edits are not the same")
    r2 = r_squared(results["backward"], results["one by one"])
    columns = dict(r2=r2, r2_layer=r_squared(results["layer"], results["one by one"]), difference_fp64=difference)
    exact = dict(r2_fp64=predicted, r2_layer_fp64=by_layer)
    return columns | {name: r_squared(shifts, one_at_a_time) for name, shifts in exact.items()}


def comparisons(quick: bool) -> list[Comparison]:
    size = dict(length=32, atoms=6) if quick else dict(length=128, atoms=256)
    cases = [Case(way, partial(case, way, **size), size["atoms"]) for way in WAYS]
    labels = dict(unit="atom", horizon=HORIZON, eps=EPS, **size)
    return [Comparison(labels, cases, partial(agreement, size), rounds=3)]


if __name__ == "__main__":
    main("closed_form", comparisons)
