"""The research object of the results names every table, with its hash."""

import hashlib
import json

from replication.commands.crate import NAME, crate, write_crate
from replication.study.paths import ROOT


def test_the_committed_metadata_are_those_of_the_tables():
    results = ROOT / "results"
    assert json.loads((results / NAME).read_text(encoding="utf-8")) == crate(results), "run: make readme"


def test_each_table_is_a_part_with_its_size_and_hash(tmp_path):
    (tmp_path / "toy").mkdir()
    table = tmp_path / "toy" / "a b.csv"
    table.write_bytes(b"x\r\n1\r\n")
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    record = dict(
        sha256=digest, created="2026-01-02T03:04:05+00:00", rows=1, profile="toy", seed=7, host="all", commit="c0"
    )
    table.with_name("a b.csv.json").write_text(json.dumps(record))
    write_crate(tmp_path)
    graph = {x["@id"]: x for x in json.loads((tmp_path / NAME).read_text())["@graph"]}
    assert graph[NAME]["about"] == {"@id": "./"} and graph["./"]["hasPart"] == [{"@id": "toy/a b.csv"}]
    assert graph["./"]["datePublished"] == record["created"]
    part = graph["toy/a b.csv"]
    assert (part["sha256"], part["contentSize"], part["version"]) == (digest, "6", "c0")
    assert "seed 7" in part["description"] and "profile toy" in part["description"]
