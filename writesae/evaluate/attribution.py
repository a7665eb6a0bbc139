"""The exact attention map of a recurrent head: how each token reads the write of each earlier token.

The output of a head is a sum over earlier writes, o_t = sum_s weight_ts added_s, with

    weight_ts = q_t^T A_t ... A_{s+1} key_s        (s <= t)

The transitions A contain the erasures of the delta rule (`writesae.recurrence`), so nothing is approximated.
Without erasures, weight_ts is the product of the decays with <q_t, key_s>, as in linear attention.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors
from writesae.shift import logit_gradient


def attribution(host: Host, run: Run, layer: int, head: int) -> Tensor:
    """Return the attention map [B, T, T] of a head: how token t (dim 1) reads the write of token s (dim 2).

    Times `added` [B, T, d_v] it is the head's read S_t^T q_t. Raises ValueError as `Host.factors`.
    """
    return weights(host.factors(run, layer, head))


def weights(factors: Factors) -> Tensor:
    """Return weight_ts [B, T, T] of a cell's factors over [B, T]; 0 where s > t."""
    factors.refuse_harvest()
    count, length, d_k = factors.key.shape
    moved, columns = factors.key.new_zeros(count, d_k, length), []  # column t: A_{s+1}^T ... A_t^T q_t
    for s in reversed(range(length)):
        now = factors.at(slice(None), s)
        moved[:, :, s] = now.query
        columns.append((now.key[:, None] @ moved)[:, 0])
        moved = now.transition_transposed(moved)
    return torch.stack(columns[::-1], 2)


def shares(weight: Tensor, factors: Factors) -> Tensor:
    """Return the share of each write in the read of each token, [B, T, T]: |weight_ts| ||added_s|| divided
    by its sum over s. weight [B, T, T]: `weights` of the factors."""
    sizes = weight.abs() * factors.added.norm(dim=-1)[:, None]
    return sizes / sizes.sum(-1, keepdim=True)


def without_erase(factors: Factors) -> Factors:
    """Return the factors of the same cell if nothing were erased: only decays stay."""
    return replace(factors, erase=None, probe=None)


def survival(factors: Factors) -> Tensor:
    """Return ||A_t ... A_{s+1} key_s|| [B, T, T]: what is left at token t (dim 1) of the key of token s (dim
    2)."""
    count, length, d_k = factors.key.shape
    moved, rows = factors.key.new_zeros(count, length, d_k), []
    for t in range(length):
        now = factors.at(slice(None), t)
        moved = now.transition(moved)
        moved[:, t] = now.key
        rows.append(moved.norm(dim=-1))
    return torch.stack(rows, 1)


def overwriters(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return which token erased most of each write, [B, T] int64, and how much of it, [B, T].

    The share is of the write's key at the start: the length that the erasure of one token takes, beyond the
    decay. Where nothing is erased the share is 0. Raises ValueError for a host that erases nothing."""
    factors.refuse_harvest()
    if factors.erase is None or not factors.erase.any():
        raise ValueError("The states of this host only decay: no token erases what another wrote.")
    count, length, d_k = factors.key.shape
    moved = factors.key.new_zeros(count, length, d_k)
    largest = factors.key.new_zeros(count, length)
    which, start = torch.zeros(count, length, dtype=torch.int64), factors.key.norm(dim=-1)
    for t in range(length):
        now = factors.at(slice(None), t)
        decayed = now.log_decay.exp()[:, None] * moved
        moved = now.transition(moved)
        taken = (decayed.norm(dim=-1) - moved.norm(dim=-1)) / start
        more = taken > largest
        which[more], largest = t, torch.where(more, taken, largest)
        moved[:, t] = now.key
    return which, largest


def logit_parts(host: Host, run: Run, layer: int, head: int, tokens: Tensor) -> Tensor:
    """Return what each write of a head adds to a logit at the last position, to first order, [B, T].

    tokens [B]: the logit of each window. A write counts at every position that reads it: the sum over t of
    weight_ts <added_s, r_t>, with r_t the gradient of the logit with respect to the head's output at t (one
    backward pass). They add up to the sum over t of <S_t^T q_t, r_t>. Raises as `logit_gradient`."""
    count, length = run.tokens.shape
    rows, factors = torch.arange(count), host.factors(run, layer, head)
    gradient, _ = logit_gradient(host, run, layer, head, rows, torch.zeros_like(rows), length, tokens)
    return (weights(factors) * (gradient.to(factors.added) @ factors.added.mT)).sum(1)
