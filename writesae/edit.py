"""Exact edits of single writes: rank-1 terms that are added to a cell's state at chosen positions.

A term left_j right_j^T moves on as dS_t = sum_j x_{j,t} right_j^T with x_{j,t} = A_t x_{j,t-1} (the paper's
Eq. 3, without its approximations), and changes the head's output by dS_t^T q_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.base import Host, Run, check_places
from writesae.recurrence import Factors, torch_defaults
from writesae.text import Windows

SCOPES = ("write", "cache")

Vector = Tensor | Sequence[float]


@dataclass
class Edit:
    """R edited rows, each with r rank-1 terms that enter the state of a cell. `Edit.at` makes a single term.

    rows [R]: windows of the run; positions [R, r]: where each term enters; left [R, r, d_k]; right [R, r,
    d_v]; reads_write [R] bool: whether the token at that position reads the edit (scope "write") or only
    later tokens do (scope "cache"). Raises ValueError for shapes that do not fit together.
    """

    rows: Tensor
    positions: Tensor
    left: Tensor
    right: Tensor
    reads_write: Tensor

    def __post_init__(self) -> None:
        shapes = [list(x.shape) for x in vars(self).values()]
        terms = shapes[2][:2]
        fits = len(shapes[2]) == len(shapes[3]) == 3 and 0 not in terms[1:]
        if not fits or shapes[:2] + shapes[3:] != [terms[:1], terms, terms + shapes[3][2:], terms[:1]]:
            wanted = "rows [R], positions [R, r], left [R, r, d_k], right [R, r, d_v] and reads_write [R]"
            raise ValueError(f"An edit takes {wanted}; got {', '.join(map(str, shapes))}.")

    @classmethod
    @torch_defaults()
    def at(cls, window: int, position: int, key: Vector, value: Vector, scope: str = "write") -> Edit:
        """Return the edit that adds key value^T to the state at one position of one window.

        key [d_k], value [d_v]: tensors, arrays or lists. scope: "write" or "cache", else ValueError.
        """
        key, value = torch.as_tensor(key), torch.as_tensor(value)
        if (key.dim(), value.dim()) != (1, 1):
            shapes = f"{[*key.shape]}, {[*value.shape]}"
            raise ValueError(f"An edit at one place takes key [d_k] and value [d_v]; got {shapes}.")
        place = torch.tensor([window]), torch.tensor([position])
        return make_edit(*place, key[None, None], value[None, None], scope)

    @property
    def starts(self) -> Tensor:
        """The first edited position of each row, [R]."""
        return self.positions.min(1).values

    def split(self, size: int) -> list[Edit]:
        """Return the edit in pieces of at most `size` rows."""
        return [Edit(*part) for part in zip(*(x.split(size) for x in vars(self).values()), strict=True)]


def make_edit(rows: Tensor, position: Tensor, left: Tensor, right: Tensor, scope: str = "write") -> Edit:
    """Return an edit whose terms all enter at `position` [R] (or [R, r]); other arguments: as for `Edit`."""
    if scope not in SCOPES:
        raise ValueError(f"There is no read scope {scope!r}: choose one of {', '.join(SCOPES)}.")
    positions = position[:, None].expand(-1, left.shape[1]) if position.dim() == 1 and left.dim() == 3 else position
    return Edit(rows, positions, left, right, torch.full_like(rows, scope == "write", dtype=torch.bool))


@torch_defaults()
def run_edited(host: Host, windows: Windows | Tensor, edit: Edit, *, layer: int, head: int, steps: int) -> Tensor:
    """Return the logits [R, steps, V], fp32, of edited runs from each row's first edited position on.

    windows: the windows that the edit's rows number, or their tokens [N, T]; only the edited ones are run.
    Raises ValueError for places outside the windows, sides of another size, and values that are not finite.
    """
    run, edit = run_of(host, windows, edit, layer, head)
    return host.logits(edited_hidden(host, run, layer, head, edit, steps))


def run_of(host: Host, windows: Windows | Tensor, edit: Edit, layer: int, head: int) -> tuple[Run, Edit]:
    """Return a native run of the edited windows, and the edit with its rows in that run and in its dtype."""
    tokens = windows if isinstance(windows, Tensor) else windows.tokens
    host.check_cell(layer, head)
    check_places(edit.rows, edit.positions, tokens)
    chosen, rows = edit.rows.unique(return_inverse=True)
    run = host.run(tokens[chosen])
    dtype = host.factors(run, layer, head).key.dtype
    return run, replace(edit, rows=rows, left=edit.left.to(dtype), right=edit.right.to(dtype))


def head_change(factors: Factors, edit: Edit, steps: int) -> tuple[Tensor, Tensor]:
    """Return the change of the head's output [R, steps, d_v] from each row's start, and the last key sides.

    factors: the cell's, over the run's [B, T]; the key sides are [R, r, d_k]. Raises ValueError for places
    outside the run, sides of another size or dtype than the cell's, and values that are not finite.
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
    dtype = factors.key.dtype
    states, sides = (
        f"{x.shape[-1]} x {y.shape[-1]}" for x, y in ((factors.key, factors.added), (edit.left, edit.right))
    )
    if states != sides:
        raise ValueError(f"The cell's states are {states} (key x value), and the edit is {sides}.")
    if (edit.left.dtype, edit.right.dtype) != (dtype, dtype):
        raise ValueError(f"The edit must be in {dtype}, as the run; it is in {edit.left.dtype} and {edit.right.dtype}.")
    finite = (edit.left.isfinite().all(-1) & edit.right.isfinite().all(-1)).all(-1)
    if not finite.all():
        raise ValueError(f"The edit holds values that are not finite, first in its row {int(finite.int().argmin())}.")
    if steps < 1:
        raise ValueError(f"An edited run takes at least one token, not {steps}.")
    check_places(edit.rows, edit.positions, factors.key)
    check_places(edit.rows, edit.starts + steps - 1, factors.key)


@torch_defaults()
def edited_hidden(host: Host, run: Run, layer: int, head: int, edit: Edit, steps: int) -> Tensor:
    """Return the final hidden states [R, steps, D] of edited runs, from each row's first edit on."""
    change, _ = head_change(host.factors(run, layer, head), edit, steps)
    return host.branch(run, layer, head, edit.rows, edit.starts, change)[0]


def kl(native: Tensor, patched: Tensor) -> Tensor:
    """Return KL(native, patched) in nats over the last dimension of logits; in fp64, as it can be tiny."""
    p, q = F.log_softmax(native.double(), -1), F.log_softmax(patched.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


@torch_defaults()
def generate(host: Host, run: Run, layer: int, head: int, edit: Edit, count: int) -> tuple[Tensor, Tensor]:
    """Return greedy continuations [R, count] of edited windows, and the logits [R, V] of the first new token.

    Raises ValueError for rows with different starting positions, and a count below 1.
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
    past = pasts[layer]
    past.states, past.groups = past.state, None
    past.states[:, head] += (moved.transpose(1, 2) @ edit.right).to(past.states.device)
    first = host.logits(final[:, -1])
    return host.decode(pasts, first.argmax(-1), length, count - 1), first
