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

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F


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

    def at(self, *index) -> Factors:
        """The same factors at an index of the leading dimensions, e.g. `.at(rows, positions)`."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return Factors(**{name: None if x is None else x[index] for name, x in picked.items()})

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


def gated_delta_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated delta rule by chunks: outputs o and effective writes u [..., T, d_v], last state [..., d_k, d_v].

    query, key: [..., T, d_k] (keys of unit norm, queries scaled); value: [..., T, d_v]; beta, log_decay: [..., T].
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
    outputs, writes = [], []
    for c in range(key.shape[-3]):
        u = own[..., c, :, :] - of_state[..., c, :, :] @ state
        outputs.append(query[..., c, :, :] @ state + attention[..., c, :, :] @ u)
        writes.append(u)
        state = whole[..., c, :, :] * state + to_end[..., c, :, :].transpose(-1, -2) @ u
    return torch.cat(outputs, -2)[..., :length, :], torch.cat(writes, -2)[..., :length, :], state


def states_before(
    key: torch.Tensor, effective: torch.Tensor, log_decay: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """The state before position starts[r] of each row: [R, H, d_k, d_v], from factors by one batched product.

    key: [R, T, H, d_k], effective: [R, T, H, d_v], log_decay: [R, T, H] (scalar decays), starts: [R]; zero at start 0.
    """
    total = log_decay.cumsum(1)
    last = (starts - 1).clamp(min=0)
    at_last = total[torch.arange(len(starts), device=starts.device), last][:, None]
    before = torch.arange(key.shape[1], device=starts.device) < starts[:, None]
    weight = (at_last - total).masked_fill(~before[..., None], -torch.inf).exp()
    return (key * weight[..., None]).permute(0, 2, 3, 1) @ effective.transpose(1, 2)
