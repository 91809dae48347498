"""Rows come back as the dataset has them."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx.testing import run

pytestmark = pytest.mark.multi
DATA = TensorDataset(torch.arange(11.0))


def delivered(env, fn):
    tx = ax.shard_loader(env)
    return [fn(env, b) for b in ax.feed(tx, DataLoader(DATA, batch_size=4))]


def rows(env, batch):
    (x,) = batch
    values = {"double": x * 2, "text": [f"row {int(v)}" for v in x]}
    return ax.gather_rows(env, values, batch)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_each_sample_comes_once_and_in_order(world):
    """Also where a rank only got a placeholder; plain gather is the control."""
    for batches in run(world)(lambda env: delivered(env, rows))():
        double = torch.cat([b["double"] for b in batches])
        assert double.tolist() == [2.0 * i for i in range(11)]
        texts = [text for b in batches for text in b["text"]]
        assert texts == [f"row {i}" for i in range(11)]
    plain = run(world)(lambda env: delivered(env, lambda e, b: ax.gather(e, b[0])))()
    assert (len(torch.cat(plain[0])) == 11) == (world < 4)


def test_a_leaf_without_rows_says_what_to_use():
    """A number of the whole batch is no row."""
    env = ax.Env()
    with pytest.raises(ax.DataError, match=r"wants 3 rows in values\['n'\].*ax.reduce"):
        ax.gather_rows(env, {"n": torch.tensor(1.0)}, torch.ones(3))
