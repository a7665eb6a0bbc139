"""A dry run of every notebook of a profile: `python -m replication.commands.dryrun --profile paper`.

The models that the profile would download are replaced by random weights of their true shapes (profiles/dryrun/hosts.yaml),
with decays as their authors start them, so that states have memory; the counts by those of profiles/dryrun/overrides.yaml; the
text is that of the installed docstrings. Everything goes to build/dryrun, figures with DRY RUN across them: what comes
out shows that nothing breaks at these shapes, and how much memory it takes, and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import yaml

from replication.commands import order
from replication.commands import run as run_notebook
from replication.study.paths import ROOT, Paths, output_root
from replication.study.profile import load_profile, profile_content

SHAPES = ROOT / "profiles" / "dryrun" / "hosts.yaml"
TOKENIZER = ROOT / "models" / "gated_deltanet"  # its ids are the first of each random host's
SEED = 0


def padded_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write an embedded host's tokenizer to `folder`, its vocabulary filled up to `vocabulary` with entries that no text
    gives: a model's tokenizer has about as many ids as the model."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    known = content["model"]["vocab"]
    known |= {f"<unused{i}>": i for i in range(len(known), vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)


def make_host(shape: dict, folder: Path) -> None:
    """A model of a family and architecture with random weights from SEED, kept in bfloat16, and its tokenizer. What starts
    at zero (RWKV-7's output projections) is drawn too, or else no write would reach the logits."""
    import torch

    from writesae.hosts.load import adapter, without_triton

    without_triton()
    torch.manual_seed(SEED)
    model = adapter(shape["family"]).build(shape["architecture"])
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(std=0.02)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    padded_tokenizer(shape["architecture"]["vocab_size"], partial)
    model.bfloat16().save_pretrained(partial, max_shard_size="50GB")
    (partial / "shape.json").write_text(json.dumps(shape))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def make_hosts(profile: str) -> list[Path]:
    """The random hosts that the profile needs, made where they are not there; their folders.

    Raises ValueError for a model whose shapes are not known.
    """
    shapes, folders = yaml.safe_load(SHAPES.read_text()), []
    paths = {name: section["path"] for name, section in _content(profile)["hosts"].items()}
    for name, section in load_profile(profile).hosts.items():
        if section.path == paths[name]:
            continue  # it is in the repository
        folder, shape = Path(section.path), shapes.get(paths[name])
        if shape is None:
            raise ValueError(f"The shapes of {paths[name]} are not known: add them to {SHAPES.relative_to(ROOT)}.")
        kept = folder / "shape.json"
        if not kept.is_file() or json.loads(kept.read_text()) != shape:
            print(f"{name}: random weights of the shapes of {paths[name]}", flush=True)
            with ProcessPoolExecutor(1, get_context("spawn")) as other:  # a process keeps the memory that it once had
                other.submit(make_host, shape, folder).result()
        folders.append(folder)
    return folders


def _content(profile: str) -> dict:
    return profile_content(ROOT / "profiles" / f"{profile}.yaml")


def resident(process: psutil.Process) -> int:
    """Bytes that a process and all below it hold in memory. What several of them share counts several times."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the question and the answer
            total += one.memory_info().rss
    return total


@contextlib.contextmanager
def peak_memory(every: float = 0.2) -> Iterator[Callable[[], float]]:
    """Look at this process and those below it every so many seconds; yields a function that gives the most that they have
    held in memory at one time so far, in GB. A notebook's kernel ends before anyone could ask it for its peak."""
    this, most, over = psutil.Process(), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(every):
            most = max(most, resident(this))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield lambda: most / 1e9
    finally:
        over.set()
        watch.join()


def run(profile: str, names: list[str] | None = None) -> list[str]:
    """Run the notebooks, all of them from nothing unless `names` are given; the names of those that failed.

    Raises ValueError for an unknown profile and for a model whose shapes are not known.
    """
    os.environ["WRITESAE_DRY_RUN"] = "1"
    load_profile(profile)
    paths, failed = Paths(profile), []
    if not names:
        for folder in (paths.build, paths.results, paths.figures):
            shutil.rmtree(folder, ignore_errors=True)
    make_hosts(profile)
    began = time.monotonic()
    for name in names or order.order():
        start = time.monotonic()
        with peak_memory() as peak:
            try:
                run_notebook.run(name, profile)
            except run_notebook.RunError as error:
                failed.append(name)
                print(f"{name} failed: {error}", file=sys.stderr)
        print(f"DRY RUN {name}: {time.monotonic() - start:.0f} s, peak memory {peak():.1f} GB", flush=True)
    print(f"DRY RUN of {profile}: {(time.monotonic() - began) / 60:.1f} minutes, output in {output_root()}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 with a sentence on stderr where a notebook failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run on what is there (default: all, from nothing)")
    parser.add_argument("--profile", default="paper", help="a file in profiles/ (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        failed = run(given.profile, given.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if failed:
        print(f"The dry run of {given.profile} failed in {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
