"""What a stage's result depends on, as one hash: its inputs, the code that computes it, package versions.

The code of a module includes the code of all modules of PACKAGES that it imports, directly or indirectly. The
search for imports stops at LOADERS, because the values that these modules return are hashed by content, and
at the modules that only show results: another colour or heading repeats no experiment.
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
from importlib.util import resolve_name
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
VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn")  # these decide numbers
STUDY = ("fingerprint", "git", "lock", "paths", "profile", "stages", "study")
LOADERS = {f"replication.study.{name}" for name in STUDY}
LOADERS |= {"writesae.files", "writesae.hosts.hub", "writesae.hosts.load"}
LOADERS |= {"replication.layout", "replication.plots"}  # these only show results
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Later:
    """A value that is computed on first use; its fingerprint is that of the function and its arguments."""

    def __init__(self, function: FunctionType, **given: Any):
        self.function, self.given, self._lock = function, given, threading.Lock()

    def __call__(self) -> Any:
        """Return the value. Threads that ask at the same time share one computation."""
        with self._lock:
            if not hasattr(self, "_value"):
                self._value = self.function(**self.given)
        return self._value


def fingerprint(modules: Iterable[str] = (), **inputs: Any) -> str:
    """Return a hash of the content of `inputs`, of the code of `modules` and of versions.

    Inputs may be plain values, paths (the content of the file counts), functions (name and code), tensors,
    arrays, tables, dataclasses, pydantic models, modules, hosts (name), `Later` and containers of these.
    Raises TypeError for any other value, ArtifactError for a missing file, ValueError for an unknown module.
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
    """Return a value as plain JSON, and add the modules of its functions to `functions`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return ["file", file_hash(value)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(array).hexdigest()]
    if isinstance(value, np.ndarray) and value.dtype != object:
        array = np.ascontiguousarray(value)
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(array).hexdigest()]
    if isinstance(value, pd.DataFrame):
        rows = pd.util.hash_pandas_object(value, index=False).to_numpy()
        names, dtypes = list(map(str, value)), list(map(str, value.dtypes))
        return ["table", names, dtypes, hashlib.sha256(rows).hexdigest()]
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
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, _content(fields, functions)]
    if isinstance(value, Mapping):
        items = [[_content(key, functions), _content(x, functions)] for key, x in value.items()]
        return ["mapping", sorted(items, key=json.dumps)]
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return [_content(x, functions) for x in value]
    raise TypeError(f"A fingerprint is made of values with content, not of {type(value).__name__}.")


# Code


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of a module of the packages by its dotted name, or None for any other name."""
    parts = name.split(".")
    if parts[0] not in PACKAGES or parts[-1] == "__init__":
        return None
    base = root.joinpath(*parts)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that a module of `package` may import; many of them are not modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


@cache
def _read(name: str, path: Path, version: tuple[int, int], root: Path) -> tuple[frozenset[str], bytes]:
    """Return the modules that a module imports, and its code without docstrings.

    Each version of a file (time of the last change, size) is parsed once, because parsing is slow. Raises
    ValueError for invalid Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{path.relative_to(root)} is not valid Python: line {error.lineno}.") from error
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = {x for x in _imported(tree, package) if module_file(x, root)}
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return frozenset(names - {name}), f"{name}\n{ast.dump(tree)}\n".encode()


def _module(name: str, root: Path) -> tuple[frozenset[str], bytes]:
    """Return `_read` of a module. Raises ValueError for a name that is not a module."""
    path = module_file(name, root)
    if path is None:
        raise ValueError(f"There is no module {name} in this project.")
    status = path.stat()
    return _read(name, path, (status.st_mtime_ns, status.st_size), root)


def module_closure(names: Iterable[str], root: Path = ROOT) -> set[str]:
    """Return the dotted names of modules and of all that they import, directly or not, without LOADERS.

    Raises ValueError for a name that is not a module of the packages and for invalid Python.
    """
    closure: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            waiting += _module(name, root)[0] - LOADERS
    return closure


def code_hash(names: Iterable[str], root: Path = ROOT) -> str:
    """Return a hash of the code of `module_closure`. Raises ValueError as `module_closure` does."""
    code = (_module(name, root)[1] for name in sorted(module_closure(names, root)))
    return hashlib.sha256(b"".join(code)).hexdigest()
