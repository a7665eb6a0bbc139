"""Mamba-2 hosts: Mamba2ForCausalLM of transformers (Dao and Gu 2024).

S_t = alpha_t S_{t-1} + B_t (dt_t x_t)^T with alpha_t = exp(dt_t A), read with C_t. Nothing is erased, so the
added write is the effective write. transformers stores the state transposed. The skip D x does not pass
through the state; it is part of a record's outputs and one of its factors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import normalized, rms_norm, short_convolution, split_heads, wide
from writesae.hosts.past import Past, Record
from writesae.recurrence import decayed_chunks


class Mamba2(Host):
    family = model_type = "mamba2"
    scalar_decay = True
    model_classes = ("Mamba2ForCausalLM",)
    decay_parameters = ("A_log", "dt_bias")

    @staticmethod
    def before_training(model: torch.nn.Module) -> None:
        """Scale the gradients of the rows of in_proj that set the decays (through dt) by 0.05."""
        heads = model.config.num_heads
        for block in model.backbone.layers:
            weight = block.mixer.in_proj.weight
            scale = torch.ones(len(weight), 1)
            scale[-heads:] = 0.05
            weight.register_hook(lambda gradient, scale=scale: gradient * scale.to(gradient))

    @staticmethod
    def shape(config) -> Shape:
        return Shape(config.num_hidden_layers, config.num_heads, config.state_size, config.head_dim)

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        self.normed_together = self.heads // model.config.n_groups

    def unembed(self, final: Tensor) -> Tensor:
        normed = rms_norm(final, self.model.backbone.norm_f)
        return self.model.lm_head(normed.to(self.model.lm_head.weight.dtype))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].mixer.out_proj

    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        mixer, gate = self.blocks[layer].mixer, record.beside["gate"]
        gated = record.outputs.flatten(-2) * F.silu(wide(gate))
        normed = normalized(gated, mixer.norm.variance_epsilon, mixer.n_groups)
        return split_heads(normed, self.heads), split_heads(mixer.norm.weight, self.heads)

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        norm, mixer = self.blocks[layer].norm, self.blocks[layer].mixer
        projected = mixer.in_proj(rms_norm(hidden.to(norm.weight.dtype), norm))
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

    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        block, mixer, gate = self.blocks[layer], self.blocks[layer].mixer, record.beside["gate"]
        gated = record.outputs.flatten(-2) * F.silu(wide(gate))
        update = mixer.out_proj(rms_norm(gated, mixer.norm, mixer.n_groups).to(gate.dtype))
        return (wide(record.hidden) if block.residual_in_fp32 else record.hidden) + update
