"""Training with TF32 or bf16 matrix products: what is rounded, and how close the loss is to fp32."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from writesae.history import History
from writesae.sae import train as train_module
from writesae.sae.losses import factored_loss
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings, train

SETTINGS = dict(n_atoms=48, k=4, tokens=4000, batch_windows=2, lr=3e-3, warmup=5)


def history_of(target: str, windows: int = 4, tokens: int = 150, d_k: int = 20, d_v: int = 28) -> History:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(windows, tokens, d, generator=generator) for d in (d_k, d_v))
    log_decay = -0.2 * torch.rand(windows, tokens, generator=generator)
    return History(F.normalize(key, dim=-1), value, log_decay if target == "state" else None)


def rounded(x):
    return x.bfloat16().to(x.dtype)


@pytest.mark.parametrize("target", ["state", "write"])
def test_rounded_reads_are_those_of_rounded_factors(target):
    history = history_of(target)
    left, right = torch.randn(7, 20), torch.randn(7, 28)
    states = history.map(lambda x: rounded(x) if x.ndim == 3 else x).double().steps()
    wanted = torch.einsum("ntkv,ak,av->nta", states, rounded(left).double(), rounded(right).double())
    got = history.read(left, right, bf16=True)
    assert got.dtype == torch.float32
    assert_close(got, wanted, "reads", 1e-6)
    assert (got - history.read(left, right)).norm() > 1e-4 * got.norm(), "the rounding shows"


@pytest.mark.parametrize("target", ["state", "write"])
def test_their_gradients_are_fp32s_up_to_the_rounding(target):
    history, weight = history_of(target), torch.randn(4, 150, 7)
    factors = [torch.randn(7, d, requires_grad=True) for d in (20, 28)]
    plain, ours = (
        torch.autograd.grad((history.read(*factors, bf16) * weight).sum(), factors) for bf16 in (False, True)
    )
    for got, wanted in zip(ours, plain, strict=True):
        assert_close(got, wanted, "gradient", 1e-2)
        assert not torch.equal(got, wanted)


@pytest.mark.parametrize("target", ["state", "write"])
def test_the_loss_in_bf16_is_fp32s_to_a_ten_thousandth(target):
    """For a partly trained SAE, the bf16 loss differs from the fp32 loss by less than 1 part in 10,000."""
    history = history_of(target, windows=4, tokens=256, d_k=32, d_v=32)
    sae, _ = train(history, TrainingSettings(**SETTINGS | dict(n_atoms=128, k=8, tokens=2000)), progress=False)
    energy, dead = history.energy(sae.mean), torch.arange(5)
    plain, ours = (factored_loss(sae, history, energy, dead, bf16=bf16) for bf16 in (False, True))
    assert 0 < abs(ours.total - plain.total) < 1e-4 * plain.total
    assert 0 < abs(ours.fvu - plain.fvu) < 1e-4 * plain.fvu


def test_a_training_run_in_bf16_ends_where_fp32_does():
    data = history_of("state")
    runs = {
        products: train(data, TrainingSettings(**SETTINGS, products=products), progress=False, validation=data)
        for products in ("fp32", "tf32", "bf16")
    }
    fvu = {products: record.validation_fvu for products, (_, record) in runs.items()}
    assert fvu["bf16"] == pytest.approx(fvu["fp32"], rel=0.02)
    weights = {products: sae.decoder.key for products, (sae, _) in runs.items()}
    assert torch.equal(weights["tf32"], weights["fp32"]), "TF32 is a matter of CUDA"
    assert not torch.equal(weights["bf16"], weights["fp32"])


@pytest.fixture
def allowed():
    """The TF32 switch, restored after the test."""
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    yield switch
    switch.allow_tf32 = before


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("products", ["fp32", "tf32", "bf16"])
def test_tf32_is_allowed_for_the_step_and_as_it_was_afterwards(products, before, allowed, monkeypatch):
    data, seen, real = history_of("write"), [], train_module.loss_of

    def loss(*arguments, **more):
        seen.append(allowed.allow_tf32)
        return real(*arguments, **more)

    run = train_module._Run(data, TrainingSettings(**SETTINGS, products=products))
    monkeypatch.setattr(train_module, "loss_of", loss)
    allowed.allow_tf32 = before
    run.advance()
    assert seen == [before or products != "fp32"] and allowed.allow_tf32 == before


def test_states_are_trained_on_in_fp32_whatever_the_products():
    """The dense encoder gives the dense path, which does not use reduced precision."""
    data = history_of("write")
    settings = {p: TrainingSettings(**SETTINGS, encoder="dense", products=p) for p in ("fp32", "bf16")}
    made = [train(data, one, progress=False)[0] for one in settings.values()]
    assert isinstance(made[0], SAE) and torch.equal(made[0].decoder.key, made[1].decoder.key)
