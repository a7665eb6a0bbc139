"""All writes at once: against step loops of the whole recurrence in fp64, and against edits of single writes."""

import pytest
import torch
from helpers import assert_close

from writesae.edit import edited_hidden, make_edit
from writesae.evaluate import all_writes
from writesae.evaluate.all_writes import MeanWrites, output_change, rank_one_writes, replace_all_writes
from writesae.recurrence import Factors
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.text import Windows

LAYER, HEADS = 1, (2, 0)
HEAD = HEADS[0]


def sae_of(host, target, head=HEAD, seed=0, centre="mean"):
    """An SAE in fp64 with random weights; its offset is large enough to count."""
    torch.manual_seed(seed)
    sae = SAE(Architecture(n_atoms=24, k=3, centre=centre), host.d_k, host.d_v).double().requires_grad_(False)
    sae.normalise()
    cell = dict(layer=LAYER, head=head, target=target, write="added")
    sae.config = sae.config.model_copy(update=cell)
    sae.scale.fill_(2.5)
    if centre != "none":
        (sae.mean if centre == "mean" else sae.bias).copy_(0.1 * torch.randn(host.d_k, host.d_v))
    return sae


def replaced_reads(factors, new, write="added"):
    """The head's reads [N, T, d_v] after new writes [N, T, d_k, d_v], by a loop over matrices A_t."""
    state, reads = torch.zeros_like(new[:, 0]), []
    for t in range(new.shape[1]):
        transition = torch.diag_embed(factors.log_decay[:, t].exp().expand(len(new), new.shape[2]))
        if factors.erase is not None and write == "added":
            transition = transition - factors.erase[:, t, :, None] * factors.probe[:, t, None, :]
        state = transition @ state + new[:, t]
        reads.append((factors.query[:, t, None] @ state)[:, 0])
    return torch.stack(reads, 1)


def native_writes(factors, write="added"):
    return factors.key[..., None] * factors.write(write)[:, :, None]


@pytest.mark.parametrize("write", ["added", "effective"])
def test_the_change_is_that_of_the_whole_recurrence_with_other_writes(host, run, write):
    if write == "effective" and host.factors(run, LAYER, HEAD).effective is None:
        pytest.skip("the effective write of this family has a higher rank")
    factors = host.factors(run, LAYER, HEAD)
    torch.manual_seed(5)
    new = [torch.randn(*factors.key.shape, host.d_v).double() for _ in range(2)]
    native = replaced_reads(factors, native_writes(factors, write), write)
    changes = output_change(factors, [lambda t: new[0][:, t], lambda t: new[1][:, t]], write)
    for number in range(2):
        wanted = replaced_reads(factors, new[number], write) - native
        assert_close(changes[number], wanted, f"change {number}", 1e-10)


def test_without_writes_the_head_reads_nothing(host, run):
    """The native read is that of the run's own states, so that the step loop above has the model's transitions."""
    factors = host.factors(run, LAYER, HEAD)
    (change,) = output_change(factors, [lambda t: torch.zeros(3, host.d_k, host.d_v).double()])
    states = torch.stack([state for state, _ in factors.walk()], 1)
    assert_close(change, -(factors.query[:, :, None] @ states)[:, :, 0], "minus the native read", 1e-10)
    record = run.records[LAYER]
    read = record.outputs - record.factors.get("skip", 0)  # of Mamba-2: D x does not pass through the state
    assert_close(-change, read[:, :, HEAD], "the run's own read", 1e-8)


def test_one_other_write_is_an_edit_of_one_write(host, run):
    factors, rows, position = host.factors(run, LAYER, HEAD), torch.arange(3), torch.tensor([0, 17, 60])
    torch.manual_seed(2)
    key, value = torch.randn(3, host.d_k).double(), torch.randn(3, host.d_v).double()
    new = native_writes(factors)
    new[rows, position] = key[:, :, None] * value[:, None]
    (change,) = output_change(factors, [lambda t: new[:, t]])
    ours, _ = host.branch(run, LAYER, HEAD, rows, torch.zeros_like(rows), change)
    native = factors.at(rows, position)
    left, right = torch.stack([native.key, key], 1), torch.stack([-native.added, value], 1)
    for row in range(3):
        edit = make_edit(rows[row : row + 1], position[row : row + 1], left[row : row + 1], right[row : row + 1])
        start = int(position[row])
        theirs = edited_hidden(host, run, LAYER, HEAD, edit, 90 - start)
        assert_close(ours[row : row + 1, start:], theirs, f"row {row}", 1e-9)
        assert_close(ours[row, :start], run.final[row, :start], f"row {row}, before the edit", 1e-10)
        assert (theirs[0] - run.final[row, start:]).norm() > 1e-3 * run.final[row, start:].norm()


def test_native_writes_change_nothing(host, run):
    factors, rows = host.factors(run, LAYER, HEAD), torch.arange(3)
    (change,) = output_change(factors, [rank_one_writes(factors.key, factors.added)])
    assert not change.any()
    final, _ = host.branch(run, LAYER, HEAD, rows, torch.zeros_like(rows), change)
    assert_close(final, run.final, "final hidden states", 1e-10)


def test_several_heads_change_as_one_layer(host, run):
    """Against the layer's own `finish` of a record whose outputs of both heads are changed by hand."""
    rows, starts = torch.tensor([2, 0]), torch.zeros(2, dtype=torch.long)
    torch.manual_seed(7)
    change = torch.randn(2, 90, len(HEADS), host.d_v).double()
    both, _ = host.branch(run, LAYER, HEADS, rows, starts, change)
    native = run.records[LAYER]
    outputs = native.outputs[rows].clone()
    for number, head in enumerate(HEADS):
        outputs[:, :, head] += change[:, :, number]
    beside = {name: x[rows] for name, x in native.beside.items()}
    hidden = host.finish(LAYER, type(native)(native.hidden[rows], outputs, beside=beside), None)
    for above in range(LAYER + 1, host.layers):
        record = host.mix(above, hidden, None, host._positions(run.tokens[rows]))
        hidden = host.finish(above, record, None)
    assert_close(both, hidden, "both heads", 1e-9)
    turned, _ = host.branch(run, LAYER, HEADS[::-1], rows, starts, change.flip(2))
    assert_close(both, turned, "the heads in another order", 1e-12)
    one, _ = host.branch(run, LAYER, HEAD, rows, starts, change[:, :, 0])
    same, _ = host.branch(run, LAYER, [HEAD], rows, starts, change[:, :, :1])
    assert torch.equal(one, same)
    assert (one - both).norm() > 1e-3 * both.norm()


def test_branch_refuses_heads_that_do_not_fit(gated_deltanet, tokens):
    host = gated_deltanet
    run, rows = host.run(tokens), torch.arange(3)
    change = torch.zeros(3, 90, 2, host.d_v).double()
    for heads, message in (([1, 1], "different ones"), ([], "different ones"), ([1, 9], "no head 9")):
        with pytest.raises(ValueError, match=message):
            host.branch(run, LAYER, heads, rows, rows * 0, change)
    with pytest.raises(ValueError, match=r"change \[R, steps, 3, 20\]"):
        host.branch(run, LAYER, [0, 1, 2], rows, rows * 0, change)


# What is written


def test_means_of_tokens_are_means_of_their_writes():
    torch.manual_seed(0)
    shape = dict(key=(4, 50, 6), added=(4, 50, 5), log_decay=(4, 50, 1))
    factors = Factors(query=None, **{name: torch.randn(x).double() for name, x in shape.items()})
    tokens = torch.randint(0, 9, (4, 50))
    writes = native_writes(factors)
    means = MeanWrites.of(factors.history("write"), tokens, torch.tensor([[7, 3], [11, 7]]))
    assert means.tokens.tolist() == [3, 7]
    numbers = means.numbers(torch.tensor([7, 5, 11, 3]))
    wanted = [writes[tokens == 7].mean(0), writes.mean((0, 1)), writes.mean((0, 1)), writes[tokens == 3].mean(0)]
    assert_close(means.matrices[numbers], torch.stack(wanted), "mean writes", 1e-12)


@pytest.mark.parametrize(
    ("target", "centre"),
    [("state", "mean"), ("state", "bias"), ("write", "mean"), ("write", "none"), ("write", "bias")],
)
def test_every_condition_writes_what_its_name_says(host, run, target, centre):
    factors, sae = host.factors(run, LAYER, HEAD), sae_of(host, target, centre=centre)
    indices, coefficients = sae.encode_history(factors.history(target, "added"))
    assert (coefficients > 0).sum() > 100
    atoms = sae.decoder.weight()
    native = native_writes(factors)
    overlap = torch.einsum("ntkv,akv->nta", native, atoms)
    best = overlap.abs().argmax(-1)
    top = indices.gather(-1, coefficients.argmax(-1, keepdim=True))[..., 0]
    whole = torch.einsum("nts,ntskv->ntkv", coefficients, atoms[indices])
    new = dict(atom=coefficients.amax(-1)[..., None, None] * atoms[top])
    new["projection"] = overlap.gather(-1, best[..., None])[..., None] * atoms[best]
    new["reconstruction"] = whole + (sae.offset if target == "write" else 0)
    if target == "write" and centre != "none":
        new["atom_and_mean"] = new["atom"] + sae.offset
    changes = all_writes.output_changes_by_sae(sae, factors, "added")
    before = replaced_reads(factors, native)
    for name, writes in new.items():
        assert_close(changes[name], replaced_reads(factors, writes) - before, name, 1e-10)
    if target == "state":
        read = (factors.query[:, :, None] @ (whole + sae.offset))[:, :, 0]
        assert_close(changes["read"], read - before, "read", 1e-10)
    assert changes.keys() == new.keys() | ({"read"} if target == "state" else set())


def test_the_loss_is_that_of_the_changed_run(host, tokens):
    """Both heads, two SAEs, batches that do not divide the windows; the reference loops over one window."""
    windows = Windows(tokens, torch.tensor([4, 4, 9]))
    saes = {name: {head: sae_of(host, name, head, seed=head) for head in HEADS} for name in ("state", "write")}
    run = host.run(tokens)
    factors = {head: host.factors(run, LAYER, head) for head in HEADS}
    means = {head: MeanWrites.of(factors[head].history("write"), tokens, tokens[:1]) for head in HEADS}
    table = replace_all_writes(host, windows, saes, means, layer=LAYER, batch=2)
    assert (table.groupby(["sae", "condition"]).window.agg(list).map(sorted) == [[0, 1, 2]] * len(table[::3])).all()
    assert table.groupby("window").passage.unique().map(list).tolist() == [[4], [4], [9]]
    with pytest.raises(ValueError, match=r"An SAE of the cell .layer, head. \(1, 0\) is given for \(1, 2\)"):
        replace_all_writes(host, windows, {"a": dict.fromkeys(HEADS, saes["write"][0])}, means, layer=LAYER)
    none = [output_change(factors[head], [lambda t: torch.zeros(3, host.d_k, host.d_v)])[0] for head in HEADS]
    cases = {("", "native"): 0, ("", "none"): torch.stack(none, 2)}
    for name, condition in (("write", "atom"), ("state", "read")):
        parts = [all_writes.output_changes_by_sae(saes[name][head], factors[head], "added") for head in HEADS]
        cases[name, condition] = torch.stack([part[condition] for part in parts], 2)
    for (name, condition), change in cases.items():
        change = torch.zeros(3, 90, 2, host.d_v).double() + change
        final, _ = host.branch(run, LAYER, HEADS, torch.arange(3), torch.zeros(3, dtype=torch.long), change)
        logits = host.unembed(final).double().log_softmax(-1)
        wanted = -logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean((1, 2))
        ours = table[(table.sae == name) & (table.condition == condition)].sort_values("window")
        assert_close(torch.tensor(ours.loss.to_numpy()), wanted, f"{name} {condition}", 1e-5)
        moved = abs(ours.loss - ours.loss_native).max()
        assert moved < 1e-5 if condition == "native" else moved > 1e-3


def test_the_write_is_that_of_the_saes(gated_deltanet, tokens):
    host, windows = gated_deltanet, Windows(tokens, torch.tensor([4, 4, 9]))
    added, effective = sae_of(host, "write"), sae_of(host, "write")
    effective.config = effective.config.model_copy(update=dict(write="effective"))
    history = host.factors(host.run(tokens), LAYER, HEAD).history("write")
    means = {HEAD: MeanWrites.of(history, tokens, tokens[:1])}

    def losses(sae, **options):
        table = replace_all_writes(host, windows, {"a": {HEAD: sae}}, means, layer=LAYER, **options)
        return table[table.condition == "atom"].loss.tolist()

    assert losses(effective) == losses(effective, write="effective") != losses(added) == losses(added, write="added")
    with pytest.raises(ValueError, match="different definitions of the write"):
        replace_all_writes(host, windows, {"a": {HEAD: added}, "b": {HEAD: effective}}, means, layer=LAYER)
