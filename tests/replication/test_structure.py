"""The structure of the code: import directions, sizes of functions and packages, and required packages."""

import ast
import re
import sys
import tomllib

from importlinter.cli import lint_imports

from replication.study.paths import ROOT

SOURCES = sorted(path for package in ("writesae", "replication") for path in (ROOT / package).rglob("[!.]*.py"))


def test_imports_go_one_way(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def test_the_method_is_small():
    entries = [
        path for path in (ROOT / "writesae").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert len(entries) <= 12


def test_functions_are_at_most_60_lines():
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long[f"{path.relative_to(ROOT)}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert not long


def test_at_most_2_percent_of_the_lines_are_longer_than_110_characters():
    lines = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(len(line) > 110 for line in lines) <= 0.02 * len(lines)


def test_the_packages_do_not_grow():
    """More lines than this need a reason in the changelog; first look for what can go."""
    lines = {
        package: sum(path.read_text(encoding="utf-8").count("\n") for path in (ROOT / package).rglob("[!.]*.py"))
        for package in ("writesae", "replication")
    }
    assert lines["writesae"] <= 9_600 and lines["replication"] <= 15_700, lines


def imported(package):
    """The names of the packages, outside the standard library, that `package` imports."""
    names = set()
    for path in (ROOT / package).rglob("[!.]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


def test_each_package_imports_only_what_it_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + [*extras["text"], *extras["check"], *extras["devices"]]
    method, both = (
        {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
        for requirements in (needed, needed + extras["replication"] + extras["site"])
    )
    assert imported("writesae") - {"writesae"} <= method
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml", "IPython": "ipykernel"}
    assert {names.get(name, name) for name in imported("replication") - {"writesae", "replication"}} <= both
