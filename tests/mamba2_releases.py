"""Mamba-2 releases with random weights, in the format of the authors of Mamba-2."""

import torch

ODD = dict(d_state=10, headdim=8, ngroups=2, expand=3, d_conv=3, dt_limit=[0.01, 0.5], bias=True, chunk_size=16)
RELEASES = {  # config.json as in state-spaces/mamba2-370m but small, and one with more fields
    "default": dict(d_model=64, n_layer=2, vocab_size=260, ssm_cfg={"layer": "Mamba2"}, tie_embeddings=True),
    "odd": dict(d_model=16, n_layer=3, vocab_size=272, ssm_cfg={"layer": "Mamba2"} | ODD, tie_embeddings=False),
}
COMMON = dict(d_intermediate=0, attn_layer_idx=[], attn_cfg={}, rms_norm=True, residual_in_fp32=True)
COMMON |= dict(fused_add_norm=True, pad_vocab_size_multiple=16)


def sizes(settings: dict) -> dict:
    """Return the sizes under the names of mamba_ssm, with its defaults."""
    return dict(d_state=128, headdim=64, ngroups=1, expand=2, d_conv=4, dt_limit=(0, float("inf")), bias=False) | {
        k: x for k, x in settings["ssm_cfg"].items() if k != "layer"
    }


def tensors_of(settings: dict) -> dict[str, torch.Tensor]:
    """Return random weights with the names and shapes of mamba_ssm."""
    g, s, d = torch.Generator().manual_seed(0), sizes(settings), settings["d_model"]
    inner, width = s["expand"] * d, s["ngroups"] * s["d_state"]
    heads, conv = inner // s["headdim"], inner + 2 * width

    def normal(*shape: int, size: float = 1.0, around: float = 0.0) -> torch.Tensor:
        return around + size * torch.randn(*shape, generator=g)

    t = {"backbone.embedding.weight": normal(272, d)}
    for layer in range(settings["n_layer"]):
        mixer = {"dt_bias": normal(heads, around=-2), "A_log": normal(heads, size=0.5, around=1), "D": normal(heads)}
        mixer |= {"in_proj.weight": normal(inner + conv + heads, d, size=2 * d**-0.5)}
        mixer |= {"conv1d.weight": normal(conv, 1, s["d_conv"]), "conv1d.bias": normal(conv, size=0.3)}
        mixer |= {
            "norm.weight": normal(inner, size=0.3, around=1),
            "out_proj.weight": normal(d, inner, size=2 * inner**-0.5),
        }
        if s["bias"]:
            mixer |= {"in_proj.bias": normal(inner + conv + heads), "out_proj.bias": normal(d)}
        t |= {f"backbone.layers.{layer}.mixer.{name}": x for name, x in mixer.items()}
        t[f"backbone.layers.{layer}.norm.weight"] = normal(d, size=0.3, around=1)
    t["backbone.norm_f.weight"] = normal(d, size=0.3, around=1)
    t["lm_head.weight"] = t["backbone.embedding.weight"].clone() if settings["tie_embeddings"] else normal(272, d)
    return t


def words():
    from transformers import PreTrainedTokenizerFast

    from replication.study import docstrings as corpus

    trained = corpus.train_tokenizer(["some words and more words"] * 3, 260)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=corpus.END_OF_TEXT)
