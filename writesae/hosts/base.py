"""The interface of all hosts: run a model, run it with an edited state, generate, read the factors of a cell.

An *adapter* is a subclass of `Host` for one model family. It splits each layer at the outputs of its heads:
`mix` computes them, and `finish` computes the next layer's input from them. A layer's queries, keys, values
and gates do not depend on these outputs, so an edited run starts at `finish` of the edited layer.

Arguments and results are on the CPU; the records and hidden states of a run are on the model's device. Layers
may be on several devices: each layer's record is on that of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.layers import slow_decays
from writesae.hosts.past import Past, Prefix, Record, extend
from writesae.recurrence import Factors, Groups, states_before, torch_defaults
from writesae.text import Windows

KEPT_NUMBERS = 2**22  # maximum size of what a record keeps for the next edited run


class Shape(NamedTuple):
    """The sizes of a host's states: recurrent layers, heads per layer, rows and columns of a state.

    effective: whether a harvest with vector decays has effective writes, of rank 1, beside the added ones.
    """

    layers: int
    heads: int
    d_k: int
    d_v: int
    vector_decay: bool = False
    effective: bool = False


@dataclass
class Run:
    """A native run: tokens [B, T], one Record per layer, and `final` [B, T, D], before the final norm."""

    tokens: Tensor
    records: list[Record]
    final: Tensor


class Host(ABC):
    """One recurrent language model; `load_host` returns one. Each head's state is [d_k, d_v]."""

    family: str
    model_type: str  # of the config class of the family's first model class in transformers
    model_classes: tuple[str, ...]  # names of the model classes that this adapter takes
    decay_parameters: tuple[str, ...]  # name parts of the parameters that set the decays
    scalar_decay: bool  # True: a state is a decayed sum of rank-1 writes, so SAEs train without states
    normed_together: int = 1  # consecutive heads whose outputs share a norm
    norm_centres: bool = False  # True: the norm behind the heads also subtracts the mean

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.blocks = model.base_model.layers
        self.layers = model.config.num_hidden_layers
        self.recurrent_layers = tuple(range(self.layers))
        self.vocabulary = model.config.vocab_size
        _, self.heads, self.d_k, self.d_v, *_ = self.shape(model.config)

    @classmethod
    def build(cls, architecture: dict) -> torch.nn.Module:
        """Return a model with random weights and slow decays.

        architecture: fields of its config; model_type, by default the family's, chooses another class.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**dict(model_type=cls.model_type) | architecture)
        model = AutoModelForCausalLM._model_mapping[type(config)](config)
        for mixer in model.modules():
            if getattr(mixer, "A_log", torch.empty(0, 0)).ndim == 1:  # one decay per head
                mixer.A_log.data, mixer.dt_bias.data = slow_decays(len(mixer.A_log))
        return model

    @staticmethod
    @abstractmethod
    def shape(config) -> Shape:
        """Return the Shape of a model with this config (a PreTrainedConfig of the family)."""

    @staticmethod
    def before_training(model: torch.nn.Module) -> None:
        """Prepare a new model for training; most families need nothing."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the first layer's input [B, T, D] of token ids [B, T]."""
        return self.model.get_input_embeddings()(tokens)

    @abstractmethod
    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        """Run a layer on hidden [B, T, D] at positions [B, T], after `past`, up to its heads' outputs."""

    @abstractmethod
    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        """Return the next layer's input [B, T, D] of a record; may add to `record.windows`."""

    @abstractmethod
    def unembed(self, final: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of last hidden states [..., D], in the model's precision."""

    @abstractmethod
    def behind_heads(self, layer: int) -> torch.nn.Linear:
        """Return the output projection of a recurrent layer, from [..., H d_v] to [..., D]."""

    @abstractmethod
    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs after the norm behind them, and the factor on them before `behind_heads`.

        Both are [B, T, H, d_v] or broadcast to it. The former have a root mean square of at most 1 over each
        head, or over `normed_together` heads.
        """

    def cell_factors(self, record: Record, head: int) -> Factors:
        """Return the factors of one head of a recorded recurrent layer."""

        def of_head(name: str) -> Tensor:
            x = record.factors[name]
            x = x[:, :, head // (self.heads // x.shape[2])]  # several heads may share a key head
            return x[..., None] if x.ndim == 2 else x

        f = {field.name: of_head(field.name) for field in fields(Factors) if field.name in record.factors}
        if "beta" in record.factors:  # the delta rule: A = diag(decay) - beta key (decay * key)^T
            decay, beta, key = f["log_decay"].exp(), of_head("beta"), f["key"]
            if record.factors["log_decay"].ndim > record.factors["beta"].ndim:  # a decay per channel
                f |= dict(erase=beta * key, probe=decay * key)
            else:
                f |= dict(erase=decay * beta * key, probe=key)
        return Factors(**f)

    def output_projection(self, layer: int, head: int) -> Tensor:
        """Return W_O of one head: [D, d_v], fp32, on the CPU. Raises as `check_cell`."""
        self.check_cell(layer, head)
        return self.behind_heads(layer).weight[:, head * self.d_v : (head + 1) * self.d_v].float().cpu()

    def unembedding(self) -> Tensor:
        """Return W_U: [vocabulary, D], fp32, on the CPU."""
        return self.model.lm_head.weight.float().cpu()

    def logits(self, final: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of last hidden states [..., D], fp32, on the CPU."""
        return self.unembed(final.to(self.final_device)).float().cpu()

    @property
    def device(self) -> torch.device:
        """The device of the embedding; with a device map, layers may be on others."""
        return self.model.get_input_embeddings().weight.device

    def device_of(self, layer: int) -> torch.device:
        """Return the device of a layer's weights."""
        return next(self.blocks[layer].parameters()).device

    @cached_property
    def final_device(self) -> torch.device:
        """The device of the norm behind the layers."""
        elsewhere = {id(p) for part in (self.blocks, self.model.get_input_embeddings()) for p in part.parameters()}
        return [p for p in self.model.base_model.parameters() if id(p) not in elsewhere][-1].device

    @cached_property
    def cells(self) -> list[tuple[int, int]]:
        """All (layer, head) that have a matrix state."""
        return [(layer, head) for layer in self.recurrent_layers for head in range(self.heads)]

    def check_cell(self, layer: int, head: int) -> None:
        """Raise ValueError unless (layer, head) is a recurrent cell of this host."""
        if layer not in self.recurrent_layers:
            choices = ", ".join(map(str, self.recurrent_layers))
            raise ValueError(f"Layer {layer} of {self.name} is not recurrent: choose one of {choices}.")
        if not 0 <= head < self.heads:
            raise ValueError(f"{self.name} has no head {head}: choose one of 0 to {self.heads - 1}.")

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ValueError for an empty tensor, and for tokens that are not ids of the vocabulary."""
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"Tokens are ids, in torch.int64, not in {tokens.dtype}.")
        if not tokens.numel():
            raise ValueError(f"There are no tokens: their shape is {list(tokens.shape)}.")
        outside = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
        if len(outside):
            raise ValueError(f"{self.name} has no token {int(outside[0])}: its ids are 0 to {self.vocabulary - 1}.")

    def check_windows(self, windows: Windows | Tensor) -> Tensor:
        """Return the tokens [windows, time]. Raises ValueError for anything else, and as `check_tokens`."""
        tokens = getattr(windows, "tokens", windows)
        if not isinstance(tokens, Tensor):
            raise ValueError(f"A run takes Windows or their tokens, not a {type(tokens).__name__}.")
        self.check_tokens(tokens)
        if tokens.dim() != 2:
            raise ValueError(f"A run takes tokens [windows, time], not of shape {list(tokens.shape)}.")
        return tokens

    def _positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

    def each_record(self, tokens: Tensor, layers: int) -> Iterator[Record]:
        """Yield the records of the first `layers` layers on tokens [B, T], one in memory at a time if the
        caller keeps none. Of the last layer only `mix` is run."""
        hidden, positions, record = self.embed(tokens), self._positions(tokens), None
        for layer in range(layers):
            if layer:
                hidden, record = self.finish(layer - 1, record, None), None
            device = self.device_of(layer)
            record = self.mix(layer, hidden.to(device), None, positions.to(device))
            yield record

    def _forward(self, tokens: Tensor, layers: int) -> tuple[list[Record], Tensor]:
        """Return the records of the first `layers` layers, and the hidden states [B, T, D] after them."""
        records = list(self.each_record(tokens, layers))
        return records, self.finish(layers - 1, records[-1], None) if layers else self.embed(tokens)

    @torch_defaults()
    def run(self, tokens: Tensor, upto: int | None = None) -> Run:
        """Run the model over tokens [B, T], or only the layers below `upto` (`final` is then its input).

        Raises ValueError for tokens of another shape or vocabulary, and for an `upto` outside 0..layers.
        """
        tokens = self.check_windows(tokens)
        if upto is not None and not 0 <= upto <= self.layers:
            raise ValueError(f"{self.name} has {self.layers} layers: upto is 0 to {self.layers}, not {upto}.")
        layers = self.layers if upto is None else upto
        return Run(tokens.cpu(), *self._forward(tokens.to(self.device), layers))

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean next-token loss over tokens [B, T] in nats, differentiable in the parameters."""
        logits = self.unembed(self._forward(tokens, self.layers)[1][:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def factors(self, run: Run, layer: int, head: int) -> Factors:
        """Return the factors of a cell in a run. Raises ValueError if the run does not have that cell."""
        self.check_cell(layer, head)
        if layer >= (reached := len(run.records)):
            raise ValueError(f"This run ends below layer {reached}, before layer {layer}: run it further.")
        return self.cell_factors(run.records[layer], head).to("cpu")

    def past_at(self, record: Record, rows: Tensor, starts: Tensor) -> Past:
        """Return the Past of a layer at position starts[r] of window rows[r]; equal pairs share one state."""
        rows, starts = rows.to(record.hidden.device), starts.to(record.hidden.device)
        past = Past(windows=self.windows_at(record, rows, starts))
        length = record.hidden.shape[1] + 1
        distinct, which = torch.unique(rows * length + starts, return_inverse=True)
        groups, kept = Groups(which, len(distinct)), record.kept
        if kept is None or not torch.equal(kept[0], distinct):
            kept = distinct, self._shared(record, distinct // length, distinct % length)
            record.kept = kept if sum(x.numel() for x in kept[1]) <= KEPT_NUMBERS else None
        shared = kept[1]
        if record.factors:
            (past.states, *shared), past.groups = shared, groups
        if record.keys is not None:
            past.prefix = Prefix(*shared, groups)
        return past

    def _shared(self, record: Record, rows: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
        """Return the states before position starts[u] of window rows[u], and the keys, values and which of
        them exist, as far as the layer has them."""
        shared = (self.state_at(record, rows, starts),) if record.factors else ()
        if record.keys is None:
            return shared
        longest = int(starts.max())
        seen = torch.arange(longest, device=starts.device) < starts[:, None]
        return *shared, record.keys[rows, :, :longest], record.values[rows, :, :longest], seen

    def windows_at(self, record: Record, rows: Tensor, starts: Tensor) -> dict[str, Tensor]:
        """Return {name: inputs [R, reach, C] before position starts[r] of window rows[r], or zeros}."""
        windows = {}
        for name, (inputs, reach) in record.windows.items():
            positions = starts[:, None] + torch.arange(-reach, 0, device=starts.device)
            windows[name] = inputs[rows[:, None], positions.clamp(min=0)] * (positions >= 0)[..., None]
        return windows

    def state_at(self, record: Record, rows: Tensor, starts: Tensor) -> Tensor:
        """Return the states [R, H, d_k, d_v] before position starts[r] of window rows[r].

        They are sums of effective writes of rank 1, which decay."""
        longest = max(1, int(starts.max()))
        names = "key", "effective", "log_decay"
        key, effective, log_decay = (record.factors[name][rows, :longest] for name in names)
        return states_before(self.expand_heads(key), effective, log_decay, starts)

    @staticmethod
    def carried(past: Past | None) -> dict:
        """Return the arguments state, groups and end of the chunked recurrences."""
        if past is None:
            return {}
        if past.last:
            return dict(state=past.states, groups=past.groups, end=False)
        return dict(state=past.state)

    def expand_heads(self, x: Tensor) -> Tensor:
        """Return x [..., H_k, d] as [..., H, d]: a key head serves consecutive value heads."""
        return x if x.shape[-2] == self.heads else x.repeat_interleave(self.heads // x.shape[-2], dim=-2)

    def branch(
        self,
        run: Run,
        layer: int,
        head: int | Sequence[int],
        rows: Tensor,
        starts: Tensor,
        change: Tensor,
        keep: bool = False,
        alter: Callable[[int, Record], None] | None = None,
    ) -> tuple[Tensor, list[Past]]:
        """Run the layers from `layer` on again, with `change` [R, steps, d_v] added to the head's output.

        head: one, or several different ones, with change [R, steps, heads, d_v]. Row r begins at position
        starts[r] of window rows[r]. alter(layer, record): called for each layer above, between `mix` and
        `finish`; it may change the record. Returns the last hidden states [R, steps, D], differentiable in
        `change`, and, with `keep`, the pasts after the last step: of the layer itself (its state is not
        edited) and of each layer above. Raises ValueError for arguments that do not fit."""
        hidden, pasts = self.edited_layer(run, layer, head, rows, starts, change, keep)
        final, above = self.layers_above(run, layer, rows, starts, hidden, keep, alter)
        return final, pasts + above

    def edited_layer(
        self,
        run: Run,
        layer: int,
        head: int | Sequence[int],
        rows: Tensor,
        starts: Tensor,
        change: Tensor,
        keep: bool = False,
    ) -> tuple[Tensor, list[Past]]:
        """Return the output [R, steps, D] of an edited layer, differentiable in `change`, and its past.

        Arguments and errors are those of `branch`. A layer's output at a position depends on the change there
        and, in families with a token shift, at the position before. Without `keep` there is no past.
        """
        self._check_branch(run, layer, head, rows, starts, change)
        heads, change = (head, change) if isinstance(head, Sequence) else ([head], change[:, :, None])
        steps, native = change.shape[1], run.records[layer]
        rows, starts, change = (x.to(native.hidden.device) for x in (rows, starts, change))
        edited = _edited(native, rows[:, None], _from(starts, steps), heads, change)
        past = Past(windows=self.windows_at(native, rows, starts))
        hidden = self.finish(layer, edited, past)
        if not keep:
            return hidden, []
        after = self.past_at(native, rows, starts + steps)
        after.windows |= extend(past, edited).windows
        return hidden, [after]

    def layers_above(
        self,
        run: Run,
        layer: int,
        rows: Tensor,
        starts: Tensor,
        hidden: Tensor,
        keep: bool = False,
        alter: Callable[[int, Record], None] | None = None,
        upto: int | None = None,
    ) -> tuple[Tensor, list[Past]]:
        """Run the layers above `layer` on outputs `hidden` [R, steps, D], from starts[r] of window rows[r].

        alter: as for `branch`. upto: the last layer to run, by default that of the model. Returns the last
        hidden states [R, steps, D], differentiable in `hidden`, and, with `keep`, each layer's past then."""
        positions, pasts = _from(starts, hidden.shape[1]), []
        for above in range(layer + 1, self.layers if upto is None else upto + 1):
            device = self.device_of(above)
            past = self.past_at(run.records[above], rows, starts)
            past.last = not keep
            record = self.mix(above, hidden.to(device), past, positions.to(device))
            if alter:
                alter(above, record)
            hidden = self.finish(above, record, past)
            if keep:
                pasts.append(extend(past, record))
        return hidden, pasts

    def _check_branch(self, run: Run, layer: int, head: int | Sequence[int], rows, starts, change) -> None:
        several = isinstance(head, Sequence)
        heads = list(head) if several else [head]
        for one in heads:
            self.check_cell(layer, one)
        if not heads or len(set(heads)) < len(heads):
            raise ValueError(f"An edited run takes one head or several different ones, not {heads}.")
        if (reached := len(run.records)) < self.layers:
            raise ValueError(f"This run ends below layer {reached}: an edited run needs all {self.layers}.")
        steps, sizes = change.shape[1], [len(heads), self.d_v] if several else [self.d_v]
        if not len(rows) or rows.shape != starts.shape or change.shape != (len(rows), steps, *sizes):
            raise ValueError(
                f"An edited run takes rows [R], starts [R] and change [R, steps, {', '.join(map(str, sizes))}] "
                f"with R of 1 or more; got {list(rows.shape)}, {list(starts.shape)} and {list(change.shape)}."
            )
        check_places(rows, starts, run.tokens)
        if int(starts.max()) + steps > run.tokens.shape[1]:
            raise ValueError(
                f"An edited run of {steps} tokens from position {int(starts.max())} leaves its window of "
                f"{run.tokens.shape[1]} tokens: choose an earlier position or fewer tokens."
            )

    def step(self, pasts: list[Past], tokens: Tensor, position: int) -> Tensor:
        """Return the last hidden states [R, D] of tokens [R] at `position`; `pasts` move on."""
        hidden, positions = self.embed(tokens[:, None].to(self.device)), torch.full((len(tokens), 1), position)
        for layer in range(self.layers):
            device = self.device_of(layer)
            record = self.mix(layer, hidden.to(device), pasts[layer], positions.to(device))
            hidden = self.finish(layer, record, pasts[layer])
            pasts[layer] = extend(pasts[layer], record)
        return hidden[:, -1]

    @torch.no_grad()
    def decode(self, pasts: list[Past], token: Tensor, position: int, count: int) -> Tensor:
        """Return the greedy continuation [R, count + 1] that begins with `token` [R] at `position`."""
        chosen = [token]
        for step in range(count):
            chosen.append(self.logits(self.step(pasts, chosen[-1], position + step)).argmax(-1))
        return torch.stack(chosen, 1)


def _from(starts: Tensor, steps: int) -> Tensor:
    """Return the positions [R, steps] from each start on."""
    return starts[:, None] + torch.arange(steps, device=starts.device)


def _edited(native: Record, rows, positions, heads: Sequence[int], change: Tensor) -> Record:
    """Return a layer's record at positions [R, steps] of windows rows [R, 1], with some outputs changed."""
    outputs, places = native.outputs[rows, positions], torch.tensor(heads, device=change.device)
    changed = outputs[:, :, places] + change
    outputs = outputs.to(changed.dtype).index_copy(2, places, changed)
    beside = {name: x[rows, positions] for name, x in native.beside.items()}
    return Record(native.hidden[rows, positions], outputs, beside=beside)


def check_places(rows: Tensor, positions: Tensor, tokens: Tensor) -> None:
    """Raise ValueError for rows or positions, of any shape, outside of tokens [B, T, ...]."""
    for what, places, count in (("window", rows, tokens.shape[0]), ("position", positions, tokens.shape[1])):
        if places.is_floating_point():
            raise ValueError(f"The number of a {what} is an integer, not a {places.dtype}: take int() of it.")
        outside = places[(places < 0) | (places >= count)]
        if outside.numel():
            raise ValueError(f"The run has no {what} {int(outside[0])}: it has 0 to {count - 1}.")
