"""The research object of the results names every table, with its hash."""

import hashlib
import json

from replication.commands.crate import NAME, crate, write_crate


def test_the_committed_metadata_are_those_of_the_tables(last_commit):
    """After a run, the tables of the working copy are others."""
    results = last_commit("")
    assert json.loads((results / NAME).read_text(encoding="utf-8")) == crate(results), "run: make readme"


def test_each_table_is_a_part_with_its_size_and_hash(tmp_path):
    for name in ("mini", "smoke"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a b.csv").write_bytes(b"x\r\n1\r\n")
    table = tmp_path / "mini" / "a b.csv"
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    record = dict(
        sha256=digest, created="2026-01-02T03:04:05+00:00", rows=1, profile="mini", seed=7, host="all", commit="c0"
    )
    table.with_name("a b.csv.json").write_text(json.dumps(record))
    write_crate(tmp_path)
    graph = {x["@id"]: x for x in json.loads((tmp_path / NAME).read_text())["@graph"]}
    assert graph[NAME]["about"] == {"@id": "./"} and graph["./"]["hasPart"] == [{"@id": "mini/a b.csv"}]
    assert graph["./"]["datePublished"] == record["created"]
    part = graph["mini/a b.csv"]
    assert (part["sha256"], part["contentSize"], part["version"]) == (digest, "6", "c0")
    assert "seed 7" in part["description"] and "profile mini" in part["description"]
