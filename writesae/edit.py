"""Exact edits of single writes: rank-1 terms that are added to the states of cells at chosen positions.

A term left_j right_j^T moves on as dS_t = sum_j x_{j,t} right_j^T with x_{j,t} = A_t x_{j,t-1} (the paper's
Eq. 3, without its approximations), and changes the head's output by dS_t^T q_t. An edited layer changes the
queries, keys and gates of the layers above. Where these are edited too, q_t and A_t are those of the edited
run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.base import Host, Run, check_places
from writesae.hosts.past import Past, Record
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

    def part(self, which: Tensor) -> Edit:
        """Return the edit of some of its rows. which: their numbers, or bool [R]."""
        return Edit(*(x[which] for x in vars(self).values()))


def make_edit(rows: Tensor, position: Tensor, left: Tensor, right: Tensor, scope: str = "write") -> Edit:
    """Return an edit whose terms all enter at `position` [R] (or [R, r]); other arguments: as for `Edit`."""
    if scope not in SCOPES:
        raise ValueError(f"There is no read scope {scope!r}: choose one of {', '.join(SCOPES)}.")
    positions = position[:, None].expand(-1, left.shape[1]) if position.dim() == 1 and left.dim() == 3 else position
    return Edit(rows, positions, left, right, torch.full_like(rows, scope == "write", dtype=torch.bool))


Edits = Mapping[tuple[int, int], Edit]  # (layer, head) -> an edit of that cell; all are of the same rows


@torch_defaults()
def run_edited(
    host: Host,
    windows: Windows | Tensor,
    edit: Edit | Edits,
    *,
    layer: int | None = None,
    head: int | None = None,
    steps: int,
) -> Tensor:
    """Return the logits [R, steps, V], fp32, of edited runs from each row's first edited position on.

    windows: the windows that the edit's rows number, or their tokens [N, T]; only the edited ones are run.
    edit: an edit of the cell (layer, head), or {(layer, head): edit} for several cells at once, with the same
    rows in each. Raises ValueError for places outside the windows, sides of another size, values that are not
    finite, rows that differ between cells, and unknown cells."""
    several = isinstance(edit, Mapping)
    if [layer is None, head is None] != [several, several]:
        raise ValueError("An edit of one cell takes layer and head; edits of several, {(layer, head): edit}, neither.")
    run, edits = run_under(host, windows, edit if several else {(layer, head): edit})
    return host.logits(hidden_under(host, run, edits, steps)[0])


def run_under(host: Host, windows: Windows | Tensor, edits: Edits) -> tuple[Run, Edits]:
    """Return a native run of the edited windows, and the edits with rows in that run, in its dtype."""
    tokens, rows = host.check_windows(windows), _rows(edits)
    for cell, edit in edits.items():
        host.check_cell(*cell)
        check_places(rows, edit.positions, tokens)  # before the run, which has other rows
    chosen, rows = rows.unique(return_inverse=True)
    run = host.run(tokens[chosen])
    dtype = host.factors(run, *next(iter(edits))).key.dtype
    sides = {cell: dict(left=edit.left.to(dtype), right=edit.right.to(dtype)) for cell, edit in edits.items()}
    return run, {cell: replace(edit, rows=rows, **sides[cell]) for cell, edit in edits.items()}


def _rows(edits: Edits) -> Tensor:
    """Return the rows [R] of edits. Raises ValueError for no edits, and for edits of different rows."""
    if not edits:
        raise ValueError("There is no edit: give {(layer, head): edit} with at least one cell.")
    for cell, edit in edits.items():
        if not isinstance(edit, Edit):
            raise ValueError(f"Each cell takes one Edit, and {cell} has a {type(edit).__name__}.")
    (first, edit), *others = edits.items()
    for cell, other in others:
        if not torch.equal(edit.rows, other.rows):
            raise ValueError(f"Edits that run together have the same rows: those of {first} and {cell} differ.")
    return edit.rows


def _starts(edits: Edits) -> Tensor:
    """Return the first edited position of each row in any cell, [R]."""
    return torch.stack([edit.starts for edit in edits.values()]).min(0).values


def head_change(factors: Factors, edit: Edit, steps: int) -> tuple[Tensor, Tensor]:
    """Return the head's change [R, steps, d_v] from each row's start, and the key sides after the last step.

    factors: the cell's, over the run's [B, T]; the key sides are [R, r, d_k]. Raises ValueError for places
    outside the run, sides of another size or dtype than the cell's, and values that are not finite.
    """
    _check_fits(factors, edit, edit.starts, steps)
    return transport(factors, edit, edit.starts, steps)


def transport(factors: Factors, edit: Edit, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the head's change [R, steps, d_v] from `starts` [R] on and the key sides after the last step."""
    moved, changes = torch.zeros_like(edit.left), []
    for step in range(steps):
        now = factors.at(edit.rows, starts + step)
        enters = (edit.positions == (starts + step)[:, None])[..., None]
        moved = now.transition(moved) + enters * edit.left
        seen = torch.where(enters & ~edit.reads_write[:, None, None], 0.0, moved)
        changes.append(((seen @ now.query[:, :, None]) * edit.right).sum(1))
    return torch.stack(changes, 1), moved


def _check_fits(factors: Factors, edit: Edit, starts: Tensor, steps: int) -> None:
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
    check_places(edit.rows, starts + steps - 1, factors.key)


def hidden_under(host: Host, run: Run, edits: Edits, steps: int, keep: bool = False) -> tuple[Tensor, list[Past]]:
    """Return the final hidden states [R, steps, D] of runs under edits, from each row's first edit in any
    cell on.

    They are differentiable in the sides of the edits. With `keep`, also the pasts after the last step, with
    edited states, of the lowest edited layer and of each layer above. Raises ValueError as `run_edited`."""
    rows, starts = _rows(edits), _starts(edits)
    lowest = min(layer for layer, _ in edits)
    heads = [head for layer, head in edits if layer == lowest]
    factors = {head: host.factors(run, lowest, head) for head in heads}
    for cell, edit in edits.items():
        host.check_cell(*cell)
        _check_fits(factors[heads[0]], edit, starts, steps)
    moves = [transport(factors[head], edits[lowest, head], starts, steps) for head in heads]
    change = torch.stack([change for change, _ in moves], 2)
    alter = alteration(host, edits, starts, steps)
    hidden, pasts = host.branch(run, lowest, heads, rows, starts, change, keep, alter)
    if keep:
        past = pasts[0]
        past.states, past.groups = past.state, None
        for head, (_, moved) in zip(heads, moves, strict=True):
            past.states[:, head] += (moved.mT @ edits[lowest, head].right).to(past.states.device)
    return hidden, pasts


def alteration(host: Host, edits: Edits, starts: Tensor, steps: int) -> Callable[[int, Record], None]:
    """Return a function that edits the record of a layer, for `Host.branch`.

    The record has one row per edited row, and begins at `starts` [R].
    """
    rows, begin, local = torch.arange(len(starts)), torch.zeros_like(starts), {}
    for cell, edit in edits.items():
        edit = replace(edit, rows=rows, positions=edit.positions - starts[:, None])
        local[cell] = Edit(*(x.to(host.device_of(cell[0])) for x in vars(edit).values()))

    def alter(layer: int, record: Record) -> None:
        heads = [head for edited, head in local if edited == layer]
        if not heads:
            return
        device = record.outputs.device
        start = begin.to(device)
        moves = [transport(host.cell_factors(record, head), local[layer, head], start, steps) for head in heads]
        change, places = torch.stack([change for change, _ in moves], 2), torch.tensor(heads, device=device)
        record.outputs = record.outputs.to(change.dtype).index_add(2, places, change)
        if record.end is not None:
            for head, (_, moved) in zip(heads, moves, strict=True):
                record.end[:, head] += moved.mT @ local[layer, head].right

    return alter


@torch_defaults()
def edited_hidden(host: Host, run: Run, layer: int, head: int, edit: Edit, steps: int) -> Tensor:
    """Return the final hidden states [R, steps, D] of edited runs, from each row's first edit on."""
    return hidden_under(host, run, {(layer, head): edit}, steps)[0]


def kl(native: Tensor, patched: Tensor) -> Tensor:
    """Return KL(native, patched) in nats over the last dimension of logits; in fp64, as it can be tiny."""
    p, q = F.log_softmax(native.double(), -1), F.log_softmax(patched.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


@torch_defaults()
def generate_under(host: Host, run: Run, edits: Edits, count: int) -> tuple[Tensor, Tensor]:
    """Return greedy continuations [R, count] of edited windows, and the logits [R, V] of the first new token.

    Raises ValueError for rows with different starting positions, and a count below 1.
    """
    rows, length = _rows(edits), run.tokens.shape[1]
    if count < 1 or not len(rows):
        raise ValueError(f"There is nothing to generate: {count} tokens for {len(rows)} rows were asked for.")
    starts = _starts(edits)
    if (starts != starts[0]).any():
        raise ValueError("Rows that generate together must start at one position: group them by position first.")
    final, pasts_above = hidden_under(host, run, edits, length - int(starts[0]), keep=True)
    end = torch.full_like(starts, length)
    below = run.records[: host.layers - len(pasts_above)]
    pasts = [host.past_at(record, rows, end) for record in below] + pasts_above
    first = host.logits(final[:, -1])
    return host.decode(pasts, first.argmax(-1), length, count - 1), first
