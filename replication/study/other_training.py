"""Training of the SAEs of the other definition of a write (notebook 11, multiverse)."""

from __future__ import annotations

import copy
import time

import pandas as pd
import torch
from joblib import Parallel, delayed

from replication.study import fingerprint, stages
from replication.study import training as saes
from replication.study.study import Suite, threads
from writesae import files
from writesae.harvesting import harvest
from writesae.recurrence import Factors

# The stage: which firings, of which SAEs.


def definitions(factors: Factors) -> tuple[str, ...]:
    """The write definitions of a harvest that are of rank 1 and differ from one another, its first one first."""
    if factors.effective is None or torch.equal(factors.added, factors.effective):
        return ("added",)
    return ("added", "effective")


def _under(suite: Suite, write: str) -> Suite:
    """The same suite with another definition of the native write."""
    other = copy.copy(suite)
    changed = suite.profile.saes.model_copy(update=dict(write=write))
    other.profile = suite.profile.model_copy(update=dict(saes=changed))
    return other


def _sae(suite: Suite, name: str, cell, target: str, write: str):
    """States do not depend on the definition of a write; SAEs of the other definition's writes have the role `other`."""
    if target == "state" or write == suite.profile.saes.write:
        return suite.sae(name, *cell, target)
    return _under(suite, write).sae(name, *cell, target, "other")


def train_other(suite: Suite, name: str) -> pd.DataFrame:
    """A write-trained SAE of each cell for the definition that notebook 02 has not used; empty where there is none."""
    tasks = []
    for cell in (suite.cell(name, place) for place in suite.profile.hosts[name].cells):
        for write in definitions(saes.load_harvest(suite, name, *cell)):
            if write != suite.profile.saes.write and "write" in suite.profile.saes.targets:
                tasks.append((cell, write))
    if not tasks:
        return pd.DataFrame()
    workers = Parallel(n_jobs=min(suite.workers, len(tasks)))
    return pd.concat(workers(delayed(_train_cell)(suite, name, *task) for task in tasks), ignore_index=True)


def _train_cell(suite: Suite, name: str, cell, write: str) -> pd.DataFrame:
    """One SAE, trained as its sisters of notebook 02 are; skipped where it is there."""
    profile = suite.profile
    settings = profile.section("saes", name).main.model_copy(update=dict(seed=profile.seed))
    expected = fingerprint.fingerprint(
        modules=[saes.__name__],
        host=suite.host_fingerprint(name),
        data=profile.data,
        settings=settings,
        cell=cell,
        write=write,
    )
    stem = suite.sae_stem(name, *cell, "write", "other")
    record = stem.with_suffix(".csv")
    if not files.up_to_date(record, expected):
        began = time.monotonic()
        checking = suite.windows(name, "heldout")[slice(0, saes.VALIDATION_WINDOWS)].tokens
        with threads(1):
            validation = harvest(suite.host(name), checking, [cell], profile.data.batch_windows, progress=False)[cell]
            training, under = saes.load_harvest(suite, name, *cell), _under(suite, write)
            line = saes.train_one(under, name, "other", cell, "write", settings, training, validation, expected)
        made = dict(seconds=time.monotonic() - began, fingerprint=expected)
        stages.write_table(pd.DataFrame([line | dict(write=write)]), record, suite.provenance(name, **made))
    return stages.read_table(record)
