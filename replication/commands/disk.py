"""Disk space that a profile still needs, compared with what is free: `python -m replication disk --profile
paper`.

The needs are computed from the profile: the weights of its hosts, a harvest per cell, an SAE per cell, target
and role. Existing files are not counted, so that an interrupted run needs only the rest."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

from replication.study import paths as paths_module
from replication.study.paths import Paths
from replication.study.profile import HostSection, Profile, load_profile
from writesae.hosts.base import Shape
from writesae.hosts.hub import download_sizes, fetch
from writesae.hosts.load import MODEL_FILES, PICKLED_FILES, read_shape
from writesae.sae.model import WEIGHTS
from writesae.sae.train import TrainingSettings

OTHER = 500e6  # bytes: tables, figures, executed notebooks, groups of unfinished stages (mini: a tenth)


class Need(NamedTuple):
    """Bytes that will be written below a folder."""

    what: str
    folder: Path
    size: float


def harvest_bytes(shape: Shape, tokens: int) -> int:
    """Return the size of a cell's factors in fp32: per token key, added, effective and a decay, or with
    vector decays key, added, decays, erase and probe."""
    d_k, d_v = shape.d_k, shape.d_v
    return 4 * tokens * (3 * d_k + 2 * d_v if shape.vector_decay else d_k + 2 * d_v + 1)


def sae_bytes(shape: Shape, settings: TrainingSettings) -> int:
    """Return the size of an SAE's weights in fp32."""
    whole, factors = shape.d_k * shape.d_v, settings.rank * (shape.d_k + shape.d_v)
    encoder = whole if settings.encoder == "dense" else 0 if settings.encoder == "tied" else factors
    decoder = whole if settings.decoder == "flat" else factors
    return 4 * (settings.n_atoms * (encoder + decoder + 1) + whole)


def weight_bytes(name: str, revision: str | None) -> int:
    """Return what `load_host` has still to download of a Hub model: safetensors, or pickles if there are
    none."""
    sizes = download_sizes(name, {*MODEL_FILES, *PICKLED_FILES}, revision)
    safe = any(file.endswith(".safetensors") for file in sizes)
    return sum(size for file, size in sizes.items() if not (safe and file.endswith(".bin")))


def _files_of(profile: Profile, paths: Paths, name: str, shape: Shape) -> list[Need]:
    """Return the harvests and SAEs of a host that are not there yet."""

    def rest(what: str, folder: str, pattern: str, count: int, size: int) -> Need:
        there = len(list((paths.build / folder).glob(f"{name}-{pattern}")))
        return Need(f"{what} of {name}", paths.build / folder, max(0, count - there) * size)

    cells, targets, data = len(profile.hosts[name].cells), len(profile.saes.targets), profile.data
    needs = [rest("harvests", "harvest", "*.safetensors", cells, harvest_bytes(shape, data.sae_windows * data.window))]
    counts = dict(main=cells * targets, flat=cells)
    survey = profile.section("replacement", name)
    if survey.survey_firings:
        counts["survey"] = -(-shape.layers // survey.survey_every) * shape.heads * targets
    settings = profile.section("saes", name)
    for role, count in counts.items():
        needs.append(
            rest(f"{role} SAEs", "saes", f"*-{role}/{WEIGHTS}", count, sae_bytes(shape, getattr(settings, role)))
        )
    return needs


def still_needed(profile: Profile, paths: Paths) -> tuple[list[Need], list[str]]:
    """Return what the profile's run has still to download and to write, and sentences on what is not counted:
    hosts whose config, or the size of whose weights, is neither here nor told by the Hub."""
    needs, notes, offline = [Need("tables and figures", paths.root, OTHER)], [], False
    for name, section in profile.hosts.items():
        local, what = paths_module.ROOT / section.path, name
        try:
            folder = local if local.exists() else _config(section, offline)
            needs += _files_of(profile, paths, name, read_shape(folder))
            if not local.exists():
                what = f"the weights of {section.path}"
                needs.append(Need(what, Path(constants.HF_HUB_CACHE), weight_bytes(section.path, section.revision)))
        except (OSError, ValueError) as error:
            offline |= isinstance(
                error, ConnectionError
            )  # the Hub is not asked again: it takes half a minute to give up
            notes.append(f"The disk space of {what} is not counted: {error}")
    return needs, notes


def _config(section: HostSection, offline: bool) -> Path:
    """Return the folder of a Hub model's config.json."""
    return fetch(section.path, ["config.json"], section.revision, local_files_only=offline)


def check(profile: Profile, paths: Paths, free: Callable[[Path], int] | None = None) -> list[str]:
    """Raise OSError, in one sentence, if a disk has less room than the profile's run has still to write on
    it.

    free(folder): bytes free below an existing folder. Returns a sentence on each host that is not counted.
    """
    free = free or (lambda folder: shutil.disk_usage(folder).free)
    needs, notes = still_needed(profile, paths)
    disks: dict[int, list[Need]] = {}
    for need in needs:
        folder = next(p for p in (need.folder, *need.folder.absolute().parents) if p.exists())
        disks.setdefault(os.stat(folder).st_dev, []).append(need._replace(folder=folder))
    for needs in disks.values():
        total, room = sum(need.size for need in needs), free(needs[0].folder)
        if room < total:
            largest = sorted(needs, key=lambda need: -need.size)[:3]
            most = ", ".join(f"{need.what} {need.size / 1e9:.1f}" for need in largest)
            raise OSError(
                f"Profile {profile.name} has still to write about {total / 1e9:.1f} GB on the disk of {needs[0].folder} "
                f"(most of it: {most}), and {room / 1e9:.1f} GB are free there: make room, or let WRITESAE_OUTPUT "
                "(results and build) or HF_HOME (weights) name a folder on a larger disk."
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
