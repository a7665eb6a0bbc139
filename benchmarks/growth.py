"""Cost against the side of the state: `python benchmarks/growth.py`.

The hosts are Gated DeltaNets with random weights that differ in the side of their states only: three recurrent
layers with one head each, and an attention layer. Each part is done in two ways (`method`), which must give
the same numbers:

- harvest: factored keeps the factors of one cell; plain keeps its states, which transformers' model computes
  token by token with a cache;
- replacement: factored edits all firings and conditions in one batch; plain runs transformers' model for each
  (benchmarks/replacement.py);
- closed form: factored predicts all logit shifts through the edited layer, from one backward pass; plain runs
  transformers' model once per atom (benchmarks/closed_form.py).

benchmarks/training_step.py has the same for a training step, and benchmarks/figure.py draws both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import closed_form
import replacement
import torch
from common import Case, Comparison, main, must_agree
from harvest_speed import windows
from storage import wide_host
from torch import Tensor

from writesae.harvesting import harvest
from writesae.hosts.base import Host

LAYER = 2  # of the harvest, the last recurrent one
UNITS = {"harvest": "token", "replacement": "firing", "closed form": "atom"}
TOLERANCES = {"harvest": 1e-4, "replacement": 1e-2, "closed form": 0.1}  # the closed form is to first order


@lru_cache
def host_of(side: int) -> Host:
    """Return the host of this side. Its weights are large: else an edit hardly changes the layers above."""
    torch.manual_seed(0)
    host = wide_host(side, recurrent=3, attention=1)
    for weight in host.model.parameters():
        if weight.ndim > 1:
            weight.mul_(3)
    return host


@torch.no_grad()
def states(host: Host, tokens: Tensor) -> Tensor:
    """Return the states [B, T, d_k, d_v] of the cell (LAYER, 0) from transformers' model."""
    cache, kept = None, []
    for token in tokens.split(1, 1):
        cache = host.model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
        kept.append(cache.layers[LAYER].recurrent_states[0][:, 0].clone())
    return torch.stack(kept, 1)


def harvesting(side: int, method: str, count: int, length: int) -> Callable[[], Tensor]:
    """Return the harvest of the cell in one way; it returns factors or states."""
    host = host_of(side)
    tokens = windows(host, count, length)
    if method == "plain":
        return partial(states, host, tokens)
    return partial(harvest, host, tokens, layer=LAYER, head=0, batch=count, progress=False)


def replacing(side: int, method: str, **size: int) -> Callable[[], Tensor]:
    """Return the replacement of one way; it returns KLs."""
    way = dict(factored="batched", plain="plain")[method]
    return replacement.ready(host_of(side), way, "late", **size)


def predicting(side: int, method: str, **size: int) -> Callable[[], Tensor]:
    """Return the prediction, or the measurement, of logit shifts."""
    way = dict(factored="layer", plain="one by one")[method]
    return closed_form.ready(host_of(side), way, **size)


def same_numbers(results: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative difference of a fast way from its plain way, over its tolerance.

    Raises ValueError if it exceeds 1."""
    largest = 0.0
    for name in (name for name in results if name.startswith("factored")):
        part = name.removeprefix("factored ").rpartition(" ")[0]
        got, wanted, tolerance = results[name], results[name.replace("factored", "plain")], TOLERANCES[part]
        got = got.history("state").steps() if part == "harvest" else got
        difference = replacement.apart(got, wanted)
        must_agree(difference, tolerance, f"The two ways of the {part} differ")
        largest = max(largest, difference / tolerance)
    return dict(of_tolerance=largest)


def comparisons(quick: bool) -> list[Comparison]:
    sides, length = ((8, 16), 32) if quick else ((64, 128, 256), 256)
    parts = {
        "harvest": (harvesting, dict(count=2, length=length), 2 * length),
        "replacement": (replacing, dict(windows=2, length=length, firings=8, conditions=3), 8),
        "closed form": (predicting, dict(length=length, atoms=16), 16),
    }
    cases = []
    for side in sides:
        for part, (make, size, amount) in parts.items():
            for method in ("factored", "plain"):
                labels = dict(part=part, unit=UNITS[part], method=method, side=side)
                prepare = partial(make, side, method, **size)
                cases.append(Case(f"{method} {part} {side}", prepare, amount, f"factored {part} {side}", labels))
    return [Comparison(dict(length=length), cases, same_numbers, rounds=3)]


if __name__ == "__main__":
    main("growth", comparisons)
