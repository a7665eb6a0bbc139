"""Profiles and their errors, the corpus and its splits by hash, and the rules of the scorecard."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import yaml

from replication.commands import dryrun
from replication.scorecard import claims, criteria, measures
from replication.scorecard import table as table_module
from replication.study import docstrings, paths
from replication.study.profile import load_profile
from writesae.evaluate.shifts import PAPER_EPS
from writesae.hosts import load
from writesae.text import split_of

QWEN_4B, QWEN_27B = "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-27B"
FAILURES = [f"failure_rate_q{quartile}" for quartile in (2, 3, 4)]


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
    assert cells == {"Qwen/Qwen3.5-0.8B": (9, 4), QWEN_4B: (12, 8), QWEN_27B: (32, 16)}, "the paper's"
    assert all(scale.model_dump()["hosts"][name]["revision"] for name in scale.hosts)
    (tmp_path / "odd.yaml").write_text("extends: even\nseed: 3\n")
    with pytest.raises(ValueError, match=r"Profile odd extends 'even': write even\.yaml in the same folder"):
        load_profile("odd", tmp_path)
    (tmp_path / "even.yaml").write_text("extends: odd\n")
    with pytest.raises(ValueError, match="Profile odd: hosts: Field required"):
        load_profile("odd", tmp_path)


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


CRITERION = dict(criterion="above one half", notebook="x", indifference=0.5, claimed="above", measure="failure_gap")


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
    criterion = criteria.Criterion(**CRITERION | dict(claimed=claimed))
    assert criterion.status(measures.Answer((low + high) / 2, low, high, 10)) == status
    assert status in table_module.STATUSES


def test_every_claim_has_a_criterion_that_can_be_asked():
    ids = pd.read_csv(claims.CLAIMS).id
    assert list(criteria.read_criteria()) == list(ids) and ids.is_unique
    asked = criteria.read_criteria().values()
    assert {criterion.family for criterion in asked} <= {"", *load.FAMILIES}
    assert {criterion.model for criterion in asked} <= {"", *yaml.safe_load(dryrun.SHAPES.read_text())}
    assert {criterion.measure for criterion in asked} == set(measures.MEASURES), "no measure that nothing asks for"
    assert all((paths.ROOT / "notebooks" / f"{criterion.notebook}.ipynb").is_file() for criterion in asked)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(measure="failure_gab"), r"A1: there is no measure 'failure_gab': choose one of summary, "),
        (dict(arguments=dict(cell="early")), r"A1: measure failure_gap: got an unexpected keyword argument 'cell'\.$"),
        (dict(measure="win_rate"), r"A1: measure win_rate: missing a required argument: 'cells'\.$"),
        (dict(famly="mamba2"), r"A1\.famly: Extra inputs are not permitted\.$"),
        (dict(claimed="more"), r"A1\.claimed: Input should be 'above', 'below' or 'equal'\.$"),
    ],
)
def test_a_criterion_that_says_too_little_or_too_much_is_refused(tmp_path, change, sentence):
    (tmp_path / "claims.csv").write_text("id,value\nA1,1\n")
    path = tmp_path / "criteria.yaml"
    path.write_text(yaml.safe_dump(dict(A1=CRITERION | change)))
    with pytest.raises(ValueError, match=r"criteria\.yaml: " + sentence):
        criteria.read_criteria(path, tmp_path / "claims.csv")


def test_claims_and_criteria_belong_together(tmp_path):
    path, listed = tmp_path / "criteria.yaml", tmp_path / "claims.csv"
    path.write_text(yaml.safe_dump(dict(A1=CRITERION)))
    listed.write_text("id,value\nA1,1\nA2,1\n")
    with pytest.raises(ValueError, match="claim A2 has no criterion"):
        criteria.read_criteria(path, listed)
    path.write_text(yaml.safe_dump(dict(A1=CRITERION, A2=CRITERION, A3=CRITERION)))
    with pytest.raises(ValueError, match=r"claims\.csv has no claim A3"):
        criteria.read_criteria(path, listed)


def test_claims_about_an_architecture_or_a_size_are_asked_of_it_alone():
    hosts = pd.DataFrame(
        [
            ("small", "gated_deltanet", "models/gated_deltanet"),
            ("large", "gated_deltanet", QWEN_4B),
            ("delta", "delta_net", "fla-hub/delta_net-1.3B-100B"),
            ("gla", "gla", "fla-hub/gla-1.3B-100B"),
        ],
        columns=["host", "family", "path"],
    ).set_index("host")

    def asked(name):
        return [host for host, line in hosts.iterrows() if criteria.read_criteria()[name].asks(line)]

    assert asked("R1") == ["small", "large", "delta", "gla"]
    assert asked("X2") == ["small", "large"]
    assert asked("C5") == asked("X7") == asked("X10") == ["large"]
    assert asked("X9") == asked("X6") == ["delta"] and asked("X5") == ["gla"]
    assert asked("X8") == asked("X1") == []


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


def test_a_table_is_read_once_and_only_where_a_measure_asks_for_it(monkeypatch):
    reads = []

    def read_table(name):
        reads.append(name)
        return dict(
            hosts=pd.DataFrame(dict(host=["tiny"], family=["mamba2"], path=["models/tiny"])),
            install_summary=pd.DataFrame(dict(host=["tiny"], share=[0.7], ci_low=[0.6], ci_high=[0.8], n=[9])),
        )[name]

    install = dict(measure="summary", arguments=dict(table="install_summary", value="share", where={}))
    elsewhere = CRITERION | dict(family="rwkv7")
    every = {name: criteria.Criterion(**elsewhere) for name in criteria.read_criteria()}
    every |= {name: criteria.Criterion(**CRITERION | install) for name in ("I2", "I4")}
    monkeypatch.setattr(table_module, "read_criteria", lambda: every)
    found = table_module.scorecard(read_table, ["tiny"]).set_index("id")
    assert reads == ["hosts", "install_summary"]
    assert found.loc["I4", ["value", "n", "status", "direction"]].tolist() == [0.7, 9, "same direction", 1]
    assert found.loc["R1", "status"] == "not run" and found.loc["R1", "criterion"] == ""


def test_no_row_is_not_run_and_several_rows_are_an_error():
    table = pd.DataFrame(dict(host=["a", "b", "b"], value=[1.0, 2, 3], ci_low=0.0, ci_high=4.0, n=[5, 6, 7]))

    def summary(host, **columns):
        return measures.summary(lambda name: table, host, "any", "value", {}, **columns)

    assert summary("a") == (1.0, 0.0, 4.0, 5)
    assert summary("a", n=["n", "value"]) == (1.0, 0.0, 4.0, 6)
    assert summary("c") is None
    assert summary("a", atoms=["n"]) == summary("a") and summary("a", atoms=["value"]) is None, "too few atoms"
    with pytest.raises(KeyError, match="2 rows"):
        summary("b")


def test_a_missing_row_is_an_error_not_a_number():
    table = pd.DataFrame(dict(host=["a"], value=[1.0]))
    with pytest.raises(KeyError, match="0 rows"):
        measures._row(table, host="b")


def test_failure_gap_by_hand():
    generator = np.random.default_rng(0)
    kl_delete = np.sort(generator.exponential(size=400))
    fail = np.r_[np.ones(50), np.zeros(50), np.zeros(200), np.ones(10), np.zeros(90)].astype(bool)
    table = pd.DataFrame(
        dict(host="h", read="write", kl_delete=kl_delete, kl_atom=np.where(fail, kl_delete + 1, kl_delete / 2))
    )
    table = table.assign(**measures.CHOICES)
    answer = measures.failure_gap(lambda name: table, "h")
    assert answer.value == pytest.approx(0.5 - 0.1)
    assert answer.low < 0.4 < answer.high
