"""Model folders of the Hugging Face Hub: download, sizes, and one sentence for each error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import DryRunFileInfo, constants, errors, snapshot_download, try_to_load_from_cache


def fetch(name: str | Path, files: Sequence[str], revision: str | None = None, **options) -> Path:
    """Return the folder `name`, or the cached copy of the Hub's model `name` at `revision`.

    files: patterns of the files to download. options: of huggingface_hub.snapshot_download (token, ...).

    Raises FileNotFoundError if there is no such folder, model or revision, PermissionError for a gated model,
    ConnectionError if the Hub does not answer, ValueError if a revision is given for a folder."""
    if not Path(name).exists():
        return Path(_snapshot(str(name), files, revision, **options))
    if revision is not None:
        raise ValueError(f"{name} is a folder here, and a folder has no revision {revision}: leave revision out.")
    return Path(name)


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
    page = f"{constants.ENDPOINT}/{name}"
    try:
        return snapshot_download(name, revision=revision, allow_patterns=list(files), **options)
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and it is no hub id either: give a folder, or owner/name."
        ) from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms at {page} and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and no model of that name at {page}, or it is private: give another name, "
            "or log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name} has no revision {revision}: give a branch, tag or commit of {page}/commits/main."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.DryRunError) as error:
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        raise ConnectionError(
            f"{name} is no folder here and not (wholly) in the cache {cache}, and {_reason(error, options)}: its "
            f"{', '.join(files)} would be downloaded; allow that, or copy them into a folder and give its path."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(
            f"The Hub answered {error.response.status_code} when asked for {name}: see {page}, or try again later."
        ) from error


def commit(name: str | Path, revision: str | None = None) -> str | None:
    """Return the commit of a Hub model's cached copy, without asking the Hub; None if there is no copy."""
    config = try_to_load_from_cache(str(name), "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _reason(error: Exception, options: dict) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if options.get("local_files_only"):
        return "local_files_only forbids a download"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return f"the Hub answered {error.__cause__.response.status_code}"
    return f"{constants.ENDPOINT} cannot be reached"
