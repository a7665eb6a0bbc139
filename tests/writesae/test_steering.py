"""Directions of installs against finite differences, full matrices and one-cell formulas."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import assert_close

from writesae.edit import edited_hidden, hidden_under
from writesae.evaluate.install import log_p
from writesae.evaluate.steering import (
    DIRECTIONS,
    Goal,
    ceilings,
    directions,
    end_logits,
    gamma_pairs,
    gradients_by_layer,
    part,
    refine,
    scaled,
)
from writesae.hosts.past import Past
from writesae.shift import direct_path, gamma, logit_gradient

CELLS = [(3, 1), (1, 2), (1, 0), (0, 3)]
START = 30


@pytest.fixture(scope="module")
def goal(host, tokens):
    run = host.run(tokens[:, :36])
    return Goal(run, torch.tensor([2, 0, 1, 2]), torch.tensor([7, 100, 250, 30]), START, 3)


def last_logit(host, goal, edits):
    hidden, _ = hidden_under(host, goal.run, edits, goal.steps)
    return host.unembed(hidden[:, -1]).gather(-1, goal.tokens[:, None])[:, 0]  # fp64


def test_one_backward_has_the_gradients_of_every_cell(host, goal):
    heads, _ = gradients_by_layer(host, goal, 0)
    for layer, head in host.cells:
        one, _ = logit_gradient(host, goal.run, layer, head, goal.rows, goal.starts, goal.steps, goal.tokens)
        assert_close(heads[layer][:, :, head], one, f"gradient of {layer}.{head}", 1e-5)


def test_pairs_are_the_top_singular_pairs_of_gamma(host, goal):
    pairs, _ = gamma_pairs(host, goal, host.cells), torch.manual_seed(0)
    heads, _ = gradients_by_layer(host, goal, 0)
    for layer, head in host.cells:
        key, value, gain = pairs[layer, head]
        factors = host.factors(goal.run, layer, head)
        whole = gamma(factors, goal.rows, goal.starts, heads[layer][:, :, head])[:, :3]
        assert_close(gain, torch.linalg.svdvals(whole)[..., 0], "singular value", 1e-9)
        assert_close(torch.einsum("rwk,rwkv,rwv->rw", key, whole, value), gain, "gain of the pair", 1e-9)
        assert_close(key.norm(dim=-1), torch.ones(4, 3), "norm of the key", 1e-6)


def test_gamma_predicts_small_writes_in_all_cells(host, goal):
    """The sum of the cells' gains against central differences of runs that are edited in all of them."""
    pairs, sizes = gamma_pairs(host, goal, CELLS), {cell: goal.sizes(host, cell) for cell in CELLS}
    predicted = sum((pairs[cell][2] * sizes[cell]).sum(1) for cell in CELLS)
    edits, small = directions(host, goal, CELLS, "gamma"), torch.full((4,), 1e-5).double()
    ahead, behind = (last_logit(host, goal, scaled(edits, sign * small)) for sign in (1, -1))
    assert_close((ahead - behind) / 2e-5, predicted, "change of the logit", 1e-4)
    other = directions(host, goal, CELLS, "random", seed=3)
    ahead, behind = (last_logit(host, goal, scaled(other, sign * small)) for sign in (1, -1))
    assert ((ahead - behind) / 2e-5 < predicted).all()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_writes_have_the_native_sizes_and_places(host, goal, name):
    edits = directions(host, goal, CELLS, name, 0.3)
    assert set(edits) == set(CELLS)
    for cell, edit in edits.items():
        factors = host.factors(goal.run, *cell)
        for row, window in enumerate(goal.rows):
            for write in range(3):
                native = torch.outer(factors.key[window, START + write], factors.added[window, START + write])
                ours = torch.outer(edit.left[row, write], edit.right[row, write])
                assert_close(ours.norm(), 0.3 * native.norm(), "size", 1e-6)
        assert edit.positions.tolist() == [[30, 31, 32]] * 4
    if name == "random":
        assert not torch.equal(directions(host, goal, CELLS, name, seed=1)[CELLS[0]].left, edits[CELLS[0]].left)


def test_the_papers_direction_is_its_formula(host, goal):
    (cell, edit), *_ = directions(host, goal, CELLS, "paper").items()
    direct = direct_path(host, *cell, torch.eye(host.d_v), goal.tokens)
    assert_close(
        edit.right[:, 1] / edit.right[:, 1].norm(dim=-1, keepdim=True),
        direct / direct.norm(dim=1)[:, None],
        "value",
        1e-6,
    )
    key = host.factors(goal.run, *cell).key[goal.rows, 31]
    assert_close(edit.left[:, 1], unit(key), "key", 1e-9)


def test_layerwise_directions_in_one_layer_are_those_of_gamma(host, goal):
    cells = [(1, 2), (1, 0)]
    ours, theirs = (directions(host, goal, cells, name) for name in ("layerwise", "gamma"))
    assert_close(last_logit(host, goal, ours), last_logit(host, goal, theirs), "logit", 1e-9)


def test_layerwise_directions_are_those_of_gamma_in_the_run_edited_below(host, goal):
    """In a layer above, with the layers above it linearised at the native run: by finite differences."""
    edits = directions(host, goal, CELLS, "layerwise", 2.0)
    below, top = {cell: edit for cell, edit in edits.items() if cell[0] < 3}, (3, 1)
    _, above = gradients_by_layer(host, goal, 0)

    def local(edits):
        """The layer's output under edits times the gradient of the native run there."""
        kept, finish = {}, host.finish
        host.finish = lambda layer, record, past: kept.setdefault(layer, finish(layer, record, past))
        try:
            hidden_under(host, goal.run, edits, goal.steps)
        finally:
            del host.finish
        return (kept[3] * above[3]).sum((1, 2))

    def slope(edit, size=1e-5):
        ahead, behind = (local(below | {top: replace(edit, right=sign * size * edit.right)}) for sign in (1, -1))
        return (ahead - behind) / (2 * size)

    best = slope(edits[top])
    for seed in range(3):
        other = directions(host, goal, [top], "random", 2.0, seed)[top]
        mixed = replace(edits[top], left=unit(edits[top].left + 0.3 * other.left))
        assert (slope(mixed) < best).all()
        turned = replace(
            edits[top], right=unit(unit(edits[top].right) + 0.3 * unit(other.right)) * norm(edits[top].right)
        )
        assert (slope(turned) < best).all()
    native = slope(directions(host, goal, [top], "gamma", 2.0)[top])
    assert (native < best).all()


def norm(x):
    return x.norm(dim=-1, keepdim=True)


def unit(x):
    return x / norm(x)


def test_a_refinement_raises_the_log_probability_and_keeps_the_sizes(host, goal):
    for name in ("gamma", "random"):
        edits = directions(host, goal, CELLS, name, 0.5)
        better = refine(host, goal, edits, steps=4)
        before, after = (log_p(end_logits(host, goal, x), goal.tokens) for x in (edits, better))
        assert (after > before).all()
        for cell in CELLS:
            old, new = (norm(x[cell].left) * norm(x[cell].right) for x in (edits, better))
            assert_close(new, old, "size", 1e-9)
            assert (better[cell].left - edits[cell].left).norm() > 1e-3


def test_rows_are_refined_apart(host, goal):
    edits, few = directions(host, goal, CELLS[:2], "gamma"), torch.tensor([3, 1])
    whole, some = refine(host, goal, edits, 2), refine(host, goal.part(few), part(edits, few), 2)
    for cell in CELLS[:2]:
        assert_close(some[cell].right, whole[cell].right[few], f"row of {cell}", 1e-6)


def test_one_cell_is_the_one_cell_path(host, goal):
    edits = directions(host, goal, [(1, 2)], "gamma", 3.0)
    logits = host.logits(edited_hidden(host, goal.run, 1, 2, edits[1, 2], goal.steps)[:, -1])
    assert torch.equal(end_logits(host, goal, edits), logits)


# The ceiling of a cell


def projected(host, layer, record, outputs):
    """What the output projection of a layer reads if its heads give these outputs."""
    seen = []
    hook = host.behind_heads(layer).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    windows = {name: torch.zeros_like(x[:, :reach]) for name, (x, reach) in record.windows.items()}
    host.finish(
        layer, replace(record, outputs=outputs), Past(windows=windows | dict(ffn=record.hidden[:, :1, : width(host)]))
    )
    hook.remove()
    return seen[0].unflatten(-1, (host.heads, -1))


def width(host):
    return host.unembedding().shape[1]


def test_normed_heads_are_what_the_output_projection_reads(host, goal):
    for layer in host.recurrent_layers:
        record, generator = goal.run.records[layer], torch.Generator().manual_seed(layer)
        outputs = 30 * torch.randn(record.outputs.shape, generator=generator).double()
        normed, scale = host.normed_heads(layer, record)
        larger, same = host.normed_heads(layer, replace(record, outputs=outputs))
        change = projected(host, layer, record, outputs) - projected(host, layer, record, record.outputs)
        assert_close(scale * (larger - normed), change, "change of what is read", 1e-9)
        assert_close(same, scale, "factor", 1e-12)
        together = larger.unflatten(2, (-1, host.normed_together))
        assert together.square().mean((-1, -2)).max() <= 1 + 1e-9
        assert larger.mean(-1).abs().max() < 1e-9 or not host.norm_centres


def test_a_ceiling_is_the_largest_gain_of_the_linearised_rest(host, goal):
    """Outputs of one head in the best direction reach it at some size, and no others exceed it."""
    (layer, head), steps = (1, 2), goal.steps
    ceiling = ceilings(host, goal, [(layer, head)])[layer, head]
    whole = ceilings(host, goal, host.cells)[layer, head]
    assert_close(whole, ceiling, "ceiling beside all other cells", 1e-6)
    places = goal.rows[:, None], START + torch.arange(steps)
    record = goal.run.records[layer]
    parts = {name: x[places] for name, x in record.beside.items()}
    record = replace(record, hidden=record.hidden[places], outputs=record.outputs[places], beside=parts, windows={})
    zero = torch.zeros(4, steps, host.heads, host.d_v, dtype=torch.float64, requires_grad=True)
    seen = []
    hook = host.behind_heads(layer).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    final, _ = host.branch(goal.run, layer, list(range(host.heads)), goal.rows, goal.starts, zero)
    hook.remove()
    chosen = host.unembed(final[:, -1]).gather(-1, goal.tokens[:, None])
    (slope,) = torch.autograd.grad(chosen.sum(), seen[0])
    normed, scale = host.normed_heads(layer, record)

    def gain(outputs):
        changed = record.outputs.clone()
        changed[:, :, head] = outputs
        moved, _ = host.normed_heads(layer, replace(record, outputs=changed))
        return (slope.unflatten(-1, (host.heads, -1)) * scale * (moved - normed)).sum((2, 3))

    signs = torch.ones(host.d_v).double()
    signs[::2] = -1
    changed = record.outputs.clone()
    changed[:, :, head] = signs
    gate = host.normed_heads(layer, replace(record, outputs=changed))[0][:, :, head] * signs  # 1, or Mamba-2's gate
    best = (scale * slope.unflatten(-1, (host.heads, -1)))[:, :, head] / gate
    gains = torch.stack([gain(size * best) for size in 10 ** torch.linspace(-6, 6, 301)])
    assert_close(gains.max(0).values.sum(1), ceiling, "largest gain", 1e-3)
    generator = torch.Generator().manual_seed(2)
    for size in 10 ** torch.linspace(-2, 2, 60):
        near = best / best.norm(dim=-1, keepdim=True) + 0.2 * torch.randn(best.shape, generator=generator).double()
        assert (gain(size * near).sum(1) < ceiling).all()


def test_ceilings_that_another_thread_computes_do_not_interfere(gated_deltanet, tokens):
    host, run = gated_deltanet, gated_deltanet.run(tokens[:, :36])
    aims = [Goal(run, torch.tensor([row]), torch.tensor([7 + row]), START, 3) for row in (0, 1)]
    wanted = [ceilings(host, aim, host.cells) for aim in aims]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            both = pool.map(lambda aim: ceilings(host, aim, host.cells), aims)
            for got, alone in zip(both, wanted, strict=True):
                for cell in host.cells:
                    assert_close(got[cell], alone[cell], "ceiling", 1e-9)
