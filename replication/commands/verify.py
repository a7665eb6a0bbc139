"""Compare the tables of a run with the committed ones: `python -m replication verify --profile mini`.

The verdict on a table is one of
    identical          the same text in every cell, except for columns that are times (TIMES)
    within tolerance   every metric in tests/reference/tolerances.yaml is close enough
    no tolerance       different, but tolerances.yaml has no entry for the table: no failure
    extra              only in the run, and tolerances.yaml has no entry for it
    not made           only in the reference, and no notebook makes it (stages.KEPT)
    moved              a metric differs by more than its tolerance, or rows are missing or extra
    damaged, missing   on one of the two sides
The last three are failures. With `--exact` a table is identical or moved.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import Field, TypeAdapter, model_validator

from replication.commands import CommandError
from replication.study import paths as paths_module
from replication.study import stages
from replication.study.git import GitError, git
from replication.study.profile import Section
from replication.study.stages import read_table
from replication.study.yaml_files import checked
from writesae.files import ArtifactError, read_sidecar

TOLERANCES = paths_module.ROOT / "tests" / "reference" / "tolerances.yaml"
TIMES = ("seconds", "training_seconds", "tokens_per_second")  # columns that measure time
FAILURES = ("moved", "damaged", "missing")
VERDICTS = ("identical", "within tolerance", "no tolerance", "extra", "not made", *FAILURES)
ORIGIN = ("profile", "config", "seed", "device", "kernel", "commit")  # fields of a sidecar
MOST = 5  # columns that a report names
DIGITS = 20  # of a commit or a hash


class Tolerance(Section):
    """One entry of tolerances.yaml: how far a metric may differ between rows with equal `keys`.

    equal: not at all. absolute, relative: by a number, or by a fraction of the reference value's distance
    from `origin` (1 for an R2); the larger one counts. overlap: (low, high) columns of an interval; those
    of both sides must overlap, each value near its own. Two numbers without intervals are not compared."""

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
            raise ValueError("origin needs relative, the fraction of the distance from it")
        return self

    def __str__(self) -> str:
        if self.equal or self.overlap:
            return "equal" if self.equal else "intervals that meet"
        sizes = [f"{name} {size}" for name in ("absolute", "relative") if (size := getattr(self, name)) is not None]
        return " or ".join(sizes) + (f" of the distance from {self.origin:g}" if self.origin else "")

    def used(self, reference: pd.DataFrame, fresh: pd.DataFrame) -> pd.Series:
        """Return the difference in each row as a share of what is allowed; the tables have the same index.

        0 for equal values; infinity for text, or if only one value is missing."""
        before, after = reference[self.metric], fresh[self.metric]
        same = (before == after) | (before.isna() & after.isna())
        before, after = _numbers(before), _numbers(after)
        if self.overlap:  # they overlap if the values differ by at most the sum of the facing halves
            without = (table[[*self.overlap]].isna().all(axis=1) for table in (reference, fresh))
            same |= np.logical_and.reduce([*without, before.notna(), after.notna()])
            (low, high), (fresh_low, fresh_high) = (
                [_numbers(table[end]).fillna(value) for end in self.overlap]  # a missing interval has width 0
                for table, value in ((reference, before), (fresh, after))
            )
            up, down = (high - before) + (after - fresh_low), (fresh_high - after) + (before - low)
            near = (2 * fresh_low - fresh_high <= after) & (after <= 2 * fresh_high - fresh_low)  # by its width
            room = up.where(after > before, down).where(near, 0.0)
        else:
            relative = (self.relative or 0) * (before - self.origin).abs()
            room = relative.clip(lower=self.absolute or 0)
        return ((after - before).abs() / room).fillna(np.inf).mask(same, 0.0)


def _numbers(column: pd.Series) -> pd.Series:
    """Return a column as floats, with NaN for text."""
    return pd.to_numeric(column, errors="coerce").astype(float)


def read_tolerances(path: Path) -> list[Tolerance]:
    """Return the entries of a YAML list. Raises ValueError if the file is empty or an entry is wrong."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    with checked(str(path)):
        return TypeAdapter(list[Tolerance]).validate_python(entries)


# One metric of one table


def _problems(table: pd.DataFrame, tolerance: Tolerance, side: str) -> list[str]:
    """Return a sentence if a table lacks what the comparison needs."""
    needed = [*tolerance.keys, tolerance.metric, *(tolerance.overlap or ())]
    if lacking := ", ".join(name for name in needed if name not in table):
        return [f"{tolerance.file}: the {side} table has no column {lacking}"]
    if table.empty:
        return [f"{tolerance.file}: the {side} table has no rows"]
    if table.duplicated(tolerance.keys).any():
        return [f"{tolerance.file}: {', '.join(tolerance.keys)} do not name one row in the {side} table"]
    return []


def _named(table: pd.DataFrame, tolerance: Tolerance) -> pd.DataFrame:
    """Return a table with an index that names the rows: "file [key=value, ...]"."""
    keys = table[tolerance.keys].map(lambda value: f"{value:.12g}" if isinstance(value, float) else str(value))
    names = (", ".join(map("=".join, row.items())) for row in keys.to_dict("records"))
    return table.set_axis([f"{tolerance.file} [{name}]" for name in names])


def _shown(table: pd.DataFrame, tolerance: Tolerance) -> list[str]:
    """Return the values of the metric as text, with their intervals."""
    values = table[tolerance.metric]
    if not tolerance.overlap:
        return [str(value) for value in values]
    low, high = (table[end].fillna(values) for end in tolerance.overlap)
    return [f"{value} [{bottom}, {top}]" for value, bottom, top in zip(values, low, high, strict=True)]


def measure(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> tuple[list[str], pd.Series]:
    """Compare every row of two tables by one tolerance.

    Return sentences on what one side lacks, and `Tolerance.used` per common row, indexed by a sentence."""
    problems = _problems(reference, tolerance, "reference") + _problems(fresh, tolerance, "fresh")
    if problems:
        return problems, pd.Series(dtype=float)
    before, after = _named(reference, tolerance), _named(fresh, tolerance)
    for one, other, what in ((before, after, "missing"), (after, before, "not in the reference")):
        rows = one.index[~one.index.isin(other.index)]
        problems += [f"{len(rows)} rows are {what}, the first {rows[0]}"] if len(rows) else []
    before = before[before.index.isin(after.index)]
    after = after.loc[before.index]
    shown = zip(before.index, _shown(after, tolerance), _shown(before, tolerance), strict=True)
    form = f"{{}} {tolerance.metric} is {{}}, in the reference {{}} (allowed: {tolerance})"
    return problems, tolerance.used(before, after).set_axis([form.format(*row) for row in shown])


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
            lines += [f"{verdict}: {len(tables)}"] if tables else []
            bare = ", ".join(table.name for table in tables if not table.details)
            lines += textwrap.wrap(bare, 116, initial_indent="  ", subsequent_indent="  ")
            for table in (table for table in tables if table.details):
                lines += [f"  {table.name}", *(f"    {detail}" for detail in table.details)]
        lines += ["verdicts of the scorecard that turned:", *(f"  {x}" for x in self.turned or ["none"])]
        lines += ["differences of origin:", *(f"  {x}" for x in self.origins or ["none"])]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.failures.items())
        outcome = f"NOT as the reference ({counts})" if counts else "as the reference"
        return "\n".join([*lines, f"{len(self.tables)} tables: {outcome}"])


def _changes(reference: Path, fresh: Path) -> list[str]:
    """Return how two CSVs differ as text, except for times, in a few sentences; [] if they do not."""
    tables = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (reference, fresh))
    left, right = (table.drop(columns=list(TIMES), errors="ignore") for table in tables)
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


def judge(name: str, reference: Path, fresh: Path, tolerances: list[Tolerance], exact: bool = False) -> Table:
    """Return the verdict on one table of two folders."""
    entries = [entry for entry in tolerances if entry.file == name]
    if not (fresh / name).is_file():
        return Table(name, "not made" if stages.KEPT.match(name) else "missing")
    if not (reference / name).is_file():
        return Table(name, "missing", ["the reference does not have it"]) if exact or entries else Table(name, "extra")
    try:
        tables = [read_table(folder / name) for folder in (reference, fresh)]
    except ArtifactError as error:
        return Table(name, "damaged", [str(error)])
    changes = _changes(reference / name, fresh / name)
    if not changes:
        return Table(name, "identical")
    if exact or not entries:
        return Table(name, "moved" if exact else "no tolerance", changes)
    verdict, details = _weigh(*tables, entries)
    return Table(name, verdict, [sentence.replace(f"{name} ", "") for sentence in details])


def _weigh(before: pd.DataFrame, after: pd.DataFrame, tolerances: list[Tolerance]) -> tuple[str, list[str]]:
    """Return the verdict on a table, and sentences on what one side lacks and the worst value of each metric
    that moved. If nothing moved, the sentence is about the value that uses the most of its tolerance."""
    problems, shares = zip(*(measure(before, after, tolerance) for tolerance in tolerances), strict=True)
    sentences = list(dict.fromkeys(chain(*problems)))
    metrics = [tolerance.metric for tolerance in tolerances]
    for used, metric in sorted(zip(shares, metrics, strict=True), key=lambda pair: -pair[0].max()):
        if moved := (used > 1).sum():
            sentences.append(f"{moved} of {len(used)} values of {metric}; worst: {used.idxmax()}")
    if sentences:
        return "moved", sentences
    used = pd.concat(shares)
    worst = f"worst: {used.idxmax()}, {used.max():.0%} of it"
    return "within tolerance", [worst if used.max() else f"no difference in {', '.join(metrics)}"]


def _turned(reference: Path, fresh: Path) -> list[str]:
    """Return the verdicts of the scorecard that changed."""
    try:
        before, after = (read_table(folder / "scorecard.csv") for folder in (reference, fresh))
    except ArtifactError:
        return []
    changed = before.merge(after, on=["id", "host"], suffixes=("", "_new")).query("status != status_new")
    return [f"{row.id}, {row.host}: {row.status_new}, in the reference {row.status}" for row in changed.itertuples()]


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
    """Compare the tables of two folders. Raises CommandError if one of them has none."""
    present = {folder: {path.name for path in folder.glob("[!.]*.csv")} for folder in (reference, fresh)}
    for folder, names in present.items():
        if not names:
            raise CommandError(f"There are no tables in {folder}.")
    names = set.union(*present.values())
    listed = set() if exact else {tolerance.file for tolerance in tolerances}
    tables = [judge(name, reference, fresh, tolerances, exact) for name in sorted(names | listed)]
    return Report(tables, _turned(reference, fresh), _origins(reference, fresh, names))


@contextmanager
def committed(profile: str) -> Iterator[tuple[Path, str]]:
    """Yield a temporary folder with results/PROFILE of the last commit, and its name.

    Raises CommandError if the commit does not have it, and, with the reason, if git gives no commit."""
    name, remedy = f"results/{profile}", "name a reference with --reference FOLDER"
    try:
        if not git("ls-tree", "HEAD", name):
            raise CommandError(f"The last commit holds no {name}: {remedy}.")
        archive, commit = git("archive", "HEAD", name), git("rev-parse", "--short", "HEAD").decode().strip()
    except GitError as error:
        raise CommandError(f"There is no last commit to compare with, since {error}: {remedy}.") from error
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as content:
            content.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
            content.extractall(folder)
        yield Path(folder) / name, f"{name} of commit {commit}"


def _tables_of(folder: Path, profile: str) -> Path:
    """Return FOLDER/results/PROFILE if there is such a folder, else FOLDER."""
    inside = folder / "results" / profile
    return inside if inside.is_dir() else folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    run = "the folder of the run, e.g. build/test (default: the repository)"
    parser.add_argument("--run", type=paths_module.typed, default=paths_module.ROOT, help=run)
    parser.add_argument(
        "--reference", type=paths_module.typed, help="a folder to compare with (default: the last commit)"
    )
    parser.add_argument("--exact", action="store_true", help=f"bit for bit, apart from {', '.join(TIMES)}")


def main(options: argparse.Namespace) -> int:
    """Print the report; return 0 if the run agrees with the reference, else 1."""
    fresh, profile = _tables_of(options.run, options.profile), options.profile
    other = options.reference and nullcontext((_tables_of(options.reference, profile),) * 2)
    with other or committed(profile) as (reference, name):
        report = verify(reference, fresh, read_tolerances(TOLERANCES), options.exact)
    print(f"{fresh} against {name}\n{report}")
    return 1 if report.failures else 0
