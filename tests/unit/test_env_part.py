"""Ranks in parts of the mesh, by arithmetic; torch's own mesh is the judge."""

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

import accelx as ax
from accelx.env_part import along, parts, rows_env, sums_env
from accelx.records import Axis

NAMES = ("replicate", "shard", "sequence", "tensor", "stage")
meshes = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.tuples(
        st.just(tuple(names)),
        st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names)),
    )
)


def env_of(names, sizes, rank):
    axes = tuple(map(Axis, names, sizes))
    return ax.Env(rank=rank, world=math.prod(sizes), axes=axes)


@given(meshes, st.data())
def test_a_part_is_the_row_of_the_mesh_that_holds_this_rank(mesh, data):
    """The judge is a tensor of ranks, indexed."""
    names, sizes = mesh
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    rank = data.draw(st.integers(0, ranks.numel() - 1))
    taken = data.draw(st.sets(st.sampled_from(names), min_size=1))
    at = [int(i) for i in (ranks == rank).nonzero()[0]]
    index = [slice(None) if n in taken else i for n, i in zip(names, at, strict=True)]
    row = ranks[tuple(index)].flatten().tolist()
    env = env_of(names, sizes, rank)
    part = along(env, *taken)
    assert part.world == len(row)
    assert row[part.rank] == rank
    assert [axis.name for axis in part.axes] == [n for n in names if n in taken]
    found = parts(env.axes, tuple(taken))
    assert row in found
    assert sorted(itertools.chain(*found)) == ranks.flatten().tolist()


def test_who_has_rows_and_who_has_losses_of_its_own():
    """Tensor and stage share all, sequence shares rows; a part of a part knows it."""
    names = ("data", "sequence", "tensor")
    envs = [env_of(names, (2, 2, 2), rank) for rank in range(8)]
    assert [rows_env(env).rank for env in envs] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [sums_env(env).rank for env in envs] == [0, 0, 1, 1, 2, 2, 3, 3]
    one = along(sums_env(envs[5]), "sequence")
    assert (one.rank, one.world, one.whole) == (0, 2, envs[5].axes)
    plain = ax.Env(rank=1, world=2)
    assert rows_env(plain) is plain
    assert along(plain, "data") is plain


def test_an_axis_that_is_not_there_is_named():
    """With what to write."""
    with pytest.raises(
        ax.PlacementError, match=r'has data; write .*"data=-1,tensor=2"'
    ):
        along(ax.Env(world=4), "tensor")
