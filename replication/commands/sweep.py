"""Train and test the SAEs of a grid (host x layer x head x variant x seed) in several processes.

A task harvests one layer, or trains and tests a few SAEs of a layer. An interrupted sweep continues from the
files in build/<profile>/sweeps/<grid>. The result, results/<profile>/sweep-<grid>.csv, has one row per SAE.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from itertools import groupby, islice, product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from pydantic import Field, NonNegativeInt
from tqdm import tqdm

from replication.commands import CommandError, check_disk, positive, read_yaml
from replication.statistics import wilson
from replication.study import paths as paths_module
from replication.study import stages
from replication.study.fingerprint import fingerprint
from replication.study.firings import CONDITIONS_OF_SURVEYS, drawn_positions, firings_of
from replication.study.lock import writing
from replication.study.profile import Profile, Section, Target, load_profile
from replication.study.study import OUT_OF_MEMORY, Study, threads
from replication.study.training import VALIDATION_WINDOWS, SaeSpec, train_one
from replication.study.yaml_files import checked
from writesae.evaluate.cells import survey_cells
from writesae.evaluate.firings import CellSAE, draw_in_rounds, encode_cell, firings_at
from writesae.evaluate.replacement import AMPLITUDES, measure_group
from writesae.files import load_tensors, read_sidecar, save_tensors, up_to_date
from writesae.harvesting import ShardedHistory, harvest, harvest_shards
from writesae.recurrence import Factors
from writesae.sae.train import TrainingSettings
from writesae.text import Windows

IN_MEMORY = 2**28  # maximum size of a cell's training data in memory, in numbers (1 GiB in fp32)
TESTED = (*AMPLITUDES, "projection")
TOGETHER = 8  # maximum of SAEs per task; their replacement tests share one run of the host
TASK_TOKENS = 2**21  # maximum of training tokens of a task with several SAEs, since a task is lost as a whole


class Variant(Section):
    """One kind of SAE: the profile's settings for a role, replaced by those in `settings`."""

    role: Literal["main", "survey", "flat"]
    target: Target
    settings: dict = {}


class Grid(Section):
    """A file in profiles/sweeps/; keep: whether SAEs stay in build/.

    firings: tested per SAE (0: no test). draw: "positions" takes them at places that are uniform over
    positions and the same for all SAEs of a host; "atoms" takes equally many of every atom."""

    name: str
    hosts: Literal["all", "main"] | list[str] = Field(min_length=1)
    layers: Literal["all", "headline"] | list[NonNegativeInt] = Field(min_length=1)
    heads: Literal["all"] | list[NonNegativeInt] = Field(min_length=1)
    variants: dict[Annotated[str, Field(pattern=r"^\w+$")], Variant] = Field(min_length=1)  # names of files
    seeds: list[int] = Field(min_length=1)
    firings: NonNegativeInt = 0
    draw: Literal["positions", "atoms"] = "positions"
    keep: bool = True


def load_grid(path: Path | str) -> Grid:
    """Return the grid in a YAML file, named after it; the name is enough for a file in profiles/sweeps/.

    Raises ValueError if the file is missing or wrong."""
    folder = paths_module.ROOT / "profiles" / "sweeps"
    grid = folder / f"{path}.yaml"
    file = grid if grid.is_file() else paths_module.typed(path)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("[!.]*.yaml")))
        raise ValueError(f"There is no grid {path}: profiles/sweeps/ has {known}.")
    if file != grid and (same := folder / file.name).is_file() and not same.samefile(file):
        raise ValueError(f"{file} and {same} would write the same tables: give your grid another name.")
    return read_yaml(Grid, file, f"Grid {file.name}", name=file.stem)


class Point(NamedTuple):
    host: str
    layer: int
    head: int
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.host}-L{self.layer}-H{self.head}-{self.variant}-s{self.seed}"


class Sweep:
    """A grid for one profile: its points, their files, and the fingerprints of those files."""

    def __init__(self, profile: Profile, grid: Grid):
        self.profile, self.grid, self.study = profile, grid, Study(profile)
        self.folder = self.study.paths.build / "sweeps" / grid.name

    def record(self, point: Point) -> Path:
        """Return the path of the table, with one row, of an SAE."""
        return self.folder / "saes" / f"{point}.csv"

    def heldout(self, host: str, layer: int, head: int) -> Path:
        """Return the path of a cell's factors over the held-out windows and of their tokens."""
        return self.folder / "harvest" / host / f"heldout-L{layer}-H{head}.safetensors"

    def memory(self, host: str, layer: int) -> Path:
        """Return the path of the half-lives and spectra of a layer's cells."""
        return self.folder / "memory" / f"{host}-L{layer}.csv"

    def sae(self, point: Point) -> tuple[str, int, int, str, str]:
        """Return the arguments of `Study.sae`: host, layer, head, target, role."""
        role = f"sweep-{self.grid.name}-{point.variant}-s{point.seed}"
        return *point[:3], self.grid.variants[point.variant].target, role

    def points(self) -> list[Point]:
        """Return all SAEs of the grid. Raises ValueError for none, and for a missing host or cell."""
        grid, profile = self.grid, self.profile
        named = {"all": list(profile.hosts), "main": [self.study.main]}
        hosts = grid.hosts if isinstance(grid.hosts, list) else named[grid.hosts]
        for name in hosts:
            self.study.host_path(name)  # ValueError for an unknown host
        cells = [(host, *cell) for host in hosts for cell in self.cells(host)]
        points = [Point(*cell, *rest) for cell in cells for rest in product(grid.variants, grid.seeds)]
        if not points:
            raise ValueError(f"Grid {grid.name} has no cell in profile {profile.name}: name layers and heads.")
        for point in points:
            self.settings(point)
        return list(dict.fromkeys(points))

    def cells(self, host: str) -> list[tuple[int, int]]:
        """Return the (layer, head) of the grid on a host. Raises ValueError if one is not recurrent."""
        model, grid = self.study.host(host), self.grid
        rules = self.profile.hosts[host].cells.values()
        named = {"all": model.recurrent_layers, "headline": sorted({rule.layer for rule in rules} - {None})}
        layers = grid.layers if isinstance(grid.layers, list) else named[grid.layers]
        heads = grid.heads if isinstance(grid.heads, list) else range(model.heads)
        cells = list(dict.fromkeys(product(layers, heads)))
        for cell in cells:
            model.check_cell(*cell)
        return cells

    def settings(self, point: Point) -> TrainingSettings:
        """Return the training settings of an SAE. Raises ValueError if they are invalid."""
        variant = self.grid.variants[point.variant]
        base = getattr(self.profile.section("saes", point.host), variant.role).model_dump()
        with checked(f"Grid {self.grid.name}: variants.{point.variant}"):
            return TrainingSettings(**base | variant.settings | dict(seed=point.seed))

    def training_windows(self, variant: str) -> int:
        """Return the number of training windows of a variant."""
        data = self.profile.data
        return data.survey_windows if self.grid.variants[variant].role == "survey" else data.sae_windows

    def test_windows(self, host: str) -> int:
        """Return the number of held-out windows of the replacement test."""
        return self.profile.section("replacement", host).survey_windows

    def expected(self, host: str, **inputs) -> str:
        code = dict(modules=[__name__], host=self.study.host_fingerprint(host))
        return fingerprint(**code, data=self.profile.data, **inputs)

    def expected_harvest(self, host: str, layer: int) -> str:
        counts = max(map(self.training_windows, self.grid.variants)), self.test_windows(host)
        return self.expected(host, layer=layer, counts=counts)

    def expected_record(self, point: Point) -> str:
        inputs = dict(point=point, variant=self.grid.variants[point.variant], settings=self.settings(point))
        inputs |= dict(write=self.profile.saes.write, seed=self.profile.seed)
        inputs |= dict(firings=self.grid.firings, draw=self.grid.draw)
        return self.expected(point.host, **inputs, replacement=self.profile.section("replacement", point.host))


# In a worker process


def run_task(work: Callable, profile: Profile, grid: Grid, host: str, layer: int, expected) -> list[str]:
    """Return the failures, one sentence each, of work(sweep, host, layer, expected), run with one thread."""
    try:
        with threads(1):
            return work(Sweep(profile, grid), host, layer, expected)
    except (ValueError, FloatingPointError) as error:
        return [f"{host}-L{layer}: {error}"]
    except torch.OutOfMemoryError:
        return [f"{host}-L{layer}: {OUT_OF_MEMORY}"]


def harvest_layer(sweep: Sweep, host: str, layer: int, expected: str) -> list[str]:
    """Store the factors of a layer's cells (shards for training, one held-out file per cell), and half-lives
    and spectra of all its cells."""
    study, data = sweep.study, sweep.profile.data
    cells = [cell for cell in sweep.cells(host) if cell[0] == layer]
    files, memory = {cell: sweep.heldout(host, *cell) for cell in cells}, sweep.memory(host, layer)
    if up_to_date([*files.values(), memory], expected):
        return []
    began, model, windows = time.monotonic(), study.host(host), study.windows(host, "sae")
    training = windows.tokens[: max(map(sweep.training_windows, sweep.grid.variants))]
    harvest_shards(model, training, cells, sweep.folder / "harvest" / host, expected, batch=data.batch_windows)
    checking = study.windows(host, "heldout")[slice(0, max(VALIDATION_WINDOWS, sweep.test_windows(host)))]
    factors = harvest(model, checking.tokens, cells, data.batch_windows, progress=False)
    for cell, path in files.items():
        tensors = factors[cell].tensors() | dict(tokens=checking.tokens, passage=checking.passage)
        save_tensors(path, tensors, {"fingerprint": expected})
    run = model.run(windows.tokens[: data.cell_windows], upto=layer + 1)
    table = survey_cells(model, run, data.first_position, cells).assign(host=host)
    seconds = time.monotonic() - began
    stages.write_table(table, memory, study.provenance(host, seconds=seconds, fingerprint=expected))
    return []


def train_points(sweep: Sweep, host: str, layer: int, expected: dict[Point, str]) -> list[str]:
    """Train and test SAEs of one layer, and write the row of each. Return a sentence per failure."""
    study, rows, tests, failures = sweep.study, {}, {}, []
    for point, wanted in expected.items():
        began = time.monotonic()
        try:
            row = train_point(sweep, point, wanted)
            if sweep.grid.firings:
                tests[point] = draw_test(sweep, point)
        except (ValueError, FloatingPointError) as error:
            failures.append(f"{point}: {error}")
            continue
        rows[point] = row, time.monotonic() - began
    began, scores = time.monotonic(), replacement_scores(sweep, tests)
    shared = (time.monotonic() - began) / max(1, len(rows))
    for point, (row, seconds) in rows.items():
        provenance = study.provenance(host, seconds=seconds + shared, fingerprint=expected[point])
        stages.write_table(pd.DataFrame([row | scores.get(point, {})]), sweep.record(point), provenance)
        if not sweep.grid.keep:
            shutil.rmtree(study.sae_folder(*sweep.sae(point)))
    return failures


def train_point(sweep: Sweep, point: Point, expected: str) -> dict:
    """Train an SAE on the harvest of its cell and store it in build/. Return its row."""
    (host, *_, target, role), write = sweep.sae(point), sweep.profile.saes.write
    count = sweep.training_windows(point.variant)
    training = ShardedHistory(sweep.folder / "harvest" / host, point[1:3], target, write, count)
    if training.numbers <= IN_MEMORY:
        training = training[:]
    validation = _heldout(sweep, point, VALIDATION_WINDOWS)[0].history(target, write)
    spec = SaeSpec(*point[:3], target, role, write, sweep.settings(point), len(training))
    row = train_one(sweep.study, spec, training, validation, expected)
    return dict(name=point.variant) | row | dict(role=sweep.grid.variants[point.variant].role)


def _heldout(sweep: Sweep, point: Point, count: int) -> tuple[Factors, Windows]:
    """Return the factors of a point's cell over the first `count` held-out windows, and those windows."""
    tensors, _ = load_tensors(sweep.heldout(*point[:3]))
    windows = Windows(tensors.pop("tokens"), tensors.pop("passage"))
    return Factors(query=None, **tensors).at(slice(count)), windows[slice(count)]


def draw_test(sweep: Sweep, point: Point) -> tuple[Windows, CellSAE, pd.DataFrame]:
    """Return the windows of the replacement test, the SAE on them, and `Grid.firings` of its firings."""
    study, profile = sweep.study, sweep.profile
    factors, windows = _heldout(sweep, point, sweep.test_windows(point.host))
    target, sae = sweep.grid.variants[point.variant].target, study.sae(*sweep.sae(point))
    subject = encode_cell(point[1:3], target, profile.saes.write, sae, factors)
    if sweep.grid.draw == "positions":
        drawn = firings_at(subject, drawn_positions(study, windows, sweep.grid.firings))
    else:
        every = firings_of(study, subject, windows)
        drawn = draw_in_rounds(every, min(sweep.grid.firings, len(every)), profile.seed)
    return windows, subject, drawn


def replacement_scores(sweep: Sweep, tests: dict[Point, tuple]) -> dict[Point, dict]:
    """Return the columns of the replacement tests at t + 1. tests: from `draw_test`, of one layer."""
    if not tests:
        return {}
    first = next(iter(tests))
    host, profile = sweep.study.host(first.host), sweep.profile
    windows, size = tests[first][0], profile.data.batch_windows
    drawn = [(subject, firings.assign(point=str(point))) for point, (_, subject, firings) in tests.items()]
    rows = profile.section("replacement", first.host).batch_rows
    options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",), amplitudes=TESTED, batch_rows=rows)
    starts = range(0, len(windows), size)
    table = pd.concat(measure_group(host, windows, drawn, start, size, profile.seed, **options) for start in starts)
    return {point: _shares(table[table.point == str(point)]) for point in tests} if len(table) else {}


def _shares(table: pd.DataFrame) -> dict:
    """Return the number of tested firings, and per amplitude the share of firings at which each replacement
    beats deletion, for the atom with its Wilson interval."""
    scores = dict(firings=len(table) // len(TESTED))
    for amplitude, part in table.groupby("amplitude", sort=False):
        wins = {name: int((part[f"kl_{name}"] < part.kl_delete).sum()) for name in CONDITIONS_OF_SURVEYS[1:]}
        scores |= {f"win_{name}_{amplitude}": count / len(part) for name, count in wins.items()}
        low, high = wilson(wins["atom"], len(part))
        scores |= {f"ci_low_atom_{amplitude}": low, f"ci_high_atom_{amplitude}": high}
    return scores


# In the process that starts a sweep


def run_sweep(profile: Profile, grid: Grid, jobs: int | None = None) -> pd.DataFrame:
    """Run what is not up to date in `jobs` processes (None: one per core), and write the table of the sweep.

    Raises ValueError if the grid does not fit the profile, CommandError if tasks fail, and LockError."""
    sweep = Sweep(profile, grid)
    with writing(sweep.study.paths):
        expected = {point: sweep.expected_record(point) for point in sweep.points()}
        waiting = [point for point in expected if not up_to_date(sweep.record(point), expected[point])]
        unknown = [point for point in expected if not sweep.memory(point.host, point.layer).is_file()]
        layers = list(dict.fromkeys((point.host, point.layer) for point in waiting + unknown))
        for host in dict.fromkeys(host for host, _ in layers):
            sweep.study.windows(host, "sae"), sweep.study.windows(host, "heldout")
        tasks, tokens = [], {point: sweep.settings(point).tokens for point in waiting}
        longest_first = sorted(waiting, key=lambda point: -tokens[point])
        for (*layer, count), points in groupby(longest_first, lambda point: (*point[:2], tokens[point])):
            while part := list(islice(points, max(1, min(TOGETHER, TASK_TOKENS // count)))):
                tasks.append((train_points, profile, grid, *layer, {point: expected[point] for point in part}))
        print(f"{grid.name} ({profile.name}): {len(expected)} SAEs, {len(expected) - len(waiting)} of them up to date")
        harvests = [(harvest_layer, profile, grid, *layer, sweep.expected_harvest(*layer)) for layer in layers]
        _run_all(harvests, "harvests", jobs)
        _run_all(tasks, "SAEs", jobs)
        shutil.rmtree(sweep.folder / "harvest", ignore_errors=True)
        return _table(sweep, list(expected))


def _run_all(tasks: list[tuple], what: str, jobs: int | None) -> None:
    """Run tasks in worker processes. Raises CommandError if some failed, after all others are done."""
    pool = Parallel(jobs or cpu_count(), return_as="generator_unordered", batch_size=1)
    try:
        results = tqdm(pool(delayed(run_task)(*task) for task in tasks), total=len(tasks), desc=what)
        failures = sorted(sentence for sentences in results for sentence in sentences)
    except TerminatedWorkerError as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(f"The workers of a sweep ended ({reason}); what is done is kept.") from error
    if failures:
        raise CommandError(f"{len(failures)} {what} failed, the others are done. {failures[0]}")


def _table(sweep: Sweep, points: list[Point]) -> pd.DataFrame:
    """Write and return the rows of all SAEs as one table, with half-life and sigma1/sigma2 of their cells."""
    records, keys = [sweep.record(point) for point in points], ["host", "layer", "head"]
    rows = pd.concat(map(stages.read_table, records), ignore_index=True)
    places = dict.fromkeys((point.host, point.layer) for point in points)
    memory = pd.concat([stages.read_table(sweep.memory(*place)) for place in places], ignore_index=True)
    whole = rows.merge(memory[[*keys, "half_life_median", "sigma1_over_sigma2"]], on=keys, how="left")
    seconds = sum(read_sidecar(path)["seconds"] for path in records)
    return sweep.study.write(f"sweep-{sweep.grid.name}", whole, seconds=round(seconds, 3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("--grid", required=True, help="a name in profiles/sweeps/, or a file")
    parser.add_argument("--jobs", type=positive, help="the number of processes (default: one per core)")


def main(options: argparse.Namespace) -> int:
    profile, grid = load_profile(options.profile), load_grid(options.grid)
    check_disk(options.profile)
    table = run_sweep(profile, grid, options.jobs)
    print(f"{len(table)} SAEs in results/{profile.name}/sweep-{grid.name}.csv")
    return 0
