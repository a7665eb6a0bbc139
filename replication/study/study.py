"""What all pages of a profile share, kept under build/: hosts, windows, cells, harvests, SAEs, tables.

Data flows one way: corpus -> host -> windows -> cells -> harvest -> SAEs -> firings -> experiments -> tables.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import pandas as pd
import torch
from joblib import cpu_count

from replication.study import docstrings, fingerprint, paths, stages
from replication.study.lock import writing
from replication.study.profile import Profile, load_profile
from writesae.files import file_hash, load_tensors, read_sidecar, save_tensors, up_to_date
from writesae.history import Origin
from writesae.hosts.base import Host
from writesae.hosts.hub import commit, model_files
from writesae.hosts.load import adapter, family_of, load_host
from writesae.recurrence import Factors
from writesae.sae.model import SAE
from writesae.text import Corpus, Windows, cut_windows, end_of_text

MOST_WORKERS = 4  # because each holds the activations of a group in memory
OUT_OF_MEMORY = (
    "The GPU's memory is too small: in the profile, lower data.batch_windows, replacement.batch_rows or "
    "saes.*.batch_windows; or take a smaller model."
)
LOADING = threading.Lock()  # transformers loads one model at a time


def split_windows(host: Host, split: str, length: int, limit: int, text: Corpus | None = None) -> Windows:
    """Return the first `limit` windows of a split of the installed docstrings, or of another corpus.

    Raises ValueError if there are fewer, and what `Corpus.documents` raises.
    """
    if text is None:
        return cut_windows(host.tokenizer, docstrings.texts(split), length, limit)
    return cut_windows(host.tokenizer, text.texts(split), length, limit, f" of {text}, split {split},")


def folder_or_id(name: str) -> str | Path:
    """Return the folder of a model or tokenizer that a profile names, else the name, which is a Hub id."""
    folder = paths.in_repository(name)
    return folder if folder.exists() else name


class Study:
    """A profile with its folders. `study.table(name)` reads a result, `study.stage(...)` computes one."""

    def __init__(self, profile: Profile):
        self.profile, self.paths = profile, paths.Paths(profile.name)

    @property
    def main(self) -> str:
        """The name of the main host, the profile's first: the headline is about it."""
        return next(iter(self.profile.hosts))

    def host(self, name: str) -> Host:
        section, places = self.profile.hosts[name], self._places(name)
        revision = None if isinstance(places[0], Path) else section.revision
        content = str([_content(place) for place in places if isinstance(place, Path)])
        with LOADING:
            return _host(name, *places, revision, self.device, section.dtype, content)

    @property
    def device(self) -> str:
        """Where hosts run and SAEs train, "cpu" or "cuda"; everything else is on the CPU."""
        device = self.profile.device
        return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def host_path(self, name: str) -> str | Path:
        """Return the folder of a local host, else its hub id. Raises ValueError for an unknown host."""
        if name not in self.profile.hosts:
            names = ", ".join(self.profile.hosts)
            raise ValueError(f"Profile {self.profile.name} has no host {name!r}: choose one of {names}.")
        return self._places(name)[0]

    def _places(self, name: str) -> list[str | Path | None]:
        """Return the folders, or else hub ids, of a host and of its tokenizer; None: that of the host."""
        named = self.profile.hosts[name].path, self.profile.hosts[name].tokenizer
        return [x and folder_or_id(x) for x in named]

    def host_fingerprint(self, name: str) -> dict:
        """Return what identifies a host: files (or hub id and commit), type, tokenizer, text and code."""
        place, section = self.host_path(name), self.profile.hosts[name]
        local = isinstance(place, Path)
        family = adapter(family_of(place)) if local else type(self.host(name))  # once it is loaded, it has a commit
        model, tokenizer = _content(place, section.revision), _content(self._places(name)[1])
        code, text = fingerprint.code_hash([family.__module__]), self.corpus_fingerprint
        return dict(model=model, dtype=section.dtype, tokenizer=tokenizer, corpus=text, code=code)

    @cached_property
    def corpus_fingerprint(self) -> str:
        """A hash of what the text depends on: the installed packages, or the profile's own corpus."""
        corpus = self.profile.corpus
        return fingerprint.fingerprint(corpus=corpus.identity() if corpus else docstrings.identity())

    @property
    def workers(self) -> int:
        """The number of processes that train SAEs at the same time."""
        return self.profile.workers or cpu_count()

    # Tables

    def provenance(self, host: str, **more) -> dict:
        """Return the provenance of a table of one host, or of "all", with the fields `more`.

        revisions: the commits on the Hub of the hosts that were downloaded.
        """
        named = {name: section for name, section in self.profile.hosts.items() if host in ("all", name)}
        remote = {name: x for name, x in named.items() if not Path(self.host_path(name)).exists()}
        revisions = {name: commit(x.path, x.revision) for name, x in remote.items()}
        config = fingerprint.fingerprint(profile=self.profile)
        fields = dict(profile=self.profile.name, config=config, host=host, seed=self.profile.seed)
        return fields | (dict(revisions=revisions) if revisions else {}) | more

    def stage(self, name: str, host: str, groups, compute, /, **given) -> pd.DataFrame:
        """Return a host's part of a table: the rows of compute(group, **given) for all groups in order.

        The part is kept in build/, and computed again (group by group, resumably) only if something has
        changed: the host, the groups, the content of `given`, the code of `compute` or of functions in
        `given`. `compute` must be a module-level function, so that it depends on nothing else. Raises
        TypeError for any other function, and for values that `fingerprint` does not take.
        """
        if "<" in compute.__qualname__ or compute.__closure__:
            raise TypeError(f"The stage {name} must compute with a function of a module, not with {compute}.")
        groups = list(groups)
        identity = self.host_fingerprint(host)
        expected = fingerprint.fingerprint(host=identity, groups=groups, compute=compute, given=given)
        path, available = self._part(name, host), torch.get_num_threads()
        provenance, folder = {} if up_to_date(path, expected) else self.provenance(host), self.paths.partial
        # On a CPU several groups run at once: most operations are too small to keep more than one core busy.
        workers = 1 if self.device == "cuda" else min(available, MOST_WORKERS, len(groups), self.workers)
        work = partial(compute, **given)
        try:
            with threads(available // workers):
                return stages.staged_table(path, expected, groups, work, folder, provenance, workers)
        except torch.OutOfMemoryError as error:
            raise MemoryError(OUT_OF_MEMORY) from error

    def _part(self, name: str, host: str) -> Path:
        return self.paths.build / "tables" / f"{name}-{host}.csv"

    def gather(self, name: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
        """Write results/<profile>/NAME.csv from the staged parts of the hosts, and return it."""
        table = pd.concat(parts, ignore_index=True)
        records = [read_sidecar(self._part(name, host)) for host in table.host.unique()]
        return self.write(name, table, seconds=round(sum(record["seconds"] for record in records), 3))

    def write(self, name: str, frame: pd.DataFrame, host: str = "all", seconds=0.0, **more) -> pd.DataFrame:
        """Write results/<profile>/NAME.csv and return it as read back. more: fields of its provenance."""
        path = self.paths.results / f"{name}.csv"
        stages.write_table(frame, path, self.provenance(host, seconds=seconds, **more))
        return stages.read_table(path)

    def table(self, name: str) -> pd.DataFrame:
        """Return results/<profile>/NAME.csv. Raises ArtifactError if it is missing or damaged."""
        return stages.read_table(self.paths.results / f"{name}.csv")

    def kept_table(self, name: str, profile: str = "") -> pd.DataFrame | None:
        """Return a table that this run need not make, of stages.KEPT or of another profile: that of this run, else
        the repository's, else None."""
        path = self.paths.results.with_name(profile or self.profile.name) / f"{name}.csv"
        both = (path, paths.ROOT / path.relative_to(self.paths.root))
        return next((stages.read_table(path) for path in both if path.is_file()), None)

    # Windows, cells, SAEs

    def survey_layers(self, host: str) -> tuple[int, ...]:
        """Return the recurrent layers whose heads are all surveyed; none if survey_firings is 0."""
        settings = self.profile.section("replacement", host)
        return self.host(host).recurrent_layers[:: settings.survey_every] if settings.survey_firings else ()

    def windows_hash(self, host: str, split: str) -> str:
        """Return a hash of the windows of a split ("sae", "heldout")."""
        self.windows(host, split)
        return _hash(self._windows_path(host, split))

    def _windows_path(self, host: str, split: str) -> Path:
        return self.paths.build / "windows" / f"{host}-{split}.safetensors"

    def windows(self, host: str, split: str) -> Windows:
        """Return the windows of a split ("sae", "heldout"), which are cut once and kept."""
        data, corpus, path = self.profile.data, self.profile.corpus, self._windows_path(host, split)
        count = data.sae_windows if split == "sae" else data.heldout_windows
        inputs = dict(host=self.host_fingerprint(host), split=split, window=data.window, count=count)
        expected = fingerprint.fingerprint(["writesae.text", "replication.study.docstrings"], **inputs)
        if not up_to_date(path, expected):
            windows = split_windows(self.host(host), split, data.window, count, corpus)
            if corpus:
                kept = f"{windows.kept():.0%} of documents hold {data.window} tokens"
                print(f"{corpus}, split {split}: {kept}", file=sys.stderr)
            tensors = dict(tokens=windows.tokens, passage=windows.passage)
            separator = end_of_text(self.host(host).tokenizer)
            save_tensors(path, tensors, {"fingerprint": expected, "end_of_text": separator})
        return Windows(**load_tensors(path)[0])

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The cells that page 00 chose: host, place, layer, head (results/<profile>/cells.csv)."""
        return self.table("cells")

    def cell(self, host: str, place: str) -> tuple[int, int]:
        """Return (layer, head) of a place of a host. Raises ValueError if cells.csv does not have it."""
        rows = stages.rows_with(self.cells, host=host, place=place)
        if rows.empty:
            raise ValueError(f"cells.csv has no {place} cell of {host}: add a rule to hosts.{host}.cells.")
        return int(rows.layer.iloc[0]), int(rows["head"].iloc[0])

    def harvest_path(self, host: str, layer: int, head: int) -> Path:
        """Return the path of the factors of a chosen cell over the windows of the SAE split."""
        return self.paths.build / "harvest" / f"{host}-L{layer}-H{head}.safetensors"

    def harvested(self, host: str, layer: int, head: int) -> Factors:
        """Return the factors of a cell that notebook 01 has harvested. ArtifactError if it has not."""
        tensors, _ = load_tensors(self.harvest_path(host, layer, head))
        return Factors(query=None, **tensors, origin=Origin(host, layer, head, self.profile.saes.write))

    def sae_folder(self, host: str, layer: int, head: int, target: str, role: str) -> Path:
        return self.paths.build / "saes" / f"{host}-L{layer}-H{head}-{target}-{role}"

    def sae(self, host: str, layer: int, head: int, target: str, role="main", write: str = "") -> SAE:
        """Return a cell's SAE. FileNotFoundError before training; ValueError for another cell or kind."""
        write = write or self.profile.saes.write
        expect = dict(host=host, layer=layer, head=head, target=target, write=write)
        return SAE.load(self.sae_folder(host, layer, head, target, role), expect)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with `count` threads, and restore their number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=4)
def _host(name: str, path, tokenizer, revision: str | None, device: str, dtype: str, content: str) -> Host:
    """Load a host; `content`, that of its local files, makes it be loaded again when they have changed."""
    host = load_host(path, device, getattr(torch, dtype), revision=revision, tokenizer=tokenizer)
    host.name = name  # the name in the profile and in all tables
    return host


def _content(place: str | Path | None, revision: str | None = None) -> dict[str, str | None] | None:
    """Return {name: hash} of the files of a model's or tokenizer's folder, or {hub id: its commit}."""
    if isinstance(place, Path):
        return {path.name: _hash(path) for path in model_files(place)}
    return place and {place: commit(place, revision) or revision}


def _hash(path: Path) -> str:
    status = path.stat()
    return _file_hash(path, status.st_mtime_ns, status.st_size)


@cache
def _file_hash(path: Path, changed: int, size: int) -> str:
    """Return the hash of a file, which is read once per time of change and size: weights are large."""
    return file_hash(path)


def use_every_core() -> None:
    """Let torch use OMP_NUM_THREADS threads, or else one per core that this process may use."""
    if not os.environ.get("OMP_NUM_THREADS"):  # torch itself reads this variable
        torch.set_num_threads(cpu_count())


def open_study(profile: str = "mini", lock: bool = True) -> Study:
    """Open the study of a profile, with as many threads as OMP_NUM_THREADS says, else one per core.

    With `lock`, this process holds the lock of the profile until it ends; workers of a process that holds it
    do not need it. Torch has its defaults again where settings would change numbers. Raises ValueError for an
    unknown profile and in the folder of another checkout, LockError if another process holds the lock.
    """
    paths.check_checkout()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    use_every_core()
    study = Study(load_profile(profile))
    if lock:
        writing(study.paths)
    return study
