"""Compare the tables of a run with the committed ones: `python -m replication verify --profile mini`.

The run is results/PROFILE of the working copy, or with `--run build/test` the tables of that other run. The
reference is results/PROFILE of the last commit, or with `--reference` another folder. The verdict on a table
is one of
    identical          the same bytes, except for columns that are times (TIMES)
    within tolerance   different, and every metric that tests/reference/tolerances.yaml lists is near enough
    no tolerance       different, and the list has no entry for it: reported, and no failure
    extra              the reference does not have it, and the list has no entry for it
    not made           a table of stages.KEPT: notebooks read it from the repository and do not make it
    moved              a metric differs by more than its tolerance, or rows are missing or extra
    damaged, missing   the table is so on one of the two sides
The last three are failures. With `--exact` a table is identical or has moved. Two runs on one machine must
pass:
    make all PROFILE=smoke && WRITESAE_OUTPUT=build/again make -B all PROFILE=smoke
    python -m replication verify --profile smoke --run build/again --reference . --exact
"""

from __future__ import annotations

import argparse
import io
import math
import subprocess
import tarfile
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from replication.commands import CommandError, first_error
from replication.study import paths as paths_module
from replication.study import stages
from replication.study.stages import read_table
from writesae.files import ArtifactError, read_sidecar

TOLERANCES = paths_module.ROOT / "tests" / "reference" / "tolerances.yaml"
TIMES = ("seconds", "training_seconds", "tokens_per_second")  # columns that measure time
FAILURES = ("moved", "damaged", "missing")
VERDICTS = ("identical", "within tolerance", "no tolerance", "extra", "not made", *FAILURES)
ORIGIN = ("profile", "config", "seed", "device", "kernel", "commit")  # of a sidecar
MOST = 5  # columns that a report names
DIGITS = 20  # of a commit or a hash


class Interval(NamedTuple):
    value: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        return f"{self.value} [{self.low}, {self.high}]"


class Tolerance(BaseModel):
    """One entry of the YAML list: how far a column of a table may differ, in one of three ways.

    equal: not at all. absolute, relative: by a number, or by a fraction of the reference value's distance
    from `origin` (1 for an R2, else 0); of both, the larger one counts. overlap: the columns with the low and
    high end of its interval, and the two intervals must overlap. Rows are matched by the columns `keys`; a
    row on one side is a failure."""

    model_config = ConfigDict(extra="forbid")
    file: str
    keys: list[str] = Field(min_length=1)
    metric: str
    absolute: float | None = Field(None, ge=0)
    relative: float | None = Field(None, ge=0)
    overlap: tuple[str, str] | None = None
    origin: float = 0
    equal: bool = False
    reason: str = Field(min_length=1)

    @model_validator(mode="after")
    def _one_kind(self):
        sized = self.absolute is not None or self.relative is not None
        if sized + (self.overlap is not None) + self.equal != 1:
            raise ValueError("give one of absolute and relative (or both), overlap, equal: true")
        if self.origin and self.relative is None:
            raise ValueError("origin says from where relative is a fraction: give relative as well")
        return self

    def used(self, reference: Any, fresh: Any) -> float:
        """Return the difference as a share of what is allowed: 0 for equal values, above 1 for too large a
        difference, infinity for text or for a missing value on one side."""
        before, after = (x.value if isinstance(x, Interval) else x for x in (reference, fresh))
        if pd.isna(before) and pd.isna(after) or before == after:
            return 0.0
        try:
            if self.overlap:  # the intervals overlap up to the sum of the two halves that face each other
                lower, upper = sorted((reference, fresh))
                room = (lower.high - lower.value) + (upper.value - upper.low)
            else:
                room = max(self.absolute or 0, (self.relative or 0) * abs(before - self.origin))
            share = float(abs(after - before) / room) if room else math.inf
        except TypeError:  # text
            return math.inf
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        if self.overlap:
            return "intervals that meet"
        sizes = [f"{name} {size}" for name in ("absolute", "relative") if (size := getattr(self, name)) is not None]
        return " or ".join(sizes) + (f" of the distance from {self.origin:g}" if self.origin else "")


def read_tolerances(path: Path) -> list[Tolerance]:
    """Return the list at `path`. Raises ValueError if it is empty or has an entry that is not as `Tolerance`
    says."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        return TypeAdapter(Annotated[list[Tolerance], Field(min_length=1)]).validate_python(entries)
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}.") from error


# One metric of one table


class Pair(NamedTuple):
    """A row's two values of a metric, and the share of the tolerance that their difference uses."""

    row: str
    reference: Any
    fresh: Any
    used: float


class Comparison(NamedTuple):
    """Two tables by one tolerance: columns or rows that one side lacks, and the values of the rows that both
    have."""

    tolerance: Tolerance
    problems: list[str]
    pairs: list[Pair] = []

    @property
    def worst(self) -> Pair:
        return max(self.pairs, key=lambda pair: pair.used)

    @property
    def moved(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.used > 1]

    def sentence(self, pair: Pair) -> str:
        values = f"{self.tolerance.metric} is {pair.fresh}, in the reference {pair.reference}"
        return f"{pair.row} {values} (allowed: {self.tolerance})"

    def sentences(self) -> list[str]:
        """Return a sentence for each difference that is not allowed."""
        return self.problems + [self.sentence(pair) for pair in self.moved]


def _keyed(frame: pd.DataFrame, tolerance: Tolerance, side: str) -> tuple[dict[str, Any], list[str]]:
    """Return ({row: value of the metric}, problems) of one table."""
    ends = tolerance.overlap or ()
    lacking = [name for name in (*tolerance.keys, tolerance.metric, *ends) if name not in frame]
    if lacking:
        return {}, [f"{tolerance.file}: the {side} table has no column {', '.join(lacking)}"]
    if frame.empty:
        return {}, [f"{tolerance.file}: the {side} table has no rows"]
    if frame.duplicated(tolerance.keys).any():
        return {}, [f"{tolerance.file}: {', '.join(tolerance.keys)} do not name one row in the {side} table"]
    keys = frame[tolerance.keys].astype(object).where(frame[tolerance.keys].notna(), None)
    values = frame[tolerance.metric]
    if ends:  # a value without an interval has one of width 0
        values = map(Interval, values, *(frame[name].fillna(values) for name in ends))
    return dict(zip(keys.itertuples(index=False, name=None), values, strict=True)), []


def measure(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> Comparison:
    """Compare every row of two tables by one tolerance."""
    expected, problems = _keyed(reference, tolerance, "reference")
    actual, more = _keyed(fresh, tolerance, "fresh")
    if problems or more:
        return Comparison(tolerance, problems + more)

    def name(key: tuple) -> str:
        return f"{tolerance.file} [" + ", ".join(f"{n}={v}" for n, v in zip(tolerance.keys, key, strict=True)) + "]"

    for source, other, what in ((expected, actual, "missing"), (actual, expected, "not in the reference")):
        rows = [name(key) for key in source if key not in other]
        problems += [f"{len(rows)} rows are {what}, the first {rows[0]}"] if rows else []
    both = [(name(key), expected[key], actual[key]) for key in expected if key in actual]
    return Comparison(tolerance, problems, [Pair(*row, tolerance.used(*row[1:])) for row in both])


def check(reference: Path, fresh: Path, tolerance: Tolerance) -> list[str]:
    """Return a sentence for each difference of the table in two folders that its tolerance does not allow; a
    missing or damaged file is a sentence too."""
    try:
        tables = [read_table(folder / tolerance.file) for folder in (reference, fresh)]
    except ArtifactError as error:
        return [str(error)]
    return measure(*tables, tolerance).sentences()


# Two folders


class Table(NamedTuple):
    """A table's verdict (one of VERDICTS), and sentences about it."""

    name: str
    verdict: str
    details: list[str] = []


class Report(NamedTuple):
    """The tables, the verdicts of the scorecard that changed, and how the origins of the two runs differ."""

    tables: list[Table]
    turned: list[str]
    origins: list[str]

    @property
    def failures(self) -> Counter:
        return Counter(table.verdict for table in self.tables if table.verdict in FAILURES)

    def __str__(self) -> str:
        lines = []
        for verdict in VERDICTS:
            tables = [table for table in self.tables if table.verdict == verdict]
            if tables:
                bare = ", ".join(table.name for table in tables if not table.details)
                lines += [f"{verdict}: {len(tables)}"]
                lines += textwrap.wrap(bare, 116, initial_indent="  ", subsequent_indent="  ")
            for table in (table for table in tables if table.details):
                lines += [f"  {table.name}", *(f"    {detail}" for detail in table.details)]
        lines += ["verdicts of the scorecard that turned:", *(f"  {x}" for x in self.turned or ["none"])]
        lines += ["differences of origin:", *(f"  {x}" for x in self.origins or ["none"])]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.failures.items())
        outcome = f"NOT as the reference ({counts})" if counts else "as the reference"
        return "\n".join([*lines, f"{len(self.tables)} tables: {outcome}"])


def _changes(reference: Path, fresh: Path) -> list[str]:
    """Return how two CSVs differ as text, except for times, in a few sentences; an empty list if they do
    not."""
    tables = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (reference, fresh))
    left, right = (table.drop(columns=[name for name in TIMES if name in table]) for table in tables)
    if list(left) != list(right):
        gone, new = (", ".join(a.columns.difference(b.columns)) or "none" for a, b in ((left, right), (right, left)))
        return [f"other columns: {gone} only in the reference, {new} only in the run"]
    if len(left) != len(right):
        return [f"{len(right)} rows, in the reference {len(left)}"]
    changes = []
    for name, differs in (left != right).items():
        if differs.any():
            row = differs.idxmax()
            first = f"row {row + 1}: {right[name][row]!r}, in the reference {left[name][row]!r}"
            changes.append(f"{name} differs in {differs.sum()} of {len(left)} rows, first in {first}")
    rest = len(changes) - MOST
    return changes[:MOST] + ([f"and {rest} more columns"] if rest > 0 else [])


def _judge(name: str, reference: Path, fresh: Path, tolerances: list[Tolerance], exact: bool) -> Table:
    """Compare one table of two folders."""
    paths, entries = (reference / name, fresh / name), [entry for entry in tolerances if entry.file == name]
    if not paths[1].is_file():
        return Table(name, "not made" if stages.KEPT.match(name) else "missing")
    if not paths[0].is_file():
        return Table(name, "missing", ["the reference does not have it"]) if exact or entries else Table(name, "extra")
    try:
        before, after = map(read_table, paths)
    except ArtifactError as error:
        return Table(name, "damaged", [str(error)])
    same_bytes = paths[0].read_bytes() == paths[1].read_bytes()
    changes = [] if same_bytes else _changes(*paths)
    if same_bytes or (not changes and any(name in before for name in TIMES)):
        return Table(name, "identical")
    if exact or not entries:
        return Table(name, "moved" if exact else "no tolerance", changes)
    verdict, details = _weigh([measure(before, after, entry) for entry in entries])
    return Table(name, verdict, [sentence.replace(f"{name} ", "") for sentence in details])


def _weigh(comparisons: list[Comparison]) -> tuple[str, list[str]]:
    """Return the verdict on a table and its sentences: if it moved, what one side lacks and the worst value
    of each metric that moved; else the value that uses most of its tolerance."""
    sentences = list(dict.fromkeys(problem for one in comparisons for problem in one.problems))
    for one in sorted((one for one in comparisons if one.moved), key=lambda one: -one.worst.used):
        count = f"{len(one.moved)} of {len(one.pairs)} values of {one.tolerance.metric}"
        sentences.append(f"{count}; worst: {one.sentence(one.worst)}")
    if sentences:
        return "moved", sentences
    one = max(comparisons, key=lambda one: one.worst.used)
    if one.worst.used:
        return "within tolerance", [f"worst: {one.sentence(one.worst)}, {one.worst.used:.0%} of it"]
    return "within tolerance", [f"no difference in {', '.join(each.tolerance.metric for each in comparisons)}"]


def _turned(reference: Path, fresh: Path) -> list[str]:
    """Return the verdicts of the scorecard that changed."""
    try:
        scorecards = [read_table(folder / "scorecard.csv").set_index(["id", "host"]) for folder in (reference, fresh)]
    except ArtifactError:
        return []
    before, after = (scorecard.status for scorecard in scorecards)
    changed = [key for key in before.index if key in after.index and before[key] != after[key]]
    return [f"{key[0]}, {key[1]}: {after[key]}, in the reference {before[key]}" for key in changed]


def _origins(reference: Path, fresh: Path, names: set[str]) -> list[str]:
    """Return how profile, versions, device, kernel path and commit in the sidecars of two folders differ."""
    counts: Counter = Counter()
    for name in names:
        try:
            records = [read_sidecar(folder / name) for folder in (reference, fresh)]
        except ArtifactError:
            continue
        before, after = ({k: str(x.get(k))[:DIGITS] for k in ORIGIN} | x.get("versions", {}) for x in records)
        pairs = ((what, str(before.get(what)), str(after.get(what))) for what in before | after)
        counts.update((what, old, new) for what, old, new in pairs if old != new)
    return [f"{what}: {new}, in the reference {old} ({n} tables)" for (what, old, new), n in sorted(counts.items())]


def verify(reference: Path, fresh: Path, tolerances: list[Tolerance], exact: bool = False) -> Report:
    """Compare the tables of two folders. Raises CommandError if one of them holds none."""
    held = [{path.name for path in Path(folder).glob("[!.]*.csv")} for folder in (reference, fresh)]
    for folder, names in zip((reference, fresh), held, strict=True):
        if not names:
            raise CommandError(f"There are no tables in {folder}.")
    names = held[0] | held[1]
    listed = set() if exact else {tolerance.file for tolerance in tolerances}
    tables = [_judge(name, reference, fresh, tolerances, exact) for name in sorted(names | listed)]
    return Report(tables, _turned(reference, fresh), _origins(reference, fresh, names))


@contextmanager
def committed(profile: str) -> Iterator[tuple[Path, str]]:
    """Yield (a folder with results/PROFILE of the last commit, the commit); the folder is removed afterwards.

    Raises CommandError if the commit does not have it, and outside git.
    """
    git = ["git", "-C", str(paths_module.ROOT)]
    archive = subprocess.run([*git, "archive", "HEAD", f"results/{profile}"], capture_output=True)
    if archive.returncode:
        raise CommandError(f"The last commit holds no results/{profile}: name a reference with --reference FOLDER.")
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as content:
            content.extractall(folder, filter="data")
        yield Path(folder) / "results" / profile, commit


def _tables_of(folder: str, profile: str) -> Path:
    """Return FOLDER/results/PROFILE if there is such a folder, else FOLDER; relative to the repository."""
    inside = paths_module.ROOT / folder / "results" / profile
    return inside if inside.is_dir() else paths_module.ROOT / folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("--run", default="", help="the folder of the run, e.g. build/test (default: the repository)")
    parser.add_argument("--reference", help="a folder to compare with (default: the last commit)")
    parser.add_argument("--exact", action="store_true", help=f"bit for bit, apart from {', '.join(TIMES)}")


def main(options: argparse.Namespace) -> int:
    """Print the report; return 0 if the run agrees with the reference, else 1."""
    fresh, tolerances = _tables_of(options.run, options.profile), read_tolerances(TOLERANCES)
    if options.reference is None:
        with committed(options.profile) as (reference, commit):
            name = f"results/{options.profile} of commit {commit}"
            report = verify(reference, fresh, tolerances, options.exact)
    else:
        name = reference = _tables_of(options.reference, options.profile)
        report = verify(reference, fresh, tolerances, options.exact)
    print(f"{fresh} against {name}\n{report}")
    return 1 if report.failures else 0
