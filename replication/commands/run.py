"""Run one notebook of the suite: `python -m replication.commands.run 05_replacement --profile mini`.

papermill writes the executed notebook to build/PROFILE/notebooks. With the default profile the outputs are then put
into the notebook of the repository itself, so that they can be read there: only outputs and execution counts change,
and the file's time stays, so that Make does not take it for edited. Nothing is published where WRITESAE_OUTPUT is set,
nor in a dry run.

One run at a time: a profile's folder is locked by the process and by its kernel, which a kill of the process alone
leaves behind for a second or two.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from nbformat import NotebookNode

from replication.study.paths import ROOT, Paths, dry_run
from writesae.files import ArtifactError, clear_leftovers, write_atomically

PUBLISHED = "mini"
WAIT = 10  # seconds for another run to end; the kernel of a killed run notices within some
WIDGET = "application/vnd.jupyter.widget-view+json"


class RunError(RuntimeError):
    """A notebook could not be run, or failed."""


def _outputs(cell: NotebookNode) -> list[NotebookNode]:
    """A cell's outputs without progress bars; of a widget with a page of HTML beside it only the page is kept, and
    neighbouring pieces of printed text are joined."""
    kept: list[NotebookNode] = []
    for output in copy.deepcopy(cell.outputs):
        data = output.get("data", {})
        if output.get("name") == "stderr" or (data.pop(WIDGET, None) is not None and "text/html" not in data):
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def with_outputs(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """`source` with the outputs of the executed notebook, and nothing else of it.

    Raises ValueError where the two do not have the same cells (parameters injected by papermill apart).
    """
    ran = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if [cell.source for cell in ran] != [cell.source for cell in source.cells]:
        raise ValueError("The executed notebook does not have the cells of its source.")
    published, count = copy.deepcopy(source), 0
    for cell, done in zip(published.cells, ran, strict=True):
        if cell.cell_type != "code":
            continue
        count += done.execution_count is not None
        cell.execution_count = count if done.execution_count is not None else None
        cell.outputs = _outputs(done)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = cell.execution_count
    return published


def publish(path: Path, before: bytes, executed: Path) -> None:
    """Put the outputs of `executed` into the notebook at `path`, keeping the file's time.

    Raises RunError where the file is no longer what it was (`before`) when the run began.
    """
    if path.read_bytes() != before:
        raise RunError(f"{path.name} was edited while it ran, so its outputs were not kept: run it again.")
    times = path.stat()
    source = nbformat.reads(before.decode("utf-8"), as_version=4)
    text = nbformat.writes(with_outputs(source, nbformat.read(executed, as_version=4))).rstrip("\n") + "\n"
    if text.encode("utf-8") == before:
        return

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")
        os.utime(partial, ns=(times.st_atime_ns, times.st_mtime_ns))

    write_atomically(path, write)


@contextmanager
def only_one(path: Path) -> Iterator[int]:
    """Hold the lock file at `path`, in which the process id is; its descriptor, for a child to hold it too.

    It is free again when this process and such children have ended in any way. RunError where others hold it for more
    than WAIT seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        _take(file)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _take(file: TextIO) -> None:
    deadline = time.monotonic() + WAIT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise RunError(
                    f"Another run with this profile is at work in this folder (process {file.read() or 'unknown'}): "
                    "wait until it ends, then run again."
                ) from error
        time.sleep(0.1)


def _kernels(lock: int) -> type[AsyncKernelManager]:
    """Kernels that hold the lock, so that it is not free before they have ended."""

    class Kernels(AsyncKernelManager):
        def start_kernel(self, **options):
            return super().start_kernel(**options, pass_fds=(lock,))

    return Kernels


def _check_writable(folder: Path) -> None:
    """RunError where nothing can be written into a folder: better now than after an hour."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}): make it writable, and run again.") from error


def _execute(path: Path, target: Path, profile: str, lock: int) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in the kernel they would be widgets among the outputs
    try:
        papermill.execute_notebook(
            path,
            target,
            parameters={"profile": profile},
            cwd=path.parent,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            log_output=True,
            kernel_manager_class=_kernels(lock),
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "OutOfMemoryError":
            from replication.study.study import OUT_OF_MEMORY  # imports torch, which no other run needs here

            raise RunError(OUT_OF_MEMORY) from error
        raise RunError(_last_line(f"{error.ename}: {error.evalue}")) from error
    except Exception as error:  # a dead kernel, a missing kernel, a full disk: papermill has no common class
        raise RunError(_last_line(f"{type(error).__name__}: {error}")) from error


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


def _names(folder: Path, suffix: str) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob(f"*.{suffix}")))


def run(name: str, profile: str, folder: Path = ROOT / "notebooks") -> Path:
    """Execute the notebook `name` and publish its outputs; the path of the executed notebook.

    Raises RunError, with one sentence, where there is no such notebook or profile, where a folder of results cannot be
    written, where another run is at work, and where a cell fails; the notebook of the repository is then as it was.
    """
    path, paths = folder / f"{name}.ipynb", Paths(profile)
    if not path.is_file():
        raise RunError(f"There is no notebook {name}: choose one of {_names(folder, 'ipynb')}.")
    if not (folder.parent / "profiles" / f"{profile}.yaml").is_file():
        raise RunError(f"There is no profile {profile}: choose one of {_names(folder.parent / 'profiles', 'yaml')}.")
    written = (paths.build, paths.results, paths.figures)
    for place in written:
        _check_writable(place)
    target = paths.build / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(paths.build / "lock") as lock:
        for place in (*written, folder):
            clear_leftovers(place)
        before = path.read_bytes()
        _execute(path, target, profile, lock)
        if profile == PUBLISHED and not os.environ.get("WRITESAE_OUTPUT") and not dry_run():
            publish(path, before, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 with one sentence on stderr, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Run one notebook of the suite.")
    parser.add_argument("name", help="its name, e.g. 05_replacement")
    parser.add_argument("--profile", default=PUBLISHED, help="a file in profiles/ (default: %(default)s)")
    given = parser.parse_args(arguments)
    print(f"{given.name} ({given.profile})", flush=True)
    try:
        run(given.name, given.profile)
    except (RunError, ArtifactError, OSError) as error:  # the latter two: its own writes, on a full disk
        print(f"{given.name} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{given.name} was interrupted: the next run goes on from what is stored.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
