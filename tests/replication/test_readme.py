"""The README and docs/: their numbers are those of the results, and their links lead somewhere.

An edited document is compared with the results of the working copy, any other with those of the last commit,
because `make all` on another machine changes the results of the working copy.
"""

import re
import shutil
import subprocess

import matplotlib.image
import pandas as pd
import pytest

from replication import answers, findings
from replication.commands import order, readme, teaser
from replication.study.paths import ROOT

DOCUMENTS = readme.documents()


def heading_names(text):
    """The anchors that GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module", params=DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def document(request):
    return request.param


def test_the_numbers_are_those_of_the_results(document, last_commit):
    edited = subprocess.run(["git", "-C", ROOT, "diff", "--quiet", "HEAD", "--", document], capture_output=True)
    folders = [ROOT / "results" / x if edited.returncode == 1 else last_commit(x) for x in ("mini", "bench")]
    text = document.read_text(encoding="utf-8")
    filled = readme.fill(text, *map(findings.Results, folders), DOCUMENTS[document])
    assert filled == text, "write its numbers again: python -m replication readme"


def test_every_link_leads_somewhere(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not re.match(r"https?:|\.\./\.\./actions", link)]
    for link in links:
        name, _, anchor = link.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), link
        if path.suffix == ".ipynb":  # on the site: the cell that makes a table
            assert not anchor or f"results/{{profile}}/{anchor}.csv" in order.notebooks()[path.stem].makes, link
        else:
            assert not anchor or anchor in heading_names(path.read_text(encoding="utf-8")), link


def test_the_readme_is_short_and_has_a_number_of_each_kind():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode("utf-8")) <= 8192
    shown = {name for path in DOCUMENTS for _, name, *_ in readme.MARKED.findall(path.read_text(encoding="utf-8"))}
    assert shown == set(readme.BLOCKS), "a number that nobody shows, or an unknown one"


def test_another_result_gives_another_text(tmp_path):
    for path in (ROOT / "results" / "mini").glob("*.csv"):
        shutil.copy(path, tmp_path)
    table = pd.read_csv(tmp_path / "headline.csv")
    main = (table.target == "write") & (table.centre == "none") & (table.cells == "pooled")
    main &= (table.host == findings.MAIN) & (table.draw == "positions") & (table.condition == "atom")
    table.loc[main, ["win_rate", "win_rate_low", "win_rate_high"]] = 0.123, 0.101, 0.149
    table.to_csv(tmp_path / "headline.csv", index=False)
    text = "| <!--=glance-->old<!--/--> and 5"
    filled = readme.fill(text, findings.Results(tmp_path), findings.Results(ROOT / "results" / "bench"), "../")
    assert filled.endswith("<!--/--> and 5") and "| 12% [10, 15] (no mean); " in filled and "old" not in filled
    assert "](../notebooks/05_replacement.ipynb)" in filled
    with pytest.raises(ValueError, match="There is no number 'unknown': choose one of ahead_at_best"):
        readme.fill("<!--=unknown--><!--/-->", None, None)


def test_estimates_in_words():
    row = pd.Series(dict(a=0.4996, b=-0.0004, c=1.0))
    assert findings.estimate(row, "a", "b", "c") == "50 [0, 100]"
    assert findings.estimate(row, "a", "b", "c", 2, scale=1) == "0.50 [0.00, 1.00]"
    assert findings.percent(row, "a", "b", "c") == "50% [0, 100]"
    assert [findings.listed(x) for x in (["a"], ["a", "b"], "abc")] == ["a", "a and b", "a, b and c"]


def test_a_row_is_the_only_one(tmp_path):
    pd.DataFrame(dict(host=["a", "a", "b"], value=[1, 2, 3])).to_csv(tmp_path / "x.csv", index=False)
    results = findings.Results(tmp_path)
    assert results.row("x", host="b").value == 3
    with pytest.raises(ValueError, match="x.csv has 2 rows with {'host': 'a'}, and one is wanted"):
        results.row("x", host="a")


def test_every_finding_is_that_of_a_page():
    pages = set(order.notebooks())
    assert set(answers.PAGES) == pages
    results = findings.Results(ROOT / "results" / "mini")
    for name, (sentence, _) in answers.PAGES.items():
        text = sentence(results)
        assert re.search(r"\d", text) and text.endswith((".", ")")) and "nan" not in text, name


def test_the_picture_of_the_readme_is_drawn_from_the_results(tmp_path):
    teaser.draw(findings.Results(ROOT / "results" / "mini"), tmp_path)
    drawn = matplotlib.image.imread(tmp_path / "teaser.png")
    assert drawn.shape == matplotlib.image.imread(ROOT / "docs" / "images" / "teaser.png").shape
