"""The plain and the fast ways in benchmarks/ give the same numbers on small random hosts."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import small
from helpers import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import attribution
import closed_form
import common
import growth
import many_cells
import plan
import replacement
import training_step

from writesae.sae.losses import factored_loss

SIZES = dict(side=6, n_atoms=24, k=3, windows=3, tokens=70, silent=7)


def test_the_plain_loss_and_its_gradients_are_the_factored_ones():
    run = training_step.new_run(**SIZES)
    sae, dead = run.sae.double(), torch.arange(7, device=training_step.device())
    with torch.no_grad():
        sae.encoder.bias.normal_(std=0.1)
    history = run.history.double()
    parameters = [sae.encoder.key, sae.encoder.value, sae.encoder.bias, sae.decoder.key, sae.decoder.value]
    ours = factored_loss(sae, history, history.energy(sae.mean), dead)
    plain = training_step.plain_loss(sae.standardise(history.steps()).flatten(0, 1), parameters, 3, dead)
    assert ours.total - ours.fvu > 1e-4, "the dead-atom loss takes part"
    assert_close(plain, ours.total, "loss", 1e-10)
    gradients = [torch.autograd.grad(loss, parameters) for loss in (plain, ours.total)]
    for got, wanted in zip(*gradients):
        assert_close(got, wanted, "gradient", 1e-9)


@pytest.mark.parametrize("kind", ["plain", "whole", "dense"])
def test_steps_on_states_in_parts_have_the_loss_of_the_trainers_step(kind, monkeypatch):
    monkeypatch.setattr(training_step, "PART", 64)
    step, ours = training_step.on_states(kind, **SIZES), training_step.factored(**SIZES)
    wanted = ours()
    for got in (step(), step(), ours()):
        assert got == pytest.approx(wanted, rel=1e-5), "and nothing moves"


def test_each_part_of_the_growth_is_the_same_in_both_ways():
    results = {case.name: case.prepare()() for case in growth.comparisons(True)[0].cases}
    assert growth.same_numbers(results)["of_tolerance"] < 1
    results["plain harvest 16"][:, 5:] *= 1.01
    with pytest.raises(ValueError, match="The two ways of the harvest differ"):
        growth.same_numbers(results)


def test_different_losses_are_refused():
    with pytest.raises(ValueError, match="do not do the same work"):
        training_step.same_losses({"factored 8": 1.0, "plain 8": 1.001})


@pytest.mark.parametrize("depth", ["early", "late"])
def test_plain_replacements_have_the_kls_of_the_batched_ones(gated_deltanet, depth):
    *where, left, right = replacement.problem(gated_deltanet, depth, windows=2, length=48, firings=5, conditions=3)
    wanted = replacement.plain(gated_deltanet, *where, left.mT @ right)
    assert wanted.median() > 1e-5 and not torch.allclose(wanted[:, 0], wanted[:, 1], rtol=1e-2)
    assert_close(replacement.batched(gated_deltanet, *where, left, right), wanted, "KLs", 1e-4)


def test_the_ways_to_an_atoms_logit_shift_agree():
    host = small("gated_deltanet")
    given = closed_form.problem(host, length=32, atoms=6)
    predicted, by_layer, measured, batched = (run(host, *given) for run in closed_form.WAYS.values())
    assert_close(batched, measured, "edited runs", 1e-3)
    assert closed_form.r_squared(predicted, measured) > 0.95
    assert closed_form.r_squared(by_layer, measured) > closed_form.r_squared(predicted, measured)
    assert closed_form.r_squared(predicted.flip(0), measured) < 0.9


def test_cases_take_turns_and_ratios_are_per_unit_of_work():
    calls, clock = [], iter(range(1000))
    cases = [
        common.Case(name, lambda name=name: lambda: calls.append(name), amount) for name, amount in (("a", 1), ("b", 2))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.time, "perf_counter", lambda: 10.0 * next(clock))  # every call takes 10 seconds
        table = common.measure(common.Comparison(dict(unit="token"), cases, rounds=3)).set_index("case")
    assert calls == ["a", "b"] * 4, "a round that does not count, then three"
    assert table.seconds.tolist() == [10, 10] and table.rate.tolist() == [0.1, 0.2]
    assert table.loc["b", ["ratio", "low", "high"]].tolist() == [0.5, 0.5, 0.5] and (table.against == "a").all()


def test_gflop_are_those_of_the_products():
    a = torch.randn(30, 40)
    comparison = common.Comparison({}, [common.Case("one", lambda: lambda: a @ a.T, 1)], rounds=1, count_products=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "PEAK_SIDE", 64)
        table = common.measure(comparison).set_index("case")
    assert table.gflop["one"] == pytest.approx(2 * 30 * 30 * 40 / 1e9)
    assert table.of_peak["matrix product"] == 1


def test_the_plan_scales_measured_rates():
    training = pd.DataFrame(
        dict(
            case=["factored 128", "plain 128", "matrix product"],
            method=["factored", "plain", None],
            side=[128, 128, None],
        )
    ).assign(rate=[8000, 100, 1], seconds=[1, 1, 0.5], gflop=[0, 0, 50], peak_mib=[1024, 4096, None], device="this")
    harvests = pd.DataFrame(dict(host=["gated_deltanet"], case=["harvest, last layer"], rate=[1000]))
    storage = pd.DataFrame(dict(host=["gated_deltanet_128"], kept=["both"], bytes=[1540], state_bytes=[65536]))
    table = plan.plan(training, harvests, storage, parameters=10e6, moved=20).set_index(["way", "machine", "by"])
    ours, card = table.loc[("factored", "this", "measured")], table.loc[("factored", plan.CARD, "products")]
    assert ours.harvest_of_peak == pytest.approx(1000 * 2 * 10e6 / 1e9 / 100), "100 GFLOP/s"
    assert ours.harvest_hours == pytest.approx(5e6 * 0.75 * 2 * 752.4e6 / 20e9 / 3600)
    assert ours.training_hours == pytest.approx(5e6 * 48 / 8000 / 3600)
    assert card.training_hours / ours.training_hours == pytest.approx(100 / plan.CARD_GFLOPS)
    card = table.loc[("factored", plan.CARD, "memory")]
    assert card.harvest_hours / ours.harvest_hours == pytest.approx(20 / plan.CARD_BANDWIDTH)
    assert ours.disk_gb == pytest.approx(5e6 * 48 * 1540 / 1e9) and ours.disk_gb == pytest.approx(
        3 * ours.disk_gb_a_layer
    )
    assert table.loc[("plain", "this", "measured")].disk_gb / ours.disk_gb == pytest.approx(65536 / 1540)
    assert ours.memory_gib == 1


def test_the_two_ways_to_an_attention_map_agree():
    assert attribution.same_maps({way: attribution.case(way, side=5, length=9)() for way in ("map", "plain")})
    made = attribution.case("plain", side=5, length=9)()
    assert made[0, 2, 1] != 0 and made[0, 1, 2] == 0


def test_the_two_ways_to_write_in_every_cell_agree():
    host = small("gated_deltanet")
    tokens = torch.randint(host.vocabulary, (1, 14), generator=torch.Generator().manual_seed(3))
    edited, plain = (way(host, tokens, 10, trials=2, steps=2) for way in (many_cells.edited, many_cells.plain))
    assert_close(edited, plain, "logits", 1e-5)
    native = host.logits(host.run(tokens).final[0, -2])
    assert (plain - native).norm() > 1e-3 * native.norm()
