"""Compare the results in build/test with those of the last commit: `make test-reference`."""

from pathlib import Path

import pytest

from replication.commands.verify import FAILURES, judge, read_tolerances

REPOSITORY = Path(__file__).resolve().parents[2]
FRESH = REPOSITORY / "build" / "test" / "results" / "mini"
TOLERANCES = read_tolerances(Path(__file__).with_name("tolerances.yaml"))
TABLES = {tolerance.file for tolerance in TOLERANCES}
OF_ATOMS = {"cache_erase_summary.csv", "readers_summary.csv"}  # rows are atoms: they vary by machine


@pytest.fixture(scope="module")
def reference(last_commit):
    return last_commit("mini")


@pytest.mark.parametrize("name", sorted(TABLES))
def test_metrics_are_within_their_tolerances(reference, name):
    table = judge(name, reference, FRESH, TOLERANCES)
    assert table.verdict not in FAILURES, "\n".join(table.details)


def test_every_committed_summary_has_a_tolerance(reference):
    summaries = {path.name for path in reference.glob("*_summary.csv")} - OF_ATOMS
    assert summaries <= TABLES, f"no tolerance for {', '.join(sorted(summaries - TABLES))}"
