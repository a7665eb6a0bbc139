"""Files that stages leave for one another: whole or absent, checked when read, and computed again only when needed.

Beside each table (CSV) and each file of tensors (safetensors) stands a sidecar, `<name>.json`, with the sha256 of the
file, the version of this format, where the file comes from (its provenance) and the *fingerprint* of everything it was
computed from. A stage whose fingerprint has not changed is skipped. Stages ask this of files in build/ only: a fresh clone
has the reference results in results/, no build/, and computes its own.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from pandas.api.types import is_any_real_numeric_dtype as is_number
from tqdm import tqdm

from replication.study.paths import ROOT
from writesae.files import ArtifactError, _store, read_sidecar, up_to_date

REQUIRED = ("profile", "config", "host", "seed", "seconds")
VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pandas", "scikit-learn")
KEPT = re.compile(r"(sweep|repeats)-.*\.csv")  # tables that `make sweep` and `make repeats` make, and no notebook


def git_commit() -> str:
    """The commit of the repository, with `+changes` where the tree differs from it; `unknown` outside git."""
    command = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        source = ["--", "writesae", "replication", "profiles", "models"]
        changed = subprocess.run([*command, "status", "--porcelain", *source], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+changes" if changed else "")


def environment() -> dict[str, Any]:
    """What a result depends on beside its inputs: commit, versions, device, kernel path, time.

    The kernel path is always torch: no result comes from another package's kernels. A CPU's device names the vector
    instructions that torch uses, because they decide the order of sums."""
    cuda = torch.cuda.is_available()
    return {
        "commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "kernel": "torch",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# Tables


def _write_csv(frame: pd.DataFrame, path: Path, fields: Mapping[str, Any], float_format: str | None) -> None:
    if not len(frame.columns):
        raise ValueError(f"The table for {Path(path).name} has no columns.")
    text = [name for name in frame if not pd.api.types.is_bool_dtype(frame[name]) and not is_number(frame[name])]
    frame = frame.assign(**{name: frame[name].map(_one_line, na_action="ignore") for name in text})
    write = {"index": False, "lineterminator": "\n", "float_format": float_format}
    _store(path, lambda partial: frame.to_csv(partial, **write), {**fields, "text_columns": text, "rows": len(frame)})


def _one_line(value: Any) -> str:
    return str(value).replace("\r", "\\r")  # a bare carriage return would end the row


def write_table(frame: pd.DataFrame, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a CSV (floats with six significant digits) and its sidecar.

    `provenance` names at least profile, config (its hash), host, seed and seconds, and the fingerprint where the
    stage is to be skipped next time; commit, versions, device, kernel path and time are added here.

    Raises ValueError for a table without columns or a provenance that lacks a field.
    """
    lacking = [name for name in REQUIRED if name not in provenance]
    if lacking:
        raise ValueError(f"The provenance of {Path(path).name} lacks {', '.join(lacking)}.")
    _write_csv(frame, Path(path), {**environment(), **provenance}, "%.6g")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table back; only an empty field is a missing value, so that a token `null` stays text.

    Raises ArtifactError where it is missing, damaged, no table, or of another format version.
    """
    record = read_sidecar(path)
    if "text_columns" not in record:
        raise ArtifactError(f"{path} is no table: write_table writes those.")
    text = dict.fromkeys(record["text_columns"], str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def rows_with(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows in which the columns have these values."""
    return table[np.logical_and.reduce([table[name] == value for name, value in values.items()])]


# Stages that can be interrupted


def _partial_folder(name: str, expected: str, folder: Path) -> Path:
    return Path(folder) / f"{name}-{expected[:16]}"


def clear_partials(name: str, folder: Path, keep: str | None = None) -> None:
    """Remove the stored groups of a stage, all but those under the fingerprint `keep`."""
    kept = _partial_folder(name, keep, folder) if keep else None
    for path in Path(folder).glob("*"):
        if re.fullmatch(re.escape(name) + "-[0-9a-f]{16}", path.name) and path != kept:
            shutil.rmtree(path)


def _finished(path: Path, group: str) -> dict[str, Any] | None:
    """The sidecar of a group that is stored whole, else None."""
    try:
        record = read_sidecar(path)
    except ArtifactError:
        return None
    return record if record["group"] == group else None


def resumable(
    name: str,
    expected: str,
    groups: Sequence[Hashable],
    compute: Callable[[Any], pd.DataFrame],
    folder: Path,
    workers: int = 1,
) -> pd.DataFrame:
    """The rows of all groups in order, from `compute(group)`, each stored as soon as it is done.

    Killed at any moment and called again with the same fingerprint `expected`, it computes only what is not stored.
    `compute` must depend on its group alone (a random generator is seeded by the group), for `workers` threads call it
    at once. `frame.attrs["seconds"]` is the time of all groups added up. The stored groups stay until
    `clear_partials`; those of other fingerprints are removed.

    Raises ValueError where there are no groups.
    """
    if not groups:
        raise ValueError(f"The stage {name} has nothing to compute: no groups were given.")
    clear_partials(name, folder, keep=expected)
    place = _partial_folder(name, expected, folder)

    def finish(number: int, group: Hashable) -> tuple[Path, float]:
        path = place / f"group-{number:05d}.csv"
        record = _finished(path, repr(group))
        if record is None:
            start = time.monotonic()
            frame = compute(group)
            _write_csv(frame, path, {"group": repr(group), "seconds": time.monotonic() - start}, None)
            record = read_sidecar(path)
        return path, record["seconds"]

    tasks = (delayed(finish)(number, group) for number, group in enumerate(groups))
    finished = Parallel(workers, backend="threading", return_as="generator", pre_dispatch=workers)(tasks)
    paths, seconds = zip(*tqdm(finished, desc=name, total=len(groups)), strict=True)
    whole = pd.concat(map(read_table, paths), ignore_index=True)
    whole.attrs["seconds"] = sum(seconds)
    return whole


def staged_table(
    path: Path,
    expected: str,
    groups: Sequence[Hashable],
    compute: Callable[[Any], pd.DataFrame],
    folder: Path,
    provenance: Mapping[str, Any],
    workers: int = 1,
) -> pd.DataFrame:
    """The table at `path`: read where it is up to date, else computed group by group (resumable) and written.

    `workers` as for `resumable`; `provenance` as for `write_table`, without seconds and fingerprint. The rows are always
    those of the file, with its six digits, so that a second run goes on from the same numbers. Raises ValueError as
    `resumable`, `write_table` do.
    """
    name = Path(path).stem
    if not up_to_date(path, expected):
        frame = resumable(name, expected, groups, compute, folder, workers)
        write_table(frame, path, {**provenance, "seconds": round(frame.attrs["seconds"], 3), "fingerprint": expected})
    clear_partials(name, folder)
    return read_table(path)
