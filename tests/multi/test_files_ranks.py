"""The index of files is made by all ranks together, and what fails is heard by all."""

from __future__ import annotations

import warnings

import pytest

from accelx.data import files_at, files_index
from accelx.data.files import from_files
from accelx.errors import DataError, MissingExtraError
from accelx.testing import run
from tests.unit.data import written
from tests.unit.data.written import rows_of

pytestmark = pytest.mark.multi


def put(folder, counts=(5, 40, 3, 10, 1, 1, 20)):
    """JSONL files of so many rows, and their pattern."""
    start = 0
    for number, count in enumerate(counts):
        data = written.jsonl(rows_of(start, start + count))
        (folder / f"{number}.jsonl").write_bytes(data)
        start += count
    return f"{folder}/*.jsonl", rows_of(0, start)


def seen(files):
    """What is to be the same on all ranks."""
    blocks = files._blocks
    parts = blocks.rows.tolist(), blocks.nbytes, files._table.tolist()
    return (*parts, files.files, files.skipped, files[0], files[-1])


def indexed(env, pattern, settings):
    """The index, the files that were read for it here, and those that were listed."""
    scanned, listed = [], []
    scan, list_ = files_index._scan, files_at.listed
    files_index._scan = lambda file, how: scanned.append(file.name) or scan(file, how)
    files_at.listed = lambda urls: listed.append(urls) or list_(urls)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        files = from_files(pattern, env=env, **settings)
    return seen(files), scanned, len(listed), [str(w.message) for w in told]


@pytest.mark.parametrize("settings", [{}, {"on_error": "skip", "verify": True}])
def test_each_rank_reads_its_share_of_the_index(settings, tmp_path):
    """One rank lists, each file is read on one rank, and all have one process's index.

    Without `env`, the control, each rank reads all of them.
    """
    pattern, rows = put(tmp_path)
    if settings:
        (tmp_path / "2.jsonl").write_bytes(b"{}\n[]\n")
        expected = pytest.warns(UserWarning, match=r"1 rows.*2.jsonl.*line 2: '\[\]'")
    else:
        expected = warnings.catch_warnings()
    with expected:
        alone = seen(from_files(pattern, **settings))
    assert alone[-1] == rows[-1]
    every = run(3)(indexed)(pattern, settings)
    assert [index for index, *_ in every] == [alone] * 3
    names = [name for _, scanned, *_ in every for name in scanned]
    assert sorted(names) == [f"{i}.jsonl" for i in range(7)]
    assert [len(scanned) for _, scanned, *_ in every].count(0) == 0
    assert [listed for *_, listed, _ in every] == [1, 0, 0]
    assert [len(told) for *_, told in every] == [bool(settings), 0, 0]
    control = run(3)(lambda env: indexed(None, pattern, settings))()
    assert sum(len(scanned) for _, scanned, *_ in control) == 21


def said(env, pattern, raised=None, **settings):
    """The error that a rank raises."""
    if raised is not None and env.rank == 1:

        def scan(file, how):
            raise raised

        files_index._scan = scan
    try:
        from_files(pattern, env=env, **settings)
    except Exception as error:
        return type(error), str(error)
    return None


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    """A listing, a damaged file, a missing package, and what nobody expected."""
    pattern, _ = put(tmp_path)
    (tmp_path / "1.jsonl").write_bytes(b"{\n" * 99)

    def all_errors(env):
        return [
            said(env, f"{tmp_path}/none.jsonl"),
            said(env, pattern, verify=True),
            said(env, pattern, MissingExtraError("pip install it")),
            said(env, pattern, ZeroDivisionError("by zero")),
        ]

    first, *others = run(3)(all_errors)()
    assert others == [first, first]
    none, damaged, missing, surprise = first
    assert none[0] is damaged[0] is surprise[0] is DataError
    assert "rank 0: files are wanted at" in none[1]
    assert "1.jsonl is wanted as jsonl, but line 1" in damaged[1]
    assert damaged[1].startswith("rank ")
    assert missing == (MissingExtraError, "rank 1: pip install it")
    assert surprise == (DataError, "rank 1: ZeroDivisionError: by zero")


@pytest.mark.parametrize("world", [1, 3, 9])
def test_shares_are_about_equal(world):
    """Each file has one rank, and no rank has much more than another."""
    sizes = [10, 900, 30, 400, 500, 20, 450, 60]
    shares = files_index._shares(sizes, world)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) <= max(max(sizes), sum(sizes) / world * 1.2)
