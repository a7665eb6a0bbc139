"""Which changes rerun a stage. Each test failed when the inputs of a stage were listed by hand."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SmallStudy

from replication.pages import install, multiverse, population, replacement, selectivity
from replication.study import fingerprint
from replication.study.firings import run_firings
from replication.study.paths import ROOT
from replication.study.profile import HostSection, load_profile
from replication.study.study import Study

HOST = "gated_deltanet"


@pytest.fixture
def study(gated_deltanet, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    return SmallStudy(load_profile("smoke"), gated_deltanet, tokens)


@dataclasses.dataclass
class Firing:
    window: int
    factors: dict


# Values with different fingerprints

VALUES = {
    "number": (1, 2),
    "kind of number": (1, 1.5),
    "text": ("a", "b"),
    "tensor": (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-30])),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "type": (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
    "scalar tensor": (torch.tensor(1.0), torch.tensor(2.0)),
    "array": (np.arange(3), np.arange(1, 4)),
    "rows": (pd.DataFrame(dict(a=[1, 2])), pd.DataFrame(dict(a=[2, 1]))),
    "columns": (pd.DataFrame(dict(a=[1])), pd.DataFrame(dict(b=[1]))),
    "weights": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    "field": (Firing(1, {"key": torch.zeros(1)}), Firing(1, {"key": torch.ones(1)})),
    "function": (np.testing.assert_equal, np.testing.assert_allclose),
    "key": ({(1, 2): 3}, {(1, 3): 3}),
    "order of a list": ([1, 2], [2, 1]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_fingerprint_tells_values_apart_by_content(kind):
    first, second = VALUES[kind]
    assert fingerprint.fingerprint(x=first) == fingerprint.fingerprint(x=first)
    assert fingerprint.fingerprint(x=first) != fingerprint.fingerprint(x=second)


def test_the_order_of_a_mapping_does_not_count():
    assert fingerprint.fingerprint(x=dict(a=1, b=2)) == fingerprint.fingerprint(x=dict(b=2, a=1))


# The inputs of a stage


def test_a_stage_refuses_a_function_that_knows_more_than_it_is_given(study):
    hidden = 3

    def closure(group):
        return pd.DataFrame(dict(x=[group + hidden]))

    for compute in (closure, lambda group: pd.DataFrame(dict(x=[group]))):
        with pytest.raises(TypeError, match="must compute with a function of a module"):
            study.stage("table", HOST, [1], compute)
    with pytest.raises(TypeError, match="not of SmallStudy"):
        study.stage("table", HOST, [1], doubled, study=study)


calls = []


def doubled(group, **given):
    calls.append(group)
    return pd.DataFrame(dict(x=[2 * group]))


@pytest.mark.parametrize("change", ["nothing", "groups", "given", "host"])
def test_a_stage_computes_again_where_something_changed_and_only_there(study, change, monkeypatch):
    calls.clear()
    study.stage("table", HOST, [1, 2], doubled, weights=torch.zeros(3), seed=1)
    groups, given = [1, 2], dict(weights=torch.zeros(3), seed=1)
    if change == "groups":
        groups = [1, 3]
    if change == "given":
        given["seed"] = 2
    if change == "host":
        monkeypatch.setattr(study, "host_fingerprint", lambda name: {"name": "another"})
    table = study.stage("table", HOST, groups, doubled, **given)
    assert table.x.tolist() == [2 * group for group in groups]
    assert calls == [1, 2] + ([] if change == "nothing" else groups)


# Pages whose hand-written list of inputs once lacked an input


@pytest.fixture
def placed(study, monkeypatch):
    """The study, with cell (1, 0) at every place."""
    monkeypatch.setattr(study, "cell", lambda host, place: (1, 0))
    return study


def given_of(study, page, monkeypatch):
    """One fingerprint per stage of the page, of the arguments that the stage receives."""
    given = []
    monkeypatch.setattr(study, "stage", lambda *arguments, **more: given.append((arguments, more)))
    page()
    return [fingerprint.fingerprint(arguments=arguments, given=more) for arguments, more in given]


def test_another_seed_draws_other_prompts_and_targets(placed, monkeypatch):
    """Compares the fingerprints of two seeds. Page 10 once kept its old results under a new seed."""

    def page():
        install._stage(placed, HOST, "install")

    section = placed.profile.install.model_copy(update=dict(prompts=2, prompt_tokens=20))
    monkeypatch.setattr(placed, "profile", placed.profile.model_copy(update=dict(install=section)))
    first = given_of(placed, page, monkeypatch)
    assert first == given_of(placed, page, monkeypatch)
    monkeypatch.setattr(placed, "profile", placed.profile.model_copy(update=dict(seed=7)))
    assert first != given_of(placed, page, monkeypatch)


@pytest.mark.parametrize("page", [population, replacement, multiverse, selectivity])
def test_the_code_of_a_page_counts_in_its_stage(placed, page, monkeypatch):
    """Compares fingerprints before and after a change of code. Pages 07 and 11 once did not rerun."""
    measure = dict(multiverse="measure", selectivity="compare").get(page.__name__.rpartition(".")[2])
    options = dict(measure=getattr(page, measure)) if measure else dict(conditions=page.CONDITIONS_OF_SURVEYS)

    def run():
        run_firings(placed, HOST, "table", placed.split, [], **options)

    read = fingerprint._module
    first = given_of(placed, run, monkeypatch)
    changed = page.__name__ if measure else "writesae.evaluate.replacement"
    monkeypatch.setattr(
        fingerprint,
        "_module",
        lambda name, root: (*read(name, root)[:1], b"x = 1") if name == changed else read(name, root),
    )
    assert first != given_of(placed, run, monkeypatch)
    if not measure:
        options["conditions"] = page.CONDITIONS_OF_SURVEYS[:2]
        monkeypatch.setattr(fingerprint, "_module", read)
        assert first != given_of(placed, run, monkeypatch)


def test_a_later_value_counts_by_what_it_is_made_of_and_is_made_once(study):
    made = [fingerprint.Later(doubled, group=3, seed=seed) for seed in (1, 1, 2)]
    calls.clear()
    first, second, third = (fingerprint.fingerprint(x=value) for value in made)
    assert first == second != third and not calls
    assert made[0]() is made[0]() and calls == [3]


# The fingerprint of a host


def test_type_and_tokenizer_of_a_local_host_count(tmp_path):
    def identity(**changes):
        profile = load_profile("smoke")
        section = profile.hosts[HOST].model_copy(update=changes)
        return Study(profile.model_copy(update=dict(hosts={HOST: section}))).host_fingerprint(HOST)

    (tmp_path / "tokenizer.json").write_text("{}")
    same, typed, tokenized = identity(), identity(dtype="bfloat16"), identity(tokenizer=str(tmp_path))
    assert identity() == same and same != typed and same != tokenized
    (tmp_path / "tokenizer.json").write_text("[]")
    assert identity(tokenizer=str(tmp_path)) != tokenized


# The code that a fingerprint covers

ELSEWHERE = [
    "replication/commands/disk.py",
    "writesae/hosts/hub.py",
    "writesae/hosts/fla.py",
    "writesae/hosts/rwkv7_tokenizer.py",
    "replication/commands/browser.py",
    "replication/plots.py",
]
COUNTED = ["writesae/sae/train.py", "writesae/history.py", "writesae/hosts/gated_deltanet.py", "writesae/harvesting.py"]


def test_training_depends_on_its_own_code_and_on_no_other(monkeypatch):
    """Compares fingerprints before and after a change of a module. Unrelated modules must not count."""
    read, changed = fingerprint._module, []

    def module(name, root):
        imports, code = read(name, root)
        path = fingerprint.module_file(name, root).relative_to(root).as_posix()
        return imports, code + (b"x = 1" if path in changed else b"")

    def identity():
        study = Study(load_profile("smoke"))
        code = fingerprint.code_hash(["replication.study.training"])
        return code, study.host_fingerprint(HOST)["code"]

    monkeypatch.setattr(fingerprint, "_module", module)
    before = identity()
    for path in ELSEWHERE:
        assert (ROOT / path).is_file()
        changed[:] = [path]
        assert identity() == before, path
    for path in COUNTED:
        assert (ROOT / path).is_file()
        changed[:] = [path]
        assert identity() != before, path


def test_a_host_of_another_kind_of_folder_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    profile = load_profile("smoke")
    section = HostSection(path=str(tmp_path), cells=profile.hosts[HOST].cells)
    with pytest.raises(ValueError, match="is a Bert.*, and no host family has that class"):
        Study(profile.model_copy(update=dict(hosts={HOST: section}))).host_fingerprint(HOST)
