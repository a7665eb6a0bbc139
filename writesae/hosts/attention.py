"""Attention layers of transformers, called as they are, with a shared prefix in the place of a cache."""

from __future__ import annotations

from copy import copy

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from writesae.hosts.past import Past, attend

NAME = "writesae"


def _attention(module, query, key, value, attention_mask, scaling, kept=None, past: Past | None = None, **options):
    """Compute an attention as the library's sdpa. With a dict `kept`, begin after the prefix of `past`."""
    if kept is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if past is None:
        outputs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        outputs = attend(query, past.prefix.with_own(key, value), scaling)
    outputs = outputs.transpose(1, 2)
    kept.update(outputs=outputs, keys=key, values=value)
    return outputs, None


AttentionInterface.register(NAME, _attention)


def share_prefixes(model: nn.Module) -> None:
    """Prepare the attentions of a model for `call_attention`; their own calls do not change."""
    for module in model.modules():
        if hasattr(module, "o_proj") and hasattr(module, "config"):
            module.config = copy(module.config)
            module.config._attn_implementation = NAME


def call_attention(attention: nn.Module, x: Tensor, past: Past | None, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output [R, T, D] of an attention module on x [R, T, D], and what a record keeps of it.

    That is `outputs` [R, T, H, d] of the heads, `keys` and `values` [R, H_kv, T, d] of x. options: of the
    module's forward. The norms in these modules compute in fp32, whatever the model's dtype.
    """
    kept = {}
    output, _ = attention(hidden_states=x, attention_mask=None, past=past, kept=kept, **options)
    return output, kept
