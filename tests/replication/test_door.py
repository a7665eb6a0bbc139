"""All names in CONTRIBUTING, the citation and the workflow exist."""

import json
import re
import tomllib
from pathlib import Path

import yaml

from replication.scorecard import measures
from replication.study.study import Study
from writesae.hosts import base, load

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_guide_names_files_that_are_there():
    named = set(re.findall(r"`((?:writesae|tests|notebooks|profiles|paper|figures|models|\.ci)/[\w./]*)`", GUIDE))
    placeholders = {name for name in named if re.search(r"[A-Z]{2,}", name.replace("README", ""))}
    assert len(named - placeholders) >= 8 and placeholders
    assert [name for name in sorted(named - placeholders) if not (ROOT / name).exists()] == []


def test_the_guide_names_make_targets_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M)) | {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    named = set(re.findall(r"\bmake ([a-z0-9][\w-]*)", GUIDE)) - {"NN_NAME"}
    assert {"env", "test", "all", "20_scorecard"} <= named
    assert named <= targets


def test_the_guide_names_code_that_is_there():
    for owner, names in (
        (load, ("FAMILIES",)),
        (load.adapter("mamba2"), ("model_type", "model_classes", "decay_parameters", "build", "before_training")),
        (base, ("Host",)),
        (Study, ("stage", "gather", "write")),
        (measures, ("summary",)),
    ):
        for name in names:
            assert name in GUIDE and hasattr(owner, name), name


def test_the_citation_has_what_the_format_asks_for():
    """The software and each reference have the required fields of the Citation File Format 1.2.0."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert (found["cff-version"], found["version"], found["license"]) == (
        "1.2.0",
        project["version"],
        project["license"],
    )
    (paper,) = found["references"]
    assert {"type", "title", "authors"} <= set(paper) and paper["url"].endswith("2605.12770")
    for author in [*found["authors"], *paper["authors"]]:
        assert {"name"} <= set(author) or {"given-names", "family-names"} <= set(author)


def test_the_workflow_runs_what_continuous_integration_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert steps[-1] == ".ci/run" and "make env" in steps[0]
    corpus = json.loads((ROOT / "models/gated_deltanet/corpus.json").read_text(encoding="utf-8"))
    (python,) = [
        step["with"]["python-version"] for step in workflow["jobs"]["test"]["steps"] if "python" in step.get("uses", "")
    ]
    assert python == corpus["python"], "the outputs to compare with are of another text"
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
