"""Map-style datasets that accelx did not write give what torch's own loader reads."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Subset,
    TensorDataset,
    random_split,
)

from accelx.loader import as_loader, batches, rows_at
from accelx.rows import rows_of
from accelx.tree import leaves

datasets = pytest.importorskip("datasets")

N = 23
NUMBERS = TensorDataset(torch.arange(N), torch.arange(N) * 2.0)


@pytest.fixture(scope="module")
def arrow(tmp_path_factory):
    """A dataset of Hugging Face, memory-mapped from Arrow files."""
    folder = str(tmp_path_factory.mktemp("arrow"))
    columns = {
        "index": list(range(N)),
        "text": [f"row {i}" for i in range(N)],
        "tokens": [[i, i + 1, i + 2] for i in range(N)],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def made(kind, arrow):
    """A dataset of each kind, all of N items."""
    if kind == "arrow":
        return arrow
    if kind == "arrow, as tensors":
        return arrow.with_format("torch", columns=["index", "tokens"])
    if kind == "concatenated":
        return ConcatDataset([NUMBERS, Subset(NUMBERS, range(5))])
    if kind == "split":
        parts = random_split(NUMBERS, [15, 8], torch.Generator().manual_seed(0))
        return ConcatDataset(parts)
    return [{"a": i, "b": (float(i), str(i))} for i in range(N)]


KINDS = ("arrow", "arrow, as tensors", "concatenated", "split", "list")


def same(ours, theirs):
    """Whether two batches hold the same values in containers of the same types."""
    assert type(ours) is type(theirs)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert a.tolist() == b.tolist() if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_torch(kind, workers, arrow):
    """Given the same indices, through the middle of an epoch and into the next."""
    data = made(kind, arrow)
    source = DataLoader(data, 4, shuffle=True, num_workers=workers)
    loader = as_loader(source, seed=2)
    stop = len(loader) + 2
    judge = DataLoader(data, batch_sampler=[rows_at(loader, k) for k in range(3, stop)])
    for ours, theirs in zip(batches(loader, 3, stop), judge, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_a_batch_in_order(kind, arrow):
    """Two ranks' rows one after the other are the batch of one."""
    loader = as_loader(DataLoader(made(kind, arrow), 5, shuffle=True))
    (whole,) = batches(loader, 1, 2)
    parts = [
        next(batches(attrs.evolve(loader, rank=r, world=2), 1, 2)) for r in range(2)
    ]
    assert [rows_of(part).rows for part in parts] == [2, 3]
    tensors, texts = zip(*map(sorted_out, (*parts, whole)), strict=True)
    for one, two, both in zip(*tensors, strict=True):
        assert torch.equal(torch.cat([one, two]), both)
    assert texts[0] + texts[1] == texts[2]


def sorted_out(batch):
    """The tensors of a batch, and its texts."""
    every = list(leaves(batch))
    tensors = [leaf for leaf in every if isinstance(leaf, torch.Tensor)]
    return tensors, [leaf for leaf in every if isinstance(leaf, str)]


def test_control_another_seed_reads_other_rows(arrow):
    """The control: batches are compared by value, and others differ."""
    one, two = (
        next(batches(as_loader(DataLoader(arrow, 8, shuffle=True), seed=seed)))
        for seed in (0, 1)
    )
    assert one["index"].tolist() != two["index"].tolist()
