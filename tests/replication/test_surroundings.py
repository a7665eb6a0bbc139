"""What lies around a run must not change it: other repositories, other kernels, the user's settings."""

import errno
import io
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
import seaborn
import torch
from nbformat.v4 import new_code_cell, new_notebook

from replication.__main__ import main
from replication.commands import run
from replication.study import paths
from replication.study.git import GitError, git
from replication.study.stages import git_commit
from replication.study.study import open_study


def _repository(folder):
    folder.mkdir(exist_ok=True)
    commands = ["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
    for command in commands:
        subprocess.run(["git", "-C", folder, *command], check=True)
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8").stdout[:-1]


# The repository


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An unpacked archive inside the repository of a thesis."""
    _repository(tmp_path / "thesis")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "thesis" / "code [2]")
    paths.ROOT.mkdir()
    return paths.ROOT


def test_the_commit_is_never_that_of_a_repository_around(checkout):
    with pytest.raises(GitError, match=r"code \[2\] is no git repository, but a folder in that of .*thesis"):
        git("rev-parse", "HEAD")
    assert git_commit().startswith("unknown (") and "thesis" in git_commit()
    own = _repository(checkout)
    assert git_commit() == own
    (checkout / "profiles").mkdir()
    (checkout / "profiles" / "mine.yaml").touch()
    assert git_commit() == f"{own}+changes"


def test_a_hook_of_another_repository_does_not_lead_git_there(checkout, monkeypatch):
    own = _repository(checkout)
    monkeypatch.setenv("GIT_DIR", str(checkout.parent / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(checkout.parent))
    assert git_commit() == own


def _outside(checkout, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))


def _without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))


def _of_another_user(checkout, monkeypatch):
    _repository(checkout)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


def _without_results(checkout, monkeypatch):
    _repository(checkout)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lambda *_: None, "compare with, since .* is no git repository, but a folder in that of .*thesis: name a"),
        (_outside, "compare with, since git rev-parse failed: fatal: not a git repository .*: name a reference"),
        (_without_git, r"compare with, since git cannot be started \(No such file or directory\): name a reference"),
        (_of_another_user, "compare with, since git rev-parse failed: fatal: .*dubious ownership.*: name a reference"),
        (_without_results, "The last commit holds no results/mini: name a reference with --reference FOLDER"),
    ],
    ids=["inside another", "outside", "no git", "another user's", "no results"],
)
def test_verify_says_why_there_is_no_commit(checkout, monkeypatch, capsys, fault, sentence):
    fault(checkout, monkeypatch)
    assert main(["verify"]) == 1
    error = capsys.readouterr().err
    assert re.search(sentence, error) and len(error.splitlines()) == 1, error


# The locale


def test_files_are_utf_8_in_every_locale(tmp_path):
    smoke = (paths.ROOT / "profiles" / "smoke.yaml").read_text(encoding="utf-8")
    (tmp_path / "own.yaml").write_text(f"# für die Übung\n{smoke}", encoding="utf-8")
    (tmp_path / "latin.yaml").write_text("# für die Übung\n", encoding="latin-1")
    code = "import sys, pathlib; from replication.study.profile import load_profile as load; "
    code += "folder = pathlib.Path(sys.argv[1]); print(load('own', folder).name); load('latin', folder)"
    environment = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(paths.ROOT))
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout == "own\n", done.stderr
    assert done.stderr.endswith("Profile latin is not text in UTF-8 (byte 3): save it as UTF-8.\n")


# The kernel

SHOWS = """
import sys, torch, replication
import matplotlib.pyplot as plt
from replication import plots
from replication.study.study import open_study

open_study("smoke")
plots.style()
print(replication.__file__, sys.executable, torch.zeros(1).dtype, torch.is_grad_enabled(), sys.flags.optimize)
print(plt.rcParams["savefig.bbox"], plt.rcParams["lines.linewidth"], "Γ", "started" in globals())
plt.plot([0, 1]);
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page that prints what it finds around it. Returns a function that runs it, and gives its last cell."""
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    kernel = {"kernelspec": {"name": "somebodys", "language": "python", "display_name": "Somebody's"}}
    cells = [new_code_cell("profile = 'mini'", metadata={"tags": ["parameters"]}), new_code_cell(SHOWS)]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "00_toy.ipynb")
    monkeypatch.setattr(run, "find", lambda name, profile: tmp_path / f"{name}.ipynb")
    return lambda: nbformat.read(run.run("00_toy", "mini"), as_version=4).cells[-1]


def _kernel_of_another_environment(folder, monkeypatch):
    for name in ("python3", "somebodys"):
        (folder / "kernels" / name).mkdir(parents=True)
        spec = dict(argv=["false"], display_name="old", language="python")
        (folder / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))


def _another_checkout(folder, monkeypatch):
    (folder / "replication").mkdir()
    (folder / "replication" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")


def _start_up_files(folder, monkeypatch):
    start = folder / "ipython" / "profile_default" / "startup" / "00.py"
    start.parent.mkdir(parents=True)
    start.write_text("import torch; torch.set_default_dtype(torch.float64); started = True")
    (folder / "ipython" / "profile_default" / "ipython_config.py").write_text(
        "c.InlineBackend.figure_formats = ['svg']"
    )
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("PYTHONSTARTUP", str(start))


def _settings_of_matplotlib(folder, monkeypatch):
    (folder / "matplotlibrc").write_text("savefig.bbox: tight\nlines.linewidth: 9\n")  # also of the page's folder
    monkeypatch.setenv("MATPLOTLIBRC", str(folder / "matplotlibrc"))
    monkeypatch.setenv("MPLBACKEND", "Agg")


def _flags_of_python(folder, monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setenv("PYTHONWARNINGS", "error")


def _a_home_that_cannot_be_used(folder, monkeypatch):
    (folder / "home").touch()
    monkeypatch.setenv("HOME", str(folder / "home"))


def test_a_page_does_not_depend_on_what_lies_around_it(page, tmp_path, monkeypatch):
    _kernel_of_another_environment(tmp_path, monkeypatch)
    _another_checkout(tmp_path, monkeypatch)
    _start_up_files(tmp_path, monkeypatch)
    _settings_of_matplotlib(tmp_path, monkeypatch)
    _flags_of_python(tmp_path, monkeypatch)
    _a_home_that_cannot_be_used(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1", "backslashreplace"))
    before = dict(os.environ)
    printed, *others = (output for output in page().outputs if output.get("name") != "stderr")
    width = seaborn.plotting_context("paper")["lines.linewidth"]
    wanted = f"{paths.ROOT}/replication/__init__.py {sys.executable} torch.float32 True 0\nNone {width} Γ False\n"
    assert printed.text == wanted
    assert [list(output.data) for output in others] == [["image/png", "text/plain"]]
    assert dict(os.environ) == before


def test_code_of_another_checkout_is_refused(tmp_path, monkeypatch, capsys):
    other = tmp_path / "papers [2026]" / "writesae"
    (other / "replication" / "study").mkdir(parents=True)
    (other / "replication" / "study" / "paths.py").touch()
    (other / "notebooks").mkdir()
    monkeypatch.chdir(other / "notebooks")  # where JupyterLab and Make start kernels
    sentence = f"The current folder is in the checkout {other}, and Python imports the code of {paths.ROOT}: set"
    assert main(["disk", "--profile", "smoke"]) == 1
    assert capsys.readouterr().err.startswith(f"disk failed: {sentence}")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        open_study("smoke")


def test_a_study_has_the_defaults_of_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    open_study("smoke")
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
    assert torch.is_grad_enabled() and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named_whatever_it_answers(tmp_path, monkeypatch, capsys, number):
    def missing(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", missing)
    monkeypatch.setattr(run, "check_disk", lambda profile: None)
    assert main(["run", "00_hosts", "--profile", "smoke"]) == 1
    sentence = f"00_hosts failed: {tmp_path}/build/smoke/lock cannot be locked (["
    error = capsys.readouterr().err
    assert error.startswith(sentence) and os.strerror(number) in error
    assert "let WRITESAE_OUTPUT name a folder on a file system with" in error and len(error.splitlines()) == 1
