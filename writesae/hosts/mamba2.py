"""Mamba-2 hosts (Dao and Gu 2024): Mamba2ForCausalLM of transformers, and the hybrids with its recurrence.

S_t = alpha_t S_{t-1} + B_t (dt_t x_t)^T with alpha_t = exp(dt_t A), read with C_t. Nothing is erased, so the
added write is the effective write. transformers stores the state transposed. The skip D x does not pass
through the state; it is part of a record's outputs and one of its factors.

All classes have the same mixer; `LAYOUTS` has their names for its sizes and for the parts of a layer.
Attention, MLPs and experts are the library's own modules. The classes differ in what a layer has:

- NemotronH: a mixer, attention, an MLP or experts;
- Bamba, GraniteMoeHybrid: a mixer or attention, then an MLP or experts;
- FalconH1: a mixer beside attention, then an MLP;
- Zamba2: a mixer; in hybrid layers it also reads the output of a transformer block that layers share. This
  block reads the embeddings of the tokens, which are appended to `hidden`.

NemotronH and Zamba2 have a smallest dt. The library applies it in runs over several tokens and leaves it out
where it decodes one token with a cache; here it is always applied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.attention import call_attention, share_prefixes
from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import normalized, rms_norm, short_convolution, split_heads, wide
from writesae.hosts.past import Past, Record
from writesae.recurrence import decayed_chunks


class Layout(NamedTuple):
    """The names in a class: of the config's sizes (heads, d_k, d_v), and of modules."""

    sizes: tuple[str, str, str]
    last_norm: str
    mixer: str = "mamba"
    norm: str = "input_layernorm"
    attention: str = "self_attn"
    feed_norm: str = "pre_ff_layernorm"
    feeds: tuple[str, ...] = ()  # their outputs are added up
    wide_norms: bool = False  # norms multiply by their weights before they round


BAMBA_SIZES = ("mamba_n_heads", "mamba_d_state", "mamba_d_head")
LAYOUTS = {  # by model type
    "mamba2": Layout(("num_heads", "state_size", "head_dim"), "norm_f", "mixer", "norm"),
    "nemotron_h": Layout(
        ("mamba_num_heads", "ssm_state_size", "mamba_head_dim"),
        "norm_f",
        "mixer",
        "norm",
        "mixer",
        wide_norms=True,
    ),
    "bamba": Layout(BAMBA_SIZES, "final_layernorm", feeds=("feed_forward",)),
    "granitemoehybrid": Layout(
        BAMBA_SIZES, "norm", feed_norm="post_attention_layernorm", feeds=("block_sparse_moe", "shared_mlp")
    ),
    "falcon_h1": Layout(BAMBA_SIZES, "final_layernorm", feeds=("feed_forward",)),
    "zamba2": Layout(("n_mamba_heads", "mamba_d_state", "mamba_headdim"), "final_layernorm"),
}


def times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


class Mamba2(Host):
    family = model_type = "mamba2"
    scalar_decay = True
    model_classes = (
        "Mamba2ForCausalLM",
        "NemotronHForCausalLM",
        "BambaForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "FalconH1ForCausalLM",
        "Zamba2ForCausalLM",
    )
    decay_parameters = ("A_log", "dt_bias")

    @staticmethod
    def before_training(model: torch.nn.Module) -> None:
        """Scale the gradients of the rows of in_proj that set the decays (through dt) by 0.05."""
        for mixer in model.modules():
            if hasattr(mixer, "A_log"):
                weight = mixer.in_proj.weight
                scale = torch.ones(len(weight), 1)
                scale[-mixer.num_heads :] = 0.05
                weight.register_hook(lambda gradient, scale=scale: gradient * scale.to(gradient))

    @staticmethod
    def shape(config) -> Shape:
        sizes = LAYOUTS[config.model_type].sizes
        return Shape(len(_recurrent(config)), *(getattr(config, name) for name in sizes))

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        config = model.config
        self.layout, self.width = LAYOUTS[config.model_type], config.hidden_size
        self.recurrent_layers = _recurrent(config)
        self.kinds = config.layer_types
        self.appends = config.model_type == "zamba2"
        self.embedding_scale = getattr(config, "embedding_multiplier", 1)
        self.logit_scale = getattr(config, "lm_head_multiplier", 1) / getattr(config, "logits_scaling", 1)
        self.residual_scale = getattr(config, "residual_multiplier", 1)
        self.mixer_scale = getattr(config, "ssm_out_multiplier", 1)
        self.attention_scales = [getattr(config, f"attention_{side}_multiplier", 1) for side in ("in", "out")]
        self.normed = getattr(config, "mamba_rms_norm", True)
        self.norm_first = getattr(config, "mamba_norm_before_gate", False)
        self.normed_together = self.heads // self.mixer(self.recurrent_layers[0]).n_groups
        self.rotary = getattr(model.base_model, "rotary_emb", None)
        share_prefixes(model)

    def block(self, layer: int) -> torch.nn.Module:
        """Return the module with the mixer of a layer."""
        return getattr(self.blocks[layer], "mamba_decoder", self.blocks[layer])

    def mixer(self, layer: int) -> torch.nn.Module:
        return getattr(self.block(layer), self.layout.mixer)

    def _norm(self, x: Tensor, norm: torch.nn.Module) -> Tensor:
        """Return the norm of x as the class computes it, in the dtype of x."""
        if self.layout.wide_norms:
            return (wide(norm.weight) * normalized(x, norm.variance_epsilon)).to(x.dtype)
        return rms_norm(x, norm)

    def embed(self, tokens: Tensor) -> Tensor:
        embedded = times(super().embed(tokens), self.embedding_scale)
        return torch.cat([embedded, embedded], -1) if self.appends else embedded

    def unembed(self, final: Tensor) -> Tensor:
        normed = self._norm(final, getattr(self.model.base_model, self.layout.last_norm))
        return times(self.model.lm_head(normed.to(self.model.lm_head.weight.dtype)), self.logit_scale)

    def unembedding(self) -> Tensor:
        return times(super().unembedding(), self.logit_scale)

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.mixer(layer).out_proj

    def output_projection(self, layer: int, head: int) -> Tensor:
        """As `Host.output_projection`, with the multipliers of the mixer's output."""
        return times(super().output_projection(layer, head), self.mixer_scale * self.residual_scale)

    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        if not self.normed:
            raise ValueError(f"{self.name} has no norm behind its heads, so nothing bounds their outputs.")
        return tuple(split_heads(x, self.heads) for x in self._gated(layer, record))

    def _gated(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs after the norm [B, T, H d_v], and the factor before `behind_heads`."""
        mixer, outputs = self.mixer(layer), record.outputs.flatten(-2)
        gate = F.silu(wide(record.beside["gate"]))
        if not self.normed:
            return outputs, gate
        options = mixer.norm.variance_epsilon, mixer.n_groups
        if self.norm_first:
            return normalized(outputs, *options), mixer.norm.weight * gate
        return normalized(outputs * gate, *options), mixer.norm.weight

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        """As `Host.mix`; in Zamba2 hidden is [B, T, 2 D], with the embeddings appended."""
        norm, x, kept = getattr(self.block(layer), self.layout.norm), hidden[..., : self.width], {}
        if self.appends and self.kinds[layer] == "hybrid":
            read, kept = self._read_transformer(layer, hidden, past, positions)
            x = x + read
        normed = self._norm(x.to(norm.weight.dtype), norm)
        if layer not in self.recurrent_layers:
            part = getattr(self.blocks[layer], self.layout.attention)
            if self.kinds[layer] == "full_attention":
                update, kept = self._attend(part, normed, past, positions)
            else:
                update = part(normed)
            return Record(hidden, update[:, :, None], **kept)
        record = self._recur(self.mixer(layer), hidden, normed, past)
        if self.kinds[layer] == "hybrid" and not self.appends:
            before, after = self.attention_scales
            update, kept = self._attend(self.blocks[layer].self_attn, times(normed, before), past, positions)
            record.beside["attention"] = times(update, after)
        record.keys, record.values = kept.get("keys"), kept.get("values")
        return record

    def _recur(self, mixer: torch.nn.Module, hidden: Tensor, normed: Tensor, past: Past | None) -> Record:
        projected = mixer.in_proj(times(normed, getattr(mixer, "ssm_in_multiplier", 1)))
        if hasattr(mixer, "mup_vector"):
            projected = projected * mixer.mup_vector
        gate, raw, step = projected.split([mixer.intermediate_size, mixer.conv_dim, self.heads], -1)
        reach = mixer.conv_kernel_size - 1
        before = past and past.windows["conv"]
        mixed = mixer.act(short_convolution(raw, before, mixer.conv1d.weight, mixer.conv1d.bias))
        width = mixer.n_groups * self.d_k
        value, key, query = mixed.split([mixer.intermediate_size, width, width], -1)
        value = split_heads(value, self.heads)
        query, key = split_heads(query, mixer.n_groups), split_heads(key, mixer.n_groups)
        step = F.softplus(wide(step) + wide(mixer.dt_bias)).clamp(*mixer.time_step_limit)
        log_decay = -wide(mixer.A_log).exp() * step
        added = step[..., None] * value
        read, end = decayed_chunks(query, key, added, log_decay, **self.carried(past))
        skip = wide(mixer.D)[:, None] * value
        factors = dict(query=query, key=key, added=added, effective=added, log_decay=log_decay, skip=skip)
        windows, beside = {"conv": (raw, reach)}, {"gate": gate}
        return Record(hidden, read + skip, factors, end, windows=windows, beside=beside)

    def _attend(self, attention, normed: Tensor, past: Past | None, positions: Tensor, **options):
        """Return an attention's output [B, T, D], and its keys and values by name."""
        if self.rotary is not None:
            options["position_embeddings"] = self.rotary(normed, positions)
        output, kept = call_attention(attention, normed, past, **options)
        return output, dict(keys=kept["keys"], values=kept["values"])

    def _read_transformer(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor):
        """Return what the shared transformer block of a Zamba2 layer reads [B, T, D], its keys and values."""
        block, linear = self.blocks[layer].shared_transformer, self.blocks[layer].linear
        normed = self._norm(hidden, block.input_layernorm)
        read, kept = self._attend(block.self_attn, normed, past, positions, layer_idx=layer)
        return linear(block.feed_forward(self._norm(read, block.pre_ff_layernorm), layer)), kept

    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        block, x = self.blocks[layer], record.hidden[..., : self.width]
        if layer in self.recurrent_layers:
            normed, scale = self._gated(layer, record)
            update = self.behind_heads(layer)((normed * scale).to(record.beside["gate"].dtype))
            update = times(update, self.mixer_scale) + record.beside.get("attention", 0)
        else:
            update = record.outputs[:, :, 0]
        x = (wide(x) if getattr(block, "residual_in_fp32", False) else x) + times(update, self.residual_scale)
        if feeds := [part for name in self.layout.feeds if (part := getattr(block, name)) is not None]:
            normed = self._norm(x, getattr(block, self.layout.feed_norm))
            x = x + times(sum(feed(normed) for feed in feeds), self.residual_scale)
        if self.appends and layer < self.layers - 1:
            x = torch.cat([x, record.hidden[..., self.width :]], -1)
        return x


def _recurrent(config) -> tuple[int, ...]:
    """Return the layers with a mixer."""
    kinds = enumerate(config.layer_types)
    return tuple(layer for layer, kind in kinds if kind in ("linear_attention", "hybrid"))
