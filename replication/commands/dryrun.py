"""Run every notebook of a profile with random weights, tiny counts and the installed docstrings as text.

The weights have the true shapes of the profile's Hub models (profiles/dryrun/hosts.yaml); the counts are in
profiles/dryrun/overrides.yaml. A dry run shows whether these shapes work, and the memory they need."""

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

from replication.commands import CommandError, check_disk, order
from replication.commands import run as run_notebook
from replication.study.lock import LockError, writing
from replication.study.paths import ROOT, Paths, output_root
from replication.study.profile import load_profile, profile_content
from replication.study.yaml_files import read_mapping

SHAPES = ROOT / "profiles" / "dryrun" / "hosts.yaml"
TOKENIZER = ROOT / "models" / "gated_deltanet"  # each random host has these ids, then unused ones
SEED = 0


def padded_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write an embedded host's tokenizer to `folder`, with a vocabulary filled up by unused entries."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids |= {f"<unused{i}>": i for i in range(len(ids), vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)


def make_host(shape: dict, folder: Path) -> None:
    """Write a model with random weights from SEED, in bfloat16, and its tokenizer.

    Matrices that start at zero (RWKV-7's output projections) are drawn too, so that writes reach logits."""
    import torch

    from writesae.hosts.load import adapter, without_triton

    without_triton()
    torch.manual_seed(SEED)
    model = adapter(shape["family"]).build(shape["architecture"])
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(std=0.02)
    shutil.rmtree(folder, ignore_errors=True)
    padded_tokenizer(shape["architecture"]["vocab_size"], folder)
    model.bfloat16().save_pretrained(folder, max_shard_size="50GB")
    (folder / "shape.json").write_text(json.dumps(shape), encoding="utf-8")  # last: the folder is complete


def make_hosts(profile: str) -> None:
    """Make the random hosts that do not exist yet. Raises ValueError if hosts.yaml lacks a model's shapes."""
    shapes = read_mapping(SHAPES, SHAPES.name)
    content = profile_content(ROOT / "profiles" / f"{profile}.yaml")
    paths = {name: section["path"] for name, section in content["hosts"].items()}
    for name, section in load_profile(profile).hosts.items():
        if section.path == paths[name]:  # the repository has the model
            continue
        folder, shape = Path(section.path), shapes.get(paths[name])
        if shape is None:
            raise ValueError(f"The shapes of {paths[name]} are not known: add them to {SHAPES.relative_to(ROOT)}.")
        stored = folder / "shape.json"
        if not stored.is_file() or json.loads(stored.read_text(encoding="utf-8")) != shape:
            print(f"{name}: random weights of the shapes of {paths[name]}", flush=True)
            with ProcessPoolExecutor(1, get_context("spawn")) as other:  # its end frees the memory
                other.submit(make_host, shape, folder).result()


def resident(process: psutil.Process) -> int:
    """Return the bytes in memory of a process and all below it; shared memory counts several times."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            total += one.memory_info().rss
    return total


@contextlib.contextmanager
def peak_memory(every: float = 0.2) -> Iterator[Callable[[], float]]:
    """Measure `resident` of this process at intervals of `every` seconds. Yield a function that returns its
    maximum so far, in GB."""
    process, peak, over = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(every):
            peak = max(peak, resident(process))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak / 1e9
    finally:
        over.set()
        thread.join()


def run(profile: str, names: list[str]) -> list[str]:
    """Run the notebooks `names`, or all of them from nothing. Return the names of those that failed.

    Raises ValueError for an unknown profile, CommandError for an unknown notebook, and as `make_hosts`."""
    load_profile(profile)
    for name in names:
        run_notebook.find(name, profile)
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
    parser.add_argument("names", nargs="*", help="notebooks to run (default: all, from nothing)")
    parser.add_argument("--profile", default="paper", help="a file in profiles/ (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    with mock.patch.dict(os.environ, WRITESAE_DRY_RUN="1"):
        failures = run(options.profile, options.names)
    if failures:
        raise CommandError(f"{', '.join(failures)} of profile {options.profile}.")
    return 0
