"""Edits of single writes, exactly: a perturbation of the state stays a sum of the same few rank-1 terms for ever.

An edit adds sum_j left_j right_j^T to a cell's state at chosen positions. Later, dS_t = sum_j x_{j,t} right_j^T with
x_{j,t} = A_t x_{j,t-1}: only the key sides move, by the host's own transition matrices (the paper's Eq. 3, without
its approximations), and the head's output changes by dS_t^T q_t. The rest of the model is then run again from the
first edited position on (`Host.branch`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from writesae.hosts.base import Host, Run, check_places
from writesae.recurrence import Factors

SCOPES = ("write", "cache")


@dataclass
class Edit:
    """R edited rows. rows [R]: windows of the run; positions [R, r]: where each term enters; left [R, r, d_k];
    right [R, r, d_v]; reads_write [R] bool: whether the token that writes reads the edit already (scope "write")
    or only later tokens do (scope "cache"). Raises ValueError for shapes that do not belong together."""

    rows: torch.Tensor
    positions: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    reads_write: torch.Tensor

    def __post_init__(self) -> None:
        shapes = [list(x.shape) for x in (self.rows, self.positions, self.left, self.right, self.reads_write)]
        terms = shapes[2][:2]
        fits = len(shapes[2]) == len(shapes[3]) == 3 and 0 not in terms[1:]
        if not fits or shapes[:2] + shapes[3:] != [terms[:1], terms, terms + shapes[3][2:], terms[:1]]:
            raise ValueError(
                "An edit takes rows [R], positions [R, r], left [R, r, d_k], right [R, r, d_v] and reads_write [R]; got "
                f"{', '.join(map(str, shapes))}."
            )

    @property
    def starts(self) -> torch.Tensor:
        return self.positions.min(1).values

    def split(self, size: int):
        """The same edit in pieces of at most `size` rows."""
        parts = [x.split(size) for x in (self.rows, self.positions, self.left, self.right, self.reads_write)]
        return [Edit(*part) for part in zip(*parts, strict=True)]


def make_edit(rows, position, left, right, scope: str = "write") -> Edit:
    """An edit whose terms all enter at `position` [R]. left: [R, r, d_k], right: [R, r, d_v]. ValueError for an unknown
    scope, and for shapes that do not belong together."""
    if scope not in SCOPES:
        raise ValueError(f"There is no read scope {scope!r}: choose one of {', '.join(SCOPES)}.")
    positions = position[:, None].expand(-1, left.shape[1]) if position.dim() == 1 and left.dim() == 3 else position
    return Edit(rows, positions, left, right, torch.full_like(rows, scope == "write", dtype=torch.bool))


def head_change(factors: Factors, edit: Edit, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How the edit changes the head's output, [R, steps, d_v] from each row's start on, and the key sides
    [R, r, d_k] after the last step. `factors`: the cell's, over the run's [B, T].

    Raises ValueError for places outside the run, sides of another cell's size or dtype, and values that are not finite.
    """
    _check_fits(factors, edit, steps)
    starts, moved, changes = edit.starts, torch.zeros_like(edit.left), []
    for step in range(steps):
        now = factors.at(edit.rows, starts + step)
        enters = (edit.positions == (starts + step)[:, None])[..., None]
        moved = now.transition(moved) + enters * edit.left
        seen = torch.where(enters & ~edit.reads_write[:, None, None], 0.0, moved)
        changes.append(((seen @ now.query[:, :, None]) * edit.right).sum(1))
    return torch.stack(changes, 1), moved


def _check_fits(factors: Factors, edit: Edit, steps: int) -> None:
    d_k, d_v, dtype = factors.key.shape[-1], factors.added.shape[-1], factors.key.dtype
    if (edit.left.shape[-1], edit.right.shape[-1]) != (d_k, d_v):
        has = f"{edit.left.shape[-1]} x {edit.right.shape[-1]}"
        raise ValueError(f"The cell's states are {d_k} x {d_v} (key x value), and the edit is {has}.")
    if (edit.left.dtype, edit.right.dtype) != (dtype, dtype):
        raise ValueError(f"The edit must be in {dtype}, as the run; it is in {edit.left.dtype} and {edit.right.dtype}.")
    finite = (edit.left.isfinite().all(-1) & edit.right.isfinite().all(-1)).all(-1)
    if not finite.all():
        raise ValueError(f"The edit holds values that are not finite, first in its row {int(finite.int().argmin())}.")
    if steps < 1:
        raise ValueError(f"An edited run takes at least one token, not {steps}.")
    check_places(edit.rows, edit.positions, factors.key)
    check_places(edit.rows, edit.starts + steps - 1, factors.key)


@torch.no_grad()
def edited_hidden(host: Host, run: Run, layer: int, head: int, edit: Edit, steps: int) -> torch.Tensor:
    """Final hidden states [R, steps, D] of the edited runs, from each row's first edited position on."""
    change, _ = head_change(host.factors(run, layer, head), edit, steps)
    return host.branch(run, layer, head, edit.rows, edit.starts, change)[0]


def kl(native: torch.Tensor, patched: torch.Tensor) -> torch.Tensor:
    """KL(native, patched) in nats over the last dimension of two logit tensors; in fp64, since it may be as small as 1e-8."""
    p, q = F.log_softmax(native.double(), -1), F.log_softmax(patched.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def generate(host: Host, run: Run, layer: int, head: int, edit: Edit, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations under an edit, and the logits of the first new token: [R, count], [R, vocabulary].

    All rows' windows are the whole prompt; the edit enters inside it and stays in the state while the model goes on.
    Rows must share one starting position. Raises ValueError where they do not, and for a count below 1.
    """
    if count < 1 or not len(edit.rows):
        raise ValueError(f"There is nothing to generate: {count} tokens for {len(edit.rows)} rows were asked for.")
    starts, length = edit.starts, run.tokens.shape[1]
    if (starts != starts[0]).any():
        raise ValueError("Rows that generate together must start at one position: group them by position first.")
    steps = length - int(starts[0])
    change, moved = head_change(host.factors(run, layer, head), edit, steps)
    final, pasts_from_layer = host.branch(run, layer, head, edit.rows, starts, change, keep=True)
    end = torch.full_like(starts, length)
    pasts = [host.past_at(run.records[below], edit.rows, end) for below in range(layer)] + pasts_from_layer
    here = pasts[layer]
    here.own_state = here.state
    here.own_state[:, head] += (moved.transpose(1, 2) @ edit.right).to(here.own_state.device)
    first = host.logits(final[:, -1])
    return host.decode(pasts, first.argmax(-1), length, count - 1), first
