"""The cache edits against slow loops: runs over longer texts, changed states and one edit at a time."""

import copy
from dataclasses import make_dataclass
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_close

from replication.pages.cache_edits import erase, newlines, readers, registers, shown, single_write, stages
from replication.pages.cache_edits.site import Site
from replication.scorecard.claims import papers_value
from replication.statistics import r2
from replication.study.firings import passage_prompts
from replication.study.paths import ROOT
from replication.study.profile import HostSection, Install
from replication.study.stages import read_table, rows_with
from replication.study.study import Study
from writesae.edit import Edit, edited_hidden, head_change, make_edit
from writesae.evaluate.firings import all_firings
from writesae.harvesting import harvest
from writesae.hosts.past import Record
from writesae.recurrence import step_states
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.sae.sparsity import Active
from writesae.text import Windows

LAYER, HEAD = 1, 2
N, K = 24, 12


def small_sae(host, seed=0):
    """An untrained SAE in the hosts' precision; these tests need no trained atoms."""
    torch.manual_seed(seed)
    return SAE(Architecture(n_atoms=N, k=K), host.d_k, host.d_v).requires_grad_(False).double()


def site_of(host, tokens):
    return Site(host, host.run(tokens), LAYER, HEAD, "added")


@pytest.fixture(scope="module")
def site(host, run):
    return Site(host, run, LAYER, HEAD, "added")


@pytest.fixture(scope="module")
def lone(gated_deltanet, tokens):
    """The site of one family, for tests that do not depend on the family."""
    return site_of(gated_deltanet, tokens)


def in_double(site):
    """The same site with logits in fp64; `Host.logits` gives fp32."""
    host = copy.copy(site.host)
    host.logits = host.unembed
    return Site(host, site.run, LAYER, HEAD, "added")


def some_firings():
    """Firings in two of the three windows, including the first and the last position."""
    places = [(0, 8, 3), (0, 20, 5), (0, 21, 3), (2, 30, 7), (2, 89, 5)]
    frame = pd.DataFrame(places, columns=["window", "position", "atom"])
    return frame.assign(passage=frame.window + 10, coefficient=[0.5, 1.0, 1.5, 2.0, 2.5])


# Erase


def test_preferred_tokens_fall_most_when_single_writes_are_deleted(lone):
    firings, atoms = some_firings().query("position < 80"), np.array([3, 5, 7])
    total = erase.token_drops(lone, firings, atoms)
    assert total.shape == (3, 300)
    wanted = torch.zeros_like(total)
    for row in firings.itertuples():
        w, t = torch.tensor([row.window]), torch.tensor([row.position])
        edit = make_edit(w, t, lone.factors.key[w, t][:, None], -lone.factors.added[w, t][:, None])
        final = edited_hidden(lone.host, lone.run, LAYER, HEAD, edit, 2)[:, 1]
        before, after = (lone.host.logits(x).log_softmax(-1)[0] for x in (lone.run.final[w, t + 1], final))
        wanted[list(atoms).index(row.atom)] += before - after
    assert_close(total, wanted, "falls", 1e-3)
    assert (total.argmax(1) == wanted.argmax(1)).all()


def test_places_are_firings_and_silent_ones(lone, tokens):
    sae = small_sae(lone.host)
    encoded = sae.encode_history(harvested(lone.host, tokens).history("write").double())
    firings = all_firings(encoded, torch.tensor([4, 5, 6]), 8, 80)
    atoms = firings.atom.value_counts().index[:2].to_numpy()
    drawn = erase.draw_places(firings, encoded, atoms, 5, seed=1)
    assert drawn.groupby(["atom", "where"]).size().to_dict() == {
        (a, w): 5 for a in atoms for w in ("elsewhere", "firing")
    }
    for row in drawn.itertuples():
        here = encoded.indices[row.window, row.position], encoded.coefficients[row.window, row.position]
        active = (here[1] * (here[0] == row.atom)).sum().item()
        assert active == (pytest.approx(row.coefficient) if row.where == "firing" else 0.0)
        assert row.where == "elsewhere" or active == pytest.approx(here[1].max().item())
    for _, part in drawn.groupby("atom"):
        inside = part[part["where"] == "firing"].coefficient.median()
        assert (part[part["where"] == "elsewhere"].coefficient == inside).all()


def harvested(host, tokens):
    return harvest(host, tokens, [(LAYER, HEAD)], batch=3, progress=False)[LAYER, HEAD]


def test_others_are_alive_and_never_the_atom_itself():
    alive = torch.tensor([2, 5, 6, 9])
    atom = alive[torch.arange(4).repeat(200)]
    drawn = erase.others(alive, atom, seed=0)
    assert (drawn != atom).all()
    for own in alive:
        assert set(drawn[atom == own].tolist()) == set(alive.tolist()) - {own.item()}


def test_erasing_and_adding_are_single_edits(lone):
    """Each row of the table against a separate edited run with the edit built from matrices."""
    sae, drawn = small_sae(lone.host), some_firings().query("position < 80")
    drawn = drawn.assign(where=["firing", "firing", "elsewhere", "elsewhere"])
    preferred = dict(other={3: 11, 5: 12, 7: 13}, same={3: 21, 5: 22, 7: 23})
    alive, doses = torch.tensor([3, 5, 7]), [1.0, 4.0]
    table = erase.erase(lone, sae, drawn, preferred, alive, doses, seed=3)
    assert table.groupby(["where", "condition"]).size().to_dict() == {
        ("elsewhere", "add"): 8,
        ("elsewhere", "random"): 8,
        ("firing", "delete"): 4,
        ("firing", "random"): 4,
        ("firing", "subtract"): 4,
    }
    atoms = sae.decoder.weight()
    for row in table[table.condition != "random"].itertuples():
        w, t = torch.tensor([row.window]), torch.tensor([row.position])
        native = lone.factors.key[w, t][0, :, None] * lone.factors.added[w, t][0]
        delta = dict(delete=-native, subtract=-row.coefficient * atoms[row.atom])
        delta["add"] = row.dose * row.coefficient * atoms[row.atom]
        edit = make_edit(w, t, torch.eye(lone.host.d_k)[None].double(), delta[row.condition][None])
        final = edited_hidden(lone.host, lone.run, LAYER, HEAD, edit, 2)[:, 1]
        before, after = (lone.host.logits(x).log_softmax(-1)[0] for x in (lone.run.final[w, t + 1], final))
        token = preferred[row.token_from][row.atom]
        assert row.token == token
        assert row.log_p == pytest.approx(before[token].item(), abs=1e-5)
        assert row.change == pytest.approx((after - before)[token].item(), rel=1e-3, abs=3e-6)
        assert row.edited_rank == 1 + (after > after[token]).sum().item()
    moved = table.query("condition == 'random' and dose == 1").change
    assert (moved.abs() > 1e-5).any() and not moved.isin(table[table.condition != "random"].change).any()


def test_erase_summary_has_every_atom_and_all_of_them():
    generator = np.random.default_rng(0)
    table = pd.DataFrame(dict(atom=[1] * 60 + [2] * 60, passage=np.tile(np.arange(20), 6), log_p=-5.0))
    table["change"] = generator.normal(np.where(table.atom == 1, -0.5, -0.1), 0.01)
    table = table.assign(host="h", target="state", where="firing", condition="delete", dose=1.0, token_from="other")
    summary = erase.summarise_erase(table.assign(native_rank=10, edited_rank=20)).set_index("atom")
    assert summary.loc["1", "median_change"] == pytest.approx(-0.5, abs=0.01)
    assert summary.loc["all", "falls"] == 1 and summary.loc["all", "n"] == 120
    assert summary.loc["1", "ci_high"] < -0.45
    assert (
        summary.loc["all", "ci_low"] < -0.45 and summary.loc["all", "ci_high"] > -0.15
    )  # the bootstrap may draw either atom twice
    table["change"] = np.where(table.passage < 10, -1.0, 1.0)  # passages decide, and there are twenty
    part = erase.summarise_erase(table.assign(native_rank=10, edited_rank=20)).set_index("atom").loc["all"]
    assert part.falls_low < 0.32 and part.falls_high > 0.68 and part.falls == 0.5


# Single writes


def single_table(site, magnitude, horizon=2):
    rows, t0 = torch.tensor([0, 1, 1, 2]), torch.tensor([10, 30, 60, 80])
    return single_write.single_writes(
        site, rows, t0, torch.tensor([[7, 100], [8, 101], [9, 102], [250, 3]]), magnitude, horizon
    )


def test_a_small_write_does_what_the_exact_form_says(site):
    """At this size the host is almost linear: sign and size of the shifts agree with the exact form.

    The direction gamma raises every target.
    """
    table = single_table(in_double(site), 0.005)
    clear = table[table.measured.abs() > 1e-6]
    assert len(clear) >= 10
    assert (np.sign(clear.measured) == np.sign(clear.exact)).all()
    assert r2(table.measured, table.exact) > 0.999
    assert (table[table.direction == "gamma"].measured > 0).all()
    each = table.pivot(index=["place", "token"], columns="direction", values="exact")
    assert (each.gamma >= each.paper.abs() * (1 - 1e-6)).all()
    assert r2(table.measured, table.paper) < 0.5


def test_single_writes_are_edits_and_the_papers_formula(site):
    table, f, host = single_table(site, 1.5), site.factors, site.host
    for row in table[table.direction == "paper"].itertuples():
        w, t = torch.tensor([[0, 1, 1, 2][row.place]]), torch.tensor([row.position])
        pull = host.output_projection(LAYER, HEAD).T.double() @ host.unembedding()[row.token].double()
        key, value = f.key[w, t][0] / f.key[w, t].norm(), pull / pull.norm()
        size = 1.5 * (f.key[w, t].norm() * f.added[w, t].norm()).item()
        edit = make_edit(w, t, key[None, None], size * value[None, None], "cache")
        final = edited_hidden(host, site.run, LAYER, HEAD, edit, 3)[:, 2]
        shift = (host.logits(final) - host.logits(site.run.final[w, t + 2]))[0, row.token].item()
        assert row.measured == pytest.approx(shift, rel=1e-3, abs=3e-6)
        decay = f.log_decay[w, t + 1].exp() * f.log_decay[w, t + 2].exp()
        read = (decay[0] * key * f.query[w, t + 2][0]).sum()
        assert row.paper == pytest.approx((size * read * pull.norm()).item(), rel=1e-4)


def test_single_summary_by_hand():
    measured = np.array([1.0, -1.0, 2.0, 3.0, -2.0, 1.0])
    table = pd.DataFrame(dict(measured=measured, paper=[1, 2, 3, 4, 5, 6], transport=measured / 2, exact=measured))
    table = table.assign(host="h", direction="paper", passage=[0, 1, 2, 3, 4, 5])
    summary = single_write.summarise_single(table).set_index("predictor")
    assert summary.sign_agreement.to_dict() == {"paper": pytest.approx(4 / 6), "transport": 1.0, "exact": 1.0}
    assert summary.loc["transport", "median_ratio"] == 2.0
    assert summary.loc["transport", "pearson"] == pytest.approx(1.0)
    assert summary.loc["exact", "r2_pooled"] == 1.0 and summary.loc["transport", "r2_pooled"] < 1.0
    assert summary.loc["paper", "ci_low"] < 0.5 < summary.loc["paper", "ci_high"]
    many = pd.concat([table.assign(measured=np.where(table.passage < 3, 1.0, -1.0))] * 50)
    rose = single_write.summarise_single(many).iloc[0]
    assert rose.rose == 0.5 and rose.rose_low < 0.2 and rose.rose_high > 0.8  # six passages, three hundred writes


# Newlines


def saes_and_atoms(host):
    """One SAE and one table of `choose_boundary` per mode."""
    chosen = dict(
        role=["boundary"] * 3 + ["random"] * 3, atom=[1, 4, 9, 2, 7, 11], at_ends=[0.5, 1.0, 2.0, 0.1, 0.2, 0.3]
    )
    saes = dict(offset=small_sae(host, 1), scale=small_sae(host, 2))
    return saes, {mode: pd.DataFrame(chosen) for mode in saes}


def saes_and_atoms_by_head(host):
    """SAEs of two of the four heads, and one table of `choose_boundary` with a column head."""
    atoms = [
        pd.DataFrame(dict(role=["boundary"] * 2 + ["random"] * 2, atom=atom, at_ends=at_ends, head=head))
        for head, atom, at_ends in ((0, [3, 8, 5, 1], [2.0, 0.5, 0.1, 0.2]), (HEAD, [1, 4, 2, 7], [0.5, 1.0, 0.3, 0.4]))
    ]
    return {0: small_sae(host, 3), HEAD: small_sae(host, 1)}, pd.concat(atoms, ignore_index=True)


def native_continuations(host, run, count):
    rows, length = torch.arange(len(run.tokens)), run.tokens.shape[1]
    pasts = [host.past_at(record, rows, torch.full_like(rows, length)) for record in run.records]
    return host.decode(pasts, host.logits(run.final[:, -1]).argmax(-1), length, count - 1)


def test_nothing_amplified_is_greedy_decoding(host, tokens):
    wanted = [("baseline", "baseline", 0.0), ("offset", "boundary", 0.0), ("scale", "boundary", 1.0)]
    prompt = site_of(host, tokens[:, :50])
    plan, native = newlines.amplifier(*saes_and_atoms(host), wanted, 3), native_continuations(host, prompt.run, 8)
    made, amounts, _ = newlines.generate_amplified(prompt, plan, 8)
    assert torch.equal(made, native.repeat(3, 1))
    assert not amounts.any()
    plan = newlines.kept_offsets(*saes_and_atoms_by_head(host), [("kept", "boundary", 0.0)], 3, host.heads)
    made, amounts, _ = newlines.generate_amplified(prompt, plan, 8)
    assert torch.equal(made, native)
    assert not amounts.any()


def overheard(monkeypatch, prompt, plan, count):
    """Greedy continuations [R, count], the logits [R, count, V] that chose them, written amounts and states."""
    heard, choose = [], newlines.choose
    monkeypatch.setattr(newlines, "choose", lambda logits, *more: choose(heard.append(logits) or logits, *more))
    made, amounts, states = newlines.generate_amplified(prompt, plan, count)
    return made, torch.stack(heard, 1), amounts, states


@pytest.mark.parametrize("condition", [("scale", "boundary", 60.0), ("scale", "random", 60.0)])
def test_scaled_writes_are_an_edit_of_a_longer_text(host, tokens, condition, monkeypatch):
    """The generation against one edited run over prompt and continuation, with one term per extra write."""
    saes, atoms = saes_and_atoms(host)
    plan, prompt = newlines.amplifier(saes, atoms, [condition], 3), site_of(host, tokens[:, :50])
    made, logits, amounts, _ = overheard(monkeypatch, prompt, plan, 8)
    longer = site_of(host, torch.cat([prompt.run.tokens, made], 1))
    positions = (50 + torch.arange(7)).repeat_interleave(3).expand(3, -1)
    left, right = plan.key.repeat(1, 7, 1), plan.value.repeat(1, 7, 1) * amounts.flatten(1)[..., None]
    edit = Edit(torch.arange(3), positions, left, right, torch.ones(3, dtype=torch.bool))
    native = host.logits(longer.run.final[:, 50:57])
    wanted = host.logits(longer.edited(edit, 8))[:, :7]
    assert_close(logits[:, 1:] - native, wanted - native, "change of the logits", 1e-3)
    assert (logits[:, 1:] - native).norm() > 0.1
    assert torch.equal(made, logits.argmax(-1))
    key, added = (getattr(longer.factors, name)[:, 50:57] for name in ("key", "added"))
    found = saes["scale"].encode(key[..., :, None] * added[..., None, :])
    own = [(found.coefficients * (found.indices == atom)).sum(-1) for atom in (1, 4, 9)]
    assert_close(amounts, 59.0 * torch.stack(own, -1), "amounts", 1e-10)


@pytest.mark.parametrize(("role", "picked"), [("boundary", [1, 4, 9]), ("random", [2, 7, 11])])
def test_held_offsets_change_what_is_read_and_not_the_state(host, tokens, role, picked, monkeypatch):
    saes, atoms = saes_and_atoms(host)
    plan, prompt = newlines.amplifier(saes, atoms, [("offset", role, 30.0)], 3), site_of(host, tokens[:, :50])
    made, logits, *_ = overheard(monkeypatch, prompt, plan, 8)
    longer = site_of(host, torch.cat([prompt.run.tokens, made], 1))
    weights = saes["offset"].decoder.weight()[picked]
    held = 30.0 * torch.einsum("a,aij->ij", torch.tensor([0.5, 1.0, 2.0]).double(), weights)
    change = longer.factors.query[:, 50:] @ held
    final, _ = host.branch(longer.run, LAYER, HEAD, torch.arange(3), torch.full((3,), 50), change)
    native = host.logits(longer.run.final[:, 50:57])
    assert_close(logits[:, 1:] - native, host.logits(final)[:, :7] - native, "change of the logits", 1e-3)
    assert (logits[:, 1:] - native).norm() > 0.1
    assert torch.equal(made, logits.argmax(-1))


def edited_by_hand(factors, extra, first):
    """Outputs [B, T, d_v] and last states of a head by a loop that adds `extra` to the state after each token >= first."""
    state, outputs = torch.zeros_like(extra), []
    for t in range(factors.key.shape[1]):
        now = factors.at(slice(None), t)
        moved = now.log_decay.exp()[..., None] * state
        if now.erase is not None:
            moved = moved - now.erase[..., None] * torch.einsum("bk,bkv->bv", now.probe, state)[:, None]
        state = moved + now.key[..., None] * now.added[:, None]
        outputs.append(torch.einsum("bk,bkv->bv", now.query, state))
        if t >= first:
            state = state + extra
    return torch.stack(outputs, 1), state


def test_kept_offsets_are_states_that_are_edited_by_hand_after_each_token(host, tokens, monkeypatch):
    """Against a loop over the states of every head of the layer, and a run of all later layers; fp64 throughout."""
    saes, atoms = saes_and_atoms_by_head(host)
    conditions, prompt = [("kept", "boundary", 3.0), ("kept", "random", 7.0)], site_of(host, tokens[:, :50])
    plan = newlines.kept_offsets(saes, atoms, conditions, 3, host.heads)
    made, logits, norms, states = overheard(monkeypatch, in_double(prompt), plan, 9)
    assert torch.equal(made, logits.argmax(-1))
    longer = site_of(host, torch.cat([prompt.run.tokens.repeat(2, 1), made[:, :8]], 1))
    record = longer.run.records[LAYER]
    outputs, sums = record.outputs.clone(), {}
    for head, wanted in ((0, ({3: 6.0, 8: 1.5}, {5: 14.0, 1: 3.5})), (HEAD, ({1: 1.5, 4: 3.0}, {2: 3.5, 7: 7.0}))):
        key, value = saes[head].atoms()
        sums[head] = [sum(c * torch.outer(key[i], value[i]) for i, c in amounts.items()) for amounts in wanted]
    for head in range(host.heads):
        factors = host.factors(longer.run, LAYER, head)
        extra = torch.stack(sums.get(head, [factors.key.new_zeros(host.d_k, host.d_v)] * 2)).repeat_interleave(3, 0)
        native, _ = edited_by_hand(factors, 0 * extra, 50)
        edited, end = edited_by_hand(factors, extra, 50)
        assert_close(states[:, head], end, f"states of head {head}", 1e-9)
        assert_close(norms[:, :, head], extra.norm(dim=(1, 2))[:, None].expand(-1, 8), "norms", 1e-9)
        assert torch.equal(native[:, :51], edited[:, :51])  # the first new token reads no edit
        outputs[:, :, head] += edited - native
    hidden = host.finish(LAYER, Record(record.hidden, outputs, beside=record.beside), None)
    for layer in range(LAYER + 1, host.layers):
        now = host.mix(layer, hidden, None, torch.arange(58).expand(6, -1))
        hidden = host.finish(layer, now, None)
    wanted, unedited = (host.unembed(final)[:, 50:] for final in (hidden, longer.run.final))
    assert_close(logits[:, 1:] - unedited, wanted - unedited, "change of the logits", 1e-8)
    assert (logits[:, 2:] - unedited[:, 1:]).norm() > 0.1


def test_conditions_share_their_noise_and_prompts_do_not(lone, tokens):
    # the first two prompts are the same text
    prompt = site_of(lone.host, tokens[:, :50].roll(1, 0)[[0, 0, 1]])
    wanted = [("baseline", "baseline", 0.0), ("scale", "boundary", 1.0)]
    plan = newlines.amplifier(*saes_and_atoms(lone.host), wanted, 3)
    made = newlines.generate_amplified(prompt, plan, 12, temperature=3.0, seed=5).tokens
    assert torch.equal(made[:3], made[3:])
    assert not torch.equal(made[0], made[1])
    again, other = (newlines.generate_amplified(prompt, plan, 12, temperature=3.0, seed=s).tokens for s in (5, 6))
    assert torch.equal(made, again) and not torch.equal(made, other)


def test_drawn_tokens_follow_the_softmax():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, -1), torch.Generator().manual_seed(0)
    drawn = newlines.choose(logits, torch.arange(40_000), 0.7, generator)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert_close(shares, (logits[0] / 0.7).softmax(-1), "shares", 0.02)
    assert (newlines.choose(logits, torch.arange(40_000), 0.0, generator) == 0).all()


def test_atoms_of_line_ends_have_the_largest_difference():
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(10)[:4] for _ in range(60)]).view(3, 20, 4)
    coefficients, ends = torch.rand(3, 20, 4), torch.rand(3, 20) < 0.3
    coefficients[ends] += 3.0 * (indices[ends] == 6)
    means = newlines.boundary_means(Active(indices, coefficients), ends, 12)
    for atom in range(12):
        amount = (coefficients * (indices == atom)).sum(-1)
        assert means[0, atom] == pytest.approx(amount[ends].mean().item(), abs=1e-6)
        assert means[1, atom] == pytest.approx(amount[~ends].mean().item(), abs=1e-6)
    chosen = newlines.choose_boundary(means, 3, seed=0)
    boundary, random = (chosen[chosen.role == name] for name in ("boundary", "random"))
    assert boundary.atom.iloc[0] == 6 and len(boundary) == len(random) == 3
    assert not set(boundary.atom) & set(random.atom)
    assert set(random.atom) <= set(range(10))  # atoms 10 and 11 never fire
    assert np.allclose(random.at_ends, means[0][torch.tensor(random.atom.to_list())])


def test_conditions_are_the_papers():
    assert newlines.conditions(["offset"], [2, 5, 10]) == [
        ("baseline", "baseline", 0.0),
        ("offset", "boundary", 2),
        ("offset", "boundary", 5),
        ("offset", "boundary", 10),
        ("offset", "random", 10),
    ]


def test_each_dose_has_a_random_control_where_the_state_is_read():
    lists = newlines.generations(["offset", "scale", "kept"], [2, 5, 10])
    assert lists["single"] == newlines.conditions(["offset", "scale"], [2, 5, 10])
    every = [condition for wanted in lists.values() for condition in wanted]
    assert len(every) == len(set(every)) == 9 + 2 + 6
    for mode in ("offset", "kept"):
        assert {(role, dose) for m, role, dose in every if m == mode} == set(
            product(["boundary", "random"], [2, 5, 10])
        )
    assert "controls" not in newlines.generations(["offset", "kept"], [5])
    assert newlines.generations(["scale"], [2, 5]) == dict(single=newlines.conditions(["scale"], [2, 5]))


def test_surface_measures():
    assert newlines.surface("ab\n\ncdef\n  \n x") == dict(paragraphs=2, word_length=pytest.approx(7 / 3))
    assert newlines.surface("\n\n") == dict(paragraphs=1, word_length=0.0)


def test_newline_summary_is_paired_by_prompt():
    def lines(mode, role, dose, newlines):
        return pd.DataFrame(dict(host="h", mode=mode, role=role, dose=dose, prompt=[2, 0, 1], newlines=newlines))

    table = pd.concat(
        [
            lines("baseline", "baseline", 0.0, [12.0, 8.0, 10.0]),
            lines("scale", "boundary", 5.0, [9.0, 6.0, 9.0]),
            lines("kept", "random", 5.0, [11.0, 8.0, 8.0]),
            lines("kept", "random", 2.0, [0.0, 0.0, 0.0]),
            lines("kept", "boundary", 5.0, [10.0, 8.5, 7.0]).sample(frac=1.0, random_state=0),
        ]
    )
    means = dict(heads=2, state_norm=1.5, paragraphs=1, word_length=5.0, distinct=0.5)
    summary = newlines.summarise_newlines(table.assign(**means))
    kept = summary.query("mode == 'kept' and role == 'boundary'").iloc[0]
    assert (kept.change, kept.beyond_random, kept.heads, kept.state_norm) == pytest.approx((-1.5, -0.5, 2, 1.5))
    assert (kept.beyond_random_low, kept.beyond_random_high) == pytest.approx((-1.0, 0.5))
    assert summary.beyond_random.notna().sum() == 1
    wide = newlines.side_by_side(summary, "change")
    assert list(wide) == ["scale", "kept"] and len(wide) == 3
    assert wide.loc[("h", 3, "boundary", 5.0), "kept"] == "-1.5 [-3.0, 0.5]"
    assert wide.loc[("h", 3, "random", 2.0), "scale"] == ""
    summary = summary.drop_duplicates("mode").set_index("mode")
    assert summary.loc["baseline", ["newlines", "change", "cohens_d"]].tolist() == [10.0, 0.0, 0.0]
    assert summary.loc["scale", "change"] == pytest.approx(-2.0)
    assert summary.loc["scale", "cohens_d"] == pytest.approx(-2.0)
    assert summary.loc["scale", "change_low"] >= -3 and summary.loc["scale", "change_high"] <= -1


# Readers


def test_later_heads_are_those_of_a_whole_run(site):
    """Against a run of all later layers with the cell's output changed in one window."""
    host, run, steps = site.host, site.run, 9
    torch.manual_seed(0)
    change = torch.randn(1, steps, host.d_v).double()
    heard = readers.later_heads(site, torch.tensor([1]), torch.tensor([40]), change)
    record = run.records[LAYER]
    outputs = record.outputs.clone()
    outputs[1, 40:49, HEAD] += change[0]
    hidden = host.finish(LAYER, Record(record.hidden, outputs, beside=record.beside), None)
    assert sorted(heard) == list(range(LAYER + 1, host.layers))
    for layer in range(LAYER + 1, host.layers):
        now = host.mix(layer, hidden, None, torch.arange(90).expand(3, -1))
        assert_close(heard[layer][0], now.outputs[1, 40:49], f"heads of layer {layer}", 1e-10)
        hidden = host.finish(layer, now, None)
    assert host.mix.__name__ == "mix" and "mix" not in vars(host)  # the host itself is unchanged


def test_signal_and_baseline_are_single_edits(lone):
    host, firings, atom = lone.host, some_firings().query("window == 0"), [x[3] for x in small_sae(lone.host).atoms()]
    table = readers.readers(lone, atom, firings, steps=4, draws=2, seed=9)
    assert len(table) == 3 * 4 * (host.layers - LAYER - 1)
    at = firings.iloc[1]
    w, t = torch.tensor([int(at.window)]), torch.tensor([int(at.position)])
    norm = (lone.factors.key[w, t].norm() * lone.factors.added[w, t].norm()).item()
    edit = make_edit(w, t, atom[0][None, None], norm * atom[1][None, None])
    heard = readers.later_heads(lone, w, t, head_change(lone.factors, edit, 4)[0])
    for layer, outputs in heard.items():
        moved = outputs[0] - lone.run.records[layer].outputs[w, t[:, None] + torch.arange(4)][0]
        mine = table[(table.position == at.position) & (table.reader_layer == layer)].sort_values("reader_head")
        assert_close(torch.tensor(mine.signal.to_numpy()), moved.norm(dim=(0, 2)), "signal", 1e-8)
    many = [readers.readers(lone, atom, firings, steps=4, draws=n, seed=9) for n in (1, 200)]
    # the signal does not depend on the draws
    np.testing.assert_allclose(many[0].signal, many[1].signal, rtol=1e-8)
    # the baseline has a similar size for any number of draws
    assert 0.2 < (many[1].baseline / table.baseline).median() < 5


def test_the_top_reader_is_chosen_on_one_half_and_measured_on_the_other():
    contexts, rows = 12, []
    for context in range(contexts):
        for head in range(3):
            signal = 4.0 if head == 1 or (head == 0 and context % 2 == 0) else 2.0
            # head 0 has the largest signal in the first half only
            signal += 1.0 * (head == 0 and context % 2 == 0)
            rows.append(
                dict(window=context, position=7, passage=context, reader_layer=5, reader_head=head, signal=signal)
            )
    table = pd.DataFrame(rows).assign(baseline=2.0, host="h", atom=3, **{"class": "register"})
    top = readers.top_readers(table).iloc[0]
    assert (top.reader_head, top.n) == (0, contexts // 2)
    assert top.ratio == pytest.approx(1.0)
    alone = readers.top_readers(table[table.passage == 0])  # one passage leaves no second half
    assert alone.empty and list(alone) == list(readers.top_readers(table))
    summary = readers.summarise_readers(table).set_index("reader_head")
    assert summary.ratio.to_dict() == pytest.approx({0: 10**0.5 / 2, 1: 2.0, 2: 1.0}, rel=0.3)
    assert (
        summary.loc[1, "ratio"] == pytest.approx(2.0)
        and summary.loc[2, "enrichment"] < 1 < summary.loc[1, "enrichment"]
    )


# Registers


def stepped_output(factors, row, put_in):
    """Outputs [T, d_v] of one window by a loop. `put_in` {position: [d_k, d_v]} replaces native writes."""
    one, state, outputs = factors.at(slice(row, row + 1)), 0, []
    for t in range(one.key.shape[1]):
        now = one.at(0, t)
        moved = 0 * now.key[:, None] * now.added
        if t:
            moved = now.log_decay.exp()[:, None] * state
            if now.erase is not None:
                moved = moved - now.erase[:, None] * (now.probe @ state)
        state = moved + put_in.get(t, now.key[:, None] * now.added)
        outputs.append(now.query @ state)
    return torch.stack(outputs)


def test_all_registers_at_once_are_a_loop_over_states_really_changed(site):
    """For each condition, the edit gives the new writes, and a loop over the states gives the outputs."""
    site = in_double(site)
    host, sae, firings, first = site.host, small_sae(site.host), some_firings(), 8
    table = registers.erase_registers(site, firings, sae, first, seed=2).set_index(["window", "condition"])
    edits = registers.erasure_edits(site, firings, sae, first, seed=2)
    assert list(edits) == list(registers.ERASURES)
    native = (step_states(site.factors).mT @ site.factors.query[..., None])[..., 0]
    for name, edit in edits.items():
        for i, row in enumerate((0, 2)):
            put_in = {}
            for t in firings[firings.window == row].position:
                added = site.factors.key[row, t][:, None] * site.factors.added[row, t]
                terms = edit.positions[i] == t
                put_in[t] = added + edit.left[i][terms].T @ edit.right[i][terms]
                atom = sae.decoder.weight()[firings[(firings.window == row) & (firings.position == t)].atom.item()]
                if name == "delete":
                    assert put_in[t].norm() < 1e-12
                elif name == "atom":
                    assert_close(put_in[t], added.norm() * atom, "the atom in the native norm", 1e-6)
                elif name == "random":
                    assert put_in[t].norm().item() == pytest.approx(added.norm().item(), rel=1e-6)
                    assert torch.linalg.matrix_rank(put_in[t], rtol=1e-6) == 1
                else:
                    assert (put_in[t] - added).norm().item() == pytest.approx(added.norm().item(), rel=1e-6)
            change = (stepped_output(site.factors, row, put_in) - native[row])[None, first:]
            assert_close(head_change(site.factors, edit, 82)[0][i], change[0], f"head under {name}", 1e-9)
            final, _ = host.branch(site.run, LAYER, HEAD, torch.tensor([row]), torch.tensor([first]), change)
            bits = [
                -host.logits(x[0, :-1]).log_softmax(-1).gather(-1, site.run.tokens[row, first + 1 :, None]).mean()
                / np.log(2)
                for x in (final, site.run.final[row : row + 1, first:])
            ]
            line = table.loc[(row, name)]
            assert line.rise == pytest.approx((bits[0] - bits[1]).item(), rel=1e-5, abs=1e-9)
            assert line.bits_native == pytest.approx(bits[1].item(), rel=1e-5)
            assert line.erased == (firings.window == row).sum()
    assert (table.rise.abs() > 1e-5).all()


def test_register_summary_counts_passages():
    rise = dict(delete=[1.0, 2.0, 3.0], atom=[0.5, 1.0, 4.0], random=[2.0, 3.0, 4.0], beside=[0.0, 0.0, 0.0])
    tables = [pd.DataFrame(dict(passage=[5, 6, 7], condition=name, rise=values)) for name, values in rise.items()]
    summary = registers.summarise_registers(pd.concat(tables).assign(host="h", target="state", erased=4)).set_index(
        "condition"
    )
    assert summary.above_delete.to_dict() == dict(delete=0, atom=1, random=3, beside=0)
    assert summary.loc["random", ["rise", "excess", "excess_low"]].tolist() == [3.0, 1.0, 1.0]
    assert summary.loc["beside", "excess_high"] < 0


# The stages


def plain(**fields):
    """A settings object that can be fingerprinted."""
    return make_dataclass("Plain", fields)(**fields)


SETTINGS = plain(
    place="middle",
    target="state",
    selection_windows=6,
    windows=8,
    erase=plain(atoms=2, positions=4, doses=[1.0, 4.0]),
    single=plain(prompts=5, positions=2, prompt_tokens=40, horizon=1, magnitude=1.0),
    newlines=plain(atoms=3, doses=[2.0, 5.0], prompts=4, prompt_tokens=30, new_tokens=6, temperature=0.7),
    readers=plain(exemplars=2, fewest_passages=4, contexts=6, steps=4, random_writes=2),
    passages=3,
)
INSTALL = Install(
    place="middle",
    prompts=1,
    prompt_tokens=40,
    distances=[5],
    rank_classes=dict(top=(2, 10), far=(100, 9999)),
    targets_per_class=1,
    magnitudes=[3.0],
    writes=1,
    new_tokens=1,
    doses=[1],
    bisections=0,
)


class Letters:
    def decode(self, ids):
        return "".join("ab\n"[i % 3] + " " * (i % 2) for i in ids)


class TinyStudy(Study):
    """A study with a host, text and SAEs made in this file."""

    def __init__(self, host):
        self.tiny = type(host)(copy.deepcopy(host.model).float(), Letters(), "small")
        data = plain(first_position=8, firing_windows=8, batch_windows=4)
        names = dict(name="tiny", seed=3, hosts=dict(small=HostSection(path="small", cells={})), data=data)
        names |= dict(device="cpu", workers=1)
        profile = plain(**names, saes=plain(targets=["state", "write"], write="added"))
        profile.section = lambda name, host: dict(cache_edits=SETTINGS, install=INSTALL)[name]
        super().__init__(profile)

    def host(self, name):
        return self.tiny

    def host_fingerprint(self, name):
        return dict(of="these tests")

    def windows(self, host, split):
        generator = torch.Generator().manual_seed(len(split))
        return Windows(torch.randint(0, 300, (12, 60), generator=generator), torch.arange(12))

    def cell(self, host, place):
        return LAYER, HEAD

    def survey_layers(self, host):
        return (LAYER,)

    def sae(self, host, layer, head, target, role="main"):
        return small_sae(self.tiny, len(target)).float()

    def table(self, name):
        assert name == "alive_atoms"
        lines = []
        for target, text in stages.make_bench(self, "small").heldout().items():
            firings = text.firings
            counts = (
                firings.groupby("atom").agg(firings=("window", "size"), passages=("passage", "nunique")).reset_index()
            )
            counts["class"] = np.where(counts.atom % 2, "bundle", "register")
            lines.append(counts.assign(host="small", layer=LAYER, head=HEAD, target=target))
        return pd.concat(lines, ignore_index=True)


def test_the_stages_give_their_tables_and_are_not_run_twice(gated_deltanet, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    monkeypatch.setattr("replication.pages.cache_edits.site.RESAMPLES", 20)
    study = TinyStudy(gated_deltanet)
    made = stages.run(study)
    counts = {name: len(table) for name, table in made.items()}
    assert counts == dict(
        cache_preferred=2 * 2,
        cache_erase=2 * 4 * (3 + 2 * 2) * 2,
        single_write=5 * 2 * 2 * 2,
        newline_atoms=(2 + 4) * 2 * 3,  # of the cell in two modes, and of the four heads of its layer
        newlines=4 * (1 + 2 * 3 + 1 + 4),
        readers=16 * len(made["readers"].drop_duplicates(["atom", "window"])),
        register_erase=2 * 3 * 4,
    )
    assert made["readers"].groupby("atom").passage.nunique().min() >= 4
    assert set(made["readers"]["class"]) == {"register"}
    assert not made["cache_erase"].isna().any().any() and not made["newlines"].isna().any().any()
    summaries = stages.tables(study, made)
    assert set(summaries) == {f"{name}_summary" for name in stages.SUMMARIES} | {"top_readers"}
    for name, table in summaries.items():
        assert (tmp_path / "results" / "tiny" / f"{name}.csv").is_file()
        assert {"host"} <= set(table)
    monkeypatch.setattr(stages.Bench, "site", lambda *_: pytest.fail("a stage that was done is run again"))
    again = stages.run(study)
    for name, table in made.items():
        pd.testing.assert_frame_equal(table, again[name])


def test_kept_offsets_are_of_the_cell_alone_where_its_layer_is_not_surveyed(gated_deltanet, monkeypatch):
    study = TinyStudy(gated_deltanet)
    bench = stages.make_bench(study, "small")
    heads = {mode: list(saes) for mode, saes in stages.edited_heads(study, bench).items()}
    assert heads == dict(offset=[HEAD], scale=[HEAD], kept=[HEAD, 0, 1, 3])
    monkeypatch.setattr(TinyStudy, "survey_layers", lambda *_: (LAYER + 1,))
    saes = stages.edited_heads(study, bench)
    assert list(saes["kept"]) == [HEAD] and saes["kept"][HEAD] is saes["offset"][HEAD] is bench.saes["state"]
    del bench.saes["state"]
    assert list(stages.edited_heads(study, bench)) == ["scale"]


def test_a_cell_that_has_no_classes_is_refused(gated_deltanet):
    study = TinyStudy(gated_deltanet)
    bench = stages.make_bench(study, "small")
    bench.cell = (0, 0)
    with pytest.raises(ValueError, match=r"cache_edits\.place must be population\.place"):
        stages.alive(study, bench, "state")
    with pytest.raises(ValueError, match="13 prompts are asked for and the held-out windows are of 12 passages"):
        passage_prompts(study, "small", 13, 20)


def test_the_paper_and_this_host_are_side_by_side():
    kinds = ("cache_erase_summary", "single_write_summary", "newlines_summary", "top_readers", "register_erase_summary")
    every = {name: read_table(ROOT / "results" / "mini" / f"{name}.csv") for name in kinds}
    tables = {name: rows_with(table, host="mamba2") for name, table in every.items()}
    whole = shown.compared(tables, papers_value)
    erased = tables["cache_erase_summary"].query("condition == 'delete' and atom == 'all' and token_from == 'same'")
    cell = whole.loc["1 · log p of its token, write deleted (millinats)"]
    assert cell["the paper"] == "-116.0" and cell.n == erased.n.iloc[0]
    assert float(cell.here.split()[0]) == pytest.approx(1000 * erased.median_change.iloc[0], abs=0.05)
    reader = whole.loc["4 · strongest reader of a register (ratio)", "here"]
    registers = rows_with(tables["top_readers"], **{"class": "register"})
    assert float(reader.split()[0]) == pytest.approx(registers.ratio.max(), abs=0.05)
    done = shown.erased(tables["cache_erase_summary"].query("atom == 'all'")).index.to_frame(index=False)
    assert set(done[done["where"] == "its firings"].done) == {
        "write deleted",
        "atom taken out",
        "another atom taken out",
    }
    assert set(done[done["where"] == "elsewhere"].done) == {"atom added", "another atom added"}
    newlines_at = tables["newlines_summary"].dose
    fewer = shown.compared(tables | dict(newlines_summary=tables["newlines_summary"][newlines_at != 5]), papers_value)
    assert set(whole.index) - set(fewer.index) == {"3 · newlines, one cell, 5x", "3 · newlines, every head, kept, 5x"}
