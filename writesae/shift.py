"""What a write does to a logit: the paper's formula, the same with exact transport, and the exact first-order form.

For a write x w^T at t0 and the logit of `token` at t (the paper's Sec. 2, Eq. 1, and App. A):

- paper:      prod alpha . <x, q_t> . <W_O w, W_U[token]>, the direct path with the decay alone;
- transport:  <x_t, q_t> . <W_O w, W_U[token]>, x_t moved by the host's own transition matrices;
- exact:      x^T Gamma w, Gamma = sum_s (A_{t0+1}^T ... A_s^T q_s) r_s^T with r_s the gradient of the logit with respect
              to the head's output at s: every path, one backward pass for all atoms and magnitudes.

Nothing is fitted in any of them.
"""

from __future__ import annotations

import torch

from writesae.hosts.base import Host, Run, check_places
from writesae.recurrence import Factors


def logit_gradient(
    host: Host,
    run: Run,
    layer: int,
    head: int,
    rows: torch.Tensor,
    starts: torch.Tensor,
    steps: int,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient [R, steps, d_v] of each row's logit of tokens[r], at the last of `steps` positions from starts[r] on,
    with respect to the head's output there; and the native logits [R, vocabulary] at that position.

    Raises ValueError for tokens outside the vocabulary or not one a row, and for places as `Host.branch` does."""
    host.check_tokens(tokens)
    if tokens.shape != rows.shape:
        raise ValueError(f"Each row takes the logit of one token: {len(rows)} rows, tokens {list(tokens.shape)}.")
    change = torch.zeros(len(rows), steps, host.d_v, requires_grad=True)
    with torch.enable_grad():
        final, _ = host.branch(run, layer, head, rows, starts, change)
        logits = host.logits(final[:, -1])
        chosen = logits.gather(-1, tokens[:, None]).sum()
    return torch.autograd.grad(chosen, change)[0], logits.detach()


def gamma(factors: Factors, rows: torch.Tensor, starts: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gamma [R, steps, d_k, d_v] at every position from starts[r] on: a write x w^T there shifts the logit by x^T Gamma w.

    This is read scope "write". For scope "cache" at t0 pass starts = t0 + 1 and use A_{t0+1}^T Gamma (`cache_gamma`).
    Raises ValueError for places outside the run.
    """
    steps, found = gradient.shape[1], []
    check_places(rows, torch.stack([starts, starts + steps - 1]), factors.key)
    for step in reversed(range(steps)):
        now = factors.at(rows, starts + step)
        here = now.query[:, :, None] * gradient[:, step, None, :]
        if found:
            here = here + factors.at(rows, starts + step + 1).transition_transposed(found[-1])
        found.append(here)
    return torch.stack(found[::-1], 1)


def cache_gamma(factors: Factors, rows: torch.Tensor, t0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gamma [R, d_k, d_v] of a write at t0 that only later tokens read. gradient: [R, steps, d_v] from t0 + 1 on."""
    after = gamma(factors, rows, t0 + 1, gradient)[:, 0]
    return factors.at(rows, t0 + 1).transition_transposed(after)


def reads(
    factors: Factors, rows: torch.Tensor, t0: torch.Tensor, steps: int, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How the query at t0 + steps reads a write at t0, for n key sides [n, d_k]: by decay alone, and exactly; both [R, n].

    Raises ValueError where t0 or t0 + steps lies outside the run.
    """
    check_places(rows, torch.stack([t0, t0 + steps]), factors.key)
    moved = keys.expand(len(rows), -1, -1)
    decay = torch.zeros_like(factors.log_decay[rows, t0])
    for step in range(1, steps + 1):
        now = factors.at(rows, t0 + step)
        moved, decay = now.transition(moved), decay + now.log_decay
    query = factors.query[rows, t0 + steps]
    return (query * decay.exp()) @ keys.T, (moved @ query[:, :, None])[..., 0]


def direct_path(host: Host, layer: int, head: int, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """<W_O value, W_U[token]> for n value sides [n, d_v] and R tokens: [R, n]. ValueError for tokens outside the vocabulary."""
    host.check_tokens(tokens)
    return host.unembedding()[tokens] @ host.output_projection(layer, head) @ values.T
