"""The interactive controls of notebooks 03 and 10: numbers, text and buttons.

The numbers are compared with edited runs and with plain loops.
"""

import copy
import itertools
import re
from dataclasses import make_dataclass

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import SmallProfile, SmallStudy

from replication import html, widgets
from replication.pages import atoms as atoms_page
from replication.pages import promoted as promoted_page
from replication.study.firings import firings_of
from replication.study.profile import CellRule, Data, HostSection, Install
from writesae.evaluate import install, promoted
from writesae.evaluate.firings import encode_cell
from writesae.harvesting import harvest
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
    """A tokenizer: token t is " wt", 1 is HTML code, 0 is the end of the text.

    Each letter of any other word becomes one token, with an id above 250.
    """

    eos_token_id = 0

    def decode(self, tokens, **_):
        return "".join({0: "\n", 1: HOSTILE}.get(int(t), f" w{int(t)}") for t in tokens)

    def __call__(self, text, **_):
        pieces = [
            [int(word[1:])] if re.fullmatch(r"w\d+", word) else [250 + len(word)] * len(word) for word in text.split()
        ]
        return dict(input_ids=list(itertools.chain(*pieces)))


def plain(**fields):
    """Settings as a dataclass, because fingerprints accept dataclasses."""
    return make_dataclass("Plain", fields)(**fields)


@pytest.fixture(scope="module")
def study(gated_deltanet, tmp_path_factory):
    """One small host in fp32 with one cell, and one untrained SAE per target."""
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
    made = SmallStudy(profile, host, torch.randint(0, 12, (8, 50), generator=torch.Generator().manual_seed(4)))
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
def alive(study):
    return atoms_page.describe(study, "small", [(*CELL, target, "main", 42) for target in ("state", "write")])


@pytest.fixture(scope="module")
def firings(study):
    return atoms_page.main_firings(study, "small")


def most_firing(alive, target):
    """The row of atoms.csv for the atom with the most firings of one SAE."""
    return alive[alive.target == target].sort_values("firings", ascending=False, kind="stable").iloc[0]


def of_atom(firings, row):
    return firings[(firings.target == row.target) & (firings.atom == row.atom)]


@pytest.fixture
def shown(monkeypatch):
    """Two lists: the displayed outputs and the created widgets."""
    outputs, made = [], []

    def make(*arguments, **controls):
        made.append(ipywidgets.interactive(*arguments, **controls))
        return made[-1]

    monkeypatch.setattr(widgets, "display", lambda data, raw: outputs.append(data))
    monkeypatch.setattr(widgets, "interactive", make)
    return outputs, made


# The page of an atom


def test_the_firings_are_those_of_the_encoded_windows(study, firings, alive):
    columns = ["window", "passage", "position", "atom"]
    factors = harvest(study.small, study.split.tokens, [CELL], 4, progress=False)[CELL]
    for target in ("state", "write"):
        cell_sae = encode_cell(CELL, target, "added", study.sae("small", *CELL, target), factors)
        wanted = firings_of(study, cell_sae, study.split)
        part = firings[firings.target == target]
        assert part[columns].to_numpy().tolist() == wanted[columns].to_numpy().tolist()
        assert part.coefficient.to_numpy() == pytest.approx(wanted.coefficient.to_numpy(), rel=1e-5)
        counts = alive[alive.target == target].set_index("atom").firings
        assert part.groupby("atom").size().to_dict() == counts.to_dict()


def test_every_alive_atom_can_be_chosen_the_most_firing_first(study, alive, firings, shown):
    widgets.atoms(study, alive, firings)
    labels = [label for label, _ in shown[1][0].children[0].options]
    assert len(labels) == len(alive)
    wanted = [label for target in ("state", "write") for label in alive_labels(alive[alive.target == target])]
    assert labels == wanted


def alive_labels(rows):
    rows = rows.sort_values("firings", ascending=False, kind="stable")
    return [
        f"trained on {r.target}s, atom {r.atom}: {kind}, cosine {r.cosine:.2f}, {r.firings:,} firings"
        for r, kind in zip(rows.itertuples(), rows["class"])
    ]


def test_promoted_tokens_are_those_of_the_mean_over_all_atoms(study, alive, firings):
    row = most_firing(alive, "write")
    own = of_atom(firings, row)
    found = promoted_page.measure(study, "small", own, widgets.TOKENS)
    host, windows = study.host("small"), study.windows("small", "heldout")
    largest = own.sort_values("coefficient", ascending=False, kind="stable").drop_duplicates("passage").head(3)
    saes = [(CELL, study.sae("small", *CELL, "write"), largest)]
    shifts = promoted.mean_shifts(host, windows, saes, "added", 4)[0]
    for kind in promoted.KINDS:
        rows = found[(found.kind == kind) & (found.direction == "promoted")]
        top = shifts[kind][row.atom].topk(widgets.TOKENS)
        assert rows.token.tolist() == top.indices.tolist()
        assert rows["shift"].to_numpy() == pytest.approx(top.values.numpy(), rel=1e-3)
    assert (found.n == len(largest)).all()


def test_tokens_of_one_atom_are_those_of_the_browser_s_table(study, alive, firings):
    table, row = promoted_page.run(study, "small", firings, widgets.TOKENS), most_firing(alive, "state")
    keys = ["kind", "direction", "rank"]
    one = promoted_page.measure(study, "small", of_atom(firings, row), widgets.TOKENS).sort_values(keys)
    wanted = of_atom(table, row).sort_values(keys)
    assert one["shift"].to_numpy() == pytest.approx(wanted["shift"].to_numpy(), rel=1e-3)
    assert one.n.tolist() == wanted.n.tolist() and len(one) == 3 * 2 * widgets.TOKENS


def test_the_page_says_what_the_table_says_and_marks_every_firing(study, alive, firings):
    row = most_firing(alive, "state")
    page = widgets.atom_page(study, row, of_atom(firings, row))
    assert f"Atom {row.atom} (layer 1 head 2 of small, trained on states)" in page
    for value in (row["class"], f"{row.cosine:.3g}", f"{row.rate:.2%}"):
        assert f"<td>{value}</td>" in page
    assert f"<td>{row.firings:,} in {row.passages} passages</td>" in page
    contexts = re.findall("<pre>(.*?)</pre>", page)
    assert 1 <= len(contexts) <= widgets.CONTEXTS and all("<mark>" in text for text in contexts)
    heads = re.findall("<th>((?:pro|de)moted, .*?)</th>", page)
    assert heads == [f"{side}, {kind}" for side in ("promoted", "demoted") for kind in promoted.KINDS]
    assert "<script>" not in page and "<table" in page


def test_text_is_escaped():
    assert html.marked_html(["a<b\n", [HOSTILE, 0.5, 1]]) == f"a&lt;b⏎<mark>{html.html.escape(HOSTILE)}</mark>"
    assert "&lt;script&gt;" in html.table_html(pd.DataFrame([dict(x=HOSTILE)]))


# The page of an install


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
def test_what_cannot_be_used_is_one_sentence(study, arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        widgets.install_word(study, *arguments)


def test_the_exact_prediction_is_what_a_small_write_does(study):
    small, _ = widgets.install_word(study, PROMPT, "w7", 1e-2)
    assert small.predicted_exact.to_numpy() == pytest.approx(small.measured.to_numpy(), rel=2e-2)
    assert not np.allclose(small.predicted_paper, small.measured, rtol=0.2)
    large, _ = widgets.install_word(study, PROMPT, "w7", 2e-2)
    for name in ("predicted_exact", "predicted_paper"):
        assert large[name].to_numpy() == pytest.approx(2 * small[name].to_numpy(), rel=1e-4)


def test_the_papers_prediction_is_its_formula_by_a_loop(study):
    table, _ = widgets.install_word(study, PROMPT, "w7", 3.0)
    host, cell, settings = study.host("small"), CELL, INSTALL
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


def test_ranks_and_texts_are_those_of_the_runs(study):
    table, texts = widgets.install_word(study, PROMPT, "w7", 50.0)
    host = study.host("small")
    native = host.logits(host.run(torch.tensor([[0, 20, 21, 22, 23, 24, 25, 26]])).final[:, -1])
    assert (table.rank_native == int((native > native[0, 7]).sum()) + 1).all()
    assert set(texts) == {"unedited", *install.ONE_CELL}
    assert texts["unedited"][0] == int(native.argmax()) and {len(x) for x in texts.values()} == {INSTALL.new_tokens}
    for row in table.itertuples():
        assert (row.rank_edited == 1) == (texts[row.direction][0] == 7)


def test_the_page_marks_the_target_and_nothing_else(study, monkeypatch):
    table, texts = widgets.install_word(study, PROMPT, "w7", 3.0)
    texts = dict(texts, gamma=[3, 7, 1, 7, 5])
    monkeypatch.setattr(widgets, "install_word", lambda *_: (table, texts))
    page = widgets.install_page(study, PROMPT, "w7", 3.0)
    assert page.count("<mark> w7</mark>") == sum(text.count(7) for text in texts.values())
    assert "<script>" not in page and "native rank" in page


# Buttons and outputs


def press(widget):
    """Click the button and return the outputs that are then displayed."""
    displayed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipywidgets.widgets.interaction.display", displayed.append)
        widget.manual_button.click()
    return [output.data for output in displayed]


def test_choosing_an_atom_shows_its_page(study, alive, firings, shown):
    widgets.atoms(study, alive, firings)
    (output,), (widget,) = shown
    row = most_firing(alive, "state")
    assert output["text/html"] == widgets.atom_page(study, row, of_atom(firings, row))
    widget.children[0].index = int((alive.target == "state").sum())  # the first atom of the other SAE
    row = most_firing(alive, "write")
    assert press(widget) == [widgets.atom_page(study, row, of_atom(firings, row))]


def test_the_button_installs_what_was_typed_or_says_what_is_wrong(study, shown, monkeypatch):
    monkeypatch.setattr(widgets, "PROMPT", PROMPT)
    monkeypatch.setattr(widgets, "TARGET", "w7")
    widgets.installs(study)
    (output,), (widget,) = shown
    assert output["text/html"] == widgets.install_page(study, PROMPT, "w7", 3.0)
    prompt, word, magnitude = widget.children[:3]
    prompt.value, magnitude.value = PROMPT + " w27", 2.0
    assert press(widget) == [widgets.install_page(study, PROMPT + " w27", "w7", 2.0)]
    word.unobserve_all()
    for wrong, sentence in (
        ("abc", "The target must be one token, and &#x27;abc&#x27; is 3"),
        ("", "Type a target word"),
    ):
        word.value = wrong
        assert press(widget)[0].startswith(f"<p><b>{sentence}")


def test_the_output_holds_the_page_beside_the_widget(shown):
    widgets.show(lambda x: f"<p>{x}</p>", x=ipywidgets.IntText(3))
    (output,), _ = shown
    assert output["text/html"] == "<p>3</p>"
    assert "model_id" in output["application/vnd.jupyter.widget-view+json"]
    assert output["text/plain"] == "An HTML page, with controls where the notebook runs in JupyterLab."


def test_the_first_page_is_a_sentence_where_the_default_cannot_be_used(study, shown):
    widgets.installs(study)  # the words of PROMPT are not tokens of this tokenizer
    assert shown[0][0]["text/html"].startswith("<p><b>")
