"""Compare the tables of a run with the committed ones: `python -m replication.commands.verify --profile mini`.

The run is results/PROFILE of the working copy, or with `--run build/test` the tables that another run left there; the
reference is what the last commit holds of results/PROFILE, or with `--reference` another folder. Each table is
    identical          the same bytes, columns that are times apart (TIMES)
    within tolerance   different, and every metric of tests/reference/tolerances.yaml about it is near enough
    no tolerance       different, and the list says nothing of it: told, and not held against the run
    moved              a metric is off by more than its tolerance, or rows are missing or extra
    damaged, missing   as it says, on either side; extra: not in the reference
    not made           one of artifacts.KEPT, which the notebooks read from the repository and do not make

With `--exact` a table is identical or not. Two runs of one machine must be:
    make all PROFILE=smoke && WRITESAE_OUTPUT=build/again make -B all PROFILE=smoke
    python -m replication.commands.verify --profile smoke --run build/again --reference . --exact

The tolerances are a list in YAML; an entry has
    file       the table, in both folders
    keys       the columns that name a row
    metric     the column to compare
    how far it may be off, one of
      equal: true
      absolute, relative    a number, and a fraction of the reference value; of both the larger counts
      overlap               the columns of the low and high end of its interval: the two intervals must have a point in common
    origin     with `relative`: the fraction is of the reference value's distance from here (1 for an R2, else 0)
    reason     why it may be off that far
Rows are matched on their keys. A file, column or row that only one side has is a failure: nothing is skipped.
"""

from __future__ import annotations

import argparse
import io
import math
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from replication.study import paths as paths_module
from replication.study import stages
from replication.study.stages import read_table
from writesae.files import ArtifactError, read_sidecar


class Interval(NamedTuple):
    """A value between the ends of its interval."""

    value: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        return f"{self.value} [{self.low}, {self.high}]"


class Tolerance(BaseModel):
    """One entry of the list."""

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
        of_size = self.absolute is not None or self.relative is not None
        if of_size + (self.overlap is not None) + self.equal != 1:
            raise ValueError("give one of absolute and relative (or both), overlap, equal: true")
        if self.origin and self.relative is None:
            raise ValueError("origin says from where relative is a fraction: give relative as well")
        return self

    def room(self, reference: Any, fresh: Any) -> float:
        """How far two values may be apart. Two intervals meet where it is no further than both reach towards the other."""
        if self.equal:
            return 0
        if self.overlap:
            lower, upper = sorted((reference, fresh))
            return (lower.high - lower.value) + (upper.value - upper.low)
        return max(self.absolute or 0, (self.relative or 0) * abs(reference - self.origin))

    def allows(self, reference: Any, fresh: Any) -> bool:
        """Whether a fresh value is near enough; a missing value only agrees with a missing value."""
        before, after = _value(reference), _value(fresh)
        if pd.isna(before) or pd.isna(after):
            return bool(pd.isna(before) and pd.isna(after))
        if self.equal or np.isinf(before) or np.isinf(after):
            return bool(before == after)
        return bool(abs(after - before) <= self.room(reference, fresh))

    def used(self, reference: Any, fresh: Any) -> float:
        """How much of the tolerance the difference takes: 0 where equal, infinity where nothing was to differ."""
        before, after = _value(reference), _value(fresh)
        if pd.isna(before) and pd.isna(after) or before == after:
            return 0.0
        try:
            room = self.room(reference, fresh)
            share = float(abs(after - before) / room) if room else math.inf
        except TypeError:  # text where a number should be
            return math.inf
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        if self.overlap:
            return "intervals that meet"
        sizes = [f"{name} {size}" for name in ("absolute", "relative") if (size := getattr(self, name)) is not None]
        return " or ".join(sizes) + (f" of the distance from {self.origin:g}" if self.origin else "")


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Interval) else x


def read_tolerances(path: Path) -> list[Tolerance]:
    """The list at `path`. Raises ValueError where it is empty or an entry is not as described above."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of tolerances.")
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(Tolerance.model_validate(entry))
        except ValidationError as error:
            raise ValueError(f"{path}: entry {number}: {error.errors()[0]['msg']}.") from error
    return found


@dataclass(frozen=True)
class Pair:
    """A row's two values of a metric; `row` names the table and the row, `used` is how much of the tolerance they take."""

    row: str
    reference: Any
    fresh: Any
    allowed: bool
    used: float


@dataclass
class Comparison:
    """Two tables by one tolerance: why they cannot be compared, rows that only one has, and the values of all others."""

    tolerance: Tolerance
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def worst(self) -> Pair | None:
        """The pair that takes most of the tolerance, one that is not allowed before any that is."""
        return max(self.pairs, key=lambda pair: (not pair.allowed, pair.used), default=None)

    @property
    def moved(self) -> list[Pair]:
        return [pair for pair in self.pairs if not pair.allowed]

    def say(self, pair: Pair) -> str:
        """One sentence on a pair."""
        return (
            f"{pair.row} {self.tolerance.metric} is {pair.fresh}, in the reference {pair.reference} "
            f"(allowed: {self.tolerance})"
        )

    def sentences(self) -> list[str]:
        """All in which the tables differ by more than is allowed; empty where they do not."""
        rows = [f"{row} is missing" for row in self.missing] + [f"{row} is not in the reference" for row in self.extra]
        return self.problems + rows + [self.say(pair) for pair in self.moved]


def _keyed(frame: pd.DataFrame, tolerance: Tolerance, side: str) -> tuple[dict, list[str]]:
    """({key: value}, problems) of one table."""
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
    if ends:  # a value without an interval is one of no width
        values = map(Interval, values, *(frame[name].fillna(values) for name in ends))
    return dict(zip(keys.itertuples(index=False, name=None), values, strict=True)), []


def _describe(tolerance: Tolerance, key: tuple) -> str:
    return f"{tolerance.file} [" + ", ".join(f"{n}={v}" for n, v in zip(tolerance.keys, key, strict=True)) + "]"


def measure(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> Comparison:
    """Every row of two tables by one tolerance."""
    expected, problems = _keyed(reference, tolerance, "reference")
    actual, more = _keyed(fresh, tolerance, "fresh")
    if problems or more:
        return Comparison(tolerance, problems + more)
    found = Comparison(tolerance)
    found.missing += [_describe(tolerance, key) for key in expected if key not in actual]
    found.extra += [_describe(tolerance, key) for key in actual if key not in expected]
    for key in (key for key in expected if key in actual):
        values = expected[key], actual[key]
        try:
            allowed = tolerance.allows(*values)
        except TypeError:
            allowed = False  # text where a number should be
        found.pairs.append(Pair(_describe(tolerance, key), *values, allowed, tolerance.used(*values)))
    return found


def compare(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> list[str]:
    """One sentence for each way in which `fresh` differs from `reference`; empty where it does not."""
    return measure(reference, fresh, tolerance).sentences()


def check(reference: Path, fresh: Path, tolerance: Tolerance) -> list[str]:
    """`compare` for the tables in two folders; a missing or damaged file is a sentence too."""
    try:
        return compare(read_table(reference / tolerance.file), read_table(fresh / tolerance.file), tolerance)
    except ArtifactError as error:
        return [str(error)]


TOLERANCES = paths_module.ROOT / "tests" / "reference" / "tolerances.yaml"
TIMES = ("seconds", "training_seconds", "tokens_per_second")  # columns that say how long something took
FAILURES = ("moved", "damaged", "missing")
VERDICTS = ("identical", "within tolerance", "no tolerance", "extra", "not made", *FAILURES)
ORIGIN = ("profile", "config", "seed", "device", "kernel", "commit")  # fields of a sidecar, beside the versions
MOST = 5  # columns that are named
DIGITS = 20  # of a commit or a hash


class VerifyError(ValueError):
    """There is nothing to compare, or nothing to compare it with."""


@dataclass
class Table:
    """What is said of one table: a verdict (one of VERDICTS), and sentences."""

    name: str
    verdict: str
    details: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The tables, the verdicts of the scorecard that turned, and in what the two runs' origins differ."""

    tables: list[Table]
    turned: list[str]
    origins: list[str]

    @property
    def agrees(self) -> bool:
        return not any(table.verdict in FAILURES for table in self.tables)

    def __str__(self) -> str:
        lines = []
        for verdict in VERDICTS:
            tables = [table for table in self.tables if table.verdict == verdict]
            if not tables:
                continue
            lines.append(f"{verdict}: {len(tables)}")
            bare = ", ".join(table.name for table in tables if not table.details)
            lines += textwrap.wrap(bare, 116, initial_indent="  ", subsequent_indent="  ")
            for table in (table for table in tables if table.details):
                lines += [f"  {table.name}", *(f"    {detail}" for detail in table.details)]
        lines += ["verdicts of the scorecard that turned:", *(f"  {x}" for x in self.turned or ["none"])]
        lines += ["differences of origin:", *(f"  {x}" for x in self.origins or ["none"])]
        failed = Counter(table.verdict for table in self.tables if table.verdict in FAILURES)
        said = ", ".join(f"{count} {verdict}" for verdict, count in failed.items())
        outcome = f"NOT as the reference ({said})" if failed else "as the reference"
        lines.append(f"{len(self.tables)} tables: {outcome}")
        return "\n".join(lines)


def _names(folder: Path) -> set[str]:
    return {path.name for path in Path(folder).glob("[!.]*.csv")}


def identical(reference: Path, fresh: Path) -> bool:
    """Whether two CSVs are the same bytes; where they have columns of TIMES, the same text in all others."""
    if reference.read_bytes() == fresh.read_bytes():
        return True
    left, right = _text(reference), _text(fresh)
    return any(name in left for name in TIMES) and _without_times(left).equals(_without_times(right))


def _text(path: Path) -> pd.DataFrame:
    """Every field as it is written."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _without_times(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=[name for name in TIMES if name in frame])


def _changes(reference: Path, fresh: Path) -> list[str]:
    """In what two CSVs differ, times apart, in a few sentences."""
    left, right = _without_times(_text(reference)), _without_times(_text(fresh))
    if list(left) != list(right):
        gone, new = (", ".join(a.columns.difference(b.columns)) or "none" for a, b in ((left, right), (right, left)))
        return [f"other columns: {gone} only in the reference, {new} only in the run"]
    if len(left) != len(right):
        return [f"{len(right)} rows, in the reference {len(left)}"]
    said = []
    for name in left:
        rows = left.index[left[name] != right[name]]
        if len(rows):
            first = f"{right[name][rows[0]]!r}, in the reference {left[name][rows[0]]!r}"
            said.append(f"{name} differs in {len(rows)} of {len(left)} rows, first in row {rows[0] + 1}: {first}")
    rest = len(said) - MOST
    return said[:MOST] + ([f"and {rest} more columns"] if rest > 0 else [])


def _judge(name: str, reference: Path, fresh: Path, tolerances: list[Tolerance], exact: bool) -> Table:
    """One table of two folders."""
    paths, about = (reference / name, fresh / name), [tolerance for tolerance in tolerances if tolerance.file == name]
    if not paths[1].is_file():
        return Table(name, "not made" if stages.KEPT.match(name) else "missing")
    if not paths[0].is_file() and not exact and not about:
        return Table(name, "extra")
    if not paths[0].is_file():
        return Table(name, "missing", ["the reference does not have it"])
    try:
        before, after = (read_table(path) for path in paths)
    except ArtifactError as error:
        return Table(name, "damaged", [str(error)])
    if identical(*paths):
        return Table(name, "identical")
    if exact:
        return Table(name, "moved", _changes(*paths))
    if not about:
        return Table(name, "no tolerance", _changes(*paths))
    found = [measure(before, after, tolerance) for tolerance in about]
    if any(one.sentences() for one in found):
        return Table(name, "moved", [x.replace(f"{name} ", "") for x in _failures(found)])
    return Table(name, "within tolerance", [_nearest(found).replace(f"{name} ", "")])


def _failures(found: list[Comparison]) -> list[str]:
    """Why a table is not within its tolerances: rows that one side lacks, and the worst value of each metric."""
    said = list(dict.fromkeys(problem for one in found for problem in one.problems))
    for attribute, what in (("missing", "missing"), ("extra", "not in the reference")):
        rows = list(dict.fromkeys(row for one in found for row in getattr(one, attribute)))
        said += [f"{len(rows)} rows are {what}, the first {rows[0]}"] if rows else []
    for one in sorted((one for one in found if one.moved), key=lambda one: -one.worst.used):
        said.append(
            f"{len(one.moved)} of {len(one.pairs)} values of {one.tolerance.metric}; worst: {one.say(one.worst)}"
        )
    return said


def _nearest(found: list[Comparison]) -> str:
    """The value that takes most of its tolerance, of all metrics of a table that is within them."""
    one = max((one for one in found if one.worst), key=lambda one: one.worst.used)
    if not one.worst.used:
        return f"no difference in {', '.join(comparison.tolerance.metric for comparison in found)}"
    return f"worst: {one.say(one.worst)}, {one.worst.used:.0%} of it"


def _turned(reference: Path, fresh: Path) -> list[str]:
    """The verdicts of the scorecard that are others now."""
    try:
        before, after = (
            read_table(folder / "scorecard.csv").set_index(["id", "host"]).status for folder in (reference, fresh)
        )
    except ArtifactError:
        return []
    both = [key for key in before.index if key in after.index]
    return [
        f"{name}, {host}: {after[name, host]}, in the reference {before[name, host]}"
        for name, host in both
        if before[name, host] != after[name, host]
    ]


def _origin(path: Path) -> dict[str, Any]:
    record = read_sidecar(path)
    return {name: str(record.get(name))[:DIGITS] for name in ORIGIN} | record.get("versions", {})


def _origins(reference: Path, fresh: Path, names: set[str]) -> list[str]:
    """In what profile, versions, device, kernel path and commit the sidecars of two folders differ."""
    found: Counter = Counter()
    for name in names:
        try:
            before, after = _origin(reference / name), _origin(fresh / name)
        except ArtifactError:
            continue
        found.update(
            (what, str(before.get(what)), str(after.get(what)))
            for what in before | after
            if before.get(what) != after.get(what)
        )
    return [
        f"{what}: {after}, in the reference {before} ({count} tables)"
        for (what, before, after), count in sorted(found.items())
    ]


def verify(reference: Path, fresh: Path, tolerances: list[Tolerance], exact: bool = False) -> Report:
    """Compare the tables of two folders. VerifyError where one of them holds none."""
    for folder in (reference, fresh):
        if not _names(folder):
            raise VerifyError(f"There are no tables in {folder}.")
    listed = set() if exact else {tolerance.file for tolerance in tolerances}
    names = _names(reference) | _names(fresh)
    tables = [_judge(name, reference, fresh, tolerances, exact) for name in sorted(names | listed)]
    return Report(tables, _turned(reference, fresh), _origins(reference, fresh, names))


@contextmanager
def committed(profile: str) -> Iterator[tuple[Path, str]]:
    """results/PROFILE as the last commit has it, in a folder for the time of the block, and the commit.

    Raises VerifyError where the commit does not have it, and outside git.
    """
    git = ["git", "-C", str(paths_module.ROOT)]
    archive = subprocess.run([*git, "archive", "HEAD", f"results/{profile}"], capture_output=True)
    if archive.returncode:
        raise VerifyError(f"The last commit holds no results/{profile}: name a reference with --reference FOLDER.")
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as content:
            for member in (member for member in content if member.isfile()):
                (Path(folder) / Path(member.name).name).write_bytes(content.extractfile(member).read())
        yield Path(folder), commit


def _tables_of(folder: str, profile: str) -> Path:
    """Where the tables are: FOLDER/results/PROFILE where there is such a folder, else FOLDER; from the repository."""
    inside = paths_module.ROOT / folder / "results" / profile
    return inside if inside.is_dir() else paths_module.ROOT / folder


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 0 where the run agrees, else 1, and 1 with one sentence on stderr where nothing can be compared."""
    parser = argparse.ArgumentParser(description="Compare the tables of a run with the committed ones.")
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("--run", default="", help="the folder of the run, e.g. build/test (default: the repository)")
    parser.add_argument("--reference", help="a folder to compare with (default: the last commit)")
    parser.add_argument("--exact", action="store_true", help=f"bit for bit, apart from {', '.join(TIMES)}")
    given = parser.parse_args(arguments)
    fresh = _tables_of(given.run, given.profile)
    try:
        tolerances = read_tolerances(TOLERANCES)
        if given.reference is not None:
            name = reference = _tables_of(given.reference, given.profile)
            report = verify(reference, fresh, tolerances, given.exact)
        else:
            with committed(given.profile) as (reference, commit):
                name = f"results/{given.profile} of commit {commit}"
                report = verify(reference, fresh, tolerances, given.exact)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{fresh} against {name}\n{report}")
    return 0 if report.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
