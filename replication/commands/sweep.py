"""Sweeps: a grid of SAEs, host x layer x head x variant x seed, each trained and evaluated as a task of its own.

    python -m replication.commands.sweep --profile mini --grid profiles/sweeps/cells.yaml [--dask tcp://scheduler:8786]

A grid is a file in profiles/sweeps/; its fields are those of `Grid`. Two stages of tasks: the harvest of one layer, and
the training and evaluation of a few SAEs of a layer, whose replacement tests share one run of the host. Tasks run in
processes of this machine or, where the address of a Dask scheduler is given, on its workers. Each has one thread, writes
what it makes atomically into build/<profile>/sweeps/<grid>, and skips what is there: on a cluster, a task that is lost
with its worker is run again by another one, and a sweep that was interrupted goes on where it stopped. All workers must
see the same folder, hold the same code, and run one task at a time (`dask worker ADDRESS --nthreads 1`). The result is one
table, results/<profile>/sweep-<grid>.csv, a line an SAE.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import yaml
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from pydantic import Field, NonNegativeInt, ValidationError, field_validator
from tqdm import tqdm

from replication.statistics import wilson
from replication.study import fingerprint, stages
from replication.study import paths as paths_module
from replication.study.firings import firings_of
from replication.study.profile import Profile, Section, Target, load_profile
from replication.study.study import Suite, threads
from replication.study.training import VALIDATION_WINDOWS, train_on
from writesae import files as files_module
from writesae.evaluate.cells import survey_cells
from writesae.evaluate.firings import CellSAE, draw_in_rounds, encode_cell
from writesae.evaluate.replacement import AMPLITUDES, measure_group
from writesae.harvesting import harvest
from writesae.recurrence import Factors
from writesae.sae.train import TrainingSettings
from writesae.shards import ShardedHistory, harvest_shards
from writesae.text import Windows

CONDITIONS = ("delete", "atom", "random", "mean_write")
IN_MEMORY = 2**28  # numbers of a cell's training data up to which they are read once and kept, 1 GiB in fp32
TOGETHER = 8  # SAEs of a layer in one task, at most
WORKERS_WITHIN = 600  # seconds in which the first Dask worker must have come


class SweepError(RuntimeError):
    """A sweep that cannot begin, or did not complete; the message says why in a sentence."""


class Variant(Section):
    """One kind of SAE: the profile's settings for a role, with `settings` put in their place."""

    role: Literal["main", "survey", "flat"]
    target: Target
    settings: dict = {}


class Grid(Section):
    """What is swept over. `firings` of each SAE go into the replacement test (0: none); `keep`: the SAEs stay in build/."""

    name: str
    hosts: Literal["all", "main"] | list[str]
    layers: Literal["all", "headline"] | list[NonNegativeInt]
    heads: Literal["all"] | list[NonNegativeInt]
    variants: dict[str, Variant] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    firings: NonNegativeInt = 0
    keep: bool = True

    @field_validator("variants")
    @classmethod
    def _names_fit_into_files(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        for name in variants:
            if not name.isidentifier():
                raise ValueError(f"a variant's name is made of letters, digits and underscores, not {name!r}")
        return variants

    @field_validator("hosts", "layers", "heads", "seeds")
    @classmethod
    def _each_once(cls, values: str | list) -> str | list:
        if isinstance(values, list) and (not values or len(set(values)) < len(values)):
            raise ValueError(f"a list names at least one value, and each once, not {values}")
        return values


def load_grid(path: Path | str) -> Grid:
    """The grid in a YAML file, named after it. Raises ValueError, in one sentence, for a file that is not one."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (paths_module.ROOT / "profiles" / "sweeps").glob("*.yaml")))
        raise ValueError(f"There is no grid {path}: profiles/sweeps/ has {known}.")
    try:
        return Grid(name=path.stem, **yaml.safe_load(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"Grid {path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (TypeError, yaml.YAMLError):
        raise ValueError(f"Grid {path.name} is not a YAML mapping of fields to values.") from None


@cache
def _code() -> str:
    """The fingerprint of the code that this process runs: of its files when it was first asked for."""
    return fingerprint.fingerprint(modules=["replication.commands.sweep"])


class Point(NamedTuple):
    """One SAE of a grid."""

    host: str
    layer: int
    head: int
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.host}-L{self.layer}-H{self.head}-{self.variant}-s{self.seed}"


class Sweep:
    """A grid over a profile: its points, where their files are, and what those depend on."""

    def __init__(self, profile: Profile, grid: Grid):
        self.suite, self.grid, self._origins = Suite(profile), grid, {}

    @property
    def folder(self) -> Path:
        return self.suite.paths.build / "sweeps" / self.grid.name

    def record(self, point: Point) -> Path:
        """The one-line table of an SAE."""
        return self.folder / "saes" / f"{point}.csv"

    def harvest(self, host: str) -> Path:
        """The folder of a host's shards: the factors of its cells over the training windows."""
        return self.folder / "harvest" / host

    def heldout(self, host: str, layer: int, head: int) -> Path:
        """The factors of a cell over the held-out windows, and their tokens."""
        return self.harvest(host) / f"heldout-L{layer}-H{head}.safetensors"

    def memory(self, host: str, layer: int) -> Path:
        """Half-life and spectrum of the cells of a layer."""
        return self.folder / "memory" / f"{host}-L{layer}.csv"

    def points(self) -> list[Point]:
        """All SAEs of the grid. Raises ValueError for a host, cell or setting that the profile's hosts do not have."""
        grid, profile = self.grid, self.suite.profile
        named = {"all": list(profile.hosts), "main": [self.suite.main]}
        hosts = grid.hosts if isinstance(grid.hosts, list) else named[grid.hosts]
        for name in hosts:
            if name not in profile.hosts:
                known = ", ".join(profile.hosts)
                raise ValueError(f"Profile {profile.name} has no host {name!r}: choose among {known}.")
        found = [
            Point(host, layer, head, variant, seed)
            for host in hosts
            for layer, head in self._cells(host)
            for variant in grid.variants
            for seed in grid.seeds
        ]
        for point in found:
            self.settings(point)
        return found

    def _cells(self, host: str) -> list[tuple[int, int]]:
        model, grid = self.suite.host(host), self.grid
        rules = self.suite.profile.hosts[host].cells.values()
        named = {"all": model.recurrent_layers, "headline": sorted({rule.layer for rule in rules})}
        layers = grid.layers if isinstance(grid.layers, list) else named[grid.layers]
        heads = grid.heads if isinstance(grid.heads, list) else range(model.heads)
        cells = [(layer, head) for layer in layers for head in heads]
        for cell in cells:
            model.check_cell(*cell)
        return cells

    def settings(self, point: Point) -> TrainingSettings:
        """How an SAE is trained. Raises ValueError, in one sentence, for settings that do not go together."""
        variant = self.grid.variants[point.variant]
        base = getattr(self.suite.profile.section("saes", point.host), variant.role).model_dump()
        try:
            return TrainingSettings(**base | variant.settings | dict(seed=point.seed))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([point.variant, *map(str, first["loc"])])
            raise ValueError(f"Grid {self.grid.name}: variants.{where}: {first['msg']}.") from None

    def training_windows(self, variant: str) -> int:
        """As many of the SAE split as the variant's role has in the profile."""
        data = self.suite.profile.data
        return data.survey_windows if self.grid.variants[variant].role == "survey" else data.sae_windows

    def heldout_windows(self, host: str) -> int:
        """Windows that are held out for the FVU and for the replacement test."""
        return max(VALIDATION_WINDOWS, self.suite.profile.section("replacement", host).survey_windows)

    def origin(self, host: str) -> str:
        """A hash of code, package versions and host, which all workers must share."""
        if host not in self._origins:
            self._origins[host] = fingerprint.fingerprint(code=_code(), host=self.suite.host_fingerprint(host))
        return self._origins[host]

    def expected(self, point: Point) -> str:
        """The fingerprint of an SAE's record."""
        profile = self.suite.profile
        return fingerprint.fingerprint(
            origin=self.origin(point.host),
            point=point,
            variant=self.grid.variants[point.variant],
            settings=self.settings(point),
            data=profile.data,
            write=profile.saes.write,
            seed=profile.seed,
            firings=self.grid.firings,
            replacement=profile.section("replacement", point.host),
        )

    def expected_harvest(self, host: str, layer: int) -> str:
        """The fingerprint of the harvest of a layer."""
        counts = max(map(self.training_windows, self.grid.variants)), self.heldout_windows(host)
        data = self.suite.profile.data
        return fingerprint.fingerprint(origin=self.origin(host), layer=layer, counts=counts, data=data)


@lru_cache(maxsize=1)
def _sweep(profile: str, grid: str) -> Sweep:
    """The sweep in a worker, from JSON; hosts that one task has loaded serve the next."""
    return Sweep(Profile.model_validate_json(profile), Grid.model_validate_json(grid))


class Task(NamedTuple):
    """What is sent to a worker: a profile and a grid as JSON, and what is to be done with its fingerprint: the harvest of
    a layer, or where there are `points` (each with its own) those."""

    profile: str
    grid: str
    origin: str
    expected: str
    host: str
    layer: int
    points: tuple[tuple[Point, str], ...] = ()


def run_task(task: Task) -> list[str]:
    """Do a task, unless it is done; a sentence for each SAE, or harvest, that cannot be done, so that the others go on.

    Raises SweepError where this process has other code, packages or hosts than the one that sent the task.
    """
    sweep = _sweep(task.profile, task.grid)
    if sweep.origin(task.host) != task.origin:
        raise SweepError(
            f"The worker on {socket.gethostname()} has other code, package versions or weights of {task.host} than the "
            "process that started the sweep: give all of them the same, and start the workers again."
        )
    try:
        with threads(1):
            if task.points:
                return train_points(sweep, dict(task.points))
            harvest_layer(sweep, task.host, task.layer, task.expected)
    except (ValueError, FloatingPointError) as error:
        return [f"{task.host}-L{task.layer}: {error}"]
    return []


def harvest_layer(sweep: Sweep, host: str, layer: int, expected: str) -> None:
    """The factors of the grid's cells of a layer, in shards over the training windows and in one file a cell over the
    held-out ones, and what all cells of the layer are like."""
    suite, data = sweep.suite, sweep.suite.profile.data
    cells = [cell for cell in sweep._cells(host) if cell[0] == layer]
    files, memory = {cell: sweep.heldout(host, *cell) for cell in cells}, sweep.memory(host, layer)
    if files_module.up_to_date([*files.values(), memory], expected):
        return
    began, model, windows = time.monotonic(), suite.host(host), suite.windows(host, "sae")
    training = windows.tokens[: max(map(sweep.training_windows, sweep.grid.variants))]
    origin, batch = sweep.origin(host), data.batch_windows
    harvest_shards(model, training, cells, sweep.harvest(host), origin, batch=batch)
    checking = suite.windows(host, "heldout")[slice(0, sweep.heldout_windows(host))]
    found = harvest(model, checking.tokens, cells, batch, progress=False)
    for cell, path in files.items():
        tensors = found[cell].tensors() | dict(tokens=checking.tokens, passage=checking.passage)
        files_module.save_tensors(path, tensors, {"fingerprint": expected})
    run = model.run(windows.tokens[: data.cell_windows], upto=layer + 1)
    table = survey_cells(model, run, data.first_position, [layer]).assign(host=host)
    made = dict(seconds=time.monotonic() - began, fingerprint=expected)
    stages.write_table(table, memory, suite.provenance(host, **made))


def train_points(sweep: Sweep, expected: dict[Point, str]) -> list[str]:
    """Train SAEs of one layer, evaluate them, and write the line of each; sentences on those that failed."""
    suite, lines, tests, failed = sweep.suite, {}, {}, []
    for point, wanted in expected.items():
        if files_module.up_to_date(sweep.record(point), wanted):
            continue
        began = time.monotonic()
        try:
            line = train_point(sweep, point, wanted)
            if sweep.grid.firings:
                tests[point] = draw_test(sweep, point)
        except (ValueError, FloatingPointError) as error:
            failed.append(f"{point}: {error}")
            continue
        lines[point] = line, time.monotonic() - began
    began, scores = time.monotonic(), replacement_scores(sweep, tests)
    shared = (time.monotonic() - began) / max(1, len(lines))
    for point, (line, seconds) in lines.items():
        whole = pd.DataFrame([line | scores.get(point, {})])
        made = dict(seconds=seconds + shared, fingerprint=expected[point])
        stages.write_table(whole, sweep.record(point), suite.provenance(point.host, **made))
        if not sweep.grid.keep:
            stem = suite.sae_stem(*_place(sweep, point))
            for suffix in (".json", ".safetensors"):
                stem.with_name(stem.name + suffix).unlink(missing_ok=True)
    return failed


def _place(sweep: Sweep, point: Point) -> tuple[str, int, int, str, str]:
    """(host, layer, head, target, role) of a point's SAE in the suite."""
    role = f"sweep-{sweep.grid.name}-{point.variant}-s{point.seed}"
    return point.host, point.layer, point.head, sweep.grid.variants[point.variant].target, role


def train_point(sweep: Sweep, point: Point, expected: str) -> dict:
    """Train an SAE on the harvest of its cell and keep it in build/; its line."""
    suite, (host, *cell, target, role) = sweep.suite, _place(sweep, point)
    write = suite.profile.saes.write
    shards = sweep.harvest(host), tuple(cell), target, write, sweep.training_windows(point.variant)
    training = ShardedHistory(*shards)
    if training.numbers <= IN_MEMORY:
        training = training[:]
    validation = _heldout(sweep, host, cell, VALIDATION_WINDOWS)[0].history(target, write)
    settings = sweep.settings(point)
    line = train_on(suite, host, role, tuple(cell), target, settings, training, validation, expected)
    return dict(name=point.variant) | line | dict(role=sweep.grid.variants[point.variant].role)


def _heldout(sweep: Sweep, host: str, cell, count: int) -> tuple[Factors, Windows]:
    """A cell's factors over the first `count` held-out windows, and those windows."""
    tensors, _ = files_module.load_tensors(sweep.heldout(host, *cell))
    windows = Windows(tensors.pop("tokens"), tensors.pop("passage"))
    return Factors(query=None, **tensors).at(slice(count)), windows[slice(count)]


def draw_test(sweep: Sweep, point: Point) -> tuple[Windows, CellSAE, pd.DataFrame]:
    """The held-out windows of the replacement test, the SAE on them, and the firings that are drawn: the grid's
    number, or all where there are fewer."""
    suite, (host, *cell, target, role) = sweep.suite, _place(sweep, point)
    profile, count = suite.profile, suite.profile.section("replacement", host).survey_windows
    factors, windows = _heldout(sweep, host, cell, count)
    subject = encode_cell(tuple(cell), target, profile.saes.write, suite.sae(host, *cell, target, role), factors)
    every = firings_of(suite, subject, windows)
    return windows, subject, draw_in_rounds(every, min(sweep.grid.firings, len(every)), profile.seed)


def replacement_scores(sweep: Sweep, tests: dict[Point, tuple]) -> dict[Point, dict]:
    """The replacement tests of SAEs of one layer (as `draw_test` gives them), at the next token: `firings`, the number
    that was tested, and at both amplitudes the share in which the atom, with its Wilson interval, another atom and the mean
    write beat deletion; no share without firings."""
    if not tests:
        return {}
    first = next(iter(tests))
    host, profile = sweep.suite.host(first.host), sweep.suite.profile
    windows, size = tests[first][0], profile.data.batch_windows
    drawn = [(subject, firings.assign(point=str(point))) for point, (_, subject, firings) in tests.items()]
    options = dict(conditions=CONDITIONS, scopes=("write",))
    options["batch_rows"] = profile.section("replacement", first.host).batch_rows
    groups = range(0, len(windows), size)
    found = pd.concat([measure_group(host, windows, drawn, start, size, profile.seed, **options) for start in groups])
    return {point: _shares(found[found.point == str(point)]) for point in tests} if len(found) else {}


def _shares(table: pd.DataFrame) -> dict:
    """The columns that `replacement_scores` tells of one SAE."""
    scores = dict(firings=len(table) // len(AMPLITUDES))
    for amplitude, part in table.groupby("amplitude", sort=False):
        wins = {name: int((part[f"kl_{name}"] < part.kl_delete).sum()) for name in CONDITIONS[1:]}
        scores |= {f"win_{name}_{amplitude}": count / len(part) for name, count in wins.items()}
        low, high = wilson(wins["atom"], len(part))
        scores |= {f"ci_low_atom_{amplitude}": low, f"ci_high_atom_{amplitude}": high}
    return scores


# What runs in the process that starts a sweep


def run_sweep(profile: Profile, grid: Grid, dask: str | None = None, jobs: int | None = None) -> pd.DataFrame:
    """Run what is not up to date, and write results/<profile>/sweep-<grid>.csv, a line an SAE in the grid's order, with
    the half-life and sigma1/sigma2 of its cell. `dask`: the address of a scheduler; else `jobs` processes of this
    machine (None: one a core).

    Raises ValueError for a grid that does not fit the profile, SweepError where tasks failed or workers are missing.
    """
    sweep = Sweep(profile, grid)
    expected, suite = {point: sweep.expected(point) for point in sweep.points()}, sweep.suite
    files_module.workspace()  # made here, so that no two workers make it
    waiting = [point for point in expected if not files_module.up_to_date(sweep.record(point), expected[point])]
    unknown = [point for point in expected if not sweep.memory(point.host, point.layer).is_file()]
    layers = list(dict.fromkeys((point.host, point.layer) for point in waiting + unknown))
    for host in dict.fromkeys(host for host, _ in layers):
        suite.windows(host, "sae"), suite.windows(host, "heldout")

    plain = profile.model_dump_json(), grid.model_dump_json()
    harvests = [Task(*plain, sweep.origin(host), sweep.expected_harvest(host, n), host, n) for host, n in layers]
    tasks = []
    for (host, layer), here in groupby([(p, expected[p]) for p in waiting], lambda each: each[0][:2]):
        here = tuple(here)
        parts = [here[i : i + TOGETHER] for i in range(0, len(here), TOGETHER)]
        tasks += [Task(*plain, sweep.origin(host), "", host, layer, part) for part in parts]
    print(f"{grid.name} ({profile.name}): {len(expected)} SAEs, {len(expected) - len(waiting)} of them up to date")
    if harvests:
        with workers(dask, jobs):
            _run_all(harvests, "harvests", dask)
            _run_all(tasks, "SAEs", dask)
    frame = _table(sweep, expected)
    shutil.rmtree(sweep.folder / "harvest", ignore_errors=True)
    return frame


@contextmanager
def workers(dask: str | None, jobs: int | None) -> Iterator[None]:
    """joblib with processes of this machine, or with the workers of a Dask cluster. SweepError where it cannot be had."""
    if dask is None:
        with parallel_config("loky", n_jobs=jobs or len(os.sched_getaffinity(0))):
            yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise SweepError("A sweep on a Dask cluster needs the extra `sweep`: pip install -e '.[sweep]'.") from error
    try:
        client = Client(dask, timeout=30)
    except (OSError, ValueError) as error:
        raise SweepError(f"No Dask scheduler answers at {dask}: start one, and give its address.") from error
    with client, parallel_config("dask", wait_for_workers_timeout=WORKERS_WITHIN):
        yield


def _run_all(tasks: list[Task], what: str, dask: str | None) -> None:
    """Run tasks with the workers that are there. SweepError where some fail, once all others are done."""
    pool = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all" if dask else "2*n_jobs")
    try:
        results = tqdm(pool(delayed(run_task)(task) for task in tasks), total=len(tasks), desc=what)
        failed = sorted(sentence for sentences in results for sentence in sentences)
    except (TerminatedWorkerError, TimeoutError) as error:
        raise SweepError(f"A sweep's workers are gone ({_first_line(error)}); what is done is kept.") from error
    except Exception as error:
        if type(error).__name__ != "KilledWorker":  # of distributed, which may not be there
            raise
        raise SweepError(f"A task took several workers down with it: {_first_line(error)}") from error
    if failed:
        raise SweepError(f"{len(failed)} {what} failed, the others are done. {failed[0]}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _table(sweep: Sweep, expected: dict[Point, str]) -> pd.DataFrame:
    """All records as one table. SweepError where one is not in this folder, because workers wrote somewhere else."""
    paths = {sweep.record(point): wanted for point, wanted in expected.items()}
    lost = [path for path, wanted in paths.items() if not files_module.up_to_date(path, wanted)]
    if lost:
        raise SweepError(f"{lost[0]} was written in another folder: workers must share {sweep.folder}.")
    lines = pd.concat([stages.read_table(path) for path in paths], ignore_index=True)
    places = dict.fromkeys((point.host, point.layer) for point in expected)
    memory = pd.concat([stages.read_table(sweep.memory(*place)) for place in places], ignore_index=True)
    keys = ["host", "layer", "head"]
    whole = lines.merge(memory[[*keys, "half_life_median", "sigma1_over_sigma2"]], on=keys, how="left")
    seconds = sum(files_module.read_sidecar(path)["seconds"] for path in paths)
    return sweep.suite.write(f"sweep-{sweep.grid.name}", whole, seconds=round(seconds, 3))


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 with one sentence on stderr, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("--grid", required=True, help="profiles/sweeps/NAME.yaml")
    parser.add_argument("--dask", metavar="ADDRESS", help="of a Dask scheduler (default: processes of this machine)")
    parser.add_argument("--jobs", type=int, help="processes of this machine (default: one a core)")
    given = parser.parse_args(arguments)
    try:
        frame = run_sweep(load_profile(given.profile), load_grid(given.grid), given.dask, given.jobs)
    except (SweepError, ValueError) as error:
        print(f"The sweep failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The sweep was interrupted: the next run goes on from what is stored.", file=sys.stderr)
        return 130
    print(f"{len(frame)} SAEs in results/{given.profile}/sweep-{Path(given.grid).stem}.csv")
    return 0


if __name__ == "__main__":
    from replication.commands.sweep import main  # so that workers find the tasks by their module's name

    sys.exit(main())
