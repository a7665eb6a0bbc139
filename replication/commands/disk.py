"""Compare the disk space that a profile still needs with what is free: weights, harvests, SAEs.

Files that exist are not counted, so an interrupted run needs only the rest."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from glob import escape
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

from replication.study.paths import Paths, in_repository
from replication.study.profile import Profile, load_profile
from writesae.harvesting import harvest_bytes
from writesae.hosts.base import Shape
from writesae.hosts.hub import MODEL_FILES, PICKLED_FILES, download_sizes, fetch
from writesae.hosts.load import read_shape
from writesae.sae.model import WEIGHTS
from writesae.sae.train import sae_bytes

OTHER = 500e6  # bytes of tables, figures, executed notebooks, unfinished stages (mini needs a tenth)


class Need(NamedTuple):
    """Bytes that will be written below a folder."""

    what: str
    folder: Path
    size: float


def _files_of(profile: Profile, paths: Paths, name: str, shape: Shape) -> list[Need]:
    """Return the harvests and SAEs of a host that do not exist yet."""

    def rest(what: str, folder: str, pattern: str, count: int, size: int) -> Need:
        existing = len(list((paths.build / folder).glob(f"{escape(name)}-{pattern}")))
        return Need(f"{what} of {name}", paths.build / folder, max(0, count - existing) * size)

    section, targets, data = profile.hosts[name], len(profile.saes.targets), profile.data
    settings, survey = (profile.section(part, name) for part in ("saes", "replacement"))
    cells, flat = len(section.cells), len(section.paper_places)
    harvest = harvest_bytes(shape, data.sae_windows * data.window)
    needs = [rest("harvests", "harvest", "*.safetensors", cells, harvest)]
    trainings = settings.trainings
    counts = dict(main=(flat * sum(trainings.values()) + (cells - flat) * len(trainings)) * targets, flat=flat)
    if survey.survey_firings:
        counts["survey"] = -(-shape.layers // survey.survey_every) * shape.heads * targets
    for role, count in counts.items():
        size = sae_bytes(shape.d_k, shape.d_v, getattr(settings, role))
        needs.append(rest(f"{role} SAEs", "saes", f"*-{role}*/{WEIGHTS}", count, size))
    return needs


def still_needed(profile: Profile, paths: Paths) -> tuple[list[Need], list[str]]:
    """Return what the profile's run still has to download and write, and a sentence for each host whose
    config or size of weights can be read neither on this machine nor from the Hub."""
    needs, notes, offline = [Need("tables and figures", paths.root, OTHER)], [], False
    for name, section in profile.hosts.items():
        local, what = in_repository(section.path), name
        try:
            if local.exists():
                needs += _files_of(profile, paths, name, read_shape(local))
                continue
            folder = fetch(section.path, ["config.json"], section.revision, local_files_only=offline)
            needs += _files_of(profile, paths, name, read_shape(folder))
            what = f"the weights of {section.path}"
            sizes = download_sizes(section.path, {*MODEL_FILES, *PICKLED_FILES}, section.revision)
            safe = any(file.endswith(".safetensors") for file in sizes)  # else pickles
            size = sum(size for file, size in sizes.items() if not (safe and file.endswith(".bin")))
            needs.append(Need(what, Path(constants.HF_HUB_CACHE), size))
        except (OSError, ValueError) as error:
            offline |= isinstance(error, ConnectionError)  # do not ask the Hub again: it takes half a minute
            notes.append(f"The disk space of {what} is not counted: {error}")
    return needs, notes


def check(profile: Profile, paths: Paths) -> list[str]:
    """Return the sentences of `still_needed`. Raises OSError if a disk is too small for what is needed."""
    needs, notes = still_needed(profile, paths)
    disks: dict[int, list[Need]] = {}
    for need in needs:
        folder = next(p for p in (need.folder, *need.folder.absolute().parents) if p.exists())
        disks.setdefault(os.stat(folder).st_dev, []).append(need._replace(folder=folder))
    for needs in disks.values():
        total, room = sum(need.size for need in needs), shutil.disk_usage(needs[0].folder).free
        if room < total:
            largest = sorted(needs, key=lambda need: -need.size)[:3]
            most = ", ".join(f"{need.what} {need.size / 1e9:.1f}" for need in largest)
            raise OSError(
                f"Profile {profile.name} has still to write about {total / 1e9:.1f} GB on the disk of "
                f"{needs[0].folder} (most of it: {most}), and {room / 1e9:.1f} GB are free there: make room, or let "
                "WRITESAE_OUTPUT (results and build) or HF_HOME (weights) name a folder on a larger disk."
            )
    return notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    disable_progress_bars()
    for note in check(load_profile(options.profile), Paths(options.profile)):
        print(note, file=sys.stderr)
    print(f"There is room for what profile {options.profile} has still to download and to write.")
    return 0
