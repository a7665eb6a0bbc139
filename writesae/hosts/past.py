"""What a native run keeps of a layer (`Record`), and what an edited run starts from (`Past`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from writesae.recurrence import Groups


@dataclass
class Record:
    """What one layer computed in a run over tokens [B, T]: enough to start again at any position.

    hidden [B, T, D]: the layer's input. outputs [B, T, heads, d]: of the heads. beside: what else
    `Host.finish` needs, each [B, T, ...]. Recurrent layers have factors, each [B, T, ...] (RWKV-7 also
    "before" [B, H, chunks, d_k, d_v]), and the last state end [B, H, d_k, d_v]; layers with attention have
    keys and values [B, H_kv, T, d]; hybrid layers have both, layers that only mix channels neither. windows:
    the inputs of short convolutions and token shifts, name -> ([B, T, C], number of positions looked back).
    kept: the places of the last `Host.past_at`, and the states or prefixes there, for the next run there."""

    hidden: Tensor
    outputs: Tensor
    factors: dict[str, Tensor] = field(default_factory=dict)
    end: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    windows: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    kept: tuple[Tensor, tuple[Tensor, ...]] | None = None


@dataclass
class Prefix:
    """The keys and values before each of R rows.

    keys, values [U, H_kv, L, d]: of U distinct prefixes, which rows share by `groups`; seen [U, L]: which of
    them exist. own_keys, own_values [R, H_kv, M, d]: those that each row has added since.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    groups: Groups
    own_keys: Tensor | None = None
    own_values: Tensor | None = None

    def with_own(self, keys: Tensor, values: Tensor) -> Prefix:
        """Return this prefix with further keys and values [R, H_kv, T, d] of the rows."""
        if self.own_keys is not None:
            keys, values = torch.cat([self.own_keys, keys], 2), torch.cat([self.own_values, values], 2)
        return replace(self, own_keys=keys, own_values=values)


def attend(query: Tensor, prefix: Prefix, scale: float) -> Tensor:
    """Return the causal attention [R, H, T, d] of queries to the shared prefixes and the rows' own keys.

    The last T own keys are those of the queries. Prefixes are not copied per row.
    """
    steps, own, groups = query.shape[2], prefix.own_keys.shape[2], prefix.groups
    key_heads = prefix.keys.shape[1]
    stacked = (query * scale).unflatten(1, (key_heads, -1)).flatten(2, 3)  # [R, H_kv, H / H_kv * T, d]
    unseen = ~prefix.seen[groups.which][:, None, None]
    to_prefix = groups.read(stacked, prefix.keys.mT).masked_fill(unseen, -torch.inf)
    later = torch.ones(steps, own, dtype=torch.bool, device=query.device).triu(own - steps + 1)
    to_own = (stacked @ prefix.own_keys.mT).unflatten(2, (-1, steps))
    to_own = to_own.masked_fill(later, -torch.inf).flatten(2, 3)
    weights = torch.cat([to_prefix, to_own], -1).softmax(-1)
    on_prefix, on_own = weights.split([to_prefix.shape[-1], own], -1)
    read = groups.read(on_prefix, prefix.values) + on_own @ prefix.own_values
    return read.unflatten(2, (-1, steps)).flatten(1, 2)


@dataclass
class Past:
    """What a layer needs of earlier tokens, per row: a state, a prefix of keys and values, or both.

    states: one per row [R, H, d_k, d_v], or [U, H, d_k, d_v], which rows share by `groups`. windows: the last
    inputs of short convolutions and token shifts, [R, reach, C]. last: skip computing the final state.
    """

    states: Tensor | None = None
    groups: Groups | None = None
    prefix: Prefix | None = None
    windows: dict[str, Tensor] = field(default_factory=dict)
    last: bool = False

    @property
    def state(self) -> Tensor:
        """The state of each row, [R, H, d_k, d_v]; shared states are copied."""
        return self.states if self.groups is None else self.states[self.groups.which]


def extend(past: Past, record: Record) -> Past:
    """Return the Past after the tokens of `record`, which follow those of `past`."""
    longer = Past(record.end)
    if record.keys is not None:
        longer.prefix = past.prefix.with_own(record.keys, record.values)
    for name, (inputs, reach) in record.windows.items():
        longer.windows[name] = torch.cat([past.windows[name], inputs], 1)[:, -reach:]
    return longer
