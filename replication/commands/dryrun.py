"""A dry run of every notebook of a profile: `python -m replication dryrun --profile paper`.

Random weights of the true shapes (profiles/dryrun/hosts.yaml) replace the models that the profile would
download; their decays start as their authors start them, so that states have memory. The counts are those of
profiles/dryrun/overrides.yaml, and the text is the installed docstrings. All output goes to build/dryrun,
figures with DRY RUN across them: it shows that nothing breaks at these shapes, and how much memory it takes,
and no more."""

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
from unittest import mock

import psutil
import yaml

from replication.commands import CommandError, check_disk, order
from replication.commands import run as run_notebook
from replication.study.lock import LockError, writing
from replication.study.paths import ROOT, Paths, output_root
from replication.study.profile import load_profile, profile_content

SHAPES = ROOT / "profiles" / "dryrun" / "hosts.yaml"
TOKENIZER = ROOT / "models" / "gated_deltanet"  # its ids are the first of each random host's
SEED = 0


def padded_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write an embedded host's tokenizer to `folder`, with its vocabulary filled up to `vocabulary` by
    entries that no text gives: a model's tokenizer has about as many ids as the model."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids |= {f"<unused{i}>": i for i in range(len(ids), vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)


def make_host(shape: dict, folder: Path) -> None:
    """Write a model of a family and architecture with random weights from SEED, in bfloat16, and its
    tokenizer.

    What starts at zero (RWKV-7's output projections) is drawn too, because else no write would reach the
    logits."""
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
    """Make the random hosts of a profile that are not there yet. Return their folders.

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
            with ProcessPoolExecutor(1, get_context("spawn")) as other:  # a process keeps memory
                other.submit(make_host, shape, folder).result()
        folders.append(folder)
    return folders


def _content(profile: str) -> dict:
    return profile_content(ROOT / "profiles" / f"{profile}.yaml")


def resident(process: psutil.Process) -> int:
    """Return the bytes that a process and all below it hold in memory. What several of them share counts
    several times."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the question and the answer
            total += one.memory_info().rss
    return total


@contextlib.contextmanager
def peak_memory(every: float = 0.2) -> Iterator[Callable[[], float]]:
    """Measure this process and those below it every so many seconds. Yields a function that returns the
    maximum that they have held in memory at one time so far, in GB: a notebook's kernel ends before anyone
    could ask it for its peak."""
    this, peak, over = psutil.Process(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(every):
            peak = max(peak, resident(this))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield lambda: peak / 1e9
    finally:
        over.set()
        watch.join()


def run(profile: str, names: list[str]) -> list[str]:
    """Run the notebooks `names`, or all of them from nothing if there are none. Return the names of those
    that failed.

    Raises ValueError for an unknown profile and for a model whose shapes are not known.
    """
    load_profile(profile)
    paths, failures = Paths(profile), []
    if not names:
        with writing(paths):
            for folder in (paths.build, paths.results, paths.figures):
                shutil.rmtree(folder, ignore_errors=True)
    make_hosts(profile)
    check_disk(profile)
    began = time.monotonic()
    for name in names or order.order():
        start = time.monotonic()
        with peak_memory() as peak:
            try:
                run_notebook.run(name, profile)
            except (CommandError, LockError) as error:
                failures.append(name)
                print(f"{name} failed: {error}", file=sys.stderr)
        print(f"DRY RUN {name}: {time.monotonic() - start:.0f} s, peak memory {peak():.1f} GB", flush=True)
    print(f"DRY RUN of {profile}: {(time.monotonic() - began) / 60:.1f} minutes, output in {output_root()}")
    return failures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="notebooks to run on what is there (default: all, from nothing)")
    parser.add_argument("--profile", default="paper", help="a file in profiles/ (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    with mock.patch.dict(os.environ, WRITESAE_DRY_RUN="1"):
        failures = run(options.profile, options.names)
    if failures:
        raise CommandError(f"{', '.join(failures)} of profile {options.profile}.")
    return 0
