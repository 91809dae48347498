"""What one sample of one epoch draws at random: the same on any ranks and workers."""

from __future__ import annotations

import operator
from typing import Any

import attrs
import torch

from accelx.data.lent import Lent
from accelx.errors import DataError
from accelx.permutation import check_seed, key

_SAMPLE = 111  # names what a sample draws apart from what orders draw


def sample_rng(seed: int, epoch: int, index: int) -> torch.Generator:
    """A torch.Generator on the CPU for what sample `index` draws in `epoch`.

    It depends on the three numbers alone, so that an augmentation is the same on any
    ranks and workers, and after a resume. Pass it on: torch.rand(3, generator=...).
    About 5 us, of which 3 are torch's own. No effect on global random state. Raises
    DataError for a seed, epoch or index out of range.
    """
    return torch.Generator().manual_seed(_start(seed, epoch, index))


def seeded(dataset: Any, seed: int) -> SeededItems:
    """A map-style dataset whose items draw from global generators, made repeatable.

    While an item is read, Python's, NumPy's (where it is imported) and torch's CPU
    generator start from (seed, epoch, index), as `sample_rng` does; afterwards they
    stand where they stood. So augmentations that take no generator, such as those of
    torchvision, are the same on any ranks and workers. Items are read one by one, about
    0.1 ms each beside the dataset's own time. A CUDA generator is left alone.
    """
    check_seed(seed)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            "seeded wants a dataset with a length and items by index, got "
            f"{type(dataset).__name__}; in a stream, number the samples and give each "
            "accelx.sample_rng(seed, epoch, number)"
        )
    return SeededItems(dataset, seed)


@attrs.define(eq=False, repr=False)
class SeededItems:
    """What `seeded` gives: `dataset`, each item with random numbers of its own.

    Other attributes are the dataset's, except `__getitems__`.
    """

    dataset: Any
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for `epoch` from now on, and tell the dataset, if it wants to know."""
        self.epoch = epoch
        inner = getattr(self.dataset, "set_epoch", None)
        if inner is not None:
            inner(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with Lent.of(_start(self.seed, self.epoch, index)).lent():
            return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # not yet set while unpickling
            raise AttributeError(f"seeded dataset has no {name}")
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        return f"seeded({self.dataset!r}, {self.seed})"


def _start(seed: int, epoch: int, index: int) -> int:
    check_seed(seed)
    index, epoch = operator.index(index), operator.index(epoch)
    if epoch < 0 or index < 0:
        raise DataError(
            "a sample's random numbers want an epoch and an index of at least 0, got "
            f"epoch={epoch}, index={index}; count both from 0"
        )
    return key(_SAMPLE, seed, epoch, index)
