"""The table of pairs: complete, and each mark of it backed by a test."""

import ast
import itertools
from string import ascii_lowercase

import pytest

import accelx as ax
from accelx.engines.options import KINDS
from tests import parallel_page
from tests.multi.test_pairs import CASES, PASSES
from tests.unit.source import ROOT

NAMES = (*KINDS, *PASSES, "save_state")
TOGETHER = "tests/multi/test_pairs.py::test_it_is_the_run_of_one_process"


def test_every_pair_has_an_entry():
    """Once, and there is no other."""
    pairs = [frozenset(pair) for pair in parallel_page.pairs()]
    assert len(pairs) == len(NAMES) * (len(NAMES) - 1) // 2
    assert set(pairs) == {frozenset(p) for p in itertools.combinations(NAMES, 2)}


def test_every_transform_that_divides_is_a_name_of_it():
    """A new one wants a row."""
    dividing = {n for n in ax.__all__ if n.startswith("shard_")}
    assert dividing - {"shard_model", "shard_loader"} <= {*NAMES}


def test_every_mark_is_a_test_or_an_error():
    """And none is left over; the letters of refusals have no hole."""
    marks = {*parallel_page.pairs().values()}
    assert marks == {*parallel_page.tests(), *parallel_page.refusals()}
    assert all(parallel_page.refusals().values())
    letters = [*parallel_page.refusals()]
    assert letters == [*ascii_lowercase[: len(letters)]]


@pytest.mark.parametrize("where", parallel_page.tests().values())
def test_the_test_of_a_mark_is_there(where):
    """By file and name."""
    file, _, name = where.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_pairs_that_are_tried_together_are_in_a_case():
    """Every pair of that mark; of a case the names beside its axes."""
    tried = parallel_page.tests()
    pairs = parallel_page.pairs()
    ours = {frozenset(p) for p, m in pairs.items() if tried.get(m) == TOGETHER}
    cases = [case[1:] for some in CASES.values() for case in some]
    covered = {frozenset(p) for c in cases for p in itertools.combinations(c, 2)}
    assert ours == covered
