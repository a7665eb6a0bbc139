"""Replacements in batches against the paper's protocol, firing by firing: `python benchmarks/replacement.py`.

A firing is a window, a position and some conditions: the native write is taken out and a rank-1 matrix, or
nothing, or another one is put in. Three conditions are the paper's; sixteen is about what notebook 05 asks of
each firing (eight, at two amplitudes). Twelve firings to a window is what one SAE of the middle cell has in
the profile `mini`.

The plain way runs the library's whole model: the prefix once a firing, and for each condition, and once for
none, a deep copy of the cache, the writing token, the edit of the cached state, and the next token. The
batched way is the project's; its native run of all windows counts. Both read the edit from the next token on
(scope "cache") and must give the same KLs. Small ones are differences of nearly equal logits, and the library
works in fp32 here and there whatever the model's dtype: the differences are of all KLs together (norm of the
difference over the norm), and the largest single one is taken over KLs above LEAST_KL.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from common import Case, Comparison, main
from torch import Tensor

from replication.study.paths import ROOT
from writesae.edit import edited_hidden, kl, make_edit
from writesae.hosts.base import Host
from writesae.hosts.load import load_host

FOLDER = ROOT / "models" / "gated_deltanet"
TOLERANCE = 1e-4
LEAST_KL = 1e-5  # nats
load = lru_cache(load_host)


def prefix_cache(host: Host, window: Tensor, position: int):
    """Return transformers' cache after the first `position` tokens of window [1, T]."""
    return host.model(input_ids=window[:, :position], use_cache=True).past_key_values


def logits_after(host: Host, prefix, window: Tensor, position: int, layer: int, head: int, delta, steps: int) -> Tensor:
    """Return the logits [vocabulary] of transformers' model `steps` tokens after a write at `position`, to
    which delta [d_k, d_v] was added in the cache of one head."""
    cache = copy.deepcopy(prefix)
    host.model(input_ids=window[:, position : position + 1], past_key_values=cache, use_cache=True)
    cache.layers[layer].recurrent_states[0][0, head] += delta
    later = window[:, position + 1 : position + 1 + steps]
    return host.model(input_ids=later, past_key_values=cache, use_cache=True).logits[0, -1]


@torch.no_grad()
def plain(host: Host, tokens: Tensor, rows, positions, layer: int, head: int, deltas: Tensor) -> Tensor:
    """Return the KLs [firings, conditions] of the next token under deltas [firings, conditions, d_k, d_v],
    one at a time."""
    found = []
    for row, position, changes in zip(rows.tolist(), positions.tolist(), deltas, strict=True):
        window = tokens[row : row + 1]
        where = host, prefix_cache(host, window, position), window, position, layer, head
        native = logits_after(*where, torch.zeros_like(changes[0]), 1)
        found.append(torch.stack([kl(native, logits_after(*where, change, 1)) for change in changes]))
    return torch.stack(found)


@torch.no_grad()
def batched(host: Host, tokens: Tensor, rows, positions, layer: int, head: int, left: Tensor, right: Tensor) -> Tensor:
    """Return the same for terms left [firings, conditions, r, d_k], right [firings, conditions, r, d_v], all
    at once."""
    run, count = host.run(tokens), left.shape[1]
    where = rows.repeat_interleave(count), positions.repeat_interleave(count)
    edit = make_edit(*where, left.flatten(0, 1), right.flatten(0, 1), "cache")
    patched = host.unembed(edited_hidden(host, run, layer, head, edit, 2)[:, -1]).unflatten(0, (-1, count))
    return kl(host.unembed(run.final[rows, positions + 1])[:, None], patched)


def terms(host: Host, tokens: Tensor, rows, positions, layer: int, head: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` conditions as rank-2 terms: left [firings, count, 2, d_k], right [firings, count, 2, d_v]. The
    first puts nothing in, the others a random direction with twice the norm of the write that is taken
    out."""
    generator, n = torch.Generator().manual_seed(1), len(rows)
    factors = host.factors(host.run(tokens, upto=layer + 1), layer, head)
    key, value = factors.key[rows, positions], factors.added[rows, positions]
    unit = torch.nn.functional.normalize
    left, right = (unit(torch.randn(n, count, d, generator=generator), dim=-1).to(key) for d in (host.d_k, host.d_v))
    right = right * 2 * (key.norm(dim=-1) * value.norm(dim=-1))[:, None, None]
    right[:, 0] = 0
    taken = [x[:, None].expand(-1, count, -1) for x in (key, -value)]
    return torch.stack([taken[0], left], 2), torch.stack([taken[1], right], 2)


def problem(host: Host, depth: str, windows: int, length: int, firings: int, conditions: int) -> tuple:
    """(tokens, rows, positions, layer, head, left, right): random windows, firings spread over them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(host.vocabulary, (windows, length), generator=generator).to(host.device)
    rows = (torch.arange(firings) % windows).to(host.device)
    positions = torch.randint(length // 16, length - 2, (firings,), generator=generator).to(host.device)
    layer = host.recurrent_layers[1 if depth == "early" else -2]
    return tokens, rows, positions, layer, 0, *terms(host, tokens, rows, positions, layer, 0, conditions)


def case(way: str, depth: str, dtype: torch.dtype = torch.float32, **size: int) -> Callable[[], Tensor]:
    """Return one of the ways, "batched" or "plain", ready to run."""
    host = load(FOLDER, None, dtype)
    *where, left, right = problem(host, depth, **size)
    if way == "batched":
        return lambda: batched(host, *where, left, right)
    return lambda: plain(host, *where, left.mT @ right)


def same_kls(depth: str, size: dict[str, int], results: dict[str, Tensor]) -> dict[str, float]:
    """Return the difference of the two ways' KLs in fp32 and fp64. Raises AssertionError where it exceeds
    TOLERANCE in fp64."""
    ours, wanted = (case(way, depth, torch.float64, **size)() for way in ("batched", "plain"))
    found = dict(difference=apart(results["batched"], results["plain"]), difference_fp64=apart(ours, wanted))
    assert found["difference_fp64"] < TOLERANCE, f"the two ways do not do the same edit: {found}"
    large = wanted > LEAST_KL
    found["largest_difference_fp64"] = ((ours - wanted) / wanted)[large].abs().max().item() if large.any() else None
    return found | dict(median_kl=wanted.median().item())


def apart(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    return ((got - wanted).norm() / wanted.norm()).item()


def comparisons(quick: bool) -> list[Comparison]:
    three = dict(windows=4, length=256, firings=48, conditions=3)
    asked = [("early", three), ("late", three), ("late", three | dict(windows=2, firings=24, conditions=16))]
    if quick:
        asked = [("late", dict(windows=2, length=64, firings=4, conditions=3))]
    found = []
    for depth, size in asked:
        cases = [Case(way, partial(case, way, depth, **size), size["firings"]) for way in ("batched", "plain")]
        labels = dict(unit="firing", depth=depth, **size)
        found.append(Comparison(labels, cases, partial(same_kls, depth, size), rounds=3))
    return found


if __name__ == "__main__":
    main("replacement", comparisons)
