"""Attention layers of transformers, called as they are, with a shared prefix in the place of a cache."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from writesae.hosts.past import Past, Record, attend

NAME = "writesae"


def _attention(module, query, key, value, mask, scaling, past: Past | None, kept: dict, **options):
    """Compute attention as transformers asks for it. Keep the outputs of the heads, the keys and the values."""
    if past is None:
        outputs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        outputs = attend(query, past.prefix.with_own(key, value), scaling)
    outputs = outputs.transpose(1, 2)
    kept.update(outputs=outputs, keys=key, values=value)
    return outputs, None


AttentionInterface.register(NAME, _attention)


def call_attention(attention: nn.Module, hidden: Tensor, normed: Tensor, past: Past | None, **inputs) -> Record:
    """Return the record of an attention module of transformers, with the outputs of its heads.

    hidden [B, T, D]: the layer's input; normed [B, T, D]: the module's. inputs: its other arguments. The norms
    in these modules compute in fp32, whatever the model's dtype.
    """
    config, kept = attention.config, {}
    usual = config._attn_implementation
    config._attn_implementation = NAME
    try:
        attention(hidden_states=normed, attention_mask=None, past=past, kept=kept, **inputs)
    finally:
        config._attn_implementation = usual
    return Record(hidden, **kept)
