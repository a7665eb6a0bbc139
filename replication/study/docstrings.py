"""The text of the embedded hosts: the docstrings of the packages that this project pins.

The paper reads OpenWebText, which a machine without a network cannot. The docstrings of the scientific Python
packages and of the standard library, with `pydoc_data.topics`, are about 20 MB of English and code. The
repository does not hold the text: it is read from the installed packages, and a manifest of versions and
hashes says whether it is the same text.

A *passage* is one docstring. Its *split* (host, sae or heldout) follows from the hash of its text alone, so
that the texts that a host is trained on, that its SAEs are trained on and that experiments read never
overlap.
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
MIN_CHARACTERS = 200  # shorter docstrings are mostly signatures
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Passage:
    """One docstring: its text, its source (package/file:line) and the sha256 of the text."""

    text: str
    source: str
    sha256: str

    @property
    def split(self) -> str:
        return split_of(self.sha256, SPLITS)


@dataclass(frozen=True)
class Manifest:
    """A description of the text: versions of its sources, passages per split, characters, and a hash of all
    of it."""

    python: str
    packages: dict[str, str]
    passages: dict[str, int]
    characters: int
    sha256: str

    def differences(self, other: Manifest) -> list[str]:
        """Return a sentence for each source whose version differs from `other`; none where the text is the
        same."""
        if self.sha256 == other.sha256:
            return []
        mine, theirs = ({"python": m.python, **m.packages} for m in (self, other))
        return [
            f"{name} is {mine.get(name, 'missing')} here and {theirs.get(name, 'missing')} in the reference"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ] or ["the versions agree but the text does not: some package files were changed"]


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each docstring in a Python file, and of each string in an `add_newdoc` call."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and test files that are broken on purpose
        return
    nodes: list[ast.AST] = [tree]
    while nodes:  # statements only: the many expressions hold no docstrings
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield getattr(node, "lineno", 1), text
        elif isinstance(node, ast.Expr) and "newdoc" in _called(node.value):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, inspect.cleandoc(part.value)
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            nodes += getattr(node, block, [])


def _called(node: ast.AST) -> str:
    """Return the last part of a called function's name; empty where `node` is not a call."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def _files() -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of each Python file of the standard library and of PACKAGES, sorted, without
    tests."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"The corpus needs the package {package}: install it with `make env`.")
        roots.append((package, Path(spec.submodule_search_locations[0])))
    for name, root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(relative.parts):
                yield f"{name}/{relative.as_posix()}", path


@contextmanager
def _without_collection() -> Iterator[None]:
    """Switch off the search for reference cycles, which takes as long as the parsing of these many nodes."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@lru_cache(maxsize=1)
def passages() -> tuple[Passage, ...]:
    """Return all passages without repeats, in the order of their hashes (which does not depend on file
    names)."""
    by_hash: dict[str, Passage] = {}
    with _without_collection():
        for name, path in _files():
            for line, text in _docstrings(path):
                if len(text) >= MIN_CHARACTERS:
                    sha = hashlib.sha256(text.encode()).hexdigest()
                    by_hash.setdefault(sha, Passage(text, f"{name}:{line}", sha))
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        text = inspect.cleandoc(text)
        sha = hashlib.sha256(text.encode()).hexdigest()
        by_hash.setdefault(sha, Passage(text, f"pydoc_data.topics:{topic}", sha))
    return tuple(by_hash[sha] for sha in sorted(by_hash))


def texts(split: str) -> list[str]:
    """Return the texts of a split. Raises ValueError for a name other than host, sae and heldout."""
    if split not in SPLITS:
        raise ValueError(f"The corpus has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return [p.text for p in passages() if p.split == split]


def versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES, without reading the text."""
    distribution = {"sklearn": "scikit-learn"}
    packages = {p: importlib.metadata.version(distribution.get(p, p)) for p in PACKAGES}
    return {"python": platform.python_version()} | packages


def manifest() -> Manifest:
    """Return the manifest of the installed text."""
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
    """Return sentences on how the installed text differs from the manifest at `path`; also print them to
    stderr."""
    differences = manifest().differences(Manifest(**json.loads(Path(path).read_text())))
    if differences:
        sentence = "The corpus is not the reference corpus, so numbers will differ somewhat: "
        print(f"{sentence}{'; '.join(differences)}.", file=sys.stderr)
    return differences


def train_tokenizer(documents: Iterable[str], vocabulary: int):
    """Return a byte-level BPE (`tokenizers.Tokenizer`) of `vocabulary` tokens; the first one is
    END_OF_TEXT."""
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
