"""What lies around a run must not change it: other repositories, other kernels, the user's settings."""

import os
import re
import subprocess
import sys

import pytest

from replication.__main__ import main
from replication.study import paths
from replication.study.git import GitError, git
from replication.study.stages import git_commit


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
    assert done.stderr.endswith("Profile latin is not text in UTF-8 (byte 3): save it in that encoding.\n")
