"""replication.pages.ablations: variants on a small host, against matrices and edited runs."""

import copy

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers import SmallStudy, assert_close, train_sae

from replication import statistics
from replication.pages import ablations, selectivity
from replication.pages.ablations import REFERENCE
from replication.study import training
from replication.study.profile import Ablations, load_profile
from replication.study.study import Study
from writesae import files
from writesae.edit import edited_hidden, kl, make_edit
from writesae.evaluate.firings import Places
from writesae.harvesting import harvest

CELL, PLACE, HEADS = (1, 2), "middle", 8
WINDOWS, TOKENS = 10, 50
BASE = dict(n_atoms=24, k=3, tokens=3200, batch_windows=2, lr=3e-3, final_lr=3e-4, warmup=2)
VARIANTS = [
    dict(targets=["state", "write"]),
    dict(encoder="dense", decoder="flat"),
    dict(rank=2, targets=["write"]),
    dict(encoder="tied"),
    dict(activation="gated", targets=["write"]),
    dict(initial="random", targets=["write"]),
    dict(activation="jumprelu"),
]


def own_of(**changes) -> Ablations:
    fields = dict(firings=12, training=BASE, training_windows=18, variants=VARIANTS, windows=WINDOWS, bootstrap=50)
    return Ablations(**fields | dict(selectivity=dict(windows=WINDOWS, firings=9, tops=[1, 4])) | changes)


def test_variants_that_need_states_come_first_and_none_comes_twice():
    found = training.ablation_variants(own_of(), seed=7)
    names = [(target, settings.variant) for _, target, settings in found]
    assert names[:2] == [("state", "dense+flat"), ("write", "bilinear+rank2")] and len(names) == 8
    assert {settings.seed for *_, settings in found} == {7} and {settings.k for *_, settings in found} == {3}
    with pytest.raises(ValueError, match="names a variant twice"):
        training.ablation_variants(own_of(variants=[dict(), dict(encoder="bilinear")]), seed=0)
    with pytest.raises(ValueError, match="rank1 decoder"):
        own_of(variants=[dict(encoder="tied", decoder="flat")])


def test_profiles_ask_the_main_host_alone():
    for name in ("mini", "smoke"):
        study = Study(load_profile(name))
        assert list(training.ablation_hosts(study)) == [study.main]
        for _, _, settings in training.ablation_variants(study.profile.ablations, 0):
            assert settings.steps(study.profile.data.window) > 3


# Statistics


def windows_of(variant: str, squared, energy=1.0, **more) -> pd.DataFrame:
    where = dict(host="h", place="middle", layer=1, head=2, target="state", variant=variant)
    frame = dict(window=range(len(squared)), passage=[0, 0, 1, 2, 3, 3], squared=squared, energy=energy, tokens=10)
    return pd.DataFrame(where | frame | dict(active=30, dead=4, n_atoms=20, k=3) | more)


def firings_of(variant: str, wins, atoms=None) -> pd.DataFrame:
    where = dict(host="h", place="middle", layer=1, head=2, target="state", variant=variant)
    atoms = np.arange(len(wins)) % 4 if atoms is None else atoms
    frame = dict(passage=np.arange(len(wins)) % 5, atom=atoms, kl_delete=1.0, kl_random=2.0)
    frame = pd.DataFrame(where | frame | dict(kl_atom=np.where(wins, 0.5, 1.5), kl_whole_atom=np.nan))
    return pd.concat([frame.assign(amplitude=name) for name in ("coefficient", "matched_norm")])


def test_the_interval_of_a_ratio_draws_whole_passages():
    energy = np.array([1.0, 5.0, 2.0, 2.0, 1.0, 4.0])
    table = windows_of("a", energy * [0.1, 0.2, 0.9, 0.5, 0.4, 0.3], energy)
    low, high = statistics.cluster_bootstrap(ablations.fvu(table), table.passage, resamples=4000, seed=1)
    generator, found = np.random.default_rng(2), []
    passages = [part[["squared", "energy"]].to_numpy() for _, part in table.groupby("passage")]
    for _ in range(4000):
        squared, energy = np.concatenate([passages[p] for p in generator.integers(0, 4, 4)]).sum(0)
        found.append(squared / energy)
    assert (low, high) == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.03)


def test_a_summary_counts_what_the_tables_hold():
    windows = pd.concat([windows_of("a", [0.5] * 6), windows_of("b", [0.25] * 6, dead=0)])
    table = ablations.summarise(
        windows, pd.DataFrame({c: [] for c in ablations.KEYS}), firings_of("a", [1, 1, 0, 1]), 50, 0
    )
    a, b = table.set_index("variant").loc["a"], table.set_index("variant").loc["b"]
    assert (a.fvu, a.fvu_low, b.fvu, a.l0) == (0.5, 0.5, 0.25, 3.0)
    assert (a.dead_fraction, (a.dead_low, a.dead_high)) == (0.2, statistics.wilson(4, 20))
    assert (a.win_rate_coefficient, a.n_firings) == (0.75, 4) and a.win_random_coefficient == 0
    assert (a.ci_low_matched_norm, a.ci_high_matched_norm) == statistics.wilson(3, 4)
    assert np.isnan(b.win_rate_coefficient), "no firing, no win rate"


def test_contrasts_are_against_the_reference():
    noise = np.array([0.5, 0.9, 0.4, 0.7, 0.6, 0.2])
    windows = pd.concat([windows_of(REFERENCE, noise), windows_of("b", 0.8 * noise, dead=14)])
    ours, base = np.tile([1, 1, 1, 0], 30), np.tile([1, 0], 60)
    table = ablations.contrasts(windows, pd.concat([firings_of(REFERENCE, base), firings_of("b", ours)]), 500, 0)
    assert set(table.variant) == {"b"} and set(table.reference) == {REFERENCE}
    row = table.set_index("quantity").loc["fvu_ratio"]
    assert (row.value, row.ci_low, row.ci_high) == pytest.approx((0.8, 0.8, 0.8)), "paired: the same in every passage"
    row = table.set_index("quantity").loc["dead_fraction"]
    assert row.value == pytest.approx(0.5) and 0.15 < row.ci_low < 0.5 < row.ci_high < 0.75
    row = table.set_index("quantity").loc["win_rate_coefficient"]
    assert row.value == pytest.approx(0.25) and row.n == 240
    by_atom, generator = [], np.random.default_rng(3)
    for _ in range(4000):
        rates = [np.mean(generator.choice(x, 4)) for x in ([1, 1, 1, 0], [1, 0, 1, 0])]
        by_atom.append(rates[0] - rates[1])
    assert (row.ci_low, row.ci_high) == pytest.approx(np.quantile(by_atom, [0.025, 0.975]), abs=0.15), "the wider one"
    assert ablations.contrasts(windows[windows.variant == "b"], firings_of("b", ours), 50, 0).empty
    whole = firings_of("b", ours).assign(kl_whole_atom=np.where(np.arange(240) % 10, 1.5, 0.5))  # of a higher rank
    table = ablations.contrasts(windows, pd.concat([firings_of(REFERENCE, base), whole]), 50, 0)
    assert table.set_index("quantity").value["win_rate_coefficient"] == pytest.approx(0.1 - 0.5), "by the whole atom"


# A small study


class OneCell(SmallStudy):
    """The mini profile with one small host, its windows and one cell."""

    def __init__(self, host, tokens):
        mini = load_profile("mini")
        hosts = {"small": mini.hosts["gated_deltanet"].model_copy(update=dict(cells={PLACE: None}))}
        data = mini.data.model_copy(
            update=dict(sae_windows=20, first_position=5, batch_windows=4, firing_windows=WINDOWS)
        )
        changed = dict(hosts=hosts, data=data, ablations=own_of(), workers=1)
        super().__init__(mini.model_copy(update=changed), host, tokens)
        self.__dict__["cells"] = pd.DataFrame([dict(host="small", place=PLACE, layer=CELL[0], head=CELL[1])])


@pytest.fixture(scope="module")
def study(gated_deltanet, tmp_path_factory):
    """The small study with all variants and the profile's main SAEs trained."""
    single = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), None, "small")
    tokens = torch.randint(1, 300, (20, TOKENS), generator=torch.Generator().manual_seed(4))
    patch = pytest.MonkeyPatch()
    patch.setenv("WRITESAE_OUTPUT", str(tmp_path_factory.mktemp("ablations")))
    made = OneCell(single, tokens)
    factors = harvest(single, tokens, [CELL], 4, progress=False)[CELL]
    files.save_tensors(made.harvest_path("small", *CELL), factors.tensors(), dict(fingerprint="harvest", seconds=1.0))
    found = training.ablation_variants(made.profile.ablations, made.profile.seed)
    settings = next(s for *_, s in found if s.variant == REFERENCE)
    for target, name in (("state", "main"), ("write", "main"), ("state", "flat")):
        train_sae(made, name, CELL, target, settings, factors)
    training.train_ablations(made)
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def found(study):
    return ablations.run(study)


@pytest.fixture(scope="module")
def factors(study):
    return harvest(study.small, study.split.tokens[:WINDOWS], [CELL], 4, progress=False)[CELL]


def test_a_variant_is_trained_once_and_on_the_windows_that_are_not_kept(study, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train_one", lambda *a: seen.append(a[2:4]) or pytest.fail("trained again"))
    training.train_ablations(study)
    monkeypatch.setattr(study, "windows_hash", lambda *_: "other windows")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        training.train_ablations(study)
    assert [len(x) for x in seen[0]] == [10, 8], "18 windows, of which 8 are kept"
    more = study.profile.model_copy(update=dict(ablations=own_of(training_windows=21)))
    monkeypatch.setattr(study, "profile", more)
    with pytest.raises(ValueError, match="training_windows is 21, above data.sae_windows, 20"):
        training.train_ablations(study)


def test_errors_are_those_of_the_decoded_matrices(study, found, factors):
    windows, _, _ = found
    assert len(windows) == 8 * WINDOWS
    for (target, variant), part in windows.groupby(["target", "variant"]):
        sae = study.sae("small", *CELL, target, training.ablation_role(variant))
        states = factors.history(target, "added").steps()
        active = sae.encode(states)
        squared = (states - sae.decode(*active)).square().sum((1, 2, 3))
        assert_close(part.squared.tolist(), squared, f"{variant}: squared error", 1e-4)
        assert_close(part.energy.tolist(), (states - sae.mean).square().sum((1, 2, 3)), "energy", 1e-4)
        assert part.active.sum() == pytest.approx(int((active.coefficients > 0).sum()), abs=2), variant
        assert part.dead.iloc[0] == 24 - len(active.indices[active.coefficients > 0].unique())


def test_the_summary_has_a_line_a_variant(study, found):
    table, contrasts = ablations.tables(study, *found)
    assert len(table) == 8 and not table.duplicated(["target", "variant"]).any()
    known = table.dropna(subset="alive")
    assert (known.registers + known.bundles + known["null"] == 24).all() and len(known) >= 4
    assert (table.fvu_low <= table.fvu).all() and (table.fvu <= table.fvu_high).all()
    topk = table[~table.variant.str.contains("gated|jump")]
    assert (topk.l0 <= 3).all() and (topk.l0 > 2).all()
    assert set(table.n_firings) == {12}
    whole = table.set_index("variant").whole_win_rate_coefficient.notna()
    assert set(whole.index[whole]) == {"dense+flat", "bilinear+rank2"}
    assert set(contrasts.variant) == set(table.variant) - {REFERENCE}


def divergence(study, row, left, right) -> float:
    """KL(native, edited) of the token after (window, position), from a separate edited run."""
    run = study.small.run(study.split.tokens[[row.window]])
    at = torch.tensor([row.position])
    edit = make_edit(torch.tensor([0]), at, left[None], right[None])
    hidden = edited_hidden(study.small, run, *CELL, edit, 2)[:, -1]
    native = study.small.logits(run.final[0, row.position + 1])
    return kl(native, study.small.logits(hidden)[0]).item()


def test_whole_atoms_and_top_pairs_are_put_in_the_place_of_writes(study, found, factors):
    _, _, firings = found
    several = firings[firings.variant.isin(["dense+flat", "bilinear+rank2"])]
    assert firings[~firings.variant.isin(["dense+flat", "bilinear+rank2"])].kl_whole_atom.isna().all()
    for row in several.groupby(["variant", "amplitude"]).head(2).itertuples():
        sae = study.sae("small", *CELL, row.target, training.ablation_role(row.variant))
        matrix = sae.decoder.weight()[row.atom]
        key, write = factors.key[row.window, row.position], factors.added[row.window, row.position]
        size = row.coefficient if row.amplitude == "coefficient" else (key.norm() * write.norm()).item()
        u, _, v = torch.linalg.svd(matrix)
        for name, atom in (("whole_atom", matrix / matrix.norm()), ("atom", u[:, :1] * v[:1])):
            change = size * atom - key[:, None] * write
            wanted = divergence(study, row, torch.eye(len(key)), change)
            assert getattr(row, f"kl_{name}") == pytest.approx(wanted, rel=2e-3, abs=1e-7), name


def test_a_stage_is_read_again_until_an_sae_changes(study, found, monkeypatch):
    again = ablations.run(study)
    for a, b in zip(again, found, strict=True):
        pd.testing.assert_frame_equal(a, b)
    monkeypatch.setattr(ablations, "described_atoms", lambda *_: pytest.fail("computed again"))
    ablations.run(study)
    sae = type(study).sae

    def changed(*arguments):
        loaded = sae(*arguments)
        if arguments[-1] == training.ablation_role(REFERENCE):
            loaded.decoder.key[0].neg_()
        return loaded

    monkeypatch.setattr(type(study), "sae", changed)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        ablations.run(study)


def test_a_profile_that_asks_no_host_is_refused(study, monkeypatch):
    monkeypatch.setattr(study, "profile", study.profile.model_copy(update=dict(ablations=own_of(firings=0))))
    with pytest.raises(ValueError, match="0 for every host"):
        training.ablation_hosts(study)
    other = own_of(variants=[dict(places=["middle", "late"])])
    monkeypatch.setattr(study, "profile", study.profile.model_copy(update=dict(ablations=other)))
    with pytest.raises(ValueError, match="asks for late, and small lacks it"):
        training.ablation_hosts(study)


# Selectivity


def test_overlap_by_sets():
    a, b = (torch.randn(6, 30, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = selectivity.overlap(a, b, 7)
    for x, y, share in zip(a.abs(), b.abs(), found):
        sets = [set(sorted(range(30), key=lambda i: -z[i])[:7]) for z in (x, y)]
        assert share == len(sets[0] & sets[1]) / 7
    assert selectivity.overlap(a, -a, 7).tolist() == [1] * 6


@pytest.fixture(scope="module")
def compared(study):
    return selectivity.selectivity(study)


def test_controls_are_put_in_and_added_as_they_say(study, compared, factors):
    assert len(compared) == 2 * 9 * 3
    for row in compared.groupby(["target", "placement"]).head(2).itertuples():
        sae = study.sae("small", *CELL, row.target, "main")
        key, write = factors.key[row.window, row.position], factors.added[row.window, row.position]
        own = [x[row.atom] for x in sae.atoms()]
        places = Places.of(pd.DataFrame([dict(window=row.window, position=row.position, atom=0, coefficient=1.0)]))
        drawn = selectivity.directions(places, len(key) + len(write), study.profile.seed)[0].split(
            [len(key), len(write)]
        )
        square = [x - (x @ y) * y for x, y in zip(drawn, own)]
        assert max(abs((x @ y).item()) for x, y in zip(square, own)) < 1e-5
        size = row.coefficient if row.placement == "coefficient" else (key.norm() * write.norm()).item()
        for name, (left, right) in dict(atom=own, random=drawn, orthogonal=square).items():
            change = size * torch.outer(left / left.norm(), right / right.norm())
            if row.placement != "added":
                change = change - torch.outer(key, write)
            wanted = divergence(study, row, torch.eye(len(key)), change)
            assert getattr(row, f"kl_{name}") == pytest.approx(wanted, rel=2e-3, abs=1e-7), (row.placement, name)
        wanted = divergence(study, row, key[:, None].T, -write[None])
        assert row.kl_delete == pytest.approx(wanted, rel=2e-3, abs=1e-7)
    added = compared.placement == "added"
    assert compared[added].overlap_random_4.between(0, 1).all() and compared[~added].overlap_random_4.isna().all()


def test_random_directions_follow_from_the_firing(study, compared):
    frame = pd.DataFrame(dict(window=[0, 0, 3], position=[5, 6, 5], atom=0, coefficient=1.0))
    places, backwards = Places.of(frame), Places.of(frame[::-1])
    a, b = (selectivity.directions(x, 4, 1) for x in (places, backwards))
    assert torch.equal(a, b.flip(0)) and len(a.unique(dim=0)) == 3
    assert not torch.equal(a, selectivity.directions(places, 4, 2))


def test_selectivity_tables(study, compared):
    summary, overlaps = selectivity.selectivity_tables(study, compared)
    row = summary.query("target == 'write' and placement == 'matched_norm' and control == 'random'")
    assert list(row.cells) == ["pooled", PLACE]
    part = compared.query("target == 'write' and placement == 'matched_norm'")
    row = row.iloc[0]
    assert row.atom_closer == pytest.approx((part.kl_atom < part.kl_random).mean(), rel=1e-5)
    assert row.wilcoxon_p == pytest.approx(statistics.paired_wilcoxon(part.kl_atom, part.kl_random), rel=1e-4)
    pairs = np.sign(part.kl_random.to_numpy()[:, None] - part.kl_atom.to_numpy())
    assert row.cliffs_delta == pytest.approx(pairs.mean(), rel=1e-4, abs=1e-6)
    assert len(overlaps) == 2 * 2 * 2 * 2 and set(overlaps.top) == {1, 4}
    row = overlaps.query("target == 'state' and cells == 'pooled' and control == 'orthogonal' and top == 4").iloc[0]
    part = compared.query("target == 'state' and placement == 'added'")
    assert row.selectivity == pytest.approx(1 - part.overlap_orthogonal_4.mean(), rel=1e-5)
    assert row.ci_low <= row.selectivity <= row.ci_high


def test_starts_are_compared_seed_by_seed():
    rates = dict(write_data=[[0.8, 0.6], [0.7, 0.7]], write_random=[[0.6, 0.5], [0.6, 0.5]])  # [seed][layer]
    rows = [
        dict(name=name, host="small", target="write", layer=layer, head=3, seed=seed, firings=40, fvu=0.5 + layer)
        | dict(win_atom_coefficient=rate)
        for name, by_seed in rates.items()
        for seed, by_layer in enumerate(by_seed)
        for layer, rate in enumerate(by_layer)
    ]
    row = ablations.starts(pd.DataFrame(rows)).iloc[0]
    assert (row.win_data, row.win_random) == pytest.approx((0.7, 0.55)) and row.fvu_random == pytest.approx(1.0)
    assert (row.seeds, row.n) == (2, 80) and row.difference == pytest.approx(-0.15)
    assert row.difference_high - row.difference == pytest.approx(0.0 * 12.706, abs=1e-9), "both seeds differ by 0.15"
    rows[0]["win_atom_coefficient"] = 1.0  # seed 0 then differs by 0.25
    row = ablations.starts(pd.DataFrame(rows)).iloc[0]
    error = np.std([0.25, 0.15], ddof=1) / 2**0.5
    assert row.difference_high - row.difference == pytest.approx(12.706 * error, rel=1e-3)


def test_a_rung_of_the_ladder_has_the_errors_of_seeds_and_of_places():
    wins, seeds = dict(state=[0.40, 0.44, 0.48], write=[0.70, 0.80, 0.75]), (1, 2, 3)
    rows = [
        dict(host="a", layer=4, head=3, n_atoms=512 * scale, k=16, tokens=5 * scale, target=target, seed=seed)
        | dict(firings=400, win_atom_coefficient=rate, fvu=0.5 / scale, final_training_fvu=0.4)
        | dict(win_atom_projection=rate / 2)
        for scale in (1, 4)
        for target, rates in wins.items()
        for seed, rate in zip(seeds, rates, strict=True)
    ]
    small, large = ablations.ladder(pd.DataFrame(rows)).itertuples()
    assert (small.n_atoms, large.n_atoms, large.fvu_write, large.n, large.seeds) == (512, 2048, 0.125, 400, 3)
    assert (small.state, small.write, small.difference) == pytest.approx((0.44, 0.75, 0.31))
    own, places = np.var(wins["state"], ddof=1) / 3, np.mean([p * (1 - p) for p in wins["state"]]) / 400
    freedom = (own + places) ** 2 / (own**2 / 2 + places**2 / 399)
    reach = scipy.stats.t.ppf(0.975, freedom) * (own + places) ** 0.5
    assert small.state_high - small.state == pytest.approx(reach, rel=1e-6)
    assert (large.state_projection, large.difference_projection) == pytest.approx((0.22, 0.155))
    shown = ablations.shown_ladder(ablations.ladder(pd.DataFrame(rows)))
    assert shown.index.tolist() == ["512, 16, 0.0 million", "2,048, 16, 0.0 million"]


def test_the_ladder_of_the_headline_is_the_mean_over_its_cells_for_each_seed():
    layers, size = dict(early=1, middle=4, late=6, regime=2), dict(n_atoms=512, k=16)
    cells = pd.DataFrame([dict(host="a", layer=layer, head=3, place=name) for name, layer in layers.items()])
    random = np.random.default_rng(0)
    rates = {
        (layer, target, seed): random.uniform(0.2, 0.8)
        for layer in (1, 4, 6)
        for target in ("state", "write")
        for seed in (1, 2, 3)
    }
    rows = [
        dict(host="a", layer=layer, head=3, target=target, seed=seed, tokens=5, firings=100 * layer)
        | size
        | dict(win_atom_coefficient=rate, win_atom_projection=rate, final_training_fvu=0.1)
        | dict(fvu=layer / 10 + (target == "write") / 5)
        for (layer, target, seed), rate in rates.items()
    ]
    only_there = [row | other for row in rows if row["layer"] == 4 for other in (dict(tokens=7), dict(seed=9))]
    table = ablations.ladder_of_headline(pd.DataFrame(rows + only_there), cells)
    assert table.cells.tolist() == ["pooled", "early", "middle", "late"] and set(table.tokens) == {5}
    pooled = table.iloc[0]
    assert (pooled.n, pooled.seeds) == (1100, 3) and pooled.fvu_state == pytest.approx(11 / 30)
    by_seed = [
        np.mean([rates[layer, "write", seed] - rates[layer, "state", seed] for layer in (1, 4, 6)])
        for seed in (1, 2, 3)
    ]
    places = sum(
        np.mean([rates[layer, target, seed] * (1 - rates[layer, target, seed]) for seed in (1, 2, 3)])
        / (100 * layer)
        / 9
        for layer in (1, 4, 6)
        for target in ("state", "write")
    )
    own = np.var(by_seed, ddof=1) / 3
    freedom = (own + places) ** 2 / (own**2 / 2 + places**2 / 1097)
    assert pooled.difference == pytest.approx(np.mean(by_seed))
    reach = scipy.stats.t.ppf(0.975, freedom) * (own + places) ** 0.5
    assert pooled.difference_high - pooled.difference == pytest.approx(reach, rel=1e-6)
    one = ablations.ladder(pd.DataFrame(rows).query("seed == 2 and layer == 6")).iloc[0]
    places = rates[6, "state", 2] * (1 - rates[6, "state", 2]) / 600
    assert one.seeds == 1 and one.state == rates[6, "state", 2], "one seed: the interval of the places"
    assert one.state_high - one.state == pytest.approx(scipy.stats.t.ppf(0.975, 599) * places**0.5)
    shown = ablations.shown_ladder(table)
    assert shown.index.names == ["cell", "atoms, active, tokens"] and shown.seeds.tolist() == [3] * 4
    assert shown["FVU, states and writes"].iloc[0] == "0.37, 0.57", "the means over the cells"
    assert shown.index.nlevels + shown.shape[1] <= 8, "the widest table that a page shows"
