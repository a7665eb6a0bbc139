"""RWKV-7 in plain PyTorch (Peng et al. 2025), with the names of flash-linear-attention's checkpoints.
Config fields and formulas follow that package (its layers/rwkv7.py and models/rwkv7), which runs on CUDA
only. The functions below also work on its modules. For one head, with x the normed input and mix_i a learned
blend of x_t and x_{t-1} per channel:

| here                 | RWKV-7                                                                            |
|----------------------|-----------------------------------------------------------------------------------|
| query, key           | r = W_r mix_r; k~ = k (1 + (a - 1) k_a), k = W_k mix_k                              |
| added                | v = W_v mix_v; above layer 0, blended with the v of layer 0 (v_first)              |
| log_decay            | log w = -e^-0.5 sigmoid(w_lora(mix_w)), one per channel, always above -0.61         |
| erase, probe         | a kk and kk = k k_k / |k k_k|; a = sigmoid(a_lora(mix_a))                           |
| state                | S_t = diag(w_t) S_{t-1} - (a_t kk_t)(kk_t^T S_{t-1}) + k~_t v_t^T, [d_k, d_v]       |
| output               | o_t = S_t^T r_t; then GroupNorm per head, + bonus (sum of r k~ r_k) v, times gate   |
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from writesae.files import local_path, read_weights, tensor_shapes
from writesae.hosts.hub import weight_files
from writesae.hosts.layers import PlainCausalLM, PlainConfig, split_heads
from writesae.recurrence import diagonal_delta_chunks

CHUNK = 32
MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
LOW_RANKS = dict(decay_low_rank_dim="w", a_low_rank_dim="a", v_low_rank_dim="v", gate_low_rank_dim="g")


class RWKV7Config(PlainConfig):
    """The fields of flash-linear-attention's RWKV7Config that change the model.

    head_dim: d_k. value_dim: d_v times the number of heads, or a list with this number for each layer.
    Ranks that are None are those of the tensors that `from_pretrained` reads.
    """

    model_type = "rwkv7"

    head_dim: int | None = 64
    num_heads: int | None = None
    value_dim: int | list[int] | None = None
    hidden_act: str = "sqrelu"
    decay_low_rank_dim: int | None = 64
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    gate_low_rank_dim: int | None = 128
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    attn: dict | None = None

    def __post_init__(self, **kwargs):
        self.head_dim = self.head_dim or (self.hidden_size // self.num_heads if self.num_heads else 64)
        self.num_heads = self.hidden_size // self.head_dim
        if not isinstance(self.value_dim, list):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(int(self.hidden_size * (self.hidden_ratio or 4)) / 32) * 32
        super().__post_init__(**kwargs)


def check(config: RWKV7Config) -> None:
    """Raise ValueError for a config of a model that is not implemented here."""
    if config.attn or config.hidden_act != "sqrelu" or len(set(config.value_dim)) != 1:
        raise ValueError("An RWKV-7 host has no attention layers, the activation sqrelu, one value_dim.")
    if config.num_heads * config.head_dim != config.hidden_size or config.value_dim[0] % config.num_heads:
        widths = f"hidden_size {config.hidden_size} and value_dim {config.value_dim[0]}"
        raise ValueError(f"Heads of {config.head_dim} do not divide {widths}.")


def shifted(x: Tensor, before: Tensor | None) -> Tensor:
    """Return x [B, T, D] moved one position later. before: the input before x, [B, 1, D]; None: zeros."""
    first = torch.zeros_like(x[:, :1]) if before is None else before
    return torch.cat([first, x[:, :-1]], 1)


def project(attention: nn.Module, x: Tensor, before: Tensor | None, v_first: Tensor | None):
    """Return (factors, beside, v_first) of normed inputs x [B, T, D].

    factors: each [B, T, H, d], in fp32 or better. beside: bonus [B, T, H, d_v] and gate [B, T, H d_v].
    v_first: the values of layer 0, [B, T, H d_v]; None in layer 0. before: the input before x, [B, 1, D].
    """
    heads = partial(split_heads, heads=attention.num_heads)
    change = shifted(x, before) - x
    x_r, x_w, x_k, x_v, x_a, x_g = (torch.addcmul(x, change, getattr(attention, name)) for name in MIXES)
    value = attention.v_proj(x_v)
    if v_first is None:
        v_first = value
    else:
        value = torch.lerp(value, v_first, attention.v_lora(x_v).sigmoid())
    query, key, value = heads(attention.r_proj(x_r)), heads(attention.k_proj(x_k)), heads(value)
    rate = heads(attention.a_lora(x_a)).sigmoid()
    probe = F.normalize(key * heads(attention.k_k), dim=-1)
    key = key * (1 + (rate - 1) * heads(attention.k_a))
    log_decay = -math.exp(-0.5) * heads(attention.w_lora(x_w)).sigmoid()
    bonus = (query * key * attention.r_k).sum(-1, keepdim=True) * value
    factors = dict(query=query, key=key, added=value, log_decay=log_decay, erase=rate * probe, probe=probe)
    return factors, dict(bonus=bonus, gate=attention.g_lora(x_g)), v_first


def recur(factors: dict[str, Tensor], **carried):
    """Return outputs [B, T, H, d_v], the last state [B, H, d_k, d_v] and the states before each chunk.

    factors: of `project`. The states before the chunks are [B, H, chunks, d_k, d_v].
    """
    heads_first = {name: x.transpose(1, 2) for name, x in factors.items()}
    outputs, end, before = diagonal_delta_chunks(**heads_first, chunk=CHUNK, **carried)
    return outputs.transpose(1, 2), end, before


def read_out(attention: nn.Module, outputs, bonus, gate: Tensor) -> Tensor:
    """Return the layer's update [B, T, D] of the heads' outputs [B, T, H, d_v] and of `project`'s beside."""
    normed = attention.g_norm(outputs.to(gate.dtype).flatten(0, 1).flatten(1)).view_as(gate)
    return attention.o_proj((normed + bonus.flatten(2).to(gate.dtype)) * gate)


def feed_forward(ffn: nn.Module, x: Tensor, before: Tensor | None) -> Tensor:
    """Return the channel mix W_value relu(W_key mix_k)^2 of normed inputs x [B, T, D]."""
    mixed = torch.addcmul(x, shifted(x, before) - x, ffn.x_k)
    return ffn.value(F.relu(ffn.key(mixed)).square())


class LowRank(nn.Module):
    """x -> W_2 f(W_1 x) + b."""

    def __init__(self, d_in: int, d_out: int, rank: int, activation: nn.Module, bias: bool = True):
        super().__init__()
        down, up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias)
        self.lora = nn.Sequential(down, activation, up)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """Parameters of the time mix; its forward is `project`, `recur` and `read_out`."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        d, d_value = config.hidden_size, config.value_dim[0]
        self.layer_idx, self.num_heads = layer, config.num_heads
        for name in MIXES:
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, d)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.r_k = nn.Parameter(torch.zeros(self.num_heads, config.head_dim))
        self.r_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d_value, bias=False)
        self.o_proj = nn.Linear(d_value, d, bias=False)
        self.w_lora = LowRank(d, d, config.decay_low_rank_dim, nn.Tanh())
        self.a_lora = LowRank(d, d, config.a_low_rank_dim, nn.Identity())
        if layer:
            self.v_lora = LowRank(d, d_value, config.v_low_rank_dim, nn.Identity())
        self.g_lora = LowRank(d, d_value, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.num_heads, d_value, eps=config.head_dim * config.norm_eps)


class RWKV7FeedForward(nn.Module):
    """Parameters of the channel mix; its forward is `feed_forward`."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        self.layer_idx = layer
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


def layer_norm(config: RWKV7Config) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class RWKV7Block(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if config.norm_first and layer == 0:
            self.pre_norm = layer_norm(config)
        self.attn_norm, self.ffn_norm = layer_norm(config), layer_norm(config)
        self.attn, self.ffn = RWKV7Attention(config, layer), RWKV7FeedForward(config, layer)

    def forward(self, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        factors, beside, v_first = project(self.attn, self.attn_norm(x), None, v_first)
        x = x + read_out(self.attn, recur(factors)[0], **beside)
        return x + feed_forward(self.ffn, self.ffn_norm(x), None), v_first


def embed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the first layer's input [B, T, D] of ids [B, T]."""
    x = model.embeddings(tokens)
    return model.layers[0].pre_norm(x) if hasattr(model.layers[0], "pre_norm") else x


class RWKV7ForCausalLM(PlainCausalLM):
    """The language model. Raises ValueError for a config that `check` refuses."""

    config_class = RWKV7Config
    _no_split_modules = ["RWKV7Block"]  # a device map puts whole layers on a device

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: RWKV7Config | None = None, **options):
        """As in transformers, from a local folder in the layout of flash-linear-attention or of the authors.

        The authors' folders (RWKV/RWKV7-*) have the names of their .pth files, with OFFICIAL in front. Ranks
        that the config leaves out are read off the tensors. Raises ValueError as `from_pth`.
        """
        config = config or cls.config_class.from_pretrained(folder)
        files = weight_files(local_path(folder))
        shapes = {name: shape for path in files for name, shape in tensor_shapes(path).items()}
        official = any(name.startswith(OFFICIAL) for name in shapes)
        for field, letter in LOW_RANKS.items():
            if official or getattr(config, field) is None:
                setattr(config, field, rank_in(shapes, letter))
        if not official:
            return super().from_pretrained(folder, config=config, **options)
        tensors = {name.removeprefix(OFFICIAL): x for path in files for name, x in read_weights(path).items()}
        if config.tie_word_embeddings:
            tensors.setdefault("head.weight", tensors.get("emb.weight"))
        model = _of_release(tensors, config, folder, options.get("dtype"))
        model.tie_weights()
        info = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
        return (model, info) if options.get("output_loading_info") else model

    def __init__(self, config: RWKV7Config):
        check(config)
        super().__init__(config, lambda layer: RWKV7Block(config, layer), layer_norm(config))

    def final_hidden(self, input_ids: Tensor) -> Tensor:
        x, v_first = embed(self.model, input_ids), None
        for block in self.model.layers:
            x, v_first = block(x, v_first)
        return self.model.norm(x)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the authors' first release: slow decays, and layers that are the identity."""
        if isinstance(module, (RWKV7Attention, RWKV7FeedForward)):
            init_mix(module, self.config)
        elif isinstance(module, nn.Embedding):
            size = 1e-4 if not self.config.tie_word_embeddings else self.config.initializer_range
            init.uniform_(module.weight, -size, size)
        elif module is self.lm_head and not self.config.tie_word_embeddings:
            ratio = self.config.vocab_size / self.config.hidden_size
            init.orthogonal_(module.weight, 0.5 * max(1, ratio) ** 0.5)


def init_mix(module: RWKV7Attention | RWKV7FeedForward, config: RWKV7Config) -> None:
    """Set the authors' initial values; decays per token are exp(-0.0009) to exp(-0.11) over the channels."""
    d, layers = config.hidden_size, config.num_hidden_layers
    channel = torch.arange(d) / d  # from 0 to 1, as depth; left goes from 1 towards 0
    depth = module.layer_idx / max(1, layers - 1)
    left = 1 - module.layer_idx / layers
    if isinstance(module, RWKV7FeedForward):
        init.copy_(module.x_k, 1 - channel**left**4)
        init.uniform_(module.key.weight, -0.5 * d**-0.5, 0.5 * d**-0.5)
        init.zeros_(module.value.weight)
        return
    for name, power, more in zip(MIXES, (0.2, 0.9, 0.9, 0.4, 0.9, 0.2), (0, 0, 0.4, 0.6, 0, 0)):
        init.copy_(getattr(module, name), 1 - (channel ** (power * left) + more * depth).view(1, 1, d))
    for projection, size in ((module.r_proj, 0.5), (module.k_proj, 0.05), (module.v_proj, 0.5)):
        init.uniform_(projection.weight, -size * d**-0.5, size * d**-0.5)
    init.zeros_(module.o_proj.weight)
    for low_rank in (x for x in module.children() if isinstance(x, LowRank)):
        init.zeros_(low_rank.lora[0].weight)
        init.orthogonal_(low_rank.lora[2].weight, 0.1 * max(1, low_rank.lora[2].in_features / d) ** 0.5)
    init.copy_(module.w_lora.lora[2].bias, -6.5 + 5 * torch.linspace(0, 1, d) ** (0.85 + depth**0.5))
    init.zeros_(module.a_lora.lora[2].bias)
    if module.layer_idx:
        init.ones_(module.v_lora.lora[2].bias)
    init.constant_(module.k_k, 0.85)
    init.ones_(module.k_a)
    init.zeros_(module.r_k)


def rank_in(shapes: dict[str, list[int]], letter: str) -> int:
    """Return the rank of the low-rank maps of a letter in a checkpoint with these shapes; 1 if it has none.

    flash-linear-attention has them as {letter}_lora.lora.0.weight [rank, D], the authors as att.{letter}1
    [D, rank]; they also have those of v in layer 0, which does not use them.
    """
    for name, shape in shapes.items():
        if name.endswith(f"{letter}_lora.lora.0.weight"):
            return shape[0]
        if name.endswith(f".att.{letter}1") and not name.endswith("blocks.0.att.v1"):
            return shape[1]
    return 1


OFFICIAL = "rwkv7."
RELEASE_NAMES = """
    model.embeddings=emb model.layers=blocks model.norm=ln_out lm_head=head pre_norm=ln0 attn_norm=ln1
    ffn_norm=ln2 .attn.=.att. r_proj=receptance k_proj=key v_proj=value o_proj=output g_norm=ln_x
    _lora.lora.2.bias=0 _lora.lora.0.weight=1 _lora.lora.2.weight=2
"""


def release_name(name: str) -> str:
    """Return a parameter's name in the authors' releases, where low-rank matrices are [in, out]."""
    for pair in RELEASE_NAMES.split():
        name = name.replace(*pair.split("="))
    return name


def from_pth(path: str | Path, dtype: torch.dtype = torch.float32) -> RWKV7ForCausalLM:
    """Return the model of one of the authors' releases (RWKV-x070-*.pth).

    For `load_host`, save it with save_pretrained and put a tokenizer into that folder. Raises ValueError for
    the first tensor that is missing, unexpected or of another size, and what `read_weights` raises.
    """
    tensors = read_weights(local_path(path))
    for name in ("emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight"):
        if name not in tensors:
            raise ValueError(f"{path} is not an RWKV-7 release: it lacks the tensor {name}.")
    return _of_release(tensors, _release_config(tensors), path, dtype)


def _of_release(
    tensors: dict[str, Tensor], config: RWKV7Config, path: str | Path, dtype: torch.dtype | None
) -> RWKV7ForCausalLM:
    """Return the model of a release's tensors, which have the names of .pth files. Raises as `from_pth`."""
    with torch.device("meta"):
        model = RWKV7ForCausalLM(config)
    weights = {}
    unused = set(tensors) - {f"blocks.0.att.v{i}" for i in range(3)}  # layer 0 does not use its v_lora
    for name, parameter in model.state_dict().items():
        theirs = release_name(name)
        if theirs not in tensors:
            raise ValueError(f"{path} is not an RWKV-7 release: it lacks the tensor {theirs}.")
        tensor = tensors[theirs].T if ".lora." in name and parameter.ndim == 2 else tensors[theirs]
        if tensor.squeeze().shape != parameter.squeeze().shape:
            shape = list(tensors[theirs].shape)
            raise ValueError(f"{path} is not an RWKV-7 release: its {theirs} has shape {shape}.")
        weights[name] = tensor.reshape(parameter.shape).to(dtype or tensor.dtype)
        unused.discard(theirs)
    if unused:
        raise ValueError(f"{path} is not an RWKV-7 release: nothing takes its tensor {min(unused)}.")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _release_config(tensors: dict[str, Tensor]) -> RWKV7Config:
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    layers = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=0)
    return RWKV7Config(
        vocab_size=tensors["emb.weight"].shape[0],
        hidden_size=tensors["emb.weight"].shape[1],
        num_hidden_layers=layers,
        head_dim=tensors["blocks.0.att.r_k"].shape[1],
        intermediate_size=tensors["blocks.0.ffn.key.weight"].shape[0],
        norm_first="blocks.0.ln0.weight" in tensors,
        **{field: rank_in(shapes, letter) for field, letter in LOW_RANKS.items()},
    )
