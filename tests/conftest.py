"""A small Gated DeltaNet hybrid with random weights, d_k != d_v and grouped value heads, in fp64."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from writesae.hosts import without_triton

without_triton()

ARCHITECTURE = dict(
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
)


@pytest.fixture(scope="session")
def host():
    from writesae.hosts.gated_deltanet import GatedDeltaNet, build

    torch.manual_seed(0)
    model = build(ARCHITECTURE).double()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)  # larger random weights, so that the layers above are not nearly linear
    return GatedDeltaNet(model, None, "small")


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 300, (3, 90), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def run(host, tokens):
    return host.run(tokens)
