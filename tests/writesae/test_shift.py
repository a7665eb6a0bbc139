"""Each predictor against its definition: edited runs, finite differences and brute force."""

import numpy as np
import pytest
import torch
from helpers import assert_close

import writesae.shift as predictors
from writesae.edit import edited_hidden, kl, make_edit
from writesae.recurrence import step_states
from writesae.shift import (
    cache_gamma,
    direct_path,
    gamma,
    gradients,
    logit_gradient,
    predict_kl,
    predict_shift,
    reads,
)

LAYER, HEAD = 1, 2
ROWS, T0, STEPS = torch.tensor([0, 1, 2]), torch.tensor([20, 50, 70]), 6


def atoms(host, count=5):
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize
    return unit(torch.randn(count, host.d_k).double(), dim=-1), unit(torch.randn(count, host.d_v).double(), dim=-1)


def measured(host, run, key, value, token, size, scope):
    """Shifts [R, n] of the logit of token[r] at T0 + STEPS, as central differences of edited runs.
    `size` is large enough for the fp32 inside the library's norms."""
    n = len(key)
    shifts = []
    for sign in (size, -size):
        edit = make_edit(
            ROWS.repeat_interleave(n),
            T0.repeat_interleave(n),
            key.repeat(len(ROWS), 1)[:, None],
            sign * value.repeat(len(ROWS), 1)[:, None],
            scope,
        )
        final = edited_hidden(host, run, LAYER, HEAD, edit, STEPS + 1)[:, -1]
        logits = host.unembed(final)  # fp64; host.logits would give fp32
        shifts.append(logits.gather(-1, token.repeat_interleave(n)[:, None])[:, 0].view(len(ROWS), n))
    return (shifts[0] - shifts[1]) / (2 * size)


@pytest.mark.parametrize("scope", ["write", "cache"])
def test_gamma_is_the_derivative_of_edited_runs(host, run, scope):
    key, value = atoms(host)
    token, factors = torch.tensor([7, 100, 250]), host.factors(run, LAYER, HEAD)
    if scope == "write":
        gradient, _ = logit_gradient(host, run, LAYER, HEAD, ROWS, T0, STEPS + 1, token)
        influence = gamma(factors, ROWS, T0, gradient)[:, 0]
    else:
        gradient, _ = logit_gradient(host, run, LAYER, HEAD, ROWS, T0 + 1, STEPS, token)
        influence = cache_gamma(factors, ROWS, T0, gradient)
    predicted = torch.einsum("nk,rkv,nv->rn", key, influence.double(), value)
    assert_close(predicted, measured(host, run, key, value, token, 5e-4, scope), f"shift, scope {scope}", 3e-4)


def test_gamma_at_later_positions_is_gamma_from_there(host, run):
    token, factors = torch.tensor([7, 100, 250]), host.factors(run, LAYER, HEAD)
    gradient, _ = logit_gradient(host, run, LAYER, HEAD, ROWS, T0, STEPS, token)
    later, _ = logit_gradient(host, run, LAYER, HEAD, ROWS, T0 + 2, STEPS - 2, token)
    assert_close(gamma(factors, ROWS, T0, gradient)[:, 2], gamma(factors, ROWS, T0 + 2, later)[:, 0], "Gamma", 1e-6)


TOKENS, PLACE = torch.tensor([7, 100, 250]), dict(layer=LAYER, head=HEAD, steps=STEPS)


def write(host, size, scope="write"):
    """An edit of three rows with two terms, of different positions, of the given size."""
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(3, 2, d, generator=generator).double() for d in (host.d_k, host.d_v))
    unit = torch.nn.functional.normalize
    return make_edit(ROWS, torch.stack([T0, T0 + 2], 1), unit(left, dim=-1), size * unit(right, dim=-1), scope)


def predicted(host, tokens, edit, **options):
    return predict_shift(host, tokens, edit, TOKENS, **PLACE, **options)


def shift(host, run, edit):
    """The measured shift [R] of TOKENS, in fp64."""
    final = edited_hidden(host, run, LAYER, HEAD, edit, STEPS)[:, -1]
    return (host.unembed(final) - host.unembed(run.final[ROWS, T0 + STEPS - 1])).gather(-1, TOKENS[:, None])[:, 0]


def read_change(factors, edit):
    """The change [R, STEPS, d_v] of the head's output, by step loops over whole states with and without the edit."""
    changes = []
    for r, t0 in zip(ROWS, T0, strict=True):
        now = factors.at(slice(r, r + 1), slice(t0, t0 + STEPS))
        dense = torch.zeros(1, factors.key.shape[-1], factors.added.shape[-1], dtype=torch.float64)
        states, outputs = [dense, dense], []
        for step in range(STEPS):
            one = now.at(slice(None), slice(step, step + 1))
            states = [step_states(one, state)[:, -1] for state in states]
            entering = (edit.positions[r] == t0 + step)[:, None] * edit.left[r]
            edited = states[1] + torch.einsum("jk,jv->kv", entering, edit.right[r])
            seen = torch.where(edit.reads_write[r], edited, states[1]) - states[0]
            outputs.append(torch.einsum("k,kv->v", one.query[0, 0], seen[0]))
            states[1] = edited
        changes.append(torch.stack(outputs))
    return torch.stack(changes)


@pytest.mark.parametrize("scope", ["write", "cache"])
def test_through_the_layer_is_the_slope_of_the_layers_above(host, run, tokens, scope):
    """The layer's output with the change from step loops, and central differences along that output's change."""
    edit = write(host, 3.0, scope)
    at = run, LAYER, HEAD, ROWS, T0
    change = read_change(host.factors(run, LAYER, HEAD), edit)
    native, edited = (host.edited_layer(*at, x)[0] for x in (0 * change, change))

    def logits(amount):
        final, _ = host.layers_above(run, LAYER, ROWS, T0, native + amount * (edited - native))
        return host.unembed(final[:, -1]).gather(-1, TOKENS[:, None])[:, 0]

    slope = (logits(1e-5) - logits(-1e-5)) / 2e-5
    assert_close(predicted(host, tokens, edit, by="through_layer"), slope, "shift through the layer", 1e-7)


def test_through_the_layer_is_of_second_order_and_first_order_in_the_limit(host, run, tokens, monkeypatch):
    """The error is a quarter at half the size; so is the difference to the first-order form."""
    monkeypatch.setattr(host, "logits", host.unembed)  # in fp64
    edits = [write(host, size) for size in (1e-4, 5e-5)]
    names = "through_layer", "through_norm", "exact"
    layer, norm, exact = ([predicted(host, tokens, edit, by=by) for edit in edits] for by in names)
    measured = [shift(host, run, edit) for edit in edits]
    for ours, other in ((layer, measured), (layer, exact), (norm, measured), (norm, exact)):
        assert_close(ours[1], other[1], "shift", 1e-2)
        errors = [(a - b).norm() for a, b in zip(ours, other, strict=True)]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_through_the_layer_is_exact_where_all_above_is_linear(host, tokens, monkeypatch, size):
    """The edited layer is made the last one, and the final norm is left out: then only the layer is not linear."""
    monkeypatch.setattr(host, "layers", LAYER + 1)
    monkeypatch.setattr(host, "unembed", lambda final: final @ host.unembedding().double().T)
    edit, run = write(host, size), host.run(tokens)
    measured, ours = shift(host, run, edit), predicted(host, tokens, edit)
    assert_close(ours, measured, "shift through the layer", 1e-6)
    assert (predicted(host, tokens, edit, by="exact") - measured).norm() > 1e-4 * measured.norm()


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_through_the_norm_is_exact_in_the_last_layer(host, tokens, monkeypatch, size):
    """The edited layer is made the last one: only the final norm is above it. The KL is exact too."""
    monkeypatch.setattr(host, "layers", LAYER + 1)
    edit, run = write(host, size), host.run(tokens)
    measured = shift(host, run, edit)
    ours = predicted(host, tokens, edit, by="through_norm")
    assert_close(ours, measured, "shift through the norm", 2e-4)
    inexact = (predicted(host, tokens, edit) - measured).norm()
    assert inexact > 1e-4 * measured.norm() and inexact > 5 * (ours - measured).norm()
    last = edited_hidden(host, run, LAYER, HEAD, edit, STEPS)[:, -1]
    divergence = kl(host.logits(run.final[ROWS, T0 + STEPS - 1]), host.logits(last))
    assert_close(predict_kl(host, tokens, edit, **PLACE), divergence, "KL", 1e-3)


def test_the_last_hidden_state_is_the_least_that_fits_the_readings(host, run):
    """Against lstsq of numpy, for rows in another order than those of the gradients, and some of the readings."""
    at = run, LAYER, HEAD, ROWS, T0
    slopes = gradients(host, *at, STEPS, lambda logits: logits[:, [7, 100, 250]])
    rows, change = torch.tensor([2, 0, 2, 1]), read_change(host.factors(run, LAYER, HEAD), write(host, 3.0))
    edited, _ = host.edited_layer(run, LAYER, HEAD, ROWS[rows], T0[rows], change[rows])
    wanted, readings = slopes.through_layer(edited, rows), [0, 2]
    last, moved = slopes.last_hidden(edited, rows, readings), edited - slopes.output[rows]
    for i, row in enumerate(rows):
        native, carried = run.final[row, T0[row] + STEPS - 1], moved[i, -1, : host.model.config.hidden_size]
        left, right = slopes.last[row, readings], wanted[i, readings]
        least = np.linalg.lstsq(left.numpy(), (right - left @ carried).numpy(), rcond=None)[0]
        assert_close(last[i] - native, carried + torch.tensor(least), "change of the last hidden state", 1e-6)


def test_a_kl_from_as_many_readings_as_dimensions_is_that_of_a_small_edit(gated_deltanet, tokens):
    host, run = gated_deltanet, gated_deltanet.run(tokens)
    edit = write(host, 0.002)
    final = edited_hidden(host, run, LAYER, HEAD, edit, STEPS)[:, -1]
    measured = kl(host.logits(run.final[ROWS, T0 + STEPS - 1]), host.logits(final))
    few, all_of_them = (predict_kl(host, tokens, edit, **PLACE, readings=count) for count in (1, 48))
    assert_close(all_of_them, measured, "KL", 0.03)
    assert (few - measured).norm() > (all_of_them - measured).norm()


def test_a_kl_needs_a_reading(gated_deltanet, tokens):
    with pytest.raises(ValueError, match="from 1 to 300 readings, not from 0"):
        predict_kl(gated_deltanet, tokens, write(gated_deltanet, 1.0), **PLACE, readings=0)


def test_through_the_layer_is_the_default(gated_deltanet, tokens):
    edit = write(gated_deltanet, 1.0)
    ours = predicted(gated_deltanet, tokens, edit)
    named, exact = (predicted(gated_deltanet, tokens, edit, by=by) for by in ("through_layer", "exact"))
    assert torch.equal(ours, named) and (ours - exact).norm() > 1e-3


def test_native_logits_come_with_the_gradient(host, run):
    _, logits = logit_gradient(host, run, LAYER, HEAD, ROWS, T0, STEPS, torch.tensor([1, 2, 3]))
    assert_close(logits, host.logits(run.final[ROWS, T0 + STEPS - 1]), "native logits", 1e-6)


def test_transport_reads_are_perturbed_step_loops(host, run):
    key, _ = atoms(host)
    factors = host.factors(run, LAYER, HEAD)
    by_decay, by_transport = reads(factors, ROWS, T0, STEPS, key)
    for i, (row, t0) in enumerate(zip(ROWS, T0, strict=True)):
        later = factors.at(slice(row, row + 1), slice(t0 + 1, t0 + 1 + STEPS))
        for j in range(len(key)):
            start = key[j][None, :, None].expand(1, -1, host.d_v)
            zero = step_states(later, torch.zeros_like(start))[0, -1]
            moved = (step_states(later, start)[0, -1] - zero)[:, 0]
            assert_close(by_transport[i, j], moved @ factors.query[row, t0 + STEPS], "exact read", 1e-10)
        alpha = later.log_decay.sum((0, 1)).exp()
        assert_close(by_decay[i], (alpha * key) @ factors.query[row, t0 + STEPS], "read by decay", 1e-10)


def test_direct_path_is_out_proj_and_lm_head(gated_deltanet):
    """A value in one head's slot, passed through the library's own out_proj and lm_head."""
    host = gated_deltanet
    _, value = atoms(host)
    token = torch.tensor([5, 6])
    slots = torch.zeros(len(value), host.heads * host.d_v, dtype=torch.float64)
    slots[:, HEAD * host.d_v : (HEAD + 1) * host.d_v] = value
    logits = host.model.lm_head(host.blocks[LAYER].linear_attn.out_proj(slots))
    assert_close(direct_path(host, LAYER, HEAD, value.float(), token), logits[:, token].T.float(), "direct path", 1e-5)


@pytest.mark.parametrize("by", ["through_layer", "through_norm", "exact"])
def test_edits_at_one_place_share_a_backward_pass_and_are_predicted_as_alone(gated_deltanet, tokens, by, monkeypatch):
    host, (key, value) = gated_deltanet, atoms(gated_deltanet, 4)
    rows, positions, wanted = (torch.tensor(x) for x in ([1, 0, 1, 1], [30, 9, 30, 31], [5, 6, 5, 5]))
    edit, where = make_edit(rows, positions, key[:, None], 2 * value[:, None]), dict(layer=LAYER, head=HEAD, steps=4)
    alone = [predict_shift(host, tokens, edit.part([n]), wanted[[n]], by=by, **where) for n in range(4)]
    asked, plain = [], predictors.logit_gradients
    monkeypatch.setattr(predictors, "logit_gradients", lambda *a: asked.append(len(a[4])) or plain(*a))
    assert_close(predict_shift(host, tokens, edit, wanted, by=by, **where), torch.cat(alone), by, 1e-6)
    assert asked == [3]
