"""Each predictor against its definition: edited runs, finite differences and brute force."""

import pytest
import torch
from helpers import assert_close

from writesae.edit import edited_hidden, make_edit
from writesae.recurrence import step_states
from writesae.shift import cache_gamma, direct_path, gamma, logit_gradient, reads

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
