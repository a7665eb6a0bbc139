"""The report on differences between a run and the committed tables; two runs, compared bit for bit."""

import json
import os
import subprocess
import sys
import textwrap

import pandas as pd
import pytest

from replication.__main__ import main
from replication.commands import verify
from replication.commands.verify import Tolerance
from replication.study import paths
from replication.study.stages import write_table

PROVENANCE = {"profile": "mini", "config": "0", "host": "toy", "seed": 0, "seconds": 0}
RATES = pd.DataFrame({"host": ["a", "b"], "rate": [0.5, 0.8], "n": [10, 10], "seconds": [1.5, 2.5]})
FIRINGS = pd.DataFrame({"host": ["a", "a", "b"], "atom": [1, 2, 3], "kl": [0.1, 0.2, 0.3]})
SCORES = pd.DataFrame(
    {"id": ["R1", "R2"], "host": ["a", "a"], "status": ["no effect", "opposite"], "direction": [0, -1]}
)
KEYS = {"file": "rates.csv", "keys": ["host"], "reason": "test"}
TOLERANCES = [Tolerance(**KEYS, metric="rate", absolute=0.05), Tolerance(**KEYS, metric="n", equal=True)]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A repository with three committed tables. Returns their folder, and the folder of another run."""
    for variable in ("WRITESAE_OUTPUT", "GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("replication.study.paths.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "results" / "mini", tmp_path / "build" / "test" / "results" / "mini"):
        _write(folder, rates=RATES, firings=FIRINGS, scorecard=SCORES)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "results"], ["commit", "-q", "-m", "tables"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(verify, "TOLERANCES", tmp_path / "tolerances.yaml")
    (tmp_path / "tolerances.yaml").write_text(json.dumps([x.model_dump(exclude_defaults=True) for x in TOLERANCES]))
    return tmp_path / "results" / "mini", tmp_path / "build" / "test" / "results" / "mini"


def _write(folder, **tables):
    for name, frame in tables.items():
        write_table(frame, folder / f"{name}.csv", PROVENANCE)


def _table(report, name):
    return next(table for table in report.tables if table.name == f"{name}.csv")


def _verdicts(report):
    return {table.name.removesuffix(".csv"): table.verdict for table in report.tables}


def test_the_same_tables_are_identical_apart_from_times(folders):
    _write(folders[1], rates=RATES.assign(seconds=[7, 8]))
    for exact in (True, False):
        report = verify.verify(*folders, TOLERANCES, exact)
        assert set(_verdicts(report).values()) == {"identical"} and not report.failures


def test_a_change_within_tolerance_is_told_and_fine(folders):
    _write(folders[1], rates=RATES.assign(rate=[0.51, 0.84]), firings=FIRINGS.assign(kl=[0.1, 0.2, 0.4]))
    report = verify.verify(*folders, TOLERANCES)
    assert not report.failures
    assert _verdicts(report) == {"rates": "within tolerance", "firings": "no tolerance", "scorecard": "identical"}
    worst = "worst: [host=b] rate is 0.84, in the reference 0.8 (allowed: absolute 0.05), 80% of it"
    assert _table(report, "rates").details == [worst]
    assert _table(report, "firings").details == [
        "kl differs in 1 of 3 rows, first in row 3: '0.4', in the reference '0.3'"
    ]


def test_a_change_beyond_tolerance_is_named_with_both_values(folders):
    _write(folders[1], rates=RATES.assign(rate=[0.5, 0.9]))
    report = verify.verify(*folders, TOLERANCES)
    assert report.failures
    worst = "1 of 2 values of rate; worst: [host=b] rate is 0.9, in the reference 0.8 (allowed: absolute 0.05)"
    assert _table(report, "rates").details == [worst]


def test_rows_that_are_missing_or_extra_do_not_pass(folders):
    _write(folders[1], rates=pd.concat([RATES[1:], RATES[:1].assign(host="c")]))
    said = _table(verify.verify(*folders, TOLERANCES), "rates")
    assert said.verdict == "moved"
    rows = ["1 rows are missing, the first [host=a]", "1 rows are not in the reference, the first [host=c]"]
    assert said.details == rows


def test_the_metric_that_is_farthest_off_comes_first(folders):
    _write(folders[1], rates=RATES.assign(rate=[0.9, 0.9], n=[10, 11]))
    first, second = _table(verify.verify(*folders, TOLERANCES), "rates").details
    assert first.startswith("1 of 2 values of n; worst: [host=b] n is 11, in the reference 10 (allowed: equal)")
    assert second.startswith("2 of 2 values of rate; worst: [host=a] rate is 0.9, in the reference 0.5")


def test_many_columns_are_cut_and_counted(folders):
    wide = pd.DataFrame({f"c{i}": [0.5] for i in range(9)})
    for folder, added in zip(folders, (0, 1), strict=True):
        _write(folder, wide=wide + added)
    details = _table(verify.verify(*folders, TOLERANCES), "wide").details
    assert len(details) == verify.MOST + 1 and details[-1] == "and 4 more columns"


def test_missing_extra_and_damaged_tables(folders):
    (folders[1] / "firings.csv").unlink()
    _write(folders[1], more=FIRINGS)
    with open(folders[1] / "rates.csv", "a") as file:
        file.write("c,0.5,10,1\n")
    report = verify.verify(*folders, TOLERANCES)
    assert _verdicts(report) == {"firings": "missing", "more": "extra", "rates": "damaged", "scorecard": "identical"}
    assert "1 missing" in str(report) and "1 damaged" in str(report)
    assert _verdicts(verify.verify(*folders, TOLERANCES, exact=True))["more"] == "missing"


def test_what_only_a_sweep_makes_may_be_left_out(folders):
    _write(folders[0], **{"sweep-cells": FIRINGS})
    for exact in (True, False):
        report = verify.verify(*folders, TOLERANCES, exact)
        assert _verdicts(report)["sweep-cells"] == "not made" and not report.failures
    _write(folders[1], **{"sweep-cells": FIRINGS.assign(kl=0)})
    assert verify.verify(*folders, TOLERANCES, exact=True).failures


def test_exact_wants_every_digit_of_every_other_column(folders):
    _write(folders[1], rates=RATES.assign(rate=[0.5, 0.800001]))
    report = verify.verify(*folders, TOLERANCES, exact=True)
    assert _verdicts(report) == {"rates": "moved", "firings": "identical", "scorecard": "identical"}
    assert _table(report, "rates").details == [
        "rate differs in 1 of 2 rows, first in row 2: '0.800001', in the reference '0.8'"
    ]


def test_a_verdict_that_turned_and_another_origin_are_told(folders):
    _write(folders[1], scorecard=SCORES.assign(status=["same direction", "opposite"]))
    beside = folders[1] / "rates.csv.json"
    record = json.loads(beside.read_text())
    del record["seal"]
    record["versions"]["torch"] = "9.9"
    beside.write_text(json.dumps(record | {"device": "H200"}))
    report = verify.verify(*folders, TOLERANCES)
    assert report.turned == ["R1, a: same direction, in the reference no effect"]
    assert f"device: H200, in the reference {record['device'][:20]} (1 tables)" in report.origins
    assert any(line.startswith("torch: 9.9, in the reference ") for line in report.origins)


def test_the_command_compares_with_the_last_commit(folders, capsys):
    assert main(["verify"]) == 0
    _write(folders[0], rates=RATES.assign(rate=[0.5, 0.9]))  # not committed, so the reference does not change
    assert main(["verify"]) == 1
    assert main(["verify", "--run", "build/test"]) == 0
    assert main(["verify", "--run", "build/test", "--reference", "."]) == 1
    text = capsys.readouterr().out
    assert "results/mini of commit" in text
    assert text.strip().endswith("3 tables: NOT as the reference (1 moved)")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "huge"], "The last commit holds no results/huge: name a reference with --reference FOLDER."),
        (["--run", "nowhere"], "There are no tables in "),
    ],
)
def test_nothing_to_compare_is_one_sentence(folders, capsys, arguments, sentence):
    assert main(["verify", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"verify failed: {sentence}") and said.count("\n") == 1


STAGE = """
    import torch
    from conftest import small
    from helpers import SmallStudy
    from replication.pages import hosts
    from replication.study.profile import load_profile

    profile = load_profile("smoke")
    profile = profile.model_copy(update=dict(hosts={"gated_deltanet": profile.hosts["gated_deltanet"]}))
    tokens = torch.randint(0, 300, (16, 64), generator=torch.Generator().manual_seed(1))
    host = small("gated_deltanet")
    host.name = "gated_deltanet"
    study = SmallStudy(profile, host, tokens)
    study.host_path = lambda name: "small"
    hosts.heldout_losses(study)
    hosts.survey(study)
"""


def test_two_runs_of_a_real_stage_are_the_same_bit_for_bit(tmp_path):
    command, runs = [sys.executable, "-c", textwrap.dedent(STAGE)], []
    path = os.pathsep.join([str(paths.ROOT), str(paths.ROOT / "tests")])
    for number in "12":
        own = {"WRITESAE_OUTPUT": str(tmp_path / number), "PYTHONHASHSEED": number, "PYTHONPATH": path}
        runs.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.DEVNULL))
    assert [run.wait() for run in runs] == [0, 0]
    report = verify.verify(*(tmp_path / number / "results" / "smoke" for number in "12"), [], exact=True)
    assert not report.failures and {table.name for table in report.tables} == {"all_cells.csv", "heldout_loss.csv"}
