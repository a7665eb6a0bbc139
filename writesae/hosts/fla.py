"""DeltaNet and GLA hosts: checkpoints in flash-linear-attention's format.

DeltaNet (Yang et al. 2024, arXiv 2406.06484) is a Gated DeltaNet without decay. In GLA (gated linear
attention, Yang et al. 2024, arXiv 2312.06635) a state decays by one factor per channel and nothing is erased,
so the added write is the effective write. tests/writesae/test_delta_net_gla.py tests both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts import fla_models
from writesae.hosts.base import Host, Shape
from writesae.hosts.fla_models import rms
from writesae.hosts.layers import normalized, split_heads, wide
from writesae.hosts.past import Past, Record
from writesae.recurrence import Factors, decay_until


class FLAHost(Host):
    """Everything that both families share. Raises ValueError for a config that `check` refuses."""

    @classmethod
    def shape(cls, config) -> Shape:
        fla_models.check(config)
        d_k, d_v = fla_models.head_dims(config)
        return Shape(config.num_hidden_layers, config.num_heads, d_k, d_v, not cls.scalar_decay)

    def unembed(self, final: Tensor) -> Tensor:
        return self.model.lm_head(rms(self.model.model.norm, final))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].attn.o_proj

    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        mixer, gate = self.blocks[layer].attn, record.beside.get("gate")
        norm = mixer.o_norm if gate is None else mixer.g_norm_swish_gate
        scale = wide(norm.weight) if gate is None else norm.weight * F.silu(split_heads(gate, self.heads))
        return normalized(record.outputs, norm.eps), scale

    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        block = self.blocks[layer]
        x = record.hidden + fla_models.read_out(block.attn, record.outputs, **record.beside)
        return x + fla_models.feed_forward(block.mlp, rms(block.mlp_norm, x))


class DeltaNet(FLAHost):
    family = model_type = "delta_net"
    scalar_decay = True
    model_classes = ("DeltaNetForCausalLM",)
    decay_parameters = ()

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        mixer = self.blocks[layer].attn
        normed = rms(self.blocks[layer].attn_norm, hidden)
        query, key, value, beta, raw = fla_models.project_delta(mixer, normed, past and past.windows["conv"])
        outputs, effective, end = fla_models.recur_delta(query, key, value, beta, **self.carried(past))
        factors = dict(query=query, key=key, added=beta[..., None] * value, effective=effective, beta=beta)
        factors["log_decay"] = torch.zeros_like(beta)
        reach = mixer.q_conv1d.kernel_size[0] - 1
        return Record(hidden, outputs, factors, end, windows={"conv": (raw, reach)})


class GLA(FLAHost):
    family = model_type = "gla"
    scalar_decay = False
    model_classes = ("GLAForCausalLM",)
    decay_parameters = ("gk_proj",)

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        normed = rms(self.blocks[layer].attn_norm, hidden)
        factors, gate = fla_models.project_gla(self.blocks[layer].attn, normed)
        outputs, end = fla_models.recur_gla(factors, **self.carried(past))
        return Record(hidden, outputs, factors, end, beside={"gate": gate})

    def state_at(self, record: Record, rows: Tensor, starts: Tensor) -> Tensor:
        longest = max(1, int(starts.max()))
        names = "key", "added", "log_decay"
        key, added, log_decay = (record.factors[name][rows, :longest] for name in names)
        seen = (torch.arange(longest, device=starts.device) < starts[:, None])[..., None, None]
        key = key * decay_until(log_decay, seen)
        return key.permute(0, 2, 3, 1) @ added.transpose(1, 2)

    def cell_factors(self, record: Record, head: int) -> Factors:
        factors = super().cell_factors(record, head)
        zeros = torch.zeros_like(factors.key)
        return replace(factors, effective=factors.added, erase=zeros, probe=zeros)
