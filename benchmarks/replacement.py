"""Replace writes in batches or one firing at a time: `python benchmarks/replacement.py`.

A firing has a window, a position and several conditions. In each condition the native write is removed and a
rank-1 matrix, or nothing, takes its place. The paper has three conditions; page 05 has about sixteen (eight,
at two amplitudes). One SAE of the middle cell has about twelve firings per window in the profile `mini`.

- plain: transformers' whole model. It runs the prefix once per firing. For each condition, and once without
  an edit, it copies the cache, runs the writing token, edits the cached state and runs the next token.
- batched: this project's edited runs, all firings and conditions in one batch. Its time includes the native
  run.

In both, tokens read the edit from the next token on (scope "cache"). Both must give the same KLs. Small KLs
are differences of nearly equal logits, and transformers uses fp32 in places whatever the dtype of the model.
Therefore `difference` is over all KLs together (norm of the difference over the norm), and the largest
difference of a single KL is taken over KLs above MIN_KL.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from common import Case, Comparison, main, must_agree
from torch import Tensor

from replication.study.paths import ROOT
from writesae.edit import edited_hidden, kl, make_edit
from writesae.hosts.base import Host
from writesae.hosts.load import load_host

FOLDER = ROOT / "models" / "gated_deltanet"
TOLERANCE = 1e-4
MIN_KL = 1e-5  # nats
load = lru_cache(load_host)


def prefix_cache(host: Host, window: Tensor, position: int):
    """Return transformers' cache after the first `position` tokens of `window` [1, T]."""
    return host.model(input_ids=window[:, :position].to(host.device), use_cache=True).past_key_values


def logits_after(
    host: Host, prefix, window: Tensor, position: int, layer: int, head: int, delta: Tensor, steps: int
) -> Tensor:
    """Return the logits [vocabulary] of transformers' model `steps` tokens after the write at `position`.

    delta [d_k, d_v] is added to the cached state of one head right after the write."""
    cache, window = copy.deepcopy(prefix), window.to(host.device)
    host.model(input_ids=window[:, position : position + 1], past_key_values=cache, use_cache=True)
    cache.layers[layer].recurrent_states[0][0, head] += delta.to(host.device)
    later = window[:, position + 1 : position + 1 + steps]
    return host.model(input_ids=later, past_key_values=cache, use_cache=True).logits[0, -1]


@torch.no_grad()
def plain(host: Host, tokens: Tensor, rows, positions, layer: int, head: int, deltas: Tensor) -> Tensor:
    """Return the KLs [firings, conditions] at the next token, one condition at a time.

    deltas [firings, conditions, d_k, d_v] are the changes of the state."""
    kls = []
    for row, position, changes in zip(rows.tolist(), positions.tolist(), deltas, strict=True):
        window = tokens[row : row + 1]
        where = host, prefix_cache(host, window, position), window, position, layer, head
        native = logits_after(*where, torch.zeros_like(changes[0]), 1)
        kls.append(torch.stack([kl(native, logits_after(*where, change, 1)) for change in changes]))
    return torch.stack(kls)


@torch.no_grad()
def batched(host: Host, tokens: Tensor, rows, positions, layer: int, head: int, left: Tensor, right: Tensor) -> Tensor:
    """Return the same KLs from edited runs, all conditions in one batch.

    The changes are rank-r terms: left [firings, conditions, r, d_k], right [firings, conditions, r, d_v]."""
    run, count = host.run(tokens), left.shape[1]
    where = rows.repeat_interleave(count), positions.repeat_interleave(count)
    edit = make_edit(*where, left.flatten(0, 1), right.flatten(0, 1), "cache")
    patched = host.unembed(edited_hidden(host, run, layer, head, edit, 2)[:, -1]).unflatten(0, (-1, count))
    return kl(host.unembed(run.final[rows, positions + 1])[:, None], patched)


def terms(host: Host, tokens: Tensor, rows, positions, layer: int, head: int, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` conditions as terms left [firings, count, 2, d_k], right [firings, count, 2, d_v].

    The first only removes the native write. The others also add a random write of twice its norm."""
    generator, n = torch.Generator().manual_seed(1), len(rows)
    factors = host.factors(host.run(tokens, upto=layer + 1), layer, head)
    key, value = factors.key[rows, positions], factors.added[rows, positions]
    unit = torch.nn.functional.normalize
    left, right = (unit(torch.randn(n, count, d, generator=generator), dim=-1).to(key) for d in (host.d_k, host.d_v))
    right = right * 2 * (key.norm(dim=-1) * value.norm(dim=-1))[:, None, None]
    right[:, 0] = 0
    removed_key, removed_value = (x[:, None].expand(-1, count, -1) for x in (key, -value))
    return torch.stack([removed_key, left], 2), torch.stack([removed_value, right], 2)


def problem(host: Host, depth: str, windows: int, length: int, firings: int, conditions: int) -> tuple:
    """Return (tokens, rows, positions, layer, head, left, right): firings spread over random windows."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(host.vocabulary, (windows, length), generator=generator)
    rows = torch.arange(firings) % windows
    positions = torch.randint(length // 16, length - 2, (firings,), generator=generator)
    layer = host.recurrent_layers[1 if depth == "early" else -2]
    return tokens, rows, positions, layer, 0, *terms(host, tokens, rows, positions, layer, 0, conditions)


def ready(host: Host, way: str, depth: str, **size: int) -> Callable[[], Tensor]:
    """Return the replacement of one way, "batched" or "plain", as a function without arguments."""
    *where, left, right = problem(host, depth, **size)
    if way == "batched":
        return partial(batched, host, *where, left, right)
    return partial(plain, host, *where, left.mT @ right)


def case(way: str, depth: str, dtype: torch.dtype = torch.float32, **size: int) -> Callable[[], Tensor]:
    """Return the same for the embedded host."""
    return ready(load(FOLDER, None, dtype), way, depth, **size)


def same_kls(depth: str, size: dict[str, int], results: dict[str, Tensor]) -> dict[str, float]:
    """Return the differences between batched and plain KLs, in fp32 and fp64.

    Raises ValueError if the difference in fp64 exceeds TOLERANCE."""
    batched_kls, plain_kls = (case(way, depth, torch.float64, **size)() for way in ("batched", "plain"))
    in_fp32, in_fp64 = apart(results["batched"], results["plain"]), apart(batched_kls, plain_kls)
    must_agree(in_fp64, TOLERANCE, "Batched and plain KLs differ in fp64: the edits are not the same")
    large = plain_kls > MIN_KL
    relative = ((batched_kls - plain_kls) / plain_kls)[large].abs()
    largest = relative.max().item() if large.any() else None
    columns = dict(difference=in_fp32, difference_fp64=in_fp64, largest_difference_fp64=largest)
    return columns | dict(median_kl=plain_kls.median().item())


def apart(got: Tensor, wanted: Tensor) -> float:
    """Return ||got - wanted|| / ||wanted||."""
    return ((got - wanted).norm() / wanted.norm()).item()


def comparisons(quick: bool) -> list[Comparison]:
    three = dict(windows=4, length=256, firings=48, conditions=3)
    sizes = [("early", three), ("late", three), ("late", three | dict(windows=2, firings=24, conditions=16))]
    if quick:
        sizes = [("late", dict(windows=2, length=64, firings=4, conditions=3))]
    planned = []
    for depth, size in sizes:
        cases = [Case(way, partial(case, way, depth, **size), size["firings"]) for way in ("batched", "plain")]
        labels = dict(unit="firing", depth=depth, **size)
        planned.append(Comparison(labels, cases, partial(same_kls, depth, size), rounds=3))
    return planned


if __name__ == "__main__":
    main("replacement", comparisons)
