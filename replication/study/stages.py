"""Tables that stages store: complete or absent, checked when they are read, computed again only when needed.

Each table (CSV) has a sidecar, `<name>.json`, with the sha256 of the file, its provenance and the
*fingerprint* of all inputs. A stage with an unchanged fingerprint is skipped. Stages look in build/ only: a
fresh clone has the reference results in results/, and computes its own.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import re
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from pandas.api.types import is_any_real_numeric_dtype, is_bool_dtype
from tqdm import tqdm

from replication.study.git import GitError, git
from writesae.files import ArtifactError, _store, read_sidecar, up_to_date

VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pandas", "scikit-learn")
KEPT = re.compile(r"(sweep|repeats)-.*\.csv")  # tables of `make sweep` and `make repeats`, not of notebooks


def git_commit() -> str:
    """Return the commit of the checkout, with `+changes` if files differ from it, or `unknown` and why."""
    status = ["status", "--porcelain", "--untracked-files=normal", "--"]
    status += ["writesae", "replication", "profiles", "models"]
    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        return f"{commit}+changes" if git(*status) else commit
    except GitError as error:
        return f"unknown ({error})"


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its inputs: commit, versions, device, kernel path, time.

    The kernel path is always torch, because no result comes from kernels of other packages. The device of a
    CPU names the vector instructions that torch uses, because they decide the order of sums.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "kernel": "torch",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# Tables


def _write_csv(frame: pd.DataFrame, path: Path, fields: Mapping[str, Any], float_format: str | None) -> None:
    if not len(frame.columns):
        raise ValueError(f"The table for {Path(path).name} has no columns.")
    text = [name for name, x in frame.items() if not is_bool_dtype(x) and not is_any_real_numeric_dtype(x)]
    # a carriage return that is not escaped would end the row
    escaped = frame[text].map(lambda value: str(value).replace("\r", "\\r"), na_action="ignore")
    frame = frame.assign(**escaped)
    options = {"index": False, "lineterminator": "\n", "float_format": float_format}
    fields = {**fields, "text_columns": text, "rows": len(frame)}
    _store(path, lambda partial: frame.to_csv(partial, **options), fields)


def write_table(frame: pd.DataFrame, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a CSV (floats with six significant digits) and its sidecar.

    `provenance` is that of `Study.provenance`, with the fingerprint if the stage is to be skipped next time.
    Raises ValueError for a table without columns.
    """
    _write_csv(frame, Path(path), {**environment(), **provenance}, "%.6g")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table. Only an empty field is a missing value, so that a token `null` stays text.

    Raises ArtifactError if the file is missing, damaged or of another format version.
    """
    text = dict.fromkeys(read_sidecar(path)["text_columns"], str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def rows_with(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows in which the columns have these values."""
    return table[np.logical_and.reduce([table[name] == value for name, value in values.items()])]


# Stages that can be interrupted


def _partial_folder(name: str, expected: str, folder: Path) -> Path:
    return Path(folder) / f"{name}-{expected[:16]}"


def clear_partials(name: str, folder: Path, keep: str = "") -> None:
    """Remove the stored groups of a stage, except those with the fingerprint `keep`."""
    pattern, kept = re.compile(re.escape(name) + "-[0-9a-f]{16}"), _partial_folder(name, keep, folder)
    for path in Path(folder).glob("*"):
        if pattern.fullmatch(path.name) and path != kept:
            shutil.rmtree(path)


def resumable(
    name: str,
    expected: str,
    groups: Sequence[Hashable],
    compute: Callable[[Any], pd.DataFrame],
    folder: Path,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the rows of `compute(group)` for all groups in order, and store each group when it is done.

    After an interruption, another call with the same fingerprint `expected` computes only the missing groups.
    `compute` must depend on its group alone, because `workers` threads call it at the same time.
    `frame.attrs["seconds"]` is the total time of all groups. Groups with other fingerprints are removed.
    Raises ValueError if there are no groups.
    """
    if not groups:
        raise ValueError(f"The stage {name} has nothing to compute: no groups were given.")
    clear_partials(name, folder, keep=expected)
    place = _partial_folder(name, expected, folder)

    def finish(number: int, group: Hashable) -> tuple[Path, float]:
        path = place / f"group-{number:05d}.csv"
        record = {}
        with contextlib.suppress(ArtifactError):
            record = read_sidecar(path)
        if record.get("group") != repr(group):
            start = time.monotonic()
            frame = compute(group)
            _write_csv(frame, path, {"group": repr(group), "seconds": time.monotonic() - start}, None)
            record = read_sidecar(path)
        return path, record["seconds"]

    tasks = (delayed(finish)(number, group) for number, group in enumerate(groups))
    finished = Parallel(workers, backend="threading", return_as="generator", pre_dispatch=workers)(tasks)
    paths, seconds = zip(*tqdm(finished, desc=name, total=len(groups)), strict=True)
    table = pd.concat(map(read_table, paths), ignore_index=True)
    table.attrs["seconds"] = sum(seconds)
    return table


def staged_table(
    path: Path,
    expected: str,
    groups: Sequence[Hashable],
    compute: Callable[[Any], pd.DataFrame],
    folder: Path,
    provenance: Mapping[str, Any],
    workers: int = 1,
) -> pd.DataFrame:
    """Return the table at `path`, after `resumable` has computed it if it is not up to date.

    `provenance` is without seconds and fingerprint. The rows are always read from the file, with its six
    digits, so that a second run continues from the same numbers.
    """
    name = Path(path).stem
    if not up_to_date(path, expected):
        frame = resumable(name, expected, groups, compute, folder, workers)
        seconds = round(frame.attrs["seconds"], 3)
        write_table(frame, path, {**provenance, "seconds": seconds, "fingerprint": expected})
    clear_partials(name, folder)
    return read_table(path)
