"""Columns of a datasets.Dataset give the batch that torch makes of its rows."""

from __future__ import annotations

from collections import UserDict
from datetime import datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Subset, default_collate

from accelx.data.collate import collated
from accelx.data.columns import gathered, reads_columns, rows
from accelx.errors import DataError
from accelx.fetch import fetcher
from accelx.loader import as_loader, batches, rows_at
from tests.unit.data.collating import facts, outcome

datasets = pytest.importorskip("datasets")

N = 9
Value, List = datasets.Value, datasets.List
NUMBERS = ("int8", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32")
COLUMNS = {
    **{d: (list(range(N)), Value(d)) for d in (*NUMBERS, "float64")},
    **{f"{d}s": ([[i, 1] for i in range(N)], List(Value(d))) for d in NUMBERS},
    "bool": ([i % 2 == 0 for i in range(N)], Value("bool")),
    "text": ([f"row {i}" for i in range(N)], Value("string")),
    "bytes": ([b"%d" % i for i in range(N)], Value("binary")),
    "gaps": ([None if i % 4 == 0 else i for i in range(N)], Value("int64")),
    "holes": ([[1, None]] * N, List(Value("int64"))),
    "ragged": ([[i] * (1 + i % 3) for i in range(N)], List(Value("int64"))),
    "empty": ([[]] * N, List(Value("float32"))),
    "long": ([[i + j for j in range(6)] for i in range(N)], List(Value("int64"))),
    "nested": ([[[1.5, i], [2, 3]] for i in range(N)], List(List(Value("float32")))),
    "square": ([[[i, 1], [2, 3]] for i in range(N)], datasets.Array2D((2, 2), "int32")),
    "texts": ([["a", str(i)] for i in range(N)], List(Value("string"))),
    "record": ([{"a": i} for i in range(N)], {"a": Value("int8")}),
    "records": ([[{"a": i}] for i in range(N)], List({"a": Value("int64")})),
    "label": ([i % 2 for i in range(N)], datasets.ClassLabel(names=["no", "yes"])),
    "time": ([datetime(2026, 1, 1 + i) for i in range(N)], Value("timestamp[us]")),
}


@pytest.fixture(scope="module")
def every():
    """A dataset with a column of each kind."""
    kinds = datasets.Features({name: kind for name, (_, kind) in COLUMNS.items()})
    values = {name: column for name, (column, _) in COLUMNS.items()}
    return datasets.Dataset.from_dict(values, features=kinds)


def ours(dataset):
    """What reads a batch of `dataset`."""
    return fetcher(dataset, default_collate)[1]


def theirs(dataset):
    """What torch's DataLoader does."""
    return lambda at: default_collate(dataset.__getitems__(at))


INDICES = st.lists(st.integers(0, N - 1), min_size=1, max_size=4)
FORMATS = (None, "torch", "numpy")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", COLUMNS)
def test_each_kind_of_column(name, format, every):
    """Types, dtypes, strides, bits and errors, for one row and for several."""
    one = every.select_columns([name]).with_format(format)
    assert reads_columns(one)
    for at in ([3], [5, 1, 1, 8], [4, 8]):
        assert outcome(ours(one), at) == outcome(theirs(one), at)


GOOD = ("int64", "float32", "int64s", "text", "long", "nested", "square", "label")
NAMES = st.lists(st.sampled_from(GOOD), min_size=1, max_size=4, unique=True)


@settings(max_examples=50)
@given(NAMES, st.sampled_from(FORMATS), INDICES)
def test_columns_beside_each_other(every, names, format, at):
    """Some formatted, the others as they are; shuffled before, or under a Subset."""
    some = every.select_columns(names).shuffle(seed=1)
    some.set_format(format, columns=names[:1], output_all_columns=True)
    assert outcome(ours(some), at) == outcome(theirs(some), at)
    part = Subset(Subset(some, range(N)), np.arange(N)[::-1])
    assert outcome(ours(part), at) == outcome(theirs(part), at)


def strided(made):
    """An array or tensor of four rows, and other ways to lie in memory."""
    yield made
    yield made[[0, 1, 2, 3, 0, 1, 2, 3]][::2]
    yield made[:, None][:, 0]
    if made.ndim > 1:
        yield made.T.reshape(made.shape[::-1]).T
        yield made[:, :1]
        yield made[:, :0]


ARRAYS = [np.ones((4, 3)).astype(d) for d in "?bhiqBHILefdFDg"]
FLAT = ("?", "i", "H", "L", "Q", "e", "f", ">i4", "U2", "S2", "O")
SINGLE = [np.ones(4).astype(d) for d in FLAT]
SINGLE += [np.ones((4, 3))[::-1], np.asfortranarray(np.ones((4, 3))), np.array("a")]
DTYPES = (torch.bool, torch.uint16, torch.int32, torch.bfloat16, torch.cfloat)
TENSORS = [torch.ones(4, 3, dtype=d) for d in DTYPES]
ODD = [
    *(torch.ones(4, 2, requires_grad=True), torch.ones(4, 2).to_sparse()),
    *(torch.ones(4, 2, dtype=torch.cfloat).conj(), torch.ones(1, 3).expand(4, 3)),
    *(torch.ones(()), torch.nn.Parameter(torch.ones(4)), torch.ones(4, device="meta")),
    *([1.5] * 4, ["a"] * 4, [1, 2, 3], (1, 2, 3, 4), "abcd", range(4), None),
]


def of(columns):
    """The batch that is made of columns, whichever way it goes."""
    found = gathered(columns, 4)
    return collated(rows(columns)) if found is None else found


def test_columns_of_a_function_of_the_users():
    """`set_transform` may give any array or tensor, or a mapping of its own type."""
    every = (way for one in (*ARRAYS, *TENSORS) for way in strided(one))
    for column in (*every, *SINGLE, *ODD):
        for columns in ({"x": column}, UserDict(x=column, y=[1] * 4)):
            judge = outcome(lambda c: default_collate(rows(c)), columns)
            assert outcome(of, columns) == judge, column


def test_a_batch_is_memory_of_its_own():
    """What a function of the user's gives again and again is not handed out."""
    held = {"x": torch.zeros(2, 3), "y": np.zeros(2), "z": ["a", "b"]}
    data = datasets.Dataset.from_dict({"i": [0, 1]}).with_transform(lambda _: held)
    batch = ours(data)([0, 1])
    assert facts(batch) == facts(theirs(data)([0, 1]))
    batch["x"].add_(1)
    batch["y"].add_(1)
    batch["z"].clear()
    assert facts(batch) != facts(ours(data)([0, 1])) == facts(theirs(data)([0, 1]))


def test_control_no_rows_are_made(every, monkeypatch):
    """What is compared with torch's is made from columns, save where they are odd."""
    monkeypatch.setattr("accelx.fetch.rows", None)
    plain = every.select_columns(["int64"])
    assert ours(plain)([1, 3])["int64"].tolist() == [1, 3]
    with pytest.raises(TypeError):
        ours(plain.with_transform(lambda batch: {"i": range(2)}))([1, 3])


class Own(datasets.Dataset):
    """A dataset that makes its rows in a way of its own."""

    def __getitems__(self, keys):
        return [{"twice": 2 * i} for i in keys]


def test_other_ways_to_rows_are_asked(every):
    """A `__getitems__` of the user's, a collate_fn of theirs, data frames."""
    plain = every.select_columns(["int64"])
    own = Own(plain.data, info=plain.info)
    assert not reads_columns(own)
    assert ours(own)([1, 3])["twice"].tolist() == [2, 6]
    assert fetcher(plain, list)[1]([1, 3]) == [{"int64": 1}, {"int64": 3}]
    frames = plain.with_format("pandas")
    assert outcome(ours(frames), [1, 3]) == outcome(theirs(frames), [1, 3])


def test_what_is_wrong_is_told():
    """An index beyond the end, and a function that leaves rows out."""
    data = datasets.Dataset.from_dict({"i": [0, 1, 2]})
    with pytest.raises(IndexError) as error:
        ours(data)([1, 7])
    assert error.value.__notes__ == ["accelx: while reading the items [1, 7]"]
    fewer = data.with_transform(lambda batch: {"i": batch["i"][1:]})
    with pytest.raises(DataError, match="an item for each of 3 indices, got 2"):
        ours(fewer)([0, 1, 2])


@pytest.mark.parametrize("kind", [*FORMATS, "wide"])
def test_workers_send_the_same(kind, every):
    """To the bit, columns too large for a message too."""

    def wide(batch):
        return {**batch, "wide": torch.ones(len(batch["text"]), 2**15)}

    some = every.select_columns([*GOOD])
    some = some.with_transform(wide) if kind == "wide" else some.with_format(kind)
    loader = as_loader(DataLoader(some, 4, shuffle=True, num_workers=1))
    for step, batch in enumerate(batches(loader)):
        assert facts(batch) == facts(theirs(some)(rows_at(loader, step)))
