"""Repeated runs: which verdicts change, and how often one run's interval contains another's value."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from replication.__main__ import main
from replication.scorecard import repeats
from replication.scorecard.criteria import read_criteria
from replication.scorecard.table import COLUMNS
from replication.study import paths, stages
from replication.study.profile import load_profile
from replication.study.study import Study
from writesae.files import ArtifactError

PROFILE = load_profile("smoke")


CRITERIA = read_criteria()
CLAIMS = [name for name in CRITERIA.claims if CRITERIA.scale(name)[0] is np.asarray]  # neither ratios nor R2
HALF = norm.ppf(0.975)  # of an interval, in standard errors


def scorecard(values, status="unsettled", half=1.0, host="a") -> pd.DataFrame:
    """A scorecard of one host, of as many claims as values; each interval is the value plus or minus `half`."""
    values = np.asarray(values, float)
    ends = dict(value=values, ci_low=values - half, ci_high=values + half, standard_error=half / HALF, df=1e9)
    more = dict(status=status, n=9, counts=True, group="headline", repeat_probability=0.7)
    return pd.DataFrame(dict(id=CLAIMS[: len(values)], host=host) | ends | more).reindex(columns=COLUMNS)


def run(values, seed, **more) -> pd.DataFrame:
    columns = [*repeats.RUN, *repeats.COLUMNS["scorecard"]]
    return scorecard(values, **more).assign(seed=seed, device="cpu (AVX2)", commit="c")[columns]


def test_values_of_other_runs_are_judged_with_the_errors_of_this_one():
    """R1 is above 0.55 for sure, or not; the verdict that the other run had stored does not matter."""
    own = scorecard([0.5], half=0.1).assign(id="R1")
    found = repeats.judged(own, run([0.66, 0.64, 0.4], 1).assign(id="R1", host="a", status="contradicted"))
    assert found.status.tolist() == ["supported", "unsettled", "unsettled"]
    assert found.z.tolist() == pytest.approx(np.array([0.16, 0.14, -0.1]) * HALF / 0.1)
    ratio = scorecard([2.0], half=0.3).assign(id="R5")
    assert repeats.judged(ratio, run([4.0], 1).assign(id="R5")).z.tolist() == pytest.approx([np.log(2) * HALF / 0.3])


def test_stability_by_hand():
    own = scorecard([0.5, 0.9, 2.0], status=["unsettled", "supported", "not asked"], half=0.1)
    others = pd.concat([run([0.52, 0.5, 3], 1), run([0.49, 0.95], 2)])
    found = repeats.stability(own, others).set_index("id")
    assert list(found.index) == CLAIMS[:2] == ["R1", "R2"]
    assert found[["runs", "agree"]].values.tolist() == [[3, 3], [3, 2]]
    assert found.turned.tolist() == [False, True]
    assert found[["least", "value", "most"]].values.tolist() == [[0.49, 0.5, 0.52], [0.5, 0.9, 0.95]]
    assert found.z_most.tolist() == pytest.approx([0.2 * HALF, 4 * HALF])


def test_what_no_repeat_answers_is_left_out():
    own = pd.concat([scorecard([0.5, 5.0]), scorecard([5.0], host="b", half=0), scorecard([1.0], host="c")])
    found = repeats.stability(own, pd.concat([run([0.2], 1), run([1.0], 1, host="c").assign(id="S1")]))
    assert found.host.tolist() == ["a"] and found.id.tolist() == CLAIMS[:1]
    assert found[["runs", "agree"]].values.tolist() == [[2, 2]]
    own.loc[own.host == "a", "counts"] = False
    assert repeats.stability(own, run([0.2], 1)).empty


@pytest.mark.parametrize("between", [0.0, 2.0])
def test_right_intervals_hold_another_run_in_83_of_100(between):
    """Compares the share with the normal formula. The intervals ignore the spread between runs."""
    generator, hosts = np.random.default_rng(0), [f"h{i}" for i in range(40)]
    truth = generator.normal(size=(40, len(CLAIMS)))
    values = [truth + generator.normal(scale=np.hypot(1, between), size=truth.shape) for _ in range(3)]
    own = pd.concat([scorecard(x, half=HALF, host=host) for x, host in zip(values[0], hosts)])
    others = [run(x, s, half=HALF, host=h) for s in (1, 2) for x, h in zip(values[s], hosts)]
    found = repeats.held(own, 0, pd.concat(others)).set_index("host")
    assert found.n["all"] == 6 * truth.size
    wanted = 2 * norm.cdf(HALF / np.sqrt(2 * (1 + between**2))) - 1
    assert between or wanted == pytest.approx(repeats.EXPECTED, abs=1e-3)
    assert found.share["all"] == pytest.approx(wanted, abs=0.015)
    assert found.ci_low["all"] < wanted < found.ci_high["all"] and found.ci_high["all"] - found.ci_low["all"] < 0.05


def test_pairs_are_of_different_seeds_and_of_values_with_an_error():
    own = pd.concat([scorecard([0.0, 0.0]), scorecard([1.0], half=0, host="b")])
    others = pd.concat([run([0.5, 3.0], 1), run([1.0], 1, half=0, host="b"), run([9.0, 9.0], 0)])
    found = repeats.held(own, 0, others).set_index("host")
    assert found.n.to_dict() == {"a": 4, "all": 4} and found.share["a"] == 0.5


def rates(*values) -> pd.DataFrame:
    """Rows of replacement_summary, one per win rate, each with another cell."""
    keys = dict.fromkeys(repeats.KEYS, "x") | dict(cells=[f"c{i}" for i in range(len(values))])
    return pd.DataFrame(keys | dict(n=9, win_rate=values, ci_low=0.0, ci_high=1.0, passage_low=0.1, passage_high=0.9))


def test_spread_is_over_this_run_and_the_others():
    others = pd.concat([rates(0.4, 0.6).assign(seed=1), rates(0.7).assign(seed=2)])
    found = repeats.spread(rates(0.5, 0.5, 0.9), others).set_index("cells")
    assert found[["win_rate", "least", "most"]].values.tolist() == [[0.5, 0.4, 0.7], [0.5, 0.5, 0.6], [0.9, 0.9, 0.9]]
    assert found.runs.tolist() == [3, 2, 1] and set(found.passage_high) == {0.9}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folders of two runs of the smoke profile, with seeds 1 and 2."""
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / f"run{seed}")
        provenance = dict(profile="smoke", config="", host="all", seed=seed, seconds=0.0)
        tables = dict(
            scorecard=scorecard([0.1, seed], status=["contradicted", "not asked"]), replacement_summary=rates(seed / 4)
        )
        for name, table in tables.items():
            stages.write_table(table, folders[-1] / f"{name}.csv", provenance)
    return folders


def test_runs_are_gathered_into_one_table(runs, capsys):
    assert main(["repeats", "--profile", "smoke", *map(str, runs)]) == 0
    table, summary = (Study(PROFILE).kept_table(f"repeats-{kind}") for kind in ("scorecard", "replacement"))
    assert table[["seed", "id", "status"]].values.tolist() == [[1, "R1", "contradicted"], [2, "R1", "contradicted"]]
    assert summary[["seed", "cells", "win_rate"]].values.tolist() == [[1, "c0", 0.25], [2, "c0", 0.5]]
    assert {*table.device, *summary.device} == {stages.environment()["device"]}
    assert all(stages.KEPT.match(path.name) for path in Study(PROFILE).paths.results.glob("[!.]*.csv"))


def test_a_run_is_added_to_those_that_are_there(runs):
    """A run of the same seed and device takes the place of its rows, also at another commit."""
    first = repeats.gather(runs[:1], "smoke", "scorecard")
    assert repeats.gather(runs[1:], "smoke", "scorecard", first).seed.tolist() == [1, 2]
    older = first.assign(value=7.0, commit="older")
    assert repeats.gather(runs[:1], "smoke", "scorecard", older).value.tolist() == [0.1]


def test_what_cannot_stand_beside_the_others_is_refused(runs, capsys, monkeypatch):
    with pytest.raises(ValueError, match="run1 and .*run1 are the same run: name each once"):
        repeats.gather([runs[0], runs[0]], "smoke", "replacement")
    with pytest.raises(ValueError, match="is a run of smoke, which differs from mini not only in its seed"):
        repeats.gather(runs, "mini", "scorecard")
    monkeypatch.setattr(repeats, "load_profile", lambda name: PROFILE.model_copy(update=dict(seed=1)))
    with pytest.raises(ValueError, match="All runs have smoke's own seed, 1: give one with another"):
        repeats.gather(runs[:1], "smoke", "scorecard")
    with pytest.raises(ArtifactError, match=r"scorecard\.csv is missing"):
        repeats.gather([runs[0].parent], "smoke", "scorecard")
    assert main(["repeats", "--profile", "smoke", str(runs[0]), str(runs[0])]) == 1
    assert capsys.readouterr().err.startswith("repeats failed: ")
    assert Study(PROFILE).kept_table("repeats-scorecard") is None


def test_the_profiles_of_repeats_differ_in_their_seed_alone():
    profiles = [load_profile(path.stem) for path in (paths.ROOT / "profiles").glob("mini-*.yaml")]
    assert len(profiles) >= 2 and len({profile.seed for profile in profiles}) == len(profiles)
    wanted = load_profile("mini").model_dump(exclude={"name", "seed"})
    assert all(profile.model_dump(exclude={"name", "seed"}) == wanted for profile in profiles)


def test_a_kept_table_of_its_own_comes_before_the_repositorys(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("WRITESAE_OUTPUT", "build/test")
    study = Study(PROFILE)
    assert study.kept_table("sweep-cells") is None
    for folder, host in ((tmp_path / "results/smoke", "kept"), (study.paths.results, "own")):
        provenance = dict(profile="smoke", config="", host="all", seed=0, seconds=0.0)
        stages.write_table(pd.DataFrame({"host": [host]}), folder / "sweep-cells.csv", provenance)
        assert study.kept_table("sweep-cells").host.tolist() == [host]
