"""A batch comes from a worker as it was made, whatever way its tensors take."""

from __future__ import annotations

import collections
import os
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import DataLoader

import accelx as ax
from accelx.data.parcel import SMALL, Parcels

Pair = collections.namedtuple("Pair", ["x", "y"])


def sent(batch):
    """A batch through a queue's pickle, and the bytes of the message."""
    message = bytes(ForkingPickler.dumps(Parcels(lambda items: items, 2)(batch)))
    return pickle.loads(message), len(message)


@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=4),
    st.sampled_from([torch.float32, torch.bool, torch.bfloat16, torch.complex64]),
    st.booleans(),
)
def test_a_tensor_comes_as_it_was(shape, dtype, turned):
    """Shape, strides, dtype, bits, and memory that torch may make larger."""
    made = (torch.rand(shape) * 4).to(dtype)
    made = made.permute(tuple(reversed(range(made.dim())))) if turned else made
    found, _ = sent({"a": [made]})
    found = found["a"][0]
    assert torch.equal(found, made)
    assert (found.dtype, found.shape, found.stride()) == (
        (made.dtype, made.shape, made.stride())
    )
    assert found.untyped_storage().resizable() or not found.numel()


def test_views_of_one_memory_stay_so():
    """The same tensor twice, and two views, of which one is written to."""
    whole = torch.arange(6.0).view(2, 3)
    (same, again, row, column), _ = sent([whole, whole, whole[1], whole[:, 1]])
    assert same is again
    same[1, 1] = 40.0
    assert row.tolist() == [3.0, 40.0, 5.0]
    assert column.tolist() == [1.0, 40.0]


def test_what_may_be_under_way_fits_into_the_pipe():
    """Each message is written at once where none is read; longer ones are shared."""
    for ahead in (1, 2, 4, 7, 16, 40):
        read, write = os.pipe()
        os.set_blocking(write, False)
        for size in (*[3000] * (ahead // 3), *[40_000] * (ahead - ahead // 3)):
            parcel = Parcels(bytes, ahead)(size)
            message = bytes(ForkingPickler.dumps((10**9, parcel)))
            whole = len(message).to_bytes(4, "big") + message
            assert len(whole) <= 16384
            assert os.write(write, whole) == len(whole)
            assert pickle.loads(message)[1] == bytes(size)
        os.close(read)
        os.close(write)


def test_large_tensors_are_shared_as_torch_shares_them():
    """With the memory that a view is part of."""
    small, large = torch.zeros(SMALL // 4), torch.zeros(SMALL // 4 + 1)
    assert not sent(small)[0].is_shared()
    for one in (large, large[:2]):
        assert len(Parcels(lambda items: items, 2)(one).data) < 2000
        assert sent(one)[0].is_shared()


class Texts:
    """Not a tensor, a dict or a list."""

    def __init__(self, words):
        self.words = words


def test_all_else_comes_by_torchs_own_pickle():
    """Objects, arrays, parameters."""
    weight = torch.nn.Parameter(torch.ones(2))
    batch = [Texts(["a"]), np.arange(3), weight, Pair(1, "b"), None]
    (words, array, again, pair, nothing), _ = sent(batch)
    assert words.words == ["a"]
    assert array.tolist() == [0, 1, 2]
    assert isinstance(again, torch.nn.Parameter)
    assert again.requires_grad
    assert pair == Pair(1, "b")
    assert nothing is None


def unpicklable(items):
    """A batch that no queue can take."""
    return lambda: items


def test_a_batch_that_cannot_be_pickled_is_an_error():
    """Torch's queue would drop it with a trace on stderr, and the program wait."""
    loader = DataLoader(range(4), 2, num_workers=1, collate_fn=unpicklable)
    with pytest.raises((AttributeError, pickle.PicklingError), match="unpicklable"):
        list(ax.feed(ax.shard_loader(ax.Env()), loader))
