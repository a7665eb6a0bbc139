"""The replacement of a write, a state and a reconstruction, against step loops whose state is overwritten."""

import numpy as np
import pytest
import torch
from helpers import assert_close

from writesae.edit import kl
from writesae.evaluate.firings import Places, all_firings, draw_in_rounds, encode_cell
from writesae.evaluate.objects import CONDITIONS, edited_head, replace_objects, state_edits
from writesae.evaluate.replacement import STEPS, replace, replacements
from writesae.recurrence import step_states
from writesae.sae.train import TrainingSettings, train

CELL, SEED = (1, 2), 3


@pytest.fixture(scope="module")
def factors(host, run):
    return host.factors(run, *CELL)


def encoded(factors, target, centre="mean"):
    """A small SAE of the cell in fp64, applied to its factors, and six of its firings."""
    data = factors.map(lambda x: x.float()).history(target)
    settings = dict(n_atoms=24, k=4, tokens=90 * 30, batch_windows=3, lr=3e-3, final_lr=3e-4, seed=1)
    sae, _ = train(data, TrainingSettings(**settings, centre=centre), progress=False)
    sae = sae.double()
    sae.normalise()  # atoms of unit norm in fp64 too
    cell_sae = encode_cell(CELL, target, "added", sae, factors)
    drawn = draw_in_rounds(all_firings(cell_sae, torch.tensor([0, 1, 2]), 8, 80), 6, seed=5)
    return cell_sae, drawn, Places.of(drawn)


def new_matrices(cell_sae, row, random):
    """The matrix that each object becomes at a firing, in the order of CONDITIONS; random: a unit matrix."""
    sae = cell_sae.sae
    weight, mean = sae.decoder.weight().detach(), sae.mean
    indices, amounts = (x[row.window, row.position] for x in (cell_sae.indices, cell_sae.coefficients))
    whole = mean + torch.einsum("i,ikv->kv", amounts, weight[indices])
    atom, other = row.coefficient * weight[row.atom], row.coefficient * random
    return {
        ("write", False): [atom, 0 * atom, other],
        ("state", False): [atom, 0 * atom, other],
        ("state", True): [mean + atom, mean, mean + other],
        ("reconstruction", True): [whole, whole - atom, whole - atom + other],
    }


def overwritten(factors, window, position, new, write_only):
    """The head's outputs at `position` and after it when a step loop goes on from another state there."""
    one = factors.at(slice(window, window + 1))
    states, outputs = step_states(one), []
    written = one.key[:, position, :, None] * one.added[:, position, None]
    state = states[:, position] - written + new if write_only else new[None]
    for t in range(position, position + STEPS):
        if t > position:
            state = step_states(one.at(slice(None), slice(t, t + 1)), state)[:, 0]
        outputs.append(((state - states[:, t]).mT @ one.query[:, t, :, None])[..., 0])
    return torch.stack(outputs, 1)


def test_every_object_is_overwritten_as_in_a_step_loop(host, run, factors):
    cell_sae, drawn, places = encoded(factors, "state")
    table = replace_objects(host, run, cell_sae, drawn, places, SEED, batch_rows=48)
    edits, _ = state_edits(cell_sae, places, factors, SEED)
    left, right = replacements(cell_sae, places, factors, SEED)["random"]
    assert len(table) == 4 * len(drawn)
    for number, row in enumerate(drawn.itertuples()):
        window, position = torch.tensor([row.window]), torch.tensor([row.position])
        native = host.logits(run.final[window, position + 1])
        for (name, kept), matrices in new_matrices(cell_sae, row, left[number].T @ right[number]).items():
            ours = edited_head(factors, places, edits[name, kept])[number]
            where = (table.window == row.window) & (table.position == row.position)
            kls = table[where & (table.object == name) & (table.offset_kept == kept)].iloc[0]
            for index, condition in enumerate(CONDITIONS):
                change = overwritten(factors, row.window, row.position, matrices[index], name == "write")
                assert_close(ours[index], change[0], f"{name}, {condition}", 1e-8)
                final, _ = host.branch(run, *CELL, window, position, change)
                wanted = kl(native, host.logits(final[:, -1])).item()
                assert kls[f"kl_{condition}"] == pytest.approx(wanted, rel=1e-3, abs=1e-10), (name, condition)


def test_a_state_that_replaces_itself_changes_nothing(host, run, factors):
    cell_sae, _, places = encoded(factors, "state")
    rows, position = places.row, places.position
    states = step_states(factors)[rows, position]
    edits = states - factors.history("state").matrices(rows, position)
    for amount, changes in ((0.0, False), (-0.5, True)):
        head = edited_head(factors, places, (edits + amount * states)[:, None])[:, 0]
        final, _ = host.branch(run, *CELL, rows, position, head)
        divergence = kl(host.logits(run.final[rows, position + 1]), host.logits(final[:, -1]))
        assert (divergence > 1e-9).any() if changes else (divergence < 1e-12).all()


@pytest.mark.parametrize("target", ["state", "write"])
def test_the_object_write_is_the_replacement_test(host, run, factors, target):
    cell_sae, drawn, places = encoded(factors, target)
    ours = replace_objects(host, run, cell_sae, drawn, places, SEED, batch_rows=12)
    if target == "write":
        assert set(ours.object) == {"write"}
    ours = ours[ours.object == "write"].reset_index(drop=True)
    theirs = replace(host, run, cell_sae, drawn, places, SEED, CONDITIONS, ("write",))
    theirs = theirs[theirs.amplitude == "coefficient"].reset_index(drop=True)
    for name in ("window", "position", "atom", "coefficient", "cosine", "kl_atom", "kl_delete", "kl_random"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-10, err_msg=name)


def test_an_sae_without_a_mean_has_no_offset_to_keep(host, run, factors):
    table = replace_objects(host, run, *encoded(factors, "state", centre="none"), SEED)
    kept = {(name, bool(value)) for name, value in zip(table.object, table.offset_kept, strict=True)}
    assert kept == {("write", False), ("state", False), ("reconstruction", True)}
    assert set(table.centre) == {"none"}
