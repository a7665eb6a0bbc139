"""What every host offers, whatever its family: run, branch off with edits, generate, and the factors of any cell.

A layer is split where the write experiments cut it: `mix` ends at the heads' outputs (before norm and output
projection), `finish` takes them on to the next layer. Teacher-forced, a layer's own queries, keys, values and gates do
not depend on its outputs; an edited run therefore starts at `finish` of the edited layer, with the layers below, and
every earlier position, taken from the native run.

A host may be on a GPU. What is asked of it and what it answers (tokens, factors, changes, logits) is on the CPU all the
same, so that nobody else has to know; a run's records and hidden states stay where the model is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from writesae.hosts.past import Past, Prefix, Record, SharedState, extend
from writesae.recurrence import Factors, Groups, states_before


class Shape(NamedTuple):
    """The sizes of a host's states: recurrent layers, heads per layer, rows and columns of a state."""

    layers: int
    heads: int
    d_k: int
    d_v: int
    vector_decay: bool = False


@dataclass
class Run:
    """A native run: tokens [B, T] on the CPU, a Record a layer, and the last hidden states [B, T, D] before the final norm."""

    tokens: torch.Tensor
    records: list[Record]
    final: torch.Tensor


class Host(ABC):
    """One recurrent language model behind the interface that all experiments use. Build with `load_host`."""

    family: str
    model_classes: tuple[str, ...]  # the names of the classes that this adapter takes
    decay_parameters: tuple[str, ...]  # names within a model whose parameters set the decays
    scalar_decay: bool  # True: a state is a decayed sum of rank-1 writes, so SAEs train without states
    layers: int
    recurrent_layers: tuple[int, ...]
    heads: int
    d_k: int
    d_v: int
    vocabulary: int

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name

    # What a family provides.

    @staticmethod
    @abstractmethod
    def build(architecture: dict) -> torch.nn.Module:
        """A model with random weights and slow decays. `architecture`: fields of the family's config."""

    @staticmethod
    @abstractmethod
    def shape(config) -> Shape:
        """Return the Shape of a model from its config (a PreTrainedConfig of the family)."""

    @staticmethod
    def before_training(model: torch.nn.Module) -> None:
        """Prepare a new model for training; most families need nothing."""

    @abstractmethod
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] token ids to the first layer's input [B, T, D]."""

    @abstractmethod
    def mix(self, layer: int, hidden: torch.Tensor, past: Past | None, positions: torch.Tensor) -> Record:
        """A layer up to its heads' outputs. hidden: [B, T, D], positions: [B, T] places in the sequence."""

    @abstractmethod
    def finish(self, layer: int, record: Record, past: Past | None) -> torch.Tensor:
        """From a record's hidden, outputs and beside to the next layer's input [B, T, D]; may add windows to the record."""

    @abstractmethod
    def unembed(self, final: torch.Tensor) -> torch.Tensor:
        """From the last hidden states [..., D] to logits [..., vocabulary], in the model's own precision."""

    @abstractmethod
    def cell_factors(self, record: Record, head: int) -> Factors:
        """The factors of one head of a recorded recurrent layer."""

    @abstractmethod
    def behind_heads(self, layer: int) -> torch.nn.Linear:
        """The output projection of a recurrent layer, from all heads' outputs [..., H d_v] to [..., D]."""

    # What all share.

    def output_projection(self, layer: int, head: int) -> torch.Tensor:
        """W_O of one head: [D, d_v], fp32, on the CPU."""
        self.check_cell(layer, head)
        return self.behind_heads(layer).weight[:, head * self.d_v : (head + 1) * self.d_v].float().cpu()

    def unembedding(self) -> torch.Tensor:
        """W_U: [vocabulary, D], fp32, on the CPU."""
        return self.model.lm_head.weight.float().cpu()

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """From the last hidden states [..., D] to logits [..., vocabulary], fp32, on the CPU."""
        return self.unembed(final).float().cpu()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def cells(self) -> list[tuple[int, int]]:
        """All (layer, head) with a matrix state."""
        return [(layer, head) for layer in self.recurrent_layers for head in range(self.heads)]

    def check_cell(self, layer: int, head: int) -> None:
        """Raises ValueError, in one sentence, where (layer, head) is not a recurrent cell of this host."""
        if layer not in self.recurrent_layers:
            raise ValueError(
                f"Layer {layer} of {self.name} is not recurrent: choose one of {', '.join(map(str, self.recurrent_layers))}."
            )
        if not 0 <= head < self.heads:
            raise ValueError(f"{self.name} has no head {head}: its recurrent layers have heads 0 to {self.heads - 1}.")

    def check_tokens(self, tokens: torch.Tensor) -> None:
        """Raises ValueError, in one sentence, where there are no tokens, or some are no ids of the host's vocabulary."""
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"Tokens are ids, in torch.int64, not in {tokens.dtype}.")
        if not tokens.numel():
            raise ValueError(f"There are no tokens: their shape is {list(tokens.shape)}.")
        outside = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
        if len(outside):
            raise ValueError(
                f"{self.name} has no token {int(outside[0])}: its vocabulary has the ids 0 to {self.vocabulary - 1}."
            )

    def _positions(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

    @torch.no_grad()
    def run(self, tokens: torch.Tensor, upto: int | None = None) -> Run:
        """The native run over tokens [B, T]; with `upto`, only the layers below that one (final is then its input).

        Raises ValueError for tokens of another shape or outside the vocabulary, and for an `upto` outside 0..layers.
        """
        self.check_tokens(tokens)
        if tokens.dim() != 2:
            raise ValueError(f"A run takes tokens [windows, time], not of shape {list(tokens.shape)}.")
        if upto is not None and not 0 <= upto <= self.layers:
            raise ValueError(f"{self.name} has {self.layers} layers: upto lies between 0 and that, and is {upto}.")
        here = tokens.to(self.device)
        hidden, records, positions = self.embed(here), [], self._positions(here)
        for layer in range(self.layers if upto is None else upto):
            record = self.mix(layer, hidden, None, positions)
            records.append(record)
            hidden = self.finish(layer, record, None)
        return Run(tokens.cpu(), records, hidden)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss in nats over [B, T] tokens, differentiable in the model's parameters."""
        hidden, positions = self.embed(tokens), self._positions(tokens)
        for layer in range(self.layers):
            hidden = self.finish(layer, self.mix(layer, hidden, None, positions), None)
        logits = self.unembed(hidden[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def factors(self, run: Run, layer: int, head: int) -> Factors:
        """The factors of a cell over the run's tokens. Raises ValueError where it is not a recurrent cell, or was not run."""
        self.check_cell(layer, head)
        if layer >= len(run.records):
            raise ValueError(
                f"This run ends below layer {len(run.records)}, before layer {layer}: run it further (upto)."
            )
        return self.cell_factors(run.records[layer], head).to("cpu")

    def past_at(self, record: Record, rows: torch.Tensor, starts: torch.Tensor) -> Past:
        """What a recorded layer knew before position starts[r] of window rows[r]; equal rows are worked out once."""
        rows, starts = rows.to(self.device), starts.to(self.device)
        length = record.hidden.shape[1] + 1
        places, which = torch.unique(rows * length + starts, return_inverse=True)
        past, groups = Past(windows=self.windows_at(record, rows, starts)), Groups(which, len(places))
        rows, starts = places // length, places % length
        if record.keys is not None:
            longest = int(starts.max())
            seen = torch.arange(longest, device=starts.device) < starts[:, None]
            past.prefix = Prefix(record.keys[rows, :, :longest], record.values[rows, :, :longest], seen, groups)
        else:
            past.shared = SharedState(self.state_at(record, rows, starts), groups)
        return past

    def windows_at(self, record: Record, rows: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs [R, reach, C] just before position starts[r] of window rows[r], zeros before the first token."""
        found = {}
        for name, (inputs, reach) in record.windows.items():
            places = starts[:, None] + torch.arange(-reach, 0, device=starts.device)
            found[name] = inputs[rows[:, None], places.clamp(min=0)] * (places >= 0)[..., None]
        return found

    def state_at(self, record: Record, rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The states [R, H, d_k, d_v] before starts[r] of window rows[r], rebuilt from the factors (scalar decays)."""
        f, longest = record.factors, max(1, int(starts.max()))
        key = self.expand_heads(f["key"][rows, :longest])
        return states_before(key, f["effective"][rows, :longest], f["log_decay"][rows, :longest], starts)

    @staticmethod
    def carried(past: Past | None) -> dict:
        """What the chunked recurrences take of a past: the state, how rows share it, and whether an end is wanted."""
        if past is None:
            return {}
        if past.last and past.shared is not None:
            return dict(state=past.shared.states, groups=past.shared.groups, end=False)
        return dict(state=past.state, end=not past.last)

    def expand_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H_k, d] to [..., H, d]: each key head serves the consecutive value heads of its group."""
        return x if x.shape[-2] == self.heads else x.repeat_interleave(self.heads // x.shape[-2], dim=-2)

    def branch(
        self,
        run: Run,
        layer: int,
        head: int,
        rows: torch.Tensor,
        starts: torch.Tensor,
        change: torch.Tensor,
        keep: bool = False,
    ) -> tuple[torch.Tensor, list[Past]]:
        """An edited run of the layers from `layer` on: final hidden states [R, steps, D] from starts[r] of window rows[r].

        change: [R, steps, d_v], added to the head's output. Differentiable in `change`. With `keep`, also what the layer
        itself (its state as if unedited) and each layer above needs to go on after the last step. Raises ValueError
        where there is no row, rows, starts and change do not fit the run, or a row would leave its window.
        """
        self.check_cell(layer, head)
        if len(run.records) < self.layers:
            raise ValueError(f"This run ends below layer {len(run.records)}: an edited run needs all {self.layers}.")
        steps = change.shape[1]
        if not len(rows) or rows.shape != starts.shape or change.shape != (len(rows), steps, self.d_v):
            raise ValueError(
                f"An edited run takes rows [R], starts [R] and change [R, steps, {self.d_v}] with R of 1 or more; got "
                f"{list(rows.shape)}, {list(starts.shape)} and {list(change.shape)}."
            )
        check_places(rows, starts, run.tokens)
        if int(starts.max()) + steps > run.tokens.shape[1]:
            raise ValueError(
                f"An edited run of {steps} tokens from position {int(starts.max())} leaves its window of "
                f"{run.tokens.shape[1]} tokens: choose an earlier position or fewer tokens."
            )
        rows, starts, change = (x.to(self.device) for x in (rows, starts, change))
        positions = starts[:, None] + torch.arange(steps, device=starts.device)
        record = run.records[layer]
        index = rows[:, None], positions
        outputs = record.outputs[index]
        outputs = torch.cat(
            [outputs[:, :, :head], (outputs[:, :, head] + change)[:, :, None], outputs[:, :, head + 1 :]], 2
        )
        past = Past(windows=self.windows_at(record, rows, starts))
        beside = {name: x[index] for name, x in record.beside.items()}
        now = Record(record.hidden[index], outputs, beside=beside)
        hidden, pasts = self.finish(layer, now, past), []
        if keep:
            native = self.past_at(record, rows, starts + steps)
            native.windows |= extend(past, now).windows
            pasts.append(native)
        for above in range(layer + 1, self.layers):
            past = self.past_at(run.records[above], rows, starts)
            past.last = not keep
            now = self.mix(above, hidden, past, positions)
            hidden = self.finish(above, now, past)
            if keep:
                pasts.append(extend(past, now))
        return hidden, pasts

    @torch.no_grad()
    def decode(self, pasts: list[Past], token: torch.Tensor, position: int, count: int) -> torch.Tensor:
        """Greedy continuation [R, count + 1] that begins with `token` [R], which stands at `position`."""
        chosen = [token]
        for step in range(count):
            hidden = self.embed(chosen[-1][:, None].to(self.device))
            positions = torch.full((len(token), 1), position + step, device=self.device)
            for layer in range(self.layers):
                record = self.mix(layer, hidden, pasts[layer], positions)
                hidden = self.finish(layer, record, pasts[layer])
                pasts[layer] = extend(pasts[layer], record)
            chosen.append(self.logits(hidden[:, -1]).argmax(-1))
        return torch.stack(chosen, 1)


def check_places(rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
    """Raises ValueError, in one sentence, where rows or positions, any shape, are not those of tokens [B, T, ...]."""
    for what, given, count in (("window", rows, tokens.shape[0]), ("position", positions, tokens.shape[1])):
        outside = given[(given < 0) | (given >= count)]
        if outside.numel():
            raise ValueError(f"The run has no {what} {int(outside[0])}: it has 0 to {count - 1}.")
