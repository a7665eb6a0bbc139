"""What a stage's result depends on, as one hash: the values it is given, the code that computes it, package versions.

A module's code is its own and that of every module of the two packages that it imports anywhere (in functions too). The
search stops at LOADERS: what those modules give (weights, tokenizers, windows, harvests, SAEs) is hashed by content.
Comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pandas as pd
import torch

from replication.study.paths import ROOT
from writesae.files import file_hash
from writesae.hosts.base import Host

PACKAGES = ("writesae", "replication")
VERSIONS = ("torch", "transformers", "numpy", "scipy", "scikit-learn")  # of packages that decide numbers
LOADERS = {
    "replication.study.fingerprint",
    "replication.study.lock",
    "replication.study.paths",
    "replication.study.profile",
    "replication.study.stages",
    "replication.study.study",
    "writesae.files",
    "writesae.hosts.hub",
    "writesae.hosts.load",
}


class Later:
    """A value that a function computes when it is first asked for, and that counts by the function and what it is given."""

    def __init__(self, function: FunctionType, **given: Any):
        self.function, self.given, self._lock = function, given, threading.Lock()

    def __call__(self) -> Any:
        """Return the value; threads that ask at once share one computation."""
        with self._lock:
            if not hasattr(self, "_value"):
                self._value = self.function(**self.given)
        return self._value


def fingerprint(modules: Iterable[str] = (), **inputs: Any) -> str:
    """Return a hash of the content of `inputs`, of the code of `modules` (dotted names) and of package versions.

    Inputs may be plain values, paths (which count by the content of their file), functions (by name and code), tensors,
    arrays, tables, dataclasses, pydantic models, torch modules, hosts (by name) and `Later`, and containers of these.

    Raises TypeError for a value of another kind, ArtifactError for a missing file, ValueError for an unknown module.
    """
    functions: set[str] = set()
    plain = _content(inputs, functions)
    code = code_hash({*modules, *functions})
    text = json.dumps({"inputs": plain, "code": code, "versions": _versions()})
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def _content(value: Any, functions: set[str]) -> Any:
    """Return a value as plain JSON; the modules of functions are added to `functions`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return ["file", file_hash(value)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return ["array", str(value.dtype), list(value.shape), _bytes_hash(value.detach().cpu().contiguous())]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ["array", str(value.dtype), list(value.shape), _bytes_hash(np.ascontiguousarray(value))]
    if isinstance(value, pd.DataFrame):
        rows = pd.util.hash_pandas_object(value, index=False).to_numpy()
        return ["table", [str(name) for name in value], [str(x) for x in value.dtypes], _bytes_hash(rows)]
    if isinstance(value, FunctionType):
        if value.__module__.partition(".")[0] in PACKAGES:
            functions.add(value.__module__)
        return ["function", value.__module__, value.__qualname__]
    if isinstance(value, Later):
        return ["later", _content(value.function, functions), _content(value.given, functions)]
    if isinstance(value, Host):
        return ["host", value.name]
    if isinstance(value, torch.nn.Module):
        parts = getattr(value, "config", None), value.state_dict()
        return ["module", type(value).__qualname__, _content(parts, functions)]
    if hasattr(value, "model_dump"):
        return _content(value.model_dump(mode="json"), functions)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, _content(fields, functions)]
    if isinstance(value, Mapping):
        items = [[_content(key, functions), _content(x, functions)] for key, x in value.items()]
        return ["mapping", sorted(items, key=json.dumps)]
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return [_content(x, functions) for x in value]
    raise TypeError(f"A fingerprint is made of values with content, not of {type(value).__name__}.")


def _bytes_hash(array: torch.Tensor | np.ndarray) -> str:
    data = array.flatten().view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array
    return hashlib.sha256(data).hexdigest()


# Code


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of a module of the packages by its dotted name; None where there is no such module."""
    parts = name.split(".")
    if parts[0] not in PACKAGES or parts[-1] == "__init__" or not all(part.isidentifier() for part in parts):
        return None
    base = root.joinpath(*parts)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Return the absolute name of the module in `from ... import`, as seen from `module`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".") if is_package else module.split(".")[:-1]
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join(parts + ([node.module] if node.module else []))


def _imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Yield the dotted names that a syntax tree may import; many of them are not modules of the packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def _read(name: str, path: Path, version: tuple[int, int], root: Path) -> tuple[frozenset[str], bytes]:
    """Return the modules that a module imports, and its code without docstrings.

    Stages ask often, and parsing is slow: each version of a file (time of the last change, size) is parsed once.
    Raises ValueError for invalid Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{path.relative_to(root)} is not valid Python: line {error.lineno}.") from error
    names = {x for x in _imported(tree, name, path.name == "__init__.py") if module_file(x, root)}
    return frozenset(names - {name}), f"{name}\n{ast.dump(_without_docstrings(tree))}\n".encode()


def _module(name: str, root: Path) -> tuple[frozenset[str], bytes]:
    """Return `_read` of a module. Raises ValueError where there is none of that name."""
    path = module_file(name, root)
    if path is None:
        raise ValueError(f"There is no module {name} in this project.")
    status = path.stat()
    return _read(name, path, (status.st_mtime_ns, status.st_size), root)


def module_closure(names: Iterable[str], root: Path = ROOT) -> set[str]:
    """Return the dotted names of modules and of all that they import, directly or not, LOADERS left out.

    Raises ValueError for a name that is not a module of the packages and for a module that is not valid Python.
    """
    closure: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            waiting += _module(name, root)[0] - LOADERS
    return closure


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body[0] = ast.Pass()
    return tree


def code_hash(names: Iterable[str], root: Path = ROOT) -> str:
    """Return a hash of the code of modules and of all that they depend on. Raises ValueError as `module_closure`."""
    total = hashlib.sha256()
    for name in sorted(module_closure(names, root)):
        total.update(_module(name, root)[1])
    return total.hexdigest()
