"""The recurrence: S_t = A_t S_{t-1} + key_t added_t^T with A_t = diag(decay_t) - erase_t probe_t^T.

Symbols of the paper (Sec. 2, Eq. 2-3) for one cell; S is always [d_k, d_v] and o_t = S_t^T q_t:

| here        | Gated DeltaNet                          |
|-------------|-----------------------------------------|
| query       | q_t, unit norm times d_k^-0.5           |
| key         | k_t, unit norm                          |
| added       | beta_t v_t: the write is key added^T    |
| effective   | u_t = beta_t (v_t - alpha_t S_{t-1}^T k_t): S_t = alpha_t S_{t-1} + k_t u_t^T |
| log_decay   | log alpha_t, one number per token       |
| erase, probe| alpha_t beta_t k_t and k_t; with vector decays (KDA) beta_t k_t and alpha_t * k_t |
| taken       | S_{t-1}^T probe_t, what the erase finds |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from writesae.history import History, Origin

LOWEST = -60.0  # smallest log decay of a channel over a chunk for which exp(-log decay) is computed
ERASE_CHUNK = 32


@contextmanager
def torch_defaults(gradients: bool = False) -> Iterator[None]:
    """Run with torch's own defaults (fp32 on the CPU, no autocast), and with or without gradients.

    Also a decorator of functions: their results do not depend on what the caller has set globally.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield


class Groups:
    """R rows that share `count` states: row r has state which[r], int64 [R]."""

    def __init__(self, which: Tensor, count: int):
        same = which[:, None] == torch.arange(count, device=which.device)
        place = same.cumsum(0).gather(1, which[:, None])[:, 0] - 1
        self.which, self.count, self.place, self.largest = which, count, place, int(place.max()) + 1

    def read(self, x: Tensor, shared: Tensor) -> Tensor:
        """Return x[r] @ shared[which[r]], [R, H, L, e], for x [R, H, L, d] and shared [count, H, d, e]."""
        rows, heads, length, width = x.shape
        side = x.new_zeros(self.count, self.largest, *x.shape[1:]).index_put((self.which, self.place), x)
        products = side.transpose(1, 2).reshape(self.count, heads, self.largest * length, width) @ shared
        return products.view(self.count, heads, self.largest, length, -1)[self.which, :, self.place]


class TensorFields:
    """A dataclass with tensors among its fields."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        return replace(self, **{name: change(x) for name, x in self.tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on a device."""
        return self.map(lambda x: x.to(device))


@dataclass
class Factors(TensorFields):
    """The rank-1 write and the transition of a cell at every token, from a run or a harvest.

    query, key, erase, probe [B, T, d_k]; added, effective, taken [B, T, d_v]; log_decay [B, T, 1], or [B, T,
    d_k] for vector decays. None in a run: taken; effective for RWKV-7; erase and probe for Mamba-2. None in a
    harvest: query and probe; erase and taken for scalar decays; effective for vector decays but KDA's.
    origin: the cell of a harvest, else None.
    """

    query: Tensor | None
    key: Tensor
    added: Tensor
    log_decay: Tensor
    effective: Tensor | None = None
    erase: Tensor | None = None
    probe: Tensor | None = None
    taken: Tensor | None = None
    origin: Origin | None = None

    def at(self, *index) -> Factors:
        """Return the factors at an index of the leading dimensions, e.g. `.at(rows, positions)`."""
        return self.map(lambda x: x[index])

    def write(self, definition: str) -> Tensor:
        """Return the value side [B, T, d_v] of the native write: "added", or "effective" (minus the erase).

        Raises ValueError for another name, and for an effective write of higher rank or not harvested.
        """
        values = {name: x for name, x in self.tensors().items() if name in ("added", "effective")}
        if definition not in values:
            raise ValueError(f"There is no rank-1 write {definition!r}: choose {' or '.join(values)}.")
        return values[definition]

    def history(self, target: str, write: str = "added", origin: Origin | None = None) -> History:
        """Return the training data of an SAE: the "state", or the native "write" by that definition.

        origin: the cell, by default that of these factors. Raises ValueError for another target or write, and
        for values that are not finite.
        """
        from writesae.history import History, VectorHistory  # imports this module

        origin = origin or (self.origin and self.origin._replace(write=write))
        if target == "write":
            return History(self.key, self.write(write), None, origin=origin)
        if target != "state":
            raise ValueError(f"There is no training target {target!r}: choose state or write.")
        if self.log_decay.shape[-1] == 1 and self.effective is not None:
            return History(self.key, self.effective, self.log_decay[..., 0], origin=origin)
        taken = self.taken_by_erase() if self.taken is None else self.taken
        return VectorHistory(self.key, self.added, self.log_decay, self.erase, taken, origin=origin)

    def refuse_harvest(self) -> None:
        """Raise ValueError for the factors of a harvest, which lack queries and transitions."""
        if self.query is None:
            raise ValueError("A harvest has no queries and no whole transitions: take Host.factors of a run.")

    def transition(self, x: Tensor) -> Tensor:
        """Return A_t x, for factors of single positions [R, d] and x [R, r, d_k]."""
        self.refuse_harvest()
        moved = self.log_decay.exp()[:, None] * x
        if self.erase is not None:
            moved = moved - (x @ self.probe[:, :, None]) * self.erase[:, None]
        return moved

    def transition_transposed(self, y: Tensor) -> Tensor:
        """Return A_t^T Y, for factors of single positions [R, d] and Y [R, d_k, d_v]."""
        self.refuse_harvest()
        moved = self.log_decay.exp()[:, :, None] * y
        if self.erase is not None:
            moved = moved - self.probe[:, :, None] * (self.erase[:, None] @ y)
        return moved

    def walk(self, state: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield S_t [B, d_k, d_v] and S_{t-1}^T probe_t [B, 1, d_v] (None without erase) token by token."""
        self.refuse_harvest()
        if state is None:
            state = self.key.new_zeros(len(self.key), self.key.shape[-1], self.added.shape[-1])
        for t in range(self.key.shape[1]):
            now, before, taken = self.at(slice(None), t), state, None
            state = now.log_decay.exp()[:, :, None] * before + now.key[:, :, None] * now.added[:, None]
            if now.erase is not None:
                taken = now.probe[:, None] @ before
                state = state - now.erase[:, :, None] * taken
            yield state, taken

    def taken_by_erase(self) -> Tensor:
        """Return the value side of each erase, S_{t-1}^T probe_t [B, T, d_v].

        It is the read of a query at t - 1 that equals the probe at t. Fast decays take a loop over tokens."""
        if ERASE_CHUNK * self.log_decay.min() < LOWEST:
            return torch.cat([taken for _, taken in self.walk()], 1)
        sides = self.probe.roll(-1, 1), self.key, self.added, self.log_decay.expand_as(self.key)
        reads, *_ = diagonal_delta_chunks(*sides, self.erase, self.probe, chunk=ERASE_CHUNK, end=False)
        return F.pad(reads[:, :-1], (0, 0, 1, 0))


def step_states(factors: Factors, state: Tensor | None = None) -> Tensor:
    """Return all states [B, T, d_k, d_v] by a slow loop (the reference). state [B, d_k, d_v]: before."""
    return torch.stack([now for now, _ in factors.walk(state)], 1)


def split_chunks(x: Tensor, chunk: int, axis: int = -2) -> Tensor:
    """Split time, at a negative axis, into zero-padded chunks: [..., T, ...] -> [..., C, chunk, ...]."""
    pad = -x.shape[axis] % chunk
    x = F.pad(x, [0, 0] * (-axis - 1) + [0, pad]) if pad else x
    return x.unflatten(axis, (-1, chunk))


def decay_between(total: Tensor, dtype: torch.dtype, axis: int = -1) -> Tensor:
    """Return exp(total_t - total_s) from token s to token t of a chunk, [..., t, s, ...]; 0 where s > t.

    total: log decays summed since the chunk began; time at a negative axis. dtype: of the result.
    """
    tokens = total.shape[axis]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=total.device).triu(1)
    later = later[(...,) + (None,) * (-axis - 1)]
    between = total.unsqueeze(axis) - total.unsqueeze(axis - 1)
    return between.to(dtype).masked_fill(later, -torch.inf).exp()


def _read(x: Tensor, state: Tensor, groups: Groups | None) -> Tensor:
    return x @ state if groups is None else groups.read(x, state)


def _each(state: Tensor, groups: Groups | None) -> Tensor:
    return state if groups is None else state[groups.which]


def _decayed_products(query: Tensor, key: Tensor, within: Tensor) -> Iterator[Tensor]:
    """Return k_t . D_ts k_s and q_t . D_ts k_s, each [..., C, t, s]; D_ts: the decays from token s to t.

    query, key [..., C, L, d_k]; within [..., C, L, d_k]: log decays since the chunk began. Decays between
    tokens are computed directly, so any decay is allowed. One chunk at a time takes L^2 d_k numbers.
    """
    products = []
    for q, k, total in zip(query.unbind(-3), key.unbind(-3), within.unbind(-3), strict=True):
        decayed = decay_between(total, k.dtype, -2) * k[..., None, :, :]  # [..., t, s, d_k]
        products.append(decayed @ torch.stack([k, q], -1))
    return torch.stack(products, -4).unbind(-1)


def gated_delta_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
    groups: Groups | None = None,
    end: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gated delta rule by chunks; return outputs, effective writes u and the last state.

    query, key [..., T, d_k] (keys of unit norm, queries scaled); value [..., T, d_v]; beta [..., T];
    log_decay [..., T], or [..., T, d_k] for vector decays (KDA). state [..., d_k, d_v]: the initial one; with
    `groups` the shared ones, [U, H, d_k, d_v]. Without `end` there is no last state. With D_ts, the decay
    from token s to token t: (I + tril(beta_t (k_t . D_ts k_s), -1)) u = beta (v - read of the state).
    """
    length, d_k, d_v, vector = key.shape[-2], key.shape[-1], value.shape[-1], log_decay.ndim == key.ndim
    chunk = min(chunk, length)
    query, key, value = (split_chunks(x, chunk) for x in (query, key, value))
    beta, chunks, time = split_chunks(beta, chunk, -1)[..., None], key.shape[-3], -2 if vector else -1
    within = split_chunks(log_decay, chunk, time).cumsum(time)
    if vector:
        of_keys, attention = _decayed_products(query, key, within)
        system = beta * of_keys
    else:
        decay = decay_between(within, key.dtype)
        system, attention = beta * decay * (key @ key.mT), decay * (query @ key.mT)
        within = within[..., None]
    system = system.tril(-1) + torch.eye(chunk, dtype=key.dtype, device=key.device)
    from_start, last = within.exp(), within[..., -1:, :]
    right = beta * torch.cat([value, from_start * key], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_state = solved.split([d_v, d_k], -1)
    query, to_end, whole = query * from_start, key * (last - within).exp(), last.mT.exp()
    if state is None:
        state = key.new_zeros(*key.shape[:-3], d_k, d_v)
    outputs, writes = [], []
    for c in range(chunks):
        read = _read(torch.cat([of_state[..., c, :, :], query[..., c, :, :]], -2), state, groups)
        u = own[..., c, :, :] - read[..., :chunk, :]
        outputs.append(read[..., chunk:, :] + attention[..., c, :, :] @ u)
        writes.append(u)
        if end or c < chunks - 1:
            state, groups = whole[..., c, :, :] * _each(state, groups), None
            state.flatten(0, -3).baddbmm_(to_end[..., c, :, :].mT.flatten(0, -3), u.flatten(0, -3))
    outputs, writes = (torch.cat(x, -2)[..., :length, :] for x in (outputs, writes))
    return outputs, writes, state if end else None


def decayed_chunks(
    query: Tensor,
    key: Tensor,
    added: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
    groups: Groups | None = None,
    end: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute S_t = alpha_t S_{t-1} + key_t added_t^T by chunks; return outputs [B, T, H, d_v], last state.

    query, key [B, T, H_k, d_k]: each of the H_k serves H / H_k consecutive heads, as columns of one matrix.
    added [B, T, H, d_v]; log_decay [B, T, H]; state [B, H, d_k, d_v]; groups, end as in `gated_delta_chunks`.
    """
    length, key_heads, d_v = key.shape[1], key.shape[2], added.shape[-1]
    chunk = min(chunk, length)
    query, key, added = (split_chunks(x, chunk, -3) for x in (query, key, added))
    log_decay = split_chunks(log_decay, chunk)
    # query, key [B, C, H_k, chunk, d_k]; added, log_decay [B, C, H_k, chunk, H / H_k, ...]
    added, log_decay = (x.unflatten(3, (key_heads, -1)) for x in (added, log_decay.double()))
    query, key, added, log_decay = (x.transpose(2, 3) for x in (query, key, added, log_decay))
    total = log_decay.cumsum(3)
    attention = decay_between(total.mT, key.dtype) * (query @ key.mT)[:, :, :, None]
    own = (attention @ added.transpose(3, 4)).transpose(3, 4)
    from_start, to_end = (x.to(key.dtype).exp()[..., None] for x in (total, total[..., -1:, :] - total))
    if state is not None:
        state = state.unflatten(1, (key_heads, -1)).transpose(2, 3)  # [B, H_k, d_k, H / H_k, d_v]
    outputs, chunks = [], key.shape[1]
    parts = (x.unbind(1) for x in (query, key, added * to_end, own, from_start))
    for c, (query, key, added, output, passed) in enumerate(zip(*parts, strict=True)):
        if state is not None:
            read = _read(query, state.flatten(-2), groups)
            output = output + passed * read.unflatten(-1, (-1, d_v))
        outputs.append(output)
        if end or c < chunks - 1:
            write = (key.mT @ added.flatten(-2)).unflatten(-1, (-1, d_v))
            if state is not None:
                write = passed[:, :, -1:] * _each(state, groups) + write
            state, groups = write, None
    outputs = torch.stack(outputs, 1).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :length]
    return outputs, state.transpose(2, 3).flatten(1, 2) if end else None


def diagonal_chunks(
    query: Tensor,
    key: Tensor,
    added: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    chunk: int = 16,
    groups: Groups | None = None,
    end: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute S_t = diag(exp(log_decay_t)) S_{t-1} + key_t added_t^T by chunks; return outputs, last state.

    query, key, log_decay [..., T, d_k]; added [..., T, d_v]; state [..., d_k, d_v], groups, end as in
    `gated_delta_chunks`. Decays between tokens of a chunk are computed directly, so any decay is allowed.
    """
    length, d_k, d_v = key.shape[-2], key.shape[-1], added.shape[-1]
    chunk = min(chunk, length)
    query, key, added, log_decay = (split_chunks(x, chunk) for x in (query, key, added, log_decay))
    within, chunks = log_decay.cumsum(-2), key.shape[-3]
    between = decay_between(within, within.dtype, -2)
    attention = ((between * key[..., None, :, :]) @ query[..., None])[..., 0]
    own, last = attention @ added, within[..., -1:, :]
    query, key, whole = query * within.exp(), key * (last - within).exp(), last.mT.exp()
    if state is None:
        state = key.new_zeros(*key.shape[:-3], d_k, d_v)
    outputs = []
    for c in range(chunks):
        outputs.append(own[..., c, :, :] + _read(query[..., c, :, :], state, groups))
        if end or c < chunks - 1:
            write = key[..., c, :, :].mT @ added[..., c, :, :]
            state, groups = whole[..., c, :, :] * _each(state, groups) + write, None
    return torch.cat(outputs, -2)[..., :length, :], state if end else None


def decay_until(log_decay: Tensor, seen: Tensor) -> Tensor:
    """Return the decay of each token's write until the last seen token of its row; 0 after that token.

    log_decay [R, T, ...]; seen: bool, broadcastable to log_decay, true up to some token of each row.
    """
    later = (log_decay * seen).flip(1).cumsum(1).flip(1) - log_decay
    return later.masked_fill(~seen, -torch.inf).exp()


def diagonal_delta_chunks(
    query: Tensor,
    key: Tensor,
    added: Tensor,
    log_decay: Tensor,
    erase: Tensor,
    probe: Tensor,
    state: Tensor | None = None,
    chunk: int = 32,
    groups: Groups | None = None,
    end: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute S_t = diag(exp(log_decay_t)) S_{t-1} - erase_t (probe_t^T S_{t-1}) + key_t added_t^T by chunks.

    Return outputs [..., T, d_v], the last state and the states before each chunk [..., chunks, d_k, d_v].
    query, key, log_decay, erase, probe [..., T, d_k]; added [..., T, d_v]; state, groups, end as in
    `gated_delta_chunks`, but groups only without `end`. With W_t the decay since the chunk began, diag(1/W_t)
    S_t has no decay, so the reads probe_t^T S_{t-1} solve one unit triangular system per chunk; the rest is
    affine in the state before.

    Raises ValueError where a channel decays below exp(-60) within a chunk, since 1/W is computed (not checked
    under torch.compile). The log decays of RWKV-7 are above -0.61 per token.
    """
    length, d_k, d_v = key.shape[-2], key.shape[-1], added.shape[-1]
    chunk = min(chunk, length)
    parts = (query, key, added, log_decay, erase, probe)
    query, key, added, log_decay, erase, probe = (split_chunks(x, chunk) for x in parts)
    within, chunks = log_decay.cumsum(-2), key.shape[-3]
    last = within[..., -1, :]
    if not torch.compiler.is_compiling() and last.min() < LOWEST:
        raise ValueError(f"A channel decays below exp(-60) within {chunk} tokens: choose smaller chunks.")
    raised = (-within).exp()
    reads = torch.cat([probe * (within - log_decay).exp(), query * within.exp()], -2)
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril()
    seen = torch.cat([seen.tril(-1), seen])  # probes read the state before their token, queries the one after
    of_erase = (reads @ (erase * raised).mT).masked_fill(~seen, 0.0)
    of_key = (reads @ (key * raised).mT).masked_fill(~seen, 0.0)
    system, read_erase = of_erase.split(chunk, -2)
    probed, read = torch.cat([reads, of_key @ added], -1).split(chunk, -2)  # affine maps: [matrix | constant]
    probed = torch.linalg.solve_triangular(system, probed, upper=False, unitriangular=True)
    read = [x.unbind(-3) for x in (read - read_erase @ probed).split([d_k, d_v], -1)]
    if end or chunks > 1:
        left = (last[..., None, :] - within).exp()
        moved = torch.cat([torch.diag_embed(last.exp()), (key * left).mT @ added], -1) - (erase * left).mT @ probed
        moved = [x.unbind(-3) for x in moved.split([d_k, d_v], -1)]
    if state is None:
        state = key.new_zeros(*key.shape[:-3], d_k, d_v)
    outputs, before = [], []
    for c in range(chunks):
        before.append(state)
        outputs.append(_read(read[0][c], state, groups) + read[1][c])
        if end or c < chunks - 1:
            state, groups = moved[0][c] @ _each(state, groups) + moved[1][c], None
    outputs = torch.cat(outputs, -2)[..., :length, :]
    return (outputs, state, torch.stack(before, -3)) if end else (outputs, None, None)


def states_before(key: Tensor, effective: Tensor, log_decay: Tensor, starts: Tensor) -> Tensor:
    """Return the state before position starts[r] of each row, [R, H, d_k, d_v]; zero at start 0.

    key [R, T, H, d_k], effective [R, T, H, d_v], log_decay [R, T, H] or [R, T, H, d_k], starts [R].
    """
    log_decay = log_decay if log_decay.ndim == key.ndim else log_decay[..., None]
    total = log_decay.double().cumsum(1)  # fp64: differences of long sums follow
    last = (starts - 1).clamp(min=0)
    at_last = total[torch.arange(len(starts), device=starts.device), last][:, None]
    before = torch.arange(key.shape[1], device=starts.device) < starts[:, None]
    weight = (at_last - total).masked_fill(~before[..., None, None], -torch.inf).exp().to(key.dtype)
    return (key * weight).permute(0, 2, 3, 1) @ effective.transpose(1, 2)
