"""Run one notebook of the suite: `python -m writesae.run_notebook 05_replacement --profile mini`.

papermill writes the executed notebook to build/PROFILE/notebooks. With the default profile the outputs are then put
into the notebook of the repository itself, so that they can be read there: only outputs and execution counts change,
and the file's time stays, so that Make does not take it for edited. Nothing is published where WRITESAE_OUTPUT is set.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
from nbformat import NotebookNode

from writesae.artifacts import ROOT, Paths, write_atomically

PUBLISHED = "mini"
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
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; it is free again when the process ends in any way. RunError where it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError("Another run with this profile is at work in this folder: wait until it ends.") from error
        yield


def _execute(path: Path, target: Path, profile: str) -> None:
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
        )
    except papermill.PapermillExecutionError as error:
        raise RunError(_last_line(f"{error.ename}: {error.evalue}")) from error
    except Exception as error:  # a dead kernel, a missing kernel, a full disk: papermill has no common class
        raise RunError(_last_line(f"{type(error).__name__}: {error}")) from error


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


def run(name: str, profile: str, folder: Path = ROOT / "notebooks") -> Path:
    """Execute the notebook `name` and publish its outputs; the path of the executed notebook.

    Raises RunError, with one sentence, where there is no such notebook or profile, where another run is at work, and
    where a cell fails; the notebook of the repository is then as it was.
    """
    path, build = folder / f"{name}.ipynb", Paths(profile).build
    if not path.is_file():
        raise RunError(f"There is no notebook {name}.")
    if not (folder.parent / "profiles" / f"{profile}.yaml").is_file():
        raise RunError(f"There is no profile {profile}.")
    target = build / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(build / "lock"):
        before = path.read_bytes()
        _execute(path, target, profile)
        if profile == PUBLISHED and not os.environ.get("WRITESAE_OUTPUT"):
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
    except RunError as error:
        print(f"{given.name} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{given.name} was interrupted: the next run goes on from what is stored.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
