"""The attention map of a recurrent head, exactly: `python benchmarks/attribution.py`.

- map: `writesae.evaluate.attribution.weights`, from the queries back, without a state per token;
- plain: for each write, the state that it alone would leave is moved token by token and read at each.

Both must give the same map. The time includes no host run: the factors are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Case, Comparison, main, must_agree
from replacement import apart
from torch import Tensor

from writesae.evaluate.attribution import weights
from writesae.recurrence import Factors

TOLERANCE = 1e-4


def factors_of(side: int, length: int) -> Factors:
    """Return random factors of a delta rule, [1, length, side]."""
    generator = torch.Generator().manual_seed(0)
    key, query, added = (torch.randn(1, length, side, generator=generator) for _ in range(3))
    key, beta = torch.nn.functional.normalize(key, dim=-1), torch.rand(1, length, 1, generator=generator)
    log_decay = -0.05 * torch.rand(1, length, 1, generator=generator)
    return Factors(query=query, key=key, added=beta * added, log_decay=log_decay, erase=beta * key, probe=key)


def plain(factors: Factors) -> Tensor:
    """Return the map [1, T, T] from one state [d_k, 1] per write, moved one token at a time."""
    length = factors.key.shape[1]
    made = factors.key.new_zeros(1, length, length)
    for s in range(length):
        moved = factors.key[:, s, None]
        for t in range(s, length):
            now = factors.at(slice(None), t)
            moved = now.transition(moved) if t > s else moved
            made[:, t, s] = (moved[:, 0] * now.query).sum(-1)
    return made


def case(way: str, device: torch.device | str = "cpu", **size: int) -> Callable[[], Tensor]:
    return partial({"map": weights, "plain": plain}[way], factors_of(**size).to(device))


def same_maps(results: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative difference of the maps. Raises ValueError if it exceeds TOLERANCE."""
    difference = apart(*results.values())
    must_agree(difference, TOLERANCE, "The two maps differ")
    return dict(difference=difference)


def comparisons(quick: bool) -> list[Comparison]:
    planned = []
    for side in (8,) if quick else (64, 128):
        size = dict(side=side, length=16 if quick else 128)
        cases = [Case(way, partial(case, way, **size), size["length"]) for way in ("map", "plain")]
        planned.append(Comparison(dict(unit="token", **size), cases, same_maps, rounds=3))
    return planned


if __name__ == "__main__":
    main("attribution", comparisons)
