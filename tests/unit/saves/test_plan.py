"""Who writes what: every element once, evenly, and decided alike by all."""

import math

import attrs
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from accelx.errors import CheckpointError
from accelx.saves.boxes import Box, overlap, tile, whole
from accelx.saves.dtypes import KINDS
from accelx.saves.lie import Lie, Slice, here, lie
from accelx.saves.manifest import (
    Manifest,
    Part,
    read_manifest,
    write_manifest,
)
from accelx.saves.plan import SPLIT, Known, planned

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
COUNTS = {"step": 3, "skipped": 1}
ABOUT = {**COUNTS, "position": 4, "world": 2}
LARGE = st.tuples(st.integers(1, 40), st.sampled_from([SPLIT // 64, SPLIT // 7, 1]))


def rows(shape, world, copies=1):
    """Slices of dim 0 over `world` ranks as torch's chunk cuts, each on `copies`."""
    step, found = -(-shape[0] // world), []
    for r in range(world):
        low, high = min(r * step, shape[0]), min((r + 1) * step, shape[0])
        if high > low and 0 not in shape:
            lo, hi = (low, *(0,) * (len(shape) - 1)), (high, *shape[1:])
            holders = tuple(r + world * c for c in range(copies))
            found.append(Slice(Box(lo, hi), holders))
    return tuple(found)


@st.composite
def lies(draw):
    """Tensors that lie whole or in slices on some ranks, and how many ranks."""
    copies, shards = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (1, 7)]))
    found = {}
    for i in range(draw(st.integers(0, 8))):
        shape = draw(st.one_of(SHAPES, LARGE))
        dtype = draw(st.sampled_from(sorted(KINDS)))
        cut = bool(shape) and draw(st.booleans())
        found[f"t{i}"] = Lie(dtype, shape, rows(shape, shards, copies) if cut else None)
    return found, copies * shards


def written(plan, world):
    """Bytes that each rank writes."""
    return [
        sum(box.volume * plan.entries[n].width for n, _, box in plan.of(r))
        for r in range(world)
    ]


@given(lies())
def test_every_element_is_written_once(case):
    """The pieces of all ranks are a tiling of each tensor, in their order."""
    found, world = case
    plan = planned(found, world)
    pieces = {name: [] for name in found}
    for r in range(world):
        mine = plan.of(r)
        order = [plan.entries[n].number for n, _, _ in mine]
        assert order == sorted(order)
        for name, k, box in mine:
            assert plan.layouts[plan.entries[name].layout][k].box == box
            pieces[name].append(box)
    for name, one in found.items():
        assert tile(pieces[name], one.shape) is None
        assert (plan.entries[name].dtype, plan.entries[name].shape) == (
            one.dtype,
            one.shape,
        )


@given(lies())
def test_a_rank_writes_what_it_holds(case):
    """A slice is written by a rank that has it."""
    found, world = case
    plan = planned(found, world)
    for r in range(world):
        for name, _, box in plan.of(r):
            slices = found[name].slices
            if slices is not None:
                assert r in next(s.ranks for s in slices if s.box == box)


@given(lies())
def test_the_plan_is_a_function_of_what_there_is(case):
    """Every rank that is told the same plans the same."""
    found, world = case
    again = {n: Lie(one.dtype, one.shape, one.slices) for n, one in found.items()}
    assert planned(found, world) == planned(again, world)


def otherwise(found):
    """The same tensors in another order, with one more, and one of another dtype."""
    yield dict(reversed(found.items()))
    yield {**found, "more": Lie("int8", (3,))}
    for first in list(found)[:1]:
        yield {**found, first: attrs.evolve(found[first], dtype="complex128")}


@given(lies())
def test_a_plan_that_is_known_is_taken_again_only_where_it_holds(case):
    """After any change a rank plans, and writes, what one does that knows nothing."""
    found, world = case
    known = Known(world - 1, world)
    for now in (found, *otherwise(found), found):
        plan = known.planned(now)
        assert (plan, plan.said) == (fresh := planned(now, world), fresh.said)
        assert list(plan.entries) == list(now)
        mine = [(one.name, one.piece, one.box) for one in known.shares]
        assert mine == fresh.of(world - 1)
        again = {n: Lie(one.dtype, one.shape, one.slices) for n, one in now.items()}
        assert known.planned(again) is plan


@given(st.lists(st.one_of(SHAPES, LARGE), min_size=1, max_size=12), st.integers(1, 9))
def test_what_all_hold_is_written_in_equal_shares(shapes, world):
    """No rank writes more than its share and what cannot be cut: SPLIT, or a row."""
    found = {str(i): Lie("float32", shape) for i, shape in enumerate(shapes)}
    shares = written(planned(found, world), world)
    total = sum(4 * math.prod(shape) for shape in shapes)
    row = max((4 * math.prod(s[1:]) for s in shapes if s), default=0)
    assert sum(shares) == total
    assert max(shares) <= total / world + SPLIT + 2 * row


@given(st.integers(1, 40))
def test_copies_of_slices_are_written_in_turn(count):
    """With three copies of each slice, no rank writes two tensors more than another."""
    found = {str(i): Lie("int64", (4, 5), rows((4, 5), 2, 3)) for i in range(count)}
    shares = written(planned(found, 6), 6)
    assert max(shares) - min(shares) <= 2 * 5 * 8


@given(lies())
def test_a_manifest_says_all_of_a_plan(case):
    """What is read back is what was written, whatever the slices."""
    found, world = case
    plan = planned(found, world)
    parts = tuple(Part(f"r{r}", 1 << 40, f"i{r}", 7, "0" * 32) for r in range(world))
    values = {"z": {"b": 1, "a": [None, True, -0.5, "\ud800"]}, **COUNTS}
    manifest = Manifest(ABOUT, parts, plan.layouts, plan.entries, {}, values, {})
    back = read_manifest(write_manifest(manifest), "a test")
    assert back == attrs.evolve(manifest, tensors=dict(plan.entries))
    assert list(back.values["z"]) == ["b", "a"]
    assert back.names == tuple(found)


MESHES = {(4,): "a", (2, 2): "ab", (2, 3): "ab"}
PLACED = [
    ((4,), [Shard(0)], (6, 3)),
    ((4,), [Shard(1)], (3, 6)),
    ((4,), [Shard(0)], (1,)),
    ((4,), [Shard(0)], (0, 3)),
    ((4,), [Replicate()], (5,)),
    ((2, 2), [Replicate(), Shard(0)], (5, 2)),
    ((2, 2), [Shard(0), Replicate()], (5, 2)),
    ((2, 2), [Shard(0), Shard(1)], (5, 3)),
    ((2, 2), [Shard(1), Shard(0)], (5, 3)),
    ((2, 3), [Shard(0), Shard(0)], (17, 2)),
    ((2, 3), [Replicate(), Replicate()], ()),
]


@pytest.fixture(scope="module")
def ranks():
    """A function that makes this process one of several ranks that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def as_rank(rank, world):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield as_rank
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("mesh", "placements", "shape"), PLACED)
def test_a_dtensor_lies_as_its_own_ranks_hold_it(ranks, mesh, placements, shape):
    """On each rank of a mesh: the slices tile the tensor, and have the local sizes."""
    world, seen = math.prod(mesh), {}
    for rank in range(world):
        ranks(rank, world)
        names = tuple(MESHES[mesh])
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        local = local_part(shape, mesh, placements, device_mesh.get_coordinate())
        one = DTensor.from_local(
            torch.zeros(local),
            device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape).stride(),
        )
        seen[rank] = lie("w", one, {}), here(one, {})
    every = {how for how, _ in seen.values()}
    assert len(every) == 1
    (how,) = every
    assert tile([s.box for s in how.slices], shape) is None
    for rank, (_, held) in seen.items():
        holds = [s.box for s in how.slices if rank in s.ranks]
        assert holds == [box for box, _ in held]
        assert all(box.shape == tuple(memory.shape) for box, memory in held)


def local_part(shape, mesh, placements, coordinate):
    """The shape that torch's chunk leaves on a rank, one dim of the mesh at a time."""
    part = torch.empty(shape)
    for size, placement, at in zip(mesh, placements, coordinate, strict=True):
        if placement.is_shard():
            chunks = part.chunk(size, placement.dim)
            empty = part.narrow(placement.dim, 0, 0)
            part = (*chunks, *[empty] * size)[at]
    return part.shape


def test_parts_of_a_sum_cannot_be_saved(ranks):
    """They are no slices; the error says how to make some."""
    ranks(0, 4)
    mesh = init_device_mesh("cpu", (4,))
    one = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    with pytest.raises(CheckpointError, match=r"model\.w.*redistribute"):
        lie("model.w", one, {})


@pytest.mark.parametrize("saved", [16, 7])
def test_a_rank_finds_its_slices_in_a_layout_of_many(saved):
    """A hundred tensors from `saved` ranks, read by rank 3 of 5: all it wants, once."""
    shapes = [(n % 13 + 1, 4) for n in range(100)]
    found = {f"t{i}": Lie("float32", s, rows(s, saved)) for i, s in enumerate(shapes)}
    plan = planned(found, saved)
    parts = tuple(Part(f"r{r}", 1 << 40, f"i{r}", 7, "0" * 32) for r in range(saved))
    manifest = Manifest(ABOUT, parts, plan.layouts, plan.entries, {}, COUNTS, {})
    manifest = read_manifest(write_manifest(manifest), "a test")
    for name, entry in manifest.tensors.items():
        mine = next((s.box for s in rows(entry.shape, 5) if 3 in s.ranks), None)
        if mine is not None:
            layout = manifest.layouts[entry.layout]
            near = filter(None, (overlap(p.box, mine) for p in layout))
            moved = [
                Box((b.lo[0] - mine.lo[0], 0), (b.hi[0] - mine.lo[0], 4)) for b in near
            ]
            assert tile(moved, mine.shape) is None, name
    assert whole((2, 3)).volume == 6
