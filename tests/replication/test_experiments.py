"""The rules and the bookkeeping of the experiments, on a small host and small SAEs."""

import os
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_close
from sklearn.mixture import GaussianMixture

from replication import classes as population
from replication.pages import harvest as harvest_page
from replication.pages import hosts
from replication.pages import replacement as replacement_module_
from replication.study.profile import HostSection, load_profile
from replication.study.study import Study, open_study, threads
from writesae.edit import edited_hidden, kl, make_edit
from writesae.evaluate import cells as cells_module
from writesae.evaluate import firings, install, shifts, steering
from writesae.evaluate import replacement as replacement_module
from writesae.evaluate.replacement import AMPLITUDES, CONDITIONS
from writesae.harvesting import harvest
from writesae.sae.train import TrainingSettings, train
from writesae.shift import predict_shift
from writesae.text import Windows, cut_windows

CELL = (1, 2)


@pytest.fixture(scope="session")
def host(gated_deltanet):
    return gated_deltanet


@pytest.fixture(scope="session")
def run(host, tokens):
    return host.run(tokens)


@pytest.fixture(scope="module")
def factors(host, tokens):
    return harvest(host, tokens, [CELL], batch=2, progress=False)[CELL]


@pytest.fixture(scope="module", params=["state mean", "write mean", "write none", "write bias"])
def cell_sae(request, factors):
    target, centre = request.param.split()
    options = dict(n_atoms=24, k=4, tokens=90 * 60, batch_windows=3, lr=3e-3, final_lr=3e-4, seed=1)
    sae, _ = train(factors.history(target), TrainingSettings(**options, centre=centre), progress=False)
    return firings.encode_cell(CELL, target, "added", sae, factors)


@pytest.fixture(scope="module")
def single(host):
    """The same host in fp32, the precision of the experiments."""
    import copy

    return type(host)(copy.deepcopy(host.model).float(), None, "small")


def some_firings(cell_sae, count=6):
    every = firings.all_firings(cell_sae, torch.tensor([0, 1, 2]), 8, 80)
    drawn = firings.draw_in_rounds(every, count, seed=5)
    return drawn, firings.Places.of(drawn)


# Firings


def test_a_firing_is_the_largest_coefficient(cell_sae):
    every = firings.all_firings(cell_sae, torch.tensor([7, 8, 9]), 8, 80)
    assert len(every) <= 3 * 72
    for row in every.sample(20, random_state=0).itertuples():
        coefficients = cell_sae.coefficients[row.window, row.position]
        assert row.coefficient == pytest.approx(coefficients.max().item())
        assert cell_sae.indices[row.window, row.position][coefficients.argmax()] == row.atom
        assert row.passage == row.window + 7


def test_rounds_take_every_atom_before_any_atom_twice():
    frame = pd.DataFrame(dict(window=0, position=range(100), atom=[0] * 90 + [1] * 7 + [2] * 3, coefficient=1.0))
    counts = firings.draw_in_rounds(frame, 9, seed=0).atom.value_counts()
    assert counts.to_dict() == {0: 3, 1: 3, 2: 3}
    counts = firings.draw_in_rounds(frame, 14, seed=0).atom.value_counts()
    assert counts[2] == 3
    assert abs(counts[0] - counts[1]) <= 1
    again = firings.draw_in_rounds(frame, 14, seed=0)
    pd.testing.assert_frame_equal(again, firings.draw_in_rounds(frame, 14, seed=0))


def test_positions_are_uniform_and_the_same_for_every_sae(cell_sae):
    passage = torch.tensor([7, 8, 8])
    drawn = firings.draw_positions(passage, 8, 80, 150, seed=1)
    assert not drawn.duplicated().any() and drawn.position.between(8, 79).all()
    assert (drawn.passage == passage.numpy()[drawn.window]).all()
    assert drawn.window.value_counts().between(35, 65).all(), "uniform over windows"
    assert firings.draw_positions(passage, 8, 80, 3 * 72, seed=2).position.value_counts().eq(3).all()
    with pytest.raises(ValueError, match="217 places are asked for and the windows hold 216"):
        firings.draw_positions(passage, 8, 80, 217, seed=2)
    there, every = firings.firings_at(cell_sae, drawn), firings.all_firings(cell_sae, passage, 8, 80)
    both = there.merge(every, on=["window", "position"], how="left", suffixes=("", "_wanted"))
    active = both.coefficient > 0
    assert active.any() and (both.atom == both.atom_wanted)[active].all()
    assert (both.coefficient == both.coefficient_wanted)[active].all() and both.coefficient_wanted[~active].isna().all()


def test_more_than_there_is_is_refused():
    frame = pd.DataFrame(dict(window=0, position=range(5), atom=[0, 0, 1, 1, 2], coefficient=1.0))
    with pytest.raises(ValueError, match="6 firings are asked for and the held-out windows hold 5"):
        firings.draw_in_rounds(frame, 6, seed=0)
    with pytest.raises(ValueError, match="3 atoms are asked for and only 2 are alive with 2 or more"):
        firings.draw_atoms(frame, 3, fewest=2, seed=0)


# Replacement


def test_replacement_is_one_edit_after_another(single, tokens, cell_sae):
    """Compares the KL of each condition with a run of that single edit, built here from full matrices."""
    run = single.run(tokens)
    kinds = dict(conditions=[*CONDITIONS, "atom_and_mean"], amplitudes=[*AMPLITUDES, "projection"])
    table = replacement_module.replace(single, run, cell_sae, *some_firings(cell_sae), seed=3, **kinds)
    assert ("kl_atom_and_mean" in table) == (cell_sae.sae.config.centre != "none" and cell_sae.target == "write")
    f = single.factors(run, *CELL)
    for row in table.itertuples():
        w, t = torch.tensor([row.window]), torch.tensor([row.position])
        native = f.key[w, t][0, :, None] * f.added[w, t][0]
        norm = row.coefficient if row.amplitude == "coefficient" else native.norm().item()
        offset = cell_sae.sae.offset if cell_sae.target == "write" else 0 * native
        atom = cell_sae.sae.decoder.weight()[row.atom]
        indices, amounts = (x[row.window, row.position] for x in (cell_sae.indices, cell_sae.coefficients))
        whole = torch.einsum("i,ikv->kv", amounts, cell_sae.sae.decoder.weight()[indices])
        own = dict(reconstruction=whole + offset, atom_and_mean=offset + row.coefficient * atom)
        put_in = dict(
            delete=0 * native,
            atom=norm * atom,
            native_rescaled=norm * native / native.norm(),
            mean_write=norm * cell_sae.mean_write / cell_sae.mean_write.norm(),
        ) | {name: x if row.amplitude == "coefficient" else norm * x / x.norm() for name, x in own.items()}
        if row.amplitude == "projection":
            nonzero = {name: x for name, x in put_in.items() if name != "delete"}
            put_in |= {name: x * ((x * native).sum() / x.square().sum()) for name, x in nonzero.items()}
        for name in put_in.keys() & {x.removeprefix("kl_") for x in table}:
            matrix = put_in[name]
            delta = matrix - native
            edit = make_edit(w, t, torch.eye(single.d_k)[None], delta[None], row.read)
            patched = single.logits(edited_hidden(single, run, *CELL, edit, 2)[:, -1])
            wanted = kl(single.logits(run.final[w, t + 1]), patched)
            assert getattr(row, f"kl_{name}") == pytest.approx(wanted.item(), rel=2e-3, abs=1e-9), name


def test_native_write_at_its_own_norm_is_no_edit(single, tokens, cell_sae):
    table = replacement_module.replace(single, single.run(tokens), cell_sae, *some_firings(cell_sae), seed=3)
    matched = table[table.amplitude == "matched_norm"]
    assert (matched.kl_native_rescaled < 1e-9).all()
    assert (matched.kl_delete > 1e-7).any()


def test_random_controls_are_other_atoms_and_follow_the_seed(single, tokens, cell_sae):
    run, (drawn, places) = single.run(tokens), some_firings(cell_sae)
    key, value = cell_sae.sae.atoms()
    put_in = replacement_module.replacements(cell_sae, places, single.factors(run, *CELL), 3)
    matrices = put_in["random"][0].mT @ put_in["random"][1]
    for i, atom in enumerate(drawn.atom):
        own = key[atom][:, None] * value[atom]
        assert abs((matrices[i] * own).sum()) < 0.9999
    a, b = (replacement_module.replace(single, run, cell_sae, drawn, places, seed=s).kl_random for s in (3, 4))
    assert (a != b).any()


def test_batches_do_not_change_the_table(single, tokens, cell_sae):
    run, some = single.run(tokens), some_firings(cell_sae)
    small, large = (replacement_module.replace(single, run, cell_sae, *some, 3, batch_rows=n) for n in (1, 4096))
    order = ["window", "position", "amplitude", "read"]
    columns = [c for c in small if c.startswith("kl_")]
    a, b = (t.sort_values(order)[columns].to_numpy() for t in (small, large))
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-9)


def test_summary_counts_wins(single, tokens, cell_sae):
    table = replacement_module.replace(single, single.run(tokens), cell_sae, *some_firings(cell_sae), seed=3)
    places = pd.DataFrame([dict(host="small", layer=CELL[0], head=CELL[1], place="middle")])
    summary = replacement_module_.summarise(table, places, resamples=50, seed=0)
    part = table[(table.amplitude == "coefficient") & (table.read == "cache")]
    row = summary.query("amplitude == 'coefficient' and read == 'cache' and cells == 'pooled'").iloc[0]
    assert row.win_rate == pytest.approx(sum(a < d for a, d in zip(part.kl_atom, part.kl_delete, strict=True)) / 6)
    assert row.n == 6
    assert row.ci_low < row.win_rate < row.ci_high or row.win_rate in (0, 1)


def test_the_trend_over_cells_is_of_ranks():
    """Four cells of one host: the win rate decreases with half-life and is not monotonic in sigma1/sigma2.

    Compares both rank correlations with values computed by hand.
    """
    wins, half_lives, ratios = [4, 3, 2, 0], [0.5, 2.0, 8.0, 300.0], [3.0, 1.5, 2.0, 1.2]
    firings = pd.DataFrame(
        dict(host="h", layer=0, head=head, target="state", amplitude="coefficient", kl_delete=1.0, kl_random=2.0)
        | dict(kl_mean_write=2.0, kl_atom=0.5 if number < wins[head] else 3.0)
        for head in range(4)
        for number in range(4)
    )
    memory = pd.DataFrame(
        dict(host="h", layer=0, head=range(4), half_life_median=half_lives, sigma1_over_sigma2=ratios)
    )
    cells = replacement_module_.by_cell(firings, memory)
    assert cells.win_atom.tolist() == [1.0, 0.75, 0.5, 0.0]
    row = replacement_module_.trend(cells).iloc[0]
    assert (row.n_cells, row.n, row.win_lowest, row.win_highest) == (4, 16, 0.0, 1.0)
    assert row.rho_half_life_median == -1
    assert row.rho_sigma1_over_sigma2 == pytest.approx(1 - 6 * 2 / (4 * 15))  # ratio ranks: 4, 2, 3, 1


# Logit shift


def test_measured_shifts_are_edited_runs(single, tokens):
    torch.manual_seed(0)
    key, value = (torch.nn.functional.normalize(torch.randn(3, d), dim=-1) for d in (single.d_k, single.d_v))
    options = dict(eps=[0.02, 2.0], horizon=4, ranks=[1, 3], write="added", batch_rows=5)
    t0, windows = torch.tensor([10, 30, 50]), cut(tokens)
    table = shifts.measure_shifts(single, windows, t0, CELL, key, value, **options)
    run = single.run(tokens)
    f = single.factors(run, *CELL)
    for row in table.itertuples():
        r, t = torch.tensor([row.row]), t0[[row.row]]
        norm = f.added[r, t].norm() * f.key[r, t].norm()
        edit = make_edit(r, t, key[row.atom][None, None], row.eps * norm * value[row.atom][None, None], "cache")
        token = single.logits(run.final[r, t + 4])[0].argsort(descending=True)[row.rank - 1]
        shift = single.logits(edited_hidden(single, run, *CELL, edit, 5)[:, -1]) - single.logits(run.final[r, t + 4])
        assert row.measured == pytest.approx(shift[0, token].item(), rel=1e-3, abs=2e-6)
        for by in ("through_layer", "through_norm"):
            one = predict_shift(single, tokens, edit, token, layer=CELL[0], head=CELL[1], steps=5, by=by)
            assert getattr(row, by) == pytest.approx(one.item(), rel=1e-3, abs=2e-6)
    small = table[table.eps == 0.02]
    assert set(small["rank"]) == {1, 3}
    np.testing.assert_allclose(small.exact, small.measured, rtol=0.05, atol=2e-5)  # one gradient per token


def cut(tokens):
    from writesae.text import Windows

    return Windows(tokens, torch.arange(len(tokens)))


def test_the_fitted_scalar_is_least_squares_and_only_tests_linearity():
    eps = np.array([0.1, 0.3, 1.0, 3.0])
    frame = pd.DataFrame(dict(host="h", prompt=0, atom=0, rank=1, eps=eps, paper=-0.01 * eps, measured=5 * eps))
    np.testing.assert_allclose(shifts.fit_paper_scalar(frame), frame.measured)  # even a wrong formula fits
    frame["measured"] = eps**2
    slope = np.linalg.lstsq(frame.paper.to_numpy()[:, None], frame.measured.to_numpy(), rcond=None)[0][0]
    np.testing.assert_allclose(shifts.fit_paper_scalar(frame), slope * frame.paper)


def test_sizes_that_the_paper_has_not_do_not_enter_its_fit():
    eps = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
    frame = pd.DataFrame(dict(host="h", prompt=0, atom=0, rank=1, eps=eps, paper=0.5 * eps, measured=eps**2))
    fitted = shifts.fit_paper_scalar(frame)
    assert fitted[:4].tolist() == shifts.fit_paper_scalar(frame[:4]).tolist()
    assert fitted[4] == pytest.approx(10 / 3 * fitted[3])


# Norms of writes, classes of atoms, installs


def test_norms_of_writes_are_those_of_matrices(host, tokens):
    factors = harvest(host, tokens, [CELL], 2, progress=False)[CELL]
    for name in ("added", "effective"):
        norms, value = harvest_page.write_norms(factors, name), getattr(factors, name)
        if value is None:
            assert host.family == "rwkv7" and name == "effective" and norms.isnan().all()
        else:
            assert_close(norms, torch.einsum("nti,ntj->ntij", factors.key, value).flatten(2).norm(dim=-1), name, 1e-5)


def test_register_is_the_component_of_higher_cosine():
    generator = np.random.default_rng(0)
    values = pd.Series(np.r_[generator.normal(0.02, 0.01, 40), generator.normal(0.6, 0.05, 15)])
    classes = population.classify(values, seed=0)
    assert (classes[:40] == "bundle").all()
    assert (classes[40:] == "register").all()


def test_the_low_tail_of_a_wide_upper_component_is_not_register():
    generator = np.random.default_rng(0)
    values = np.r_[generator.normal(0.5, 0.02, 200), generator.normal(0.6, 0.2, 100), -0.3]
    component = GaussianMixture(2, random_state=0, n_init=5).fit_predict(values[:, None])
    assert component[-1] == component[values.argmax()] != component[0]  # the classes of the mixture alone
    classes = population.classify(pd.Series(values), seed=0)
    assert classes.iloc[-1] == "bundle"
    assert classes[values.argmax()] == "register"


RANK_CLASSES, DOSES = dict(top=(2, 10), far=(100, 9999)), [1, 4, 16, 64, 256]


@pytest.fixture(scope="module")
def trial(single, tokens):
    run = single.run(tokens[:, :40])
    targets, labels = install.draw_targets(single.logits(run.final[:, -1]), RANK_CLASSES, 2, seed=0)
    return install.setting(single, run, targets, labels, 5, writes=3)


def test_targets_have_the_ranks_of_their_class(trial):
    for rank, label in zip(trial.native_rank.tolist(), trial.label, strict=True):
        low, high = RANK_CLASSES[label]
        assert low <= rank <= min(high, 300)


def logits_at(single, trial, name, magnitude):
    """Logits at the end of the prompts under writes in CELL of these sizes [R], in native norms."""
    edits = steering.directions(single, trial.goal, [CELL], name)
    return steering.end_logits(single, trial.goal, steering.scaled(edits, magnitude))


def test_a_dose_is_where_the_target_first_comes_next(single, trial):
    table, target = install.doses(single, CELL, trial, grid=DOSES, bisections=3), trial.goal.tokens
    pd.testing.assert_frame_equal(install.doses(single, CELL, trial, grid=DOSES[::-1], bisections=3), table)
    for name, part in table.groupby("direction"):
        dose = torch.tensor(part.dose.to_numpy())
        won = torch.nonzero(dose.isfinite())[:, 0]
        at = torch.where(dose.isfinite(), dose, 1.0).float()
        logits = logits_at(single, trial, name, at)
        assert (logits.argmax(-1)[won] == target[won]).all()
        for grid in DOSES:  # smaller doses of the grid do not suffice
            logits = logits_at(single, trial, name, torch.full_like(at, grid))
            assert not ((logits.argmax(-1) == target) & (grid < dose)).any()


def test_trials_say_what_was_generated(single, trial):
    native = install.native_continuations(single, trial.goal.run, 4)
    table = install.trials(single, CELL, trial, native, magnitudes=[3.0])
    assert len(table) == len(install.ONE_CELL) * len(trial.label)
    part = table[table.direction == "gamma"].reset_index(drop=True)
    logits = logits_at(single, trial, "gamma", torch.full((len(part),), 3.0))
    ranks = 1 + (logits > logits.gather(-1, trial.goal.tokens[:, None])).sum(-1)
    assert part.edited_rank.tolist() == ranks.tolist()
    assert ((part.edited_rank > 1) | (part.included_edited == 1)).all()


# Cells, windows and harvests


def test_write_ranks_and_half_lives(host, tokens):
    table = cells_module.survey_cells(host, host.run(tokens), first_position=8)
    assert (table.added_write_rank == 1).all()
    assert (table.effective_write_rank == 1).all()
    run = host.run(tokens)
    alpha = host.factors(run, *CELL).log_decay.exp().flatten()
    wanted = np.quantile(np.log(0.5) / np.log(alpha.numpy()), 0.5, method="lower")
    assert table.query("layer == 1 and head == 2").half_life_median.item() == pytest.approx(wanted, rel=1e-4)
    one = cells_module.survey_cells(
        host, host.run(tokens), first_position=8, cells=[(1, head) for head in range(host.heads)]
    )
    pd.testing.assert_frame_equal(one, table[table.layer == 1].reset_index(drop=True))
    with pytest.raises(ValueError, match="Layer 2 of small is not recurrent: choose one of 0, 1, 3, 4"):
        cells_module.survey_cells(host, host.run(tokens), first_position=8, cells=[(1, 0), (2, 0)])


def test_the_rule_picks_the_nearest_ratio():
    table = pd.DataFrame(dict(layer=[1, 1, 4, 4], head=[0, 1, 0, 1], sigma1_over_sigma2=[6.0, 30.0, 2.0, 9.0]))
    section = HostSection(path="x", cells=dict(early=dict(layer=1, sigma_ratio=12), late=dict(layer=4, sigma_ratio=3)))
    chosen = hosts.choose_cells(table, section)
    assert chosen[["place", "head"]].values.tolist() == [["early", 0], ["late", 0]]
    wrong = HostSection(path="x", cells=dict(early=dict(layer=3, sigma_ratio=12)))
    with pytest.raises(ValueError, match="early cell's layer 3 is not recurrent: choose one of 1, 4"):
        hosts.choose_cells(table, wrong)


CANDIDATES = pd.DataFrame(
    dict(
        layer=[1, 1, 4, 4, 6, 6],
        head=[0, 1, 0, 1, 0, 1],
        sigma1_over_sigma2=[6.0, 30.0, 2.0, 9.0, 11.0, 5.0],
        cost=[0.01, 0.02, 0.09, 0.05, 0.03, -0.02],
    ),
    index=[7, 3, 9, 1, 5, 2],  # rows of a larger table
)


def chosen_by(**cells) -> pd.DataFrame:
    return hosts.choose_cells(CANDIDATES, HostSection(path="x", cells=cells)).set_index("place")


def test_a_rule_without_a_layer_chooses_among_all_cells():
    anywhere = chosen_by(regime=dict(sigma_ratio=12), weighty=dict(cost="largest"))
    assert anywhere[["layer", "head"]].values.tolist() == [[6, 0], [4, 0]]
    assert anywhere.rule.tolist() == ["sigma1/sigma2 nearest to 12, any layer", "largest cost, any layer"]
    assert anywhere.instead_of.isna().all()
    within = chosen_by(late=dict(layer=6, cost="largest"), weighty=dict(layer=1, cost="largest"))
    assert within[["layer", "head"]].values.tolist() == [[6, 0], [1, 1]]


def test_no_two_places_have_the_same_cell():
    rules = dict(middle=dict(layer=4, head=0), late=dict(layer=6, sigma_ratio=12))
    chosen = chosen_by(**rules, regime=dict(sigma_ratio=12), weighty=dict(cost="largest"))
    assert chosen[["layer", "head"]].values.tolist() == [[4, 0], [6, 0], [4, 1], [1, 1]]
    assert chosen.instead_of[["regime", "weighty"]].tolist() == ["late", "middle"]
    assert chosen.instead_of[["middle", "late"]].isna().all()
    taken = "The late cell, head 0 of layer 4, is already the middle cell"
    with pytest.raises(ValueError, match=taken):
        chosen_by(middle=dict(layer=4, sigma_ratio=2.0), late=dict(layer=4, head=0))


def test_the_table_of_chosen_cells_ranks_their_costs():
    cells = CANDIDATES.assign(host="a", cost_low=CANDIDATES.cost - 0.01, cost_high=CANDIDATES.cost + 0.02)
    cells = cells.assign(half_life_median=2.0)
    rules = dict(late=dict(layer=6, head=0), regime=dict(sigma_ratio=12), weighty=dict(layer=4, cost="largest"))
    chosen = hosts.choose_cells(cells, HostSection(path="x", cells=rules))
    table = hosts.chosen_table(cells, chosen).droplevel("host")
    assert table["layer, head"].tolist() == ["L6 H0", "L4 H1", "L4 H0"]
    assert table["rank of the cost"].tolist() == ["3 of 6", "2 of 6", "1 of 6"]
    assert table["cost (millinats per token)"]["late"] == "30.0 [20.0, 50.0]"
    assert (
        table.rule["σ1/σ2 nearest to the paper's 12"]
        == "sigma1/sigma2 nearest to 12, any layer; its first choice is late"
    )


def test_costs_are_measured_outside_of_the_searched_windows():
    windows, data = Windows(torch.arange(12)[:, None], torch.arange(12)), load_profile("smoke").data

    def chosen(**counts) -> list[int]:
        profile = SimpleNamespace(data=data.model_copy(update=counts))
        study = SimpleNamespace(profile=profile, windows=lambda host, split: windows)
        return hosts.cost_windows(study, "x").passage.tolist()

    assert chosen(firing_windows=6, cost_windows=4) == [6, 8, 9, 11]
    assert chosen(firing_windows=10, cost_windows=4) == [0, 4, 7, 11]
    assert chosen(firing_windows=12, cost_windows=16) == list(range(12))


def test_an_interval_of_a_cost_is_over_passages():
    windows = pd.DataFrame(dict(window=[0, 1, 2, 3], cost=[0.01, 0.01, 0.05, 0.05]))
    row = hosts._cost(windows, torch.tensor([8, 8, 9, 9]), seed=1)
    assert (row["cost"], row["cost_windows"]) == (pytest.approx(0.03), 4)
    assert (row["cost_low"], row["cost_high"]) == (pytest.approx(0.01), pytest.approx(0.05))
    assert np.isnan(hosts._cost(windows, torch.tensor([8, 8, 8, 8]), seed=1)["cost_low"])


def test_a_survey_may_leave_layers_out(monkeypatch):
    profile = load_profile("smoke")

    def layers(**settings):
        replacement = profile.replacement.model_copy(update=settings)
        study = Study(profile.model_copy(update=dict(replacement=replacement)))
        monkeypatch.setattr(study, "host", lambda name: SimpleNamespace(recurrent_layers=(0, 1, 2, 4, 5, 6, 8)))
        return study.survey_layers(study.main)

    assert layers(survey_every=1) == (0, 1, 2, 4, 5, 6, 8)
    assert layers(survey_every=3) == (0, 4, 8)
    assert layers(survey_every=3, survey_firings=0) == ()


def test_a_suite_takes_the_threads_that_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    with threads(1):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        open_study("smoke")
        assert torch.get_num_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # only Linux has it
        assert open_study("smoke").workers == torch.get_num_threads() == joblib.cpu_count() >= 1


class Words:
    eos_token_id = 0

    def __call__(self, text, **_):
        return dict(input_ids=[int(word) for word in text.split()])


def test_windows_never_cross_passages_and_short_ones_give_none():
    texts = [" ".join(map(str, range(1, 10))), "20 21", " ".join(map(str, range(30, 34)))]
    found = cut_windows(Words(), texts, 5)
    assert found.tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 30, 31, 32, 33]]
    assert found.passage.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="passages are shorter than a window: lower the window"):
        cut_windows(Words(), ["1 2", "3"], 5)


def test_harvest_refuses_what_is_not_a_cell_and_what_is_not_finite(host, tokens, factors):
    with pytest.raises(ValueError, match="not recurrent"):
        harvest(host, tokens, [(2, 0)], batch=2, progress=False)
    broken = factors.map(torch.clone)
    broken.effective[1, 17, 0] = float("nan")
    with pytest.raises(ValueError, match="window 1, position 17"):
        broken.history("state")


def test_harvest_is_the_run_s_factors(host, run, factors):
    f = host.factors(run, *CELL)
    assert_close(factors.key, f.key, "key", 1e-6)
    assert_close(factors.effective, f.effective, "effective", 1e-6)
    assert_close(factors.log_decay, f.log_decay, "log decay", 1e-6)
