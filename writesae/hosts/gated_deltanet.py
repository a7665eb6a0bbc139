"""Gated DeltaNet hosts: transformers' Qwen3.5 text models (Yang et al. 2025; the paper's Eq. 2).

The blocks are run from the library's own submodules (their norms by `normalized`), with the recurrence of
`writesae.recurrence` in the middle, so that the effective writes come out of the same pass and every row can start at its
own position. tests/test_hosts.py holds this against the library's forward, its decoding, and a step loop in fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import normalized, short_convolution, slow_decays, unit, wide
from writesae.hosts.past import Past, Record, attend
from writesae.recurrence import Factors, gated_delta_chunks


def rms_norm(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """The library's RMS norm, whose scale is 1 + weight."""
    return (normalized(x, norm.eps) * (1.0 + wide(norm.weight))).to(x.dtype)


class GatedDeltaNet(Host):
    family = "gated_deltanet"
    scalar_decay = True
    model_classes = ("Qwen3_5ForCausalLM",)
    decay_parameters = ("A_log", "dt_bias", "in_proj_a")

    @staticmethod
    def build(architecture: dict) -> torch.nn.Module:
        """A Qwen3.5 text model with random weights and slow decays. `architecture`: fields of Qwen3_5TextConfig."""
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**architecture))
        for block in model.model.layers:
            if hasattr(block, "linear_attn"):
                mixer = block.linear_attn
                mixer.A_log.data, mixer.dt_bias.data = slow_decays(mixer.num_v_heads)
        return model

    @staticmethod
    def shape(config) -> Shape:
        layers, heads = config.layer_types.count("linear_attention"), config.linear_num_value_heads
        return Shape(layers, heads, config.linear_key_head_dim, config.linear_value_head_dim)

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        config = model.config
        self.blocks = model.model.layers
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.recurrent_layers = tuple(i for i, kind in enumerate(config.layer_types) if kind == "linear_attention")
        _, self.heads, self.d_k, self.d_v, _ = self.shape(config)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_tokens(tokens)

    def unembed(self, final: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(rms_norm(final, self.model.model.norm))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].linear_attn.out_proj

    def mix(self, layer: int, hidden: torch.Tensor, past: Past | None, positions: torch.Tensor) -> Record:
        normed = rms_norm(hidden, self.blocks[layer].input_layernorm)
        inner = self._recur if layer in self.recurrent_layers else self._attend
        return inner(layer, hidden, normed, past, positions)

    def _recur(self, layer, hidden, normed, past, positions) -> Record:
        mixer = self.blocks[layer].linear_attn
        raw, reach = mixer.in_proj_qkv(normed), mixer.conv_kernel_size - 1
        mixed = F.silu(short_convolution(raw, past and past.windows["conv"], mixer.conv1d.weight))
        query, key, value = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
        query = unit(query.unflatten(-1, (-1, self.d_k))) * self.d_k**-0.5
        key, value = unit(key.unflatten(-1, (-1, self.d_k))), value.unflatten(-1, (-1, self.d_v)).to(query.dtype)
        beta = mixer.in_proj_b(normed).sigmoid().to(query.dtype)
        step = F.softplus(mixer.in_proj_a(normed).to(query.dtype) + mixer.dt_bias)
        log_decay = -mixer.A_log.to(query.dtype).exp() * step
        heads_first = [self.expand_heads(x).transpose(1, 2) for x in (query, key)]
        outputs, effective, end = gated_delta_chunks(
            *heads_first,
            value.transpose(1, 2),
            beta.transpose(1, 2),
            log_decay.transpose(1, 2),
            **self.carried(past),
        )
        factors = dict(
            query=query,
            key=key,
            added=beta[..., None] * value,
            effective=effective.transpose(1, 2),
            beta=beta,
            log_decay=log_decay,
        )
        return Record(hidden, outputs.transpose(1, 2), factors, end, windows={"conv": (raw, reach)})

    def _attend(self, layer, hidden, normed, past, positions) -> Record:
        attention = self.blocks[layer].self_attn
        width = attention.head_dim
        query, gate = attention.q_proj(normed).unflatten(-1, (-1, 2 * width)).chunk(2, -1)
        key = attention.k_proj(normed).unflatten(-1, (-1, width))
        values = attention.v_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)
        query, keys = (
            self._rotate(x.transpose(1, 2), positions)
            for x in (rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm))
        )
        if past is None:
            out = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True
            )
        else:
            out = attend(query, past.prefix.with_own(keys, values), attention.scaling)
        out = out.transpose(1, 2) * gate.sigmoid()
        return Record(hidden, out, keys=keys, values=values)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary positions on [B, heads, T, d]: the first dimensions only, as the library's tables say."""
        cos, sin = self.model.model.rotary_emb(x, positions.expand(3, *positions.shape))
        cos, sin = cos[:, None], sin[:, None]
        turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, kept], -1)

    def finish(self, layer: int, record: Record, past: Past | None) -> torch.Tensor:
        block, hidden, outputs = self.blocks[layer], record.hidden, record.outputs
        if layer in self.recurrent_layers:
            mixer = block.linear_attn
            gate = mixer.in_proj_z(rms_norm(hidden, block.input_layernorm)).unflatten(-1, (-1, self.d_v))
            normed = mixer.norm.weight * normalized(outputs.to(gate.dtype), mixer.norm.variance_epsilon).to(gate.dtype)
            update = mixer.out_proj((normed * F.silu(wide(gate))).to(gate.dtype).flatten(-2))
        else:
            update = block.self_attn.o_proj(outputs.flatten(-2))
        hidden = hidden + update
        return hidden + block.mlp(rms_norm(hidden, block.post_attention_layernorm))

    def cell_factors(self, record: Record, head: int) -> Factors:
        f = record.factors
        key_head = head // (self.heads // f["key"].shape[2])
        key, log_decay, beta = f["key"][:, :, key_head], f["log_decay"][:, :, head, None], f["beta"][:, :, head, None]
        return Factors(
            query=f["query"][:, :, key_head],
            key=key,
            added=f["added"][:, :, head],
            effective=f["effective"][:, :, head],
            log_decay=log_decay,
            erase=log_decay.exp() * beta * key,
            probe=key,
        )
