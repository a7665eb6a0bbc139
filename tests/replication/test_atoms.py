"""Atoms: classes, seeds, exemplars and axes against counts by hand; the stages on small hosts."""

import copy
import itertools
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import SmallProfile, SmallStudy, train_sae
from scipy import stats as scipy_stats

from replication import classes as population
from replication import statistics
from replication.pages import atoms
from replication.study import training
from replication.study.profile import CellRule, Data, HostSection, Saes
from writesae import files
from writesae.evaluate import atoms as atoms_module
from writesae.harvesting import harvest
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings
from writesae.text import Windows

RNG = np.random.default_rng(11)
ONE = RNG.normal(0.1, 0.02, 300)
TWO = np.r_[RNG.normal(0.01, 0.01, 120), RNG.normal(0.5, 0.05, 60)]
THREE = np.r_[TWO, RNG.normal(0.9, 0.01, 80)]


# Classes


def test_bic_finds_the_number_of_components_that_made_the_values():
    for count, values in enumerate((ONE, TWO, THREE), start=1):
        table = population.mixtures(values)
        assert table.components[table.bic.idxmin()] == count
        for row in table[1:].itertuples():
            assert (row.delta_bic < 0) == (row.components <= count)
            assert row.ci_low < row.delta_bic < row.ci_high
            assert row.n == len(values)
    assert population.mixtures(TWO).ci_high[1] < 0


def test_densities_are_sums_of_gaussians_and_give_the_bic():
    for count in (1, 2, 3):
        fit = statistics.fit_mixture(TWO[:, None], count, 0)
        found = fit.score_samples(TWO[:, None])
        parameters = 3 * fit.n_components - 1
        assert -2 * found.sum() + parameters * np.log(len(TWO)) == pytest.approx(fit.bic(TWO[:, None]), rel=1e-9)
        parts = scipy_stats.norm.logpdf(TWO[:, None], fit.means_[:, 0], fit.covariances_[:, 0, 0] ** 0.5)
        np.testing.assert_allclose(np.exp(found), np.exp(parts) @ fit.weights_)


def test_the_interval_of_delta_bic_is_that_of_its_sum():
    """The interval against a bootstrap by a loop; the two fits stay those of the full data."""
    one, two = (statistics.fit_mixture(TWO[:, None], count, 0).score_samples(TWO[:, None]) for count in (1, 2))
    gain, generator = two - one, np.random.default_rng(3)
    found = [3 * np.log(len(TWO)) - 2 * generator.choice(gain, len(TWO)).sum() for _ in range(2000)]
    row, wanted = population.mixtures(TWO).iloc[1], np.quantile(found, [0.025, 0.975])
    assert (row.ci_low, row.ci_high) == pytest.approx(wanted, abs=0.05 * (wanted[1] - wanted[0]))


def test_bimodality_of_known_shapes():
    assert population.bimodality(RNG.normal(size=40_000)) == pytest.approx(1 / 3, abs=0.01)
    assert population.bimodality(RNG.uniform(size=40_000)) == pytest.approx(5 / 9, abs=0.01)
    assert population.bimodality(np.r_[RNG.normal(-9, 1, 400), RNG.normal(9, 1, 400)]) > 0.9


def alive_table(cosines, **more):
    classes = population.classify(pd.Series(cosines), seed=0)
    return pd.DataFrame({"cosine": cosines, "elsewhere": 0.25, "n_atoms": 200, "class": classes} | more)


def test_a_known_mixture_is_parted_and_counted():
    row = population.partition(alive_table(TWO))
    assert (row["registers"], row["bundles"], row["alive"], row["null"]) == (60, 120, 180, 20)
    assert row["register_share"] == pytest.approx(1 / 3)
    assert (row["ci_low"], row["ci_high"]) == statistics.wilson(60, 180)
    assert row["register_cosine"] == np.median(TWO[120:])
    assert row["bundle_low"] < row["bundle_cosine"] == np.median(TWO[:120]) < row["bundle_high"] < 0.02
    assert row["elsewhere_cosine"] == 0.25


def test_a_class_of_one_has_a_median_and_no_interval():
    value, low, high = population.median(pd.Series([0.4]))
    assert value == 0.4 and np.isnan([low, high]).all()
    assert np.isnan(population.median(pd.Series([], dtype=float))).all()


def test_thresholds_count_what_reaches_them():
    table = population.thresholds(pd.Series([-0.3, 0.01, 0.02, 0.05, 0.5]), [0.02, 0.05, 0.6])
    assert table.registers.tolist() == [3, 2, 0]
    assert table.bundles.tolist() == [2, 3, 5]
    assert (table.ci_low[0], table.ci_high[0]) == statistics.wilson(3, 5)


# Seeds


def test_variation_by_hand():
    found = atoms.variation([8, 10, 12])
    assert (found["mean"], found["cv"], found["n"]) == (10, pytest.approx(0.2), 3)
    quantiles = -2 * np.log([0.025, 0.975])  # of chi-square with two degrees of freedom
    wanted = 0.2 * np.sqrt(2 / quantiles)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(wanted)


def random_sae(seed, n=40):
    torch.manual_seed(seed)
    return SAE(Architecture(n_atoms=n, k=4), 12, 20)


def permuted(sae):
    """The same atoms in another order. Half change the sign of both factors, half only of the key."""
    other, order = copy.deepcopy(sae), torch.randperm(sae.n_atoms, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        other.decoder.key.copy_(-sae.decoder.key[order])
        other.decoder.value.copy_(sae.decoder.value[order])
        other.decoder.value[::2] *= -1
    return other


def test_every_atom_is_found_again_in_a_permuted_copy_and_none_in_random_atoms():
    sae = random_sae(0)
    table = atoms_module.matches({0: sae, 1: permuted(sae), 2: random_sae(7)})
    assert len(table) == 6 * 40
    share = (table.best > atoms_module.MATCH).groupby([table.seed, table.other_seed]).mean()
    assert share[0, 1] == share[1, 0] == 1
    assert share[0, 2] == share[2, 0] == share[1, 2] == 0
    assert (table.chance <= atoms_module.MATCH).all()


def test_inner_products_are_those_of_the_matrices():
    a, b = random_sae(1, 9), random_sae(2, 11)
    matrices = [sae.decoder.weight().detach().flatten(1) for sae in (a, b)]
    wanted = F.cosine_similarity(matrices[0][:, None], matrices[1][None], dim=-1)
    torch.testing.assert_close(atoms_module.inner_products(a.atoms(), b.atoms()), wanted)


def test_match_shares_are_means_over_trainings_of_atoms():
    found = pd.DataFrame(dict(seed=[0] * 8 + [1] * 8 + [2] * 8, atom=np.tile([0, 0, 1, 1, 2, 2, 3, 3], 3), chance=0.1))
    found["best"] = np.random.default_rng(0).choice([0.95, 0.2], 24, p=[0.4, 0.6])
    found["class"] = np.tile(["register"] * 4 + ["bundle"] * 4, 3)
    table = atoms.match_shares(found).set_index("class")
    matched = (found.best > 0.9).to_numpy().reshape(3, 4, 2)
    assert table.share.to_dict() == pytest.approx(
        {"all": matched.mean(), "register": matched[:, :2].mean(), "bundle": matched[:, 2:].mean()}
    )
    assert table.n_atoms.to_dict() == {"all": 12, "register": 6, "bundle": 6}
    assert table.n.to_dict() == {"all": 24, "register": 12, "bundle": 12}
    low, high = statistics.over_pairs(matched.mean(2).ravel(), np.repeat([0, 1, 2], 4)).interval()
    assert (table.ci_low["all"], table.ci_high["all"]) == (max(0, low), min(1, high))


# Exemplars


class Words:
    """Token t decodes to the word wt, and 0 to a line break."""

    def decode(self, tokens, **_):
        return "".join("\n" if t == 0 else f" w{t}" for t in tokens)


def test_the_firing_token_is_marked():
    tokens = [5, 6, 7, 6, 0, 8]
    assert atoms_module.marked(Words(), tokens, 3, before=2, after=1) == " w6 w7⟦ w6⟧⏎"
    assert atoms_module.marked(Words(), tokens, 1, before=9, after=2) == " w5⟦ w6⟧ w7 w6"
    assert atoms_module.marked(Words(), tokens, 3, before=5, after=0) == " w5 w6 w7⟦ w6⟧"
    assert atoms_module.marked(Words(), tokens, 0) == "⟦ w5⟧ w6 w7 w6⏎ w8"
    assert atoms_module.marked(Words(), tokens, 5, before=1) == "⏎⟦ w8⟧"


WINDOWS = Windows(torch.tensor([[1, 2, 3], [4, 5, 6], [7, 2, 9]]), torch.tensor([0, 0, 1]))
WHERE = dict(host="h", layer=1, head=2, target="state")


def test_contexts_are_the_largest_firings_one_a_passage():
    firings = pd.DataFrame(dict(atom=[3, 3, 3, 4], window=[0, 1, 2, 0], position=[1, 2, 1, 0]))
    firings = firings.assign(passage=[0, 0, 1, 0], coefficient=[1.0, 3.0, 2.0, 9.0], **WHERE)
    table = atoms_module.top_contexts(Words(), WINDOWS, firings, 5)
    assert table[["atom", "rank", "window"]].values.tolist() == [[3, 1, 1], [3, 2, 2], [4, 1, 0]]
    assert table.text.tolist() == [" w4 w5⟦ w6⟧", " w7⟦ w2⟧ w9", "⟦ w1⟧ w2 w3"]
    assert atoms_module.top_contexts(Words(), WINDOWS, firings, 1).text.tolist() == [" w4 w5⟦ w6⟧", "⟦ w1⟧ w2 w3"]
    assert atoms_module.frequent_tokens(Words(), WINDOWS, firings[firings.atom == 3], 1) == "' w2' 67%"


def test_exemplars_fire_most_and_in_enough_passages():
    classes = ["register"] * 3 + ["bundle"] * 2
    alive = pd.DataFrame(
        {"atom": range(5), "firings": [9, 80, 30, 5, 6], "passages": [4, 1, 4, 4, 4], "class": classes}
    )
    assert atoms.choose_exemplars(alive, dict(register=1, bundle=2), 2).atom.tolist() == [2, 4, 3]


# Axes of the classes


def told_firings():
    """Three firings of atom 0, two of atom 1 and one of atom 2."""
    table = pd.DataFrame(dict(atom=[0, 0, 0, 1, 1, 2], top1_native=[7, 7, 7, 8, 8, 9]))
    table = table.assign(top1_delete=[7, 1, 7, 1, 1, 9], top1_atom=[7, 7, 7, 8, 1, 1], amplitude="coefficient")
    return table.assign(kl_delete=[1.0, 3.0, 9.0, 2.0, 2.0, 1.0], kl_atom=[0.5, 0.5, 0.0, 1.0, 2.5, 1.0], **WHERE)


ALIVE = pd.DataFrame({"atom": [0, 1, 2], "class": ["register", "bundle", "bundle"], "firings": [20, 10, 40]}).assign(
    cosine=[0.3, 0.05, -0.2], **WHERE
)


def test_axes_of_an_atom_by_hand():
    table = atoms.axes_per_atom(told_firings(), ALIVE, scanned=20_000).set_index("atom")
    assert table.flip_delete.tolist() == pytest.approx([1 / 3, 1, 0])
    assert table.flip_atom.tolist() == [0, 0.5, 1]
    assert table.delta_kl.tolist() == [2.5, 0.25, 0]
    assert table.firings_per_10k.tolist() == [10, 5, 20]
    assert table.n.tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match="1 of 3 rows are of atoms that have no class"):
        atoms.axes_per_atom(told_firings(), ALIVE[:2], scanned=20_000)


def test_axes_of_the_classes_by_hand():
    register, bundle = [0.1, 0.5, 0.9, 0.9], [0.0, 0.5, 0.7]
    table = pd.DataFrame({"class": ["register"] * 4 + ["bundle"] * 3, "amplitude": "coefficient"}).assign(**WHERE)
    table = table.assign(flip_delete=register + bundle, flip_atom=0.5, delta_kl=bundle[:2] * 2 + register[:3])
    found = atoms.class_axes(table.assign(firings_per_10k=range(7))).set_index("axis")
    pairs = [np.sign(a - b) for a, b in itertools.product(register, bundle)]
    row = found.loc["flip_delete"]
    assert row.cliffs_delta == pytest.approx(np.mean(pairs))
    assert (row.register_median, row.bundle_median) == (pytest.approx(0.7), 0.5)
    assert (row.n_register, row.n_bundle) == (4, 3)
    assert row.p == pytest.approx(scipy_stats.mannwhitneyu(register, bundle).pvalue)
    assert found.loc["flip_atom", ["cliffs_delta", "ci_low", "ci_high"]].tolist() == [0, 0, 0]
    assert found.loc["firings_per_10k", ["cliffs_delta", "ci_low", "ci_high"]].tolist() == [-1, -1, -1]
    few = atoms.class_axes(table.drop(index=[4, 5]).assign(firings_per_10k=1))
    assert few[["cliffs_delta", "ci_low", "ci_high", "p"]].isna().all(axis=None)
    assert few.n_bundle.tolist() == [1] * 4


def test_the_interval_of_cliff_s_delta_is_the_bootstrap_by_a_loop():
    a, b, generator = RNG.normal(0.5, 1, 25), RNG.normal(0, 1, 35), np.random.default_rng(2)
    found = [statistics.cliffs_delta(generator.choice(a, 25), generator.choice(b, 35)) for _ in range(1000)]
    assert atoms.delta_interval(a, b) == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.06)


def test_win_rates_by_cosine_put_an_edge_into_the_upper_bin():
    table = atoms.by_cosine(told_firings(), ALIVE).set_index("cosine_bin")
    assert table.win_rate.to_dict() == {"below 0": 0, "0.05 to 0.2": 0.5, "0.3 and above": 1}
    assert table.n_firings.to_dict() == {"below 0": 1, "0.05 to 0.2": 2, "0.3 and above": 3}
    assert table.ci_low.isna().all()  # one atom per bin
    table = atoms.by_cosine(told_firings(), ALIVE, edges=[1.0]).iloc[0]
    assert (table.win_rate, table.n_atoms) == (pytest.approx(4 / 6), 3)
    assert table.ci_low <= 4 / 6 <= table.ci_high


# The stages

CELL = (1, 2)
SETTINGS = TrainingSettings(n_atoms=24, k=3, tokens=1600, batch_windows=2, lr=3e-3, final_lr=3e-4, warmup=2)


def test_variants_are_the_sweep_and_the_seeds_each_once():
    found = training.variants(SETTINGS, [2, 3, 6], [0, 1, 42], seed=42)
    assert [(s.k, s.seed) for s in found] == [(6, 42), (3, 42), (3, 1), (3, 0), (2, 42)]
    assert {s.n_atoms for s in found} == {24}
    assert training.variants(SETTINGS, [], [], seed=42) == []
    with pytest.raises(ValueError, match="exceeds n_atoms"):
        training.variants(SETTINGS, [25], [], seed=42)


@dataclass
class Own:
    """The profile section that the stages read."""

    place: str = "middle"
    training: str = "survey"
    ks: list = field(default_factory=lambda: [3, 6])
    seeds: list = field(default_factory=lambda: [0, 42])
    taus: list = field(default_factory=lambda: [0.02, 0.1])
    exemplars: dict = field(default_factory=lambda: dict(register=1, bundle=1))
    fewest_passages: int = 1
    contexts: int = 2


class OneCell(SmallStudy):
    """A study of one small host with its own windows, cell and SAEs."""

    def __init__(self, host, tokens):
        hosts = {"small": HostSection(path="small", cells=dict(middle=CellRule(layer=1, sigma_ratio=3)))}
        data = dict(window=50, sae_windows=8, heldout_windows=8, firing_windows=8, survey_windows=4)
        settings = dict(write="added", targets=["state", "write"], trainings=dict(mean=1))
        settings |= dict(main=SETTINGS, survey=SETTINGS, flat=SETTINGS)
        whole = Data(**data, first_position=5, batch_windows=4)
        saes = Saes(**settings)
        profile = SmallProfile("small", 42, hosts, whole, saes, dict(atoms=Own(), saes=saes))
        super().__init__(profile, host, tokens)
        self.__dict__["cells"] = pd.DataFrame([dict(host="small", place="middle", layer=CELL[0], head=CELL[1])])


@pytest.fixture(scope="module")
def study(host, tmp_path_factory):
    """The small study with the main SAEs and all variants trained."""
    single = type(host)(copy.deepcopy(host.model).float(), Words(), "small")
    tokens = torch.randint(1, 300, (8, 50), generator=torch.Generator().manual_seed(4))
    patch = pytest.MonkeyPatch()
    patch.setenv("WRITESAE_OUTPUT", str(tmp_path_factory.mktemp("atoms")))
    made = OneCell(single, tokens)
    factors = harvest(single, tokens, [CELL], 4, progress=False)[CELL]
    files.save_tensors(made.harvest_path("small", *CELL), factors.tensors(), dict(fingerprint="harvest", seconds=1.0))
    for target in ("state", "write"):
        settings = SETTINGS.model_copy(update=dict(seed=42))
        train_sae(made, "main", CELL, target, settings, factors)
    training.train_variants(made)
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def scanned(study):
    return atoms.run(study)


def test_variants_are_trained_once_and_differ_as_they_say(study, monkeypatch):
    weights = {}
    for settings in training.host_variants(study, "small"):
        sae = study.sae("small", *CELL, "write", training.variant_name(settings))
        assert (sae.k, sae.n_atoms) == (settings.k, 24)
        weights[settings.k, settings.seed] = sae.decoder.key
    assert set(weights) == {(3, 0), (3, 42), (6, 42)}
    assert not torch.equal(weights[3, 0], weights[3, 42])
    monkeypatch.setattr(training, "train_one", lambda *_: pytest.fail("trained again"))
    training.train_variants(study)
    monkeypatch.setattr(study, "windows_hash", lambda *_: "other windows")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        training.train_variants(study)


def test_alive_atoms_are_those_with_the_largest_coefficient(study, scanned):
    """Firings and cosines of every SAE against the full matrices of writes and atoms."""
    table, _ = scanned
    assert len(table.groupby(atoms.SAE_KEYS)) == 2 * (1 + 3)
    found = harvest(study.small, study.split.tokens, [CELL], 4, progress=False)[CELL]
    native = found.key[..., None] * found.added[..., None, :]
    for (target, role), part in table.groupby(["target", "role"]):
        sae = study.sae("small", *CELL, target, role)
        firing = sae.encode_history(found.history(target, "added"))
        best = firing.coefficients[:, 5:48].max(-1)
        atom = firing.indices[:, 5:48].gather(-1, best.indices[..., None])[..., 0]
        cosine = F.cosine_similarity(sae.decoder.weight()[atom].flatten(2), native[:, 5:48].flatten(2), dim=-1)
        fires = best.values > 0
        assert set(part.atom) == set(atom[fires].tolist())
        for row in part.itertuples():
            here = fires & (atom == row.atom)
            assert row.firings == here.sum()
            assert row.rate == pytest.approx(row.firings / (8 * 43), rel=1e-5)
            assert row.cosine == pytest.approx(np.median(cosine[here].numpy()), rel=1e-3, abs=2e-5)
            if row.firings == 1:
                assert abs(row.cosine) == pytest.approx(row.cosine_key * row.cosine_value, rel=1e-3, abs=2e-5)
    assert (table.elsewhere != table.cosine).any()


def test_a_stage_is_read_until_an_sae_changes(study, scanned, monkeypatch):
    monkeypatch.setattr(type(study.small), "each_record", lambda *_, **__: pytest.fail("harvested again"))
    again = atoms.run(study)
    for a, b in zip(again, scanned, strict=True):
        pd.testing.assert_frame_equal(a, b)
    sae = type(study).sae

    def changed(*arguments):
        loaded = sae(*arguments)
        if arguments[-1] == "k6-seed42":
            loaded.decoder.key[0].neg_()
        return loaded

    monkeypatch.setattr(type(study), "sae", changed)
    with pytest.raises(pytest.fail.Exception, match="harvested again"):
        atoms.run(study)


@pytest.fixture(scope="module")
def parted(study, scanned):
    return atoms.tables(study, scanned[0])


def test_tables_count_all_atoms_of_every_sae(scanned, parted):
    (table, _), (parts, orders, sweeps) = scanned, parted
    assert len(parts) == 8
    assert (parts.registers + parts.bundles + parts["null"] == 24).all()
    assert parts.alive.sum() == len(table)
    assert orders.groupby(atoms.SAE_KEYS).components.apply(list).map(tuple).unique().tolist() == [(1, 2, 3)]
    assert len(sweeps) == 4 and (sweeps.role == "main").all()
    assert (sweeps[sweeps.tau == 0.1].registers.to_numpy() <= sweeps[sweeps.tau == 0.02].registers.to_numpy()).all()


def test_seeds_are_compared_at_their_own_k(study, scanned, parted):
    counts, pairs, shares = atoms.seeds(study, scanned[0], parted[0])
    assert (counts.n == 2).all() and (counts.k == 3).all()
    assert len(counts) == 2 * 3
    assert set(pairs.seed) == set(pairs.other_seed) == {0, 42}
    one = pairs[(pairs.target == "write") & (pairs.seed == 0)].iloc[0]
    matrices = [study.sae("small", *CELL, "write", f"k3-seed{s}").decoder.weight().flatten(1) for s in (0, 42)]
    assert one.best == pytest.approx((matrices[0][one.atom] @ matrices[1].T).abs().max().item(), rel=1e-4)
    assert set(shares.target) == {"state", "write"}


def test_exemplars_have_contexts_around_their_tokens(study, scanned):
    table, firings = scanned
    chosen, contexts = atoms.exemplars(study, table, firings)
    main = table[table.role == "main"]
    for (target, name), part in main.groupby(["target", "class"]):
        row = chosen[(chosen.target == target) & (chosen["class"] == name)]
        assert row.firings.tolist() == [part.firings.max()]
        assert (firings[(firings.target == target)].atom == row.atom.item()).sum() == part.firings.max()
    for row in contexts.itertuples():
        token = study.split.tokens[row.window, row.position].item()
        assert f"⟦ w{token}⟧" in row.text
    assert contexts.groupby(["target", "atom"])["rank"].max().max() <= 2


def test_tables_of_the_classes_are_written_from_firings(study):
    firings, alive = told_firings().assign(host="small"), ALIVE.assign(host="small")
    axes, bins = atoms.class_tables(study, alive, firings)
    row = axes.set_index("axis").loc["firings_per_10k"]
    assert row.register_median == pytest.approx(20 * 1e4 / (8 * 43), rel=1e-5)
    assert row.bundle_median == pytest.approx(25 * 1e4 / (8 * 43), rel=1e-5)
    assert bins.n_firings.sum() == 6
