"""writesae.sae.train: the factored loss against the dense one, and what training guarantees."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from pydantic import ValidationError

from writesae.history import History, Origin, VectorHistory
from writesae.sae import train as train_module
from writesae.sae.config import Architecture
from writesae.sae.losses import dense_loss, factored_loss, loss_of
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings, evaluate, top_singular_pair, train

D_K, D_V = 5, 7


def history_of(target: str = "state", windows: int = 8, dtype: torch.dtype = torch.float32) -> History:
    tokens = 70
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(windows, tokens, d, generator=generator, dtype=dtype) for d in (D_K, D_V))
    if target == "vector":
        shape = windows, tokens, D_K
        log_decay, erase = (torch.rand(shape, generator=generator, dtype=dtype) * scale for scale in (-0.5, 0.3))
        return VectorHistory(key + 0.3, value, log_decay, erase=erase, taken=value.roll(1, 1))
    log_decay = -0.5 * torch.rand(windows, tokens, generator=generator, dtype=dtype) if target == "state" else None
    return History(key + 0.3, value, log_decay)


def settings_of(**changes) -> TrainingSettings:
    base = dict(n_atoms=16, k=3, tokens=40 * 140, batch_windows=2, lr=1e-2, final_lr=1e-3, warmup=5)
    periods = dict(dead_after=3, resample_every=8, renormalise_every=7)
    return TrainingSettings(**base | periods | changes)


def small_sae(**kind) -> SAE:
    return SAE(Architecture(n_atoms=6, k=2, **kind), D_K, D_V)


def planted() -> tuple[History, torch.Tensor, torch.Tensor]:
    """Each write is one of four rank-1 atoms with a positive or negative coefficient; the decay is fast."""
    generator = torch.Generator().manual_seed(4)
    key, value = (F.normalize(torch.randn(4, d, generator=generator), dim=-1) for d in (D_K, D_V))
    which = torch.randint(4, (16, 64), generator=generator)
    size = 1 + torch.rand(16, 64, 1, generator=generator)
    size *= 2 * torch.randint(2, (16, 64, 1), generator=generator) - 1
    return History(key[which], value[which] * size, torch.full((16, 64), -2.0)), key, value


FACTORED = [dict(), dict(encoder="tied"), dict(activation="batch_topk"), dict(activation="jumprelu")]
FACTORED += [dict(activation="gated"), dict(encoder="tied", activation="gated")]
FACTORED += [dict(centre="bias"), dict(centre="bias", activation="gated")]


@pytest.mark.parametrize("kind", FACTORED)
@pytest.mark.parametrize("k_aux", [2, 256])
@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("target", ["state", "write", "vector"])
def test_factored_loss_and_gradients_are_those_of_the_dense_step(target, looked_up, k_aux, kind):
    torch.manual_seed(5)
    atoms, k = (12, 3) if looked_up else (150, 2)
    history = history_of(target, windows=3, dtype=torch.float64)
    sae = SAE(Architecture(n_atoms=atoms, k=k, **kind), D_K, D_V).double().train()
    assert (atoms * atoms <= 2 * 3 * 70 * k * k) == looked_up, "the case that this test is meant for"
    sae.scale.fill_(3.0)
    sae.encoder.bias.data.normal_(std=0.1)
    if sae.bias is None:
        sae.mean.copy_(history.mean())
    else:
        sae.bias.data.normal_(std=0.3)
    for parameter in sae.activation.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    dead = torch.tensor([0, 3, 4, 11])
    other, start = copy.deepcopy(sae), copy.deepcopy(sae)  # some rules adapt to every batch that they see
    got = loss_of(sae, history, history.energy(sae.mean), dead, aux_weight=0.7, k_aux=k_aux)
    wanted = dense_loss(other, history.steps(), dead, aux_weight=0.7, k_aux=k_aux)
    without = dense_loss(copy.deepcopy(start), history.steps(), aux_weight=0.7, k_aux=k_aux)
    assert abs(wanted.total - without.total) > 1e-3, "the dead-atom loss takes part"
    for name in ("total", "fvu", "squared"):
        assert_close(getattr(got, name), getattr(wanted, name), name, 1e-11)
    assert torch.equal(got.indices.sort().values, wanted.indices.sort().values)
    assert (got.coefficients > 0).any()
    names = [name for name, _ in sae.named_parameters()]
    gradients = [torch.autograd.grad(loss.total, list(x.parameters())) for loss, x in ((got, sae), (wanted, other))]
    for name, a, b in zip(names, *gradients):
        assert_close(a, b, f"gradient of {name}", 1e-10)


def test_the_dense_loss_is_what_its_name_says():
    torch.manual_seed(6)
    sae, states = small_sae().double(), torch.randn(2, 3, D_K, D_V, dtype=torch.float64)
    error = states - sae.decode(*sae.encode(states))
    loss = dense_loss(sae, states, torch.tensor([1, 5]), aux_weight=0.5)
    pre = torch.einsum("btkv,nk,nv->btn", states, sae.encoder.key, sae.encoder.value)[..., [1, 5]].relu()
    again = torch.einsum("btn,nk,nv->btkv", pre, sae.decoder.key[[1, 5]], sae.decoder.value[[1, 5]])
    assert_close(loss.fvu, error.square().sum((2, 3)).mean(), "FVU", 1e-12)
    expected = error.square().sum((2, 3)).mean() + 0.5 * (error - again).square().sum((2, 3)).mean()
    assert_close(loss.total, expected, "loss with silent atoms", 1e-12)


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu", "gated"])
def test_what_a_sparsity_rule_adds_to_the_loss(activation):
    """The loss against a loop over tokens and atoms; the gate's auxiliary loss does not move atoms."""
    torch.manual_seed(6)
    sae, states = small_sae(activation=activation).double(), torch.randn(3, 4, D_K, D_V).double()
    sae.requires_grad_(False)
    loss, pre = dense_loss(sae, states), sae.encoder.dense(states)
    expected = loss.fvu + sae.activation.penalty(pre)
    if activation == "gated":
        for x, p in zip(states.flatten(0, 1), pre.flatten(0, 1)):
            alone = sum(max(c.item(), 0) * atom for c, atom in zip(p, sae.decoder.weight()))
            expected = expected + (x - alone).square().sum() / 12
    assert_close(loss.total, expected, "total", 1e-12)
    assert (loss.total > loss.fvu) == (activation != "batch_topk")
    sae.requires_grad_(True).train()
    # only the gate's auxiliary loss remains
    sae.activation.coefficients = lambda pre, bias: torch.zeros_like(pre)
    by_atoms = torch.autograd.grad(dense_loss(sae, states).total, sae.decoder.key, allow_unused=True)[0]
    assert by_atoms is None or not by_atoms.any(), "the gate does not move the atoms"


def test_atoms_start_at_writes_or_at_random():
    history = history_of("write")
    writes = [F.normalize(x.flatten(0, 1), dim=-1) for x in (history.key, history.value)]
    for initial, near in (("data", True), ("random", False)):
        sae = SAE(Architecture(n_atoms=40, k=2), D_K, D_V)
        train_module.initialise(sae, history, 3, initial)
        cosine = ((sae.decoder.key @ writes[0].T) * (sae.decoder.value @ writes[1].T)).max(1).values
        assert (cosine.median() > 0.9) == near
        assert_close(sae.decoder.key.norm(dim=1), torch.ones(40), "norms of the key sides", 1e-6)
        assert torch.equal(sae.encoder.value, sae.decoder.value)
    assert settings_of(initial="random", activation="gated").variant == "bilinear+rank1+gated+random"


@pytest.mark.parametrize("dead", [None, torch.tensor([], dtype=torch.int64)])
def test_without_silent_atoms_there_is_no_dead_atom_loss(dead):
    history, sae = history_of(), small_sae()
    for loss in (factored_loss(sae, history, history.energy(sae.mean), dead), dense_loss(sae, history.steps(), dead)):
        assert loss.total.item() == loss.fvu.item()


KINDS = [dict(), dict(encoder="dense", decoder="flat"), dict(encoder="dense"), dict(decoder="flat")]
KINDS += [dict(encoder="tied"), dict(rank=2), *(dict(activation=x) for x in ("batch_topk", "jumprelu", "gated"))]


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_fvu_and_keeps_the_norms(kind):
    history, validation = history_of()[:6], history_of()[6:]
    settings = settings_of(**kind, tokens=100 * 140)
    sae, record = train(history, settings, progress=False, validation=validation)
    assert (record.steps, record.tokens) == (100, 100 * 140) and record.seconds > 0
    assert record.fvu[0][0] == 1 and record.fvu[-1][0] == 100
    assert record.fvu[-1][1] < 0.8 * record.fvu[0][1]
    assert record.alive + record.dead == 16 and record.alive > 8
    x, centre = validation.steps(), sae.mean
    indices, coefficients = sae.encode_history(validation)
    fvu = (x - sae.decode(indices, coefficients)).square().sum() / (x - centre).square().sum()
    assert_close(record.validation_fvu, fvu, "validation FVU", 1e-4)
    assert record.alive == len(indices[coefficients > 0].unique())
    assert_close(sae.mean, history.steps().mean((0, 1)), "mean", 1e-5)
    assert_close(sae.scale**2, (history.steps() - sae.mean).square().sum((2, 3)).mean(), "scale squared", 1e-5)
    assert_close(sae.decoder.weight().flatten(1).norm(dim=1), torch.ones(16), "norms of the atoms", 1e-6)
    if "activation" in kind:
        assert 1.5 < (coefficients > 0).sum(-1).double().mean() < 4.5, "about k = 3 atoms a token"
    if settings.encoder == "bilinear" and settings.rank == 1:
        assert_close(sae.encoder.key.norm(dim=1), torch.ones(16), "norms of the encoder's keys", 1e-6)
        assert_close(sae.encoder.value.norm(dim=1), torch.ones(16), "norms of the encoder's values", 1e-6)


def test_planted_atoms_are_found(monkeypatch):
    monkeypatch.setattr(train_module, "INIT_NOISE", 100.0)  # the start contains nothing of the data
    history, key, value = planted()
    settings = settings_of(tokens=400 * 256, batch_windows=4, n_atoms=24, k=2, dead_after=20, resample_every=50)

    def found(sae):
        k, v = sae.atoms()
        return ((key @ k.T) * (value @ v.T)).abs().max(1).values.min().item()

    start = train(history, settings.model_copy(update={"tokens": 256, "lr": 1e-9, "final_lr": 0.0}), progress=False)[0]
    sae, record = train(history, settings, progress=False, validation=history)
    assert found(start) < 0.9 < 0.98 < found(sae), (found(start), found(sae))
    assert record.validation_fvu < 0.05


@pytest.mark.parametrize("kind", [dict(), *KINDS[4:]])
@pytest.mark.parametrize("stop", [1, 21])
def test_a_killed_run_goes_on_to_the_same_result(stop, kind, tmp_path, monkeypatch):
    history, settings = history_of(), settings_of(**kind, n_atoms=40, k=1, dead_after=2, aux_weight=0.5)
    wanted, record = train(history, settings, progress=False)
    real = train_module.learning_rate

    def killed(settings, step, steps):
        if step == stop:
            raise KeyboardInterrupt
        return real(settings, step, steps)

    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(train_module, "learning_rate", killed)
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(history, settings, progress=False, checkpoint=path)
    calls = []
    monkeypatch.setattr(train_module, "learning_rate", lambda *a: calls.append(a[1]) or real(*a))
    got, resumed = train(history, settings, progress=False, checkpoint=path)
    assert calls == list(range(stop, 40)), "the run goes on where it was killed"
    for name, x in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], x), name
    assert resumed.fvu == record.fvu and resumed.loss == record.loss
    calls.clear()
    again = train(history, settings, progress=False, checkpoint=path)[0]
    assert not calls and torch.equal(again.decoder.key, wanted.decoder.key), "a finished run is only read"


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    history, path = history_of(), tmp_path / "run.safetensors"
    train(history, settings_of(tokens=140), progress=False, checkpoint=path)
    other = History(history.key, history.value * 2, history.log_decay)
    for data, settings in [(history, settings_of(tokens=140, seed=1)), (other, settings_of(tokens=140))]:
        with pytest.raises(ValueError, match="other settings or other data"):
            train(data, settings, progress=False, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read .SafetensorError.*remove it to start again"):
        train(history, settings_of(tokens=140), progress=False, checkpoint=path)


def test_the_seed_decides():
    history = history_of()
    keys = [train(history, settings_of(seed=seed), progress=False)[0].decoder.key for seed in (0, 0, 1)]
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])


def test_resampling_revives_silent_atoms():
    history = history_of()
    run = train_module._Run(history, settings_of(resample_every=1000, aux_weight=0.0, dead_after=5))
    lost = torch.tensor([2, 9])
    with torch.no_grad():
        run.sae.encoder.bias[lost] = -1e3
    for _ in range(12):
        run.advance()
    assert (run.silent[lost] == 12).all(), "without help they stay silent"
    run.resample(lost)
    for name, parameter in run.sae.named_parameters():
        state = run.optimiser.state[parameter]
        assert (state["exp_avg"][lost] == 0).all() and (state["exp_avg_sq"][lost] == 0).all(), f"moments of {name}"
        assert (state["exp_avg"][0] != 0).any(), f"moments of {name} elsewhere are kept"
    assert torch.equal(run.sae.encoder.key[lost], run.sae.decoder.key[lost])
    assert (run.sae.encoder.bias[lost] == 0).all() and (run.silent[lost] == 0).all()
    for _ in range(4):
        run.advance()
    assert (run.silent[lost] < 4).all(), "they fire again"


def test_rules_do_not_adapt_to_the_tokens_that_resampling_looks_at():
    run = train_module._Run(history_of(), settings_of(activation="batch_topk"))
    before = run.sae.activation.threshold.clone()
    run.resample(torch.tensor([2, 9]))
    assert torch.equal(run.sae.activation.threshold, before) and run.sae.activation.training
    run.advance()
    assert not torch.equal(run.sae.activation.threshold, before)


@pytest.mark.parametrize("target", ["state", "vector"])  # vector: 20 windows are three groups
def test_resampled_atoms_are_top_pairs_of_residuals(target):
    history = history_of(target, windows=20)
    run = train_module._Run(history, settings_of())
    x = run.sae.standardise(history.steps())
    residual = x - run.sae.decoder.dense(*dense_loss(run.sae, history.steps())[3:])
    got = train_module._worst_residuals(run.sae, history, run.energy, 5, torch.Generator().manual_seed(0))
    distance = (got[:, None] - residual.flatten(0, 1)).square().sum((2, 3))
    assert len(got) == 5 and (distance.min(1).values < 1e-8).all() and len(distance.argmin(1).unique()) == 5
    key, value = top_singular_pair(got.double())
    reached = torch.einsum("nk,nkv,nv->n", key, got.double(), value)
    assert_close(reached, torch.linalg.matrix_norm(got.double(), 2), "top singular values", 1e-3)


def test_every_epoch_visits_every_window_once():
    settings = settings_of()
    epochs = [torch.cat([train_module.batch_of(settings, 8, 4 * e + i) for i in range(4)]) for e in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(8)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_learning_rate_warms_up_and_falls_to_its_end():
    settings = settings_of()
    rates = [train_module.learning_rate(settings, step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(2e-3) and rates[4] == pytest.approx(1e-2) and rates[5] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3) and all(a > b for a, b in zip(rates[5:], rates[6:]))


def test_resampled_atoms_of_rank_r_are_the_r_top_pairs_of_residuals():
    matrices = torch.randn(5, D_K, D_V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    key, value = train_module.top_singular_pairs(matrices, 2)
    left, size, right = torch.linalg.svd(matrices, full_matrices=False)
    best = sum(size[:, r, None, None] * left[:, :, r, None] * right[:, r, None] for r in range(2))
    expected = best / best.flatten(1).norm(dim=1)[:, None, None]
    assert_close(key.transpose(1, 2) @ value, expected, "nearest matrices of rank 2, of unit norm", 1e-12)
    run = train_module._Run(history_of(), settings_of(rank=2))
    run.advance()
    run.resample(torch.tensor([2, 9]))
    assert_close(run.sae.decoder.weight()[[2, 9]].flatten(1).norm(dim=1), torch.ones(2), "norms", 1e-5)
    assert torch.equal(run.sae.encoder.key[[2, 9]], run.sae.decoder.key[[2, 9]])


def test_the_config_tells_what_the_sae_was_trained_on():
    settings, history = settings_of(tokens=140, seed=9), history_of("write")
    unknown, known = (
        train(replace(history, origin=origin), settings, progress=False)[0].config
        for origin in (None, Origin("toy", 3, 1, "effective"))
    )
    for config, place in ((unknown, (None,) * 4), (known, ("toy", 3, 1, "effective"))):
        assert (config.host, config.layer, config.head, config.write) == place
        assert (config.target, config.seed, config.n_atoms, config.d_v) == ("write", 9, 16, D_V)


def test_a_trained_sae_no_longer_adapts():
    sae = train(history_of(), settings_of(tokens=140, activation="batch_topk"), progress=False)[0]
    assert not sae.training and not any(part.training for part in sae.modules())


def test_variants_are_named():
    named = [dict(), dict(decoder="flat"), dict(encoder="tied", activation="gated", centre="none"), dict(rank=2)]
    wanted = ["bilinear+rank1", "bilinear+flat", "tied+rank1+gated+none", "bilinear+rank2"]
    assert [settings_of(**kind).variant for kind in named] == wanted


IMPOSSIBLE = [dict(k=17), dict(lr=1e-4), dict(tokens=0), dict(momentum=0.9), dict(decoder="rank2")]
IMPOSSIBLE += [dict(encoder="tied", decoder="flat"), dict(rank=2, decoder="flat"), dict(activation="relu")]


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValidationError):
        settings_of(**change)


def test_data_that_cannot_be_trained_on_are_refused():
    with pytest.raises(ValueError, match="takes 9 windows, the history has 8"):
        train(history_of(), settings_of(batch_windows=9), progress=False)
    constant = History(torch.ones(2, 10, D_K), torch.ones(2, 10, D_V))
    with pytest.raises(ValueError, match="nothing to train on"):
        train(constant, settings_of(), progress=False)
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(history_of(), settings_of(lr=1e30), progress=False)


@pytest.mark.parametrize("target", ["state", "write"])
def test_what_atoms_are_added_to(target):
    """With "mean" the mean of the data; with "none" nothing; with "bias" a matrix that training finds."""
    data = history_of(target)
    data = History(data.key, data.value + 2, data.log_decay)
    saes = {centre: train(data, settings_of(centre=centre), progress=False)[0] for centre in ("mean", "none", "bias")}
    assert_close(saes["mean"].offset, data.mean(), "the mean", 1e-6)
    assert not saes["none"].offset.any() and not saes["bias"].mean.any()
    assert saes["bias"].offset.any(), "the bias was learnt"
    for sae in saes.values():
        active = sae.encode(data.steps())
        rest = data.steps() - sae.offset - sae.decoder.dense(*active)
        variance = (data.steps() - data.mean()).square().sum()
        assert_close(evaluate(sae, data)[0], rest.square().sum() / variance, "FVU about the mean", 1e-4)


def test_resampled_atoms_leave_the_bias_alone():
    run = train_module._Run(history_of(), settings_of(centre="bias"))
    run.advance()
    before = run.optimiser.state[run.sae.bias]["exp_avg"].clone()
    run.resample(torch.arange(6))
    assert before.any() and torch.equal(run.optimiser.state[run.sae.bias]["exp_avg"], before)


def test_evaluate_counts_what_fires():
    history = planted()[0]
    sae = train_module._Run(history, settings_of(n_atoms=8, k=1)).sae
    with torch.no_grad():
        sae.encoder.bias[3:] = -1e3
    fvu, alive = evaluate(sae, history)
    assert alive <= 3 and 0 < fvu < 1.5
