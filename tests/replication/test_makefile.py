"""What Make reruns after a change: a copy of the Makefile, with stub notebooks and a stub for Python."""

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"00_hosts": [], "01_harvest": ["00_hosts"], "02_train": ["01_harvest"], "04_shift": ["01_harvest"]}
MODULES = ("writesae/__init__.py", "writesae/sae/model.py", "replication/study/profile.py")
STUB = '#!/bin/sh\necho "$4" >> ran\n[ -e "fail-$4" ] && exit 1\nexit 0\n'


def _write(path, text, age=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def clone(tmp_path):
    for name in MODULES:
        _write(tmp_path / name, "")
    for name, needs in NEEDS.items():
        metadata = {"writesae": {"needs": needs, "makes": [f"results/{{profile}}/{name}.csv"]}}
        content = {"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        _write(tmp_path / "notebooks" / f"{name}.ipynb", json.dumps(content))
        _write(tmp_path / "results" / "mini" / f"{name}.csv", "")
    for name in ("Makefile", "replication/commands/order.py"):
        _write(tmp_path / name, (ROOT / name).read_text())
    _write(tmp_path / "profiles" / "mini.yaml", "")
    _write(tmp_path / "requirements.lock", "")
    _write(tmp_path / "stub", STUB)
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


MAKES = ("PROFILE", "PYTHON", "PARALLEL", "WRITESAE_RUN", "WRITESAE_OUTPUT")


def _make(clone, *arguments):
    command = ["make", "--no-print-directory", "PY=./stub", "JOBS=1", *arguments]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, env=_environment(), timeout=60)


def _environment():
    """The environment without the variables that an outer make sets."""
    return {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", *MAKES)}


def _ran(clone, *arguments):
    """The notebooks that one call of make runs, in the order of the runs."""
    (clone / "ran").unlink(missing_ok=True)
    result = _make(clone, *arguments)
    assert result.returncode == 0, result.stderr
    return (clone / "ran").read_text().split() if (clone / "ran").exists() else []


def _touch(path):
    time.sleep(0.05)
    path.touch()
    time.sleep(0.05)


@pytest.fixture
def done(clone):
    assert _ran(clone, "all") == list(NEEDS)
    assert _ran(clone, "all") == []
    return clone


@pytest.mark.parametrize(
    ("touched", "again"),
    [
        ("notebooks/02_train.ipynb", ["02_train"]),
        ("notebooks/01_harvest.ipynb", ["01_harvest", "02_train", "04_shift"]),
        ("writesae/sae/model.py", list(NEEDS)),
        ("replication/study/profile.py", list(NEEDS)),
        ("profiles/mini.yaml", list(NEEDS)),
        ("requirements.lock", list(NEEDS)),
    ],
)
def test_a_touched_file_reruns_what_depends_on_it_and_no_more(done, touched, again):
    _touch(done / touched)
    assert _ran(done, "all") == again
    assert _ran(done, "all") == []


def test_one_target_a_notebook_runs_only_what_it_needs(clone):
    assert _ran(clone, "04_shift") == ["00_hosts", "01_harvest", "04_shift"]


def test_two_notebooks_run_at_a_time_each_after_those_that_it_needs(clone):
    """02_train and 04_shift each wait for the other: alone, neither would end."""
    other = '[ "$4" = 02_train ] && echo 04_shift || echo 02_train'
    waits = f'until [ -e "began-$({other})" ]; do sleep 0.02; done'
    _write(clone / "stub", f'#!/bin/sh\necho "$4" >> ran\ntouch "began-$4"\ncase "$4" in 0[24]*) {waits};; esac\n')
    ran = _ran(clone, "JOBS=2", "all")
    assert ran[:2] == list(NEEDS)[:2] and sorted(ran[2:]) == ["02_train", "04_shift"]
    assert _ran(clone, "JOBS=2", "all") == []


def test_all_notebooks_of_one_make_have_one_run_and_another_make_has_another(clone):
    _write(clone / "stub", '#!/bin/sh\necho "$4 $WRITESAE_RUN" >> ran\n')
    first, second = _ran(clone, "JOBS=2", "all"), _ran(clone, "JOBS=2", "-B", "all")
    assert len(set(first[1::2])) == len(set(second[1::2])) == 1
    assert first[1] != second[1]


def test_notebooks_are_checked_from_nothing_in_their_order(clone):
    _write(clone / "build" / "test" / "stamps" / "00_hosts", "", age=-100)
    for profile in ("smoke", "big"):
        _write(clone / "profiles" / f"{profile}.yaml", "")
    text = _make(clone, "-n", "test-notebooks").stdout
    assert text.startswith("rm -rf build/test\n")
    _write(clone / "stub", '#!/bin/sh\necho "$WRITESAE_OUTPUT $@" >> ran\n')
    assert _make(clone, "test-notebooks").returncode == 0
    lines = (clone / "ran").read_text().splitlines()
    assert [line.split("/")[-1].removesuffix(".ipynb") for line in lines] == list(NEEDS)
    assert all(line.startswith("build/test -m pytest") for line in lines)
    assert all(" --nbval-lax " in line and " --profile smoke " in line for line in lines)
    assert "--nbval" in _ran(clone, "test-notebooks", "PROFILE=mini"), "the outputs are those of mini"
    assert " --profile big notebooks/00_hosts.ipynb " in " ".join(_ran(clone, "test-notebooks", "PROFILE=big"))
    for profile in ("smoke", "big"):
        options = () if profile == "smoke" else (f"PROFILE={profile}",)
        compared = _make(clone, "-n", "test-reference", *options).stdout
        assert compared == f"'./stub' -m replication verify --profile {profile} --run build/test\n"


def test_a_dry_run_names_what_would_run_and_runs_nothing(done):
    _touch(done / "notebooks/02_train.ipynb")
    (done / "ran").unlink(missing_ok=True)
    text = _make(done, "-n", "all").stdout
    assert "replication run 02_train --profile mini" in text
    assert "replication run 04_shift" not in text
    assert not (done / "ran").exists()


def test_a_sweep_takes_its_grid_by_name(clone):
    _write(clone / "stub", '#!/bin/sh\nshift; echo "$@" >> ran\n')
    _make(clone, "sweep"), _make(clone, "sweep", "PROFILE=big", "GRID=paper")
    command = "replication sweep --profile {} --grid profiles/sweeps/{}.yaml"
    assert (clone / "ran").read_text().splitlines() == [command.format("mini", "cells"), command.format("big", "paper")]


def test_all_hosts_are_trained_by_one_command(clone):
    for name in ("one", "two"):
        _write(clone / "models" / name / "recipe.yaml", "")
    trained = shlex.split(_make(clone, "-n", "hosts").stdout)
    assert trained[:4] == ["./stub", "-m", "replication", "train-host"]
    assert sorted(trained[4:]) == ["models/one", "models/two"]


def test_a_missing_result_is_made_again(done):
    (done / "results" / "mini" / "02_train.csv").unlink()
    assert _ran(done, "figures") == ["02_train"]


def test_a_failed_notebook_is_run_again_and_what_needs_it_waits(clone):
    (clone / "fail-01_harvest").touch()
    assert _make(clone, "all").returncode == 2
    assert (clone / "ran").read_text().split() == ["00_hosts", "01_harvest"]
    (clone / "fail-01_harvest").unlink()
    assert _ran(clone, "all") == ["01_harvest", "02_train", "04_shift"]


def test_an_edit_during_the_run_is_not_lost(done):
    _write(done / "stub", '#!/bin/sh\necho "$4" >> ran\nsleep 0.1\ntouch notebooks/$4.ipynb\n')
    _touch(done / "notebooks/02_train.ipynb")
    assert _ran(done, "all") == ["02_train"]
    _write(done / "stub", STUB)
    assert _ran(done, "all") == ["02_train"]


def test_another_make_does_not_make_the_stamp_younger(done):
    """While 02_train runs, it is edited and a second make fails. Make must run it again."""
    _write(done / "refuse", "#!/bin/sh\nexit 1\n")
    (done / "refuse").chmod(0o755)
    other = "sleep 0.1; touch notebooks/$4.ipynb; sleep 0.1; make PY=./refuse $4"
    _write(done / "stub", f'#!/bin/sh\necho "$4" >> ran\n{other}\nexit 0\n')
    _touch(done / "notebooks/02_train.ipynb")
    assert _ran(done, "all") == ["02_train"]
    _write(done / "stub", STUB)
    assert _ran(done, "all") == ["02_train"]


def test_a_kill_while_the_rules_are_written_leaves_no_part_of_them(done):
    """An incomplete file of rules would look complete to Make, and Make would rerun nothing."""
    _write(done / "half", "#!/bin/sh\necho '# half of'\nkill -9 0\n")
    (done / "half").chmod(0o755)
    _touch(done / "notebooks" / "01_harvest.ipynb")
    command = ["make", "PY=./stub", "PYTHON=./half", "all"]
    assert subprocess.run(command, cwd=done, env=_environment(), start_new_session=True).returncode == -9
    assert _ran(done, "all") == ["01_harvest", "02_train", "04_shift"]


def test_a_new_module_is_noticed_and_a_removed_one_is_no_error(done):
    _write(done / "writesae" / "extra.py", "")
    _touch(done / "writesae" / "extra.py")
    assert _ran(done, "all") == list(NEEDS)
    (done / "writesae" / "sae" / "model.py").unlink()
    assert _ran(done, "all") == []


def test_an_unknown_profile_is_one_sentence(clone):
    result = _make(clone, "all", "PROFILE=huge")
    assert result.returncode == 2
    assert "There is no profile 'huge': choose one of mini" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (clone / "build").exists()


def test_a_damaged_notebook_is_one_sentence_and_no_rules(clone):
    _write(clone / "notebooks" / "01_harvest.ipynb", "{")
    result = _make(clone, "all")
    assert result.returncode == 2
    assert "notebooks/01_harvest.ipynb is not a readable notebook." in result.stderr
    assert not (clone / "build" / "deps.mk").exists()


def _scratch(path, source="x", **metadata):
    cells = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None}]
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def test_only_pages_are_run_whatever_else_is_in_their_folder(clone):
    folder, page = clone / "notebooks", (clone / "notebooks" / "04_shift.ipynb").read_text()
    (folder / "._04_shift.ipynb").write_bytes(b"\x00\x05\x16\x07\xff\xfe")  # macOS
    (folder / ".#04_shift.ipynb").symlink_to("me@host.1:2")  # Emacs
    (clone / "writesae" / "._x.py").write_bytes(b"\xff")
    (clone / "writesae" / ".#x.py").symlink_to("me@host.1:2")
    (clone / "writesae" / "x copy.py").touch()
    (folder / "Untitled.ipynb").touch()
    _scratch(folder / "Untitled1.ipynb", "pd.read_csv?")
    _scratch(folder / "05_mine.ipynb", "pd.read_csv?")
    copies = [f"04_shift{rest}.ipynb" for rest in (" (1)", "-Copy1", " copy")]
    for name in copies:
        (folder / name).write_text(page)
    result = _make(clone, "all")
    assert result.returncode == 0, result.stderr
    assert (clone / "ran").read_text().split() == list(NEEDS)
    sentences = [f"notebooks/{name} is passed over: pages have names such as 13_mine.ipynb." for name in copies]
    assert sorted(result.stderr.strip().splitlines()) == sorted(sentences)
    assert _ran(clone, "all") == []


def test_two_pages_that_make_one_file_are_refused(clone):
    (clone / "notebooks" / "05_mine.ipynb").write_text((clone / "notebooks" / "04_shift.ipynb").read_text())
    sentence = "notebooks/04_shift.ipynb and notebooks/05_mine.ipynb both make results/{profile}/04_shift.csv"
    result = _make(clone, "all")
    assert result.returncode == 2 and result.stderr.startswith(sentence)


def test_data_may_have_any_name(clone):
    path = clone / "notebooks" / "04_shift.ipynb"
    content = json.loads(path.read_text())
    content["metadata"]["writesae"]["files"] = ["models/*/*.json"]
    _write(path, json.dumps(content))
    for name in ("a b [2]", "50% $x #1", "a:b"):
        _write(clone / "models" / name / "config.json", "")
    _write(clone / "models" / ".ipynb_checkpoints" / "config.json", "")
    assert _ran(clone, "all") == list(NEEDS) and _ran(clone, "all") == []
    for path in (clone / "models").glob("*/config.json"):
        _touch(path)
        assert _ran(clone, "all") == ([] if path.parent.name[0] == "." else ["04_shift"]), path


def test_help_lists_every_target_and_is_the_default(clone):
    text = _make(clone).stdout
    for name in (
        "env",
        "all",
        "figures",
        "dryrun",
        "test",
        "lint",
        "bench",
        "hosts",
        "browser",
        "sweep",
        "verify",
        "lab",
        "clean",
        "02_train",
    ):
        assert name in text
    assert not (clone / "build").exists()


def test_clean_removes_the_build_and_keeps_the_results(done):
    assert _make(done, "clean").returncode == 0
    assert not (done / "build").exists()
    assert (done / "results" / "mini" / "00_hosts.csv").exists()
    assert _ran(done, "all") == list(NEEDS)


def test_repeats_run_every_page_with_every_seed_and_are_gathered(clone):
    for seed in (7, 8):
        _write(clone / "profiles" / f"mini-{seed}.yaml", "")
    _write(clone / "stub", '#!/bin/sh\nshift; echo "$@" >> ran\n[ -e fail ] && exit 1\nexit 0\n')
    result = _make(clone, "repeats", "RUN=build/test")
    assert result.returncode == 0, result.stderr
    pages = [f"replication run {name} --profile mini-{seed}" for seed in (7, 8) for name in NEEDS]
    gathered = "replication repeats --profile mini results/mini-7 results/mini-8 build/test/results/mini"
    assert (clone / "ran").read_text().splitlines() == [*pages, gathered]
    _write(clone / "fail", "")
    (clone / "ran").unlink()
    assert _make(clone, "repeats").returncode != 0  # after a failed run, nothing is gathered
    assert (clone / "ran").read_text().splitlines() == pages[:1]


def test_the_text_is_compared_before_anything_that_takes_long(clone):
    commands = _make(clone, "-n", "test").stdout
    assert 0 < commands.index("check_manifest") < commands.index("-n 2 --dist loadfile")
    _write(clone / "stub", "#!/bin/sh\necho 'The committed results are of another text.' >&2; exit 1\n")
    result = _make(clone, "test")
    assert result.returncode == 2 and not (clone / "build" / "test").exists()
    assert result.stderr.startswith("The committed results are of another text.")


def test_an_unfit_python_is_one_sentence(clone):
    _write(clone / "pyproject.toml", "")
    _write(clone / "old", "#!/bin/sh\nexit 1\n")
    (clone / "old").chmod(0o755)
    command = ["make", "env", "PYTHON=./old"]
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=_environment())
    assert result.returncode == 2
    assert "This project needs Python 3.11 or 3.12" in result.stderr
    assert not (clone / ".venv").exists()


ARGUMENTS = '#!/bin/sh\nprintf "%s|" "$@" "$PYTHONPATH" "$PYTHONUTF8" "$PYTHONOPTIMIZE" >> ran; echo >> ran\n'


def test_every_path_may_have_blanks(clone):
    place = clone / "my py's [2]"
    _write(place / "python", ARGUMENTS)
    (place / "python").chmod(0o755)
    for arguments in (["verify", "RUN=build/my run [1]"], ["sweep", "GRID=my grid"], ["repeats", "RUN=my run"]):
        _make(clone, *arguments, f"PY={place}/python", "EXACT=--exact")
    assert [line.split("|")[:-4] for line in (clone / "ran").read_text().splitlines()] == [
        ["-m", "replication", "verify", "--profile", "mini", "--run", "build/my run [1]", "--exact"],
        ["-m", "replication", "sweep", "--profile", "mini", "--grid", "profiles/sweeps/my grid.yaml"],
        ["-m", "replication", "repeats", "--profile", "mini", "my run/results/mini"],
    ]
    assert "The name of a profile is one word, not 'my profile'" in _make(clone, "all", "PROFILE=my profile").stderr


def test_a_python_with_blanks_makes_the_environment(clone):
    _write(clone / "pyproject.toml", "")
    _write(
        clone / "my py" / "python3.11",
        '#!/bin/sh\n[ "$2 $3" = "-m venv" ] && mkdir -p .venv/bin && cp stub .venv/bin/python\nexit 0\n',
    )
    (clone / "my py" / "python3.11").chmod(0o755)
    command = ["make", "env", f"PYTHON={clone}/my py/python3.11", "PIP_OPTIONS=--quiet --no-input"]
    assert subprocess.run(command, cwd=clone, env=_environment()).returncode == 0
    assert (clone / ".venv" / ".complete").exists()


def test_the_code_of_this_folder_runs_under_any_flags(clone):
    _write(clone / "stub", ARGUMENTS)
    other = dict(PYTHONPATH="/other/a b:/c", PYTHONOPTIMIZE="2", PYTHONUTF8="0", RUN="of somebody", EXACT="yes")
    command = ["make", "--no-print-directory", "verify", "PY=./stub"]
    subprocess.run(command, cwd=clone, env=_environment() | other, check=True)
    (clone / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(clone / "stub", clone / ".venv" / "bin" / "python")
    (clone / "pyproject.toml").touch()
    (clone / ".venv" / ".complete").touch()
    subprocess.run(command[:-1], cwd=clone, env=_environment() | other, check=True)
    called = [line.split("|")[:-1] for line in (clone / "ran").read_text().splitlines()]
    assert all(arguments[:-3] == ["-m", "replication", "verify", "--profile", "mini"] for arguments in called)
    assert [arguments[-3:] for arguments in called] == [[f"{clone}:/other/a b:/c", "1", ""], [str(clone), "1", ""]]


def test_make_is_here():
    assert shutil.which("make"), "the tests of the Makefile need GNU make"


def test_each_run_knows_which_pages_make_runs(done):
    (done / "stub").write_text('#!/bin/sh\necho "$4: $WRITESAE_PAGES" >> ran\n')
    _touch(done / "notebooks" / "01_harvest.ipynb")
    result = _make(done, "all")
    lines = (done / "ran").read_text().splitlines()
    assert [line.split() for line in lines] == [
        [f"{name}:", "01_harvest", "02_train", "04_shift"] for name in NEEDS if name > "01"
    ]
    assert "All pages of the profile mini are up to date. Open first:" in result.stdout
