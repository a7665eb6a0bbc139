"""DeltaNet and GLA in plain PyTorch, with the parameter names of flash-linear-attention's checkpoints.

Config fields and formulas follow that package (its layers/delta_net.py and layers/gla.py), which runs on CUDA
only. The functions below also work on its modules. For one head, with x the normed input:

| here      | DeltaNet                                        | GLA                                        |
|-----------|-------------------------------------------------|--------------------------------------------|
| query     | conv(W_q x), unit norm, times d_k^-0.5          | W_q x times d_k^-0.5                       |
| key       | conv(W_k x), unit norm                          | W_k x                                      |
| added     | beta v, v = conv(W_v x), beta = sigmoid(W_b x)  | v = W_v x                                  |
| log_decay | 0                                               | logsigmoid(W_2 W_1 x + b) / 16, per channel |
| erase     | beta key, along key                             | none                                       |
| output    | RMS norm per head                               | RMS norm per head, times silu(W_g x)       |

conv is a causal convolution of each channel over four tokens, then SiLU. A SwiGLU follows each mixer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from writesae.hosts.layers import PlainCausalLM, PlainConfig, short_convolution, split_heads, unit, wide
from writesae.recurrence import diagonal_chunks, gated_delta_chunks

GATE_RANK = GATE_NORMALIZER = 16  # of GLA's decays; constants in that package, not config fields


class FLAConfig(PlainConfig):
    """expand_k, expand_v: the width of all heads' keys and values together, in units of hidden_size."""

    num_heads: int = 4
    expand_k: float | int = 1
    expand_v: float | int = 1
    norm_eps: float = 1e-6


class DeltaNetConfig(FLAConfig):
    model_type = "delta_net"

    num_heads: int = 16
    conv_size: int = 4


class GLAConfig(FLAConfig):
    model_type = "gla"

    expand_k: float | int = 0.5


# config fields that change the model; the published checkpoints have these values
COMMON = dict(attn=None, attnres_block_size=None, hidden_act="swish")
DELTA_NET = dict(use_short_conv=True, use_beta=True, use_gate=False, allow_neg_eigval=False)
DELTA_NET |= dict(qk_norm="l2", qk_activation="silu")
GLA = dict(use_short_conv=False, use_gk=True, use_gv=False, use_output_gate=True, fuse_norm=True)
GLA |= dict(elementwise_affine=True, feature_map=None, clamp_min=None)
IMPLEMENTED = {"delta_net": COMMON | DELTA_NET, "gla": COMMON | GLA}


def check(config: PreTrainedConfig) -> None:
    """Raise ValueError for a config of a model that is not implemented here."""
    kind, heads = config.model_type, config.num_heads
    for name, expected in IMPLEMENTED[kind].items():
        value = getattr(config, name, expected)
        if value != expected:
            raise ValueError(f"A {kind} host has {name} {expected!r}, as the published models, and this one {value!r}.")
    key_heads = getattr(config, "num_kv_heads", None) or heads
    if key_heads != heads:
        raise ValueError(f"A {kind} host has keys and values for each of its {heads} heads, and this one {key_heads}.")
    for name in ("expand_k", "expand_v"):
        width = config.hidden_size * getattr(config, name)
        if width % heads:
            raise ValueError(f"{heads} heads do not divide {name} times hidden_size, {width:g}.")


def head_dims(config: PreTrainedConfig) -> tuple[int, int]:
    """Return d_k and d_v of a head."""
    widths = (round(config.hidden_size * factor) for factor in (config.expand_k, config.expand_v))
    return tuple(width // config.num_heads for width in widths)


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    """Return the RMS norm of x with a module's weight and eps, in the weight's dtype."""
    return F.rms_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.eps)


def project_delta(mixer: nn.Module, x: Tensor, before: Tensor | None):
    """Return query, key [B, T, H, d_k], value [B, T, H, d_v], beta [B, T, H], convolution inputs [B, T, C].

    x: normed inputs [B, T, D]. before: the last convolution inputs before x, [B, reach, C]; None: zeros.
    """
    projections = [getattr(mixer, f"{name}_proj")(x) for name in "qkv"]
    raw = torch.cat(projections, -1)
    weight = torch.cat([getattr(mixer, f"{name}_conv1d").weight for name in "qkv"])
    mixed = F.silu(short_convolution(raw, before, weight))
    parts = mixed.split([part.shape[-1] for part in projections], -1)
    query, key, value = (split_heads(part, mixer.num_heads) for part in parts)
    query = unit(query) * query.shape[-1] ** -0.5
    return query, unit(key), value, wide(mixer.b_proj(x)).sigmoid(), raw


def recur_delta(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, **carried):
    """Return outputs and effective writes, each [B, T, H, d_v], and the last state [B, H, d_k, d_v]."""
    heads_first = [x.transpose(1, 2) for x in (query, key, value, beta, torch.zeros_like(beta))]
    outputs, effective, end = gated_delta_chunks(*heads_first, **carried)
    return outputs.transpose(1, 2), effective.transpose(1, 2), end


def project_gla(mixer: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return {query, key, log_decay [B, T, H, d_k]; added [B, T, H, d_v]} and the gate [B, T, H d_v].

    x: normed inputs [B, T, D].
    """
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gk_proj)
    query, key, added, decay_logit = (split_heads(layer(x), mixer.num_heads) for layer in projections)
    query = query * query.shape[-1] ** -0.5
    log_decay = F.logsigmoid(decay_logit) / GATE_NORMALIZER
    return dict(query=query, key=key, added=added, log_decay=log_decay), mixer.g_proj(x)


def recur_gla(factors: dict[str, Tensor], **carried) -> tuple[Tensor, Tensor | None]:
    """Return outputs [B, T, H, d_v] and the last state [B, H, d_k, d_v]."""
    outputs, end = diagonal_chunks(**{name: x.transpose(1, 2) for name, x in factors.items()}, **carried)
    return outputs.transpose(1, 2), end


def read_out(mixer: nn.Module, outputs: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return the layer's update [B, T, D] of the heads' outputs [B, T, H, d_v] and of GLA's gate."""
    if gate is None:
        return mixer.o_proj(rms(mixer.o_norm, outputs).flatten(-2))
    return mixer.o_proj(rms(mixer.g_norm_swish_gate, outputs).flatten(-2) * F.silu(gate))


def feed_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """Return the SwiGLU of normed inputs x [B, T, D]."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


class DeltaNetMixer(nn.Module):
    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        d, heads, (d_k, d_v) = config.hidden_size, config.num_heads, head_dims(config)
        self.num_heads = heads
        for name, width in dict(q=heads * d_k, k=heads * d_k, v=heads * d_v).items():
            convolution = nn.Conv1d(width, width, config.conv_size, groups=width, bias=False)
            setattr(self, f"{name}_proj", nn.Linear(d, width, bias=False))
            setattr(self, f"{name}_conv1d", convolution)
        self.b_proj = nn.Linear(d, self.num_heads, bias=False)
        self.o_norm = nn.RMSNorm(d_v, config.norm_eps)
        self.o_proj = nn.Linear(self.num_heads * d_v, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, beta, _ = project_delta(self, x, None)
        return read_out(self, recur_delta(query, key, value, beta)[0])


class GLAMixer(nn.Module):
    def __init__(self, config: GLAConfig):
        super().__init__()
        d, (d_k, d_v) = config.hidden_size, head_dims(config)
        self.num_heads = config.num_heads
        keys, values = self.num_heads * d_k, self.num_heads * d_v
        for name, width in dict(q=keys, k=keys, v=values, g=values).items():
            setattr(self, f"{name}_proj", nn.Linear(d, width, bias=False))
        self.gk_proj = nn.Sequential(nn.Linear(d, GATE_RANK, bias=False), nn.Linear(GATE_RANK, keys))
        self.g_norm_swish_gate = nn.RMSNorm(d_v, config.norm_eps)
        self.o_proj = nn.Linear(values, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        factors, gate = project_gla(self, x)
        return read_out(self, recur_gla(factors)[0], gate)


MIXERS = {"delta_net": DeltaNetMixer, "gla": GLAMixer}


class FLAMLP(nn.Module):
    """Parameters of the SwiGLU; its forward is `feed_forward`."""

    def __init__(self, config: FLAConfig):
        super().__init__()
        d, width = config.hidden_size, config.intermediate_size
        if width is None:  # two thirds of hidden_ratio, up to the next multiple of 256
            width = -(int(d * (config.hidden_ratio or 4) * 2 / 3) // -256) * 256
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)


class FLABlock(nn.Module):
    def __init__(self, config: FLAConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = MIXERS[config.model_type](config)
        self.mlp = FLAMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(rms(self.attn_norm, x))
        return x + feed_forward(self.mlp, rms(self.mlp_norm, x))


class FLAForCausalLM(PlainCausalLM):
    """The language model of both families. Raises ValueError for a config that `check` refuses."""

    _no_split_modules = ["FLABlock"]  # a device map puts whole layers on a device

    def __init__(self, config: FLAConfig):
        check(config)
        super().__init__(config, lambda _: FLABlock(config), nn.RMSNorm(config.hidden_size, config.norm_eps))

    def final_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.model.embeddings(input_ids)
        for block in self.model.layers:
            x = block(x)
        return rms(self.model.norm, x)


class DeltaNetForCausalLM(FLAForCausalLM):
    config_class = DeltaNetConfig


class GLAForCausalLM(FLAForCausalLM):
    config_class = GLAConfig
