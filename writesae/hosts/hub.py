"""Model folders: their files, downloads from the Hugging Face Hub, and one sentence for each error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import DryRunFileInfo, constants, errors, snapshot_download, try_to_load_from_cache

from writesae.files import local_path, reading, said

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "vocab*")
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # only the first pattern that matches is read
MODEL_FILES, PICKLED_FILES = ((*TOKENIZER_FILES, pattern) for pattern in WEIGHT_FILES)


def weight_files(folder: Path) -> list[Path]:
    """Return the weights of a folder: safetensors, else pickles. Raises FileNotFoundError for none."""
    for pattern in WEIGHT_FILES:
        if files := sorted(folder.glob(pattern)):
            return files
    raise FileNotFoundError(f"{folder} holds no weights: {' or '.join(WEIGHT_FILES)} belong there.")


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a host or a tokenizer may be read from, in order."""
    patterns = {*MODEL_FILES, *PICKLED_FILES}
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name[0] != ".")  # macOS puts ._* files beside others


def fetch(name: str | Path, files: Sequence[str], revision: str | None = None, **options) -> Path:
    """Return the folder `name`, or the cached copy of the Hub's model `name` at `revision`.

    files: patterns of the files to download. options: of huggingface_hub.snapshot_download (token, ...).

    Raises FileNotFoundError if there is no such folder, model or revision, PermissionError for a gated model,
    ConnectionError if the Hub does not answer, ValueError if a revision is given for a folder, and for any
    other error of huggingface_hub."""
    if not local_path(name).exists():
        return Path(_snapshot(str(name), files, revision, **options))
    if revision is not None:
        raise ValueError(f"{name} is a folder here, and a folder has no revision {revision}: leave revision out.")
    return local_path(name)


def download_sizes(name: str, files: Sequence[str], revision: str | None = None) -> dict[str, int]:
    """Return {file: bytes} of what `fetch` would download from the Hub. Raises as `fetch` does."""
    try:
        answer = _snapshot(name, files, revision, dry_run=True)
    except ConnectionError:
        with suppress(ConnectionError):
            _snapshot(name, files, revision, local_files_only=True)
            return {}  # the cache has everything
        raise
    return {file.filename: file.file_size or 0 for file in answer if file.will_download}


def _snapshot(name: str, files: Sequence[str], revision: str | None, **options) -> str | list[DryRunFileInfo]:
    """Call snapshot_download, and raise its errors as `fetch` does."""
    with reading(f"The model {name} of the Hub", known=partial(_refusal, name, files, revision, options)):
        return snapshot_download(name, revision=revision, allow_patterns=list(files), **options)


def _refusal(name: str, files: Sequence[str], revision: str | None, options: dict, error: Exception) -> OSError | None:
    """Return what `fetch` raises for an error of huggingface_hub whose cause is certain, else None."""
    page = f"{constants.ENDPOINT}/{name}"
    match error:
        case errors.HFValidationError():
            return FileNotFoundError(
                f"There is no folder {name}, and it is no hub id either: give a folder, or owner/name."
            )
        case errors.GatedRepoError():
            return PermissionError(f"{name} is gated: accept its terms at {page} and log in with `hf auth login`.")
        case errors.RepositoryNotFoundError():
            return FileNotFoundError(
                f"There is no folder {name}, and no model of that name at {page}, or it is private: give "
                "another name, or log in with `hf auth login`."
            )
        case errors.RevisionNotFoundError():
            return FileNotFoundError(
                f"{name} has no revision {revision}: give a branch, tag or commit of {page}/commits/main."
            )
        case errors.LocalEntryNotFoundError() | errors.DryRunError():
            cache = options.get("cache_dir") or constants.HF_HUB_CACHE
            return ConnectionError(
                f"{name} is no folder here and not (wholly) in the cache {cache}, and {_reason(error, options)}: its "
                f"{', '.join(files)} would be downloaded; allow that, or copy them into a folder and give its path."
            )
        case errors.HfHubHTTPError():
            return ConnectionError(
                f"The Hub answered {error.response.status_code} when asked for {name}: see {page}, or try again later."
            )


def commit(name: str | Path, revision: str | None = None) -> str | None:
    """Return the commit of a Hub model's cached copy, without asking the Hub; None if there is no copy."""
    with reading(f"The cached copy of {name}"):
        config = try_to_load_from_cache(str(name), "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _reason(error: Exception, options: dict) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if options.get("local_files_only"):
        return "local_files_only forbids a download"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return f"the Hub answered {error.__cause__.response.status_code}"
    return f"{constants.ENDPOINT} cannot be reached ({said(error.__cause__ or error)})"
