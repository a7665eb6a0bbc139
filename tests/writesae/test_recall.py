"""Associative recall: contexts by hand, edits against step loops without a write, dictionaries with a known answer."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from writesae.evaluate.firings import CellSAE, encode_cell
from writesae.evaluate.recall import (
    Task,
    Trials,
    answer_loss,
    answered,
    associations,
    recall_benchmark,
    replaced,
    rewritten,
    true_dictionary,
    true_writes,
)
from writesae.hosts import load
from writesae.recurrence import step_states
from writesae.sae.config import Architecture
from writesae.sae.model import SAE

TASK = Task(keys=14, values=9, shown=10, choices=2)
PAIRS, QUERIES = 6, 4
WIDE = dict(vocab_size=23, num_hidden_layers=1, tie_word_embeddings=False)
NO_TOKENS = dict(bos_token_id=0, eos_token_id=0)
SMALL = dict(
    gated_deltanet=dict(
        **WIDE,
        hidden_size=24,
        intermediate_size=20,
        layer_types=["linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=10,
        linear_value_head_dim=7,
        linear_conv_kernel_dim=2,
    ),
    mamba2=dict(
        **WIDE, **NO_TOKENS, pad_token_id=0, hidden_size=8, expand=1, num_heads=1, head_dim=8, state_size=10,
        n_groups=1, conv_kernel=2, chunk_size=8, initializer_range=0.3,
    ),
    rwkv7=dict(
        **WIDE, **NO_TOKENS, hidden_size=10, head_dim=10, value_dim=7, intermediate_size=16, decay_low_rank_dim=4,
        a_low_rank_dim=4, v_low_rank_dim=4, gate_low_rank_dim=4,
    ),
)  # fmt: skip


@pytest.fixture(scope="module", params=SMALL)
def recall_host(request):
    """A recall host with random weights in fp64, d_k != d_v."""
    torch.manual_seed(3)
    model = load.adapter(request.param).build(SMALL[request.param]).double()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return load.adapter(request.param)(model, None, request.param)


@pytest.fixture(scope="module")
def contexts():
    return TASK.draw(5, PAIRS, QUERIES, torch.Generator().manual_seed(2))


def test_a_context_shows_different_keys_and_asks_for_some_of_them(contexts):
    tokens, possible = contexts.tokens, TASK.possible()
    assert tokens.shape == (5, 2 * PAIRS + 2 * QUERIES) and contexts.pairs == PAIRS
    for row, asked, numbers in zip(tokens.tolist(), contexts.asked.tolist(), TASK.associations(contexts).tolist()):
        keys, values = row[: 2 * PAIRS : 2], row[1 : 2 * PAIRS : 2]
        assert len(set(keys)) == PAIRS and max(keys) < 10 and min(values) >= 14
        assert len(set(asked)) == QUERIES
        assert row[2 * PAIRS :] == [x for j in asked for x in (keys[j], values[j])]
        for key, value, number in zip(keys, values, numbers, strict=True):
            assert number // 2 == key and possible[key, number % 2] == value
    assert contexts.answers.tolist() == tokens[:, 2 * PAIRS + 1 :: 2].tolist()
    assert all(len(set(row)) == 2 for row in possible.tolist())
    everything = Task(14, 9).draw(2000, 1, 1, torch.Generator().manual_seed(0)).tokens[:, :2]
    assert len(everything.unique(dim=0)) == 14 * 9


@pytest.mark.parametrize(("pairs", "queries"), [(11, 2), (3, 4), (3, 0)])
def test_contexts_that_do_not_exist_are_one_sentence(pairs, queries):
    with pytest.raises(ValueError, match="at most 10 pairs"):
        TASK.draw(2, pairs, queries, torch.Generator())


def test_the_loss_and_the_answers_are_those_of_the_library_at_the_queries(recall_host, contexts):
    logits = recall_host.model(input_ids=contexts.tokens, use_cache=False).logits
    losses, right = [], torch.zeros(5, QUERIES, dtype=torch.bool)
    for n in range(5):
        for j in range(QUERIES):
            at, value = 2 * PAIRS + 2 * j, contexts.tokens[n, 2 * PAIRS + 2 * j + 1]
            losses.append(-logits[n, at].log_softmax(-1)[value])
            right[n, j] = logits[n, at].argmax() == value
    assert_close(answer_loss(recall_host, contexts), torch.stack(losses).mean(), "loss", 1e-5)
    assert torch.equal(answered(recall_host, contexts), right)


def test_a_pair_is_written_alike_in_every_context(recall_host, contexts):
    key, value = true_writes(recall_host, TASK)
    factors = recall_host.factors(recall_host.run(contexts.tokens), 0, 0)
    number = TASK.associations(contexts)
    for pair in range(PAIRS):
        assert_close(factors.key[:, 2 * pair + 1], key[number[:, pair]], "key", 1e-9)
        assert_close(factors.added[:, 2 * pair + 1], value[number[:, pair]], "value", 1e-9)


def by_step_loop(host, trials, change):
    """The logits at the queries when the states come from a step loop, with other value sides of the writes."""
    factors = host.factors(trials.run, 0, 0)
    added = factors.added.clone()
    added[trials.rows, trials.place] = change
    factors.added, factors.effective = added, None
    outputs = (step_states(factors).mT @ factors.query[..., None])[..., 0]
    record = trials.run.records[0]
    skip = record.factors.get("skip")
    record = type(record)(record.hidden, outputs[:, :, None] + (0 if skip is None else skip), beside=record.beside)
    return host.logits(trials.contexts.at_queries(host.finish(0, record, None)))


def test_a_deleted_and_a_rewritten_pair_are_those_of_a_step_loop(recall_host, contexts):
    trials = Trials(recall_host, contexts, seed=4)
    asked = contexts.asked[trials.rows, trials.query]
    assert torch.equal(trials.place, 2 * asked + 1) and len(trials.place.unique()) > 1
    native = trials.native
    wanted = by_step_loop(recall_host, trials, torch.zeros_like(native.added))
    nothing = torch.zeros_like(native.added)
    assert_close(trials.logits_of_value(nothing), wanted, "logits without the write", 1e-6)
    zeros = torch.zeros_like(native.key)[:, None], nothing[:, None]
    assert_close(trials.logits(zeros), wanted, "logits with zeros in its place", 1e-6)
    other = torch.randn_like(native.added)
    wanted = by_step_loop(recall_host, trials, other)
    put_in = native.key[:, None], other[:, None]
    assert_close(trials.logits(put_in), wanted, "logits with another write", 1e-6)
    assert_close(trials.logits_of_value(other), wanted, "logits with another value side", 1e-6)
    unchanged = recall_host.logits(contexts.at_queries(trials.run.final))
    assert (wanted - unchanged).abs().max() > 1e-3


def test_outcomes_are_those_of_a_loop_over_queries(recall_host, contexts):
    trials = Trials(recall_host, contexts, seed=4)
    trials.right = torch.ones(5, QUERIES, dtype=torch.bool)  # as if the random host knew all answers
    trials.right[0] = torch.arange(QUERIES) == trials.query[0]  # no others in the first context
    logits = trials.logits_of_value(torch.zeros_like(trials.native.added))
    outcome = trials.outcome("x", logits)
    for n in range(5):
        said = [bool(logits[n, j].argmax() == contexts.answers[n, j]) for j in range(QUERIES)]
        drawn = int(trials.query[n])
        loss = -logits[n, drawn].log_softmax(-1)[contexts.answers[n, drawn]]
        assert bool(outcome["kept_x"][n]) == said[drawn]
        assert outcome["loss_x"][n] == pytest.approx(float(loss), rel=1e-5)
        others = [said[j] for j in range(QUERIES) if j != drawn]
        if n:
            assert outcome["others_x"][n] == pytest.approx(sum(others) / len(others))
    assert outcome["others_x"][0].isnan()


def test_a_counterfactual_write_has_another_value_on_the_native_key(recall_host, contexts):
    trials = Trials(recall_host, contexts, seed=4)
    table = rewritten(trials, TASK, seed=5)
    assert list(table.pair) == (trials.place // 2).tolist() and len(table) == 5
    shift = torch.randint(1, 9, (5,), generator=torch.Generator().manual_seed(5))
    key, value = (x[trials.rows, trials.place // 2] for x in contexts.shown)
    new = 14 + (value - 14 + shift) % 9
    assert (new != value).all()
    tokens = torch.stack([key, new], 1)
    written = recall_host.factors(recall_host.run(tokens), 0, 0).added[:, 1]
    logits = by_step_loop(recall_host, trials, written)
    drawn = logits[trials.rows, trials.query]
    assert table.says_new.tolist() == (drawn.argmax(-1) == new).tolist()


# Dictionaries with a known answer


def orthogonal_task():
    """Five associations with orthogonal writes, and 40 contexts of them: (task, contexts, writes, sides)."""
    task = Task(keys=5, values=5, choices=1)
    contexts = task.draw(40, 3, 1, torch.Generator().manual_seed(1))
    key, value = 2 * torch.eye(5, 6, dtype=torch.float64), 3 * torch.eye(5, 7, dtype=torch.float64)
    number = task.associations(contexts)
    sides = torch.zeros(40, 8, 6, dtype=torch.float64), torch.zeros(40, 8, 7, dtype=torch.float64)
    for side, rows in zip(sides, (key, value), strict=True):
        side[:, 1:6:2] = rows[number]
    return task, contexts, (key, value), sides


def applied(sae, sides):
    from writesae.history import History

    history = History(*sides)
    return CellSAE(0, 0, "write", "added", sae, *sae.encode_history(history), history)


def test_the_true_dictionary_has_an_atom_for_every_association():
    task, contexts, writes, sides = orthogonal_task()
    table = associations(applied(true_dictionary(*writes), sides), contexts, task, writes)
    assert list(table.association) == list(range(5)) and list(table.atom) == list(range(5))
    assert table.n.sum() == 120 and (table.n == torch.bincount(task.associations(contexts).flatten()).numpy()).all()
    for column in ("recall", "precision", "own", "pure", "cosine"):
        assert (table[column] == 1).all(), column


def test_an_atom_of_two_associations_belongs_to_the_more_frequent_one():
    task, contexts, writes, sides = orthogonal_task()
    sae = true_dictionary(*writes)
    both = F.normalize(writes[0][0] + writes[0][1], dim=0), F.normalize(writes[1][0] + writes[1][1], dim=0)
    for part in (sae.encoder, sae.decoder):
        part.assign(torch.tensor([0, 1]), both[0].repeat(2, 1), both[1].repeat(2, 1))
    sae.encoder.bias[1] = -100.0  # silent
    table = associations(applied(sae, sides), contexts, task, writes).set_index("association")
    n = table.n
    assert n[0] != n[1] and list(table.atom[:3]) == [0, 0, 2]
    assert table.precision[:2].tolist() == pytest.approx([n[0] / (n[0] + n[1]), n[1] / (n[0] + n[1])])
    assert table.own.tolist() == [n[0] > n[1], n[1] > n[0], True, True, True]
    assert table.pure.tolist() == [float(n[0] > n[1]), float(n[1] > n[0]), 1, 1, 1]
    assert (table.pure * n).sum() / n.sum() == pytest.approx(1 - min(n[0], n[1]) / n.sum())
    assert table.cosine[:2].tolist() == pytest.approx([0.5, 0.5])


def test_a_dictionary_that_never_fires_has_no_atom_for_anything():
    task, contexts, writes, sides = orthogonal_task()
    sae = true_dictionary(*writes)
    sae.encoder.bias.fill_(-100.0)
    table = associations(applied(sae, sides), contexts, task, writes)
    assert (table.atom == -1).all() and not table[["recall", "precision", "own", "pure"]].to_numpy().any()


def test_a_random_dictionary_is_near_chance():
    torch.manual_seed(0)
    task = Task(keys=40, values=40, choices=1)
    contexts = task.draw(200, 8, 1, torch.Generator().manual_seed(1))
    writes = torch.randn(40, 6), torch.randn(40, 6)
    sides = [torch.zeros(200, 18, 6), torch.zeros(200, 18, 6)]
    for side, rows in zip(sides, writes, strict=True):
        side[:, 1:16:2] = rows[task.associations(contexts)]
    sae = SAE(Architecture(n_atoms=4, k=1, centre="none"), 6, 6)
    table = associations(applied(sae.requires_grad_(False), sides), contexts, task, writes)
    assert table.own.mean() <= 4 / 40 and (table.pure * table.n).sum() / table.n.sum() < 0.2
    assert table.cosine.mean() < 0.7


# Replacements


def replacement_by_hand(trials, cell_sae, n, name):
    """The matrix that a condition puts in the place of the native write of context n."""
    sae, place = cell_sae.sae, (n, int(trials.place[n]))
    weight = sae.decoder.weight()
    slot = int(cell_sae.coefficients[place].argmax())
    atom, size = int(cell_sae.indices[place][slot]), cell_sae.coefficients[place][slot]
    if name == "reconstruction":
        return sae.decode(cell_sae.indices[place][None], cell_sae.coefficients[place][None])[0]
    native = trials.native.key[n].norm() * trials.native.added[n].norm()
    return {"atom": size, "matched": native, "delete": 0.0}[name] * weight[atom]


@pytest.mark.parametrize("centre", ["mean", "none"])
def test_replacements_are_the_matrices_made_by_hand(recall_host, contexts, centre):
    torch.manual_seed(5)
    factors = recall_host.factors(recall_host.run(contexts.tokens), 0, 0)
    history = factors.history("write", "added")
    sae = SAE(Architecture(n_atoms=12, k=3, centre=centre), 10, history.d_v).double().requires_grad_(False)
    sae.mean.copy_(history.mean() if centre == "mean" else 0.0)
    sae.scale.fill_(0.7)
    cell_sae = encode_cell((0, 0), "write", "added", sae, factors)
    trials = Trials(recall_host, contexts, seed=4)
    table = replaced(trials, cell_sae, seed=6)
    for name in ("atom", "matched", "reconstruction", "delete"):
        matrices = torch.stack([replacement_by_hand(trials, cell_sae, n, name) for n in range(5)])
        unit = torch.eye(10, dtype=torch.float64).expand(5, -1, -1)
        logits = trials.logits((unit, matrices))[trials.rows, trials.query]
        value = contexts.answers[trials.rows, trials.query]
        assert_close(torch.tensor(table[f"loss_{name}"]), F.cross_entropy(logits, value, reduction="none"), name, 1e-5)
    assert table.loss_random.nunique() == 5 and not (table.loss_random == table.loss_atom).any()


def test_the_benchmark_takes_any_sae_of_a_recall_host(recall_host, contexts):
    writes = true_writes(recall_host, TASK)
    sae = true_dictionary(*writes)
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        recall_benchmark(recall_host, sae, TASK, contexts)
    sae.config = sae.config.model_copy(update=dict(target="write", write="added"))
    flat = SAE(sae.config.model_copy(update=dict(decoder="flat")), sae.d_k, sae.d_v).double()
    with pytest.raises(ValueError, match="atoms of rank 1, of added writes"):
        recall_benchmark(recall_host, flat, TASK, contexts)
    one, two = recall_benchmark(recall_host, sae, TASK, contexts, seed=4)
    assert one.n.sum() == 5 * PAIRS and one.cosine.to_numpy() == pytest.approx(1)
    atoms = two[two.cosine > 1 - 1e-9]  # the right atom fired: it is the native write
    assert len(atoms) and isinstance(one, pd.DataFrame)
    assert (atoms.kept_atom == atoms.right).all() and (atoms.kept_reconstruction == atoms.right).all()
