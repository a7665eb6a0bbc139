"""Gated DeltaNet hosts: Qwen3.5 text models of transformers (Yang et al. 2025; Eq. 2 of the WriteSAE paper).

The adapter calls the submodules of transformers' layers, with the recurrence of `writesae.recurrence` between
them, which also returns the effective writes and lets each row start at a position of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import normalized, short_convolution, split_heads, unit, wide
from writesae.hosts.layers import rms_norm as plain_rms_norm
from writesae.hosts.past import Past, Record, attend
from writesae.recurrence import gated_delta_chunks


def rms_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """Return the RMS norm of Qwen3.5, whose scale is 1 + weight, in the dtype of x."""
    return (normalized(x, norm.eps) * (1.0 + wide(norm.weight))).to(x.dtype)


class GatedDeltaNet(Host):
    family = "gated_deltanet"
    model_type = "qwen3_5_text"
    scalar_decay = True
    model_classes = ("Qwen3_5ForCausalLM",)
    decay_parameters = ("A_log", "dt_bias", "in_proj_a")

    @staticmethod
    def shape(config) -> Shape:
        if config.hidden_act != "silu":
            raise ValueError(f"A Gated DeltaNet host has the activation silu, and this one {config.hidden_act}.")
        layers, heads = config.layer_types.count("linear_attention"), config.linear_num_value_heads
        return Shape(layers, heads, config.linear_key_head_dim, config.linear_value_head_dim)

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        kinds = enumerate(model.config.layer_types)
        self.recurrent_layers = tuple(layer for layer, kind in kinds if kind == "linear_attention")

    def unembed(self, final: Tensor) -> Tensor:
        return self.model.lm_head(rms_norm(final, self.model.model.norm))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].linear_attn.out_proj

    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        mixer = self.blocks[layer].linear_attn
        normed = normalized(record.outputs, mixer.norm.variance_epsilon)
        return normed, wide(mixer.norm.weight) * F.silu(wide(self._gate(layer, record.hidden)))

    def _gate(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the gate [B, T, H, d_v] of the heads' outputs, before its SiLU."""
        block = self.blocks[layer]
        return block.linear_attn.in_proj_z(rms_norm(hidden, block.input_layernorm)).unflatten(-1, (-1, self.d_v))

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        block = self.blocks[layer]
        normed = rms_norm(hidden, block.input_layernorm)
        if layer in self.recurrent_layers:
            return self._recur(block.linear_attn, hidden, normed, past)
        return self._attend(block.self_attn, hidden, normed, past, positions)

    def _recur(self, mixer, hidden, normed, past: Past | None) -> Record:
        raw = mixer.in_proj_qkv(normed)
        reach = mixer.conv_kernel_size - 1
        mixed = F.silu(short_convolution(raw, past and past.windows["conv"], mixer.conv1d.weight))
        query, key, value = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
        query = unit(split_heads(query, mixer.num_k_heads)) * self.d_k**-0.5
        key = unit(split_heads(key, mixer.num_k_heads))
        value = split_heads(value, self.heads)
        beta = wide(mixer.in_proj_b(normed).sigmoid())
        step = F.softplus(wide(mixer.in_proj_a(normed)) + mixer.dt_bias)
        log_decay = -wide(mixer.A_log).exp() * step
        expanded = self.expand_heads(query), self.expand_heads(key)
        heads_first = (x.transpose(1, 2) for x in (*expanded, value, beta, log_decay))
        outputs, effective, end = gated_delta_chunks(*heads_first, **self.carried(past))
        factors = dict(query=query, key=key, added=beta[..., None] * value)
        factors |= dict(effective=effective.transpose(1, 2), beta=beta, log_decay=log_decay)
        return Record(hidden, outputs.transpose(1, 2), factors, end, windows={"conv": (raw, reach)})

    def _attend(self, attention, hidden, normed, past: Past | None, positions: Tensor) -> Record:
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
        cos, sin = self.model.model.rotary_emb(x, positions.expand(3, *positions.shape))
        cos, sin = cos[:, None], sin[:, None]
        turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, kept], -1)

    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        block, hidden, outputs = self.blocks[layer], record.hidden, record.outputs
        if layer in self.recurrent_layers:
            mixer, gate = block.linear_attn, self._gate(layer, hidden)
            gated = plain_rms_norm(outputs.to(gate.dtype), mixer.norm) * F.silu(wide(gate))
            update = mixer.out_proj(gated.to(gate.dtype).flatten(-2))
        else:
            update = block.self_attn.o_proj(outputs.flatten(-2))
        hidden = hidden + update
        return hidden + block.mlp(rms_norm(hidden, block.post_attention_layernorm))
