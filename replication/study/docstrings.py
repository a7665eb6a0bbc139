"""Text that every environment of this project already has: the docstrings of its pinned packages.

The paper reads OpenWebText; a machine without a network cannot. Docstrings of the scientific Python stack and of the
standard library, with `pydoc_data.topics`, give some 20 MB of English and code. The text is never stored in the
repository: it is read from the installed packages, and a manifest of versions and hashes says whether it is the same.

Words: a *passage* is one docstring; its *split* (host / sae / heldout) follows from the hash of its text alone, so
that the text a host was trained on, the text its SAEs see and the text of every evaluation never overlap.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from writesae.text import split_of

PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "sklearn", "sympy", "networkx", "statsmodels")
SPLITS = {"host": range(0, 78), "sae": range(78, 92), "heldout": range(92, 100)}
SHORTEST = 200  # characters; shorter docstrings are mostly signatures
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Passage:
    """One docstring: its text, where it stands (package/file:line) and the sha256 of the text."""

    text: str
    source: str
    sha256: str

    @property
    def split(self) -> str:
        return split_of(self.sha256, SPLITS)


@dataclass(frozen=True)
class Manifest:
    """What the text is, without the text: versions of its sources, how much there is, and a hash over all of it."""

    python: str
    packages: dict[str, str]
    passages: dict[str, int]
    characters: int
    sha256: str

    def differences(self, other: Manifest) -> list[str]:
        """One sentence for each source whose version differs from `other`; empty where the text is the same."""
        if self.sha256 == other.sha256:
            return []
        mine, theirs = ({"python": m.python, **m.packages} for m in (self, other))
        return [
            f"{name} is {mine.get(name, 'missing')} here and {theirs.get(name, 'missing')} in the reference"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ] or ["the versions agree but the text does not: some package files were changed"]


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring in a Python file, and of each string given to an `add_newdoc`-like call."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken test files
        return
    todo: list[ast.AST] = [tree]
    while todo:  # statements only: expressions hold no docstrings, and there are many
        node = todo.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield getattr(node, "lineno", 1), text
        elif isinstance(node, ast.Expr) and "newdoc" in _called(node.value):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, inspect.cleandoc(part.value)
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, block, [])


def _called(node: ast.AST) -> str:
    """The last name of a called function; empty where `node` is no call."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def _files() -> Iterator[tuple[str, Path]]:
    """(name, path) of every Python file of the standard library and of PACKAGES, sorted, without their tests."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"The corpus needs the package {package}: install it with `make env`.")
        roots.append((package, Path(spec.submodule_search_locations[0])))
    for name, root in roots:
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(inside.parts):
                yield f"{name}/{inside.as_posix()}", path


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for reference cycles: syntax trees have none, and so many nodes that it takes as long as parsing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@lru_cache(maxsize=1)
def passages() -> tuple[Passage, ...]:
    """All passages, without repeats, in order of their hash (an order that owes nothing to file names)."""
    found: dict[str, Passage] = {}
    with _without_collection():
        for name, path in _files():
            for line, text in _docstrings(path):
                if len(text) >= SHORTEST:
                    sha = hashlib.sha256(text.encode()).hexdigest()
                    found.setdefault(sha, Passage(text, f"{name}:{line}", sha))
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        text = inspect.cleandoc(text)
        sha = hashlib.sha256(text.encode()).hexdigest()
        found.setdefault(sha, Passage(text, f"pydoc_data.topics:{topic}", sha))
    return tuple(found[sha] for sha in sorted(found))


def texts(split: str) -> list[str]:
    """The texts of one split. Raises ValueError for a name other than host, sae, heldout."""
    if split not in SPLITS:
        raise ValueError(f"The corpus has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return [p.text for p in passages() if p.split == split]


def versions() -> dict[str, str]:
    """The versions of Python and of the packages whose docstrings are the text, which need not be read for this."""
    distribution = {"sklearn": "scikit-learn"}
    found = {p: importlib.metadata.version(distribution.get(p, p)) for p in PACKAGES}
    return {"python": platform.python_version()} | found


def manifest() -> Manifest:
    """The manifest of the text that is installed here."""
    counts = dict.fromkeys(SPLITS, 0)
    total = hashlib.sha256()
    for passage in passages():
        counts[passage.split] += 1
        total.update(passage.sha256.encode())
    packages = versions()
    return Manifest(
        python=packages.pop("python"),
        packages=packages,
        passages=counts,
        characters=sum(len(p.text) for p in passages()),
        sha256=total.hexdigest(),
    )


def write_manifest(path: Path) -> None:
    path.write_text(json.dumps(asdict(manifest()), indent=2) + "\n")


def check_manifest(path: Path) -> list[str]:
    """Sentences on how the text here differs from the manifest at `path`; they are also printed to stderr."""
    differences = manifest().differences(Manifest(**json.loads(Path(path).read_text())))
    if differences:
        print(
            "The corpus is not the reference corpus, so numbers will differ somewhat: " + "; ".join(differences) + ".",
            file=sys.stderr,
        )
    return differences


def train_tokenizer(documents: Iterable[str], vocabulary: int):
    """A byte-level BPE of `vocabulary` tokens, the first of which is END_OF_TEXT (a `tokenizers.Tokenizer`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
