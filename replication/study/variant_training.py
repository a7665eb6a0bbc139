"""Training of the variants of notebook 03: other k, other seeds."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from replication.study import fingerprint, stages
from replication.study import training as saes
from replication.study.study import Suite, open_suite
from writesae import files as files_module
from writesae.harvesting import harvest
from writesae.sae.train import TrainingSettings

# Training the variants, as replication.study.training trains the rest


def variants(training: TrainingSettings, ks: Iterable[int], seeds: Iterable[int], seed: int) -> list[TrainingSettings]:
    """Each k at `seed`, and each of the seeds at the settings' own k; the slowest to train first. No k and no seeds: none.

    Raises ValueError for a k above n_atoms."""
    pairs = {(k, seed) for k in ks} | {(training.k, other) for other in seeds}
    return [TrainingSettings(**training.model_dump() | dict(k=k, seed=s)) for k, s in sorted(pairs, reverse=True)]


def variant_name(settings: TrainingSettings) -> str:
    """The name of a variant in file names and tables."""
    return f"k{settings.k}-seed{settings.seed}"


def host_variants(suite: Suite, host: str) -> list[TrainingSettings]:
    own = suite.profile.section("atoms", host)
    return variants(getattr(suite.profile.section("saes", host), own.training), own.ks, own.seeds, suite.profile.seed)


def seed_variants(suite: Suite, host: str) -> list[TrainingSettings]:
    """Those of the settings' own k, one a seed."""
    own = suite.profile.section("atoms", host)
    k = getattr(suite.profile.section("saes", host), own.training).k
    return [variant for variant in host_variants(suite, host) if variant.k == k]


def train_variants(suite: Suite) -> pd.DataFrame:
    """Every variant of every host, on every target; results variants.csv, a line an SAE as in saes.csv."""
    tasks = []
    for name in suite.profile.hosts:
        cell = suite.cell(name, suite.profile.section("atoms", name).place)
        tasks += [(name, cell, settings) for settings in host_variants(suite, name)]
    work = [delayed(train_task)(suite.profile.name, *task, _expected(suite, *task)) for task in tasks]
    workers = Parallel(n_jobs=min(suite.workers, len(tasks)), return_as="generator_unordered")
    for _ in tqdm(workers(work), total=len(tasks), desc="SAE variants"):
        pass
    return suite.write("variants", pd.concat([stages.read_table(_record(suite, *t)) for t in tasks]))


def _expected(suite: Suite, host: str, cell: tuple[int, int], settings: TrainingSettings) -> str:
    own = suite.profile.saes
    inputs = dict(data=suite.profile.data, write=own.write, targets=own.targets, cell=cell, settings=settings)
    return fingerprint.fingerprint(modules=[__name__], host=suite.host_fingerprint(host), **inputs)


def _record(suite: Suite, host: str, cell: tuple[int, int], settings: TrainingSettings):
    return suite.paths.build / "saes" / f"{host}-{variant_name(settings)}-L{cell[0]}-H{cell[1]}.csv"


def train_task(profile_name: str, host: str, cell: tuple[int, int], settings: TrainingSettings, expected: str) -> None:
    suite = open_suite(profile_name, lock=False)
    torch.set_num_threads(1)
    train_variant(suite, host, cell, settings, expected)


def train_variant(suite: Suite, host: str, cell: tuple[int, int], settings: TrainingSettings, expected: str) -> None:
    """Train a variant on every target from the cell's harvest, and write their lines; nothing where that was done."""
    record = _record(suite, host, cell, settings)
    if files_module.up_to_date(record, expected):
        return
    began, data, targets = time.monotonic(), suite.profile.data, suite.profile.saes.targets
    checking = suite.windows(host, "heldout")[slice(0, saes.VALIDATION_WINDOWS)].tokens
    validation = harvest(suite.host(host), checking, [cell], data.batch_windows, progress=False)[cell]
    training = files_module.load_tensors(saes.harvest_path(suite, host, *cell))[0]
    lines = [
        saes.train_one(suite, host, variant_name(settings), cell, target, settings, training, validation, expected)
        for target in targets
    ]
    made = dict(seconds=time.monotonic() - began, fingerprint=expected)
    stages.write_table(pd.DataFrame(lines), record, suite.provenance(host, **made))
