"""The atom browser: its numbers against loops and the tables, and its page in a real browser."""

import copy
import itertools
import json
import re
from dataclasses import make_dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SmallProfile, SmallStudy

from replication import html
from replication.__main__ import main
from replication.commands import browser, neuronpedia
from replication.commands import order as dependencies
from replication.pages import atoms as atoms_page
from replication.statistics import wilson
from replication.study.profile import CellRule, Data, HostSection
from writesae import files
from writesae.evaluate import atoms
from writesae.evaluate.replacement import CONDITIONS
from writesae.sae.config import SAEConfig
from writesae.sae.model import SAE

CELL, N_ATOMS = (1, 2), 24
HOSTILE = "</script><img src=x onerror=\"document.title='run'\">"


class Words:
    """Token t decodes to the word wt, and 0 to a line break; tokens 1 to 5 decode to hostile text."""

    SPECIAL = {0: "\n", 1: HOSTILE, 2: "<!--", 3: "]]>&lt;", 4: "\u2028\x07", 5: "⟦"}

    def decode(self, tokens, **_):
        return "".join(self.SPECIAL.get(t, f" w{t}") for t in tokens)


def plain(**fields):
    """A settings object that can be fingerprinted."""
    return make_dataclass("Plain", fields)(**fields)


class OneCell(SmallStudy):
    """A study of one small host with its own windows, cell and untrained SAEs."""

    def __init__(self, host, tokens):
        data = dict(window=50, sae_windows=8, heldout_windows=8, firing_windows=8, survey_windows=4)
        super().__init__(
            SmallProfile(
                name="small",
                seed=42,
                hosts={"small": HostSection(path="small", cells=dict(middle=CellRule(layer=1, sigma_ratio=3)))},
                data=Data(**data, first_position=5, batch_windows=4),
                saes=plain(write="added", targets=["state", "write"]),
                sections=dict(logit_shift=plain(target="state")),
            ),
            host,
            tokens,
        )


def replacement_table(firings, read=("write", "cache")):
    """Random divergences for at most four firings per atom; one atom of each SAE has none."""
    generator = np.random.default_rng(5)
    tables = []
    for (_, own), amplitude, scope in itertools.product(
        firings.groupby("target"), ("coefficient", "matched_norm"), read
    ):
        part = (
            own[own.atom != own.atom.iloc[0]]
            .groupby("atom")
            .head(4)
            .assign(amplitude=amplitude, read=scope, write="added")
        )
        for name in CONDITIONS:
            part[f"kl_{name}"] = 10 ** generator.uniform(-7, -3, len(part))
        tables.append(part.assign(cosine=generator.uniform(-1, 1, len(part))))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def study(gated_deltanet, tmp_path_factory):
    """A small host with the tables of the notebooks; the divergences of the replacement test are random."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WRITESAE_OUTPUT", str(tmp_path_factory.mktemp("browser")))
    single = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), Words(), "small")
    tokens = torch.randint(0, 12, (8, 50), generator=torch.Generator().manual_seed(4))
    made = OneCell(single, tokens)
    where = dict(host="small", layer=CELL[0], head=CELL[1])
    made.write("cells", pd.DataFrame([where | dict(place="middle", half_life_median=9.5, sigma1_over_sigma2=2.0)]))
    for target, role in itertools.product(("state", "write"), ("main", "survey")):
        torch.manual_seed(len(target + role))
        shape = dict(n_atoms=N_ATOMS, k=3, d_k=single.d_k, d_v=single.d_v)
        config = SAEConfig(**where, target=target, write="added", seed=0, **shape)
        SAE(config, single.d_k, single.d_v).save(made.sae_folder("small", *CELL, target, role))
    saes = [
        where | dict(role=role, target=target, n_atoms=N_ATOMS, k=3, fvu=0.5)
        for target, role in itertools.product(("state", "write"), ("main", "survey"))
    ]
    made.write("saes", pd.DataFrame(saes))
    groups = [(*CELL, target, "main", 42) for target in ("state", "write")]
    alive = made.write("atoms", atoms_page.describe(made, "small", groups))
    alive = alive[alive.target == "state"]
    firings = atoms_page.main_firings(made, "small")
    made.write("replacement", replacement_table(firings))
    made.write("replacement_by_cell", replacement_table(firings, read=("write",)).assign(layer=0))
    population = [
        where | dict(target="state", atom=a, amplitude=x, firings=7, win_rate=3 / 7)
        for a, x in itertools.product(alive.atom[:3], ("coefficient", "matched_norm"))
    ]
    made.write("population", pd.DataFrame(population))
    shifts = itertools.product(alive.atom[:2], (0.1, 1.0), ("paper", "exact"))
    shifts = [where | dict(atom=a, eps=e, predictor=p, n=30, r2=0.25 + e / 2) for a, e, p in shifts]
    made.write("logit_shift", pd.DataFrame(shifts))
    preferred = where | dict(target="state", token_from="same", text=repr(HOSTILE), score=2.5, firings=150)
    made.write("cache_preferred", pd.DataFrame([preferred | dict(atom=alive.atom.iloc[0])]))
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def page(study):
    return browser.write(study)


@pytest.fixture(scope="module")
def data(page):
    """The data embedded in the page, read up to the first end of a script, as a browser does."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# The data


def test_tests_of_an_atom_are_counts_by_a_loop(study, data):
    table, sae = study.table("replacement"), next(x for x in data["saes"] if x["target"] == "write")
    untested = 0
    for amplitude, (i, atom) in itertools.product(("coefficient", "matched_norm"), enumerate(sae["columns"]["atom"])):
        found = sae["test"][amplitude]
        rows = [
            r
            for r in table.to_dict("records")
            if (r["atom"], r["target"], r["amplitude"]) == (atom, "write", amplitude)
        ]
        for read, n, wins in (("write", "n", "wins"), ("cache", "cache_n", "cache_wins")):
            here = [r for r in rows if r["read"] == read]
            untested += not here
            assert found[n][i] == (len(here) or None)
            assert found[wins][i] == (sum(r["kl_atom"] < r["kl_delete"] for r in here) if here else None)
        here = [r for r in rows if r["read"] == "write"]
        if not here:
            assert found["low"][i] is None and found["kl"]["atom"][i] is None
            continue
        assert (found["low"][i], found["high"][i]) == pytest.approx(wilson(found["wins"][i], len(here)), rel=2e-3)
        for name in CONDITIONS:
            assert found["kl"][name][i] == pytest.approx(np.mean([r[f"kl_{name}"] for r in here]), rel=1e-2)
        for name in ("random", "reconstruction", "flat_svd"):
            assert found["beats"][name][i] == sum(r[f"kl_{name}"] < r["kl_delete"] for r in here)
            assert found["beaten"][name][i] == sum(r["kl_atom"] < r[f"kl_{name}"] for r in here)
    assert untested  # at least one atom has no test


def test_the_export_has_every_atom_in_neuronpedias_form(data, tmp_path):
    data = json.loads(json.dumps(data), object_hook=lambda x: {int(k) if k.isdecimal() else k: v for k, v in x.items()})
    paths = neuronpedia.write(data, tmp_path)
    assert [path.parent.name for path in paths] == [f"small_1-writesae-{x}-h2" for x in ("state", "write")]
    for path, sae in zip(paths, data["saes"][:2]):
        batch, columns = json.loads(path.read_text(encoding="utf-8")), sae["columns"]
        assert (batch["model_id"], batch["layer"]) == ("small", CELL[0])
        assert [x["feature_index"] for x in batch["features"]] == columns["atom"]
        for i, one in enumerate(batch["features"]):
            measured = columns["tokens"][i][3]
            assert one["pos_values"] == measured[1] and one["neg_values"] == measured[3]
            assert one["pos_str"] == [data["vocabulary"]["small"][t] for t in measured[0]]
            assert sum(one["freq_hist_data_bar_heights"]) == columns["firings"][i]
            assert one["frac_nonzero"] == pytest.approx(columns["firings"][i] / (8 * (50 - 5)), rel=0.05)
            top = max(max(x["values"]) for x in one["activations"])
            assert top == pytest.approx(columns["histogram"][i][0], rel=0.01)
            assert all(len(x["tokens"]) == len(x["values"]) for x in one["activations"])
    reason = "sae-dashboard is not installed"
    form = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard", reason=reason, exc_type=ImportError)
    batch = json.loads(paths[0].read_text(encoding="utf-8"))
    assert within(batch, form.NeuronpediaDashboardBatch(**batch).to_dict())


def within(ours, theirs) -> bool:
    """Whether nested data is in other data, whose newer versions have more fields."""
    if isinstance(ours, dict):
        return all(name in theirs and within(x, theirs[name]) for name, x in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(within, ours, theirs))
    return ours == theirs


def test_columns_are_those_of_the_table(study, data):
    table = study.table("atoms")
    for sae in data["saes"][:2]:
        own, columns = table[table.target == sae["target"]].sort_values("atom"), sae["columns"]
        for name in ("atom", "class", "firings", "passages"):
            assert columns[name] == own[name].tolist()
        for name in ("cosine", "cosine_key", "cosine_value", "elsewhere", "rate"):
            assert columns[name] == pytest.approx(own[name].tolist(), rel=1e-3)
        assert (sae["half_life_median"], sae["fvu"], sae["place"]) == (9.5, 0.5, "middle")
        assert sae["scanned"] == 8 * 43
    state = data["saes"][0]
    assert list(state["population"].values())[0]["coefficient"] == dict(n=7, wins=3, low=0.158, high=0.75)
    assert list(state["logit_shift"]["atoms"].values())[0] == dict(exact=[0.3, 0.75], paper=[0.3, 0.75])
    assert "logit_shift" not in data["saes"][1]


def test_survey_cells_show_only_what_was_tested(study, data):
    table, survey = study.table("replacement_by_cell"), [x for x in data["saes"] if x["role"] == "survey"]
    assert [(x["layer"], x["head"], x["target"]) for x in survey] == [(0, 2, "state"), (0, 2, "write")]
    for sae in survey:
        own = table[(table.target == sae["target"]) & (table.amplitude == "coefficient")]
        assert sae["columns"]["atom"] == sorted(own.atom.unique())
        assert sae["n_tested"] == sum(sae["test"]["coefficient"]["n"]) == len(own)


def test_contexts_hold_the_text_and_mark_every_firing(study, data):
    firings, tokens = atoms_page.main_firings(study, "small"), study.split.tokens.tolist()
    several = 0
    for sae in data["saes"][:2]:
        own = firings[firings.target == sae["target"]]
        chosen = atoms.top_contexts(Words(), study.split, own, browser.CONTEXTS)
        for atom, found in zip(sae["columns"]["atom"], sae["columns"]["contexts"], strict=True):
            rows = chosen[chosen.atom == atom]
            assert [passage for passage, _ in found] == rows.passage.tolist()
            for (_, spans), row in zip(found, rows.itertuples(), strict=True):
                text = "".join(x if isinstance(x, str) else f"⟦{x[0]}⟧" if x[2:] else x[0] for x in spans)
                assert text.replace("\n", "⏎") == row.text
                window = own[(own.atom == atom) & (own.window == row.window)].set_index("position").coefficient
                near = window[(window.index >= row.position - 14) & (window.index <= row.position + 6)].sort_index()
                marks = [x for x in spans if not isinstance(x, str)]
                assert [x[0] for x in marks] == [Words().decode([tokens[row.window][t]]) for t in near.index]
                assert [x[1] for x in marks] == pytest.approx(near.tolist(), rel=1e-2)
                assert [x[1] for x in marks if x[2:]] == pytest.approx([row.coefficient], rel=1e-2)
                several += len(marks) > 1
    assert several


def test_histograms_count_every_firing_once(study, data):
    firings = atoms_page.main_firings(study, "small")
    for sae in data["saes"][:2]:
        for atom, found in zip(sae["columns"]["atom"], sae["columns"]["histogram"], strict=True):
            own = firings[(firings.target == sae["target"]) & (firings.atom == atom)]
            assert sum(found[1]) == sum(found[2]) == len(own)
            assert found[0] == pytest.approx(own.coefficient.max(), rel=1e-2)
            wide = own.coefficient.max() / 20
            assert found[1][-1] == (own.coefficient >= 19 * wide * (1 - 1e-12)).sum()
            assert found[2][3] == ((own.position >= 3 * 50 / 16) & (own.position < 4 * 50 / 16)).sum()


def test_numbers_become_short_and_what_is_missing_none():
    assert html.plain([0.123456, np.nan, 3.0, -1234567.0, None]) == [0.1235, None, 3, -1235000, None]
    assert str(html.plain([3.0])) == "[3]"


def test_embedded_text_ends_no_script_and_comes_back():
    found = browser.embedded({"text": HOSTILE + "<!--\u2028&", "n": 0.5})
    assert not set("<>&\u2028") & set(found)
    assert json.loads(found) == {"text": HOSTILE + "<!--\u2028&", "n": 0.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        browser.embedded({"x": float("nan")})


# Missing or inconsistent inputs


@pytest.fixture
def without(study):
    """A function that removes a table for one test."""
    moved = []

    def take(name):
        path = study.paths.results / f"{name}.csv"
        path.rename(path.with_suffix(".away"))
        moved.append(path)

    yield take
    for path in moved:
        path.with_suffix(".away").rename(path)


@pytest.mark.parametrize(("table", "notebook"), list(browser.REQUIRED.items()))
def test_a_missing_table_is_one_sentence_with_its_notebook(study, without, table, notebook):
    without(table)
    wanted = f"The table {table}.csv is missing in results/small: `make {notebook} PROFILE=small` makes it."
    with pytest.raises(files.ArtifactError, match=re.escape(wanted)):
        browser.collect(study)


@pytest.mark.parametrize(("table", "notebook"), list(browser.OPTIONAL.items()))
def test_a_table_that_the_page_can_do_without_is_a_note(study, without, table, notebook):
    without(table)
    found = browser.collect(study)
    assert found["notes"] == [
        f"Not shown here: the table {table}.csv is missing in results/small; `make {notebook} PROFILE=small` makes it."
    ]
    shown = dict(replacement_by_cell="survey", cache_preferred="preferred").get(table, table)
    assert shown not in found["saes"][0] and shown not in [sae["role"] for sae in found["saes"]]


def test_the_survey_is_left_out_where_the_page_would_be_too_large(study, monkeypatch):
    data = browser.collect(study)
    whole = len(browser.page(data))
    monkeypatch.setattr(browser, "MAXIMUM_BYTES", whole - 1)
    text = browser.page(data).decode()
    assert len(text.encode()) < whole
    assert "The cells of the survey are left out" in text and '"role":"survey"' not in text


def test_tables_and_saes_of_two_runs_are_refused(study, monkeypatch):
    other = study.table("atoms").assign(firings=lambda x: x.firings + 1)
    real = study.table
    monkeypatch.setattr(study, "table", lambda name: other if name == "atoms" else real(name))
    with pytest.raises(files.ArtifactError, match="not of one run .*`make 03_atoms` makes them agree"):
        browser.collect(study)


def test_failures_are_one_sentence(study, without, monkeypatch, capsys):
    monkeypatch.setattr(browser, "open_study", lambda _: study)
    monkeypatch.setattr(browser, "MAXIMUM_BYTES", 100)
    assert main(["browser", "--profile", "small"]) == 1
    assert re.fullmatch(
        r"browser failed: The page would have [\d,]+ bytes, more than 100: .*\n", capsys.readouterr().err
    )
    config = study.sae_folder("small", *CELL, "write", "main") / "config.json"
    config.rename(config.with_suffix(".away"))
    monkeypatch.setattr(browser, "TOKENS", 3)  # promoted tokens are computed again
    try:
        assert main(["browser", "--profile", "small"]) == 1
        assert "`make 02_train_saes PROFILE=small` makes the SAEs." in capsys.readouterr().err.splitlines()[-1]
    finally:
        config.with_suffix(".away").rename(config)


def test_a_page_is_made_from_tables_without_a_run_of_the_host(study, page, monkeypatch):
    monkeypatch.setattr(type(study.small), "each_record", lambda *_: pytest.fail("the host is run"))
    assert browser.page(browser.collect(study)) == page.read_bytes()


def test_every_table_is_made_by_the_notebook_that_the_message_names():
    known = dependencies.notebooks()
    for table, notebook in (browser.REQUIRED | browser.OPTIONAL).items():
        if notebook in known:
            assert f"results/{{profile}}/{table}.csv" in known[notebook].makes


# The page, in Chromium


@pytest.fixture
def visit(chromium, page):
    """Open the page. At the end the console must be empty and no other address may have been requested."""
    told, asked, opened = [], [], []

    def open_page(width=1400, height=900, **options):
        view = chromium.new_page(viewport=dict(width=width, height=height), **options)
        view.on("console", lambda message: told.append(message.text))
        view.on("pageerror", lambda error: told.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(page.as_uri())
        opened.append(view)
        return view

    yield open_page
    for view in opened:
        assert view.title() != "run"
        view.close()
    assert told == []
    assert set(asked) == {page.as_uri()}


def rows(view):
    """The numbers of the listed atoms, in order."""
    return [int(x) for x in view.locator("#rows td:first-child").all_inner_texts()]


def cells(view, name):
    place = [x.get_attribute("data-name") for x in view.locator("#head th").all()].index(name)
    return view.locator(f"#rows td:nth-child({place + 1})").all_inner_texts()


def table_of(study, target="state"):
    table = study.table("atoms")
    return table[table.target == target].set_index("atom")


def test_the_numbers_shown_are_those_of_the_tables(study, visit):
    view, table = visit(), table_of(study)
    assert sorted(rows(view)) == sorted(table.index)
    test = study.table("replacement").query("target == 'state' and amplitude == 'coefficient' and read == 'write'")
    test = test.assign(win=test.kl_atom < test.kl_delete).groupby("atom")
    for atom, kind, cosine, rate, win, n, kl in zip(
        rows(view), *(cells(view, x) for x in ("class", "cosine", "rate", "win", "n", "kl")), strict=True
    ):
        assert kind == table["class"][atom]
        assert cosine == f"{table.cosine[atom]:.3f}".replace("-", "−")
        assert float(rate.rstrip("%")) == pytest.approx(100 * table.rate[atom], rel=0.05)
        if atom in test.groups:
            one = test.get_group(atom)
            assert (win.strip(), n) == (f"{100 * one.win.mean():.0f}%", str(len(one)))
            assert float(kl.replace(",", "")) == pytest.approx(1e6 * one.kl_atom.mean(), rel=0.02)
        else:
            assert (win.strip(), n, kl) == ("–", "–", "–")


def test_the_detail_shows_the_replacement_of_its_atom_at_either_amplitude(study, visit):
    view = visit()
    view.select_option("#class", "")
    test = study.table("replacement").query("target == 'state' and read == 'write'")
    atom = int(test.atom.iloc[0])
    view.get_by_role("button", name=str(atom), exact=True).first.click()
    for amplitude, label in (("coefficient", "own coefficient"), ("matched_norm", "native write's norm")):
        view.locator("#atom").get_by_role("button", name=label).click()
        one = test[(test.atom == atom) & (test.amplitude == amplitude)]
        for name in CONDITIONS:
            line = view.locator(f"#test tr[data-condition={name}] td.number").all_inner_texts()
            assert float(line[0].replace(",", "")) == pytest.approx(1e6 * one[f"kl_{name}"].mean(), rel=0.02)
            beats, beaten = (one[f"kl_{name}"] < one.kl_delete).sum(), (one.kl_atom < one[f"kl_{name}"]).sum()
            assert line[1] == ("" if name == "delete" else f"{beats} of {len(one)}")
            assert line[2] == ("" if name == "atom" else f"{beaten} of {len(one)}")


def test_the_readers_of_a_context_are_those_of_a_loop(study, data):
    host, firings = study.host("small"), atoms_page.main_firings(study, "small")
    seen = 0
    for sae in data["saes"][:2]:
        top = atoms.top_firings(firings[firings.target == sae["target"]], browser.CONTEXTS)
        for atom, found in list(zip(sae["columns"]["atom"], sae["columns"]["readers"], strict=True))[:3]:
            for row, read in zip(top[top.atom == atom].itertuples(), found, strict=True):
                tokens = study.split.tokens[[row.window]]
                factors, shares = host.factors(host.run(tokens), *CELL), {}
                for t in range(row.position + 1, tokens.shape[1]):
                    sizes, moved = [], factors.query[0, t]
                    for s in range(t, -1, -1):
                        sizes.append((moved @ factors.key[0, s]).abs() * factors.added[0, s].norm())
                        at = factors.at(slice(None), s)
                        moved = at.transition_transposed(moved[None, :, None])[0, :, 0]
                    shares[t - row.position] = (sizes[t - row.position] / sum(sizes)).item()
                assert [x[2] for x in read] == pytest.approx(sorted(shares.values(), reverse=True)[:3], rel=0.06)
                for text, later, share in read:
                    assert share == pytest.approx(shares[later], rel=0.06)
                    assert text == Words().decode([tokens[0, row.position + later].item()])
                    seen += 1
    assert seen


def test_contexts_shade_every_firing_and_give_the_coefficient_of_the_first(visit, data):
    view, sae = visit(), data["saes"][0]
    atom, found = next((a, x) for a, x in zip(sae["columns"]["atom"], sae["columns"]["contexts"]) if len(x) > 1)
    view.get_by_role("button", name=str(atom), exact=True).first.click()
    for line, (passage, spans) in zip(view.locator(".contexts li").all(), found, strict=True):
        firings = [x for x in spans if not isinstance(x, str)]
        assert line.locator("mark").count() == len(firings)
        here = next(x for x in firings if x[2:])
        assert "read by" in line.locator(".readers").inner_text()
        assert line.locator(".meta").inner_text().split("\n") == [f"{here[1]}", f"passage {passage}"]
        strengths = line.locator("mark").evaluate_all(
            "marks => marks.map(m => +m.style.getPropertyValue('--strength'))"
        )
        order = sorted(range(len(firings)), key=lambda i: firings[i][1])
        assert [strengths[i] for i in order] == sorted(strengths)
    histogram = sae["columns"]["histogram"][sae["columns"]["atom"].index(atom)]
    counts = view.locator("svg").evaluate_all(
        "all => all.map(x => [...x.querySelectorAll('rect')].map(r => r.textContent))"
    )
    assert [[int(x) for x in one] for one in counts] == histogram[1:]


def test_columns_sort_both_ways_and_say_so(study, visit):
    view, table = visit(), table_of(study)
    head = view.locator("#head th[data-name=cosine]")
    assert head.get_attribute("aria-sort") == "none"
    assert view.locator("#head th[data-name=rate]").get_attribute("aria-sort") == "descending"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    wanted = table.cosine.sort_values(ascending=False, kind="stable").index.tolist()
    assert [round(table.cosine[x], 4) for x in rows(view)] == [round(table.cosine[x], 4) for x in wanted]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert rows(view)[0] == table.cosine.idxmin()
    view.locator("#head th[data-name=win] button").click()
    shown = cells(view, "win")
    assert shown[-1].strip() == "–"  # untested atoms are last in both directions
    view.locator("#head th[data-name=win] button").click()
    assert cells(view, "win")[-1].strip() == "–"


def test_search_filters_by_every_word_and_escape_clears(study, visit, data):
    view, sae = visit(), data["saes"][0]
    view.keyboard.press("/")
    assert view.evaluate("document.activeElement.id") == "search"
    kind = sae["columns"]["class"][0]
    view.keyboard.type(f"{kind} w7")
    found = []
    for i, atom in enumerate(sae["columns"]["atom"]):
        text = sae["columns"]["fires_on"][i] + "".join(
            s if isinstance(s, str) else s[0] for _, spans in sae["columns"]["contexts"][i] for s in spans
        )
        promoted, _, demoted, _, _ = sae["columns"]["tokens"][i][3]
        text += "\n".join(data["vocabulary"]["small"][str(t)] for t in promoted + demoted)
        if "w7" in text and sae["columns"]["class"][i] == kind:
            found.append(atom)
    assert len(found) > 0
    assert sorted(rows(view)) == found
    assert view.locator("#count").inner_text() == f"{len(found)} of {len(sae['columns']['atom'])} atoms"
    view.keyboard.press("Escape")
    assert len(rows(view)) == len(sae["columns"]["atom"])
    view.keyboard.type("no such word")
    assert rows(view) == []
    assert view.locator("#atom").inner_text() == ""
    assert view.locator("#empty").is_visible()


def test_an_atom_is_reached_and_left_by_the_keyboard(visit):
    view = visit()
    order = rows(view)
    view.keyboard.press("/")
    view.keyboard.press("ArrowDown")
    view.keyboard.press("ArrowDown")
    chosen = view.locator("#rows [aria-current=true]")
    assert chosen.inner_text() == str(order[1])
    assert view.locator("#title").inner_text() == f"Atom {order[1]}"
    view.keyboard.press("Enter")
    assert view.evaluate("document.activeElement.id") == "title"
    view.keyboard.press("ArrowRight")
    assert view.locator("#title").inner_text() == f"Atom {order[2]}"
    view.keyboard.press("Escape")
    assert view.evaluate("document.activeElement.textContent") == str(order[2])
    view.keyboard.press("End")
    assert chosen.inner_text() == str(order[-1])
    view.keyboard.press("ArrowUp")
    assert chosen.inner_text() == str(order[-2])


def test_hostile_text_is_shown_as_text(visit, data):
    view, sae = visit(), data["saes"][0]
    spoken = [
        i for i, found in enumerate(sae["columns"]["contexts"]) if HOSTILE in json.dumps(found).replace('\\"', '"')
    ]
    atom = sae["columns"]["atom"][spoken[0]]
    view.get_by_role("button", name=str(atom), exact=True).first.click()
    assert HOSTILE in view.locator("#atom .contexts").inner_text()
    assert view.locator("img").count() == 0
    assert view.locator("script").count() == 2
    view.fill("#search", "</script><img")
    assert atom in rows(view)
    view.locator("#search").clear()
    first = data["saes"][0]["preferred"][0]["atom"]
    view.get_by_role("button", name=str(first), exact=True).first.click()
    assert view.locator("#atom code").inner_text() == repr(HOSTILE)
    assert "150 tested firings" in view.locator("#atom").inner_text()


def test_a_phone_shows_one_thing_at_a_time(visit):
    assert visit(1000, 780).evaluate("document.documentElement.scrollWidth") <= 1000
    view = visit(390, 780)
    assert not view.locator("#atom").is_visible()
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.locator("#rows tr").nth(2).click()
    assert view.locator("#title").inner_text() == f"Atom {rows(view)[2]}"
    assert view.evaluate("document.getElementById('atom').scrollWidth") <= 390
    view.get_by_role("button", name="Close").click()
    assert not view.locator("#atom").is_visible()
    assert view.evaluate("document.activeElement.textContent") == str(rows(view)[2])


def test_other_saes_are_one_choice_away(study, visit):
    view = visit()
    assert "trained on states" in view.locator("#atom .where").first.inner_text()
    view.locator("#target").get_by_role("button", name="writes").click()
    assert "trained on writes" in view.locator("#atom .where").first.inner_text()
    assert view.locator("#title").inner_text() == f"Atom {rows(view)[0]}"
    assert sorted(rows(view)) == sorted(table_of(study, "write").index)
    view.locator("#target").get_by_role("button", name="both").click()
    assert len(rows(view)) == len(study.table("atoms"))
    assert set(cells(view, "cell")) == {"small L1 H2, states", "small L1 H2, writes"}
    view.select_option("#cell", "small.0.2.survey")
    survey = study.table("replacement_by_cell").query("amplitude == 'coefficient'")
    assert len(rows(view)) == survey.groupby(["target", "atom"]).ngroups
    view.locator("#rows tr").first.click()
    assert view.locator("#atom .contexts li").count()
