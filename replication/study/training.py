"""Notebooks 01 and 02: the harvest of the headline's cells, and an SAE for every cell and target.

A task is one cell (or, in the survey, some layers): it writes its SAEs and its lines of the table atomically and skips
what is there, so that killed or lost tasks are simply run again. Tasks run one to a core, each with one
thread, so that results do not depend on how many run at once.
"""

from __future__ import annotations

import time

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from replication.study import fingerprint, stages
from replication.study.study import Suite, open_suite
from writesae import files
from writesae.harvesting import harvest, history
from writesae.sae import model
from writesae.sae.train import TrainingSettings, train

VALIDATION_WINDOWS = 64
SURVEY_PARTS = 4  # of a host's layers, harvested one after the other where the profile says how much is done at once


def harvest_path(suite: Suite, host: str, layer: int, head: int):
    return suite.paths.build / "harvest" / f"{host}-L{layer}-H{head}.safetensors"


def train_saes(suite: Suite) -> pd.DataFrame:
    """Every SAE of the profile; results saes.csv, a line an SAE."""
    tasks, jobs = [], suite.workers
    parts = jobs * (1 if suite.profile.workers is None else SURVEY_PARTS)
    for name in suite.profile.hosts:
        cells = [suite.cell(name, place) for place in suite.profile.hosts[name].cells]
        tasks += [(name, role, [layer], head) for role in ("main", "flat") for layer, head in cells]
        layers = suite.survey_layers(name)
        tasks = [(name, "survey", layers[i::parts], None) for i in range(min(parts, len(layers)))] + tasks
    run = delayed(train_task)
    arguments = [
        run(suite.profile.name, *task, [fingerprint_of(suite, *one) for one in _singly(task)]) for task in tasks
    ]
    workers = Parallel(n_jobs=min(jobs, len(tasks)), return_as="generator_unordered")
    for _ in tqdm(workers(arguments), total=len(tasks), desc="SAE tasks"):
        pass
    records = sorted({_record(suite, *one) for task in tasks for one in _singly(task)})
    return suite.write("saes", pd.concat([stages.read_table(path) for path in records], ignore_index=True))


def _singly(task: tuple) -> list[tuple]:
    """The (host, role, layer, head) of a task, which may have several layers: each has its own record."""
    host, role, layers, head = task
    return [(host, role, layer, head) for layer in layers]


def fingerprint_of(suite: Suite, host: str, role: str, layer: int, head: int | None) -> str:
    """What the SAEs of a task's layer depend on."""
    profile = suite.profile
    inputs = dict(data=profile.data, write=profile.saes.write, targets=profile.saes.targets, seed=profile.seed)
    settings = getattr(profile.section("saes", host), role)
    return fingerprint.fingerprint(
        modules=[__name__], host=suite.host_fingerprint(host), layer=layer, head=head, settings=settings, **inputs
    )


def _record(suite: Suite, host: str, role: str, layer: int, head: int | None):
    return suite.paths.build / "saes" / f"{host}-{role}-L{layer}{'' if head is None else f'-H{head}'}.csv"


def train_task(
    profile_name: str, host: str, role: str, layers: list[int], head: int | None, expected: list[str]
) -> None:
    """Train the SAEs of a head (all heads where it is None) of each layer on every target, and write their lines; the
    layers are harvested in one pass."""
    suite, began = open_suite(profile_name, lock=False), time.monotonic()
    torch.set_num_threads(1)
    missing = {
        layer: want
        for layer, want in zip(layers, expected, strict=True)
        if not files.up_to_date(_record(suite, host, role, layer, head), want)
    }
    if not missing:
        return
    profile = suite.profile
    settings = getattr(profile.section("saes", host), role).model_copy(update=dict(seed=profile.seed))
    heads = range(suite.host(host).heads) if head is None else [head]
    cells = [(layer, h) for layer in missing for h in heads]
    checking = suite.windows(host, "heldout")[slice(0, VALIDATION_WINDOWS)].tokens
    validation = harvest(suite.host(host), checking, cells, profile.data.batch_windows, progress=False)
    if role != "survey":
        training = {cell: files.load_tensors(harvest_path(suite, host, *cell))[0] for cell in cells}
    else:
        tokens = suite.windows(host, "sae")[slice(0, profile.data.survey_windows)].tokens
        training = harvest(suite.host(host), tokens, cells, profile.data.batch_windows, progress=False)
    for layer, want in missing.items():
        lines = [
            train_one(suite, host, role, cell, target, settings, training[cell], validation[cell], want)
            for cell in cells
            if cell[0] == layer
            for target in (profile.saes.targets if role != "flat" else ["state"])
        ]
        made = dict(seconds=time.monotonic() - began, fingerprint=want)
        record = _record(suite, host, role, layer, head)
        stages.write_table(pd.DataFrame(lines), record, suite.provenance(host, **made))


def train_one(suite, host, role, cell, target, settings: TrainingSettings, factors, checking, expected: str) -> dict:
    """Train an SAE of a cell on its harvested factors, resumably, and save it; its line of saes.csv."""
    data, validation = (history(x, target, suite.profile.saes.write).to(suite.device) for x in (factors, checking))
    return train_on(suite, host, role, cell, target, settings, data, validation, expected)


def train_on(suite, host, role, cell, target, settings: TrainingSettings, data, validation, expected: str) -> dict:
    """The same on histories of the cell, in memory or in shards."""
    stem = suite.sae_stem(host, *cell, target, role)
    write, checkpoint = suite.profile.saes.write, stem.with_name(stem.name + f"-{expected[:8]}.checkpoint")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trained, record = train(data, settings, progress=False, checkpoint=checkpoint, validation=validation)
    shape = settings.kind | dict(n_atoms=settings.n_atoms, k=settings.k)
    place = dict(host=host, layer=cell[0], head=cell[1])
    config = model.SAEConfig(
        **place, target=target, write=write, **shape, d_k=data.d_k, d_v=data.d_v, seed=settings.seed
    )
    model.save(trained, config, stem)
    checkpoint.unlink(missing_ok=True)
    return place | dict(
        role=role,
        variant=settings.variant,
        target=target,
        seed=settings.seed,
        n_atoms=settings.n_atoms,
        k=settings.k,
        tokens=record.tokens,
        fvu=record.validation_fvu,
        n_validation=validation.key.shape[0] * validation.key.shape[1],
        alive=record.alive,
        dead=record.dead,
        final_training_fvu=record.fvu[-1][1],
        seconds=record.seconds,
    )
