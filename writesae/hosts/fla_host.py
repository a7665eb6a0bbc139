"""What the adapters of flash-linear-attention's formats share: their registration, and of DeltaNet and GLA all but the mixer.

Blocks are run from the weights of their modules alone (writesae.hosts.fla_models), in torch, whichever class they are of.
"""

from __future__ import annotations

import contextlib
import importlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from writesae.hosts import kernels
from writesae.hosts.base import Host, Past, Record
from writesae.hosts.fla_models import check, feed_forward, head_dims, read_out, rms


def register(model_class: type[PreTrainedModel]) -> None:
    """Tell transformers' Auto classes of a model. Where flash-linear-attention and CUDA are present it is that package's class,
    which importing it registers; else the plain one."""
    config = model_class.config_class
    with contextlib.suppress(ImportError):
        if torch.cuda.is_available():
            importlib.import_module(f"fla.models.{config.model_type}")
            return
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model_class, exist_ok=True)


class FLAHost(Host):
    package = "fla"

    def __init__(self, model: torch.nn.Module, tokenizer, name: str):
        """Raises ValueError for a config that `fla_models.check` refuses."""
        super().__init__(model, tokenizer, name)
        config = model.config
        check(config)
        self.blocks = model.model.layers
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.recurrent_layers = tuple(range(self.layers))
        self.heads, (self.d_k, self.d_v) = config.num_heads, head_dims(config)

    @property
    def kernel(self) -> str:
        return kernels.TORCH

    @property
    def library_kernel(self) -> str:
        return kernels.of_modules(self.model)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.model.embeddings(tokens)

    def unembed(self, final: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(rms(self.model.model.norm, final))

    def behind_heads(self, layer: int) -> torch.nn.Linear:
        return self.blocks[layer].attn.o_proj

    def finish(self, layer: int, record: Record, past: Past | None) -> torch.Tensor:
        block = self.blocks[layer]
        x = record.hidden + read_out(block.attn, record.outputs, **record.beside)
        return x + feed_forward(block.mlp, rms(block.mlp_norm, x))
