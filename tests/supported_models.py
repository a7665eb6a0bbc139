"""Write docs/supported_models.md: `python tests/supported_models.py` runs the check on every class, tiny.

The classes are those of the fixture `host`, and of other modules' fixtures of that name if they import the test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from writesae.evaluate.check import COMPARISONS, compare, examine_cells, some
from writesae.hosts.base import Host
from writesae.hosts.load import FAMILIES, adapter

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "supported_models.md"
TEST = "test_each_class_is_in_the_table"
OR = " or "
FACTS = ("class", "family; decay; rank")
TEXT = """# Supported models

`load_host` reads the model classes below from a folder or from the Hugging Face Hub. The tables are the output of
`python -m writesae check` on a small random model of each class, with d_k != d_v and shared key heads where the class
allows it: `python tests/supported_models.py` writes this page, and the tests compare it with what they find. Run the
check on your own model before you spend work on it; it takes about a minute:

    python -m writesae check MODEL --out folder

## What this project computes

A state has one decay per head or one per channel. The rank is that of the effective write, S_t - decay_t S_{{t-1}}.
Two computations agree if they differ by less than 1e-5, relative, in fp64.

{ours}

{meanings_ours}

## What the library's own class does

Of the transformers version in `requirements.lock`, without kernels. A dash: the class has nothing to compare (the
models of this project in plain PyTorch take neither a mask nor a cache). Where small models of a class differ, as with
and without attention layers, both results are there.

{library}

{meanings_library}
"""


def columns(whose: str) -> list[str]:
    """Return the names of the comparisons of one side."""
    return [name for name, comparison in COMPARISONS.items() if comparison.whose == whose]


def row_of(host: Host, comparisons: pd.DataFrame, cells: pd.DataFrame) -> dict[str, str]:
    """Return a class's row: nothing in it depends on the machine."""
    decay = "per head" if host.scalar_decay else "per channel"
    facts = type(host.model).__name__, f"{host.family}; {decay}; {cells.effective_write_rank.max()}"
    verdicts = comparisons.set_index("comparison").verdict.replace("not asked", "-")
    return dict(zip(FACTS, facts, strict=True)) | verdicts.to_dict()


def page(rows: dict[str, dict[str, str]]) -> str:
    """Return the page with these rows."""
    parts = {}
    for whose in ("ours", "library"):
        names = [*(FACTS if whose == "ours" else FACTS[:1]), *columns(whose)]
        lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows.values())]
        parts[whose] = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        meanings = (f"- {name}: {COMPARISONS[name].what}" for name in columns(whose))
        parts[f"meanings_{whose}"] = "\n".join(meanings)
    return TEXT.format(**parts)


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of a page, by class."""
    rows: dict[str, dict[str, str]] = {}
    names: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if not line.startswith("|") or cells[0] == "---":
            continue
        if cells[0] == FACTS[0]:
            names = cells
        else:
            rows[cells[0]] = rows.get(cells[0], {}) | dict(zip(names, cells, strict=True))
    return rows


def test_each_class_is_in_the_table(host, tokens, record_property):
    """A test of every module that imports it, with that module's `host`."""
    run = host.run(tokens[:, :70])
    row = row_of(host, compare(host, run), examine_cells(host, run, some(host, 3)))
    record_property("row", row)
    written = rows_of(PAGE.read_text(encoding="utf-8")).get(row["class"], {})
    assert {name: value for name, value in row.items() if value not in written.get(name, "").split(OR)} == {}
    assert {row[name] for name in columns("ours")} == {"agrees"}


class Collector:
    """A pytest plugin that keeps the rows of the test of the table."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "row" in (found := dict(report.user_properties)):
            row = found["row"]
            self.rows.setdefault(row["class"], []).append(row)

    def joined(self) -> dict[str, dict[str, str]]:
        """Return one row per class; where small models of a class differ, it has both values."""
        return {
            name: {column: OR.join(sorted({row[column] for row in rows})) for column in rows[0]}
            for name, rows in self.rows.items()
        }


if __name__ == "__main__":
    collector = Collector()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.touch()
    pytest.main(
        ["-q", "--tb=no", "-p", "no:cacheprovider", "-k", TEST, str(ROOT / "tests" / "writesae")], plugins=[collector]
    )
    classes = (name for family in FAMILIES for name in adapter(family).model_classes)
    rows = collector.joined()
    PAGE.write_text(page({name: rows[name] for name in classes if name in rows}), encoding="utf-8")
    print(f"{PAGE}: {len(collector.rows)} classes")
    sys.exit(0 if collector.rows else 1)
