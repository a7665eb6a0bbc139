"""Profiles and their errors, the corpus and its splits by hash."""

import dataclasses

import pytest

from replication.study import docstrings
from replication.study.profile import load_profile
from writesae.evaluate.shifts import PAPER_EPS
from writesae.text import split_of

QWEN_4B, QWEN_27B = "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-27B"


def test_mini_keeps_the_papers_counts():
    mini = load_profile("mini")
    assert sum(mini.replacement.firings.values()) == 4851
    assert mini.population.atoms == 87
    install = mini.install
    targets = install.targets_per_class * len(install.rank_classes)
    assert install.prompts * len(install.distances) * targets * len(install.magnitudes) == 3600
    assert mini.logit_shift.eps == [*PAPER_EPS, 10.0] and mini.logit_shift.atoms * len(PAPER_EPS) == 200
    assert mini.logit_shift.prompts == 500


def test_unknown_profile_and_wrong_field_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no profile 'minni': choose one of full, full-hosts, host-seeds, mini"):
        load_profile("minni")
    text = (docstrings.Path(__file__).parents[2] / "profiles" / "mini.yaml").read_text()
    (tmp_path / "odd.yaml").write_text(text.replace("prompts: 500", "prompts: many"))
    with pytest.raises(ValueError, match=r"Profile odd: logit_shift\.prompts"):
        load_profile("odd", tmp_path)
    (tmp_path / "odd.yaml").write_text(text + "\nsurprise: 1\n")
    with pytest.raises(ValueError, match="Profile odd: surprise"):
        load_profile("odd", tmp_path)


def test_a_profile_has_the_fields_of_the_one_it_extends_but_for_its_own(tmp_path):
    more, below = load_profile("more-hosts"), load_profile("single-gpu")
    cells = {name: (host.cells["middle"].layer, host.cells["middle"].head) for name, host in more.hosts.items()}
    assert cells == dict(gated_deltanet=(9, 4), delta_net=(12, 8), gla=(12, 0)), "the paper's"
    assert more.hosts["gated_deltanet"] == below.hosts["gated_deltanet"]
    assert more.hosts["gla"].overrides == below.hosts["rwkv7"].overrides
    assert more.model_dump(exclude={"name", "hosts"}) == below.model_dump(exclude={"name", "hosts"})
    scale = load_profile("scale")
    cells = {host.path: (host.cells["middle"].layer, host.cells["middle"].head) for host in scale.hosts.values()}
    assert cells == {"Qwen/Qwen3.5-0.8B": (9, 4), QWEN_4B: (12, 8), QWEN_27B: (32, 16)}, "the paper's"
    assert all(scale.model_dump()["hosts"][name]["revision"] for name in scale.hosts)
    (tmp_path / "odd.yaml").write_text("extends: even\nseed: 3\n")
    with pytest.raises(ValueError, match=r"Profile odd extends 'even': write even\.yaml in the same folder"):
        load_profile("odd", tmp_path)
    (tmp_path / "even.yaml").write_text("extends: odd\n")
    with pytest.raises(ValueError, match="Profile odd extends itself"):
        load_profile("odd", tmp_path)
    full, others = load_profile("full"), load_profile("full-hosts")  # which extends full, which extends mini
    assert others.saes == full.saes != load_profile("mini").saes and len(others.hosts) == 3


def test_docstrings_of_a_file(tmp_path):
    path = tmp_path / "module.py"
    nested = 'class A:\n    def f(self):\n        if 1:\n            def g():\n                "deep"\n'
    path.write_text('"""Of the module."""\n' + nested + 'add_newdoc("x", "y", """of y""")\n"not one"\n')
    assert {*docstrings._docstrings(path)} - {""} == {"Of the module.", "deep", "x", "y", "of y"}
    path.write_text("def broken(:\n")
    assert list(docstrings._docstrings(path)) == []


def test_splits_are_disjoint_and_follow_from_the_text_alone():
    assert sorted(b for buckets in docstrings.SPLITS.values() for b in buckets) == list(range(100))
    assert split_of("0000004f" + "0" * 56, docstrings.SPLITS) == "sae"  # 0x4f = 79
    with pytest.raises(ValueError, match="no split 'test'"):
        docstrings.texts("test")


def test_manifest_names_the_package_that_differs():
    mine = docstrings.Manifest("3.11.1", dict(numpy="2.0", scipy="1.0"), {}, 10, "a")
    theirs = docstrings.Manifest("3.11.1", dict(numpy="2.1", scipy="1.0"), {}, 12, "b")
    assert mine.differences(dataclasses.replace(theirs, sha256="a")) == []
    assert mine.differences(theirs) == ["numpy is 2.0 here and 2.1 in the reference"]
    changed = dataclasses.replace(mine, sha256="c")
    assert "some package files were changed" in mine.differences(changed)[0]


def test_tokenizer_round_trips_bytes():
    tokenizer = docstrings.train_tokenizer(["def f(x): return x + 1\n" * 20, "naïve café ∑"], 320)
    text = "f(1234) → café\t∑\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(docstrings.END_OF_TEXT) == 0
