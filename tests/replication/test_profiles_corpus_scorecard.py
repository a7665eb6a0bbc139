"""Profiles refuse what is wrong; the corpus is split by hash and described without its text; the scorecard's rules."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import yaml

from replication.commands import dryrun
from replication.scorecard import criteria, measures
from replication.scorecard import table as table_module
from replication.study import docstrings, paths
from replication.study.profile import load_profile
from writesae.hosts import load


def test_mini_keeps_the_papers_counts():
    mini = load_profile("mini")
    assert sum(mini.replacement.firings.values()) == 4851
    assert mini.population.atoms == 87
    install = mini.install
    targets = install.targets_per_class * len(install.rank_classes)
    assert install.prompts * len(install.distances) * targets * len(install.magnitudes) == 3600
    assert mini.logit_shift.atoms * len(mini.logit_shift.eps) == 200
    assert mini.logit_shift.prompts == 500


def test_unknown_profile_and_wrong_field_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no profile 'minni': choose one of mini"):
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
    assert cells == {"Qwen/Qwen3.5-0.8B": (9, 4), criteria.QWEN_4B: (12, 8), criteria.QWEN_27B: (32, 16)}, "the paper's"
    assert all(scale.model_dump()["hosts"][name]["revision"] for name in scale.hosts)
    (tmp_path / "odd.yaml").write_text("extends: even\nseed: 3\n")
    with pytest.raises(ValueError, match=r"Profile odd extends 'even', which is not there: write even\.yaml beside it"):
        load_profile("odd", tmp_path)
    (tmp_path / "even.yaml").write_text("extends: odd\n")
    with pytest.raises(ValueError, match="Profile odd: hosts: Field required"):
        load_profile("odd", tmp_path)


def test_docstrings_of_a_file(tmp_path):
    path = tmp_path / "module.py"
    nested = 'class A:\n    def f(self):\n        if 1:\n            def g():\n                "deep"\n'
    path.write_text('"""Of the module."""\n' + nested + 'add_newdoc("x", "y", """of y""")\n"not one"\n')
    assert {text for _, text in docstrings._docstrings(path)} == {"Of the module.", "deep", "x", "y", "of y"}
    path.write_text("def broken(:\n")
    assert list(docstrings._docstrings(path)) == []


def test_splits_are_disjoint_and_follow_from_the_text_alone():
    assert sorted(b for buckets in docstrings.SPLITS.values() for b in buckets) == list(range(100))
    one = docstrings.Passage("text", "here:1", "0000004f" + "0" * 56)
    assert one.split == "sae"  # 0x4f = 79
    assert dataclasses.replace(one, source="there:9").split == "sae"
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


RULE = measures.Rule("above one half", "x", 0.5, "above", lambda *_: None)


@pytest.mark.parametrize(
    ("low", "high", "claimed", "status"),
    [
        (0.6, 0.8, "above", "same direction"),
        (0.2, 0.4, "above", "opposite"),
        (0.4, 0.6, "above", "no effect"),
        (0.2, 0.4, "below", "same direction"),
        (0.6, 0.8, "below", "opposite"),
        (0.4, 0.6, "equal", "same direction"),
        (0.6, 0.8, "equal", "opposite"),
    ],
)
def test_status_by_interval(low, high, claimed, status):
    rule = dataclasses.replace(RULE, claimed=claimed)
    assert table_module.status(measures.Answer((low + high) / 2, low, high, 10), rule) == status


def test_every_claim_has_a_rule_and_every_rule_can_be_asked():
    claims = pd.read_csv(paths.ROOT / "paper" / "claims.csv")
    assert set(criteria.RULES) == set(claims.id)
    assert claims.id.is_unique
    assert {rule.family for rule in criteria.RULES.values()} <= {"", *load.FAMILIES}
    assert {rule.model for rule in criteria.RULES.values()} <= {"", *yaml.safe_load(dryrun.SHAPES.read_text())}
    assert {rule.claimed for rule in criteria.RULES.values()} <= {"above", "below", "equal"}


def test_claims_about_an_architecture_or_a_size_are_asked_of_it_alone():
    hosts = pd.DataFrame(
        [
            ("small", "gated_deltanet", "models/gated_deltanet"),
            ("large", "gated_deltanet", criteria.QWEN_4B),
            ("delta", "delta_net", "fla-hub/delta_net-1.3B-100B"),
            ("gla", "gla", "fla-hub/gla-1.3B-100B"),
        ],
        columns=["host", "family", "path"],
    ).set_index("host")

    def asked(name):
        return [host for host, line in hosts.iterrows() if criteria.RULES[name].asks(line)]

    assert asked("R1") == ["small", "large", "delta", "gla"]
    assert asked("X2") == ["small", "large"]
    assert asked("C5") == asked("X7") == asked("X10") == ["large"]
    assert asked("X9") == asked("X6") == ["delta"] and asked("X5") == ["gla"]
    assert asked("X8") == asked("X1") == []


def test_a_missing_row_is_an_error_not_a_number():
    table = pd.DataFrame(dict(host=["a"], value=[1.0]))
    with pytest.raises(KeyError, match="0 rows"):
        measures._row(table, host="b")


def test_failure_gap_by_hand():
    generator = np.random.default_rng(0)
    kl_delete = np.sort(generator.exponential(size=400))
    fail = np.r_[np.ones(50), np.zeros(50), np.zeros(200), np.ones(10), np.zeros(90)].astype(bool)
    table = pd.DataFrame(
        dict(host="h", kl_delete=kl_delete, kl_atom=np.where(fail, kl_delete + 1, kl_delete / 2), **measures.PAPERS)
    )
    answer = measures.failure_gap({"replacement": table}, "h")
    assert answer.value == pytest.approx(0.5 - 0.1)
    assert answer.low < 0.4 < answer.high
