"""What callers set globally in torch (gradients, inference mode, default dtype and device) changes no result."""

from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL
from mamba2_releases import words as tokenizer_of

import writesae as ws
from writesae.evaluate import install, shifts
from writesae.evaluate.cells import survey_cells
from writesae.history import History
from writesae.hosts.load import adapter
from writesae.recurrence import torch_defaults
from writesae.shift import PREDICTORS, gamma, logit_gradient

CELL = dict(layer=1, head=2)


def state() -> tuple:
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return torch.get_default_dtype(), torch.get_default_device(), *modes


@contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


STATES = dict(
    no_grad=torch.no_grad,
    inference=torch.inference_mode,
    float64=lambda: defaults(torch.float64),
    bfloat16=lambda: defaults(torch.bfloat16),
    device=lambda: defaults(device="meta"),  # a tensor without values, so that any use of it fails
    autocast=lambda: torch.autocast("cpu", torch.bfloat16),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    adapter("gated_deltanet").build(SMALL["gated_deltanet"]).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def trained(**changes):
    settings = dict(n_atoms=12, k=3, tokens=900, batch_windows=2, resample_every=7, dead_after=2, lr=0.01)
    generator = torch.Generator("cpu").manual_seed(1)
    options = dict(generator=generator, dtype=torch.float32, device="cpu")
    history = History(torch.randn(6, 20, 5, **options), torch.randn(6, 20, 7, **options))
    sae, record = ws.train(history, ws.TrainingSettings(**settings | changes), progress=False, validation=history)
    return [*sae.state_dict().values(), record.loss[-1], record.fvu[-1], record.validation_fvu]


def everything(folder, place) -> list:
    """The numbers of the whole front door, and of what page 90 calls besides, on a small host."""
    host = ws.load_host(folder, "cpu")
    texts = [" ".join(f"word{i}" for i in range(40, 40 + 30 * n)) for n in (1, 2, 3)]
    windows = ws.cut_windows(host.tokenizer, texts, 40)
    factors = ws.harvest(host, windows, **CELL, progress=False)
    settings = ws.TrainingSettings(n_atoms=12, k=3, tokens=2000, batch_windows=2)
    sae, _ = ws.train(factors.history("write"), settings, progress=False)
    sae.save(place)
    sae = ws.SAE.load(place)
    firings = ws.find_firings(sae, factors, windows, first=4, last=36)
    tests = ws.replace_writes(host, windows, sae, firings.iloc[:9], seed=3, batch=5)
    key, value = ([0.1 * (i + 1) for i in range(d)] for d in (host.d_k, host.d_v))
    edit, place = ws.Edit.at(1, 7, key, value), dict(**CELL, steps=4)
    numbers = [ws.predict_shift(host, windows, edit, 5, **place, by=by) for by in PREDICTORS]
    run, cell = host.run(windows.tokens), tuple(CELL.values())
    rows, starts = run.tokens[:2, 0] * 0, run.tokens[:2, 0] * 0 + 9
    gradient, logits = logit_gradient(host, run, *cell, rows, starts, 3, run.tokens[:2, 5])
    sizes = dict(write="added", eps=[0.5], horizon=4)
    moved = shifts.measure_shifts(host, windows[:3], run.tokens[:3, 0] * 0 + 6, cell, *sae.atoms(), **sizes)
    trial = install.setting(host, run, run.tokens[:, :1] * 0 + 3, ["word"], 3, writes=2)
    native = install.native_continuations(host, run, 3)
    installed = install.trials(host, cell, trial, native, magnitudes=[2.0])
    numbers += [ws.run_edited(host, windows, edit, **place), gradient, logits, *factors.tensors().values()]
    numbers += [
        *sae.state_dict().values(),
        gamma(factors=host.factors(run, *cell), rows=rows, starts=starts, gradient=gradient),
    ]
    tables = [firings, tests, moved, installed, survey_cells(host, run, 4)]
    return [*numbers, *(table.to_csv() for table in tables)]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
    return repr(a) == repr(b)


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return everything(folder, tmp_path_factory.mktemp("sae"))


@pytest.mark.parametrize("name", STATES)
def test_the_front_door_gives_the_same_bits(folder, expected, tmp_path, name):
    with STATES[name]():
        before = state()
        numbers = everything(folder, tmp_path)
        assert state() == before
    assert len(numbers) == len(expected) > 20
    assert [i for i, pair in enumerate(zip(numbers, expected, strict=True)) if not same(*pair)] == []


@pytest.mark.parametrize(
    "changes",
    [dict(activation="batch_topk"), dict(activation="jumprelu"), dict(activation="gated"), dict(rank=2)]
    + [dict(encoder="dense", decoder="flat"), dict(encoder="tied", centre="none"), dict(centre="bias")],
    ids=str,
)
def test_every_kind_of_sae_trains_to_the_same_bits(changes):
    expected = trained(**changes)
    for name, entered in STATES.items():
        with entered():
            numbers = trained(**changes)
        assert all(same(a, b) for a, b in zip(numbers, expected, strict=True)), name


def test_defaults_come_back_after_an_error():
    before = state()

    @torch_defaults(gradients=True)
    def fails():
        raise ZeroDivisionError(str(torch.zeros(()).dtype))

    with defaults(torch.float64), torch.no_grad():
        within = state()
        with pytest.raises(ZeroDivisionError, match="float32"):
            fails()
        assert state() == within != before
    assert state() == before
