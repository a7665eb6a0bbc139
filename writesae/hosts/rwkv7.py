"""RWKV-7 hosts (Peng et al. 2025): folders in the layouts of flash-linear-attention and of the authors.

A state decays by one factor per channel and is erased along a direction other than the key, so the effective
write has rank 2; the added write k~ v^T has rank 1. The erase reads the state before its decay. The bonus and
the gate bypass the state, in `Record.beside`. All layers use the values of layer 0, appended to `hidden`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hosts import rwkv7_model
from writesae.hosts.base import Host, Shape
from writesae.hosts.layers import split_heads
from writesae.hosts.past import Past, Record
from writesae.hosts.rwkv7_model import CHUNK


class RWKV7(Host):
    family = model_type = "rwkv7"
    scalar_decay = False
    model_classes = ("RWKV7ForCausalLM",)
    decay_parameters = ("w_lora",)
    norm_centres = True

    @staticmethod
    def shape(config) -> Shape:
        rwkv7_model.check(config)
        d_v = config.value_dim[0] // config.num_heads
        return Shape(config.num_hidden_layers, config.num_heads, config.head_dim, d_v, vector_decay=True)

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        super().__init__(model, tokenizer, name)
        self.width = model.config.hidden_size

    def embed(self, tokens: Tensor) -> Tensor:
        return rwkv7_model.embed(self.model.model, tokens)

    def unembed(self, final: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(final))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].attn.o_proj

    def normed_heads(self, layer: int, record: Record) -> tuple[Tensor, Tensor]:
        norm, outputs = self.blocks[layer].attn.g_norm, record.outputs
        normed = F.layer_norm(outputs, outputs.shape[-1:], eps=norm.eps)
        return normed, split_heads(norm.weight, self.heads) * split_heads(record.beside["gate"], self.heads)

    def mix(self, layer: int, hidden: Tensor, past: Past | None, positions: Tensor) -> Record:
        """As `Host.mix`; above layer 0, hidden is [B, T, D + H d_v], with the values of layer 0 appended."""
        block = self.blocks[layer]
        x = hidden[..., : self.width]
        v_first = hidden[..., self.width :] if layer else None
        normed = block.attn_norm(x)
        factors, beside, v_first = rwkv7_model.project(block.attn, normed, past and past.windows["attn"], v_first)
        outputs, end, before = rwkv7_model.recur(factors, **self.carried(past))
        factors["before"] = before  # [B, H, chunks, d_k, d_v]: the states before each chunk
        hidden = hidden if layer else torch.cat([x, v_first], -1)
        return Record(hidden, outputs, factors, end, windows={"attn": (normed, 1)}, beside=beside)

    def finish(self, layer: int, record: Record, past: Past | None) -> Tensor:
        """Return the next layer's input, with the values of layer 0 appended except after the last layer."""
        block = self.blocks[layer]
        x, v_first = record.hidden[..., : self.width], record.hidden[..., self.width :]
        x = x + rwkv7_model.read_out(block.attn, record.outputs, **record.beside)
        normed = block.ffn_norm(x)
        record.windows["ffn"] = (normed, 1)
        x = x + rwkv7_model.feed_forward(block.ffn, normed, past and past.windows["ffn"])
        return x if layer == self.layers - 1 else torch.cat([x, v_first], -1)

    def state_at(self, record: Record, rows: Tensor, starts: Tensor) -> Tensor:
        """As `Host.state_at`: run the recurrence from the last recorded state, over at most one chunk."""
        factors = dict(record.factors)
        before = factors.pop("before")
        chunk = (starts // CHUNK).clamp(max=before.shape[2] - 1)
        positions = chunk[:, None] * CHUNK + torch.arange(CHUNK, device=starts.device)
        index = rows[:, None], positions.clamp(max=record.outputs.shape[1] - 1)
        earlier = (positions < starts[:, None])[..., None, None]  # zero factors leave a state as it is
        factors = {name: x[index] * earlier for name, x in factors.items()}
        return rwkv7_model.recur(factors, state=before[rows, :, chunk])[1]
