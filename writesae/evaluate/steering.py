"""Writes that raise the logit of a token at the end of a window: in one cell, in a layer, or in all cells.

To first order a write x w^T raises the logit by x^T Gamma w (writesae.shift). One backward pass has the Gamma
of every cell, and the best unit write of a cell is the top singular pair of its Gamma. Each write is as large
as the native one at its place, times a magnitude. Directions:

- paper:     the native key with the value W_O^T W_U[token] of the head (the paper's Sec. 4);
- gamma:     the top singular pairs in the native run;
- layerwise: going up the edited run, the pairs of each layer come from its own queries, keys and gates, and
             from the gradient through this layer at its edited input. Only the layers above are
             linearised at the native run, so that one backward pass of the model is enough;
- random:    Gaussian keys and values.

`refine` improves any of them by gradient steps that keep the sizes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import Edit, Edits, alteration, hidden_under, make_edit
from writesae.hosts.base import Host, Run, check_places
from writesae.hosts.past import Past, Record
from writesae.recurrence import Factors, torch_defaults

DIRECTIONS = ("paper", "gamma", "layerwise", "random")

Cell = tuple[int, int]  # layer, head


@dataclass
class Goal:
    """What R rows of writes are for: the logit of tokens[r] at the end of window rows[r].

    run: native. rows, tokens [R]. start: the position of the first of `writes` consecutive writes. write: the
    definition of the native write, whose norm is the unit of size.
    """

    run: Run
    rows: Tensor
    tokens: Tensor
    start: int
    writes: int
    write: str = "added"

    def __post_init__(self) -> None:
        if self.writes < 1:
            raise ValueError(f"A goal takes at least one write, not {self.writes}.")
        if self.rows.shape != self.tokens.shape:
            raise ValueError(f"A goal takes a token per row; got {len(self.tokens)} for {len(self.rows)} rows.")
        check_places(self.rows, torch.tensor([self.start, self.start + self.writes - 1]), self.run.tokens)

    @property
    def steps(self) -> int:
        """The number of tokens from the first write to the end of the window."""
        return self.run.tokens.shape[1] - self.start

    @property
    def starts(self) -> Tensor:
        return torch.full_like(self.rows, self.start)

    def part(self, which: Tensor) -> Goal:
        """Return the goal of some rows. which: their numbers, or bool [R]."""
        return replace(self, rows=self.rows[which], tokens=self.tokens[which])

    def sizes(self, host: Host, cell: Cell) -> Tensor:
        """Return the norms [R, writes] of the native writes of a cell."""
        places = self.start + torch.arange(self.writes)
        factors = host.factors(self.run, *cell).at(slice(None), places)
        return (factors.key.norm(dim=-1) * factors.write(self.write).norm(dim=-1))[self.rows]

    def edit(self, key: Tensor, value: Tensor, size: Tensor) -> Edit:
        """Return the edit: unit keys [R, writes, d_k] and values [R, writes, d_v], times size [R, writes]."""
        positions = (self.start + torch.arange(self.writes)).expand(len(self.rows), -1)
        return make_edit(self.rows, positions, key.to(size), (value * size[..., None]).to(size))


def directions(
    host: Host, goal: Goal, cells: Sequence[Cell], name: str, magnitude: float = 1.0, seed: int = 0
) -> Edits:
    """Return the edit of each cell in one of DIRECTIONS, `magnitude` native norms large; seed: of "random".

    Raises ValueError for another name, no cells, and cells that the host does not have.
    """
    if name not in DIRECTIONS:
        raise ValueError(f"There is no direction {name!r}: choose one of {', '.join(DIRECTIONS)}.")
    _lowest(host, cells)
    if name == "layerwise":
        return _layerwise(host, goal, cells, magnitude)
    if name == "gamma":
        pairs = {cell: pair[:2] for cell, pair in gamma_pairs(host, goal, cells).items()}
    elif name == "paper":
        pairs = {cell: _paper(host, goal, cell) for cell in cells}
    else:
        shape, generator = (len(goal.rows), goal.writes), torch.Generator().manual_seed(seed)
        pairs = {
            cell: tuple(F.normalize(torch.randn(*shape, d, generator=generator), dim=-1) for d in (host.d_k, host.d_v))
            for cell in cells
        }
    return {cell: goal.edit(*pair, magnitude * goal.sizes(host, cell)) for cell, pair in pairs.items()}


def _lowest(host: Host, cells: Sequence[Cell]) -> int:
    """Return the lowest layer of cells. Raises ValueError for none, and as `Host.check_cell`."""
    if not cells:
        raise ValueError("Writes that raise a logit need at least one cell.")
    for cell in cells:
        host.check_cell(*cell)
    return min(layer for layer, _ in cells)


def _paper(host: Host, goal: Goal, cell: Cell) -> tuple[Tensor, Tensor]:
    value = F.normalize(host.unembedding()[goal.tokens] @ host.output_projection(*cell), dim=-1)
    key = host.factors(goal.run, *cell).key[goal.rows, goal.start : goal.start + goal.writes]
    return F.normalize(key, dim=-1), value[:, None].expand(-1, goal.writes, -1)


def gamma_pairs(host: Host, goal: Goal, cells: Sequence[Cell]) -> dict[Cell, tuple[Tensor, Tensor, Tensor]]:
    """Return `top_pairs` of every cell in the native run, from one backward pass."""
    heads, _ = gradients_by_layer(host, goal, _lowest(host, cells))
    return {
        (layer, head): top_pairs(
            host.factors(goal.run, layer, head), goal.rows, goal.starts, heads[layer][:, :, head], goal.writes
        )
        for layer, head in cells
    }


def top_pairs(factors: Factors, rows: Tensor, starts: Tensor, gradient: Tensor, writes: int) -> tuple[Tensor, ...]:
    """Return the top singular pair of Gamma at the first `writes` positions from starts[r] of row rows[r] on.

    Its key [R, writes, d_k] and value [R, writes, d_v], and the singular value [R, writes]: the gain of the
    logit by a unit write, to first order. gradient: [R, steps, d_v], of the logit with respect to the head's
    output. Gamma is a sum over steps of (query, moved back) (gradient)^T: its pairs are of small matrices."""
    steps, queries = gradient.shape[1], []
    moved = gradient.new_zeros(len(rows), factors.query.shape[-1], steps)  # one column per query
    for step in reversed(range(steps)):
        if step + 1 < steps:
            moved = factors.at(rows, starts + step + 1).transition_transposed(moved)
        moved[:, :, step] = factors.query[rows, starts + step]
        queries.append(moved)
    left, of_queries = torch.linalg.qr(torch.stack(queries[::-1][:writes], 1))
    right, of_gradient = torch.linalg.qr(gradient.mT[:, None])
    u, sigma, vh = torch.linalg.svd(of_queries @ of_gradient.mT)
    return (left @ u[..., :1])[..., 0], (right @ vh[..., :1, :].mT)[..., 0], sigma[..., 0]


@torch_defaults(gradients=True)
def gradients_by_layer(host: Host, goal: Goal, lowest: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the gradients of each row's logit in the native run, by recurrent layer from `lowest` on.

    With respect to the outputs of the heads [R, steps, H, d_v] (on the CPU), and of the layers [R, steps, D].
    """
    with torch.enable_grad():
        ran = {layer: (record.outputs, output) for layer, record, output in _upward(host, goal, lowest)}
        layers = [layer for layer in ran if layer in host.recurrent_layers]
        wanted = [ran[layer][0] for layer in layers] + [ran[layer][1] for layer in layers]
        gradients = torch.autograd.grad(_chosen(host, goal, ran[host.layers - 1][1]), wanted)
    heads = {layer: gradient.cpu() for layer, gradient in zip(layers, gradients)}
    return heads, dict(zip(layers, gradients[len(layers) :]))


def _chosen(host: Host, goal: Goal, final: Tensor) -> Tensor:
    """Return the sum of the tokens' logits at the end of hidden states final [R, steps, D]."""
    return host.logits(final[:, -1]).gather(-1, goal.tokens[:, None].clone()).sum()


def _upward(
    host: Host, goal: Goal, lowest: int, change: Callable[[int, Record, Past], None] | None = None
) -> Iterator[tuple[int, Record, Tensor]]:
    """Run the layers from `lowest` on again; yield each layer, its record and its output [R, steps, D].

    change(layer, record, past): called between `mix` and `finish`; it may change the record's outputs.
    """
    positions = goal.starts[:, None] + torch.arange(goal.steps)
    hidden = goal.run.records[lowest].hidden[goal.rows[:, None], positions].requires_grad_()
    for layer in range(lowest, host.layers):
        past = host.past_at(goal.run.records[layer], goal.rows, goal.starts)
        past.last = True
        device = host.device_of(layer)
        record = host.mix(layer, hidden.to(device), past, positions.to(device))
        if change:
            change(layer, record, past)
        hidden = host.finish(layer, record, past)
        yield layer, record, hidden


@torch_defaults()
def _layerwise(host: Host, goal: Goal, cells: Sequence[Cell], magnitude: float) -> Edits:
    lowest, edits = _lowest(host, cells), {}
    _, above = gradients_by_layer(host, goal, lowest)
    rows, starts = torch.arange(len(goal.rows)), torch.zeros_like(goal.rows)

    def change(layer: int, record: Record, past: Past) -> None:
        here = [cell for cell in cells if cell[0] == layer]
        if not here:
            return
        with torch.enable_grad():
            outputs = record.outputs.detach().requires_grad_()
            output = host.finish(layer, replace(record, outputs=outputs), past)
            gradient = torch.autograd.grad(output, outputs, above[layer])[0].cpu()
        for cell in here:
            factors = host.cell_factors(record, cell[1]).to("cpu")
            key, value, _ = top_pairs(factors, rows, starts, gradient[:, :, cell[1]], goal.writes)
            edits[cell] = goal.edit(key, value, magnitude * goal.sizes(host, cell))
        alteration(host, {cell: edits[cell] for cell in here}, goal.starts, goal.steps)(layer, record)

    for _ in _upward(host, goal, lowest, change):
        pass
    return edits


@torch_defaults(gradients=True)
def ceilings(host: Host, goal: Goal, cells: Sequence[Cell]) -> dict[Cell, Tensor]:
    """Return the largest gain [R] of the logit over all writes of any size in each cell, from goal.start on.

    The norm behind the heads bounds what a head can add to the residual stream at a token: scale * n with
    ||n|| <= sqrt(d_v), whatever is written. This is exact. The path from there to the logit is linearised at
    the native run, so that runs can exceed the ceiling where it is curved. Each token has its own maximum.
    """
    inputs, hooks, lowest = {}, [], _lowest(host, cells)
    for layer in sorted({layer for layer, _ in cells}):
        keep = partial(_keep_input, inputs, layer, threading.get_ident())
        hooks.append(host.behind_heads(layer).register_forward_pre_hook(keep))
    try:
        with torch.enable_grad():
            ran = {layer: (record, output) for layer, record, output in _upward(host, goal, lowest)}
            gradients = torch.autograd.grad(_chosen(host, goal, ran[host.layers - 1][1]), list(inputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    gains = {layer: _largest_gains(host, layer, ran[layer][0], x) for layer, x in zip(inputs, gradients)}
    return {(layer, head): gains[layer][..., head].sum(1).cpu() for layer, head in cells}


def _keep_input(inputs: dict, layer: int, thread: int, _module, arguments: tuple) -> None:
    if threading.get_ident() == thread:  # another thread may run the same model
        inputs[layer] = arguments[0]


@torch_defaults()
def _largest_gains(host: Host, layer: int, record: Record, gradient: Tensor) -> Tensor:
    """Return the largest gain by each head at each token, [R, steps, H].

    gradient [R, steps, H d_v]: of the logit with respect to the input of `behind_heads`. Of the heads that
    share a norm, a large write in one shrinks the others: n = (c n_others, n_head), ||n||^2 <= m, c >= 0.
    """
    normed, scale = host.normed_heads(layer, record)
    slope = scale * gradient.unflatten(-1, (host.heads, -1))
    if host.norm_centres:
        slope = slope - slope.mean(-1, keepdim=True)
    of_heads = (slope * normed).sum(-1), normed.square().sum(-1), slope.norm(dim=-1)
    native, squares, by_head = (x.unflatten(2, (-1, host.normed_together)) for x in of_heads)
    others, size = native.sum(-1, keepdim=True) - native, (squares.sum(-1, keepdim=True) - squares).clamp(min=0).sqrt()
    by_others = (others / size.clamp(min=1e-12)).clamp(min=0)  # 0 for a head that has its norm alone
    reach = (host.normed_together * host.d_v) ** 0.5
    return (reach * torch.hypot(by_head, by_others) - native.sum(-1, keepdim=True)).flatten(2)


@torch_defaults(gradients=True)
def refine(host: Host, goal: Goal, edits: Edits, steps: int = 5, rate: float = 0.05) -> Edits:
    """Return edits of the same sizes in better directions: `steps` of Adam for the tokens' log-probability.

    The sides of the terms are unit vectors that Adam moves with learning rate `rate`. Raises ValueError for
    less than one step."""
    if steps < 1:
        raise ValueError(f"A refinement takes at least one step, not {steps}.")
    sizes = {cell: (edit.left.norm(dim=-1) * edit.right.norm(dim=-1))[..., None] for cell, edit in edits.items()}
    sides = {
        cell: [F.normalize(x, dim=-1).requires_grad_() for x in (edit.left, edit.right)] for cell, edit in edits.items()
    }

    def sized() -> Edits:
        unit = {cell: [F.normalize(x, dim=-1) for x in pair] for cell, pair in sides.items()}
        return {c: replace(edit, left=unit[c][0], right=unit[c][1] * sizes[c]) for c, edit in edits.items()}

    adam = torch.optim.Adam([x for pair in sides.values() for x in pair], lr=rate)
    for _ in range(steps):
        with torch.enable_grad():
            loss = F.cross_entropy(end_logits(host, goal, sized()), goal.tokens, reduction="sum")
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        return sized()


def end_logits(host: Host, goal: Goal, edits: Edits) -> Tensor:
    """Return the logits [R, V], fp32, at the ends of edited windows, differentiable in the sides of edits."""
    return host.logits(hidden_under(host, goal.run, edits, goal.steps)[0][:, -1])


def scaled(edits: Edits, factor: Tensor) -> Edits:
    """Return edits with each row's writes times factor [R]."""
    return {cell: replace(edit, right=edit.right * factor[:, None, None]) for cell, edit in edits.items()}


def part(edits: Edits, which: Tensor) -> Edits:
    """Return edits of some of their rows. which: their numbers, or bool [R]."""
    return {cell: edit.part(which) for cell, edit in edits.items()}
