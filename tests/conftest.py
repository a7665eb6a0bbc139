"""Fixtures: a small fp64 host per family, with random weights, d_k != d_v and shared keys where possible."""

import os
import shutil
from contextlib import ExitStack

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.pop("WRITESAE_RUN", None)  # make sets it; the processes that the tests start are not one run

import pytest
import torch

from replication.commands import CommandError
from replication.commands.verify import committed
from replication.study.paths import ROOT
from writesae.hosts import load
from writesae.hosts.load import without_triton

without_triton()

SMALL = dict(
    gated_deltanet=dict(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        tie_word_embeddings=True,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    ),
    kda=dict(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        linear_head_dim=12,  # of keys and values
        linear_num_heads=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
        layer_types=["linear_attention"] * 5,  # attention modules compute their norms in fp32
        mlp_layer_types=["dense"] * 5,
    ),
    mamba2=dict(
        vocab_size=300,
        hidden_size=40,
        expand=2,
        num_heads=4,
        head_dim=20,
        state_size=12,
        n_groups=2,
        num_hidden_layers=5,
        chunk_size=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    ),
    rwkv7=dict(
        vocab_size=300,
        hidden_size=48,
        head_dim=12,
        value_dim=80,
        intermediate_size=64,
        num_hidden_layers=5,
        decay_low_rank_dim=8,
        a_low_rank_dim=8,
        v_low_rank_dim=6,
        gate_low_rank_dim=10,
        tie_word_embeddings=True,
    ),
    delta_net=dict(
        vocab_size=300,
        hidden_size=40,
        num_heads=4,
        expand_k=1.2,
        expand_v=2,
        intermediate_size=64,
        num_hidden_layers=5,
        tie_word_embeddings=True,
    ),
)
SMALL["gla"] = SMALL["delta_net"]  # the fields have the same names

_MAMBA2 = dict(family="mamba2", vocab_size=300, hidden_size=40, tie_word_embeddings=True, initializer_range=0.1)
_BAMBA = dict(mamba_n_heads=4, mamba_d_head=20, mamba_d_state=12, mamba_n_groups=2, mamba_chunk_size=32)
_BAMBA |= dict(_MAMBA2, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=1, intermediate_size=64)
_BAMBA |= dict(bos_token_id=1, eos_token_id=None, pad_token_id=None)
OTHERS = dict(  # other classes of the families, by model type
    nemotron_h=_MAMBA2
    | dict(
        hybrid_override_pattern="MM*M-M",
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=20,
        ssm_state_size=12,
        n_groups=2,
        chunk_size=32,
        time_step_min=1e-9,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=None,
    ),
    bamba=_BAMBA | dict(attn_layer_indices=[2, 4]),
    granitemoehybrid=_BAMBA
    | dict(
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=64,
        embedding_multiplier=3.0,
        logits_scaling=0.4,
        residual_multiplier=0.7,
        attention_multiplier=0.5,
    ),
    falcon_h1=_BAMBA
    | dict(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        mamba_d_ssm=80,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        num_hidden_layers=4,
        lm_head_multiplier=1.7,
        embedding_multiplier=3.0,
        mlp_multipliers=[0.8, 1.4],
        key_multiplier=1.3,
        attention_in_multiplier=0.6,
        attention_out_multiplier=0.9,
        ssm_multipliers=[1.1, 0.7, 1.3, 0.9, 0.5],
        ssm_in_multiplier=1.4,
        ssm_out_multiplier=0.8,
    ),
    zamba2=_MAMBA2
    | dict(
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
        num_hidden_layers=5,
        mamba_d_state=12,
        mamba_ngroups=2,
        n_mamba_heads=4,
        initializer_range=0.06,
        intermediate_size=64,
        num_attention_heads=5,
        chunk_size=32,
        num_mem_blocks=2,
        adapter_rank=6,
        use_mem_rope=True,
        time_step_min=1e-9,
        eos_token_id=None,
        pad_token_id=None,
    ),
)


def small(name, **fields):
    """Return the small host of a family, or of another class by its model type. fields: of its config."""
    torch.manual_seed(0)
    known = dict(OTHERS[name], model_type=name) if name in OTHERS else SMALL[name]
    family, fields = known.get("family", name), known | fields
    fields = {field: x for field, x in fields.items() if field != "family"}
    model = load.adapter(family).build(fields).double()
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.endswith("A_log"):
            p.data.mul_(3)  # with small weights, the layers above would be nearly linear
            if not p.any():
                p.data.normal_(std=0.3)  # the layers of RWKV-7 start as the identity
        else:
            p.data.add_(0.1 * torch.randn_like(p))  # vectors start as constants, which could hide an error
    return load.adapter(family)(model, None, "small")


@pytest.fixture(scope="session", params=[*load.FAMILIES, *OTHERS])
def host(request):
    """A test with this fixture runs once per family and once per other class.

    Tests of one family use the fixture of that name.
    """
    return small(request.param)


@pytest.fixture(scope="session")
def gated_deltanet():
    return small("gated_deltanet")


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 300, (3, 90), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def run(host, tokens):
    return host.run(tokens)


@pytest.fixture(scope="session")
def chromium():
    """A running Chromium, for pages; tests that need one are skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def last_commit():
    """Return a function: NAME -> results/NAME of the last commit (without git: of the working copy)."""
    with ExitStack() as stack:

        def folder(name):
            try:
                return stack.enter_context(committed(name))[0]
            except CommandError:
                return ROOT / "results" / name

        yield folder
