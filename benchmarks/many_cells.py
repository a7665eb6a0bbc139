"""Writes in every recurrent cell at once: `python benchmarks/many_cells.py`.

Trials write a small random matrix into every cell at one token, and read the logits some tokens later.

- edited: `run_edited` with {(layer, head): edit}, all trials in one batch, native run included;
- plain: transformers' whole model, one trial at a time: a copy of the cache of the prefix, whose states are
  edited after the writing token.

Tokens read the edit from the next token on (scope "cache"). Both must give the same logits in fp64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from common import Case, Comparison, main, must_agree
from replacement import FOLDER, apart, load, prefix_cache
from torch import Tensor

from writesae.edit import make_edit, run_edited
from writesae.hosts.base import Host

TOLERANCE = 1e-6
SIZE = 0.1  # norm of each written matrix


def sides(host: Host, trials: int) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Return the matrices of every cell: key [trials, d_k], value [trials, d_v]."""
    generator, dtype = torch.Generator().manual_seed(0), host.model.dtype
    made = {}
    for cell in ((layer, head) for layer in host.recurrent_layers for head in range(host.heads)):
        key, value = (torch.randn(trials, d, generator=generator).to(dtype) for d in (host.d_k, host.d_v))
        unit = torch.nn.functional.normalize
        made[cell] = unit(key, dim=-1), SIZE * unit(value, dim=-1)
    return made


def edited(host: Host, tokens: Tensor, position: int, trials: int, steps: int) -> Tensor:
    """Return the logits [trials, V] after `steps` tokens."""
    rows = torch.zeros(trials, dtype=torch.int64)
    edits = {
        cell: make_edit(rows, rows + position, key[:, None], value[:, None], "cache")
        for cell, (key, value) in sides(host, trials).items()
    }
    return run_edited(host, tokens, edits, steps=steps + 1)[:, -1]


@torch.no_grad()
def plain(host: Host, tokens: Tensor, position: int, trials: int, steps: int) -> Tensor:
    """Return the same logits from transformers' model."""
    prefix, made, logits = prefix_cache(host, tokens, position), sides(host, trials), []
    tokens = tokens.to(host.device)
    for trial in range(trials):
        cache = copy.deepcopy(prefix)
        host.model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        for (layer, head), (key, value) in made.items():
            write = key[trial, :, None] * value[trial]
            cache.layers[layer].recurrent_states[0][0, head] += write.to(host.device)
        later = tokens[:, position + 1 : position + 1 + steps]
        logits.append(host.model(input_ids=later, past_key_values=cache, use_cache=True).logits[0, -1].float())
    return torch.stack(logits)


def ready(host: Host, way: str, length: int, **size: int) -> Callable[[], Tensor]:
    """Return one of the ways as a function without arguments."""
    tokens = torch.randint(host.vocabulary, (1, length), generator=torch.Generator().manual_seed(1))
    position = length - size["steps"] - 1
    return partial({"edited": edited, "plain": plain}[way], host, tokens, position, **size)


def case(way: str, dtype: torch.dtype = torch.float32, **size: int) -> Callable[[], Tensor]:
    """Return the same for the embedded host."""
    return ready(load(FOLDER, None, dtype), way, **size)


def same_logits(size: dict[str, int], results: dict[str, Tensor]) -> dict[str, float]:
    """Return the differences of the logits in fp32 and fp64. Raises ValueError if the latter is large."""
    in_fp64 = apart(*(case(way, dtype=torch.float64, **size)() for way in ("edited", "plain")))
    must_agree(in_fp64, TOLERANCE, "The logits differ in fp64: the edits are not the same")
    return dict(difference=apart(*results.values()), difference_fp64=in_fp64)


def comparisons(quick: bool) -> list[Comparison]:
    size = dict(length=24, trials=3, steps=2) if quick else dict(length=128, trials=64, steps=4)
    cases = [Case(way, partial(case, way, **size), size["trials"]) for way in ("edited", "plain")]
    return [Comparison(dict(unit="trial", **size), cases, partial(same_logits, size), rounds=3)]


if __name__ == "__main__":
    main("many_cells", comparisons)
