"""Run one notebook with papermill, into build/PROFILE/notebooks.

With the default profile, its outputs are then put into the repository's notebook, unless this is a dry run or
WRITESAE_OUTPUT is set. That file keeps its modification time, so that Make does not regard it as edited."""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO
from unittest import mock

import nbformat
from nbformat import NotebookNode

from replication.commands import CommandError, check_disk, last_line
from replication.study.lock import writing
from replication.study.paths import ROOT, Paths, dry_run
from writesae.files import clear_leftovers, write_atomically

NOTEBOOKS = ROOT / "notebooks"
PUBLISHED = "mini"
WAIT = 10.0  # seconds for another run to end
WIDGET = "application/vnd.jupyter.widget-view+json"


def _outputs(cell: NotebookNode) -> list[NotebookNode]:
    """Return a cell's outputs without progress bars and widgets (but with a widget's HTML page), and with
    neighbouring pieces of printed text joined."""
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
    """Return `source` with the outputs and execution counts of the executed notebook.

    Raises ValueError unless both have the same cells (apart from the parameters that papermill injects)."""
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
    """Put the outputs of `executed` into the notebook at `path`, and keep the file's time.

    Raises CommandError if the file is no longer as it was `before` the run."""
    if path.read_bytes() != before:
        raise CommandError(f"{path.name} was edited while it ran, so its outputs were not stored: run it again.")
    times = path.stat()
    source = nbformat.reads(before.decode("utf-8"), as_version=4)
    text = nbformat.writes(with_outputs(source, nbformat.read(executed, as_version=4))).rstrip("\n") + "\n"
    if text.encode("utf-8") == before:
        return

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(times.st_mode)
        os.utime(partial, ns=(times.st_atime_ns, times.st_mtime_ns))

    write_atomically(path, write)


def _check_writable(folder: Path) -> None:
    """Raise CommandError if nothing can be written into a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        sentence = f"{folder} cannot be written ({error.strerror}): make it writable, and run again."
        raise CommandError(sentence) from error


def _execute(path: Path, target: Path, profile: str, log: TextIO | None) -> None:
    import papermill  # takes two seconds

    from replication.commands.kernel import ThisPython, neutralise

    options = dict(stdout_file=log or sys.stdout, stderr_file=log or sys.stderr, progress_bar=False)
    options |= dict(kernel_name="python3", language="python", kernel_manager_class=ThisPython, cwd=path.parent)
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
            neutralise(os.environ, Path(folder))
            papermill.execute_notebook(path, target, parameters={"profile": profile}, **options)
    except papermill.PapermillExecutionError as error:
        if error.ename == "OutOfMemoryError":
            from replication.study.study import OUT_OF_MEMORY  # imports torch

            raise CommandError(OUT_OF_MEMORY) from error
        raise CommandError(last_line(f"{error.ename}: {error.evalue}")) from error
    except Exception as error:  # a dead kernel, a missing kernel, a full disk: papermill has no common class
        raise CommandError(last_line(f"{type(error).__name__}: {error}")) from error


def find(name: str, profile: str) -> Path:
    """Return the path of a notebook. Raises CommandError if there is no such notebook or profile."""
    path = NOTEBOOKS / f"{name}.ipynb"
    for file in (path, NOTEBOOKS.parent / "profiles" / f"{profile}.yaml"):
        if not file.is_file():
            names = ", ".join(sorted(other.stem for other in file.parent.glob(f"[!.]*{file.suffix}")))
            raise CommandError(f"There is no {file.parent.name[:-1]} {file.stem}: choose one of {names}.")
    return path


def run(name: str, profile: str, log: TextIO | None = None) -> Path:
    """Execute the notebook `name` and publish its outputs. Return the path of the executed notebook.

    What its cells print goes to `log`, or to the streams of this process. Raises CommandError for an unknown
    name, a read-only folder or a failed cell, LockError for another run; then nothing is published."""
    path, paths = find(name, profile), Paths(profile)
    written = (paths.build, paths.results, paths.figures)
    for folder in written:
        _check_writable(folder)
    target = paths.build / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(paths, WAIT):  # released before the kernel takes it
        for folder in (*written, path.parent):
            clear_leftovers(folder)
    before = path.read_bytes()
    _execute(path, target, profile, log)
    if profile == PUBLISHED and not os.environ.get("WRITESAE_OUTPUT") and not dry_run():
        publish(path, before, target)
    return target


def progress(name: str, stamps: Path) -> str:
    """Return how far `make all` is after a page, to be added to the page's line; nothing outside `make all`.

    Make sets WRITESAE_PAGES, the pages that it runs, and WRITESAE_RUN, whose end is the time of its start."""
    pages = os.environ.get("WRITESAE_PAGES", "").split()
    if name not in pages:
        return ""
    began = int(os.environ["WRITESAE_RUN"].rpartition("-")[2])
    others = [stamps / page for page in pages if page != name]
    done = 1 + sum(stamp.exists() and stamp.stat().st_mtime >= began for stamp in others)
    minutes, left = (time.time() - began) / 60, len(pages) - done
    remaining = f", about {minutes * left / done:.0f} left" if left else ""
    return f": {done} of {len(pages)} pages, {minutes:.0f} minutes so far{remaining}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="its name, e.g. 05_replacement")
    parser.add_argument("--profile", default=PUBLISHED, help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("--log", action="store_true", help="write what it prints to build/PROFILE/logs/NAME.log")


def main(options: argparse.Namespace) -> int:
    name, build, began = options.name, Paths(options.profile).build, time.monotonic()
    print(f"{name} ({options.profile}) begins", flush=True)
    find(name, options.profile)
    if not (build / "harvest").is_dir():  # before the first large files are written
        check_disk(options.profile)
    if options.log:
        (build / "logs").mkdir(parents=True, exist_ok=True)
        with open(build / "logs" / f"{name}.log", "w", encoding="utf-8") as log:
            run(name, options.profile, log)
    else:
        run(name, options.profile)
    took = f"{name} ({options.profile}) took {time.monotonic() - began:.0f} s"
    print(took + progress(name, ROOT / "build" / options.profile / "stamps"), flush=True)
    return 0
