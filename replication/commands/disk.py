"""Disk space: what a profile has still to download and to write, against what is free, before anything is started.

Estimated from the profile's numbers: the weights, a harvest a cell, an SAE a cell, target and role. What is there already
is not counted, so that an interrupted run is asked only for the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, try_to_load_from_cache

from replication.study import paths as artifacts
from replication.study.profile import Profile
from writesae.hosts import hub
from writesae.sae.model import WEIGHTS
from writesae.sae.train import TrainingSettings

OTHER = 500e6  # bytes: tables, figures, executed notebooks, groups of unfinished stages (mini leaves a tenth of that)
FIELDS = {  # of config.json, by model type: d_k, d_v, heads
    "qwen3_5_text": ("linear_key_head_dim", "linear_value_head_dim", "linear_num_value_heads"),
    "mamba2": ("state_size", "head_dim", "num_heads"),
    "rwkv7": ("head_dim", "head_dim", "num_heads"),
}
EXPANDED = {  # those whose configs give the heads' widths as shares of the whole, with what they leave out
    "delta_net": dict(hidden_size=2048, num_heads=16, expand_k=1, expand_v=1, num_hidden_layers=24),
    "gla": dict(hidden_size=2048, num_heads=4, expand_k=0.5, expand_v=1, num_hidden_layers=24),
}
VECTOR_DECAYS = ("rwkv7", "gla")


class Need(NamedTuple):
    """Bytes that will be written below a folder."""

    what: str
    folder: Path
    size: float


def shape_of(path: str | Path) -> hub.Shape:
    """Layers, heads and state of a host, from the config of a folder or what is known of a hub id; where neither says
    it, as Qwen3.5-0.8B."""
    config = Path(path) / "config.json"
    if config.is_file():
        settings = json.loads(config.read_text())
        settings = settings.get("text_config", settings)
        kind = settings.get("model_type")
        if kind in EXPANDED:
            full = EXPANDED[kind] | settings
            values = [round(full["hidden_size"] * full[name]) // full["num_heads"] for name in ("expand_k", "expand_v")]
            values += [full["num_heads"], full["num_hidden_layers"]]
        else:
            values = [settings.get(name) for name in (*FIELDS.get(kind, ()), "num_hidden_layers")]
        if len(values) == 4 and all(isinstance(x, int) for x in values):
            d_k, d_v, heads, layers = values
            return hub.Shape(layers, heads, d_k, d_v, vector_decay=kind in VECTOR_DECAYS)
    return hub.KNOWN.get(str(path), hub.KNOWN["Qwen/Qwen3.5-0.8B"]).shape


def harvest_bytes(shape: hub.Shape, tokens: int) -> int:
    """Of a cell's factors: key, added, effective and a decay a token, or with vector decays key, added, the decays, erase
    and what it takes; fp32."""
    d_k, d_v = shape.d_k, shape.d_v
    return 4 * tokens * (3 * d_k + 2 * d_v if shape.vector_decay else d_k + 2 * d_v + 1)


def sae_bytes(shape: hub.Shape, settings: TrainingSettings) -> int:
    """Of an SAE's weights; fp32."""
    whole, factors = shape.d_k * shape.d_v, settings.rank * (shape.d_k + shape.d_v)
    encoder = whole if settings.encoder == "dense" else 0 if settings.encoder == "tied" else factors
    decoder = whole if settings.decoder == "flat" else factors
    return 4 * (settings.n_atoms * (encoder + decoder + 1) + whole)


def still_needed(profile: Profile, paths: artifacts.Paths) -> list[Need]:
    """What the profile's run has still to download and to write."""
    data, needs = profile.data, [Need("tables and figures", paths.root, OTHER)]
    for name, section in profile.hosts.items():
        local = artifacts.ROOT / section.path
        shape = shape_of(local if local.exists() else section.path)
        if not local.exists() and not isinstance(try_to_load_from_cache(section.path, "config.json"), str):
            size = hub.KNOWN[section.path].size if section.path in hub.KNOWN else 0.0
            needs.append(Need(f"the weights of {section.path}", Path(constants.HF_HUB_CACHE), size))
        cells = len(section.cells)
        factors = harvest_bytes(shape, data.sae_windows * data.window)
        needs.append(_rest(f"harvests of {name}", paths.build / "harvest", f"{name}-*.safetensors", cells, factors))
        saes, targets = profile.section("saes", name), len(profile.saes.targets)
        counts = dict(main=cells * targets, flat=cells)
        survey = profile.section("replacement", name)
        if survey.survey_firings:
            counts["survey"] = -(-shape.layers // survey.survey_every) * shape.heads * targets
        for role, count in counts.items():
            size = sae_bytes(shape, getattr(saes, role))
            needs.append(
                _rest(f"{role} SAEs of {name}", paths.build / "saes", f"{name}-*-{role}/{WEIGHTS}", count, size)
            )
    return needs


def _rest(what: str, folder: Path, pattern: str, count: int, size: int) -> Need:
    return Need(what, folder, max(0, count - len(list(folder.glob(pattern)))) * size)


def check(profile: Profile, paths: artifacts.Paths, free: Callable[[Path], int] | None = None) -> None:
    """Raise OSError, in one sentence, where a disk has less room than the profile's run has still to write on it.

    free(folder): bytes free below an existing folder.
    """
    free = free or (lambda folder: shutil.disk_usage(folder).free)
    disks: dict[int, list[Need]] = {}
    for need in still_needed(profile, paths):
        folder = next(p for p in (need.folder, *need.folder.absolute().parents) if p.exists())
        disks.setdefault(os.stat(folder).st_dev, []).append(need._replace(folder=folder))
    for needs in disks.values():
        total, left = sum(need.size for need in needs), free(needs[0].folder)
        if left < total:
            largest = sorted(needs, key=lambda need: -need.size)[:3]
            most = ", ".join(f"{need.what} {need.size / 1e9:.1f}" for need in largest)
            raise OSError(
                f"Profile {profile.name} has still to write about {total / 1e9:.1f} GB on the disk of {needs[0].folder} "
                f"(most of it: {most}), and {left / 1e9:.1f} GB are free there: make room, or let WRITESAE_OUTPUT "
                "(results and build) or HF_HOME (weights) name a folder on a larger disk."
            )
