"""Files that appear whole or not at all, and are checked when they are read.

Each stored file has a sidecar, `<name>.json`, with the sha256 of the file and what its writer says about it. The
`fingerprint` in it is a hash of everything that the file was computed from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import platform
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch
from replication.study.paths import output_root

FORMAT_VERSION = 1
AGAIN = "remove it and build/*/stamps, and run again"  # make then runs all pages, which read what is whole
PARTIAL = f".partial-{platform.node()}-"  # begins the name of a file that a process of this machine is writing


class ArtifactError(ValueError):
    """A stored file is missing, damaged, of another format version, or cannot be written."""


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


def read_pickle(path: Path) -> Any:
    """Return what torch.save wrote, if it is tensors and plain values; a pickle of anything else is not executed.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged one and for one with other objects.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and was not loaded, since a pickle can run code: save its "
            "tensors alone, if you trust it."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or was cut short, or torch.save did not write it: {error}") from error
