"""What a stage's result depends on, as one hash: its inputs, the code that computes it, and package versions.

A module depends on every module of the two packages that it imports anywhere (in functions too), on the `__init__` of
their packages, and on modules that it names in full in a string, as for `importlib`. An f-string such as
f"writesae.hosts.{family}" counts as all modules of that folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
import ast
from collections.abc import Iterator
from functools import cache

from replication.study.paths import ROOT
from writesae.files import _plain

PACKAGES = ("writesae", "replication")
DECIDING = ("torch", "transformers", "numpy", "scipy", "scikit-learn")  # versions that a fingerprint depends on


# Provenance


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = dict.fromkeys(names, "missing")
    for name in found:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(modules: Sequence[str] = (), **inputs: Any) -> str:
    """A hash of everything that a stage's result depends on.

    `modules`: dotted names of the modules that compute it (what they import is counted too). `inputs`: plain values,
    dataclasses, pydantic models, and `Path`s, which count by the content of their file. The versions of the packages
    that decide numbers always count.

    Raises TypeError for a value of another kind, ArtifactError for a missing file, ValueError for an unknown module.
    """
    whole = {"inputs": inputs, "code": code_hash(modules), "versions": _installed(DECIDING)}
    text = json.dumps(whole, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """The file of a module of the package by its dotted name; None where `name` is no such module."""
    parts = name.split(".")
    if parts[0] not in PACKAGES or parts[-1] == "__init__" or not all(part.isidentifier() for part in parts):
        return None
    base = root.joinpath(*parts)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute name of what `from ... import` is about, as seen from `module`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".") if is_package else module.split(".")[:-1]
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join(parts + ([node.module] if node.module else []))


def _named(tree: ast.AST, module: str, is_package: bool, root: Path) -> Iterator[str]:
    """Dotted names that a syntax tree may import; many of them are no modules of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.JoinedStr):
            start = node.values[0].value if node.values and isinstance(node.values[0], ast.Constant) else ""
            if start.split(".")[0] in PACKAGES and start.endswith("."):
                folder = root.joinpath(*start[:-1].split("."))
                yield from (start + path.stem for path in folder.glob("*.py"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in PACKAGES:
            yield node.value


def _imports(source: str, module: str = "", is_package: bool = False, root: Path = ROOT) -> set[str]:
    """The modules of the package that a piece of source imports, with the packages that hold them."""
    tree = ast.parse(source)
    names = {part for name in _named(tree, module, is_package, root) for part in _with_parents(name)}
    return {name for name in names if module_file(name, root)} - {module}


@cache
def _read(name: str, path: Path, version: tuple[int, int], root: Path) -> tuple[frozenset[str], bytes]:
    """The modules that a module imports, and its code without what does not count. Stages ask often, and parsing takes
    long: each version of a file (time of the last change, size) is parsed once. Raises ValueError for invalid Python."""
    source = path.read_text(encoding="utf-8")
    try:
        imports = _imports(source, name, path.name == "__init__.py", root)
        code = ast.dump(_without_docstrings(ast.parse(source)))
    except SyntaxError as error:
        raise ValueError(f"{path.relative_to(root)} is not valid Python: line {error.lineno}.") from error
    return frozenset(imports), f"{name}\n{code}\n".encode()


def _module(name: str, root: Path) -> tuple[frozenset[str], bytes]:
    """`_read` of a module by its name. Raises ValueError where there is none."""
    path = module_file(name, root)
    if path is None:
        raise ValueError(f"There is no module {name} in this package.")
    found = path.stat()
    return _read(name, path, (found.st_mtime_ns, found.st_size), root)


def module_closure(names: Iterable[str], root: Path = ROOT) -> set[str]:
    """The dotted names of the given modules and of all that they import, directly or not.

    Raises ValueError for a name that is no module of the package and for a module that is not valid Python.
    """
    found: set[str] = set()
    waiting = [part for name in names for part in _with_parents(name)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        waiting += _module(name, root)[0]
        found.add(name)
    return found


def closure(name: str, root: Path = ROOT) -> list[Path]:
    """The files of a module and of all modules of the package that it depends on, sorted.

    Raises ValueError for a name that is no module of the package and for a module that is not valid Python.
    """
    return sorted(module_file(found, root) for found in module_closure([name], root))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body[0] = ast.Pass()
    return tree


def code_hash(names: Iterable[str], root: Path = ROOT) -> str:
    """A hash over the code of modules and of all that they depend on; comments, docstrings and layout do not count.

    Raises ValueError for a name that is no module of the package and for a module that is not valid Python.
    """
    total = hashlib.sha256()
    for name in sorted(module_closure(names, root)):
        total.update(_module(name, root)[1])
    return total.hexdigest()
