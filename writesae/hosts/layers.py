"""Parts that several families share: norms, short convolutions, initial decays, plain PyTorch models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


def wide(x: Tensor) -> Tensor:
    """Return x in fp32 where it is bf16 or fp16, else unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return x [..., heads * d] as [..., heads, d], in fp32 or better."""
    return wide(x).unflatten(-1, (heads, -1))


def unit(x: Tensor) -> Tensor:
    """Return x divided by its L2 norm (last dimension), as transformers computes it, in fp32 or better."""
    x = wide(x)
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def normalized(x: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Return x divided by its root mean square in each of `groups` equal parts of the last dimension.

    It computes in fp32 or better. The norms of transformers compute in fp32 even for fp64 models, and the
    last bit of a row then depends on the other rows.
    """
    parts = wide(x).unflatten(-1, (groups, -1))
    return (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Return `normalized` x times the norm's weight, in the dtype of x."""
    return norm.weight * normalized(x, norm.variance_epsilon).to(x.dtype)


def short_convolution(inputs: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the causal convolution of each channel over inputs [B, T, C], in the dtype of the inputs.

    before: the last inputs before these, [B, K - 1, C]; None: zeros. weight [C, 1, K], bias [C]: of an
    nn.Conv1d. It sums K shifted products in fp32 or better, which is 1.5 to 1.7 times as fast on a CPU as
    conv1d on transposed inputs (benchmarks/short_convolution.py).
    """
    taps = wide(weight[:, 0].T).contiguous()
    length = inputs.shape[1]
    if before is None:
        before = inputs.new_zeros(len(inputs), len(taps) - 1, inputs.shape[-1])
    padded = wide(torch.cat([before, inputs], 1))
    mixed = padded[:, :length] * taps[0]
    for place, tap in enumerate(taps[1:], 1):
        mixed = torch.addcmul(mixed, padded[:, place : place + length], tap)
    return (mixed if bias is None else mixed + wide(bias)).to(inputs.dtype)


def slow_decays(heads: int) -> tuple[Tensor, Tensor]:
    """Draw (A_log, dt_bias), each [heads], as in Mamba: A uniform in [1, 16], dt log-uniform in [1e-3, 0.1].

    The half-lives of the heads are then about 1 to 600 tokens. With the initial values of the classes in
    transformers, alphas are near zero and a state holds a single write.
    """
    step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
    inverse_softplus = step + torch.log(-torch.expm1(-step))
    return torch.empty(heads).uniform_(1, 16).log(), inverse_softplus


class PlainConfig(PreTrainedConfig):
    """Fields of all models in plain PyTorch. hidden_ratio is used where intermediate_size is None."""

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float | int | None = 4
    intermediate_size: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2


class PlainCausalLM(PreTrainedModel):
    """A language model in plain PyTorch, named as in flash-linear-attention's checkpoints, without a cache.

    Subclasses define final_hidden: ids [B, T] -> hidden states [B, T, D] after the final norm.
    """

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    _input_embed_layer = "embeddings"

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "config_class" in vars(cls):
            AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
            AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)

    def __init__(self, config, block: Callable[[int], nn.Module], norm: nn.Module):
        super().__init__(config)
        self.model = nn.Module()
        self.model.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(map(block, range(config.num_hidden_layers)))
        self.model.norm = norm
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False):
        """Return the logits [B, T, vocabulary] of ids [B, T], and, with labels, the mean loss in nats."""
        if use_cache:
            kind = self.config.model_type
            raise ValueError(f"This {kind} has no cache: pass use_cache=False, or decode with its adapter.")
        logits, loss = self.lm_head(self.final_hidden(input_ids)), None
        if labels is not None:
            loss = F.cross_entropy(wide(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
