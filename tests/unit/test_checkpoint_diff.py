"""Two checkpoints differ where their numbers do, however each of them is cut."""

import contextlib
import itertools
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from accelx import storage
from accelx.checkpoints.diff import diff
from accelx.saves import write
from accelx.saves.boxes import Box
from accelx.saves.commit import COMMIT, Commit, folder_name, write_commit
from accelx.saves.manifest import MANIFEST, Entry, Manifest, Piece, write_manifest
from accelx.saves.memory import flat
from accelx.saves.strict import digest

CHUNK = 1024  # bytes, the fewest that a manifest may have
PARTS = 2


def grid(shape, ends):
    """The boxes of a tensor cut at `ends`, one sequence a dim."""
    runs = [
        list(itertools.pairwise(sorted({0, *(e for e in cut if e < n), n})))
        for n, cut in zip(shape, ends, strict=True)
    ]
    for box in itertools.product(*runs):
        yield Box(tuple(a for a, _ in box), tuple(b for _, b in box))


def written(url, tensors, cuts, chunk=CHUNK, **more):
    """A checkpoint of `tensors`, each cut as `cuts` says, on two parts in turn."""
    entries, layouts = {}, []
    slabs = [[] for _ in range(PARTS)]
    for number, (name, tensor) in enumerate(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        pieces = []
        for k, box in enumerate(grid(tensor.shape, cuts[name])):
            slices = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
            data = flat(tensor[slices].clone())
            pieces.append(Piece(box, (number + k) % PARTS))
            slab = write.Slab(name, number, k, dtype, box.shape, data)
            slabs[pieces[-1].part].append(slab)
        entries[name] = Entry(dtype, tuple(tensor.shape), number, number)
        layouts.append(tuple(pieces))
    store = storage.inside(storage.at(url), folder_name(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "CHUNK", chunk)
        parts = tuple(write.write_part(store, r, slabs[r]) for r in range(PARTS))
    about = {"step": 1, "skipped": 0, "position": 1, "world": PARTS}
    values = {"step": 1, "skipped": 0, **more.pop("values", {})}
    made = Manifest(
        about,
        parts,
        tuple(layouts),
        entries,
        more.get("aliases", {}),
        values,
        {},
        chunk,
    )
    data = write_manifest(made)
    numbers = (1, 1, time.time(), PARTS, made.size, len(entries), len(data))
    last = write_commit(Commit(*numbers, digest(data)))
    storage.write(store, MANIFEST, [data], len(data))
    storage.write(store, COMMIT, [last], len(last))
    return store.root


class Progress:
    """What `diff` tells of its reading."""

    def __init__(self):
        self.total, self.done = 0, 0

    @contextlib.contextmanager
    def __call__(self, total):
        self.total = total
        yield self.told

    def told(self, size):
        self.done += size


def compared(a, b):
    """What `diff` finds, and what it told of its reading."""
    progress = Progress()
    return diff(a, b, progress), progress


SHAPE = (9, 70)
DTYPES = ("float32", "bfloat16", "int64", "complex64", "bool")
cut = st.lists(st.integers(1, 69), max_size=2)


@given(
    cuts=st.tuples(cut, cut, cut, cut),
    dtype=st.sampled_from(DTYPES),
    at=st.none() | st.tuples(st.integers(0, 8), st.integers(0, 69)),
)
@settings(max_examples=40)
def test_one_element_is_found_however_it_is_cut(tmp_path_factory, cuts, dtype, at):
    """Along both dims, with chunks that end anywhere, on each of several dtypes."""
    folder = tmp_path_factory.mktemp("diff")
    ours = torch.arange(630).reshape(SHAPE).remainder(7).to(getattr(torch, dtype))
    theirs = ours.clone()
    if at is not None:
        theirs[at] = (theirs[at] == 0).to(ours.dtype)
    cuts_a, cuts_b = cuts[:2], cuts[2:]
    a = written(folder / "a", {"w": ours, "v": ours}, {"w": cuts_a, "v": cuts_a})
    b = written(folder / "b", {"w": theirs, "v": ours}, {"w": cuts_b, "v": cuts_a})
    found, progress = compared(a, b)
    alike = list(grid(SHAPE, cuts_a)) == list(grid(SHAPE, cuts_b))
    by = "digests" if alike else "bytes"
    assert found["changed"] == ([] if at is None else [{"name": "w", "by": by}])
    assert found["same"] == (at is None)
    size = 0 if alike else ours.numel() * ours.element_size()
    assert progress.total == progress.done == size


ZEROS = torch.zeros(3, 2)
WHOLE = {"w": ((), ())}


def test_bits_are_compared_and_not_values(tmp_path):
    """Minus zero is another number to save, and a NaN is itself."""
    nan = torch.full((3, 2), float("nan"))
    rows = {"w": ((1,), ())}
    zeros = written(tmp_path / "zeros", {"w": ZEROS}, WHOLE)
    minus = written(tmp_path / "minus", {"w": -ZEROS}, rows)
    assert compared(zeros, minus)[0]["changed"] == [{"name": "w", "by": "bytes"}]
    a = written(tmp_path / "a", {"w": nan}, WHOLE)
    b = written(tmp_path / "b", {"w": nan}, rows)
    assert compared(a, b)[0]["same"]


def test_digests_of_other_chunks_are_not_compared(tmp_path):
    """Two sizes of chunk give two digests of the same bytes: those are read."""
    big = {"w": torch.arange(3000.0).reshape(3, 1000)}
    a = written(tmp_path / "a", big, WHOLE, chunk=1024)
    b = written(tmp_path / "b", big, WHOLE, chunk=2048)
    found, _ = compared(a, b)
    assert found["same"]
    assert found["num_same"] == {"digests": 0, "bytes": 1}


def test_scalars_and_empty_tensors_are_compared(tmp_path):
    """What has no rows is read as well as what has."""
    one = {"s": torch.tensor(1.5), "e": torch.zeros(0, 3)}
    two = {**one, "s": torch.tensor(2.5)}
    cuts = {"s": (), "e": ((), ())}
    a = written(tmp_path / "a", one, cuts, chunk=1024)
    b = written(tmp_path / "b", two, cuts, chunk=2048)
    found, _ = compared(a, b)
    assert found["changed"] == [{"name": "s", "by": "bytes"}]


def test_a_new_shape_or_dtype_is_told_as_such(tmp_path):
    """Neither is compared by its bytes."""
    a = written(tmp_path / "a", {"w": ZEROS, "v": ZEROS}, {**WHOLE, "v": ((), ())})
    others = {"w": ZEROS.T.contiguous(), "v": ZEROS.double()}
    b = written(tmp_path / "b", others, {**WHOLE, "v": ((), ())})
    found, progress = compared(a, b)
    assert found["reshaped"] == [{"name": "w", "a": [3, 2], "b": [2, 3]}]
    assert found["retyped"] == [{"name": "v", "a": "float32", "b": "float64"}]
    assert not found["changed"]
    assert not found["same"]
    assert progress.total == 0


def test_a_tied_name_is_a_name(tmp_path):
    """A weight that is untied is the same tensor, and no longer the same name."""
    tied = written(tmp_path / "a", {"w": ZEROS}, WHOLE, aliases={"v": "w"})
    cuts = {**WHOLE, "v": ((), ())}
    loose = written(tmp_path / "b", {"w": ZEROS, "v": ZEROS}, cuts)
    found, _ = compared(tied, loose)
    assert found["aliases"] == [{"name": "v", "a": "w"}]
    assert not any(found[k] for k in ("added", "removed", "changed"))
    assert not found["same"]
    ones = written(tmp_path / "c", {"w": ZEROS, "v": ZEROS + 1}, cuts)
    assert [c["name"] for c in compared(tied, ones)[0]["changed"]] == ["v"]


@pytest.mark.parametrize(
    "odd",
    [
        {"$": "dict", "v": [[1, 2], 3]},
        {"$": "dict", "v": 5},
        {"$": "dict"},
        {"$": {"$": []}, "v": {"$": "tuple"}},
        {"$": "tensor", "v": [1]},
        [[[[]]]],
    ],
)
def test_values_that_nobody_writes_are_shown_all_the_same(tmp_path, odd):
    """A manifest may say anything: it is compared, and nothing breaks."""
    a = written(tmp_path / "a", {"w": ZEROS}, WHOLE, values={"odd": odd})
    b = written(tmp_path / "b", {"w": ZEROS}, WHOLE, values={"lr": 0.5})
    found, _ = compared(a, b)
    assert {"name": "lr", "b": 0.5} in found["values"]
    assert compared(a, a)[0]["same"]
