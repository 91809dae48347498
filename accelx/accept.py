"""Which torch DataLoaders can be cut exactly by arithmetic, and what they ask for."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from accelx.errors import DataError

WANTED = "shard_loader wants a DataLoader that shuffles or not"


def settings_of(source: DataLoader[Any]) -> dict[str, Any]:
    """The fields of a Loader that reads what `source` reads.

    Raises DataError for anything that is not kept: samplers and batch samplers of the
    user's own, streams, subclasses that iterate in their own way, generators.
    """
    if type(source).__iter__ is not DataLoader.__iter__:
        raise DataError(
            f"{WANTED}, got the subclass {type(source).__name__}, which iterates in "
            "its own way; write DataLoader(dataset, batch_size=..., shuffle=...)"
        )
    if isinstance(source.dataset, IterableDataset):
        raise DataError(
            f"{WANTED} and reads items by index, got the IterableDataset "
            f"{type(source.dataset).__name__}; give a map-style dataset, such as a "
            "list of what the stream holds"
        )
    _check_batches(source)
    _check_settings(source)
    return {
        "batch_size": source.batch_size,
        "shuffle": _shuffles(source),
        "drop_last": source.drop_last,
        "collate": source.collate_fn,
        "num_workers": source.num_workers,
        "timeout": source.timeout,
        "worker_init_fn": source.worker_init_fn,
        "multiprocessing_context": source.multiprocessing_context,
        "prefetch_factor": source.prefetch_factor,
        "persistent_workers": source.persistent_workers,
        "pin_memory": source.pin_memory,
    }


def _check_batches(source: DataLoader[Any]) -> None:
    if source.batch_sampler is None:
        raise DataError(
            f"{WANTED} and cuts batches, got batch_size=None; write batch_size=1, or "
            "more"
        )
    if source.batch_size is None or type(source.batch_sampler) is not BatchSampler:
        raise DataError(
            f"{WANTED}, got batch_sampler={type(source.batch_sampler).__name__}, whose "
            "batches are not known by arithmetic; write batch_size=..., shuffle=..., "
            "drop_last=... instead"
        )


def _shuffles(source: DataLoader[Any]) -> bool:
    sampler: Any = source.sampler
    own = getattr(sampler, "data_source", None) is source.dataset
    if type(sampler) is SequentialSampler and own:
        return False
    if type(sampler) is not RandomSampler or not own:
        raise DataError(
            f"{WANTED}, got sampler={type(sampler).__name__}; write shuffle=True for a "
            "seeded order or shuffle=False for the dataset's own, and choose items "
            "with torch.utils.data.Subset(dataset, indices)"
        )
    if sampler.replacement or sampler.num_samples != len(sampler.data_source):
        raise DataError(
            f"{WANTED}, each item once, got RandomSampler(replacement="
            f"{sampler.replacement}, num_samples={sampler.num_samples}) over "
            f"{len(sampler.data_source)} items; write shuffle=True"
        )
    if sampler.generator is not None:
        raise DataError(_GENERATOR)
    return True


_GENERATOR = (
    "the order of a shuffled loader comes from the seed of shard_loader, got a "
    "generator of its own, which would change nothing; drop generator=, write "
    "ax.shard_loader(env, seed=...)"
)


def _check_settings(source: DataLoader[Any]) -> None:
    if source.generator is not None:
        raise DataError(_GENERATOR)
    if not source.in_order:
        raise DataError(
            f"{WANTED} and keeps the order, got in_order=False; drop in_order="
        )
    if source.pin_memory_device:
        raise DataError(
            "batches arrive on the device of the Env, got pin_memory_device="
            f"{source.pin_memory_device!r}; drop pin_memory_device="
        )
