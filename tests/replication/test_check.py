"""replication.scorecard.check: pairs of sets of trainings, simulated and observed."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from replication.scorecard import check, criteria
from replication.scorecard.table import scorecard

CRITERIA = criteria.read_criteria()
HOSTS = pd.DataFrame(dict(host=["a", "b"], family=["gated_deltanet", "rwkv7"], path=["x", "y"]))


def line(name="P1", **changes) -> pd.DataFrame:
    """A scorecard of one claim: a win rate at 0.6 (border 0.55) with an error of 0.02."""
    row = dict(id=name, host="a", group="headline", counts=True, status="supported", value=0.6, trainings=1)
    row |= dict(between_seeds=0.0, standard_error=0.02, shared_error=0.0, df=200.0, repeat_probability=0.8)
    return pd.DataFrame([row | changes])


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(check, "PAIRS", 3000)
    monkeypatch.setattr("replication.scorecard.verdicts.DRAWS", 50)


def test_one_training_and_another_differ_as_two_draws_of_a_normal_value_do(many):
    pairs = check.simulated(line(), 1, False)
    supported = stats.norm.sf((0.55 + stats.t.ppf(0.975, 200) * 0.02 - 0.6) / 0.02)
    assert check.agreement(pairs)["differ"] == pytest.approx(2 * supported * (1 - supported), abs=0.03)
    assert set(pairs.status) == {"supported", "unsettled"} and check.agreement(pairs)["opposed"] == 0


def test_what_no_training_decides_is_the_same_at_the_same_places(many):
    """Without an SAE all of the error is that of the places; the error itself is estimated anew."""
    pairs = check.simulated(line(trainings=0, shared_error=0.02, df=1e6), 5, True)
    assert (pairs.status == pairs.status_other).all() and pairs.status.nunique() == 2
    assert check.agreement(check.simulated(line(trainings=0, shared_error=0.02), 5, False))["differ"] > 0.3


@pytest.mark.parametrize(("trainings", "size"), [(1, 4), (3, 3), (3, 8)])
def test_the_error_of_a_simulated_set_is_right(trainings, size):
    """Places 0.012, a single training 0.016: the values spread as the errors say, for sets of any size."""
    (row,) = line(trainings=trainings, between_seeds=0.016, shared_error=0.012).itertuples()
    row = row._replace(standard_error=np.sqrt(0.012**2 + 0.016**2 / trainings))
    generator = np.random.default_rng(0)
    value, error, df = check._estimates(row, 0.6, generator.standard_normal(6000), size, generator)
    wanted = np.sqrt(0.012**2 + 0.016**2 / size)
    assert value.std() == pytest.approx(wanted, rel=0.05)
    assert np.sqrt((error**2).mean()) == pytest.approx(wanted, rel=0.05)
    covered = np.abs(value - 0.6) < stats.t.ppf(0.975, df) * error
    assert covered.mean() == pytest.approx(0.95, abs=0.015)


def test_stated_probabilities_are_calibrated_in_the_simulation(monkeypatch, many):
    generator = np.random.default_rng(1)
    parts = [line(value=x, standard_error=0.03, df=20.0) for x in generator.uniform(0.35, 0.75, 40)]
    monkeypatch.setattr(check, "PAIRS", 60)
    monkeypatch.setattr(check, "STATED", 60)
    table = check.calibration(check.simulated(pd.concat(parts), 1, False))
    assert table.n.sum() == 2400
    assert (table.stated - table.repeated).abs()[table.n > 100].max() < 0.12


def test_agreement_and_calibration_by_hand():
    pairs = pd.DataFrame(dict(id=["P1", "P1", "P2", "P2"], host="a", stated=[0.6, 0.6, 0.9, 0.9]))
    pairs["status"] = ["supported", "supported", "unsettled", "unsettled"]
    pairs["status_other"] = ["supported", "contradicted", "unsettled", "unsettled"]
    row = check.agreement(pairs)
    assert (row["claims"], row["pairs"], row["differ"], row["opposed"]) == (2, 4, 0.25, 0.25)
    assert row["stated"] == pytest.approx(0.25)
    table = check.calibration(pairs)
    assert table.up_to.tolist() == [0.7, 0.95] and table.n.tolist() == [2, 2]
    assert table.repeated.tolist() == [0.5, 1.0] and table.stated.tolist() == pytest.approx([0.6, 0.9])


def tables(seeds=(1, 2, 3, 4)):
    """Places at which the win rate is the seed over 10, and a scorecard of them."""
    place, seed = np.tile(np.arange(100), len(seeds)), np.repeat(seeds, 100)
    frame = pd.DataFrame(dict(host="a", place="middle", seed=seed, passage=place // 2, kl_delete=1.0, kl_random=3.0))
    frame["kl_atom"] = np.where(place * 10 < seed * 100, 0.5, 2.0)
    known = dict(hosts=HOSTS, headline_places=frame)
    known["scorecard"] = scorecard(known.get, ["a"], check.BY_PLACE)
    return known.get


def test_sets_are_disjoint_and_of_trainings_at_the_same_places():
    sets = check.of_sets(tables(), ["a"], 2)
    rates = [table.set_index("id").value["R1"] for table in sets]
    assert rates == pytest.approx([0.15, 0.35])
    assert len(check.of_sets(tables(), ["a"], 1)) == 4 and len(check.of_sets(tables(), ["a"], 5)) == 0
    assert {"R1", "R5", "R7", "R10"} <= set(sets[0].id) <= {f"R{i}" for i in range(1, 11)}


def test_the_check_sets_what_was_observed_beside_the_simulation(monkeypatch):
    monkeypatch.setattr(check, "PAIRS", 3)
    monkeypatch.setattr("replication.scorecard.verdicts.DRAWS", 20)
    read = tables((1, 2, 3))
    others = read("scorecard").assign(seed=9)[["seed", "id", "host", "value", "status"]]
    rows, bins = check.check(read, ["a"], 1, others)
    assert rows[rows.kind == "simulated"].compared.tolist()[:2] == [check.named(1, False), check.named(1, True)]
    observed = rows[rows.kind == "observed"].set_index("compared")
    assert list(observed.index) == [check.named(1, True), check.WHOLE]
    assert observed.simulated.notna().all() and observed.differ[check.WHOLE] == 0, "the other run is this one"
    assert set(bins.compared) == set(rows.compared) and bins.n.gt(0).all()
    assert len(check.shown(rows)) == len(rows) and check.shown(rows).reset_index().shape[1] <= 8
    some = pd.DataFrame(dict(compared=["a", "a", "b"], stated=[0.5, 0.9, 0.7], repeated=[0.6, 0.6, 0.7], n=[3, 1, 5]))
    assert check.misstated(some).to_dict() == pytest.approx(dict(a=(0.3 + 0.3) / 4, b=0.0))
    alone, _ = check.check(read, ["a"], 1, None)
    kinds = check.shown(alone).index.get_level_values("kind")
    assert set(kinds) == {"simulated", "observed"} and check.WHOLE not in set(alone.compared)
