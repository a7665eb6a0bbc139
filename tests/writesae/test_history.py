"""writesae.history against the plain recurrence, in fp64 except where a test is about fp32.

d_k differs from d_v, and the number of tokens is not a multiple of the chunk size.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close

from writesae import history as history_module
from writesae.history import History, Origin, VectorHistory
from writesae.recurrence import Factors, step_states
from writesae.sae.train import TrainingSettings, train

TOKENS = 150  # two full chunks of 64 and a part of a third


def make(target: str = "state", windows: int = 3, strength: float = 0.1, dtype: torch.dtype = torch.float64) -> History:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(windows, TOKENS, d, generator=generator, dtype=dtype) for d in (5, 7))
    log_decay = -strength * torch.rand(windows, TOKENS, generator=generator, dtype=dtype)
    return History(key, value, log_decay if target == "state" else None)


@pytest.mark.parametrize("target", ["state", "write"])
def test_steps_is_the_recurrence(target):
    history = make(target)
    states = history.steps()
    write = history.key[1, 7, :, None] * history.value[1, 7, None]
    before = history.log_decay[1, 7].exp() * states[1, 6] if target == "state" else 0
    assert_close(states[1, 7], before + write, "X_7", 1e-14)
    assert_close(states, torch.stack(list(history.walk()), 1), "states of the loop", 1e-14)
    assert history.target == target and history.shape == (3, TOKENS) and (history.d_k, history.d_v) == (5, 7)


@pytest.mark.parametrize("target", ["state", "write"])
def test_read_and_its_gradients(target):
    history = make(target)
    left, right = (torch.randn(11, d, dtype=torch.float64, requires_grad=True) for d in (5, 7))
    expected = torch.einsum("nk,btkv,nv->btn", left, history.steps(), right)
    weight = torch.randn_like(expected)
    assert_close(history.read(left, right), expected, "read", 1e-13)
    wanted = torch.autograd.grad((expected * weight).sum(), (left, right))
    got = torch.autograd.grad((history.read(left, right) * weight).sum(), (left, right))
    for name, a, b in zip(("left", "right"), got, wanted):
        assert_close(a, b, f"gradient of {name}", 1e-12)


@pytest.mark.parametrize("target", ["state", "write"])
def test_energy_and_mean(target, monkeypatch):
    monkeypatch.setattr(history_module, "GROUP", 2)
    history = make(target)
    states, matrix = history.steps(), torch.randn(5, 7, dtype=torch.float64)
    assert_close(history.energy(), states.square().sum((2, 3)), "energy", 1e-12)
    assert_close(history.energy(matrix), (states - matrix).square().sum((2, 3)), "centred energy", 1e-12)
    assert_close(history.mean(), states.mean((0, 1)), "mean", 1e-12)


@pytest.mark.parametrize("target", ["state", "write"])
def test_matrices_at_chosen_places(target, monkeypatch):
    monkeypatch.setattr(history_module, "GROUP", 4)
    history = make(target)
    window, position = torch.tensor([2, 0, 1, 1, 2]), torch.tensor([0, 149, 63, 64, 100])
    assert_close(history.matrices(window, position), history.steps()[window, position], "matrices", 1e-13)
    assert history.matrices(window[:0], position[:0]).shape == (0, 5, 7)


@pytest.mark.parametrize("strength", [0.001, 1.0, 200.0])
def test_fp32_is_accurate_for_long_and_short_memory(strength):
    history = make(strength=strength, dtype=torch.float32)
    states = history.double().steps()
    left, right = torch.randn(4, 5), torch.randn(4, 7)
    expected = torch.einsum("nk,btkv,nv->btn", left.double(), states, right.double())
    assert_close(history.read(left, right), expected, "fp32 read", 2e-6)
    assert_close(history.energy(), states.square().sum((2, 3)), "fp32 energy", 2e-7)


def test_indexing_picks_windows():
    history = make()
    picked = history[torch.tensor([2, 0])]
    assert_close(picked.steps(), history.steps()[[2, 0]], "picked windows", 0.0)
    assert len(history[1]) == 1 and torch.equal(history[1].key[0], history.key[1])
    assert [len(part) for part in history.groups(2)] == [2, 1]


@pytest.mark.parametrize("vector", [False, True])
def test_a_history_keeps_its_origin(vector):
    plain, origin = vector_history()[1] if vector else make(), Origin("toy", 3, 1, "added")
    known = replace(plain, origin=origin)
    for history in (known, known[1], known[[0]], known.double(), known.to("cpu"), *known.groups(2)):
        assert history.origin == origin
    assert plain.origin is None and known.tensors().keys() == plain.tensors().keys()
    assert known.fingerprint() == plain.fingerprint()


def test_values_that_are_not_finite_are_located():
    history = make()
    key, value = history.key.clone(), history.value.clone()
    key[2, 17, 1], value[2, 17, 3], value[2, 40, 0] = torch.nan, torch.inf, torch.nan
    with pytest.raises(ValueError, match="3 values that are not finite, the first at window 2, position 17: in key"):
        History(key, value, history.log_decay)
    log_decay = history.log_decay.clone()
    log_decay[0, 3] = -torch.inf
    with pytest.raises(ValueError, match="1 value that is not finite, the first at window 0, position 3: in log_decay"):
        History(history.key, history.value, log_decay)


def test_shapes_that_do_not_fit_are_refused():
    history = make()
    for value, log_decay in [
        (history.value[:, :-1], history.log_decay),
        (history.value, history.log_decay[:2]),
        (history.value, history.value),
        (history.value[0], history.log_decay),
    ]:
        with pytest.raises(ValueError, match="key \\[N, T, d_k\\]"):
            History(history.key, value, log_decay)


# Vector decays


def vector_history(strength: float = 0.3) -> tuple[Factors, VectorHistory]:
    """Factors of a recurrence with erase, and their history; `taken` is what the erase removes."""
    generator = torch.Generator().manual_seed(4)
    query, key, erase, probe = (torch.randn(3, TOKENS, 5, generator=generator).double() / 3 for _ in range(4))
    added = torch.randn(3, TOKENS, 7, generator=generator).double()
    log_decay = -strength * torch.rand(3, TOKENS, 5, generator=generator).double()
    factors = Factors(query, key, added, log_decay, None, erase, probe)
    return factors, VectorHistory(key, added, log_decay, erase, factors.taken_by_erase())


@pytest.mark.parametrize("strength", [0.3, 8.0])
def test_vector_decays_rebuild_the_step_loops_states(strength):
    factors, history = vector_history(strength)
    states = step_states(factors)
    assert_close(history.steps(), states, "all states", 1e-12)
    assert_close(torch.stack(list(history.walk()), 1), states, "states of the loop", 1e-12)


def test_vector_decays_answer_what_a_history_answers():
    factors, history = vector_history()
    states, centre = step_states(factors), torch.randn(5, 7).double()
    left, right = torch.randn(11, 5).double(), torch.randn(11, 7).double()
    assert not history.factored and history.target == "state"
    assert_close(history.read(left, right), torch.einsum("nk,btkv,nv->btn", left, states, right), "read", 1e-12)
    assert_close(history.energy(centre), (states - centre).square().sum((-1, -2)), "energy", 1e-12)
    assert_close(history.mean(), states.mean((0, 1)), "mean", 1e-12)
    window, position = torch.tensor([2, 0, 2]), torch.tensor([149, 0, 64])
    assert_close(history.matrices(window, position), states[window, position], "matrices", 1e-12)
    assert_close(history[1:].steps(), states[1:], "two of the windows", 1e-12)


def test_large_states_are_rebuilt_at_the_chosen_places_alone(monkeypatch):
    """Windows are also grouped so that the states of one group have at most VECTOR_NUMBERS numbers."""
    factors, history = vector_history(8.0)
    monkeypatch.setattr(history_module, "VECTOR_NUMBERS", 2 * TOKENS * 5 * 7)
    monkeypatch.setattr(VectorHistory, "steps", lambda self: 1 / 0)
    assert [len(part) for part in history.groups()] == [2, 1]
    window, position = torch.tensor([2, 0, 1, 2]), torch.tensor([149, 0, 31, 64])
    states = step_states(factors)[window, position]
    assert_close(history.matrices(window, position), states, "matrices", 1e-12)


def test_vector_decays_of_wrong_shape_are_refused():
    _, history = vector_history()
    with pytest.raises(ValueError, match="vector decays needs key, log_decay, erase"):
        VectorHistory(history.key, history.value, history.log_decay[..., 0], history.erase, history.taken)


def test_an_sae_of_vector_decays_trains_on_the_states_themselves():
    """The factored trainer does not apply; the held-out FVU is that of the rebuilt states."""
    factors, history = vector_history()
    settings = TrainingSettings(n_atoms=12, k=3, tokens=TOKENS * 6, batch_windows=1, lr=3e-3, final_lr=3e-4)
    sae, record = train(history, settings, progress=False, validation=history)
    states = step_states(factors)
    error = (states - sae.decode(*sae.encode(states))).square().sum()
    wanted = error / (states - sae.mean).square().sum()
    assert_close(torch.tensor(record.validation_fvu), wanted, "held-out FVU", 1e-7)
    assert_close(sae.encode_history(history).coefficients, sae.encode(states).coefficients, "coefficients", 1e-9)
