"""The lookup tables in paper/ (symbols, conditions), compared with the code."""

import re

import pandas as pd
import pytest

from replication import plots
from replication.study.paths import ROOT
from writesae.evaluate.replacement import CONDITIONS

SYMBOLS = pd.read_csv(ROOT / "paper" / "symbols.csv")


def test_every_condition_of_the_replacement_test_is_listed_once():
    table = pd.read_csv(ROOT / "paper" / "conditions.csv")
    assert sorted(table.condition) == sorted([*CONDITIONS, "whole_atom"])
    assert table.notna().all(axis=None)
    assert set(plots.CONDITION) <= set(table.condition)


def test_symbols_are_listed_once_and_completely():
    assert SYMBOLS.symbol.is_unique and SYMBOLS.notna().all(axis=None)


@pytest.mark.parametrize(("code", "module"), sorted({*zip(SYMBOLS.code, SYMBOLS["where"], strict=True)}))
def test_a_symbols_name_in_the_code_is_in_its_module(code, module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert re.search(rf"\b{code}", path.read_text(encoding="utf-8")), f"{module} has no {code}"
