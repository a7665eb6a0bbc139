"""The text of the embedded hosts: the docstrings of the installed scientific packages and of Python itself.

A *passage* is one docstring. The hash of its text decides its *split* (host, sae or heldout), so that hosts,
SAEs and experiments never read the same text. The repository stores a manifest instead of the text.
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
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from writesae.text import as_text, split_of

PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "sklearn", "sympy", "networkx", "statsmodels")
SPLITS = {"host": range(0, 78), "sae": range(78, 92), "heldout": range(92, 100)}
MIN_CHARACTERS = 200  # shorter docstrings are mostly signatures
LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Manifest:
    """A description of the text: versions of its sources, passages per split, characters, and a hash."""

    python: str
    packages: dict[str, str]
    passages: dict[str, int]
    characters: int
    sha256: str

    def differences(self, other: Manifest) -> list[str]:
        """Return one sentence for each source of another version; none if the text is the same."""
        if self.sha256 == other.sha256:
            return []
        mine, theirs = ({"python": m.python, **m.packages} for m in (self, other))
        return [
            f"{name} is {mine.get(name, 'missing')} here and {theirs.get(name, 'missing')} in the reference"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ] or ["the versions agree but the text does not: some package files were changed"]


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings in a Python file, and the strings in its calls of `add_newdoc`."""
    try:
        nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError):  # templates and test files that are broken on purpose
        return
    while nodes:  # a walk through statements only, because expressions contain no docstrings
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=True) or ""
        elif isinstance(node, ast.Expr):
            function = getattr(node.value, "func", None)
            if "newdoc" in getattr(function, "attr", getattr(function, "id", "")):
                texts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                yield from (inspect.cleandoc(text) for text in texts if isinstance(text, str))
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            nodes += getattr(node, block, [])


def _files() -> Iterator[Path]:
    """Yield the Python files of the standard library and of PACKAGES, without tests."""
    packages = (importlib.util.find_spec(name).submodule_search_locations[0] for name in PACKAGES)
    for root in map(Path, (sysconfig.get_path("stdlib"), *packages)):
        yield from (path for path in root.rglob("[!.]*.py") if not LEFT_OUT & set(path.relative_to(root).parts))


@lru_cache(maxsize=1)
def passages() -> dict[str, str]:
    """Return {sha256 of the text: text} of all passages, sorted by hash, so that file names do not matter."""
    from pydoc_data.topics import topics

    gc.disable()  # with so many nodes, the search for reference cycles takes as long as the parsing
    try:
        found = ((text, path) for path in _files() for text in _docstrings(path) if len(text) >= MIN_CHARACTERS)
        texts = {as_text(text, str(path)) for text, path in found}
    finally:
        gc.enable()
    texts.update(map(inspect.cleandoc, topics.values()))
    return dict(sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in texts))


def texts(split: str) -> list[str]:
    """Return the texts of a split. Raises ValueError for a name other than host, sae and heldout."""
    if split not in SPLITS:
        raise ValueError(f"The corpus has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return [text for sha, text in passages().items() if split_of(sha, SPLITS) == split]


def versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES, without reading the text."""
    distribution = {"sklearn": "scikit-learn"}
    packages = {p: importlib.metadata.version(distribution.get(p, p)) for p in PACKAGES}
    return {"python": platform.python_version()} | packages


def identity() -> dict[str, str]:
    """Return what identifies the text without reading it: `versions`, and a hash of file names and sizes."""
    return versions() | {"files": _sizes()}


@lru_cache(maxsize=1)
def _sizes() -> str:
    files = sorted(f"{path.name} {path.stat().st_size}" for path in _files())
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def manifest() -> Manifest:
    """Return the manifest of the installed text."""
    counts, packages = Counter(split_of(sha, SPLITS) for sha in passages()), versions()
    python, in_splits = packages.pop("python"), {split: counts[split] for split in SPLITS}
    digest = hashlib.sha256("".join(passages()).encode()).hexdigest()
    return Manifest(python, packages, in_splits, sum(map(len, passages().values())), digest)


def write_manifest(path: Path) -> None:
    path.write_text(json.dumps(asdict(manifest()), indent=2) + "\n", encoding="utf-8")


def check_manifest(path: Path) -> list[str]:
    """Return (and print to stderr) how the installed text differs from the manifest at `path`."""
    differences = manifest().differences(Manifest(**json.loads(Path(path).read_text(encoding="utf-8"))))
    if differences:
        sentence = "The corpus is not the reference corpus, so numbers will differ somewhat: "
        print(f"{sentence}{'; '.join(differences)}.", file=sys.stderr)
    return differences


def train_tokenizer(documents: Iterable[str], vocabulary: int):
    """Return a byte-level BPE (`tokenizers.Tokenizer`) of `vocabulary` tokens; token 0 is END_OF_TEXT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    options = dict(special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **options)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
