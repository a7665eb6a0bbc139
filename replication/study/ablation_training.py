"""Training of the SAEs of notebook 11 (ablations)."""

from __future__ import annotations

import time

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from replication.study import fingerprint, stages
from replication.study import training as saes
from replication.study.profile import Ablations
from replication.study.study import Suite, open_suite
from writesae import files as files_module
from writesae.sae.train import TrainingSettings

NEED_NO_STATES = [("bilinear", "rank1", 1), ("tied", "rank1", 1)]
CHECK_WINDOWS = 8  # of the training windows, kept from training to see how it went


# Training


def variants(own: Ablations, seed: int) -> list[tuple[str, str, TrainingSettings]]:
    """(place, target, settings) of every SAE, those that take longest first. Raises ValueError where two are the same."""
    found = [
        (place, target, TrainingSettings(**own.training.model_dump() | one.parts() | dict(seed=seed)))
        for one in own.variants
        for place in one.places
        for target in one.targets
    ]
    names = [(place, target, settings.variant) for place, target, settings in found]
    if len(set(names)) < len(names):
        raise ValueError("ablations.variants names a variant twice for one place and target.")
    return sorted(found, key=lambda one: (one[2].encoder, one[2].decoder, one[2].rank) in NEED_NO_STATES)


def role(variant: str) -> str:
    """Of a variant's SAEs in the names of files."""
    return f"ablation-{variant}"


def asked(suite: Suite) -> dict[str, Ablations]:
    """The hosts that the profile asks, with their settings. Raises ValueError where it asks none, or a cell that is not there."""
    sections = {name: suite.profile.section("ablations", name) for name in suite.profile.hosts}
    found = {name: own for name, own in sections.items() if own.firings}
    for name, own in found.items():
        lacking = {place for one in own.variants for place in one.places} - set(suite.profile.hosts[name].cells)
        if lacking:
            raise ValueError(f"ablations.variants asks for {', '.join(sorted(lacking))}, and {name} has no such cell.")
    if not found:
        raise ValueError("ablations.firings is 0 for every host of this profile: give it a number for one of them.")
    return found


def train_variants(suite: Suite) -> pd.DataFrame:
    """Train every variant; results ablation_saes.csv, a line an SAE. Its FVU is on the few windows kept from training."""
    tasks = [
        (name, suite.cell(name, place), target, settings)
        for name, own in asked(suite).items()
        for place, target, settings in variants(own, suite.profile.seed)
    ]
    work = [delayed(train_task)(suite.profile.name, *task, _expected(suite, *task)) for task in tasks]
    workers = Parallel(n_jobs=min(suite.workers, len(tasks)), return_as="generator_unordered")
    for _ in tqdm(workers(work), total=len(tasks), desc="SAE ablations"):
        pass
    return suite.write("ablation_saes", pd.concat([stages.read_table(_record(suite, *t)) for t in tasks]))


def _expected(suite: Suite, host: str, cell: tuple[int, int], target: str, settings: TrainingSettings) -> str:
    inputs = dict(data=suite.profile.data, write=suite.profile.saes.write, target=target, cell=cell, settings=settings)
    windows = suite.profile.section("ablations", host).training_windows
    return fingerprint.fingerprint(modules=[__name__], host=suite.host_fingerprint(host), windows=windows, **inputs)


def _record(suite: Suite, host: str, cell: tuple[int, int], target: str, settings: TrainingSettings):
    return suite.sae_stem(host, *cell, target, role(settings.variant)).with_suffix(".csv")


def train_task(profile: str, host: str, cell: tuple, target: str, settings: TrainingSettings, expected: str) -> None:
    suite = open_suite(profile, lock=False)
    torch.set_num_threads(1)
    train_variant(suite, host, cell, target, settings, expected)


def train_variant(suite: Suite, host: str, cell, target: str, settings: TrainingSettings, expected: str) -> None:
    """Train a variant from the cell's harvest and write its line; nothing where that was done."""
    record, began = _record(suite, host, cell, target, settings), time.monotonic()
    if files_module.up_to_date(record, expected):
        return
    factors = files_module.load_tensors(saes.harvest_path(suite, host, *cell))[0]
    count = suite.profile.section("ablations", host).training_windows
    training, checking = ({n: x[part] for n, x in factors.items()} for part in _split(count, len(factors["key"])))
    line = saes.train_one(
        suite, host, role(settings.variant), cell, target, settings, training, checking, expected
    ) | dict(activation=settings.activation, rank=settings.rank)
    made = dict(seconds=time.monotonic() - began, fingerprint=expected)
    stages.write_table(pd.DataFrame([line]), record, suite.provenance(host, **made))


def _split(count: int, there: int) -> tuple[slice, slice]:
    if count > there:
        raise ValueError(f"ablations.training_windows is {count}, and data.sae_windows only {there}: lower the former.")
    return slice(0, count - CHECK_WINDOWS), slice(count - CHECK_WINDOWS, count)
