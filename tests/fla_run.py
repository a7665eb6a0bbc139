"""Record logits of flash-linear-attention's DeltaNet and GLA for test_delta_net_gla.py: `python fla_run.py`.

Run this by hand, in an environment with flash-linear-attention (0.6.0 was used) and einops; no GPU is needed.
The models have tiny random weights. Triton operators are replaced by the package's torch references or, if
there is none, by what their docstrings say. The output is in tests/fla: one folder per model with config and
weights, and logits.safetensors with tokens, logits and (as metadata) versions.
"""

from __future__ import annotations

import inspect
import types
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GLAConfig, GLAForCausalLM
from fla.modules import FusedRMSNormGated, GatedMLP, RMSNorm, ShortConvolution
from fla.modules.norm.layernorm import rms_norm_ref
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "fla"
SMALL = dict(vocab_size=60, hidden_size=24, num_heads=2, intermediate_size=40, num_hidden_layers=2, expand_k=0.5)
MODELS = dict(delta_net=(DeltaNetForCausalLM, DeltaNetConfig), gla=(GLAForCausalLM, GLAConfig))


def delta_rule(q, k, v, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **_):
    """Call the package's reference, which needs heads first and normalised queries and keys."""
    assert use_qk_l2norm_in_kernel
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))  # as its l2norm_fwd
    heads_first = [x.transpose(1, 2) for x in (q, k, v, beta)]
    outputs, state = delta_rule_recurrence(*heads_first, initial_state, output_final_state)
    return outputs.transpose(1, 2), state


def gla(q, k, v, initial_state, output_final_state, gk=None, g=None, **_):
    return naive_recurrent_gla(q, k, v, g if gk is None else gk, initial_state, output_final_state)


def rms_norm(self, x, residual=None, prenorm=False, **_):
    return rms_norm_ref(x, self.weight, self.bias, residual=residual, eps=self.eps, prenorm=prenorm)


def gated_rms_norm(self, x, g):
    return rms_norm_ref(x, self.weight, self.bias, eps=self.eps) * F.silu(g)


def convolution(self, x, cache=None, **_):
    assert cache is None and self.activation in ("silu", "swish")
    return F.silu(self._conv_forward(x.mT, self.weight, self.bias)[..., : x.shape[1]]).mT, None


def swiglu(self, x, **_):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


FORWARDS = {RMSNorm: rms_norm, FusedRMSNormGated: gated_rms_norm, ShortConvolution: convolution, GatedMLP: swiglu}
OPERATORS = dict(
    delta_net=dict(chunk_delta_rule=delta_rule, fused_recurrent_delta_rule=delta_rule),
    gla=dict(chunk_gla=gla, fused_recurrent_gla=gla),
)


def on_references(model: torch.nn.Module, operators: dict) -> None:
    """Replace the forwards of a model's modules, and the operators that its mixers call, by torch code."""
    for module in model.modules():
        if type(module) in FORWARDS:
            module.forward = types.MethodType(FORWARDS[type(module)], module)
    for layer in model.model.layers:
        plain = inspect.unwrap(type(layer.attn).forward)
        assert all(name in plain.__globals__ for name in operators)
        changed = types.FunctionType(
            plain.__code__, {**plain.__globals__, **operators}, plain.__name__, plain.__defaults__, plain.__closure__
        )
        changed.__kwdefaults__ = plain.__kwdefaults__
        layer.attn.forward = types.MethodType(changed, layer.attn)


def main() -> None:
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 70), generator=torch.Generator().manual_seed(1))
    found = dict(tokens=tokens)
    for name, (model_class, config_class) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config_class(**SMALL)).eval()
        for part, parameter in model.named_parameters():
            size = 0.5 if "conv1d" in part else 0.15 if parameter.ndim > 1 else 0.3
            parameter.data = size * torch.randn_like(parameter) + (parameter.ndim == 1)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink()
        on_references(model, OPERATORS[name])
        with torch.no_grad():
            found[name] = model(input_ids=tokens, use_cache=False).logits
    versions = {name: version(name) for name in ("flash-linear-attention", "torch", "transformers")}
    save_file(found, FOLDER / "logits.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
