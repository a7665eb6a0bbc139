"""Faults around a run: full disks, read-only folders, damaged or outdated files, parallel runs, kill -9."""

import errno
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from nbformat.v4 import new_code_cell, new_notebook

from replication.__main__ import main
from replication.commands import run as run_notebook
from replication.study import paths as paths_module
from replication.study import stages
from replication.study.lock import LockError, writing
from replication.study.paths import Paths
from replication.study.stages import read_table, write_table
from replication.study.study import open_study
from writesae import files
from writesae.files import ArtifactError, save_tensors

PROVENANCE = {"profile": "mini", "config": "0f", "host": "toy", "seed": 1, "seconds": 0.5, "fingerprint": "f1"}
SMALL = pd.DataFrame({"value": [0.5, 2.0]})
LARGE = pd.DataFrame({"value": np.random.default_rng(0).random(100_000)})  # 900 kB
MOUNTED = os.geteuid() == 0 and sys.platform == "linux"


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    return tmp_path


@contextmanager
def file_size_limit(folder):
    """Limit files to 100 kB. A larger write then fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def mounted(folder, options):
    """Mount a separate file system at `folder`. Skip the test if mounting is not possible."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not MOUNTED or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_disk(folder):
    with mounted(folder, "size=200k"):
        yield folder


@contextmanager
def read_only(folder):
    """Make `folder` read-only. Root ignores permission bits, so root gets a read-only file system."""
    if MOUNTED:
        with mounted(folder, "ro"):
            yield folder
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


# Failed writes


@pytest.mark.parametrize("disk", [file_size_limit, small_disk])
@pytest.mark.parametrize(
    "store",
    [
        lambda path: write_table(LARGE, path, PROVENANCE),
        lambda path: save_tensors(path, {"x": torch.rand(100_000)}, {}),
    ],
    ids=["table", "tensors"],
)
def test_a_full_disk_leaves_the_old_file_and_one_sentence(output, disk, store):
    folder = output / "disk"
    folder.mkdir()
    with disk(folder):
        path = folder / "t.csv"
        write_table(SMALL, path, PROVENANCE)
        with pytest.raises(
            ArtifactError, match=r"could not be written \(.+\): nothing that was stored is lost"
        ) as error:
            store(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        assert sorted(x.name for x in folder.iterdir()) == ["t.csv", "t.csv.json"]
        assert read_table(path).equals(SMALL)


def test_a_sidecar_that_cannot_be_written_leaves_the_old_pair(output):
    path = output / "t.csv"
    write_table(SMALL, path, PROVENANCE)
    with pytest.raises(ArtifactError, match=r"t\.csv\.json could not be written"), file_size_limit(output):
        write_table(SMALL + 1, path, PROVENANCE | {"host": "x" * 200_000})
    assert read_table(path).equals(SMALL)


def test_a_read_only_folder_is_one_sentence(output):
    with read_only(output), pytest.raises(ArtifactError, match=r"new/t\.csv could not be written \("):
        write_table(SMALL, output / "new" / "t.csv", PROVENANCE)


# Files of killed processes


def test_a_kill_between_the_two_moves_leaves_a_pair_that_is_refused_and_made_again(output, monkeypatch):
    path, move = output / "t.csv", os.replace

    def killed(source, target):
        if target == path:
            raise KeyboardInterrupt
        move(source, target)

    for before in (None, SMALL):
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                write_table(SMALL + 1, path, PROVENANCE)
        assert path.exists() == (before is not None)
        assert not files.up_to_date(path, "f1")
        with pytest.raises(ArtifactError, match="is missing" if before is None else re.escape(files.AGAIN)):
            read_table(path)
        write_table(SMALL, path, PROVENANCE)
        assert files.up_to_date(path, "f1") and read_table(path).equals(SMALL)


def test_unfinished_files_of_dead_processes_of_this_machine_are_removed(output):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = f".partial-{platform.node()}"
    names = {f"{here}-{dead.pid}-x-1.csv": False, f"{here}-{os.getpid()}-x.csv": True, ".partial-other-1-x.csv": True}
    (output / "below").mkdir()
    for name in [*names, "x.csv"]:
        (output / "below" / name).touch()
    files.clear_leftovers(output)
    assert {x.name for x in (output / "below").iterdir()} == {x for x, kept in names.items() if kept} | {"x.csv"}


# Damaged and outdated files


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def _change(path):
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))


def _age(path):
    record = json.loads(files.sidecar(path).read_text())
    files.sidecar(path).write_text(json.dumps(record | {"format_version": 0}))


def _orphan(path):
    files.sidecar(path).unlink()


HARMS = [_truncate, _change, _age, _orphan]


@pytest.mark.parametrize("harm", HARMS)
def test_a_stage_computes_again_what_was_harmed(output, harm):
    path, calls = Paths("mini").results / "t.csv", []

    def compute(number, stop=None):
        if number == stop:
            raise KeyboardInterrupt
        calls.append(number)
        return pd.DataFrame({"value": np.random.default_rng(number).random(3)})

    def stage(stop=None):
        own = {k: v for k, v in PROVENANCE.items() if k not in ("seconds", "fingerprint")}
        partial = Paths("mini").partial
        return stages.staged_table(path, "ab" * 32, [0, 1, 2], lambda n: compute(n, stop), partial, own)

    whole = stage()
    first = path.read_bytes()
    harm(path)
    assert stage().equals(whole) and path.read_bytes() == first and calls == [0, 1, 2] * 2
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        stage(stop=2)
    harm(next(Paths("mini").partial.rglob("group-00001.csv")))
    calls.clear()
    assert stage().equals(whole) and path.read_bytes() == first and calls == [1, 2]


# Faults in a whole notebook run


@pytest.fixture
def clone(output):
    """The folder `output`, with folders for profiles and notebooks."""
    (output / "profiles").mkdir()
    (output / "profiles" / "mini.yaml").touch()
    (output / "notebooks").mkdir()
    return output


def _notebook(clone, source):
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    cells = [new_code_cell("profile = 'mini'", metadata={"tags": ["parameters"]}), new_code_cell(source)]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), clone / "notebooks" / "00_toy.ipynb")


RUN = """
import sys
from pathlib import Path
from replication.__main__ import main
from replication.commands import run
run.NOTEBOOKS, run.WAIT, run.check_disk = Path(sys.argv[1]) / "notebooks", float(sys.argv[2]), lambda profile: None
sys.exit(main(["run", "00_toy"]))
"""


def _start(clone, wait=10.0):
    """Start the toy notebook from the command line. It waits `wait` seconds at most for another run."""
    command = [sys.executable, "-c", RUN, str(clone), str(wait)]
    environment = os.environ | {"PYTHONPATH": str(paths_module.ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _last_line(process):
    """The last line of the error output of a failed run."""
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    return error.splitlines()[-1]


@pytest.fixture
def failure(clone, monkeypatch, capsys):
    """Call it to run the toy notebook in this process. It returns the last line of the error output."""
    monkeypatch.setattr(run_notebook, "NOTEBOOKS", clone / "notebooks")
    monkeypatch.setattr(run_notebook, "check_disk", lambda profile: None)

    def run():
        assert main(["run", "00_toy"]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    return run


def _until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


STORE = """
import resource
from replication.study.lock import LockError, writing
from replication.study.paths import Paths
from writesae.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_atomically(Paths(profile).results / "t.csv", lambda partial: partial.write_bytes(bytes(200_000)))
"""


def test_a_disk_that_fills_up_in_a_notebook_is_one_sentence(clone, failure):
    _notebook(clone, STORE)
    table = Paths("mini").results / "t.csv"
    said = (
        f"00_toy failed: ArtifactError: {table} could not be written (File too large): nothing that was stored is lost"
    )
    assert failure().startswith(said)
    assert not list(table.parent.iterdir())


def test_a_full_disk_under_the_executed_notebook_is_one_sentence(clone, failure):
    _notebook(clone, "1")
    build = Paths("mini").build
    build.mkdir(parents=True)
    with small_disk(build):
        (build / "notebooks").mkdir()
        (build / "lock").touch()
        with suppress(OSError), open(build / "full", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))
        said = failure()
    assert said.startswith("00_toy failed: ") and "No space left on device" in said


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(clone, failure):
    _notebook(clone, f"open({str(clone / 'ran')!r}, 'w')")
    results = Paths("mini").results
    results.mkdir(parents=True)
    with read_only(results):
        said = failure()
    assert said.startswith(f"00_toy failed: {results} cannot be written (")
    assert said.endswith("): make it writable, and run again.")
    assert not (clone / "ran").exists()


def test_a_harmed_table_that_a_notebook_reads_is_one_sentence(clone, failure):
    _notebook(
        clone,
        "from replication.study import paths, stages\nstages.read_table(paths.Paths(profile).results / 't.csv')",
    )
    path = Paths("mini").results / "t.csv"
    write_table(SMALL, path, PROVENANCE)
    _change(path)
    said = failure()
    assert said.startswith(f"00_toy failed: ArtifactError: {path} ") and said.endswith(f": {files.AGAIN}.")


WAITS = """
import os, time
from replication.study.lock import writing
from replication.study.lock import LockError, writing
from replication.study.paths import Paths
writing(Paths(profile))
open({0!r} + "/kernel.new", "w").write(str(os.getpid()))
os.replace({0!r} + "/kernel.new", {0!r} + "/kernel")
while not os.path.exists({0!r} + "/go"):
    time.sleep(0.02)
"""


def test_a_second_run_names_the_first_and_goes_on_after_it(clone):
    _notebook(clone, WAITS.format(str(clone)))
    first = _start(clone)
    _until((clone / "kernel").exists)
    kernel = (clone / "kernel").read_text()
    said = f"Another run with this profile is at work in this folder (process {kernel}): wait until it ends"
    assert _last_line(_start(clone, wait=0.2)).startswith(f"00_toy failed: {said}")
    patient = _start(clone, wait=60)
    (clone / "go").touch()
    assert first.wait(60) == 0 and patient.wait(60) == 0
    assert (clone / "kernel").read_text() != kernel


def test_a_killed_run_is_locked_as_long_as_its_kernel_lives_and_no_longer(clone):
    _notebook(clone, WAITS.format(str(clone)))
    first = _start(clone)
    _until((clone / "kernel").exists)
    kernel = int((clone / "kernel").read_text())
    os.kill(kernel, signal.SIGSTOP)
    first.kill()
    first.wait()
    build = Paths("mini").build
    with pytest.raises(LockError, match=rf"\(process {kernel}\)"):
        writing(Paths("mini"), wait=0.2)
    (clone / "go").touch()
    second = _start(clone)
    os.kill(kernel, signal.SIGCONT)
    assert second.wait(60) == 0
    assert not files._alive(kernel) or (build / "lock").read_text().split()[0] == (clone / "kernel").read_text()


# The lock


def test_a_process_takes_its_own_lock_again_and_frees_it_at_the_end_of_the_outer_block(output):
    other = [sys.executable, "-c", "from replication.study import lock, paths; lock.writing(paths.Paths('mini'), 0.1)"]
    environment = os.environ | {"PYTHONPATH": str(paths_module.ROOT)}

    def refused():
        return subprocess.run(other, env=environment, capture_output=True, text=True).returncode != 0

    with writing(Paths("mini")):
        with writing(Paths("mini")):
            assert refused()
        assert refused()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: writing(Paths("mini")).__exit__(None, None, None)).result()
        assert refused()
    assert not refused()


HOLDS = """
import sys, time
from replication.study import lock, paths
lock.writing(paths.Paths('mini'), 0.3)
print("taken", flush=True)
sys.stdin.read()
"""


def test_the_processes_of_one_run_share_the_lock_and_others_do_not(output):
    def process(run):
        environment = os.environ | {"PYTHONPATH": str(paths_module.ROOT), "WRITESAE_RUN": run}
        streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started = subprocess.Popen([sys.executable, "-c", HOLDS], env=environment, **streams)
        return started, started.stdout.readline() == "taken\n"

    first, second = process("a"), process("a")
    assert first[1] and second[1]
    first[0].communicate()
    refused = [process(run) for run in ("b", "")]
    assert not any(taken for _, taken in refused)
    second[0].communicate()
    other, taken = process("b")
    assert taken and not process("a")[1]
    other.communicate()


def test_a_worker_of_a_process_that_holds_the_lock_opens_the_suite_without_it(output):
    opened = delayed(_open)
    try:
        with writing(Paths("smoke")):
            assert Parallel(2)(opened(lock) for lock in (False, False)) == ["smoke", "smoke"]
            with pytest.raises(LockError, match=rf"\(process {os.getpid()}\)"):
                Parallel(2)(opened(lock) for lock in (True, False))
    finally:
        get_reusable_executor().shutdown(wait=True)


def _open(lock):
    return open_study("smoke", lock=lock).profile.name


def test_a_file_system_without_locks_is_one_sentence(output, monkeypatch):
    def missing(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(
        LockError, match=r"lock cannot be locked \(.*not implemented\): let WRITESAE_OUTPUT name a folder"
    ):
        writing(Paths("mini"))


def test_a_run_removes_what_killed_runs_left(clone, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    paths = Paths("mini")
    places = [paths.results, paths.figures, paths.build / "saes", clone / "notebooks"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / f".partial-{platform.node()}-{dead.pid}-x.csv").touch()
    _notebook(clone, "1")
    monkeypatch.setattr(run_notebook, "NOTEBOOKS", clone / "notebooks")
    run_notebook.run("00_toy", "mini")
    assert not [x for place in places for x in place.glob(".partial-*")]
