"""Gated DeltaNet hosts: hybrids of transformers with this recurrence (Yang et al. 2025; Eq. 2 of WriteSAE).

KDA (Kimi Delta Attention, Kimi Team 2025) is the same recurrence with one decay per channel of the keys.

The classes differ in how a layer's projections are stored (`LAYOUTS`) and in what is around the recurrence.
The adapter calls the submodules of transformers' layers, MLPs and mixtures of experts as they are, with the
recurrence of `writesae.recurrence` between them, which also returns the effective writes and lets each row
start at a position of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from writesae.hosts.attention import call_attention, share_prefixes
from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import normalized, short_convolution, split_heads, unit, wide
from writesae.hosts.layers import rms_norm as plain_rms_norm
from writesae.hosts.past import Past, Record, attend
from writesae.recurrence import gated_delta_chunks


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Return the RMS norm of x, in its dtype; its scale is 1 + weight in Qwen's norms, weight in OLMo's."""
    if hasattr(norm, "eps"):
        return (normalized(x, norm.eps) * (1.0 + wide(norm.weight))).to(x.dtype)
    return (normalized(x, norm.variance_epsilon) * wide(norm.weight)).to(x.dtype)


class Projections(NamedTuple):
    """What a mixer computes of its normed input [B, T, D].

    qkv [B, T, C]: queries, keys and values before their convolution. gate [B, T, H d_v]: of the heads'
    outputs, before its activation. beta [B, T, H]. log_decay [B, T, H], or [B, T, H, d_k].
    """

    qkv: Tensor
    gate: Tensor
    beta: Tensor
    log_decay: Tensor


def log_decays(mixer: nn.Module, step: Tensor) -> Tensor:
    """Return the log decays [B, T, H] of a step before its bias and softplus, in fp32 or better."""
    return -wide(mixer.A_log).exp() * F.softplus(wide(step) + mixer.dt_bias)


def project(mixer: nn.Module, x: Tensor) -> Projections:
    """Read Qwen3.5's projections: q, k and v in one matrix."""
    step, beta = mixer.in_proj_a(x), mixer.in_proj_b(x).sigmoid()
    return Projections(mixer.in_proj_qkv(x), mixer.in_proj_z(x), beta, log_decays(mixer, step))


def project_fused(mixer: nn.Module, x: Tensor) -> Projections:
    """Read Qwen3-Next's projections: two matrices, whose rows are ordered by key head."""
    parts = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
    query, key, value, gate, beta, step = parts
    qkv = torch.cat([part.flatten(2) for part in (query, key, value)], -1)
    return Projections(qkv, gate.flatten(2), beta.sigmoid(), log_decays(mixer, step))


def _qkv(mixer: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)


def project_single(mixer: nn.Module, x: Tensor) -> Projections:
    """Read OLMo-Hybrid's projections: one matrix each; beta is in (0, 2) by default."""
    beta = mixer.b_proj(x).sigmoid() * (2.0 if mixer.allow_neg_eigval else 1.0)
    return Projections(_qkv(mixer, x), mixer.g_proj(x), beta, log_decays(mixer, mixer.a_proj(x)))


def project_kimi(mixer: nn.Module, x: Tensor) -> Projections:
    """Read Kimi Linear's projections: one matrix each, but low-rank gates of outputs and decays."""
    forget, heads = mixer.forget_gate, mixer.num_heads
    step = split_heads(forget.f_b_proj(forget.f_a_proj(x)), heads) + split_heads(forget.dt_bias, heads)
    log_decay = -wide(forget.A_log).exp() * F.softplus(step)
    return Projections(_qkv(mixer, x), mixer.g_b_proj(mixer.g_a_proj(x)), mixer.b_proj(x).sigmoid(), log_decay)


class Layout(NamedTuple):
    """How a class stores a recurrent layer: its projections, the names of its mixer, norm and output matrix.

    plain_attention: whether an attention module is computed from its submodules, in the model's precision
    throughout, and not called as it is.
    """

    project: Callable[[nn.Module, Tensor], Projections]
    mixer: str = "linear_attn"
    norm: str = "norm"
    out: str = "out_proj"
    plain_attention: bool = True


LAYOUTS = {
    "Qwen3_5ForCausalLM": Layout(project),
    "Qwen3_5MoeForCausalLM": Layout(project),
    "Qwen3NextForCausalLM": Layout(project_fused),
    "OlmoHybridForCausalLM": Layout(project_single, norm="o_norm", out="o_proj", plain_attention=False),
    "KimiLinearForCausalLM": Layout(project_kimi, "self_attn", "o_norm", "o_proj", plain_attention=False),
}


class GatedDeltaNet(Host):
    """Hosts with one decay per head. A class of transformers needs a Layout and its name in model_classes."""

    family = "gated_deltanet"
    model_type = "qwen3_5_text"
    scalar_decay = True
    model_classes = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM", "OlmoHybridForCausalLM")
    decay_parameters = ("A_log", "dt_bias", "in_proj_a")
    chunk = 64  # tokens that the recurrence computes at once
    layer_norm = staticmethod(rms_norm)
    gate_activation = staticmethod(F.silu)

    @staticmethod
    def shape(config) -> Shape:
        if config.hidden_act != "silu":
            raise ValueError(f"A Gated DeltaNet host has the activation silu, and this one {config.hidden_act}.")
        layers, heads = config.layer_types.count("linear_attention"), config.linear_num_value_heads
        return Shape(layers, heads, config.linear_key_head_dim, config.linear_value_head_dim)

    def __init__(self, model: nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        kinds = enumerate(model.config.layer_types)
        self.recurrent_layers = tuple(layer for layer, kind in kinds if kind == "linear_attention")
        self.layout = LAYOUTS[type(model).__name__]
        if not self.layout.plain_attention:
            share_prefixes(model)

    def mixer(self, layer: int) -> nn.Module:
        """Return the mixer of a recurrent layer."""
        return getattr(self.blocks[layer], self.layout.mixer)

    def unembed(self, final: Tensor) -> Tensor:
        return self.model.lm_head(self.layer_norm(final, self.model.model.norm))

    def behind_heads(self, layer: int) -> nn.Linear:
        return getattr(self.mixer(layer), self.layout.out)

    def output_norm(self, layer: int) -> nn.Module:
        """Return the norm of each head's output."""
        return getattr(self.mixer(layer), self.layout.norm)

    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        norm = self.output_norm(layer)
        gate = self.gate_activation(split_heads(record.beside["gate"], self.heads))
        return normalized(record.outputs, norm.variance_epsilon), wide(norm.weight) * gate

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        block = self.blocks[layer]
        before = getattr(block, "input_layernorm", None)  # attention layers of OLMo-Hybrid have none
        normed = hidden if before is None else self.layer_norm(hidden, before)
        if layer in self.recurrent_layers:
            return self._recur(self.mixer(layer), hidden, normed, past)
        if self.layout.plain_attention:
            return self._attend(block.self_attn, hidden, normed, past, positions)
        rotary = getattr(self.model.model, "rotary_emb", None)
        angles = rotary and rotary(hidden, positions)
        return Record(hidden, **call_attention(block.self_attn, normed, past, position_embeddings=angles)[1])

    def _recur(self, mixer, hidden, normed, past: Past | None) -> Record:
        raw, gate, beta, log_decay = self.layout.project(mixer, normed)
        reach = mixer.conv_kernel_size - 1
        mixed = F.silu(short_convolution(raw, past and past.windows["conv"], mixer.conv1d.weight))
        width = (raw.shape[-1] - self.heads * self.d_v) // 2
        query, key, value = mixed.split([width, width, self.heads * self.d_v], -1)
        query = unit(split_heads(query, width // self.d_k)) * self.d_k**-0.5
        key = unit(split_heads(key, width // self.d_k))
        value, beta = split_heads(value, self.heads), wide(beta)
        expanded = self.expand_heads(query), self.expand_heads(key)
        heads_first = (x.transpose(1, 2) for x in (*expanded, value, beta, log_decay))
        outputs, effective, end = gated_delta_chunks(*heads_first, chunk=self.chunk, **self.carried(past))
        factors = dict(query=query, key=key, added=beta[..., None] * value)
        factors |= dict(effective=effective.transpose(1, 2), beta=beta, log_decay=log_decay)
        windows, beside = {"conv": (raw, reach)}, {"gate": gate}
        return Record(hidden, outputs.transpose(1, 2), factors, end, windows=windows, beside=beside)

    def _attend(self, attention, hidden, normed, past: Past | None, positions: Tensor) -> Record:
        """Compute Qwen's gated attention from its submodules, in the model's precision throughout."""
        width = attention.head_dim
        query, gate = attention.q_proj(normed).unflatten(-1, (-1, 2 * width)).chunk(2, -1)
        key = attention.k_proj(normed).unflatten(-1, (-1, width))
        values = attention.v_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)
        query = self._rotate(rms_norm(query, attention.q_norm).transpose(1, 2), positions)
        keys = self._rotate(rms_norm(key, attention.k_norm).transpose(1, 2), positions)
        if past is None:
            options = dict(is_causal=True, scale=attention.scaling, enable_gqa=True)
            outputs = F.scaled_dot_product_attention(query, keys, values, **options)
        else:
            outputs = attend(query, past.prefix.with_own(keys, values), attention.scaling)
        return Record(hidden, outputs.transpose(1, 2) * gate.sigmoid(), keys=keys, values=values)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply rotary position embeddings to the first dimensions of x [B, heads, T, d]."""
        cos, sin = self.model.model.rotary_emb(x, positions)
        cos, sin = cos[:, None], sin[:, None]
        turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, kept], -1)

    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        block = self.blocks[layer]
        if layer in self.recurrent_layers:
            update = self.behind_heads(layer)(self.gated(layer, record).flatten(-2))
        else:
            update = block.self_attn.o_proj(record.outputs.flatten(-2))
        if hasattr(block, "post_feedforward_layernorm"):  # OLMo-Hybrid's attention: norms behind both parts
            hidden = record.hidden + self.layer_norm(update, block.post_attention_layernorm)
            return hidden + self.layer_norm(block.mlp(hidden), block.post_feedforward_layernorm)
        hidden = record.hidden + update
        return hidden + block.mlp(self.layer_norm(hidden, block.post_attention_layernorm))

    def gated(self, layer: int, record: Record) -> Tensor:
        """Return the normed and gated outputs [B, T, H, d_v] of the heads, in the gate's dtype."""
        gate = record.beside["gate"]
        normed = plain_rms_norm(record.outputs.to(gate.dtype), self.output_norm(layer))
        return (normed * F.silu(split_heads(gate, self.heads))).to(gate.dtype)


class KimiDelta(GatedDeltaNet):
    """KDA: Gated DeltaNet with a decay per channel. States are sums of decaying rank-1 effective writes."""

    family = "kda"
    model_type = "kimi_linear"
    scalar_decay = False
    model_classes = ("KimiLinearForCausalLM",)
    decay_parameters = ("forget_gate",)
    chunk = 16
    layer_norm = staticmethod(plain_rms_norm)
    gate_activation = staticmethod(torch.sigmoid)

    @staticmethod
    def shape(config) -> Shape:
        if config.hidden_act != "silu":
            raise ValueError(f"A KDA host has the activation silu, and this one {config.hidden_act}.")
        layers, width = config.layer_types.count("linear_attention"), config.linear_head_dim
        return Shape(layers, config.linear_num_heads, width, width, vector_decay=True, effective=True)

    def gated(self, layer: int, record: Record) -> Tensor:
        gate, norm = record.beside["gate"], self.output_norm(layer)
        normed = wide(norm.weight) * normalized(record.outputs.to(gate.dtype), norm.variance_epsilon)
        return (normed * torch.sigmoid(split_heads(gate, self.heads))).to(gate.dtype)
