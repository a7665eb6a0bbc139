"""Which changes rerun a stage. Each test failed when the inputs of a stage were listed by hand."""

import dataclasses
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SmallStudy
from safetensors.torch import load_file, save_file

from replication.pages import install, multiverse, population, replacement, selectivity
from replication.study import docstrings, fingerprint
from replication.study.firings import run_firings
from replication.study.paths import ROOT
from replication.study.profile import HostSection, load_profile
from replication.study.study import Study
from writesae.hosts.load import load_host

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
    """Compares the fingerprints of two seeds. Page 12 once kept its old results under a new seed."""

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
    """Compares fingerprints before and after a change of code. Pages 09 and 11 once did not rerun."""
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


def study_of(**changes):
    """The study of profile smoke with one host, whose section is changed."""
    profile = load_profile("smoke")
    section = profile.hosts[HOST].model_copy(update=changes)
    return Study(profile.model_copy(update=dict(hosts={HOST: section})))


def identity(**changes):
    return study_of(**changes).host_fingerprint(HOST)


def test_type_and_tokenizer_of_a_local_host_count(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    same, typed, tokenized = identity(), identity(dtype="bfloat16"), identity(tokenizer=str(tmp_path))
    assert identity() == same and same != typed and same != tokenized
    (tmp_path / "tokenizer.json").write_text("[]")
    assert identity(tokenizer=str(tmp_path)) != tokenized


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ROOT / "models" / HOST, tmp_path / "models [1]" / HOST)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "pytorch_model.bin"]
    + ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "rwkv_vocab_v1.txt", "tokenizer.model.v3"],
)
def test_every_file_that_a_host_is_read_from_counts(folder, name):
    seen = [identity(path=str(folder))]
    for end in (b" ", b"\n "):
        with open(folder / name, "ab") as file:
            file.write(end)
        seen.append(identity(path=str(folder)))
    assert len({str(x) for x in seen}) == 3
    (folder / "README.md").write_text("no part of the model")
    assert identity(path=str(folder)) == seen[-1]


def test_a_host_whose_files_have_changed_is_loaded_again(folder):
    study = study_of(path=str(folder))
    first = study.host(HOST)
    assert study.host(HOST) is first
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("A_log"))
    save_file(weights | {name: weights[name] * 2}, folder / "model.safetensors", metadata={"format": "pt"})
    again = study.host(HOST)
    assert again is not first and study.host(HOST) is again
    assert torch.equal(again.model.state_dict()[name], first.model.state_dict()[name] * 2)


def test_a_file_of_another_size_counts_though_its_time_is_the_same(folder):
    path, before = folder / "config.json", identity(path=str(folder))
    times = path.stat()
    path.write_text(path.read_text() + " ")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity(path=str(folder)) != before


@pytest.mark.parametrize("place", ["models/mamba2", "~/models/mamba2"])
def test_a_model_and_a_tokenizer_are_found_by_the_same_rule(place, tmp_path, monkeypatch):
    """Relative to the repository, whatever the current folder is, and below the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(ROOT))
    host = study_of(path=place, tokenizer=place).host(HOST)
    assert host.family == "mamba2" and len(host.tokenizer) == host.vocabulary
    assert identity(path=place, tokenizer=place)["tokenizer"] == identity(path="models/mamba2")["model"]


def test_a_model_in_shards_can_stand_in_a_profile(folder):
    expected = study_of(path=str(folder)).host(HOST).model.state_dict()
    load_host(folder).model.save_pretrained(folder, max_shard_size="4MB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    study = study_of(path=str(folder))
    assert all(torch.equal(x, expected[name]) for name, x in study.host(HOST).model.state_dict().items())
    assert len(study.host_fingerprint(HOST)["model"]) > 5


def test_the_commit_of_a_hub_model_and_of_a_hub_tokenizer_count(monkeypatch):
    class Loaded:
        __module__ = "writesae.hosts.mamba2"

    commits = dict(model="a", tokenizer="b")
    monkeypatch.setattr(Study, "host", lambda study, name: Loaded())
    monkeypatch.setattr("replication.study.study.commit", lambda name, revision: commits[name.partition("/")[2]])
    seen = [identity(path="owner/model", tokenizer="owner/tokenizer")]
    for name in commits:
        commits[name] = "c"
        seen.append(identity(path="owner/model", tokenizer="owner/tokenizer"))
    assert len({str(x) for x in seen}) == 3


def test_an_installed_package_that_was_edited_in_place_counts(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('"""A docstring."""')
    monkeypatch.setattr(docstrings, "_files", lambda: tmp_path.glob("*.py"))
    seen = []
    for text in ('"""A docstring."""', '"""A longer docstring."""'):
        (tmp_path / "a.py").write_text(text)
        docstrings._sizes.cache_clear()
        seen.append(identity()["corpus"])
    docstrings._sizes.cache_clear()
    assert seen[0] != seen[1]


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
