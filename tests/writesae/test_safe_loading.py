"""No file that is read can run code.

The package, the benchmarks and the notebooks never name a function that would execute a file.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import code_of, imported_names

from replication.commands import order

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("writesae", "replication", "benchmarks", "notebooks")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("[!.]*.py"))
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in order.notebooks()]
UNPICKLERS = {"load", "loads", "Unpickler"}
FORBIDDEN = {f"{module}.{name}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for name in UNPICKLERS}
FORBIDDEN |= {"joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle"}
FORBIDDEN |= {
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "compile",
    "__import__",
}
FORBIDDEN |= {"builtins.eval", "builtins.exec", "torch.hub.load", "torch.jit.load"}
# keyword, required value, default
GUARDED = {"torch.load": ("weights_only", True, None), "numpy.load": ("allow_pickle", False, False)}


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full dotted name of a node, such as numpy.load for `np.load`; empty if the node is not a name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    inner = dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def guarded(call: ast.Call, name: str) -> bool:
    keyword, wanted, default = GUARDED[name]
    given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    # None: **options, whose content is unknown
    return None not in given and given.get(keyword, default) is wanted


def unsafe(source: str) -> Iterator[str]:
    """The places in a program that could execute a file."""
    tree = ast.parse(source)
    names = imported_names(tree)
    fine = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_guarded(n, names)}
    for node in ast.walk(tree):
        name = dotted(node, names) if isinstance(getattr(node, "ctx", None), ast.Load) else ""
        if name in FORBIDDEN or name in GUARDED and id(node) not in fine:
            yield f"line {node.lineno}: {name}"
        if (
            isinstance(node, ast.keyword)
            and node.arg == "trust_remote_code"
            and getattr(node.value, "value", 1) is not False
        ):
            yield f"line {node.value.lineno}: trust_remote_code"
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield f"line {node.lineno}: trust_remote_code"


def _is_guarded(call: ast.Call, names: dict[str, str]) -> bool:
    name = dotted(call.func, names)
    return name in GUARDED and guarded(call, name)


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_executed(path):
    assert not list(unsafe(code_of(path) if path.suffix == ".ipynb" else path.read_text()))


BAD = [
    "import torch; torch.load(path)",
    "import torch; torch.load(path, weights_only=False)",
    "import torch; torch.load(path, weights_only=sure)",
    "import torch; torch.load(path, **options)",
    "from torch import load as read; read(path)",
    "import torch; list(map(torch.load, paths))",
    "import pickle; pickle.loads(content)",
    "from pickle import load; load(file)",
    "import pickle as p; p.Unpickler(file)",
    "eval(text)",
    "exec(text)",
    "import yaml; yaml.load(text, yaml.Loader)",
    "import joblib; joblib.load(path)",
    "import numpy as np; np.load(path, allow_pickle=True)",
    "import pandas as pd; pd.read_pickle(path)",
    "Auto.from_pretrained(name, trust_remote_code=True)",
    "Auto.from_pretrained(name, **{'trust_remote_code': True})",
]


@pytest.mark.parametrize("source", BAD)
def test_what_would_execute_a_file_is_found(source):
    assert list(unsafe(source))


def test_what_only_reads_is_let_through():
    for source in (
        "import torch; torch.load(path, map_location='cpu', weights_only=True)",
        "import numpy as np; np.load(path)",
        "import yaml; yaml.safe_load(text)",
        "import pickle, re; re.compile(pattern); pickle.UnpicklingError",
        "model.eval(); frame.eval(rule)",
        "Auto.from_pretrained(name, trust_remote_code=False)",
    ):
        assert not list(unsafe(source))


def test_the_code_is_all_there():
    assert len(SOURCES) > 40 and len(NOTEBOOKS) > 10
    assert any("torch.load" in path.read_text() for path in SOURCES), "the guarded call that these tests are about"
