"""Every option of every command with a value that is not the default, and paths as users type them."""

import shutil

import pandas as pd
import pytest
import torch
import yaml

from replication.__main__ import main
from replication.commands import CommandError, check_disk, disk, dryrun, repeats, sweep, train_host, verify
from replication.study import paths
from replication.study.profile import CellRule, HostSection, dry, load_profile
from replication.study.study import OUT_OF_MEMORY, Study


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and beside it a current folder, both with a blank and a bracket in their paths."""
    monkeypatch.setenv("HOME", str(tmp_path / "home [1]"))
    monkeypatch.setenv("WRITESAE_OUTPUT", "~/out put")
    for name in ("home [1]", "here [2]"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here [2]")
    return tmp_path / "home [1]"


def test_paths_start_at_home_at_the_current_folder_or_at_the_repository(home):
    (home / "mine").mkdir()
    (home.parent / "here [2]" / "mine").mkdir()
    assert paths.typed("~/mine") == paths.in_repository("~/mine") == home / "mine"
    assert paths.typed("mine") == home.parent / "here [2]" / "mine"
    assert paths.typed("models/mamba2") == paths.ROOT / "models" / "mamba2"
    assert paths.in_repository("mine") == paths.ROOT / "mine"
    assert paths.Paths("smoke").results == home / "out put" / "results" / "smoke"


def test_a_profile_finds_models_and_tokenizers_by_the_same_rule(home):
    shutil.copytree(paths.ROOT / "models" / "mamba2", home / "my mamba")
    section = dict(path="~/my mamba", tokenizer="models/gated_deltanet", cells=dict(middle=CellRule(layer=1, head=2)))
    profile = load_profile("smoke").model_copy(update=dict(hosts={"mine": HostSection(**section)}))
    study = Study(profile)
    assert study.host_path("mine") == home / "my mamba"
    tokenizer = study.host("mine").tokenizer  # its ids are those of the other host
    assert tokenizer.get_vocab() == Study(load_profile("smoke")).host("gated_deltanet").tokenizer.get_vocab()
    before = study.host_fingerprint("mine")
    assert "tokenizer.json" in before["tokenizer"]
    (home / "my mamba" / "._config.json").write_bytes(b"\x00\xff")  # of macOS
    assert study.host_fingerprint("mine") == before
    assert not study.provenance("mine").get("revisions")
    assert not disk.still_needed(profile, study.paths)[1]


@pytest.mark.parametrize("name", ["../profiles/smoke", "sweeps/cells", "", "Übung"])
def test_a_profile_is_named_by_one_word(name):
    with pytest.raises(ValueError, match="There is no profile .*: choose one of full, full-hosts, host-seeds, mini, "):
        load_profile(name)


def test_a_profile_may_have_digits_for_a_name(home, tmp_path):
    shutil.copy(paths.ROOT / "profiles" / "smoke.yaml", tmp_path / "2026.yaml")
    assert load_profile(2026, tmp_path).name == "2026"


# verify --run --reference --exact, repeats FOLDERS


def test_verify_compares_two_folders_of_the_user(home, monkeypatch, capsys):
    for name, rate in (("a run", 0.5), ("other [1]", 0.50001)):
        Study(load_profile("smoke"))
        folder = home.parent / "here [2]" / name / "results" / "smoke"
        monkeypatch.setenv("WRITESAE_OUTPUT", str(folder.parents[1]))
        Study(load_profile("smoke")).write("rates", pd.DataFrame(dict(host=["a"], rate=[rate])))
    monkeypatch.setattr(verify, "TOLERANCES", home / "tolerances.yaml")
    entry = "{file: rates.csv, keys: [host], metric: rate, absolute: 0.1, reason: a test}"
    (home / "tolerances.yaml").write_text(f"- {entry}")
    command = ["verify", "--profile", "smoke", "--run", "a run", "--reference", "other [1]/results/smoke"]
    assert main(command) == 0 and "within tolerance: 1" in capsys.readouterr().out
    assert main([*command, "--exact"]) == 1 and "moved: 1" in capsys.readouterr().out


def test_repeats_takes_folders_from_where_the_user_is(home, monkeypatch):
    (home.parent / "here [2]" / "run").mkdir()
    taken = []
    monkeypatch.setattr(repeats, "gather", lambda folders, *_: taken.append(folders) or pd.DataFrame([[1]]))
    assert main(["repeats", "--profile", "smoke", "run", "~/run"]) == 0
    assert taken[0] == [home.parent / "here [2]" / "run", home / "run"]


# sweep --grid --jobs, dryrun NAMES, train-host FOLDERS


def test_a_grid_is_a_name_or_a_file(home):
    known = sweep.load_grid("cells")
    assert known == sweep.load_grid("profiles/sweeps/cells.yaml") and known.name == "cells"
    shutil.copy(paths.ROOT / "profiles" / "sweeps" / "cells.yaml", "my grid.yaml")
    assert sweep.load_grid("my grid.yaml") == known.model_copy(update=dict(name="my grid"))


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", ""])
def test_a_sweep_has_one_job_or_more(home, capsys, jobs):
    with pytest.raises(SystemExit):
        main(["sweep", "--grid", "cells", "--jobs", jobs])
    assert f"{jobs!r} is not a number of 1 or more" in capsys.readouterr().err


def test_a_sweep_runs_as_many_jobs_as_are_asked_for(home, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sweep, "check_disk", asked.append)
    monkeypatch.setattr(
        sweep, "run_sweep", lambda profile, grid, jobs: asked.append((profile.name, grid.name, jobs)) or []
    )
    assert main(["sweep", "--profile", "smoke", "--grid", "seeds", "--jobs", "3"]) == 0
    assert asked == ["smoke", ("smoke", "seeds", 3)]


def test_a_grid_without_cells_is_one_sentence(home):
    rule = dict(middle=CellRule(sigma_ratio=3.0))  # among all layers, so that no layer is a headline
    profile = load_profile("smoke")
    section = profile.hosts["mamba2"].model_copy(update=dict(cells=rule))
    grid = sweep.load_grid("cells").model_copy(update=dict(layers="headline"))
    with pytest.raises(ValueError, match="Grid cells has no cell in profile smoke: name layers and heads"):
        sweep.Sweep(profile.model_copy(update=dict(hosts={"mamba2": section})), grid).points()


def test_a_gpu_that_is_too_small_for_a_sweep_is_one_sentence(home):
    def work(*_):
        raise torch.OutOfMemoryError

    grid = sweep.load_grid("cells")
    assert sweep.run_task(work, load_profile("smoke"), grid, "mamba2", 3, "") == [f"mamba2-L3: {OUT_OF_MEMORY}"]


def test_a_dry_run_knows_its_notebooks_before_it_makes_hosts(home, monkeypatch, capsys):
    monkeypatch.setattr(dryrun, "make_hosts", None)
    assert main(["dryrun", "--profile", "smoke", "00_hosts", "99_x"]) == 1
    assert capsys.readouterr().err.startswith("dryrun failed: There is no notebook 99_x: choose one of 00_hosts, ")


def test_hosts_are_trained_from_folders_as_they_are_typed(home, monkeypatch):
    for name in ("a", "b", "c"):
        (home / name / "host").mkdir(parents=True)
    monkeypatch.chdir(home / "a" / "host")
    trained = []
    monkeypatch.setattr(train_host, "train", lambda folder, build: trained.append((folder, build)) or 2.5)
    assert main(["train-host", ".", "~/b/host", "../../c/host/"]) == 0
    folders, builds = zip(*trained)
    assert folders == tuple(home / name / "host" for name in "abc")
    assert set(builds) == {home / "out put" / "build" / "hosts" / "host"}


def test_a_missing_package_is_one_sentence(home, monkeypatch, capsys):
    def missing(*_):
        raise ModuleNotFoundError("The corpus mine needs `pip install datasets`.")

    monkeypatch.setattr(disk, "check", missing)
    assert main(["disk", "--profile", "mini"]) == 1
    assert capsys.readouterr().err == "disk failed: The corpus mine needs `pip install datasets`.\n"


def test_a_grid_with_the_name_of_another_is_refused(home):
    shutil.copy(paths.ROOT / "profiles" / "sweeps" / "cells.yaml", "cells.yaml")
    with pytest.raises(
        ValueError, match=r"here \[2\]/cells.yaml and .*profiles/sweeps/cells.yaml would write the same"
    ):
        sweep.load_grid("cells.yaml")


def test_a_check_of_the_disk_that_dies_is_one_sentence(monkeypatch):
    monkeypatch.setattr("replication.commands.sys.executable", "false")
    with pytest.raises(CommandError, match="^the check of the disk ended with exit status 1$"):
        check_disk("smoke")


@pytest.mark.parametrize("content", ["seed: 2026-13-45", "- 1", "{", "[1]: 2"])
def test_no_mapping_is_one_sentence_whatever_yaml_says(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match="^Profile bad is not a YAML mapping of fields to values.$"):
        load_profile("bad", tmp_path)


def test_hosts_of_a_dry_run_are_kept_apart(home):
    hosts = {name: dict(path=f"{name}/same", cells=dict(middle=dict(layer=1, head=0))) for name in ("one", "two")}
    content = yaml.safe_load((paths.ROOT / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
    over = yaml.safe_load((paths.ROOT / "profiles/dryrun/overrides.yaml").read_text(encoding="utf-8"))
    made = dry(content | dict(hosts=hosts), over)["hosts"]
    assert [made[name]["path"] for name in hosts] == [f"{home}/out put/hosts/{name}--same" for name in hosts]
