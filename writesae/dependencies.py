"""What depends on what: the imports of notebooks and modules, for Make and for the fingerprints of stages.

Only the standard library, no import of the package, Python 3.9 or later: the Makefile runs this file before the
environment exists (`python3 -I writesae/dependencies.py` prints rules for Make).

A module depends on every module of the package that it imports anywhere (in functions too), on the `__init__` of their
packages, and on modules that it names in full in a string, as for `importlib`; an f-string such as
f"writesae.hosts.{family}" counts as all modules of that folder.

A notebook says the rest in its own metadata, under `writesae`:
    needs   names of the notebooks that must have run before, e.g. ["05_replacement"]
    files   globs of data it reads from the repository, e.g. ["models/*/config.json"]
    makes   files it leaves, e.g. ["results/{profile}/hosts.csv"]; it is run again where one is missing
"""

from __future__ import annotations

import ast
import graphlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = "writesae"
ROOT = Path(__file__).resolve().parents[1]
STAMPS = "build/$(PROFILE)/stamps"


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """The file of a module of the package by its dotted name; None where `name` is no such module."""
    parts = name.split(".")
    if parts[0] != PACKAGE or parts[-1] == "__init__" or not all(part.isidentifier() for part in parts):
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
            if start.startswith(f"{PACKAGE}.") and start.endswith("."):
                folder = root.joinpath(*start[:-1].split("."))
                yield from (start + path.stem for path in folder.glob("*.py"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            yield node.value


def _imports(source: str, module: str = "", is_package: bool = False, root: Path = ROOT) -> set[str]:
    """The modules of the package that a piece of source imports, with the packages that hold them."""
    tree = ast.parse(source)
    names = {part for name in _named(tree, module, is_package, root) for part in _with_parents(name)}
    return {name for name in names if module_file(name, root)} - {module}


@lru_cache(maxsize=None)
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


class Notebook:
    """One notebook of the suite: its name, what its metadata says, and the modules that its cells import."""

    def __init__(self, path: Path, root: Path = ROOT):
        """Raises ValueError for a file that is no notebook or has a cell that is not valid Python."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cells, said = content["cells"], content["metadata"].get(PACKAGE, {})
        except (ValueError, KeyError) as error:
            raise ValueError(f"notebooks/{path.name} is not a readable notebook.") from error
        self.name, self.root = path.stem, root
        self.needs = list(said.get("needs", []))
        self.files = list(said.get("files", []))
        self.makes = list(said.get("makes", []))
        self.modules = set()
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                self.modules |= self._cell_imports("".join(cell["source"]), number)

    def _cell_imports(self, source: str, number: int) -> set[str]:
        if source.lstrip().startswith("%%"):
            return set()
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            return _imports("\n".join(lines), root=self.root)
        except SyntaxError as error:
            raise ValueError(f"notebooks/{self.name}.ipynb: cell {number} is not valid Python.") from error

    def prerequisites(self) -> list[str]:
        """Files of the repository that the notebook depends on, relative to its root, itself first.

        Raises ValueError for a glob that finds nothing.
        """
        files = {module_file(name, self.root) for name in module_closure(self.modules, self.root)}
        for pattern in self.files:
            matches = [path for path in self.root.glob(pattern) if path.is_file()]
            if not matches:
                raise ValueError(f"notebooks/{self.name}.ipynb needs {pattern}, and there is no such file.")
            files.update(matches)
        return [f"notebooks/{self.name}.ipynb", *sorted(path.relative_to(self.root).as_posix() for path in files)]

    def rules(self) -> str:
        """Make rules: what the notebook's stamp depends on, and that it is remade where an output is missing."""
        stamp = f"{STAMPS}/{self.name}"
        files = [*self.prerequisites(), "profiles/$(PROFILE).yaml"]
        lines = [f"{stamp}: {' '.join(files + [f'{STAMPS}/{name}' for name in self.needs])}"]
        for made in self.makes:
            made = made.replace("{profile}", "$(PROFILE)")
            lines.append(f"{stamp}: $(if $(wildcard {made}),,always)")
        return "\n".join(lines) + "\n"


def notebooks(root: Path = ROOT) -> dict[str, Notebook]:
    """The notebooks by name, in order. Raises ValueError for one that is damaged or needs one that is not there."""
    found = {path.stem: Notebook(path, root) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    for notebook in found.values():
        for name in notebook.needs:
            if name not in found:
                raise ValueError(f"notebooks/{notebook.name}.ipynb needs the notebook {name}, which does not exist.")
    return found


def make_rules(root: Path = ROOT) -> str:
    """All rules for Make. Raises ValueError as `notebooks` does."""
    found = notebooks(root)
    rules = [notebook.rules() for notebook in found.values()]
    files = sorted({name for notebook in found.values() for name in notebook.prerequisites()})
    gone = "".join(f"{name}:\n" for name in files)  # so that a file that was removed since is no error
    return "\n".join([*rules, gone])


def order(root: Path = ROOT) -> list[str]:
    """The names of the notebooks, each after those that it needs. Raises ValueError as `notebooks` does, and for a circle."""
    needs = {name: notebook.needs for name, notebook in notebooks(root).items()}
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        raise ValueError(
            f"The notebooks {', '.join(sorted(set(error.args[1])))} need one another in a circle."
        ) from None


def main() -> int:
    """Print the rules, or with --order the notebooks in order; one sentence and 2 where something cannot be read."""
    try:
        print(" ".join(order()) if "--order" in sys.argv else make_rules(), end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
