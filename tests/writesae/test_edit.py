"""Edits against the library's model with its recurrence operator replaced, and against finite differences."""

import types

import pytest
import torch
from helpers import EDIT_PLACES, EDITED_CELLS, assert_close, several_edits, stepped_logits

from writesae.edit import (
    Edit,
    edited_hidden,
    generate_under,
    head_change,
    hidden_under,
    kl,
    make_edit,
    run_edited,
)
from writesae.recurrence import step_states

LAYER, HEAD = 1, 2


def model_with_edit(host, tokens, position, delta, scope):
    """Logits of the library's model when one head's state is changed by delta [d_k, d_v] at `position`.
    The edited layer runs a step loop inside the library's own forward, so this run is independent of ours."""
    mixer = host.blocks[LAYER].linear_attn

    def stepped(query, key, value, g, beta, **_):
        from writesae.hosts.layers import unit

        groups = value.shape[2] // key.shape[2]
        query, key = (unit(x).repeat_interleave(groups, 2) for x in (query, key))
        state = value.new_zeros(*value.shape[:1], value.shape[2], key.shape[-1], value.shape[-1])
        outputs = []
        for t in range(value.shape[1]):
            state = g[:, t].exp()[..., None, None] * state
            written = beta[:, t, :, None] * (value[:, t] - (state.mT @ key[:, t, :, :, None])[..., 0])
            state = state + key[:, t, :, :, None] * written[..., None, :]
            edited = state.clone()
            if t == position:
                edited[:, HEAD] += delta
            read = state if t == position and scope == "cache" else edited
            outputs.append((read.mT @ query[:, t, :, :, None])[..., 0] * key.shape[-1] ** -0.5)
            state = edited
        return torch.stack(outputs, 1), None

    forward = type(mixer).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    names = dict(torch_chunk_gated_delta_rule=stepped, torch_recurrent_gated_delta_rule=stepped)
    mine = types.FunctionType(
        forward.__code__, {**forward.__globals__, **names}, "forward", forward.__defaults__, forward.__closure__
    )
    mine.__kwdefaults__ = forward.__kwdefaults__
    mixer.forward = types.MethodType(mine, mixer)
    try:
        with torch.no_grad():
            return host.model(input_ids=tokens, use_cache=False).logits
    finally:
        del mixer.forward


@pytest.mark.parametrize("scope", ["write", "cache"])
@pytest.mark.parametrize("position", [0, 37, 88])
def test_an_edit_is_the_librarys_run_with_the_state_changed(gated_deltanet, tokens, scope, position):
    host = gated_deltanet
    torch.manual_seed(position)
    left = torch.randn(1, 2, host.d_k, dtype=torch.float64)
    right = torch.randn(1, 2, host.d_v, dtype=torch.float64)
    steps = min(12, tokens.shape[1] - position)
    edit = make_edit(torch.tensor([1]), torch.tensor([position]), left, right, scope)
    run = host.run(tokens)
    ours = host.logits(edited_hidden(host, run, LAYER, HEAD, edit, steps))[0]
    theirs = model_with_edit(host, tokens[1:2], position, left[0].T @ right[0], scope)[0, position : position + steps]
    native = host.logits(run.final[1, position : position + steps])
    assert_close(ours - native, theirs.float() - native, "change of the logits", 2e-4)
    assert (ours[1:] - native[1:]).norm() > 1e-3


@pytest.mark.parametrize("amount", [1.0, 0.5])
def test_own_write_put_back_changes_nothing(host, run, amount):
    factors = host.factors(run, LAYER, HEAD)
    rows, position = torch.tensor([0, 1, 2]), torch.tensor([10, 40, 85])
    key, write = factors.key[rows, position][:, None], factors.write("added")[rows, position][:, None]
    edit = make_edit(rows, position, torch.cat([key, key], 1), torch.cat([-write, amount * write], 1))
    final = edited_hidden(host, run, LAYER, HEAD, edit, 5)
    native = torch.stack([run.final[r, p : p + 5] for r, p in zip(rows, position, strict=True)])
    if amount == 1.0:
        assert_close(final, native, "own write put back", 1e-10)
    else:
        assert (final - native).norm() > 1e-4 * native.norm()


def test_head_change_is_the_perturbed_step_loop(host, run):
    """An edit with two terms at two positions of one row, against a step loop with the perturbed state."""
    factors = host.factors(run, LAYER, HEAD)
    one = factors.at(slice(0, 1))
    left, right = torch.randn(1, 2, host.d_k).double(), torch.randn(1, 2, host.d_v).double()
    edit = Edit(torch.tensor([0]), torch.tensor([[20, 23]]), left, right, torch.tensor([True]))
    change, moved = head_change(factors, edit, 10)
    native, state, read = step_states(one), None, []
    for t in range(20, 30):
        before = native[:, t - 1] if t == 20 else state
        state = step_states(one.at(slice(None), slice(t, t + 1)), before)[:, 0]
        for term, position in enumerate((20, 23)):
            if t == position:
                state = state + left[:, term, :, None] * right[:, term, None]
        read.append(((state - native[:, t]).mT @ one.query[:, t, :, None])[..., 0])
    assert_close(change, torch.stack(read, 1), "change of the head", 1e-10)
    assert_close(moved.mT @ right, state - native[:, 29], "perturbation of the state", 1e-10)


def test_the_effective_write_taken_out_leaves_the_decayed_state(gated_deltanet, tokens):
    host = gated_deltanet
    run = host.run(tokens)
    factors = host.factors(run, LAYER, HEAD)
    at, rows = torch.tensor([50]), torch.tensor([2])
    edit = make_edit(rows, at, factors.key[rows, at][:, None], -factors.write("effective")[rows, at][:, None])
    change, _ = head_change(factors, edit, 1)
    states = step_states(factors.at(slice(2, 3)))[0]
    decayed = factors.log_decay[2, 50].exp() * states[49]
    wanted = decayed.T @ factors.query[2, 50] - states[50].T @ factors.query[2, 50]
    assert_close(change[0, 0], wanted, "output change", 1e-10)


def test_rows_have_their_own_position_and_scope(host, run):
    left, right = torch.randn(3, 1, host.d_k).double(), torch.randn(3, 1, host.d_v).double()
    rows, position = torch.tensor([0, 2, 2]), torch.tensor([5, 60, 60])
    both = Edit(rows, position[:, None], left, right, torch.tensor([True, False, True]))
    together = edited_hidden(host, run, LAYER, HEAD, both, 4)
    for i, scope in enumerate(("write", "cache", "write")):
        alone = make_edit(rows[i : i + 1], position[i : i + 1], left[i : i + 1], right[i : i + 1], scope)
        assert_close(together[i : i + 1], edited_hidden(host, run, LAYER, HEAD, alone, 4), f"row {i}", 1e-12)
    assert_close(together[1, 0], run.final[2, 60], "scope cache: the writing token itself", 1e-12)


@pytest.mark.parametrize("position", [59, 50])
def test_generation_goes_on_from_the_edited_state(host, tokens, position):
    """Against one edited run over prompt and continuation; position 59 is the prompt's last token."""
    prompt = tokens[:, :60]
    run = host.run(prompt)
    left, right = torch.randn(3, 1, host.d_k).double(), 20 * torch.randn(3, 1, host.d_v).double()
    rows, at = torch.arange(3), torch.full((3,), position)
    made, first = generate_under(host, run, {(LAYER, HEAD): make_edit(rows, at, left, right)}, 6)
    longer = torch.cat([prompt, made], 1)
    final = edited_hidden(host, host.run(longer), LAYER, HEAD, make_edit(rows, at, left, right), 66 - position)
    predicted = host.logits(final).argmax(-1)[:, 59 - position : -1]
    assert torch.equal(predicted, made)
    assert_close(host.logits(final)[:, 59 - position], first, "logits of the first new token", 1e-6)
    _, native = generate_under(host, run, {(LAYER, HEAD): make_edit(rows, at, left, 0 * right)}, 6)
    assert (first - native).norm() > 1e-2


# Several cells at once


@pytest.mark.parametrize("scope", ["write", "cache"])
def test_edits_of_several_cells_are_a_step_loop(host, tokens, run, scope):
    edits = several_edits(host, EDIT_PLACES, scope)
    starts = [40, 20, 69]
    ours = host.unembed(hidden_under(host, run, edits, 8)[0])
    for row, start in enumerate(starts):
        wanted = stepped_logits(host, tokens, edits, row, start, 8)
        native = host.unembed(run.final[row, start : start + 8])
        assert_close(ours[row] - native, wanted - native, f"change of the logits of row {row}", 1e-9)
        assert (wanted - native).norm() > 0.1
    front = run_edited(host, tokens, edits, steps=8)
    assert_close(front, ours.float(), "logits of run_edited", 1e-5)


def test_edits_above_an_edit_are_moved_by_the_edited_run(host, run):
    """With the native queries and keys above, the answer is another one; the order of cells does not matter."""
    edits = several_edits(host, EDIT_PLACES)
    together, _ = hidden_under(host, run, edits, 8)
    turned, _ = hidden_under(host, run, dict(reversed(edits.items())), 8)
    assert_close(turned, together, "other order of cells", 1e-12)
    rows, starts, moves = torch.arange(3), torch.tensor([40, 20, 69]), {}
    for cell, edit in edits.items():
        padded = make_edit(rows, torch.cat([edit.positions, starts[:, None]], 1), *both_sides_padded(edit))
        moves[cell] = head_change(host.factors(run, *cell), padded, 8)[0]

    def native_moves(layer, record):
        for (edited, head), change in moves.items():
            if edited == layer:
                record.outputs[:, :, head] += change

    lowest = torch.stack([moves[1, 2], moves[1, 0]], 2)
    wrong, _ = host.branch(run, 1, [2, 0], rows, starts, lowest, alter=native_moves)
    assert (wrong - together).norm() > 1e-3 * together.norm()


def both_sides_padded(edit):
    """The sides of an edit, with a third term that is zero."""
    return (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (edit.left, edit.right))


def test_an_edit_of_one_cell_has_the_same_bits_in_both_forms(host, run, tokens):
    cell, edit = next(iter(several_edits(host, EDIT_PLACES).items()))
    one = edited_hidden(host, run, *cell, edit, 8)
    assert torch.equal(one, hidden_under(host, run, {cell: edit}, 8)[0])
    named = run_edited(host, tokens, edit, layer=cell[0], head=cell[1], steps=8)
    assert torch.equal(named, run_edited(host, tokens, {cell: edit}, steps=8))
    zeros = {other: make_edit(edit.rows, edit.positions, edit.left, 0 * edit.right) for other in EDITED_CELLS}
    beside, _ = hidden_under(host, run, zeros | {cell: edit}, 8)
    assert_close(beside, one, "other cells with edits of zero", 1e-12)


def test_generation_goes_on_from_all_edited_states(host, tokens):
    """Against one edited run over prompt and continuation."""
    prompt = tokens[:, :60]
    places = [[[50, 51]] * 3, [[52, 50]] * 3, [[59, 50]] * 3, [[51, 53]] * 3]
    edits = several_edits(host, places, size=6.0)
    made, first = generate_under(host, host.run(prompt), edits, 6)
    final, _ = hidden_under(host, host.run(torch.cat([prompt, made], 1)), edits, 16)
    assert torch.equal(host.logits(final).argmax(-1)[:, 9:-1], made)
    assert_close(host.logits(final)[:, 9], first, "logits of the first new token", 1e-6)


def test_generation_refuses_rows_of_different_starts(host, run):
    edit = make_edit(
        torch.tensor([0, 1]), torch.tensor([3, 4]), torch.ones(2, 1, 12).double(), torch.ones(2, 1, 20).double()
    )
    with pytest.raises(ValueError, match="must start at one position"):
        generate_under(host, run, {(LAYER, HEAD): edit}, 2)


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="no read scope 'later'"):
        make_edit(torch.tensor([0]), torch.tensor([3]), torch.ones(1, 1, 12), torch.ones(1, 1, 20), "later")


def test_kl_is_scipys():
    from scipy.special import rel_entr, softmax

    a, b = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    wanted = rel_entr(softmax(a.numpy(), -1), softmax(b.numpy(), -1)).sum(-1)
    assert_close(kl(a, b), torch.from_numpy(wanted), "KL", 1e-10)
