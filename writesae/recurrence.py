"""The recurrence of every host here, as data: S_t = A_t S_{t-1} + key_t added_t^T with A_t = diag(decay_t) - erase_t probe_t^T.

Symbols against the paper (Sec. 2, Eq. 2-3), for one cell, S always [d_k, d_v] and o_t = S_t^T q_t:

| here        | Gated DeltaNet                          |
|-------------|-----------------------------------------|
| query       | q_t, unit norm times d_k^-0.5           |
| key         | k_t, unit norm                          |
| added       | beta_t v_t: the write is key added^T    |
| effective   | u_t = beta_t (v_t - alpha_t S_{t-1}^T k_t): S_t = alpha_t S_{t-1} + k_t u_t^T |
| log_decay   | log alpha_t, one number a head          |
| erase, probe| alpha_t beta_t k_t and k_t              |

`step_states` is the slow loop that everything else is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F


class Groups:
    """R rows of which many share one of U things (`which` [R]): work on them side by side instead of copying the thing."""

    def __init__(self, which: torch.Tensor, count: int):
        same = which[:, None] == torch.arange(count, device=which.device)
        place = same.cumsum(0).gather(1, which[:, None])[:, 0] - 1
        self.which, self.count, self.place, self.most = which, count, place, int(place.max()) + 1

    def read(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """x[r] @ shared[which[r]] for x [R, H, L, d] and shared [U, H, d, e] -> [R, H, L, e]."""
        rows, heads, length, width = x.shape
        side = x.new_zeros(self.count, self.most, *x.shape[1:]).index_put((self.which, self.place), x)
        made = side.transpose(1, 2).reshape(self.count, heads, self.most * length, width) @ shared
        return made.view(self.count, heads, self.most, length, -1)[self.which, :, self.place]


@dataclass
class Factors:
    """One cell's history over [batch, time]; a rank-1 write and a transition a token, never a state.

    query, key: [B, T, d_k]; added: [B, T, d_v]; log_decay: [B, T, 1] (or [B, T, d_k] where decays are vectors);
    effective: [B, T, d_v] or None where the effective write is not rank 1; erase, probe: [B, T, d_k] or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    added: torch.Tensor
    log_decay: torch.Tensor
    effective: torch.Tensor | None = None
    erase: torch.Tensor | None = None
    probe: torch.Tensor | None = None

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Factors:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return Factors(**{name: None if x is None else change(x) for name, x in found.items()})

    def at(self, *index) -> Factors:
        """The same factors at an index of the leading dimensions, e.g. `.at(rows, positions)`."""
        return self._map(lambda x: x[index])

    def to(self, device: torch.device | str) -> Factors:
        """The same factors on a device."""
        return self._map(lambda x: x.to(device))

    def write(self, definition: str) -> torch.Tensor:
        """The value side [B, T, d_v] of the native write under a definition, "added" or "effective"."""
        if definition == "added":
            return self.added
        if definition == "effective" and self.effective is not None:
            return self.effective
        raise ValueError(
            f"There is no rank-1 write {definition!r} here: choose added (or effective, for scalar decays)."
        )

    def transition(self, x: torch.Tensor) -> torch.Tensor:
        """A_t x, for factors of single positions [R, d] and x [R, r, d_k]."""
        moved = self.log_decay.exp()[:, None] * x
        if self.erase is not None:
            moved = moved - (x @ self.probe[:, :, None]) * self.erase[:, None]
        return moved

    def transition_transposed(self, y: torch.Tensor) -> torch.Tensor:
        """A_t^T Y, for factors of single positions [R, d] and Y [R, d_k, d_v]."""
        moved = self.log_decay.exp()[:, :, None] * y
        if self.erase is not None:
            moved = moved - self.probe[:, :, None] * (self.erase[:, None] @ y)
        return moved


def step_states(factors: Factors, state: torch.Tensor | None = None) -> torch.Tensor:
    """All states [B, T, d_k, d_v] by the plain loop over tokens (slow; the oracle). `state`: [B, d_k, d_v] before."""
    batch, length, d_k = factors.key.shape
    if state is None:
        state = factors.key.new_zeros(batch, d_k, factors.added.shape[-1])
    history = []
    for t in range(length):
        now = factors.at(slice(None), t)
        before = state
        state = now.log_decay.exp()[:, :, None] * before + now.key[:, :, None] * now.added[:, None]
        if now.erase is not None:
            state = state - now.erase[:, :, None] * (now.probe[:, None] @ before)
        history.append(state)
    return torch.stack(history, 1)


def taken_by_erase(factors: Factors) -> torch.Tensor:
    """What each erase finds, probe_t^T S_{t-1}: [B, T, d_v], by the step loop, which keeps one state at a time."""
    batch, length, d_k = factors.key.shape
    state, found = factors.key.new_zeros(batch, d_k, factors.added.shape[-1]), []
    for t in range(length):
        now = factors.at(slice(None), t)
        taken = (now.probe[:, None] @ state)[:, 0]
        found.append(taken)
        state = now.log_decay.exp()[:, :, None] * state + now.key[:, :, None] * now.added[:, None]
        state = state - now.erase[:, :, None] * taken[:, None]
    return torch.stack(found, 1)


def gated_delta_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 64,
    groups=None,
    end: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gated delta rule by chunks: outputs o and effective writes u [..., T, d_v], last state [..., d_k, d_v].

    query, key: [..., T, d_k] (keys of unit norm, queries scaled); value: [..., T, d_v]; beta, log_decay: [..., T].
    state: the one to start from; with `groups` (hosts.base.Groups) those that the rows share, read without a copy a
    row. Without `end` no last state is worked out.
    Within a chunk, (I + tril(beta_t (k_t . k_s) prod alpha, -1)) u = beta (v - decayed read of the carried state).
    """
    length, d_k, d_v = key.shape[-2], key.shape[-1], value.shape[-1]
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        query, key, value = (F.pad(x, (0, 0, 0, pad)) for x in (query, key, value))
        beta, log_decay = (F.pad(x, (0, pad)) for x in (beta, log_decay))
    split = [x.unflatten(-2, (-1, chunk)) for x in (query, key, value)]
    query, key, value = split
    beta, within = beta.unflatten(-1, (-1, chunk)), log_decay.unflatten(-1, (-1, chunk)).cumsum(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril()
    decay = (within[..., :, None] - within[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    system = (beta[..., None] * decay * (key @ key.transpose(-1, -2))).tril(-1)
    system = system + torch.eye(chunk, dtype=key.dtype, device=key.device)
    from_start = within.exp()[..., None]
    right = beta[..., None] * torch.cat([value, from_start * key], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_state = solved.split([d_v, d_k], -1)
    attention = decay * (query @ key.transpose(-1, -2))
    query, to_end = query * from_start, key * (within[..., -1:] - within).exp()[..., None]
    whole = within[..., -1].exp()[..., None, None]
    if state is None:
        state = key.new_zeros(*key.shape[:-3], d_k, d_v)
    outputs, writes, chunks = [], [], key.shape[-3]
    for c in range(chunks):
        reads = torch.cat([of_state[..., c, :, :], query[..., c, :, :]], -2)
        reads = reads @ state if groups is None else groups.read(reads, state)
        u = own[..., c, :, :] - reads[..., :chunk, :]
        outputs.append(reads[..., chunk:, :] + attention[..., c, :, :] @ u)
        writes.append(u)
        if end or c < chunks - 1:
            state, groups = state if groups is None else state[groups.which], None
            state = whole[..., c, :, :] * state
            state.flatten(0, -3).baddbmm_(to_end[..., c, :, :].mT.flatten(0, -3), u.flatten(0, -3))
    return torch.cat(outputs, -2)[..., :length, :], torch.cat(writes, -2)[..., :length, :], state if end else None


def decayed_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    added: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 64,
    groups=None,
    end: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = alpha_t S_{t-1} + key_t added_t^T by chunks: outputs [B, T, H, d_v] and the last state [B, H, d_k, d_v].

    query, key: [B, T, H_k, d_k], each of the H_k serving H / H_k consecutive heads, for which it is not copied: those
    heads are columns of one matrix. added: [B, T, H, d_v]; log_decay: [B, T, H]; state [B, H, d_k, d_v], groups and end
    as in `gated_delta_chunks`.
    """
    length, key_heads, d_v = key.shape[1], key.shape[2], added.shape[-1]
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        query, key, added = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (query, key, added))
        log_decay = F.pad(log_decay, (0, 0, 0, pad))
    added, log_decay = (x.unflatten(2, (key_heads, -1)) for x in (added, log_decay.double()))
    # chunks and key heads first: [B, n, H_k, C, d_k], [B, n, H_k, C, heads of one key, d_v]
    query, key, added, log_decay = (x.unflatten(1, (-1, chunk)).transpose(2, 3) for x in (query, key, added, log_decay))
    total = log_decay.cumsum(3)  # differences of long sums follow: they are taken in fp64
    within = total.mT
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).triu(1)
    decay = (within[..., :, None] - within[..., None, :]).to(key.dtype).masked_fill(later, -torch.inf).exp()
    attention = decay * (query @ key.mT)[:, :, :, None]
    own = (attention @ added.transpose(3, 4)).transpose(3, 4)
    from_start, to_end = (x.to(key.dtype).exp()[..., None] for x in (total, total[..., -1:, :] - total))
    if state is not None:
        state = state.unflatten(1, (key_heads, -1)).transpose(2, 3)  # [B, H_k, d_k, heads of one key, d_v]
    outputs, chunks = [], key.shape[1]
    parts = (x.unbind(1) for x in (query, key, added * to_end, own, from_start))
    for c, (query, key, added, output, passed) in enumerate(zip(*parts, strict=True)):
        if state is not None:
            before = state.flatten(-2)
            read = query @ before if groups is None else groups.read(query, before)
            output = output + passed * read.unflatten(-1, (-1, d_v))
        outputs.append(output)
        if end or c < chunks - 1:
            write = (key.mT @ added.flatten(-2)).unflatten(-1, (-1, d_v))
            if state is not None:
                state, groups = state if groups is None else state[groups.which], None
                write = passed[:, :, -1:] * state + write
            state = write
    outputs = torch.stack(outputs, 1).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :length]
    return outputs, state.transpose(2, 3).flatten(1, 2) if end else None


def diagonal_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    added: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 16,
    groups=None,
    end: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + key_t added_t^T by chunks: outputs S_t^T q_t [..., T, d_v], last state
    [..., d_k, d_v].

    query, key, log_decay: [..., T, d_k]; added: [..., T, d_v]; state, groups, end: as in `gated_delta_chunks`. The decays
    from token to token of a chunk are formed themselves, [..., T, chunk, d_k] of them, so that none is too fast.
    """
    length, d_k, d_v = key.shape[-2], key.shape[-1], added.shape[-1]
    chunk = min(chunk, length)
    parts, pad = (query, key, added, log_decay), -length % chunk
    parts = [F.pad(x, (0, 0, 0, pad)) for x in parts] if pad else parts
    query, key, added, log_decay = (x.unflatten(-2, (-1, chunk)) for x in parts)
    within, chunks = log_decay.cumsum(-2), key.shape[-3]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).triu(1)[..., None]
    between = (within[..., :, None, :] - within[..., None, :, :]).masked_fill(later, -torch.inf).exp()
    attention = ((between * key[..., None, :, :]) @ query[..., None])[..., 0]
    own, last = attention @ added, within[..., -1:, :]
    query, key, whole = query * within.exp(), key * (last - within).exp(), last.mT.exp()
    if state is None:
        state = key.new_zeros(*key.shape[:-3], d_k, d_v)
    outputs = []
    for c in range(chunks):
        read = query[..., c, :, :] @ state if groups is None else groups.read(query[..., c, :, :], state)
        outputs.append(own[..., c, :, :] + read)
        if end or c < chunks - 1:
            state, groups = state if groups is None else state[groups.which], None
            state = whole[..., c, :, :] * state + key[..., c, :, :].mT @ added[..., c, :, :]
    return torch.cat(outputs, -2)[..., :length, :], state if end else None


def decay_until(log_decay: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """What is left of each token's write at the last token that is seen: exp of the log decays after it, summed; 0 behind.

    log_decay: [R, T, ...]; seen: bool, of a shape that broadcasts to it, true up to some token of each row.
    """
    later = (log_decay * seen).flip(1).cumsum(1).flip(1) - log_decay
    return later.masked_fill(~seen, -torch.inf).exp()


def diagonal_delta_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    added: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    probe: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 32,
    groups=None,
    end: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} - erase_t (probe_t^T S_{t-1}) + key_t added_t^T by chunks: outputs
    S_t^T q_t [..., T, d_v], last state [..., d_k, d_v], and the state before each chunk [..., chunks, d_k, d_v].

    query, key, log_decay, erase, probe: [..., T, d_k]; added: [..., T, d_v]; state, groups, end: as above.
    With W_t the decay since the chunk began, diag(1/W_t) S_t has no decay left, so that the reads probe_t^T S_{t-1}
    solve one unit triangular system a chunk; outputs and next state are then affine maps of the state before the chunk.
    1/W is formed as it stands: ValueError where a channel decays below exp(-60) within a chunk, which no RWKV-7 does
    (its log decays lie above -0.61) and torch.compile does not check.
    """
    length, d_k, d_v = key.shape[-2], key.shape[-1], added.shape[-1]
    chunk = min(chunk, length)
    parts, pad = (query, key, added, log_decay, erase, probe), -length % chunk
    parts = [F.pad(x, (0, 0, 0, pad)) for x in parts] if pad else parts
    query, key, added, log_decay, erase, probe = (x.unflatten(-2, (-1, chunk)) for x in parts)
    within, chunks = log_decay.cumsum(-2), key.shape[-3]
    last = within[..., -1, :]
    if not torch.compiler.is_compiling() and last.min() < -60:
        raise ValueError(f"A channel decays below exp(-60) within {chunk} tokens: choose smaller chunks.")
    raised = (-within).exp()
    reads = torch.cat([probe * (within - log_decay).exp(), query * within.exp()], -2)
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril()
    seen = torch.cat([seen.tril(-1), seen])  # a probe reads the state before its token, a query the one after it
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
        carried = read[0][c] @ state if groups is None else groups.read(read[0][c], state)
        outputs.append(carried + read[1][c])
        if end or c < chunks - 1:
            state, groups = state if groups is None else state[groups.which], None
            state = moved[0][c] @ state + moved[1][c]
    outputs = torch.cat(outputs, -2)[..., :length, :]
    return (outputs, state, torch.stack(before, -3)) if end else (outputs, None, None)


def states_before(
    key: torch.Tensor, effective: torch.Tensor, log_decay: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """The state before position starts[r] of each row: [R, H, d_k, d_v], from factors by one batched product.

    key: [R, T, H, d_k], effective: [R, T, H, d_v], log_decay: [R, T, H] (scalar decays), starts: [R]; zero at start 0.
    """
    total = log_decay.double().cumsum(1)  # differences of long sums follow
    last = (starts - 1).clamp(min=0)
    at_last = total[torch.arange(len(starts), device=starts.device), last][:, None]
    before = torch.arange(key.shape[1], device=starts.device) < starts[:, None]
    weight = (at_last - total).masked_fill(~before[..., None], -torch.inf).exp().to(key.dtype)
    return (key * weight[..., None]).permute(0, 2, 3, 1) @ effective.transpose(1, 2)
