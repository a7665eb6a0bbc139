"""Factors of a cell from an activation cache of TransformerLens 4, for edits, SAEs and attribution here.

    bridge = TransformerBridge.boot_transformers(name)
    _, cache = bridge.run_with_cache(tokens, use_cache=False)   # with a cache of states the inner hooks do not fire
    factors = factors_from_cache(bridge, cache, layer, head)

| class          | hooks of blocks.LAYER                               | note                               |
|----------------|-----------------------------------------------------|------------------------------------|
| Gated DeltaNet | linear_attn.hook_q, _k, _v, _beta, _log_decay       | q and k are before their L2 norm   |
| Mamba-2        | mixer.in_proj.hook_out, mixer.conv1d.hook_out       | the convolution is before its SiLU |

For Mamba-2, set `bridge.blocks[layer].mixer.eager_scan = True`: without it recent versions of transformers do
not call the convolution's module, and its hook stays silent. The package itself is not imported: a cache is
any mapping from these names to tensors (docs/bridges.md fills one with nnsight).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.layers import unit, wide
from writesae.recurrence import Factors, torch_defaults

DELTA = ("q", "k", "v", "beta", "log_decay")
MAMBA = ("mixer.in_proj.hook_out", "mixer.conv1d.hook_out")


@torch_defaults()
def factors_from_cache(bridge: Any, cache: Mapping[str, Tensor], layer: int, head: int) -> Factors:
    """Return the factors of a cell over the cached [B, T], in fp32 or better, on the CPU.

    bridge: the TransformerBridge; only a Mamba-2 cache needs it, for the mixer's parameters. Raises
    ValueError for a cache without the hooks of this layer, and for a head that it does not have.
    """
    prefix = f"blocks.{layer}."
    delta = {name: f"{prefix}linear_attn.hook_{name}" for name in DELTA}
    if all(name in cache for name in delta.values()):
        return _delta_net(*(wide(cache[name]).cpu() for name in delta.values()), head)
    if all(prefix + name in cache for name in MAMBA):
        projected, mixed = (wide(cache[prefix + name]).cpu() for name in MAMBA)
        return _mamba2(bridge.blocks[layer].mixer, projected, mixed, head)
    both = f"{', '.join(delta.values())} (Gated DeltaNet) or {', '.join(prefix + name for name in MAMBA)} (Mamba-2)"
    remedy = "run_with_cache(tokens, use_cache=False) records them, for Mamba-2 with mixer.eager_scan = True"
    raise ValueError(f"The cache needs {both}: {remedy}.")


def _of_head(x: Tensor, head: int, heads: int) -> Tensor:
    """Return the part [B, T, d] of a head in x [B, T, H_k, d], whose heads serve consecutive ones."""
    if not 0 <= head < heads:
        raise ValueError(f"The cached layer has no head {head}: choose one of 0 to {heads - 1}.")
    return x[:, :, head // (heads // x.shape[2])]


def _delta_net(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, head: int) -> Factors:
    heads = value.shape[2]
    query, key, value, beta, log_decay = (
        _of_head(x, head, heads) for x in (query, key, value, beta[..., None], log_decay[..., None])
    )
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    erase = log_decay.exp() * beta * key
    factors = Factors(query=query, key=key, added=beta * value, log_decay=log_decay, erase=erase, probe=key)
    taken = factors.taken_by_erase()
    return replace(factors, effective=factors.added - log_decay.exp() * beta * taken)


def _mamba2(mixer: Any, projected: Tensor, mixed: Tensor, head: int) -> Factors:
    """Return the factors for outputs of in_proj [B, T, C] and of conv1d [B, C, T + kernel - 1]."""
    heads, groups, width = mixer.num_heads, mixer.n_groups, mixer.n_groups * mixer.ssm_state_size
    mixed = F.silu(mixed[..., : projected.shape[1]]).mT
    value, key, query = mixed.split([mixed.shape[-1] - 2 * width, width, width], -1)
    value = _of_head(value.unflatten(-1, (heads, -1)), head, heads)
    query, key = (_of_head(x.unflatten(-1, (groups, -1)), head, heads) for x in (query, key))
    bias, log_a = (wide(x.detach()).cpu()[head] for x in (mixer.dt_bias, mixer.A_log))
    step = F.softplus(projected[..., -heads:][..., head, None] + bias).clamp(*mixer.time_step_limit)
    added = step * value
    return Factors(query=query, key=key, added=added, effective=added, log_decay=-log_a.exp() * step)
