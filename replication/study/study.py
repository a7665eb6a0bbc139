"""What the notebooks share: a profile's hosts, windows, cells, harvests and SAEs, each made once and kept under build/.

Data flows one way: corpus -> host -> windows -> cells -> harvest -> SAEs -> firings -> experiments -> tables.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path

import pandas as pd
import torch

from replication.study import docstrings, fingerprint, stages
from replication.study import paths as paths_module
from replication.study.lock import writing
from replication.study.profile import Profile, load_profile
from writesae.files import file_hash, load_tensors, read_sidecar, save_tensors, up_to_date
from writesae.history import Origin
from writesae.hosts.base import Host
from writesae.hosts.hub import commit
from writesae.hosts.load import adapter, family_of, load_host
from writesae.recurrence import Factors
from writesae.sae.model import SAE, WEIGHTS
from writesae.text import Corpus, Windows, cut_windows


def split_windows(host: Host, split: str, length: int, limit: int, text: Corpus | None = None) -> Windows:
    """The first `limit` windows of a split: of the installed docstrings, in order of the passages' hashes, or of another
    corpus, in its own order. Raises ValueError where there are fewer, and what `Corpus.documents` raises."""
    if text is None:
        return cut_windows(host.tokenizer, docstrings.texts(split), length, limit)
    return cut_windows(host.tokenizer, text.texts(split), length, limit, f" of {text}, split {split},")


__all__ = ["Study", "open_study", "threads"]

HOST_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # of a model folder, by suffix
MOST_WORKERS = 4  # each holds a group's activations
OUT_OF_MEMORY = (
    "The GPU's memory is too small: in the profile, lower data.batch_windows, replacement.batch_rows or "
    "saes.*.batch_windows; or take a smaller model."
)
LOADING = threading.Lock()  # transformers loads one model at a time


class Study:
    """A profile with its folders. `study.table(name)` reads a result, `study.staged(...)` makes one."""

    def __init__(self, profile: Profile):
        self.profile, self.paths = profile, paths_module.Paths(profile.name)

    @property
    def main(self) -> str:
        """The name of the main host, the profile's first: the one that the paper's headline is asked of."""
        return next(iter(self.profile.hosts))

    def host(self, name: str) -> Host:
        path, section = self.host_path(name), self.profile.hosts[name]
        revision = None if Path(path).exists() else section.revision
        with LOADING:
            return _host(name, str(path), revision, section.tokenizer, self.device, section.dtype)

    @property
    def device(self) -> str:
        """Where hosts run and SAEs train, "cpu" or "cuda"; everything else is on the CPU."""
        given = self.profile.device
        return given if given != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def host_path(self, name: str) -> str | Path:
        """The folder of an embedded host, else the hub id that the profile names. ValueError for a host that is not there."""
        if name not in self.profile.hosts:
            known = ", ".join(self.profile.hosts)
            raise ValueError(f"Profile {self.profile.name} has no host {name!r}: choose one of {known}.")
        local = paths_module.ROOT / self.profile.hosts[name].path
        return local if local.exists() else self.profile.hosts[name].path

    def host_fingerprint(self, name: str) -> dict:
        """Return what identifies a host: its files, or its hub id and revision; its type, tokenizer, text and code."""
        folder, section = Path(self.host_path(name)), self.profile.hosts[name]
        if folder.exists():
            paths = sorted(path for path in folder.iterdir() if path.suffix in HOST_FILES)
            weights = {path.name: _file_hash(path, path.stat().st_mtime_ns) for path in paths}
            module = adapter(family_of(folder)).__module__
        else:
            weights = {"path": section.path, "revision": section.revision}
            module = type(self.host(name)).__module__
        read_with = dict(dtype=section.dtype, tokenizer=self._tokenizer_identity(section.tokenizer))
        return weights | read_with | dict(corpus=self.corpus_fingerprint, code=fingerprint.code_hash([module]))

    @staticmethod
    def _tokenizer_identity(given: str | None) -> dict | str | None:
        """Return the hashes of the files of a tokenizer's folder, else its hub id."""
        if given is None or not Path(given).is_dir():
            return given
        return {path.name: file_hash(path) for path in sorted(Path(given).iterdir()) if path.is_file()}

    @cached_property
    def corpus_fingerprint(self) -> str:
        """A hash of what the text depends on: the packages whose docstrings it is, or the profile's own corpus."""
        own = self.profile.corpus
        return fingerprint.fingerprint(corpus=own.identity() if own else docstrings.versions())

    @property
    def workers(self) -> int:
        """How many processes train SAEs at once."""
        return self.profile.workers or len(os.sched_getaffinity(0))

    # Tables

    def provenance(self, host: str, **more) -> dict:
        """Of a table of one host, or of "all"; `more`: its seconds and fingerprint."""
        config = fingerprint.fingerprint(profile=self.profile)
        known = dict(profile=self.profile.name, config=config, host=host, seed=self.profile.seed)
        revisions = self.revisions(host)
        return known | (dict(revisions=revisions) if revisions else {}) | more

    def revisions(self, host: str) -> dict[str, str | None]:
        """The commits that the hosts ("all", or one) had on the Hub when they were downloaded; empty for folders."""
        named = {name: section for name, section in self.profile.hosts.items() if host in ("all", name)}
        return {n: commit(x.path, x.revision) for n, x in named.items() if not Path(self.host_path(n)).exists()}

    def stage(self, name: str, host: str, groups, compute, /, **given) -> pd.DataFrame:
        """Return a host's part of a table: compute(group, **given) of every group, in their order.

        The part is kept in build/ and read from there where nothing that it depends on has changed, else computed group
        by group, resumably. It depends on what it is given, by content, on the code of `compute` and of functions that
        are given, and on the host. `compute` must be a function of a module, so that it has nothing but what it is
        given. Raises TypeError for another function and for given values without content.
        """
        if "<" in compute.__qualname__ or compute.__closure__:
            raise TypeError(f"The stage {name} must compute with a function of a module, not with {compute}.")
        groups = list(groups)
        identity = self.host_fingerprint(host)
        expected = fingerprint.fingerprint(host=identity, groups=groups, compute=compute, given=given)
        path, available = self._part(name, host), torch.get_num_threads()
        provenance = {} if up_to_date(path, expected) else self.provenance(host)
        # On a CPU several groups are computed at once: most operations are too small to keep more than one core busy.
        workers = 1 if self.device == "cuda" else min(available, MOST_WORKERS, len(groups), self.workers)
        work = partial(compute, **given)
        try:
            with threads(available // workers):
                return stages.staged_table(path, expected, groups, work, self.paths.partial, provenance, workers)
        except torch.OutOfMemoryError as error:
            raise MemoryError(OUT_OF_MEMORY) from error

    def _part(self, name: str, host: str) -> Path:
        return self.paths.build / "tables" / f"{name}-{host}.csv"

    def gather(self, name: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
        """results/<profile>/NAME.csv from the staged parts of the hosts, with the seconds that they took."""
        whole = pd.concat(parts, ignore_index=True)
        records = [read_sidecar(self._part(name, host)) for host in whole.host.unique()]
        return self.write(name, whole, seconds=round(sum(record["seconds"] for record in records), 3))

    def write(self, name: str, frame: pd.DataFrame, host: str = "all", seconds: float = 0.0, **more) -> pd.DataFrame:
        """Write a table that is worked out from other tables, and read it back as everybody will see it. `more`: of its
        provenance."""
        path = self.paths.results / f"{name}.csv"
        stages.write_table(frame, path, self.provenance(host, seconds=seconds, **more))
        return stages.read_table(path)

    def table(self, name: str) -> pd.DataFrame:
        """results/<profile>/NAME.csv. Raises ArtifactError where it is missing or damaged."""
        return stages.read_table(self.paths.results / f"{name}.csv")

    def kept_table(self, name: str) -> pd.DataFrame | None:
        """A table that no notebook makes (artifacts.KEPT): results/<profile>/NAME.csv of this run, else the repository's; None
        where neither is there."""
        own = self.paths.results / f"{name}.csv"
        paths = (own, paths_module.ROOT / own.relative_to(self.paths.root))
        return next((stages.read_table(path) for path in paths if path.is_file()), None)

    # Windows, cells, SAEs

    def survey_layers(self, host: str) -> tuple[int, ...]:
        """The recurrent layers whose every head is surveyed; none where the profile asks for no firings of them."""
        settings = self.profile.section("replacement", host)
        return self.host(host).recurrent_layers[:: settings.survey_every] if settings.survey_firings else ()

    def windows_hash(self, host: str, split: str) -> str:
        """Return a hash of the windows of a split ("sae", "heldout")."""
        self.windows(host, split)
        path = self._windows_path(host, split)
        return _file_hash(path, path.stat().st_mtime_ns)

    def _windows_path(self, host: str, split: str) -> Path:
        return self.paths.build / "windows" / f"{host}-{split}.safetensors"

    def windows(self, host: str, split: str) -> Windows:
        """Return the windows of a split ("sae", "heldout"), which are cut once and kept."""
        data = self.profile.data
        count = data.sae_windows if split == "sae" else data.heldout_windows
        path = self._windows_path(host, split)
        inputs = dict(host=self.host_fingerprint(host), split=split, window=data.window, count=count)
        expected = fingerprint.fingerprint(["writesae.text", "replication.study.docstrings"], **inputs)
        if not up_to_date(path, expected):
            own = self.profile.corpus
            made = split_windows(self.host(host), split, data.window, count, own)
            if own:
                kept = f"{made.kept():.0%} of documents hold {data.window} tokens"
                print(f"{own}, split {split}: {kept}", file=sys.stderr)
            tensors = dict(tokens=made.tokens, passage=made.passage)
            save_tensors(path, tensors, {"fingerprint": expected})
        tensors, _ = load_tensors(path)
        return Windows(**tensors)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The cells of the headline: host, place, layer, head (results/<profile>/cells.csv)."""
        return self.table("cells")

    def cell(self, host: str, place: str) -> tuple[int, int]:
        """(layer, head) of a cell of the headline. ValueError where cells.csv has none for the host and place."""
        found = self.cells[(self.cells.host == host) & (self.cells.place == place)]
        if found.empty:
            raise ValueError(
                f"cells.csv has no {place} cell of {host}: give the profile a rule for it, hosts.{host}.cells."
            )
        row = found.iloc[0]
        return int(row.layer), int(row["head"])

    def harvest_path(self, host: str, layer: int, head: int) -> Path:
        """Return the path of the factors of a cell of the headline over the windows of the SAE split."""
        return self.paths.build / "harvest" / f"{host}-L{layer}-H{head}.safetensors"

    def harvested(self, host: str, layer: int, head: int) -> Factors:
        """Return the factors of a cell that notebook 01 has harvested."""
        tensors, _ = load_tensors(self.harvest_path(host, layer, head))
        return Factors(query=None, **tensors, origin=Origin(host, layer, head, self.profile.saes.write))

    def sae_folder(self, host: str, layer: int, head: int, target: str, role: str) -> Path:
        """Return the folder of an SAE."""
        return self.paths.build / "saes" / f"{host}-L{layer}-H{head}-{target}-{role}"

    def sae(self, host: str, layer: int, head: int, target: str, role: str = "main", write: str | None = None) -> SAE:
        """Return the trained SAE of a cell. Raises ValueError where it is of another host, cell, target or write."""
        write = write or self.profile.saes.write
        expect = dict(host=host, layer=layer, head=head, target=target, write=write)
        return SAE.load(self.sae_folder(host, layer, head, target, role), expect)

    def sae_files(self, host: str, role: str = "main") -> list[Path]:
        """The weights of all SAEs of a role, for fingerprints."""
        return sorted((self.paths.build / "saes").glob(f"{host}-*-{role}/{WEIGHTS}"))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with `count` threads; as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=4)
def _host(name: str, path: str, revision: str | None, tokenizer: str | None, device: str, dtype: str) -> Host:
    host = load_host(path, device, getattr(torch, dtype), revision=revision, tokenizer=tokenizer)
    host.name = name  # what the profile calls it, and so all tables
    return host


@lru_cache
def _file_hash(path: Path, changed: int) -> str:
    """The hash of a file that was last changed then: weights of some gigabytes are read once a process."""
    return file_hash(path)


def open_study(profile: str = "mini", lock: bool = True) -> Study:
    """Open the study of a profile, with as many threads as OMP_NUM_THREADS says, else one per core.

    This process then holds the profile's lock until it ends; with `lock` false it does not take it (worker processes of
    one that holds it). Raises ValueError for an unknown profile, LockError while another process holds the lock.
    """
    if not os.environ.get("OMP_NUM_THREADS"):  # torch heeds it by itself
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    study = Study(load_profile(profile))
    if lock:
        writing(study.paths)
    return study
