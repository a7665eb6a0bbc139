"""The two pages to try things on: their numbers against real edited runs and loops, their text, and their controls."""

import copy
import itertools
import re
from dataclasses import make_dataclass

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import SmallProfile, SmallSuite

from replication import html, widgets
from replication.classes import Scan
from replication.study.profile import CellRule, Data, HostSection, Install
from writesae.evaluate import install, promoted
from writesae.sae.config import SAEConfig
from writesae.sae.model import SAE

CELL, N_ATOMS = (1, 2), 24
HOSTILE = "</pre><script>alert(1)</script>"
INSTALL = Install(
    place="middle",
    prompts=1,
    prompt_tokens=8,
    distances=[3],
    rank_classes=dict(top=(2, 10)),
    targets_per_class=1,
    magnitudes=[3.0],
    writes=3,
    new_tokens=5,
    doses=[1.0],
    bisections=1,
)


class Words:
    """Token t is " wt", 1 is a hostile one, 0 the end of text; a word that is no token becomes its letters, tokens 250 and up."""

    eos_token_id = 0

    def decode(self, tokens, **_):
        return "".join({0: "\n", 1: HOSTILE}.get(int(t), f" w{int(t)}") for t in tokens)

    def __call__(self, text, **_):
        pieces = [
            [int(word[1:])] if re.fullmatch(r"w\d+", word) else [250 + len(word)] * len(word) for word in text.split()
        ]
        return dict(input_ids=list(itertools.chain(*pieces)))


def plain(**fields):
    """Settings that a fingerprint can take."""
    return make_dataclass("Plain", fields)(**fields)


@pytest.fixture(scope="module")
def suite(gated_deltanet, tmp_path_factory):
    """One small host in fp32 with a cell and untrained SAEs of both targets."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WRITESAE_OUTPUT", str(tmp_path_factory.mktemp("explore")))
    host = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), Words(), "small")
    data = Data(
        window=50,
        sae_windows=8,
        heldout_windows=8,
        firing_windows=8,
        survey_windows=4,
        first_position=5,
        batch_windows=4,
    )
    profile = SmallProfile(
        name="small",
        seed=42,
        hosts={"small": HostSection(path="small", cells=dict(middle=CellRule(layer=1, sigma_ratio=3)))},
        data=data,
        saes=plain(write="added", targets=["state", "write"]),
        sections=dict(atoms=plain(place="middle"), install=INSTALL),
    )
    made = SmallSuite(profile, host, torch.randint(0, 12, (8, 50), generator=torch.Generator().manual_seed(4)))
    where = dict(host="small", layer=CELL[0], head=CELL[1])
    made.write("cells", pd.DataFrame([where | dict(place="middle", half_life_median=9.5, sigma1_over_sigma2=2.0)]))
    for target in ("state", "write"):
        torch.manual_seed(len(target))
        shape = dict(n_atoms=N_ATOMS, k=3, d_k=host.d_k, d_v=host.d_v)
        config = SAEConfig(**where, target=target, write="added", seed=0, **shape)
        SAE(config, host.d_k, host.d_v).save(made.sae_folder("small", *CELL, target, "main"))
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def alive(suite):
    scan = Scan(suite, "small")
    return pd.concat([scan.alive((*CELL, target, "main", 42)) for target in ("state", "write")], ignore_index=True)


@pytest.fixture(scope="module")
def every_firing(suite):
    scan, where = Scan(suite, "small"), dict(host="small", layer=CELL[0], head=CELL[1])
    found = {target: scan.firings(*CELL, target, "main")[1] for target in ("state", "write")}
    return pd.concat([rows.assign(target=target, **where) for target, rows in found.items()], ignore_index=True)


@pytest.fixture(scope="module")
def pages(suite, alive, every_firing):
    """With the firings of one atom of the state-trained SAE known, as those of the exemplars are."""
    known = every_firing[(every_firing.target == "state") & (every_firing.atom == alive.atom.iloc[1])]
    return widgets.Atoms(suite, alive, known)


@pytest.fixture(scope="module")
def installs(suite):
    return widgets.Installs(suite)


# An atom


def test_every_alive_atom_can_be_chosen_and_the_known_ones_come_first(pages, alive):
    for target in ("state", "write"):
        choices = pages.choices(target)
        own = alive[alive.target == target].set_index("atom")
        assert sorted(atom for _, (_, atom) in choices) == sorted(own.index)
        label, (_, atom) = choices[3]
        kind, cosine = own["class"][atom], own.cosine[atom]
        assert label == f"{atom}: {kind}, cosine {cosine:.2f}, {own.firings[atom]:,} firings"
    assert pages.choices("state")[0][1] == ("state", alive.atom.iloc[1])


def test_firings_are_looked_for_where_they_are_not_known(pages, every_firing, alive):
    assert set(zip(alive.target, alive.atom)) == set(zip(every_firing.target, every_firing.atom))
    for target in ("state", "write"):
        for _, (_, atom) in pages.choices(target)[:3]:
            wanted = every_firing[(every_firing.target == target) & (every_firing.atom == atom)]
            found = pages.firings(target, atom)
            columns = ["window", "position", "coefficient"]
            assert found[columns].to_numpy().tolist() == wanted[columns].to_numpy().tolist()


def test_promoted_tokens_are_those_of_the_mean_over_all_atoms(suite, pages, every_firing):
    target, atom = pages.choices("write")[0][1]
    own = every_firing[(every_firing.target == target) & (every_firing.atom == atom)]
    found = pages.tokens(target, atom, own)
    host, windows = suite.host("small"), suite.windows("small", "heldout")
    largest = own.sort_values("coefficient", ascending=False, kind="stable").drop_duplicates("passage").head(3)
    sae = suite.sae("small", *CELL, target)
    dictionary = promoted.Dictionary(*CELL, target, sae, largest)
    shifts = promoted.mean_shifts(host, windows, [dictionary], "added", 4)[0]
    for kind in promoted.KINDS:
        rows = found[(found.kind == kind) & (found.direction == "promoted")]
        top = shifts[kind][atom].topk(widgets.TOKENS)
        assert rows.token.tolist() == top.indices.tolist()
        assert rows["shift"].to_numpy() == pytest.approx(top.values.numpy(), rel=1e-3)
    assert (found.n == len(largest)).all()


def test_the_page_says_what_the_table_says_and_marks_every_firing(suite, pages, alive):
    target, atom = pages.choices("state")[0][1]
    page, row = pages.page(target, atom), pages.line(target, atom)
    assert f"Atom {atom} (layer 1 head 2 of small, trained on state)" in page
    for value in (row["class"], f"{row.cosine:.3g}", f"{row.rate:.2%}", str(row.firings)):
        assert f"<td>{value}</td>" in page
    contexts = re.findall("<pre>(.*?)</pre>", page)
    assert 1 <= len(contexts) <= widgets.CONTEXTS and all("<mark>" in text for text in contexts)
    assert "<script>" not in page and "<table" in page
    with pytest.raises(ValueError, match="Atom 999 of the SAE trained on state never fires"):
        pages.page("state", 999)


def test_text_is_escaped():
    assert html.marked_html(["a<b\n", [HOSTILE, 0.5, 1]]) == f"a&lt;b⏎<mark>{widgets.html.escape(HOSTILE)}</mark>"
    assert "&lt;script&gt;" in html.table_html(pd.DataFrame([dict(x=HOSTILE)]))


# An install


def test_a_word_is_the_token_that_it_is_in_a_text_and_nothing_else():
    class Two(Words):
        def __call__(self, text, **_):
            return dict(input_ids={" the": [7], "the": [8], "The": [9], " The": [5, 9]}.get(text, [1, 2, 3]))

    assert widgets.one_token(Two(), "the") == 7
    assert widgets.one_token(Two(), " the") == 7
    assert widgets.one_token(Two(), "The") == 9
    with pytest.raises(ValueError, match="must be one token, and 'there' is 3"):
        widgets.one_token(Two(), "there")
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="Type a target word"):
            widgets.one_token(Two(), empty)


PROMPT = "w20 w21 w22 w23 w24 w25 w26"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("", "w7", 3.0), "The prompt has 0 tokens: type one of 3 to 44."),
        ((" ".join(["w9"] * 45), "w7", 3.0), "The prompt has 45 tokens: type one of 3 to 44."),
        ((PROMPT, "abc", 3.0), "The target must be one token, and 'abc' is 3"),
        ((PROMPT, "", 3.0), "Type a target word"),
        ((PROMPT, "w7", 0.0), "The magnitude is 0: give one above 0"),
        ((PROMPT, "w7", float("nan")), "The magnitude is nan: give one above 0"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(installs, arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        installs.run(*arguments)
    assert widgets.answer(installs.page, *arguments).startswith("<p><b>")


def test_the_exact_prediction_is_what_a_small_write_does(installs):
    small, _ = installs.run(PROMPT, "w7", 1e-2)
    assert small.predicted_exact.to_numpy() == pytest.approx(small.measured.to_numpy(), rel=2e-2)
    assert not np.allclose(small.predicted_paper, small.measured, rtol=0.2)
    large, _ = installs.run(PROMPT, "w7", 2e-2)
    for name in ("predicted_exact", "predicted_paper"):
        assert large[name].to_numpy() == pytest.approx(2 * small[name].to_numpy(), rel=1e-4)


def test_the_papers_prediction_is_its_formula_by_a_loop(installs):
    table, _ = installs.run(PROMPT, "w7", 3.0)
    host, cell, settings = installs.host, installs.cell, installs.settings
    tokens = torch.tensor([[0, 20, 21, 22, 23, 24, 25, 26]])
    run = host.run(tokens)
    factors = host.factors(run, *cell)
    value = F.normalize(host.unembedding()[7] @ host.output_projection(*cell), dim=-1)
    total = 0.0
    for t in range(8 - settings.writes, 8):
        norm = factors.key[0, t].norm() * factors.added[0, t].norm()
        gate = torch.stack([factors.log_decay[0, s].sum() for s in range(t + 1, 8)]).sum().exp() if t < 7 else 1.0
        read = F.normalize(factors.key[0, t], dim=-1) @ factors.query[0, 7]
        direct = host.unembedding()[7] @ host.output_projection(*cell) @ value
        total += float(3.0 * norm * gate * read * direct)
    assert table.set_index("direction").predicted_paper["paper"] == pytest.approx(total, rel=1e-4)


def test_ranks_and_texts_are_those_of_the_runs(installs):
    table, texts = installs.run(PROMPT, "w7", 50.0)
    host = installs.host
    native = host.logits(host.run(torch.tensor([[0, 20, 21, 22, 23, 24, 25, 26]])).final[:, -1])
    assert (table.rank_native == int((native > native[0, 7]).sum()) + 1).all()
    assert set(texts) == {"unedited", *install.DIRECTIONS}
    assert texts["unedited"][0] == int(native.argmax()) and {len(x) for x in texts.values()} == {INSTALL.new_tokens}
    for row in table.itertuples():
        assert (row.rank_edited == 1) == (texts[row.direction][0] == 7)


def test_the_page_marks_the_target_and_nothing_else(installs, monkeypatch):
    table, texts = installs.run(PROMPT, "w7", 3.0)
    texts = dict(texts, gamma=[3, 7, 1, 7, 5])
    monkeypatch.setattr(installs, "run", lambda *_: (table, texts))
    page = installs.page(PROMPT, "w7", 3.0)
    assert page.count("<mark> w7</mark>") == sum(text.count(7) for text in texts.values())
    assert "<script>" not in page and "native rank" in page


# Controls


def test_choosing_an_atom_draws_its_page(pages):
    first = pages.choices("state")[0][1]
    box = widgets.atom_controls(pages, "the first page")
    (target, atom), page = box.children[0].children, box.children[1]
    assert page.value == "the first page" and atom.value == first
    atom.value = pages.choices("state")[2][1]
    assert page.value == pages.page(*atom.value)
    target.value = "write"
    assert atom.value == pages.choices("write")[0][1]
    assert page.value == pages.page(*atom.value)


def test_the_button_writes_what_was_typed_or_says_what_is_wrong(installs):
    box = widgets.install_controls(installs, "the first page")
    prompt, row, page = box.children
    word, magnitude, button = row.children
    prompt.value, word.value, magnitude.value = PROMPT, "w7", 2.0
    assert page.value == "the first page"
    button.click()
    assert page.value == installs.page(PROMPT, "w7", 2.0)
    word.value = "abc"
    button.click()
    assert page.value.startswith("<p><b>The target must be one token")


def test_the_output_holds_the_page_beside_the_widget_and_alone_without_ipywidgets(installs, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", lambda data, raw: shown.append(data))
    widgets.show("<p>page</p>", lambda: widgets.install_controls(installs, "<p>page</p>"))
    assert shown[0]["text/html"] == "<p>page</p>"
    assert "model_id" in shown[0]["application/vnd.jupyter.widget-view+json"]
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    widgets.show("<p>page</p>", lambda: widgets.install_controls(installs, "<p>page</p>"))
    assert set(shown[1]) == {"text/html", "text/plain"}
