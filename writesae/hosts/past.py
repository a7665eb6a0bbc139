"""What a layer remembers: the record of a native run, and the past that an edited run starts from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from writesae.recurrence import Groups


@dataclass
class Record:
    """What one layer did in a native run over [B, T] tokens; enough to start again anywhere in it.

    hidden: [B, T, D] the layer's input; outputs: [B, T, heads, d] and whatever `finish` takes beside them
    (beside, each [B, T, ...]). A recurrent layer has the family's own factors, each [B, T, ...], and end, the
    last state [B, H, d_k, d_v]; an attention layer has keys, values [B, H_kv, T, d]. windows: inputs of short
    convolutions and token shifts (name -> ([B, T, C], how many positions back they reach)), of `mix` and of
    `finish`.
    """

    hidden: torch.Tensor
    outputs: torch.Tensor
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    end: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    windows: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    beside: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Prefix:
    """Keys and values before each of R rows: those of U distinct prefixes, [U, H_kv, L, d] with `seen` [U,
    L], which the rows share, and those that each row has added since, own_keys and own_values [R, H_kv, M,
    d]."""

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor
    groups: Groups
    own_keys: torch.Tensor | None = None
    own_values: torch.Tensor | None = None

    def with_own(self, keys: torch.Tensor, values: torch.Tensor) -> Prefix:
        """The same with further keys and values [R, H_kv, T, d] of the rows themselves."""
        if self.own_keys is not None:
            keys, values = torch.cat([self.own_keys, keys], 2), torch.cat([self.own_values, values], 2)
        return replace(self, own_keys=keys, own_values=values)


def attend(query: torch.Tensor, prefix: Prefix, scale: float) -> torch.Tensor:
    """Causal attention [R, H, T, d] of queries [R, H, T, d] to shared prefixes and to the rows' own keys,
    whose last T are those of the queries. No prefix is copied row by row."""
    steps, own, groups = query.shape[2], prefix.own_keys.shape[2], prefix.groups
    stacked = (
        (query * scale).unflatten(1, (prefix.keys.shape[1], -1)).flatten(2, 3)
    )  # [R, H_kv, heads of a group * T, d]
    unseen = ~prefix.seen[groups.which][:, None, None]
    to_prefix = groups.read(stacked, prefix.keys.mT).masked_fill(unseen, -torch.inf)
    later = torch.ones(steps, own, dtype=torch.bool, device=query.device).triu(own - steps + 1)
    to_own = (stacked @ prefix.own_keys.mT).unflatten(2, (-1, steps)).masked_fill(later, -torch.inf).flatten(2, 3)
    weight = torch.cat([to_prefix, to_own], -1).softmax(-1)
    on_prefix, on_own = weight.split([to_prefix.shape[-1], own], -1)
    read = groups.read(on_prefix, prefix.values) + on_own @ prefix.own_values
    return read.unflatten(2, (-1, steps)).flatten(1, 2)


@dataclass
class SharedState:
    """States [U, H, d_k, d_v] before each of R rows, which rows share."""

    states: torch.Tensor
    groups: Groups


@dataclass
class Past:
    """What a layer needs of the tokens before, row by row: a state, or a Prefix, and the last inputs [R,
    reach, C] of short convolutions and token shifts. `last`: no tokens come after these, so that no end state
    is asked for."""

    own_state: torch.Tensor | None = None
    shared: SharedState | None = None
    prefix: Prefix | None = None
    windows: dict[str, torch.Tensor] = field(default_factory=dict)
    last: bool = False

    @property
    def state(self) -> torch.Tensor:
        """[R, H, d_k, d_v]: the rows' own, or each row's copy of the one it shares."""
        return self.shared.states[self.shared.groups.which] if self.own_state is None else self.own_state


def extend(past: Past, record: Record) -> Past:
    """What the layer needs after the tokens of `record`, which themselves came after `past`."""
    longer = Past(own_state=record.end)
    if record.keys is not None:
        longer.prefix = past.prefix.with_own(record.keys, record.values)
    for name, (inputs, reach) in record.windows.items():
        longer.windows[name] = torch.cat([past.windows[name], inputs], 1)[:, -reach:]
    return longer
