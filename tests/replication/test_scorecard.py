"""The scorecard: what a criterion must say, what a value says about it, and the measures by hand."""

import re

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from replication.commands import dryrun
from replication.scorecard import claims, criteria, measures, verdicts
from replication.scorecard import table as table_module
from replication.scorecard.verdicts import NOT_ASKED, VERDICTS, Borders, holm
from replication.statistics import Estimate
from replication.study import paths
from replication.study.profile import load_profile
from replication.study.training import ablation_variants
from writesae.hosts import load

QWEN, QWEN_4B, QWEN_27B = "Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-27B"
FAILURES = [f"failure_rate_q{quartile}" for quartile in (2, 3, 4)]
CRITERIA = criteria.read_criteria()
CRITERION = dict(claim="atoms win", group="supporting", criterion="above one half", notebook="x", effect="win_rate")
CRITERION |= dict(indifference=0.5, claimed="above", measure="failures")
FILE = dict(smallest_effects=dict(win_rate=0.05), smallest_factors=dict(kl_ratio=1.1), another_training=dict(e=0.5))


# The file of criteria


def test_every_claim_has_a_criterion_that_can_be_asked():
    ids = pd.read_csv(claims.CLAIMS).id
    assert list(CRITERIA.claims) == list(ids) and ids.is_unique
    asked = CRITERIA.claims.values()
    assert {criterion.family for criterion in asked} <= {"", *load.FAMILIES}
    assert {criterion.model for criterion in asked} <= {"", *yaml.safe_load(dryrun.SHAPES.read_text())}
    assert {criterion.measure for criterion in asked} == set(measures.MEASURES), "no measure that nothing asks for"
    assert all((paths.ROOT / "notebooks" / f"{criterion.notebook}.ipynb").is_file() for criterion in asked)
    used = {criterion.effect for criterion in asked}
    assert used == {*CRITERIA.smallest_effects, *CRITERIA.smallest_factors}, "no smallest effect that nothing uses"
    assert set(CRITERIA.another_training) == {CRITERIA.experiments[x] for x, c in CRITERIA.claims.items() if c.trained}


def test_every_ablation_that_is_judged_is_trained():
    named = {
        x
        for c in CRITERIA.claims.values()
        for key, x in c.arguments.items()
        if c.measure in ("contrast", "variant_gap")
    }
    trained = {settings.variant for *_, settings in ablation_variants(load_profile("mini").ablations, 42)}
    assert {x for x in named if "+" in x} <= trained


def test_a_claim_that_counts_for_another_counts_itself():
    for criterion in CRITERIA.claims.values():
        for family, name in criterion.same_as.items():
            other = CRITERIA.claims[name]
            assert (other.measure, other.arguments) == (criterion.measure, criterion.arguments) or name == "A2"
            assert other.family in ("", family) and not other.counted_as(family)


def test_every_criterion_that_was_changed_says_what_it_was_and_why():
    changed = {name for name, criterion in CRITERIA.claims.items() if criterion.was}
    named = ["R7", "R10", "R11", "C3", "C4", "I1", "I3", "I6", "X2", "X3", "X4", "B5", "N1", "A5", "A7", "P6"]
    null = [name for name, x in CRITERIA.claims.items() if x.claimed == "equal" and x.group != "extension"]
    assert {*named, *null} <= changed
    assert all(len(criterion.because) > 40 for criterion in CRITERIA.claims.values() if criterion.was)


def written(tmp_path, **more) -> tuple:
    """The paths of a criteria file with the claim A1, and of claims.csv."""
    path, listed = tmp_path / "criteria.yaml", tmp_path / "claims.csv"
    listed.write_text("id,experiment,value\nA1,e,1\n")
    path.write_text(yaml.safe_dump(FILE | dict(claims=dict(A1=CRITERION)) | more))
    return path, listed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(measure="failure_gab"), r"A1: there is no measure 'failure_gab': choose one of summary, "),
        (dict(arguments=dict(cell="early")), r"A1: measure failures: got an unexpected keyword argument 'cell'\.$"),
        (dict(measure="win_rate"), r"A1: measure win_rate: missing a required argument: 'cells'\.$"),
        (dict(famly="mamba2"), r"A1\.famly: Extra inputs are not permitted\.$"),
        (dict(claimed="more"), r"A1\.claimed: Input should be 'above', 'below' or 'equal'\.$"),
        (dict(was="above 1/6"), r"A1: a criterion has both `was` and `because`, or neither\.$"),
        (dict(effect="r2"), r"claims\.A1: no smallest effect 'r2': use win_rate, kl_ratio\.$"),
    ],
)
def test_a_criterion_that_says_too_little_or_too_much_is_refused(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=r"criteria\.yaml: .*" + sentence):
        criteria.read_criteria(*written(tmp_path, claims=dict(A1=CRITERION | change)))


def test_claims_and_criteria_belong_together(tmp_path):
    path, listed = written(tmp_path)
    listed.write_text("id,experiment,value\nA1,e,1\nA2,e,1\n")
    with pytest.raises(ValueError, match="claim A2 has no criterion"):
        criteria.read_criteria(path, listed)
    written(tmp_path, claims=dict(A1=CRITERION, A2=CRITERION, A3=CRITERION))
    listed.write_text("id,experiment,value\nA1,e,1\nA2,e,1\n")
    with pytest.raises(ValueError, match=r"claims\.csv has no claim A3"):
        criteria.read_criteria(path, listed)
    path, listed = written(tmp_path, another_training=dict(f=1.0))
    with pytest.raises(ValueError, match=r"another_training lacks the experiment e\.$"):
        criteria.read_criteria(path, listed)


HOSTS = pd.DataFrame(
    [
        ("main", "gated_deltanet", QWEN),
        ("large", "gated_deltanet", QWEN_4B),
        ("largest", "gated_deltanet", QWEN_27B),
        ("mamba2", "mamba2", "models/mamba2"),
        ("rwkv7", "rwkv7", "models/rwkv7"),
        ("delta", "delta_net", "fla-hub/delta_net-1.3B-100B"),
        ("gla", "gla", "fla-hub/gla-1.3B-100B"),
    ],
    columns=["host", "family", "path"],
)


def test_claims_about_an_architecture_or_a_size_are_asked_of_it_alone():
    def asked(name):
        return [line.host for _, line in HOSTS.iterrows() if CRITERIA.claims[name].asks(line)]

    assert asked("R1") == HOSTS.host.tolist()
    assert asked("X2") == ["main", "large", "largest"]
    assert asked("C5") == asked("X7") == asked("X10") == ["large"] and asked("X8") == ["largest"]
    assert asked("X9") == asked("X6") == ["delta"] and asked("X5") == ["gla"] and asked("X1") == ["mamba2"]


# Verdicts


@pytest.mark.parametrize(
    ("value", "claimed", "verdict"),
    [
        (0.7, "above", "supported"),
        (0.3, "above", "contradicted"),
        (0.5, "above", "equivalent"),
        (0.56, "above", "unsettled"),
        (0.44, "above", "unsettled"),
        (0.3, "below", "supported"),
        (0.7, "below", "contradicted"),
        (0.5, "below", "equivalent"),
        (0.5, "equal", "supported"),
        (0.7, "equal", "contradicted"),
        (0.3, "equal", "contradicted"),
        (0.56, "equal", "unsettled"),
    ],
)
def test_verdicts_by_hand(value, claimed, verdict):
    """The borders are 0.45 and 0.55; the 95% interval is the value plus or minus 0.0206."""
    criterion = criteria.Criterion(**CRITERION | dict(claimed=claimed))
    file = CRITERIA.model_copy(update=dict(claims=dict(Z=criterion)))
    estimate = Estimate(value, 0.01, 25, 100)
    assert file.borders("Z").verdict(estimate) == verdict
    assert (file.borders("Z").p(estimate) < 0.05) == (verdict != "unsettled")


def test_equivalence_is_two_one_sided_tests():
    values = np.random.default_rng(0).normal(0.01, 0.1, 60)
    borders, error = Borders("equal", -0.04, 0.04), values.std(ddof=1) / np.sqrt(60)
    estimate = Estimate(values.mean(), error, 59, 60)
    p = DescrStatsW(values).ttost_mean(-0.04, 0.04)[0]
    assert borders.p(estimate) == pytest.approx(p) and p < 0.05
    assert borders.verdict(estimate) == "supported"


def test_the_level_of_a_verdict_is_below_5_percent_where_there_is_one():
    generator = np.random.default_rng(1)
    for claimed in ("above", "below", "equal"):
        borders, found = Borders(claimed, -0.5, 0.5), set()
        for value, error, df in zip(
            generator.normal(0, 1, 300), generator.exponential(0.3, 300), generator.integers(2, 40, 300)
        ):
            estimate = Estimate(value, error, df, 10)
            found.add(borders.verdict(estimate))
            assert (borders.p(estimate) < 0.05) == (borders.verdict(estimate) != "unsettled")
        assert found == set(VERDICTS) - ({"equivalent"} if claimed == "equal" else set())


def test_a_wrong_verdict_is_rarer_than_5_percent_at_a_border():
    generator = np.random.default_rng(2)
    values, errors = 0.5 + generator.normal(0, 0.2, 8000), 0.2 * np.sqrt(generator.chisquare(9, 8000) / 9)
    found = Borders("above", -0.5, 0.5).verdicts(values, errors, 9)
    rates = {verdict: (found == verdict).mean() for verdict in VERDICTS}
    assert rates["supported"] == pytest.approx(0.025, abs=0.006), "wrong just below the border"
    assert rates["equivalent"] == pytest.approx(0.05, abs=0.008), "wrong just above it"
    assert rates["contradicted"] < 0.002


@pytest.mark.parametrize("df", [4, 30])
def test_the_probability_of_a_repeat_is_the_share_of_repeats(df):
    """Truths all over the scale; the stated probability against the share of pairs that agree, by tenths."""
    generator, borders = np.random.default_rng(3), Borders("above", -0.05, 0.05)
    truth, error = generator.uniform(-0.4, 0.4, 1500), generator.uniform(0.01, 0.08, 1500)
    runs = [
        (truth + error * generator.normal(size=1500), error * np.sqrt(generator.chisquare(df, 1500) / df))
        for _ in range(2)
    ]
    found = [borders.verdicts(*run, df) for run in runs]
    stated = np.array([borders.repeat_probability(Estimate(v, e, df, 9)) for v, e in zip(*runs[0])])
    same = found[0] == found[1]
    assert stated.mean() == pytest.approx(same.mean(), abs=0.03)
    for low, high in ((0.0, 0.55), (0.55, 0.8), (0.8, 0.95), (0.95, 1.01)):
        part = (stated >= low) & (stated < high)
        assert part.sum() > 50 and stated[part].mean() == pytest.approx(same[part].mean(), abs=0.09)


def test_a_value_of_one_training_is_widened():
    estimate = Estimate(0.6, 0.02, 30, 100)
    wide = CRITERIA.covering_training("E1", estimate)
    added = CRITERIA.another_training["erase"]
    assert (wide.error, wide.between_seeds) == pytest.approx((0.02 * np.sqrt(1 + added), 0.02 * np.sqrt(added)))
    assert CRITERIA.covering_training("I2", estimate) == estimate._replace(trainings=0, shared=0.02)
    several = estimate._replace(trainings=3, between_seeds=0.01)
    assert CRITERIA.covering_training("R1", several) == several


def test_holm_is_within_a_host_over_the_claims_that_count():
    p = np.random.default_rng(0).uniform(size=8) ** 4
    table = pd.DataFrame(dict(host=[*"aaaaabbb"], p=p)).assign(counts=[True] * 4 + [False] + [True] * 3)
    wanted = [*multipletests(p[:4], method="holm")[1], 9, *multipletests(p[5:], method="holm")[1]]
    assert holm(table).fillna(9).tolist() == pytest.approx(wanted)


# Each claim can fail

SHARES = {"win_rate": (0, 1), "share": (0, 1), "inclusion": (0, 1), "recurrence": (0, 1), "rate": (0, 1)}
CHANGES = {"chains", "failures", "class_difference", "contrast", "alive_by_k", "installed", "saturation"}
CHANGES |= {"saturation_in_all_cells"}


def attainable(criterion) -> tuple[float, float]:
    """The smallest and the largest value that a measure can have, on its scale."""
    if criterion.effect == "count_ratio":
        return 0.0, 9.0  # registers at a lower threshold are at least as many
    change = criterion.measure in CHANGES or criterion.arguments.get("of") == "change"
    if criterion.effect in ("cliff", "correlation") or change:
        return -1.0, 1.0
    return (SHARES | {"cosine": (-1.0, 1.0)}).get(criterion.effect, (-99.0, 99.0))


def values_of(name: str) -> dict[str, float]:
    """For each verdict a value that has it, if the measure can have such a value."""
    borders = CRITERIA.borders(name)
    low, high = attainable(CRITERIA.claims[name])
    candidates = np.r_[low, high, np.linspace(max(low, borders.low - 1), min(high, borders.high + 1), 401)]
    found = borders.verdicts(candidates, np.full(403, 1e-6), 9)
    return {verdict: candidates[found == verdict][0] for verdict in dict.fromkeys(found)}


@pytest.mark.parametrize("name", [name for name, x in CRITERIA.claims.items() if x.group != "cannot_fail"])
def test_every_claim_can_be_supported_and_can_be_contradicted(name):
    always = {"supported", "contradicted"} | ({"equivalent"} if CRITERIA.claims[name].claimed != "equal" else set())
    assert always <= set(values_of(name))


@pytest.mark.parametrize("wanted", ["supported", "contradicted"])
def test_made_up_values_make_a_whole_scorecard_of_one_verdict(monkeypatch, wanted):
    judged = {name: values_of(name)[wanted] for name, x in CRITERIA.claims.items() if x.group != "cannot_fail"}
    values = {id(x): judged.get(name, 0.7) for name, x in CRITERIA.claims.items()}
    monkeypatch.setattr(verdicts, "DRAWS", 100)
    monkeypatch.setattr(criteria.Criterion, "answer", lambda self, *_: Estimate(values[id(self)], 1e-6, 9, 7))
    table = table_module.scorecard(lambda _: HOSTS, HOSTS.host.tolist())
    assert set(table.status[table.group != "cannot_fail"]) == {wanted}
    assert set(table.status[table.group == "cannot_fail"]) == {NOT_ASKED} and table.value.notna().all()
    assert not table.counts[table.group == "cannot_fail"].any() and table.holm.notna().equals(table.counts)
    assert (table.repeat_probability[table.counts] == 1).all()
    twice = table[table.same_as != ""].set_index(["id", "host"]).same_as
    assert twice["R1", "mamba2"] == "X1" and twice["A3", "main"] == "A2" and twice["I4", "mamba2"] == "I7"
    assert not table.set_index(["id", "host"]).counts[twice.index].any()


def test_counts_leave_out_what_does_not_count(monkeypatch):
    monkeypatch.setattr(criteria.Criterion, "answer", lambda self, *_: Estimate(0.7, 0.01, 9, 7))
    table = table_module.scorecard(lambda _: HOSTS, ["mamba2"])
    found = table_module.counts(table)
    assert found.to_numpy().sum() == table.counts.sum() < len(table)
    assert found.index.tolist() == [("mamba2", name) for name in criteria.GROUPS[:3]]


def test_a_table_is_read_once_and_only_where_a_measure_asks_for_it(monkeypatch):
    reads = []

    def read_table(name):
        reads.append(name)
        return dict(
            hosts=pd.DataFrame(dict(host=["tiny"], family=["mamba2"], path=["models/tiny"])),
            install_summary=pd.DataFrame(dict(host=["tiny"], share=[0.7], ci_low=[0.6], ci_high=[0.8], n=[9])),
        )[name]

    install = dict(measure="summary", arguments=dict(table="install_summary", value="share", where={}))
    every = {name: criteria.Criterion(**CRITERION, family="rwkv7") for name in CRITERIA.claims}
    every |= {name: criteria.Criterion(**CRITERION | install, trained=False) for name in ("I2", "I4")}
    monkeypatch.setattr(table_module, "read_criteria", lambda: CRITERIA.model_copy(update=dict(claims=every)))
    found = table_module.scorecard(read_table, ["tiny"]).set_index("id")
    assert reads == ["hosts", "install_summary"]
    assert found.loc["I4", ["value", "n", "status", "trainings"]].tolist() == [0.7, 9, "supported", 0]
    assert found.loc["R1", "status"] == NOT_ASKED and found.loc["R1", "criterion"] == ""


def test_what_a_reader_sees(monkeypatch):
    monkeypatch.setattr(criteria.Criterion, "answer", lambda self, *_: Estimate(0.7, 0.01, 9, 7))
    table = table_module.scorecard(lambda _: HOSTS, ["mamba2", "rwkv7"])
    rows = table_module.shown(table)
    assert rows.reset_index().shape[1] <= 8 and rows.notna().all(axis=None)
    row = rows.loc["R1", "RWKV-7"]
    assert row[["paper", "n", "trainings"]].tolist() == ["0.924", "7", "one"]
    assert row.here.startswith("0.7 [0.6") and re.fullmatch(r"supported \(\d+%\)", row["verdict (in a repeat)"])
    assert set(rows.loc["N1"]["verdict (in a repeat)"]) == {"cannot fail"}
    assert rows.loc["I2"].trainings.tolist() == ["no SAE"] * 2
    changed = criteria.changed()
    assert len(changed) == sum(bool(x.was) for x in CRITERIA.claims.values()) and changed.notna().all(axis=None)


# The measures


def test_no_row_is_not_asked_and_several_rows_are_an_error():
    table = pd.DataFrame(dict(host=["a", "b", "b"], value=[1.0, 2, 3], ci_low=0.0, ci_high=2.0, n=[6, 6, 7]))

    def summary(host, **columns):
        return measures.summary(lambda name: table, host, "any", "value", {}, **columns)

    assert summary("a")[:4] == (1.0, pytest.approx(1 / stats.norm.ppf(0.975)), 5, 6)
    assert summary("a", n=["n", "value"])[2:4] == (5, 7)
    assert summary("c") is None
    assert summary("a", atoms=["n"]) == summary("a") and summary("a", atoms=["value"]) is None, "too few atoms"
    with pytest.raises(KeyError, match="2 rows"):
        summary("b")


def test_a_missing_row_is_an_error_not_a_number():
    table = pd.DataFrame(dict(host=["a"], value=[1.0]))
    with pytest.raises(KeyError, match="0 rows"):
        measures._row(table, host="b")


def places(**columns) -> pd.DataFrame:
    """Two trainings at the same 60 places of 20 passages of one cell."""
    generator, shape = np.random.default_rng(0), (2, 60)
    kls = {f"kl_{name}": generator.exponential(size=shape).ravel() for name in ("atom", "delete", "random")}
    table = pd.DataFrame(kls | columns).assign(seed=np.repeat([1, 2], 60), passage=np.tile(np.arange(60) // 3, 2))
    return table.assign(host="h", place="middle")


def test_win_rates_chains_and_ratios_by_hand():
    table = places()
    atom, delete, random = (table[f"kl_{name}"] for name in ("atom", "delete", "random"))

    def by_training(values) -> float:
        return np.mean([values[table.seed == seed] for seed in (1, 2)])

    def of(measure, **arguments):
        return getattr(measures, measure)(lambda name: table, "h", **arguments)

    won = of("win_rate", cells="pooled")
    assert won.value == pytest.approx((atom < delete).mean()) and (won.n, won.trainings) == (60, 2)
    assert of("win_rate", cells="middle") is None, "with one cell it is the pooled rate"
    assert of("win_rate", cells="late") is None
    order = ((atom < delete) & (delete < random)).mean() - ((random < delete) & (delete < atom)).mean()
    assert of("chains").value == pytest.approx(order)
    logs = [np.median((delete / atom)[table.seed == seed]) for seed in (1, 2)]
    assert of("kl_ratio", control="delete", median="of_ratios").value == pytest.approx(np.log(logs).mean())
    logs = [np.median(random[table.seed == seed]) / np.median(atom[table.seed == seed]) for seed in (1, 2)]
    assert of("kl_ratio", control="random", median="of_each").value == pytest.approx(np.log(logs).mean())


def test_an_atom_that_says_nothing_has_no_surplus_of_failures_or_chains():
    """An atom and a random atom of one distribution: failures do fall with KL(delete), for both alike."""
    generator = np.random.default_rng(4)
    kls = {f"kl_{name}": generator.exponential(size=4000) for name in ("atom", "delete", "random")}
    table = pd.DataFrame(kls).assign(host="h", place="middle", seed=1, passage=np.arange(4000) // 4)
    for measure in (measures.failures, measures.chains):
        found = measure(lambda name: table, "h")
        assert abs(found.value) < 2.5 * found.error and found.error < 0.03
    lowest = table.kl_delete <= table.kl_delete.quantile(0.25)
    failed = table.kl_atom >= table.kl_delete
    assert failed[lowest].mean() - failed[table.kl_delete >= table.kl_delete.quantile(0.75)].mean() > 0.4, "the old bar"


def test_failures_by_hand():
    deleted, fails = np.arange(1, 401.0), np.r_[np.ones(50), np.zeros(250), np.ones(10), np.zeros(90)].astype(bool)
    table = pd.DataFrame(
        dict(kl_delete=deleted, kl_atom=np.where(fails, deleted + 1, deleted / 2), kl_random=deleted + 1)
    )
    table = table.assign(host="h", place="middle", seed=1, passage=np.arange(400))
    assert measures.failures(lambda name: table, "h").value == pytest.approx((0.5 - 0.1) - (1 - 1))


def atoms(cosines, host="h", **more) -> pd.DataFrame:
    return pd.DataFrame(
        dict(cosine=cosines, atom=range(len(cosines)), host=host, place="middle", target="state", role="main") | more
    )


def test_classes_are_fitted_again_in_every_resample(monkeypatch):
    monkeypatch.setattr(measures, "REFITS", 60)
    generator = np.random.default_rng(0)
    clear = np.r_[generator.normal(0.1, 0.02, 60), generator.normal(0.6, 0.02, 20)]
    vague = generator.normal(0.3, 0.1, 80)
    found = [measures.class_share(lambda name, x=x: atoms(x), "h", "register") for x in (clear, vague)]
    assert found[0].value == pytest.approx(0.25)
    assert found[0].error == pytest.approx(np.sqrt(0.25 * 0.75 / 80), rel=0.3), "the groups are certain"
    binomial = np.sqrt(found[1].value * (1 - found[1].value) / 80)
    assert found[1].error > 1.3 * binomial, "which atoms are registers is not"
    bundle = measures.class_share(lambda name: atoms(clear), "h", "bundle")
    assert (bundle.value, bundle.error) == pytest.approx((1 - found[0].value, found[0].error))
    gain = measures.mixture_gain(lambda name: atoms(clear), "h")
    assert gain.value < -20 and gain.error > 3


def test_several_trainings_are_averaged_and_others_are_left_out():
    shares = {"main": 10, "main-mean-1042": 20, "main-none-42": 0, "k16-seed1": 0}
    parts = [
        atoms([0.05] * few + [0.5] * (100 - few), role=role, seed=seed)
        for seed, (role, few) in enumerate(shares.items())
    ]
    found = measures.threshold_ratio(lambda name: pd.concat(parts), "h")
    assert found.trainings == 2 and found.n == 100
    assert np.exp(found.value) == pytest.approx(np.sqrt(100 / 90 * 100 / 80))


def test_registers_of_two_hosts_are_compared(monkeypatch):
    monkeypatch.setattr(measures, "REFITS", 60)
    generator, tables = np.random.default_rng(0), {}
    samples = {
        h: np.r_[generator.normal(0.1, 0.02, 60), generator.normal(c, 0.02, 20)] for h, c in (("g", 0.6), ("r", 0.4))
    }
    tables["atoms"] = pd.concat([atoms(x, host) for host, x in samples.items()])
    tables["hosts"] = pd.DataFrame(dict(host=["g", "r"], family=["gated_deltanet", "rwkv7"], path=["x", "y"]))
    found = measures.register_gap(tables.get, "g", "rwkv7")
    assert found.value == pytest.approx(np.median(samples["g"][60:]) - np.median(samples["r"][60:]))
    assert found.value == -measures.register_gap(tables.get, "r", "x").value
    assert measures.register_gap(tables.get, "g", "mamba2") is None


def test_the_lowest_bin_is_chosen_anew():
    """Bins of one win rate: the lowest is below it, and its error is not that of a single bin."""
    generator = np.random.default_rng(0)
    columns = dict(host="h", layer=0, head=0, target="state", atom=range(120))
    alive = pd.DataFrame(columns).assign(cosine=generator.uniform(-0.1, 0.5, 120))
    population = pd.DataFrame(columns).assign(amplitude="coefficient", cosine=0.0, firings=10)
    population["class"], population["win_rate"] = "bundle", generator.binomial(10, 0.5, 120) / 10
    found = measures.lowest_bin(dict(alive_atoms=alive, population=population).get, "h")
    bins = pd.cut(alive.cosine, [-np.inf, 0, 0.05, 0.2, 0.3, np.inf], right=False)
    counts = bins.value_counts()
    rates = population.win_rate.groupby(bins, observed=True).mean()[counts >= measures.FEWEST_ATOMS]
    assert found.value == pytest.approx(rates.min()) and found.value < 0.5


def test_the_cost_of_erased_registers_is_a_share_of_the_cells_cost():
    where = dict(host="h", target="state", condition="delete", window=range(20))
    erase = pd.DataFrame(where).assign(rise=np.linspace(0.01, 0.03, 20))
    nats = {name: value * np.log(2) for name, value in dict(cost=0.1, cost_low=0.09, cost_high=0.11).items()}
    tables = dict(register_erase=erase, cells=pd.DataFrame([dict(host="h", place="middle") | nats]))
    found = measures.erased_registers(tables.get, "h")
    assert found.value == pytest.approx(0.2)
    error = np.hypot(erase.rise.std(ddof=0) / np.sqrt(20) / 0.1, 0.2 * 0.1 / stats.norm.ppf(0.975))
    assert found.error == pytest.approx(error, rel=0.1)
    tables["cells"] = tables["cells"].assign(cost_low=-0.01)
    assert measures.erased_registers(tables.get, "h") is None


def trials(edited, native, magnitude=3.0) -> pd.DataFrame:
    rows = dict(host="h", direction="paper", magnitude=magnitude, target_class="middle", included_native=native)
    table = pd.DataFrame(rows | dict(included_edited=edited)).assign(position=0)
    return table.assign(prompt=np.arange(len(table)) // 10, target=np.arange(len(table)))


def test_no_inclusion_at_all_has_the_exact_bound_over_prompts():
    zero = trials(np.zeros(300, int), np.zeros(300, int))
    for found in (
        measures.installed(lambda name: zero, "h", "middle"),
        measures.native_inclusion(lambda name: zero, "h"),
    ):
        assert found.value == 0 and found.interval(0.9).high == pytest.approx(0.095, abs=5e-4)
    one = trials(np.r_[1, np.zeros(299, int)], np.zeros(300, int))
    found = measures.installed(lambda name: one, "h", "middle")
    assert found.value == pytest.approx(1 / 300)
    assert stats.binom.cdf(1, 30, 10 * found.interval(0.9).high) == pytest.approx(0.05), (
        "a tenth of one prompt's trials"
    )
    rows = trials(np.r_[np.ones(30, int), np.zeros(270, int)], np.zeros(300, int))
    six = rows.assign(magnitude=6.0, included_edited=np.r_[np.ones(10, int), np.zeros(290, int)])
    assert measures.installed(lambda name: rows, "h", "all").value == pytest.approx(0.1)
    assert measures.saturation(lambda name: pd.concat([rows, six]), "h").value == pytest.approx(20 / 300)


def test_extensions_are_judged_and_not_counted(monkeypatch):
    extensions = [name for name, x in CRITERIA.claims.items() if x.group == "extension"]
    listed = pd.read_csv(claims.CLAIMS).set_index("id")
    assert listed.value[extensions].isna().all() and set(listed.source[extensions]) == {"extension"}
    assert all(name.split("-")[0] in CRITERIA.claims for name in extensions)
    monkeypatch.setattr(criteria.Criterion, "answer", lambda self, *_: Estimate(0.99, 0.001, 9, 7))
    table = table_module.scorecard(lambda _: HOSTS, ["mamba2"]).set_index("id").loc[extensions]
    assert table.loc["I2-all-cells", "status"] == "supported" and not table.counts.any() and table.holm.isna().all()


def test_writes_in_all_cells_are_those_of_the_claim():
    """Of 10 prompts, 4 targets each, half of them out of context; and rows that no claim asks for."""
    rows = pd.DataFrame(
        dict(prompt=np.repeat(range(10), 4), target=range(40), target_class=["middle", "far", "rare", "rare"] * 10)
    )
    rows = rows.assign(host="h", cells="all", direction="layerwise", magnitude=1.0, writes=3, delayed=False, distance=3)
    rows = rows.assign(included_edited=np.r_[0, np.ones(39)], included_native=np.r_[0, 0, 0, 1, np.zeros(36)])
    rows = rows.assign(first_step_lift=1.0, edited_rank=1)
    more = [dict(cells="one"), dict(direction="gamma"), dict(magnitude=0.3), dict(writes=1), dict(delayed=True)]
    more = [rows.assign(included_edited=0, included_native=1, first_step_lift=-1.0, **x) for x in more]
    three = rows.assign(magnitude=3.0, edited_rank=[1, 2, 1, 1] * 10, included_edited=np.nan)
    tables = dict(install_cells=pd.concat([*more, three, rows])).get
    assert measures.in_all_cells(tables, "h", "included", "middle").value == pytest.approx(0.9)
    assert measures.in_all_cells(tables, "h", "change", "all").value == pytest.approx(0.95)
    assert measures.in_all_cells(tables, "h", "change", "out_of_context").value == pytest.approx(0.95)
    assert measures.in_all_cells(tables, "h", "raised", "middle", writes=1).value == 0
    assert measures.in_all_cells(tables, "h", "raised", "middle").interval(0.9).low < 0.8, "the bound of 10 prompts"
    assert measures.saturation_in_all_cells(tables, "h").value == pytest.approx(0.5)
    assert measures.saturation_in_all_cells(dict(install_cells=rows).get, "h") is None


def test_a_single_write_is_judged_by_the_logit_and_not_by_the_formula():
    measured = np.r_[-np.ones(70), np.ones(30)]
    table = pd.DataFrame(
        dict(host="h", direction="paper", measured=measured, paper=measured, passage=np.arange(100) // 4)
    )
    assert measures.raised(lambda name: table, "h").value == pytest.approx(0.3)


def test_the_median_of_an_erased_atom_is_clustered_by_passage_and_atom():
    generator = np.random.default_rng(0)
    passage, atom = generator.integers(0, 40, 600), generator.integers(0, 5, 600)
    change = generator.normal(size=5)[atom] + generator.normal(size=600)
    where = dict(host="h", target="state", token_from="other", where="firing", condition="delete", dose=1.0)
    table = pd.DataFrame(dict(passage=passage, atom=atom, change=change) | where)
    found = measures.erased(lambda name: table, "h", "firing", "delete", 1.0)
    assert found.value == pytest.approx(np.median(change))
    assert found.df < 8 and found.error > 0.25, "five atoms decide"
    assert measures.erased(lambda name: table[table.atom < 4], "h", "firing", "delete", 1.0) is None, "four do not"


def test_atoms_that_come_back_are_counted_once_per_pair_of_trainings():
    pairs = pd.DataFrame([(s, o, a) for s in range(3) for o in range(3) if s != o for a in range(200)])
    pairs.columns = ["seed", "other_seed", "atom"]
    pairs["best"] = np.where(pairs.atom < 10 + pairs.seed + pairs.other_seed, 0.95, 0.5)
    table = pairs.assign(host="h", target="state")
    found = measures.recurring(lambda name: table, "h")
    assert found.value == pytest.approx(12 / 200) and found.df == 2
    assert found.error == pytest.approx(np.sqrt(0.06 * 0.94 / 200), rel=0.05), "the same atoms come back in both"
    none = measures.recurring(lambda name: table.assign(best=0.5), "h")
    assert none.value == 0 and none.interval(0.9).high == pytest.approx(1 - 0.05 ** (1 / 200))


# The paper's numbers


def test_the_papers_numbers_are_found_by_id():
    assert claims.papers_value("R1") == 0.924
    assert claims.papers_value("C1", "failure_rate_q2") == [0.983, 0.081]
    with pytest.raises(KeyError, match="A8"):
        claims.papers_value("A8")  # this claim has no single number


def test_figures_of_the_paper_add_to_its_claims_and_do_not_repeat_them():
    table, figures = (pd.read_csv(path).set_index("id") for path in (claims.CLAIMS, claims.FIGURES))
    assert figures.index.is_unique and not set(figures.index) & set(table.index)
    assert figures[["where", "value"]].notna().all(axis=None)
    taus = "/".join(f"{value:g}" for name, value in figures.value.items() if name.startswith("registers_tau"))
    assert f"tau 0.02/0.03/0.05/0.10: {taus};" in table.note["A7"]
    failures = ", ".join(f"{claims.papers_value(x):.1%}" for x in ("R10", *FAILURES))
    assert f"by quartile of KL(delete): {failures};" in table.note["R10"]
    assert "CV 4-12%" in table.note["A5"] and claims.papers_value("counts_cv_low", "counts_cv_high") == [0.04, 0.12]


def test_newlines_are_asked_where_several_heads_are_edited():
    base = pd.DataFrame(dict(host="h", prompt=range(4), newlines=[10.0, 12, 9, 11], mode="baseline", role="baseline"))
    base = base.assign(dose=0.0, heads=0)
    kept = base.assign(mode="kept", role="boundary", dose=5.0, heads=4, newlines=base.newlines - [3, 5, 4, 4])
    offset = kept.assign(mode="offset", heads=1, newlines=0.0)
    assert measures.newline_change(lambda _: pd.concat([base, kept, offset]), "h").value == pytest.approx(-4)
    assert measures.newline_change(lambda _: pd.concat([base, kept.assign(heads=1)]), "h") is None
