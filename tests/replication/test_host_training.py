"""Training a host: the optimiser, the schedule, and the weights after an interruption and a restart."""

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from replication.commands import train_host
from replication.study import docstrings
from writesae.hosts.load import load_host

RECIPE = dict(
    family="gated_deltanet",
    seed=0,
    vocabulary=512,
    context=32,
    architecture=dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
        layer_types=["linear_attention", "full_attention"],
    ),
    batch=4,
    at_once=2,
    steps=6,
    warmup=2,
    decay_from=4,
    matrix_lr=0.02,
    other_lr=0.003,
    decay_lr=0.0001,
    weight_decay=0.0,
    evaluate_every=2,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    words = [f"the value of parameter {i} is {i * i} and its name is x{i % 7}\n" * 8 for i in range(40)]
    monkeypatch.setattr(docstrings, "texts", lambda split: words if split == "host" else words[::3])
    monkeypatch.setattr(docstrings, "write_manifest", lambda path: path.write_text("{}"))
    made = tmp_path / "host"
    made.mkdir()
    (made / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return made


def test_a_killed_training_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    loss = train_host.train(folder, tmp_path / "whole")
    whole = load_file(folder / "model.safetensors")
    at = train_host.batch_at

    def killed(tokens, recipe, step):
        if step == 3:
            raise KeyboardInterrupt
        return at(tokens, recipe, step)

    monkeypatch.setattr(train_host, "batch_at", killed)
    with pytest.raises(KeyboardInterrupt):
        train_host.train(folder, tmp_path / "again")
    monkeypatch.setattr(train_host, "batch_at", at)
    assert train_host.train(folder, tmp_path / "again") == loss
    again = load_file(folder / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert load_host(folder).vocabulary == 512


def test_another_recipe_begins_anew(folder, tmp_path):
    train_host.train(folder, tmp_path / "build")
    for changes in (dict(seed=5), dict(vocabulary=520)):
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
        train_host.train(folder, tmp_path / "fresh" / str(changes))
        fresh = load_file(folder / "model.safetensors")
        train_host.train(folder, tmp_path / "build")
        again = load_file(folder / "model.safetensors")
        assert all(torch.equal(fresh[name], again[name]) for name in fresh)


def test_pieces_of_a_batch_give_the_gradient_of_the_whole(folder):
    from writesae.hosts.load import adapter

    torch.manual_seed(0)
    model = adapter("gated_deltanet").build(RECIPE["architecture"] | dict(vocab_size=512))
    tokens = torch.randint(512, (5, 32))
    gradients, losses = [], []
    for at_once, through in ((5, "library"), (2, "library"), (2, "adapter")):
        model.zero_grad()
        loss_of = train_host.loss_function(model, train_host.Recipe(**RECIPE, through=through))
        losses.append(train_host.accumulate(loss_of, tokens, at_once))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() < 1e-4 * gradients[0].norm()


def test_what_sets_the_decays_learns_slowly(folder):
    from writesae.hosts.load import adapter

    model = adapter("gated_deltanet").build(RECIPE["architecture"] | dict(vocab_size=512))
    matrices, adam = train_host.optimizers(model, train_host.Recipe(**RECIPE))
    rate = {id(p): group["lr"] for group in adam.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if any(part in name for part in ("A_log", "dt_bias", "in_proj_a")):
            assert rate[id(p)] == 0.0001
    every = sum(len(group["params"]) for optimizer in (matrices, adam) for group in optimizer.param_groups)
    assert every == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(3, 40, 96), (2, 96, 40)])
def test_orthogonal_keeps_directions_and_levels_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ train_host.Muon.orthogonal(matrices) @ vh.mT
    levelled = inside.diagonal(dim1=1, dim2=2)
    assert ((levelled > 0.6) & (levelled < 1.3)).all()
    assert (s.max() / s.min()) > 2
    assert (inside - torch.diag_embed(levelled)).abs().max() < 1e-3


def test_the_rate_warms_up_and_falls_to_zero():
    recipe = train_host.Recipe(**RECIPE)
    rates = [recipe.learning_rate(step) for step in range(6)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.5])


def test_a_recipe_with_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="speed"):
        train_host.Recipe(**RECIPE, speed=3)


def test_a_text_that_spells_end_of_text_is_text(monkeypatch):
    text = f"a {docstrings.END_OF_TEXT} b" * 3
    monkeypatch.setattr(docstrings, "texts", lambda split: [text, "more words"])
    tokenizer = docstrings.train_tokenizer(["some words and more words"] * 3, 270)
    tokens = train_host.stream(tokenizer, "host").tolist()
    assert tokens.count(0) == 2 and tokens[0] == 0
    assert tokenizer.decode(tokens, skip_special_tokens=False).count(docstrings.END_OF_TEXT) == 2 + 3
