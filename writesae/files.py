"""Files that are complete or absent, and checked when they are read.

A stored file has a sidecar, `<name>.json`: the sha256 of the file, a `fingerprint` (the hash of everything
that the file was computed from) and further fields.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
AGAIN = "delete it and run again (for a notebook, delete build/*/stamps too; finished stages are reused)"
PARTIAL = f".partial-{platform.node()}-"  # prefix of the files that a process of this machine is writing


class ArtifactError(ValueError):
    """A stored file is missing, damaged, of another format version, or cannot be written."""


@contextlib.contextmanager
def reading(
    what: str,
    advice: str = "",
    known: Callable[[Exception], Exception | None] = lambda error: None,
    done: str = "read",
) -> Iterator[None]:
    """Turn whatever a library raises while it reads `what` into one sentence, with the error as its cause.

    advice: what to do about an unknown error; done: the participle in the message. known: returns the
    exception to raise for an error whose cause is certain, else None. Raises FileNotFoundError,
    PermissionError or ConnectionError for an error of that kind, ValueError with the advice for any other.
    """
    try:
        yield
    except Exception as error:  # libraries raise what they like, and change it with their versions
        kinds = (FileNotFoundError, PermissionError, ConnectionError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        ending = f": {advice}." if advice and kind is ValueError else "."
        raise known(error) or kind(f"{what} cannot be {done} ({said(error)}){ending}") from error


def said(error: Exception) -> str:
    """Return the type of an exception and its message, on one line."""
    message = str(error).rpartition("WeightsUnpickler error:")[2]  # before it, torch advises to run code
    return ": ".join(filter(None, [type(error).__name__, " ".join(message.split())])).rstrip(".")


def local_path(name: Path | str) -> Path:
    """Return the path of a file or folder of this machine; ~ is the home folder."""
    return Path(os.path.expanduser(name))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, or ValueError for other content."""
    with reading(str(path), "it may be damaged, or is no JSON object"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary path next to `path`, then move the result to `path`.

    Raises ArtifactError if the file cannot be written; an older file then remains.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} could not be written ({getattr(error, 'strerror', None) or error}): nothing that was "
            "stored is lost, so free some space or make the folder writable, and run again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # in a read-only folder there is nothing to remove
            partial.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove the unfinished files of killed processes of this machine, in a folder and its subfolders."""
    for path in Path(folder).rglob(f"{PARTIAL}*"):
        process = path.name.removeprefix(PARTIAL).split("-")[0]
        if process.isdecimal() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # a process of another user
    return True


def file_hash(path: Path) -> str:
    """Return the sha256 of a file. Raises ArtifactError if the file is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} is missing or cannot be read.") from error


def _plain(value: Any) -> Any:
    """Return a plain value for a value that JSON does not know; for a path, the hash of its file."""
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


def sidecar(path: Path) -> Path:
    return Path(path).with_name(Path(path).name + ".json")


def _store(path: Path, write: Callable[[Path], None], fields: Mapping[str, Any]) -> None:
    """Write a file and its sidecar; `read_sidecar` refuses the pair if only one was moved into place."""

    def write_both(partial: Path) -> None:
        write(partial)
        record = {"format_version": FORMAT_VERSION, "sha256": file_hash(partial), "fingerprint": None, **fields}
        record = json.loads(json.dumps(record, default=_plain, allow_nan=False))
        text = json.dumps(record | {"seal": _seal(record)}, indent=2) + "\n"
        write_atomically(sidecar(path), lambda beside: beside.write_text(text, encoding="utf-8"))

    write_atomically(path, write_both)


def _seal(record: Mapping[str, Any]) -> str:
    """Return the sha256 of a sidecar's content, which reveals a change of the sidecar itself."""
    text = json.dumps({name: value for name, value in record.items() if name != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_sidecar(path: Path) -> dict[str, Any]:
    """Check a file against its sidecar, and return the sidecar's content.

    Raises ArtifactError if one of the two is missing, damaged or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run the stage that writes it.")
    try:
        record = json.loads(sidecar(path).read_text(encoding="utf-8"))
        version, checksum = record["format_version"], record["sha256"]
    except OSError as error:
        raise ArtifactError(
            f"{sidecar(path)}, which vouches for the file, is missing or cannot be read: {AGAIN}."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{sidecar(path)} is damaged: {AGAIN}.") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path} has format version {version}, and this code reads {FORMAT_VERSION}.")
    if record.get("seal", _seal(record)) != _seal(record):
        raise ArtifactError(f"{sidecar(path)} is damaged or was changed by hand: {AGAIN}.")
    if checksum != file_hash(path):
        raise ArtifactError(f"{path} is damaged or was changed by hand (its checksum is another): {AGAIN}.")
    return record


def up_to_date(path: Path | Iterable[Path], expected: str) -> bool:
    """Return whether every file is complete and has this fingerprint. For intermediate files only."""
    paths = [path] if isinstance(path, (str, Path)) else path
    try:
        return all(read_sidecar(each)["fingerprint"] == expected for each in paths)
    except ArtifactError:
        return False


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, and a sidecar with `metadata` (plain values, perhaps a `fingerprint`).

    Raises TypeError for metadata that is not plain, ArtifactError if the file cannot be written.
    """
    from safetensors.torch import save_file

    json.dumps(metadata, default=_plain, allow_nan=False)  # raises before anything is written
    separate = {}  # safetensors wants contiguous tensors that share no storage
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        separate[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    fields = {"fingerprint": metadata.get("fingerprint"), "metadata": dict(metadata)}
    _store(path, lambda partial: save_file(separate, partial), fields)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the (tensors, metadata) of a file of `save_tensors`. Raises ArtifactError for any other file."""
    from safetensors.torch import load_file

    record = read_sidecar(path)
    if "metadata" not in record:
        raise ArtifactError(f"{path} holds no tensors: save_tensors writes those.")
    with reading(str(path)):
        return load_file(path), record["metadata"]


def read_pickle(path: Path) -> Any:
    """Return tensors and plain values that torch.save wrote, without executing code.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one and for one with other objects.
    """
    import torch

    with reading(str(path), "it may be damaged or cut short, or not from torch.save", holds_code(path)):
        return torch.load(path, map_location="cpu", weights_only=True)


def holds_code(name: Path | str) -> Callable[[Exception], Exception | None]:
    """Return the argument `known` of `reading` for pickles that hold more than tensors and plain values."""

    def known(error: Exception) -> Exception | None:
        if not isinstance(error, pickle.UnpicklingError) or "Unsupported operand" in str(error):
            return None
        return ValueError(
            f"{name} holds more than tensors and plain values, and was not loaded, since a pickle can run "
            "code: save its tensors alone, if you trust it."
        )

    return known


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Return {name: shape} of what `read_weights` reads; of .safetensors only the header is read."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {name: list(x.shape) for name, x in read_weights(path).items()}
    with reading(str(path), "it may be damaged or cut short"), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file or a pickled state dict. Raises as `read_pickle`."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        with reading(str(path), "it may be damaged or cut short"):
            return load_file(path)
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{path} holds no state dict, but a {type(state).__name__} of other things.")
    return state
