"""How pages begin and end: the sentences, and what `conclude` does with them."""

import re
from types import SimpleNamespace

import nbformat
import pytest

from replication import answers
from replication.study.paths import ROOT

MINI = ROOT / "results" / "mini"


def test_every_page_has_a_verdict_but_the_one_for_other_models():
    assert [name for name, (_, answer) in answers.PAGES.items() if not answer] == ["90_your_own_model"]


class Opened:
    """Keeps what a page's opening is updated with."""

    def update(self, shown):
        self.text = shown.data


def study(name="mini", results=MINI):
    return SimpleNamespace(profile=SimpleNamespace(name=name), paths=SimpleNamespace(results=results))


@pytest.mark.parametrize("name", [name for name, (_, answer) in answers.PAGES.items() if answer])
def test_a_page_ends_with_its_verdict_and_begins_with_its_result(name):
    opened = Opened()
    verdict = answers.conclude(opened, name, study())
    assert opened.text.startswith("**Result.** ") and re.search(r"\d", verdict.data)
    for text in (opened.text, verdict.data):
        assert text.endswith(".") and not re.search(r"nan|True|False|\[']|_|  ", text)
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    heading, last = cells[-2:]
    assert heading.source == "## Verdict" and last.source == f'answers.conclude(opened, "{name}", study)'
    assert sum("opened = answers.opening()" in cell.source for cell in cells) == 1


def test_other_profiles_and_missing_tables_get_a_remark(tmp_path):
    opened = Opened()
    remark = answers.conclude(opened, "05_replacement", study("smoke"))
    assert remark.data == opened.text and "are about the profile mini" in remark.data
    answers.conclude(opened, "05_replacement", study(results=tmp_path))
    assert opened.text == "The table headline.csv is not there yet, so this page has no result in words."
    (tmp_path / "headline.csv").write_text("host,cells\nmamba2,pooled\n")  # no rows of the main host
    remark = answers.conclude(opened, "05_replacement", study(results=tmp_path))
    assert remark.data == opened.text and "the tables lack rows of the profile mini" in remark.data


def test_a_difference_in_words():
    words = [answers.apart(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))]
    assert words == ["ahead of", "behind", "not significantly different from"]
