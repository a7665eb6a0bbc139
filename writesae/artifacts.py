"""Files that stages leave for one another: whole or absent, checked when read, and computed again only when needed.

Beside each table (CSV) and each file of tensors (safetensors) stands a sidecar, `<name>.json`, with the sha256 of the
file, the version of this format, where the file comes from (its provenance) and the *fingerprint* of everything it was
computed from. A stage whose fingerprint has not changed is skipped. Files count as done only in the working copy that
computed them: a fresh clone has the reference results in it and still computes its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from pandas.api.types import is_any_real_numeric_dtype as is_number
from safetensors import SafetensorError
from tqdm import tqdm

from writesae import dependencies

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
FORMAT_VERSION = 1
REQUIRED = ("profile", "config", "host", "seed", "seconds")
AGAIN = "remove it and build/*/stamps, and run again"  # make then runs all pages, which read what is whole
VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pandas", "scikit-learn")
PARTIAL = f".partial-{platform.node()}-"  # begins the name of a file that a process of this machine is writing
KEPT = re.compile(r"(sweep|repeats)-.*\.csv")  # tables that `make sweep` and `make repeats` make, and no notebook
DECIDING = ("torch", "transformers", "numpy", "scipy", "scikit-learn")  # versions that a fingerprint depends on


class ArtifactError(ValueError):
    """A stored file is missing, damaged, of another format version, or cannot be written."""


def dry_run() -> bool:
    """Whether this process is part of a dry run (`writesae.dryrun`), whose numbers mean nothing."""
    return bool(os.environ.get("WRITESAE_DRY_RUN"))


def output_root() -> Path:
    """Where results go: the folder named by WRITESAE_OUTPUT (relative to the repository), else the repository, and for a
    dry run its build/dryrun."""
    return ROOT / (os.environ.get("WRITESAE_OUTPUT") or ("build/dryrun" if dry_run() else ""))


@dataclasses.dataclass(frozen=True)
class Paths:
    """The folders of one profile, found from the package and not from the current folder."""

    profile: str

    @property
    def root(self) -> Path:
        return output_root()

    @property
    def results(self) -> Path:
        return self.root / "results" / self.profile

    @property
    def figures(self) -> Path:
        return self.root / "figures" / self.profile

    @property
    def build(self) -> Path:
        return self.root / "build" / self.profile

    @property
    def partial(self) -> Path:
        return self.build / "partial"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary path beside `path`, then move it there: the file appears whole or not at all.

    Raises ArtifactError where it cannot be written (a full disk, a read-only folder); what was there before stays.
    """
    path = Path(path)
    partial = path.with_name(
        f"{PARTIAL}{os.getpid()}-{threading.get_ident()}-{path.name}"
    )  # threads may write one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} could not be written ({getattr(error, 'strerror', None) or error}): nothing that was stored is lost, "
            "so make room or the folder writable, and run again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a read-only folder: there is nothing to remove
            partial.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove the unfinished files that killed processes of this machine have left in a folder and below it."""
    for path in Path(folder).rglob(f"{PARTIAL}*"):
        process = path.name.removeprefix(PARTIAL).split("-")[0]
        if process.isdecimal() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


# Provenance


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = dict.fromkeys(names, "missing")
    for name in found:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit of the repository, with `+changes` where the tree differs from it; `unknown` outside git."""
    command = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        source = ["--", "writesae", "profiles", "models"]
        changed = subprocess.run([*command, "status", "--porcelain", *source], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+changes" if changed else "")


def environment() -> dict[str, Any]:
    """What a result depends on beside its inputs: commit, versions, device, kernel path, time. The kernel path is torch
    where no provenance says more: that of a host (`Host.kernel`) comes from the suite. A CPU's device names the vector
    instructions that torch uses there: they decide in which order sums are taken."""
    import torch  # here and below: two seconds that Make and run_notebook need not wait

    cuda = torch.cuda.is_available()
    return {
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **_installed(VERSIONS)},
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "kernel": "torch",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def workspace() -> str:
    """A random name of this working copy, kept under build/: it tells own files from the committed reference."""
    path = output_root() / "build" / "workspace"
    if not path.is_file():
        write_atomically(path, lambda partial: partial.write_text(uuid.uuid4().hex))
    return path.read_text()


# Fingerprints


def file_hash(path: Path) -> str:
    """sha256 of a file. Raises ArtifactError where it is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} is missing or cannot be read.") from error


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it does; a path becomes the hash of the file."""
    if isinstance(value, Path):
        return file_hash(value)
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, range):
        return list(value)
    raise TypeError(f"A fingerprint is made of plain values and paths, not of {type(value).__name__}.")


def fingerprint(modules: Sequence[str] = (), **inputs: Any) -> str:
    """A hash of everything that a stage's result depends on.

    `modules`: dotted names of the modules that compute it (what they import is counted too). `inputs`: plain values,
    dataclasses, pydantic models, and `Path`s, which count by the content of their file. The versions of the packages
    that decide numbers always count.

    Raises TypeError for a value of another kind, ArtifactError for a missing file, ValueError for an unknown module.
    """
    whole = {"inputs": inputs, "code": dependencies.code_hash(modules), "versions": _installed(DECIDING)}
    text = json.dumps(whole, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


# Sidecars


def sidecar(path: Path) -> Path:
    """The path of the JSON file that stands beside `path`."""
    return Path(path).with_name(Path(path).name + ".json")


def _store(path: Path, write: Callable[[Path], None], fields: Mapping[str, Any]) -> None:
    """Write a file and its sidecar: both are complete before either is moved to its place.

    A process killed between the two moves leaves a sidecar that does not vouch for the file, which `read_sidecar` refuses.
    """

    def both(partial: Path) -> None:
        write(partial)
        record = {
            "format_version": FORMAT_VERSION,
            "sha256": file_hash(partial),
            "fingerprint": None,
            "workspace": workspace(),
            **fields,
        }
        record = json.loads(json.dumps(record, default=_plain, allow_nan=False))
        text = json.dumps(record | {"seal": _seal(record)}, indent=2) + "\n"
        write_atomically(sidecar(path), lambda beside: beside.write_text(text, encoding="utf-8"))

    write_atomically(path, both)


def _seal(record: Mapping[str, Any]) -> str:
    """sha256 of what a sidecar says, so that a change of the sidecar itself shows as well."""
    text = json.dumps({name: value for name, value in record.items() if name != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_sidecar(path: Path) -> dict[str, Any]:
    """The checked sidecar of a stored file.

    Raises ArtifactError where the file or its sidecar is missing, damaged or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run the stage that writes it.")
    try:
        record = json.loads(sidecar(path).read_text(encoding="utf-8"))
        version, checksum = record["format_version"], record["sha256"]
    except OSError as error:
        raise ArtifactError(f"{sidecar(path)}, which vouches for {path.name}, is missing: {AGAIN}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{sidecar(path)} is damaged: {AGAIN}.") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path} has format version {version}, and this code reads {FORMAT_VERSION}: {AGAIN}.")
    if checksum != file_hash(path):
        raise ArtifactError(
            f"{path} is damaged or was changed by hand (its checksum is not the recorded one): {AGAIN}."
        )
    if record.get("seal", _seal(record)) != _seal(record):  # files written before there were seals have none
        raise ArtifactError(f"{sidecar(path)} is damaged or was changed by hand (it is not what was written): {AGAIN}.")
    return record


def up_to_date(path: Path | Iterable[Path], expected: str) -> bool:
    """Whether this working copy has computed the file (or all files) whole, from inputs with this fingerprint."""
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    try:
        records = [read_sidecar(one) for one in paths]
    except ArtifactError:
        return False
    return all(r["fingerprint"] == expected and r["workspace"] == workspace() for r in records)


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


# Tensors


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, and sharing storage with no other tensor, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, and `metadata` (plain values) with a checksum in the sidecar.

    Where `metadata` has a `fingerprint`, the stage can be skipped next time. Raises TypeError for metadata that is not
    plain.
    """
    from safetensors.torch import save_file

    json.dumps(metadata, default=_plain, allow_nan=False)  # a mistake shows before anything is written
    own = {name: _own(tensor) for name, tensor in tensors.items()}
    fields = {"fingerprint": metadata.get("fingerprint"), "metadata": dict(metadata)}
    _store(path, lambda partial: save_file(own, partial), fields)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, metadata) as they were saved.

    Raises ArtifactError where the file is missing, damaged, truncated, no file of tensors, or of another format version.
    """
    from safetensors.torch import load_file

    record = read_sidecar(path)
    if "metadata" not in record:
        raise ArtifactError(f"{path} holds no tensors: save_tensors writes those.")
    return load_file(path), record["metadata"]


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
