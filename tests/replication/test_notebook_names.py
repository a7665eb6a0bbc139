"""What a notebook imports from the two packages exists: deleted names are seen before the notebooks run."""

import ast
import pkgutil
from types import ModuleType

import pytest
from helpers import code_of, imported_names

from replication.study.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def missing(code: str) -> set[str]:
    """The names of replication and writesae that the code imports, or takes from an imported module, in vain."""
    tree = ast.parse(code)
    imported = {
        local: full
        for local, full in imported_names(tree).items()
        if full.partition(".")[0] in ("replication", "writesae")
    }
    absent = {full for full in imported.values() if not exists(full)}
    taken = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            full = imported.get(node.value.id)
            if full and full not in absent and isinstance(pkgutil.resolve_name(full), ModuleType):
                taken.add(f"{full}.{node.attr}")
    return absent | {name for name in taken if not exists(name)}


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_missing_names_are_found():
    code = "from replication import plots\nfrom replication.statistics import spearman, absent\nplots.style()\nplots.none()"
    assert missing(code) == {"replication.statistics.absent", "replication.plots.none"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_imported_name_exists(notebook):
    assert not missing(code_of(notebook))
