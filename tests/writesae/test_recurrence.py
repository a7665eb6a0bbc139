"""The chunked recurrence and the rebuilt states against the step loop and the library's own operator."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from writesae.recurrence import Factors, gated_delta_chunks, states_before, step_states


def cell(length=83, d_k=6, d_v=10, batch=2, seed=0, vector=False):
    """Random fp64 unit keys, values, gates and decays of one cell. Of vector decays, the first is very fast."""
    g = torch.Generator().manual_seed(seed)
    key = F.normalize(torch.randn(batch, length, d_k, generator=g, dtype=torch.float64), dim=-1)
    query = torch.randn(batch, length, d_k, generator=g, dtype=torch.float64)
    value = torch.randn(batch, length, d_v, generator=g, dtype=torch.float64)
    beta = torch.rand(batch, length, generator=g, dtype=torch.float64)
    log_decay = -0.3 * torch.rand(batch, length, *[d_k] * vector, generator=g, dtype=torch.float64)
    if vector:
        log_decay[..., 0] *= 100
    return query, key, value, beta, log_decay


def as_factors(query, key, value, beta, log_decay):
    gate = beta[..., None]
    if log_decay.ndim == key.ndim:
        return Factors(query, key, gate * value, log_decay, erase=gate * key, probe=log_decay.exp() * key)
    return Factors(
        query, key, gate * value, log_decay[..., None], erase=log_decay.exp()[..., None] * gate * key, probe=key
    )


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 200])
def test_chunks_are_the_step_loop(chunk, vector):
    parts = cell(vector=vector)
    states = step_states(as_factors(*parts))
    outputs, effective, end = gated_delta_chunks(*parts, chunk=chunk)
    assert_close(outputs, (states.mT @ parts[0][..., None])[..., 0], "outputs", 1e-12)
    assert_close(end, states[:, -1], "last state", 1e-12)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    change = states - parts[4].exp().view(2, 83, -1, 1) * before
    assert_close(parts[1][..., None] * effective[..., None, :], change, "effective writes", 1e-12)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("cut", [1, 40, 82])
def test_prefix_and_suffix_with_the_state_carried(cut, vector):
    parts = cell(vector=vector)
    whole, _, end = gated_delta_chunks(*parts)
    first, _, middle = gated_delta_chunks(*(x[:, :cut] for x in parts))
    second, _, again = gated_delta_chunks(*(x[:, cut:] for x in parts), state=middle)
    assert_close(torch.cat([first, second], 1), whole, "outputs", 1e-12)
    assert_close(again, end, "last state", 1e-12)


def test_chunks_are_the_librarys_operator():
    from transformers.models.qwen3_5 import modeling_qwen3_5 as library

    operator = library.torch_recurrent_gated_delta_rule
    operator = getattr(operator, "__wrapped__", operator)
    query, key, value, beta, log_decay = (x.float()[:, :, None] for x in cell())
    wanted, state = operator(query, key, value, g=log_decay, beta=beta, initial_state=None, output_final_state=True)
    scaled = query[:, :, 0] * key.shape[-1] ** -0.5
    outputs, _, end = gated_delta_chunks(scaled, key[:, :, 0], value[:, :, 0], beta[:, :, 0], log_decay[:, :, 0])
    assert_close(outputs, wanted[:, :, 0], "outputs", 1e-5)
    assert_close(end, state[:, 0], "last state", 1e-5)


def test_chunks_with_vector_decays_are_the_librarys_operator():
    from transformers.models.kimi_linear import modeling_kimi_linear as library

    operator = library.recurrent_kimi_delta_attention
    operator = getattr(operator, "__wrapped__", operator)
    query, key, value, beta, log_decay = (x.float()[:, :, None] for x in cell(vector=True))
    wanted, state = operator(query, key, value, g=log_decay, beta=beta, initial_state=None, output_final_state=True)
    scaled = query[:, :, 0] * key.shape[-1] ** -0.5
    outputs, _, end = gated_delta_chunks(scaled, key[:, :, 0], value[:, :, 0], beta[:, :, 0], log_decay[:, :, 0])
    assert_close(outputs, wanted[:, :, 0], "outputs", 1e-5)
    assert_close(end, state[:, 0], "last state", 1e-5)


def test_a_wrong_erase_shows():
    """The published script reads S k where the equation has S^T k.

    With d_k != d_v the shapes do not match. With d_k = d_v, the final state is wrong by over 10%.
    """
    parts = cell(d_k=8, d_v=8)
    factors = as_factors(*parts)
    right = step_states(factors)[:, -1]
    state = torch.zeros_like(right)
    for t in range(parts[0].shape[1]):
        now = factors.at(slice(None), t)
        wrong_erase = now.erase[:, :, None] * (state @ now.probe[:, :, None]).mT
        state = now.log_decay.exp()[:, :, None] * state - wrong_erase + now.key[:, :, None] * now.added[:, None]
    assert (state - right).norm() / right.norm() > 0.1


@pytest.mark.parametrize("vector", [False, True])
def test_states_before_any_position(vector):
    query, key, value, beta, log_decay = cell(batch=3, vector=vector)
    states = step_states(as_factors(query, key, value, beta, log_decay))
    _, effective, _ = gated_delta_chunks(query, key, value, beta, log_decay)
    starts = torch.tensor([0, 1, 83])
    rebuilt = states_before(key[:, :, None], effective[:, :, None], log_decay[:, :, None], starts)[:, 0]
    wanted = torch.stack([torch.zeros_like(states[0, 0]), states[1, 0], states[2, 82]])
    assert_close(rebuilt, wanted, "states", 1e-12)


@pytest.mark.parametrize(("vector", "speed"), [(False, 1), (True, 0.05), (True, 1)])  # the last is too fast for chunks
def test_what_the_erase_finds(vector, speed):
    *parts, log_decay = cell(vector=vector)
    factors = as_factors(*parts, speed * log_decay)
    assert (32 * factors.log_decay.min() < -60) == (vector and speed == 1)
    before = F.pad(step_states(factors)[:, :-1], (0, 0, 0, 0, 1, 0))
    assert_close(factors.taken_by_erase(), (factors.probe[:, :, None] @ before)[:, :, 0], "taken", 1e-12)


def test_transitions_are_the_matrices():
    factors = as_factors(*cell()).at(slice(0, 2), 5)
    matrix = (
        torch.diag_embed(factors.log_decay.exp().expand(-1, 6)) - factors.erase[:, :, None] * factors.probe[:, None]
    )
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y = torch.randn(2, 6, 4, dtype=torch.float64)
    assert_close(factors.transition(x), (matrix @ x.mT).mT, "A x", 1e-12)
    assert_close(factors.transition_transposed(y), matrix.mT @ y, "A^T Y", 1e-12)


def test_unknown_write_definition_is_refused():
    with pytest.raises(ValueError, match="no rank-1 write 'effective': choose added"):
        as_factors(*cell()).write("effective")
