"""Which cell of a page makes a table: the first one that names it, itself or in a function that it calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat

from replication.commands.order import notebooks
from replication.study.fingerprint import module_file
from replication.study.paths import ROOT

Function = tuple[str, str]  # module and name
MAKERS = ("replication.pages.", "replication.scorecard.", "replication.study.training")  # of tables


def cells(page: str) -> dict[str, int]:
    """Return for each table that a page makes the number of the cell that makes it; 0 if none is found."""
    names = [Path(path).stem for path in notebooks()[page].makes if path.endswith(".csv")]
    code, found = nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", as_version=4).cells, {}
    trees = {i: ast.parse(cell.source) for i, cell in enumerate(code) if cell.cell_type == "code"}
    imports = _imports(trees.values())
    for number, tree in trees.items():
        said = _said(tree, imports)
        found |= {name: number for name in names if name in said and name not in found}
    return dict.fromkeys(names, 0) | found


def _imports(trees) -> dict[str, Function]:
    """Return what a name means that is imported from another module: (module, name)."""
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in nodes for alias in node.names}


def _said(tree: ast.AST, imports: dict[str, Function]) -> set[str]:
    """Return the texts and keywords in some code and in all functions of MAKERS that it calls."""
    texts, waiting, seen = _texts(tree), list(_calls(tree, imports)), set()
    while waiting:
        if (function := waiting.pop()) not in seen:
            seen.add(function)
            more, calls = _function(*function)
            texts |= more
            waiting += calls
    return texts


def _texts(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}


def _calls(tree: ast.AST, imports: dict[str, Function]) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
            yield ".".join(imports[node.value.id]), node.attr
        elif isinstance(node, ast.Name) and node.id in imports:
            yield imports[node.id]


@cache
def _function(module: str, name: str) -> tuple[set[str], list[Function]]:
    """Return the texts in a function of MAKERS, and what it calls; nothing for any other name."""
    path = module_file(module) if module.startswith(MAKERS) else None
    tree = ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])
    own = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in own:
        return set(), []
    imports = _imports([tree]) | {function: (module, function) for function in own}
    return _texts(own[name]), list(_calls(own[name], imports))
