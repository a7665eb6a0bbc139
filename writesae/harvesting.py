"""Harvest: the factors of chosen cells over many windows, in one pass of the model, without states.

A harvest that does not fit into memory is stored in shards on disk, and SAEs train from there:

    windows = (tokens for _, tokens in each_window(host.tokenizer, texts, 1024))
    harvest_shards(host, windows, [(9, 4)], folder, identity="0.8B")
    sae, record = train(ShardedHistory(folder, (9, 4), "state"), settings, checkpoint="run.safetensors")

`harvest_shards` holds one shard of all cells in memory, and continues at the first missing shard if it is run
again. Training holds a batch and ||X_t - mean||^2 of every token, and gives the same SAE as a history in
memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from writesae import files
from writesae.history import GROUP, VECTOR_GROUP, History, Origin, at_once
from writesae.hosts.base import Host, Shape
from writesae.recurrence import Factors, torch_defaults
from writesae.text import Windows

Cell = tuple[int, int]  # layer, head
FORMAT_VERSION = 2  # 1: log_decay [N, T]
SHARD_WINDOWS = 256


@torch_defaults()
def harvest(
    host: Host,
    windows: Windows | Tensor,
    cells: list[Cell] | None = None,
    batch: int = 16,
    progress: bool = True,
    *,
    layer: int | None = None,
    head: int | None = None,
) -> Factors | dict[Cell, Factors]:
    """Return the factors of a cell (layer, head), or {cell: factors} for `cells` on windows or tokens [N, T].

    batch: windows per run. The factors are in fp32 on the CPU: key, added and log_decay; effective for scalar
    decays and KDA; erase and taken for vector decays. Raises ValueError for no cell, cells not in pairs, one
    that the host does not have, a batch below 1, and tokens that `Host.run` refuses."""
    one = layer is not None
    if one != (head is not None) or one != (cells is None) or isinstance(cells, int):
        raise ValueError("A harvest is of one cell (layer= and head=) or of a list of cells.")
    pairs = list(cells) if layer is None else [(layer, head)]
    if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise ValueError("Each cell is a pair (layer, head): pass a list of pairs, such as [(4, 3)].")
    chosen = list(dict.fromkeys(map(tuple, pairs)))
    if not chosen:
        raise ValueError(f"A harvest needs at least one cell: {host.name} has them in layers {host.recurrent_layers}.")
    if batch < 1:
        raise ValueError(f"A batch takes at least one window, not {batch}.")
    tokens = host.check_windows(windows)
    for cell in chosen:
        host.check_cell(*cell)
    parts: dict[Cell, list[Factors]] = {cell: [] for cell in chosen}
    layers = max(cell[0] for cell in chosen) + 1
    for rows in tqdm(tokens.split(batch), desc="harvest", disable=not progress):
        records = host.each_record(rows.to(host.device), layers)
        for reached in range(layers):
            record = next(records)
            for cell in (cell for cell in chosen if cell[0] == reached):
                parts[cell].append(_kept(host, host.cell_factors(record, cell[1])))
            del record
    whole = {cell: _joined(parts.pop(cell), Origin(host.name, *cell, "added")) for cell in chosen}
    return whole if layer is None else whole[layer, head]


def _kept(host: Host, factors: Factors) -> Factors:
    """Return what a harvest keeps of a cell's factors: fp32 copies, so that the run's tensors are freed."""
    if host.scalar_decay:
        kept = replace(factors, query=None, erase=None, probe=None)
    else:
        effective = None if factors.effective is factors.added else factors.effective
        kept = replace(factors, query=None, effective=effective, probe=None, taken=factors.taken_by_erase())
    return kept.map(lambda x: x.float().cpu().contiguous())


def _joined(parts: list[Factors], origin: Origin) -> Factors:
    """Return the factors of all batches joined. It empties `parts`, so only one field is in memory twice."""
    tensors = [part.tensors() for part in parts]
    parts.clear()
    whole = {name: torch.cat([x.pop(name) for x in tensors]) for name in list(tensors[0])}
    return Factors(query=None, **whole, origin=origin)


def harvest_bytes(shape: Shape, tokens: int) -> int:
    """Return the size of a cell's factors in fp32: per token key, added, effective and one decay; with vector
    decays key, added, decays, erase and taken, and with KDA effective."""
    d_k, d_v = shape.d_k, shape.d_v
    return 4 * tokens * (3 * d_k + (2 + shape.effective) * d_v if shape.vector_decay else d_k + 2 * d_v + 1)


def cell_folder(folder: Path | str, cell: Cell) -> Path:
    """Return the folder of a cell's shards: safetensors files, and shards.json once all are written."""
    return files.local_path(folder) / f"L{cell[0]}-H{cell[1]}"


def harvest_shards(
    host: Host,
    windows: Iterable[Iterable[int]],
    cells: list[Cell],
    folder: Path | str,
    identity: Any,
    shard_windows: int = SHARD_WINDOWS,
    batch: int = 16,
) -> int:
    """Harvest cells over a stream of windows of T token ids in one pass; return the number of shards.

    identity: plain values that identify the host's weights and the code; a Path counts by its file's content.
    Shards of the same tokens and identity are kept. Raises ValueError for no windows, windows of several
    lengths, a cell that the host does not have, and values that are not finite."""
    if not cells:
        raise ValueError("A harvest needs at least one cell.")
    base = json.dumps(identity, sort_keys=True, default=files._plain)
    places = {cell: cell_folder(folder, cell) for cell in cells}
    count = 0
    for count, tokens in enumerate(_stacked(windows, shard_windows), 1):
        paths = {cell: _shard(places[cell], count - 1) for cell in cells}
        content = f"{base} {list(tokens.shape)}".encode() + tokens.numpy().tobytes()
        expected = hashlib.sha256(content).hexdigest()
        if not files.up_to_date(paths.values(), expected):
            _store(host, tokens, paths, batch, expected)
    if not count:
        raise ValueError("There is nothing to harvest: the stream holds no window.")
    for place in places.values():
        _close(place, count, host.name)
    return count


def _shard(place: Path, number: int) -> Path:
    return place / f"{number:05d}.safetensors"


def _stacked(windows: Iterable[Iterable[int]], count: int) -> Iterator[Tensor]:
    """Yield up to `count` windows at a time, [count, T] int64."""
    stream, length = iter(windows), None
    while part := [torch.as_tensor(window) for window in islice(stream, count)]:
        length = length or len(part[0])
        if others := {len(window) for window in part} - {length}:
            lengths = f"the first has {length} tokens, another {others.pop()}"
            raise ValueError(f"All windows must have the same length: {lengths}.")
        yield torch.stack(part)


def _store(host: Host, tokens: Tensor, paths: dict[Cell, Path], batch: int, expected: str) -> None:
    factors = harvest(host, tokens, list(paths), batch, progress=False)
    for cell, path in paths.items():
        try:
            factors[cell].history("state"), factors[cell].history("write")  # checks that values are finite
        except ValueError as error:
            raise ValueError(f"Cell {cell}, shard {path.stem}: {error}") from error
        (path.parent / "shards.json").unlink(missing_ok=True)
        files.save_tensors(path, factors.pop(cell).tensors(), {"fingerprint": expected})


def _close(place: Path, count: int, host: str) -> None:
    """Write shards.json for the first `count` shards, and remove other shards of an earlier harvest."""
    for path in sorted(place.glob("*.safetensors"))[count:]:
        path.unlink()
        files.sidecar(path).unlink(missing_ok=True)
    shards = []
    for path in (_shard(place, number) for number in range(count)):
        with files.reading(str(path)), safe_open(path, framework="pt") as file:
            shape = file.get_slice("key").get_shape()
        shards.append(dict(windows=shape[0], length=shape[1], sha256=files.read_sidecar(path)["sha256"]))
    text = json.dumps(dict(format_version=FORMAT_VERSION, host=host, shards=shards), indent=1) + "\n"
    files.write_atomically(place / "shards.json", lambda partial: partial.write_text(text, encoding="utf-8"))


class ShardedHistory:
    """A cell's history on disk, from which windows are read by index; `train` takes it like a History.

    target, write: as for `Factors.history`; limit: only the first windows. Raises ArtifactError for missing
    or damaged shards; ValueError for an unknown target, a write that was not harvested, and a limit below 1 or too high.
    """

    def __init__(self, folder: Path | str, cell: Cell, target: str, write: str = "added", limit: int | None = None):
        self.place, self.target, self.write = cell_folder(folder, cell), target, write
        host, shards = self._manifest()
        self.origin = Origin(host, *cell, write)
        total = sum(shard["windows"] for shard in shards)
        if limit is not None and not 1 <= limit <= total:
            raise ValueError(f"{limit} windows are asked for and {self.place} has {total}.")
        self.windows, self.length, self.per_shard = limit or total, shards[0]["length"], shards[0]["windows"]
        self._identity = str((self.windows, target, write, [shard["sha256"] for shard in shards]))
        with self._reading(), safe_open(_shard(self.place, 0), framework="pt") as file:
            stored = set(file.keys())
        state = ["added", "log_decay", "erase", "taken"] if "taken" in stored else ["effective", "log_decay"]
        self.names = ["key", *{"write": [write], "state": state}.get(target, [])]
        if lacking := set(self.names) - stored:
            raise ValueError(f"{self.place} holds no {', '.join(sorted(lacking))}: choose write = added.")
        first = self[0]
        self.factored, self.d_k, self.d_v = first.factored, first.d_k, first.d_v
        self._per_window = sum(x.numel() for x in first.tensors().values())
        self.key = first.key[:0]  # for dtype and device

    def _reading(self) -> AbstractContextManager[None]:
        return files.reading(f"The harvest in {self.place}", "harvest it again")

    def _manifest(self) -> tuple[str | None, list[dict]]:
        path = self.place / "shards.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, shards = content["format_version"], content["shards"]
        except OSError as error:
            raise files.ArtifactError(f"{path} is missing: no harvest of this cell was completed there.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise files.ArtifactError(f"{path} is damaged: harvest the cell again.") from error
        if version != FORMAT_VERSION:
            raise files.ArtifactError(f"{path} has format version {version}, and this code reads {FORMAT_VERSION}.")
        for number, shard in enumerate(shards):
            if files.read_sidecar(_shard(self.place, number))["sha256"] != shard["sha256"]:
                raise files.ArtifactError(f"{_shard(self.place, number)} is of another harvest than shards.json.")
        return content.get("host"), shards

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T): windows, and tokens per window."""
        return self.windows, self.length

    @property
    def numbers(self) -> int:
        """The count of numbers in all windows."""
        return self.windows * self._per_window

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: Tensor | slice | list[int] | int) -> History:
        """Return the windows at `index`, in memory; for an int a history with N = 1."""
        index = [index] if isinstance(index, int) else index
        chosen = torch.arange(self.windows)[index]
        read = {name: [None] * len(chosen) for name in self.names}
        with self._reading():
            for rows, places, file in self._files(chosen):
                for name in self.names:
                    part = file.get_slice(name)
                    for row, place in zip(rows, places):
                        read[name][place] = part[row : row + 1]
        required = dict.fromkeys(("query", "key", "added", "log_decay"))
        factors = Factors(**required | {name: torch.cat(parts) for name, parts in read.items()})
        return factors.history(self.target, self.write, self.origin)

    def _files(self, window: Tensor) -> Iterator[tuple[list[int], list[int], safe_open]]:
        """Yield for each shard the rows of the windows in it, their places in `window`, and the open file."""
        shard, row = window // self.per_shard, window % self.per_shard
        for number in shard.unique().tolist():
            places = (shard == number).nonzero().squeeze(-1)
            with safe_open(_shard(self.place, number), framework="pt") as file:
                yield row[places].tolist(), places.tolist(), file

    def factors_at(self, window: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return key [M, d_k] and value [M, d_v] at chosen places: window [M], position [M] (int64)."""
        key, value = (self.key.new_empty(len(window), d) for d in (self.d_k, self.d_v))
        with self._reading():
            for rows, places, file in self._files(window):
                for name, out in zip(self.names[:2], (key, value)):
                    part = file.get_slice(name)
                    for row, place in zip(rows, places):
                        at = int(position[place])
                        out[place] = part[row : row + 1, at : at + 1].flatten()
        return key, value

    def groups(self, windows: int = GROUP) -> Iterator[History]:
        """Yield parts of at most `windows` windows, in order, each in memory."""
        return History.groups(self, windows if self.factored else min(windows, VECTOR_GROUP, at_once(self)))

    def fingerprint(self) -> str:
        """Return a hash of all values, from the checksums of the shards."""
        return hashlib.sha256(self._identity.encode()).hexdigest()

    mean, energy = History.mean, History.energy  # group by group
