"""Folders of the Hugging Face Hub, and one sentence that says what is wrong where there is none to be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects


class Shape(NamedTuple):
    """Of a host: recurrent layers, heads of each, and their state."""

    layers: int
    heads: int
    d_k: int
    d_v: int
    vector_decay: bool = False


class Model(NamedTuple):
    size: float  # bytes of its files, about
    shape: Shape


KNOWN = {  # the paper's hosts, for what has to be said before the Hub is asked
    "Qwen/Qwen3.5-0.8B": Model(1.8e9, Shape(18, 16, 128, 128)),  # 0.9 billion parameters with the vision tower, in bf16
    "Qwen/Qwen3.5-4B": Model(9.3e9, Shape(24, 32, 128, 128)),  # 4.2 billion parameters and a vision tower, in bf16
    "Qwen/Qwen3.5-27B": Model(55.6e9, Shape(48, 48, 128, 128)),  # 27.8 billion, vision tower and all, in bf16
    "state-spaces/mamba2-370m": Model(1.5e9, Shape(48, 32, 128, 64)),  # 368.3 million parameters, at most fp32
    "fla-hub/rwkv7-1.5B-world": Model(6.1e9, Shape(24, 32, 64, 64, True)),  # 1.5274 billion parameters in fp32
    "fla-hub/delta_net-1.3B-100B": Model(2.7e9, Shape(24, 16, 128, 128)),  # 1.3657 billion parameters in bf16
    "fla-hub/gla-1.3B-100B": Model(2.7e9, Shape(24, 4, 256, 512, True)),  # 1.3655 billion parameters in bf16
}


def fetch(name: str | Path, files: Sequence[str], revision: str | None = None, **options) -> Path:
    """The folder `name`, or the cached copy of those `files` (patterns) of the Hub's model `name` at `revision`.

    options: further arguments of huggingface_hub.snapshot_download (token, cache_dir, local_files_only, ...).

    Raises FileNotFoundError where there is neither folder nor model nor revision, PermissionError for a gated model,
    ConnectionError where the Hub does not answer, ValueError for a revision of a folder.
    """
    if Path(name).exists():
        if revision is not None:
            raise ValueError(f"{name} is a folder here, and a folder has no revision {revision}: leave revision out.")
        return Path(name)
    page = f"{constants.ENDPOINT}/{name}"
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(files), **options))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and it is no hub id either: give a folder, or owner/name."
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms at {page} and log in with `hf auth login`"
            f"{_size(str(name), files, revision, options.get('token'))}."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and no model of that name at {page}, or it is private: give another name, "
            "or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name} has no revision {revision}: give a branch, tag or commit of {page}/commits/main."
        ) from error
    except LocalEntryNotFoundError as error:
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        raise ConnectionError(
            f"{name} is no folder here and not (wholly) in the cache {cache}, and {_reason(error, options)}: its "
            f"{', '.join(files)} would be downloaded ({_about(str(name))}); allow that, or copy them into a folder and give "
            "its path."
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(
            f"The Hub answered {error.response.status_code} when asked for {name}: see {page}, or try again later."
        ) from error


def _about(name: str) -> str:
    return f"about {KNOWN[name].size / 1e9:.1f} GB" if name in KNOWN else "the Hub alone knows their size"


def commit(name: str | Path, revision: str | None = None) -> str | None:
    """The commit of a Hub model's copy in the cache, without asking the Hub; None where there is no copy."""
    found = try_to_load_from_cache(str(name), "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _reason(error: Exception, options: dict) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if options.get("local_files_only"):
        return "local_files_only forbids a download"
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return f"the Hub answered {cause.response.status_code}"
    return f"{constants.ENDPOINT} cannot be reached"


def _size(name: str, files: Sequence[str], revision: str | None, token: str | bool | None) -> str:
    """A clause with what a download would have brought, where the Hub tells."""
    try:
        tree = HfApi(token=token).list_repo_tree(name, recursive=True, revision=revision)
        sizes = {x.path: x.size for x in tree if hasattr(x, "size")}
    except (HfHubHTTPError, OSError):
        return ""
    wanted = [sizes[path] for path in filter_repo_objects(sizes, allow_patterns=list(files))]
    return f"; {len(wanted)} files of {sum(wanted) / 1e6:.1f} MB would then be downloaded"
