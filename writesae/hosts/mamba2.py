"""Mamba-2 hosts: transformers' Mamba2ForCausalLM (Dao and Gu 2024).

A head's state takes a rank-1 write a token, S_t = alpha_t S_{t-1} + B_t (dt_t x_t)^T with alpha_t = exp(dt_t A), and is
read by C_t; nothing is erased, so the added write is the effective one. The library stores the state transposed. The
skip D x does not pass through the state; it is part of a record's outputs, and kept apart among its factors.
tests/test_mamba2.py holds this against the library's forward, its decoding, and a step loop in fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import normalized, short_convolution, slow_decays, wide
from writesae.hosts.past import Past, Record
from writesae.recurrence import Factors, decayed_chunks


def rms_norm(x: torch.Tensor, norm: torch.nn.Module, groups: int = 1) -> torch.Tensor:
    """The library's RMS norm with its weight, over each of `groups` equal parts of the last dimension."""
    return norm.weight * normalized(x, norm.variance_epsilon, groups).to(x.dtype)


class Mamba2(Host):
    family = "mamba2"
    scalar_decay = True
    model_classes = ("Mamba2ForCausalLM",)
    decay_parameters = ("A_log", "dt_bias")

    @staticmethod
    def build(architecture: dict) -> torch.nn.Module:
        """A Mamba-2 model with random weights and slow decays. `architecture`: fields of Mamba2Config."""
        from transformers import Mamba2Config, Mamba2ForCausalLM

        model = Mamba2ForCausalLM(Mamba2Config(**architecture))
        for block in model.backbone.layers:
            block.mixer.A_log.data, block.mixer.dt_bias.data = slow_decays(model.config.num_heads)
        return model

    @staticmethod
    def before_training(model: torch.nn.Module) -> None:
        """Let the rows of in_proj that set the steps dt, and with them the decays, learn slowly: a twentieth of the gradient."""
        heads = model.config.num_heads
        for block in model.backbone.layers:
            slow = torch.ones(len(block.mixer.in_proj.weight), 1)
            slow[-heads:] = 0.05
            block.mixer.in_proj.weight.register_hook(lambda gradient, slow=slow: gradient * slow.to(gradient))

    @staticmethod
    def shape(config) -> Shape:
        return Shape(config.num_hidden_layers, config.num_heads, config.state_size, config.head_dim)

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        config = model.config
        self.blocks = model.backbone.layers
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.recurrent_layers = tuple(range(self.layers))
        _, self.heads, self.d_k, self.d_v, _ = self.shape(config)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.backbone.embeddings(tokens)

    def unembed(self, final: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(final, self.model.backbone.norm_f)
        return self.model.lm_head(normed.to(self.model.lm_head.weight.dtype))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].mixer.out_proj

    def mix(self, layer: int, hidden: torch.Tensor, past: Past | None, positions: torch.Tensor) -> Record:
        block, mixer = self.blocks[layer], self.blocks[layer].mixer
        projected = mixer.in_proj(rms_norm(hidden.to(block.norm.weight.dtype), block.norm))
        gate, raw, step = projected.split([mixer.intermediate_size, mixer.conv_dim, self.heads], -1)
        reach = mixer.conv_kernel_size - 1
        before, conv = past and past.windows["conv"], mixer.conv1d
        mixed = mixer.act(short_convolution(raw, before, conv.weight, conv.bias))
        width = mixer.n_groups * self.d_k
        value, key, query = wide(mixed).split([mixer.intermediate_size, width, width], -1)
        value, key, query = (
            x.unflatten(-1, (-1, d)) for x, d in ((value, self.d_v), (key, self.d_k), (query, self.d_k))
        )
        step = F.softplus(wide(step) + wide(mixer.dt_bias)).clamp(*mixer.time_step_limit)
        log_decay, added = -wide(mixer.A_log).exp() * step, step[..., None] * value
        read, end = decayed_chunks(query, key, added, log_decay, **self.carried(past))
        skip = wide(mixer.D)[:, None] * value
        factors = dict(query=query, key=key, added=added, effective=added, log_decay=log_decay, skip=skip)
        return Record(hidden, read + skip, factors, end, windows={"conv": (raw, reach)}, beside={"gate": gate})

    def finish(self, layer: int, record: Record, past: Past | None) -> torch.Tensor:
        block, mixer, gate = self.blocks[layer], self.blocks[layer].mixer, record.beside["gate"]
        gated = record.outputs.flatten(-2) * F.silu(wide(gate))
        update = mixer.out_proj(rms_norm(gated, mixer.norm, mixer.n_groups).to(gate.dtype))
        return (wide(record.hidden) if block.residual_in_fp32 else record.hidden) + update

    def cell_factors(self, record: Record, head: int) -> Factors:
        f, key_head = record.factors, head // (self.heads // record.factors["key"].shape[2])
        query, key, added = f["query"][:, :, key_head], f["key"][:, :, key_head], f["added"][:, :, head]
        return Factors(query, key, added, f["log_decay"][:, :, head, None], effective=added)
