"""What a rank writes: a file that safetensors reads, and an index of its bytes."""

import itertools
import re

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, strategies as st

from accelx import storage
from accelx.saves import memory, write
from accelx.saves.boxes import Box, whole
from accelx.saves.dtypes import KINDS, NAMES
from accelx.saves.lie import Lie
from accelx.saves.manifest import Manifest, read_index, write_index
from accelx.saves.memory import chunks, flat, inside, pieces
from accelx.saves.plan import planned
from accelx.saves.read import Want, fill
from accelx.saves.strict import digest
from accelx.saves.verify import open_index, problems
from tests.laws import odd

DTYPES = (*odd.REAL, *odd.EIGHT, *odd.INTEGERS, *odd.COMPLEX)
OTHER = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex128)


def stored(folder, tensors):
    """A checkpoint of one part: the store, and its manifest."""
    lies = {
        name: Lie(str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    }
    plan, store = planned(lies, 1), storage.at(str(folder))
    slabs = [
        write.Slab(
            name, plan.entries[name].number, k, lies[name].dtype, box.shape, flat(t)
        )
        for name, k, box in plan.of(0)
        for t in [tensors[name]]
    ]
    part = write.write_part(store, 0, slabs)
    about = {"step": 0, "skipped": 0, "position": 0, "world": 1}
    parts = Manifest(about, (part,), plan.layouts, plan.entries, {}, {}, {})
    return store, parts


def every():
    """A tensor of each dtype, and some of odd shapes."""
    torch.manual_seed(0)
    shaped = {"scalar": torch.tensor(2.5), "one": torch.ones(1), "a b/ü": torch.eye(3)}
    return {str(d): odd.drawn(d, (3, 2)) for d in {*DTYPES, *OTHER}} | shaped


def test_the_safetensors_library_reads_every_dtype_that_it_knows(tmp_path):
    """Names, shapes, dtypes and bits, and nothing else is in the file."""
    tensors = every()
    stored(tmp_path, tensors)
    file = tmp_path / "rank-00000.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(tensors)
        for name, wanted in tensors.items():
            if wanted.dtype not in OTHER:
                assert odd.same(opened.get_tensor(name), wanted), name
    found = safetensors.torch.load_file(file)
    double = found["torch.complex128"]
    assert odd.same(torch.view_as_complex(double), tensors["torch.complex128"])
    eight = found["torch.float8_e5m2fnuz"].view(torch.float8_e5m2fnuz)
    assert odd.same(eight, tensors["torch.float8_e5m2fnuz"])


def test_every_dtype_has_a_code_and_a_way_back():
    """Codes of safetensors are told apart, and widths are torch's."""
    for name, kind in KINDS.items():
        width = torch.empty(0, dtype=torch.uint8).view(getattr(torch, name))
        assert width.element_size() == kind.width
        known = kind.codes == 1 and name not in ("float4_e2m1fn_x2",)
        if known and not name.endswith("fnuz"):
            assert NAMES[kind.code] == name


def test_an_index_says_where_the_bytes_are(tmp_path):
    """Header, offsets and digests fit the file; written and read it is the same."""
    tensors = {**every(), "empty": torch.empty(0, 2)}
    store, manifest = stored(tmp_path, tensors)
    index = open_index(store, manifest, 0, checked=True)
    data = (tmp_path / manifest.parts[0].file).read_bytes()
    assert index.header_size % 8 == 0
    assert digest(data[: index.header_size]) == index.header_digest
    for (number, _), where in index.slices.items():
        found = data[where.offset : where.offset + where.size]
        assert found == bytes(odd.bits(tensors[manifest.names[number]]).tolist())
        assert where.digests == (digest(found),)
    assert read_index(write_index(index), manifest, 0, "a test") == index
    assert list(problems(store, manifest)) == []


@pytest.mark.parametrize("block", [write.BLOCK, 100, 1 << 10, 7 << 10])
def test_large_slices_have_a_digest_each_chunk(block, tmp_path, monkeypatch):
    """Of CHUNK bytes, the last one shorter; a changed byte is found in its own.

    Whatever blocks they are written in.
    """
    monkeypatch.setattr(write, "CHUNK", 1 << 10)
    monkeypatch.setattr(write, "BLOCK", block)
    tensors = {"a": torch.arange(700.0), "b": torch.arange(3)}
    store, manifest = stored(tmp_path, tensors)
    small = Manifest(**{f: getattr(manifest, f) for f in FIELDS}, chunk=1 << 10)
    index = open_index(store, small, 0, checked=True)
    assert [len(w.digests) for w in index.slices.values()] == [3, 1]
    assert list(problems(store, small)) == []
    file = tmp_path / small.parts[0].file
    data = bytearray(file.read_bytes())
    at = index.header_size + 1500
    data[at] ^= 4
    file.write_bytes(data)
    (told,) = problems(store, small)
    low, high = map(int, re.search(r"those of a at (\d+) to (\d+)", told).groups())
    assert (low <= at < high, high - low) == (True, 1 << 10)


def test_slices_of_whole_cache_lines_begin_at_one(tmp_path):
    """Whatever lies between them in the order of the manifest."""
    tensors = {"a": torch.ones(1), "b": torch.ones(64), "c": torch.ones(3)}
    tensors |= {"d": torch.arange(32.0), "empty": torch.ones(0)}
    store, manifest = stored(tmp_path, tensors)
    slices = open_index(store, manifest, 0, checked=True).slices.values()
    assert {w.size: w.offset % 64 == 0 for w in slices if w.size > 12} == {
        256: True,
        128: True,
    }
    for name, wanted in tensors.items():
        out = torch.zeros_like(wanted)
        fill(store, manifest, [Want(name, whole(wanted.shape), out)])
        assert torch.equal(out, wanted)


FIELDS = ("about", "parts", "layouts", "tensors", "aliases", "values", "base")


@pytest.fixture(scope="module")
def file_of_many(tmp_path_factory):
    """Three tensors of other dims in a checkpoint."""
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(9, 4, 5),
        "b": torch.randn(11).double(),
        "c": torch.ones(()),
    }
    return tensors, *stored(tmp_path_factory.mktemp("many"), tensors)


@given(st.sampled_from("abc"), st.data(), st.sampled_from(["touched", "off", "full"]))
def test_any_box_can_be_read_into_any_memory(file_of_many, name, data, verify):
    """Contiguous or not, what comes is what lies there, and no more is changed."""
    tensors, store, manifest = file_of_many
    held = tensors[name]
    ends = [
        sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2)))
        for n in held.shape
    ]
    box = Box(tuple(a for a, _ in ends), tuple(b for _, b in ends))
    turned = torch.zeros(box.shape[::-1], dtype=held.dtype).permute(
        tuple(reversed(range(held.dim())))
    )
    for out in (torch.zeros(box.shape, dtype=held.dtype), turned):
        count = fill(store, manifest, [Want(name, box, out)], verify)
        assert torch.equal(out, inside(held, box, whole(held.shape)))
        assert count >= out.numel() * out.element_size()


def test_rows_beyond_a_block_are_read_a_part_at_a_time(file_of_many, monkeypatch):
    """Columns of many rows do not take memory for all that lies between them."""
    tensors, store, manifest = file_of_many
    monkeypatch.setattr("accelx.saves.read.BLOCK", 100)
    box, out = Box((0, 1, 0), (9, 2, 5)), torch.zeros(9, 1, 5)
    fill(store, manifest, [Want("a", box, out)])
    assert torch.equal(out, tensors["a"][:, 1:2])


@pytest.mark.parametrize("at", [0, 1, 99, 100, 101])
def test_pieces_are_cut_where_the_file_has_blocks(at):
    """Each ends at a multiple of 100 of the file, or at the end; none is empty."""
    data = memoryview(bytes(range(250)))
    each = list(pieces(data, 100, at))
    assert b"".join(each) == data
    assert all(map(len, each))
    ends = list(itertools.accumulate(map(len, each), initial=at))[1:-1]
    assert ends == [n for n in range(at + 1, at + 250) if n % 100 == 0]


def test_a_copy_is_whole_and_no_more(monkeypatch):
    """Of several blocks and a rest, beside memory that stays as it is."""
    monkeypatch.setattr(memory, "BLOCK", 100)
    data = torch.arange(250).to(torch.uint8)
    room = torch.full((270,), 255, dtype=torch.uint8)
    memory.copy(data, room[10:].data_ptr())
    assert torch.equal(room[10:260], data)
    assert room[:10].eq(255).all()
    assert room[260:].eq(255).all()


def test_bytes_of_a_view_are_those_that_it_shows():
    """Transposed, conjugated, negated and without dims."""
    z = torch.randn(3, 2, dtype=torch.complex64)
    for view in (z.T, z.conj(), z.conj().imag, z[1, 1], z[:, :0]):
        plain = torch.tensor(view.tolist(), dtype=view.dtype).reshape(view.shape)
        data = b"".join(bytes(c) for c in chunks(flat(view), 5))
        assert data == bytes(odd.bits(plain).tolist())
