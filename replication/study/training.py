"""Training of all SAEs of a profile: one specification per SAE, and one trainer.

Specifications that share a host run are one task. Each task runs in a process with one thread, so that
results do not depend on the number of processes. An SAE with the same inputs is not trained again, and an
interrupted training continues from its checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from replication.study import fingerprint, stages
from replication.study.profile import PAPER_PLACES, Ablations
from replication.study.study import Study, threads
from writesae.files import up_to_date
from writesae.harvesting import harvest
from writesae.history import History, Origin
from writesae.recurrence import Factors
from writesae.sae.config import Parts
from writesae.sae.train import TrainingSettings, train

VALIDATION_WINDOWS = 64  # held-out windows on which the FVU of an SAE is measured
CHECK_WINDOWS = 8  # training windows of an ablation on which its FVU is measured instead
SURVEY_PARTS = 4  # survey tasks per worker and host, if the profile limits the workers
SINGLE_ATOM = "k1"  # the role of SAEs with one active atom per token
TIED = "tied"  # the first part of the role of SAEs whose encoder is the decoder
NEED_NO_STATES = [("bilinear", "rank1", 1), ("tied", "rank1", 1)]


class SaeSpec(NamedTuple):
    """One SAE of a profile: its cell, target, role and training.

    windows: the number of windows of the SAE split that it uses; check: how many of these, the last ones, are
    used only to measure its FVU (0: the FVU is measured on held-out windows)."""

    host: str
    layer: int
    head: int
    target: str
    role: str
    write: str
    settings: TrainingSettings
    windows: int
    check: int = 0

    @property
    def cell(self) -> tuple[int, int]:
        return self.layer, self.head


class MainVariant(NamedTuple):
    """A way in which the SAEs of the headline's cells are trained; role: in file names and tables."""

    centre: str
    seed: int
    role: str


# Which SAEs there are


def _specs(study: Study, host: str, cells, role: str, settings: TrainingSettings, **changes) -> list[SaeSpec]:
    """Return the SAEs of some cells on all targets of the profile."""
    data, saes = study.profile.data, study.profile.saes
    options = dict(write=saes.write, windows=data.sae_windows) | changes
    targets = options.pop("targets", saes.targets)
    options |= dict(role=role, settings=settings)
    return [SaeSpec(host, *cell, target, **options) for cell in cells for target in targets]


def _settings(study: Study, host: str, role: str) -> TrainingSettings:
    """Return the profile's settings for a role, with the profile's seed."""
    settings = getattr(study.profile.section("saes", host), role)
    return settings.model_copy(update=dict(seed=study.profile.seed))


def main_variants(study: Study, host: str, place: str = "middle") -> list[MainVariant]:
    """Return the variants of the SAEs of a chosen cell: those of `saes.trainings`, with seeds 1,000 apart.

    The SAEs with the data's mean and the profile's seed have the role "main"; all pages use these. Places
    that are not the paper's have the profile's seed only, and no learnt bias."""
    seed, variants = study.profile.seed, []
    trainings = study.profile.section("saes", host).trainings
    if place not in PAPER_PLACES:
        trainings = {centre: 1 for centre in trainings if centre != "bias"}
    for centre, count in trainings.items():
        for other in range(seed, seed + 1000 * count, 1000):
            variants.append(MainVariant(centre, other, main_role(study, centre, other)))
    return variants


def main_role(study: Study, centre: str, seed: int) -> str:
    """Return the role of the main SAEs with this centre and seed."""
    return "main" if (centre, seed) == ("mean", study.profile.seed) else f"main-{centre}-{seed}"


def other_role(centre: str) -> str:
    """Return the role of the SAEs of writes by the other definition."""
    return f"other-{centre}"


def main_specs(study: Study, host: str) -> list[SaeSpec]:
    """Return the SAEs of the chosen cells, one per cell, target and variant."""
    settings, specs = _settings(study, host, "main"), []
    for place in study.profile.hosts[host].cells:
        for centre, seed, role in main_variants(study, host, place):
            changed = settings.model_copy(update=dict(centre=centre, seed=seed))
            specs += _specs(study, host, [study.cell(host, place)], role, changed)
    return specs


def survey_specs(study: Study, host: str, layers) -> list[SaeSpec]:
    """Return the SAEs of the survey, one per target and head of these layers."""
    cells = [(layer, head) for layer in layers for head in range(study.host(host).heads)]
    windows = study.profile.data.survey_windows
    return _specs(study, host, cells, "survey", _settings(study, host, "survey"), windows=windows)


def variants(training: TrainingSettings, ks: list, seeds: list, seed: int) -> list[TrainingSettings]:
    """Return settings for each k (at `seed`) and for each of the seeds (at the default k), the slowest first.

    Raises ValueError for a k above n_atoms.
    """
    pairs = {(k, seed) for k in ks} | {(training.k, other) for other in seeds}
    changes = (dict(k=k, seed=s) for k, s in sorted(pairs, reverse=True))
    return [TrainingSettings(**training.model_dump() | change) for change in changes]


def variant_name(settings: TrainingSettings) -> str:
    """Return the role of a variant in file names and tables."""
    return f"k{settings.k}-seed{settings.seed}"


def host_variants(study: Study, host: str) -> list[TrainingSettings]:
    """Return the settings of the variants of a host in notebook 03."""
    section = study.profile.section("atoms", host)
    training = getattr(study.profile.section("saes", host), section.training)
    return variants(training, section.ks, section.seeds, study.profile.seed)


def seed_variants(study: Study, host: str) -> list[TrainingSettings]:
    """Return the variants that differ in their seed only."""
    section = study.profile.section("atoms", host)
    k = getattr(study.profile.section("saes", host), section.training).k
    return [variant for variant in host_variants(study, host) if variant.k == k]


def ablation_hosts(study: Study) -> dict[str, Ablations]:
    """Return the hosts with ablations in the profile, and their settings.

    Raises ValueError if there are none, and if a variant needs a cell that the host does not have.
    """
    sections = {host: study.profile.section("ablations", host) for host in study.profile.hosts}
    sections = {host: section for host, section in sections.items() if section.firings}
    for host, section in sections.items():
        places = {place for variant in section.variants for place in variant.places}
        if missing := sorted(places - set(study.profile.hosts[host].cells)):
            raise ValueError(f"ablations.variants asks for {', '.join(missing)}, and {host} lacks it.")
    if not sections:
        raise ValueError("ablations.firings is 0 for every host of this profile: set it for one of them.")
    return sections


def ablation_variants(section: Ablations, seed: int) -> list[tuple[str, str, TrainingSettings]]:
    """Return (place, target, settings) of all ablations, slowest first. Raises ValueError for a repeat."""
    training, every = section.training.model_dump() | dict(seed=seed), []
    for variant in section.variants:
        settings = TrainingSettings(**training | variant.model_dump(include={*Parts.model_fields, "initial"}))
        every += [(place, target, settings) for place in variant.places for target in variant.targets]
    names = [(place, target, settings.variant) for place, target, settings in every]
    if len(set(names)) < len(names):
        raise ValueError("ablations.variants names a variant twice for one place and target.")
    return sorted(every, key=lambda x: (x[2].encoder, x[2].decoder, x[2].rank) in NEED_NO_STATES)


def ablation_role(variant: str) -> str:
    """Return the role of an ablation's SAEs."""
    return f"ablation-{variant}"


def write_definitions(factors: Factors) -> tuple[str, ...]:
    """Return the definitions of a write that have rank 1 in these factors, without repeats."""
    if factors.effective is None or torch.equal(factors.added, factors.effective):
        return ("added",)
    return ("added", "effective")


def other_specs(study: Study, host: str) -> list[SaeSpec]:
    """Return the SAEs of writes by the other definition, which notebook 02 does not train."""
    if "write" not in study.profile.saes.targets:
        return []
    specs, settings = [], _settings(study, host, "main")
    for cell in (study.cell(host, place) for place in study.profile.hosts[host].paper_places):
        for write in write_definitions(study.harvested(host, *cell)):
            if write == study.profile.saes.write:
                continue
            for centre in ("mean", "none"):
                changed, options = settings.model_copy(update=dict(centre=centre)), dict(targets=["write"], write=write)
                specs += _specs(study, host, [cell], other_role(centre), changed, **options)
    return specs


# Training them


def train_all(study: Study, specs: list[SaeSpec]) -> pd.DataFrame:
    """Train the SAEs that are not up to date, and return one row per specification, in their order."""
    waiting = [spec for spec in specs if not up_to_date(_record(study, spec), expected(study, spec))]
    tasks = _tasks(study, waiting)
    workers = Parallel(n_jobs=min(study.workers, max(1, len(tasks))), return_as="generator_unordered")
    work = (delayed(train_task)(study, task) for task in tasks)
    for _ in tqdm(workers(work), total=len(tasks), desc="SAE tasks", disable=not tasks):
        pass
    return pd.concat([stages.read_table(_record(study, spec)) for spec in specs], ignore_index=True)


def _tasks(study: Study, specs: list[SaeSpec]) -> list[list[SaeSpec]]:
    """Divide specifications into tasks, the longest first: one per cell, target and kind of role, or several
    survey layers."""
    parts = study.workers * (1 if study.profile.workers is None else SURVEY_PARTS)
    layers: dict[tuple[str, int], int] = {}  # the part of each surveyed layer of a host
    tasks: dict[tuple, list[SaeSpec]] = {}
    for spec in specs:
        place = *spec.cell, spec.target
        if spec.role == "survey":
            number = sum(host == spec.host for host, _ in layers)
            place = layers.setdefault((spec.host, spec.layer), number % parts)
        kind = "main" if spec.role.startswith("main") else spec.role
        tasks.setdefault((spec.host, kind, place), []).append(spec)
    return sorted(tasks.values(), key=lambda task: -sum(x.settings.tokens * x.settings.n_atoms for x in task))


def expected(study: Study, spec: SaeSpec) -> str:
    """Return the fingerprint of an SAE."""
    windows = {split: study.windows_hash(spec.host, split) for split in ("sae", "heldout")}
    inputs = dict(spec=spec, host=study.host_fingerprint(spec.host), windows=windows)
    inputs |= dict(batch=study.profile.data.batch_windows, validation=VALIDATION_WINDOWS)
    return fingerprint.fingerprint([__name__], **inputs)


def _record(study: Study, spec: SaeSpec) -> Path:
    """Return the path of the table of an SAE, which has one row."""
    folder = study.sae_folder(spec.host, *spec.cell, spec.target, spec.role)
    return folder.with_name(f"{folder.name}.csv")


def train_task(study: Study, specs: list[SaeSpec]) -> None:
    """Train SAEs of one host that share their windows, in this process with one thread."""
    first = specs[0]
    with threads(1):
        if first.role == "survey":
            training = _harvest(study, specs, study.windows(first.host, "sae").tokens[: first.windows])
        else:
            training = {spec.cell: study.harvested(spec.host, *spec.cell) for spec in specs}
        validation = training
        if not first.check:
            tokens = study.windows(first.host, "heldout").tokens[:VALIDATION_WINDOWS]
            validation = _harvest(study, specs, tokens)
        for spec in specs:
            began, fitted = time.monotonic(), spec.windows - spec.check
            checked = slice(fitted, spec.windows) if spec.check else slice(None)
            data = _history(study, spec, training[spec.cell], slice(0, fitted))
            held_out = _history(study, spec, validation[spec.cell], checked)
            key = expected(study, spec)
            row = train_one(study, spec, data, held_out, key)
            provenance = study.provenance(spec.host, seconds=time.monotonic() - began, fingerprint=key)
            stages.write_table(pd.DataFrame([row]), _record(study, spec), provenance)


def _harvest(study: Study, specs: list[SaeSpec], tokens: torch.Tensor) -> dict[tuple[int, int], Factors]:
    cells = list(dict.fromkeys(spec.cell for spec in specs))
    return harvest(study.host(specs[0].host), tokens, cells, study.profile.data.batch_windows, progress=False)


def _history(study: Study, spec: SaeSpec, factors: Factors, windows: slice) -> History:
    origin = Origin(spec.host, *spec.cell, spec.write)
    return factors.at(windows).history(spec.target, spec.write, origin).to(study.device)


def train_one(study: Study, spec: SaeSpec, data: History, validation: History, fingerprint: str) -> dict:
    """Train an SAE on histories of its cell (in memory or in shards), save it, and return its row."""
    settings, folder = spec.settings, study.sae_folder(spec.host, *spec.cell, spec.target, spec.role)
    checkpoint = folder.with_name(f"{folder.name}-{fingerprint[:8]}.checkpoint")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    sae, record = train(data, settings, progress=False, checkpoint=checkpoint, validation=validation)
    sae.save(folder)
    checkpoint.unlink(missing_ok=True)
    row = dict(host=spec.host, layer=spec.layer, head=spec.head, role=spec.role, variant=settings.variant)
    row |= dict(target=spec.target, seed=settings.seed, n_atoms=settings.n_atoms, k=settings.k)
    row |= dict(tokens=record.tokens, fvu=record.validation_fvu)
    row |= dict(n_validation=validation.key.shape[:2].numel(), alive=record.alive, dead=record.dead)
    return row | dict(final_training_fvu=record.fvu[-1][1], seconds=record.seconds)


# The tables of the notebooks


def train_saes(study: Study) -> pd.DataFrame:
    """Train the SAEs of notebook 02 and write saes.csv, with one row per SAE.

    They are those of the survey, main ones of all chosen cells, and flat ones (of states) of the paper's.
    """
    surveyed, specs = [], []
    for host, section in study.profile.hosts.items():
        cells = [study.cell(host, place) for place in section.paper_places]
        surveyed = survey_specs(study, host, study.survey_layers(host)) + surveyed
        specs += main_specs(study, host)
        specs += _specs(study, host, cells, "flat", _settings(study, host, "flat"), targets=["state"])
    specs = surveyed + specs
    table = train_all(study, specs)
    heads = ["" if spec.role == "survey" else f"-H{spec.head}" for spec in specs]
    names = [f"{spec.host}-{spec.role}-L{spec.layer}{head}" for spec, head in zip(specs, heads, strict=True)]
    rows = sorted(range(len(specs)), key=names.__getitem__)
    return study.write("saes", table.iloc[rows])


def train_single_atoms(study: Study) -> pd.DataFrame:
    """Train the SAEs of notebook 08 and write baseline_saes.csv.

    They are of the writes of the headline's cells, without the mean and with k = 1, else with the main
    settings."""
    specs = []
    for host, section in study.profile.hosts.items():
        settings = _settings(study, host, "main").model_copy(update=dict(k=1, centre="none"))
        cells = [study.cell(host, place) for place in section.cells]
        specs += _specs(study, host, cells, SINGLE_ATOM, settings, targets=["write"])
    return study.write("baseline_saes", train_all(study, specs))


def tied_specs(study: Study, host: str, place: str) -> list[SaeSpec]:
    """Return the uncentred SAEs of writes of a cell with a tied encoder, one per seed of the others."""
    settings, specs = _settings(study, host, "main"), []
    for variant in main_variants(study, host, place):
        if variant.centre == "none" and "write" in study.profile.saes.targets:
            changed = settings.model_copy(update=dict(encoder="tied", centre="none", seed=variant.seed))
            role = f"{TIED}-{variant.seed}"
            specs += _specs(study, host, [study.cell(host, place)], role, changed, targets=["write"])
    return specs


def train_tied(study: Study) -> pd.DataFrame:
    """Train the SAEs of notebook 19, of the main host, and write tied_saes.csv."""
    place = study.profile.section("atoms", study.main).place
    return study.write("tied_saes", train_all(study, tied_specs(study, study.main, place)))


def train_variants(study: Study) -> pd.DataFrame:
    """Train the SAEs of notebook 03 (other k and seeds, one cell per host) and write variants.csv."""
    specs = []
    for host in study.profile.hosts:
        cell = study.cell(host, study.profile.section("atoms", host).place)
        for settings in host_variants(study, host):
            specs += _specs(study, host, [cell], variant_name(settings), settings)
    return study.write("variants", train_all(study, specs))


def train_ablations(study: Study) -> pd.DataFrame:
    """Train the ablations of notebook 13 and write ablation_saes.csv, with one row per SAE.

    Raises ValueError for more training windows than there are.
    """
    specs, available = [], study.profile.data.sae_windows
    for host, section in ablation_hosts(study).items():
        if (windows := section.training_windows) > available:
            raise ValueError(f"ablations.training_windows is {windows}, above data.sae_windows, {available}.")
        for place, target, settings in ablation_variants(section, study.profile.seed):
            options = dict(targets=[target], windows=windows, check=CHECK_WINDOWS)
            role = ablation_role(settings.variant)
            specs += _specs(study, host, [study.cell(host, place)], role, settings, **options)
    parts = dict(activation=[x.settings.activation for x in specs], rank=[x.settings.rank for x in specs])
    return study.write("ablation_saes", train_all(study, specs).assign(**parts))
