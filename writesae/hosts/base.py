"""What every host offers, whatever its family: run, branch off with edits, generate, and the factors of any cell.

A layer is split where the write experiments cut it: `mix` ends at the heads' outputs (before norm and output
projection), `finish` takes them on to the next layer. Teacher-forced, a layer's own queries, keys, values and gates do
not depend on its outputs; an edited run therefore starts at `finish` of the edited layer, with the layers below, and
every earlier position, taken from the native run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch

from writesae.recurrence import Factors, states_before


@dataclass
class Record:
    """What one layer did in a native run over [B, T] tokens; enough to start again anywhere in it.

    hidden: [B, T, D] the layer's input; outputs: [B, T, heads, d] what `finish` takes. A recurrent layer has query,
    key [B, T, H_k, d_k], added, effective [B, T, H, d_v], beta, log_decay [B, T, H] and end, the last state
    [B, H, d_k, d_v]; an attention layer has keys, values [B, H_kv, T, d]. windows: inputs of short convolutions
    (name -> ([B, T, C], how many positions back they reach)).
    """

    hidden: torch.Tensor
    outputs: torch.Tensor
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    end: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    windows: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)


@dataclass
class Past:
    """What a layer needs of the tokens before, row by row: state [R, H, d_k, d_v], or keys and values [R, H_kv, L, d]
    with `seen` [R, L], and the last inputs [R, reach, C] of short convolutions."""

    state: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    windows: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """A native run: tokens [B, T], a Record a layer, and the last hidden states [B, T, D] before the final norm."""

    tokens: torch.Tensor
    records: list[Record]
    final: torch.Tensor


class Host(ABC):
    """One recurrent language model behind the interface that all experiments use. Build with `load_host`."""

    family: str
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

    @abstractmethod
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] token ids to the first layer's input [B, T, D]."""

    @abstractmethod
    def mix(self, layer: int, hidden: torch.Tensor, past: Past | None, positions: torch.Tensor) -> Record:
        """A layer up to its heads' outputs. hidden: [B, T, D], positions: [B, T] places in the sequence."""

    @abstractmethod
    def finish(self, layer: int, hidden: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """From the heads' outputs [B, T, heads, d] to the next layer's input [B, T, D]."""

    @abstractmethod
    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """From the last hidden states [..., D] to logits [..., vocabulary], fp32."""

    @abstractmethod
    def cell_factors(self, record: Record, head: int) -> Factors:
        """The factors of one head of a recorded recurrent layer."""

    @abstractmethod
    def output_projection(self, layer: int, head: int) -> torch.Tensor:
        """W_O of one head: [D, d_v]."""

    @abstractmethod
    def unembedding(self) -> torch.Tensor:
        """W_U: [vocabulary, D]."""

    # What all share.

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

    def _positions(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

    @torch.no_grad()
    def run(self, tokens: torch.Tensor, upto: int | None = None) -> Run:
        """The native run over tokens [B, T]; with `upto`, only the layers below that one (final is then its input)."""
        tokens = tokens.to(self.device)
        hidden, records, positions = self.embed(tokens), [], self._positions(tokens)
        for layer in range(self.layers if upto is None else upto):
            record = self.mix(layer, hidden, None, positions)
            records.append(record)
            hidden = self.finish(layer, hidden, record.outputs)
        return Run(tokens, records, hidden)

    def factors(self, run: Run, layer: int, head: int) -> Factors:
        """The factors of a cell over the run's tokens. Raises ValueError where it is not a recurrent cell."""
        self.check_cell(layer, head)
        return self.cell_factors(run.records[layer], head)

    def past_at(self, record: Record, rows: torch.Tensor, starts: torch.Tensor) -> Past:
        """What a recorded layer knew before position starts[r] of window rows[r]; equal rows are worked out once."""
        length = record.hidden.shape[1] + 1
        places, which = torch.unique(rows * length + starts, return_inverse=True)
        rows, starts, past = places // length, places % length, Past()
        if record.keys is not None:
            longest = int(starts.max())
            past.keys, past.values = record.keys[rows, :, :longest][which], record.values[rows, :, :longest][which]
            past.seen = (torch.arange(longest, device=starts.device) < starts[:, None])[which]
        else:
            past.state = self.state_at(record, rows, starts)[which]
        for name, (inputs, reach) in record.windows.items():
            places = starts[:, None] + torch.arange(-reach, 0, device=starts.device)
            past.windows[name] = (inputs[rows[:, None], places.clamp(min=0)] * (places >= 0)[..., None])[which]
        return past

    def state_at(self, record: Record, rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The states [R, H, d_k, d_v] before starts[r] of window rows[r], rebuilt from the factors."""
        f, longest = record.factors, max(1, int(starts.max()))
        key = self.expand_heads(f["key"][rows, :longest])
        return states_before(key, f["effective"][rows, :longest], f["log_decay"][rows, :longest], starts)

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

        change: [R, steps, d_v], added to the head's output. Differentiable in `change`. With `keep`, also what each
        layer above needs to go on after the last step. Raises ValueError where a row would leave its window.
        """
        steps = change.shape[1]
        if int(starts.max()) + steps > run.tokens.shape[1]:
            raise ValueError(
                f"An edited run of {steps} tokens from position {int(starts.max())} leaves its window of "
                f"{run.tokens.shape[1]} tokens: choose an earlier position or fewer tokens."
            )
        positions = starts[:, None] + torch.arange(steps, device=starts.device)
        record = run.records[layer]
        index = rows[:, None], positions
        outputs = record.outputs[index]
        outputs = torch.cat(
            [outputs[:, :, :head], (outputs[:, :, head] + change)[:, :, None], outputs[:, :, head + 1 :]], 2
        )
        hidden, pasts = self.finish(layer, record.hidden[index], outputs), []
        for above in range(layer + 1, self.layers):
            past = self.past_at(run.records[above], rows, starts)
            now = self.mix(above, hidden, past, positions)
            if keep:
                pasts.append(extend(past, now))
            hidden = self.finish(above, hidden, now.outputs)
        return hidden, pasts

    @torch.no_grad()
    def decode(self, pasts: list[Past], token: torch.Tensor, position: int, count: int) -> torch.Tensor:
        """Greedy continuation [R, count + 1] that begins with `token` [R], which stands at `position`."""
        chosen = [token]
        for step in range(count):
            hidden = self.embed(chosen[-1][:, None])
            positions = torch.full((len(token), 1), position + step, device=token.device)
            for layer in range(self.layers):
                record = self.mix(layer, hidden, pasts[layer], positions)
                pasts[layer] = extend(pasts[layer], record)
                hidden = self.finish(layer, hidden, record.outputs)
            chosen.append(self.logits(hidden[:, -1]).argmax(-1))
        return torch.stack(chosen, 1)


def extend(past: Past, record: Record) -> Past:
    """What the layer needs after the tokens of `record`, which themselves came after `past`."""
    longer = Past(state=record.end)
    if record.keys is not None:
        longer.keys = torch.cat([past.keys, record.keys], 2)
        longer.values = torch.cat([past.values, record.values], 2)
        new = past.seen.new_ones(len(past.seen), record.keys.shape[2])
        longer.seen = torch.cat([past.seen, new], 1)
    for name, (inputs, reach) in record.windows.items():
        longer.windows[name] = torch.cat([past.windows[name], inputs], 1)[:, -reach:]
    return longer
