"""What a torch DataLoader asks for, as the fields of a Loader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accelx.data import plan, walks
from accelx.data.lengths import Lengths
from accelx.data.mix import Mixture
from accelx.data.orders import Among, Cycled, Drawn, Order, Seeded, Weighted
from accelx.errors import DataError


def settings_of(source: DataLoader[Any]) -> dict[str, Any]:
    """The fields of a Loader that reads what `source` reads.

    torch's own samplers become arithmetic; a sampler or batch sampler of the user's own
    is walked. Raises DataError for what would be cut twice, or change nothing.
    """
    check_settings(source)
    made = _settings_of(source)
    _check_mixture(source.dataset, "order" in made or "walk" in made)
    return made


def _check_mixture(dataset: Any, ordered: bool) -> None:
    """Refuse what would take indices of a mixture, each of a source, for its rows."""
    inside = [] if hasattr(dataset, "order_at") else plan.inside(dataset)
    if any(isinstance(one, Mixture) for one in ([dataset] if ordered else []) + inside):
        raise DataError(
            "a mixture has an order of its own, which says how often each source "
            "comes, got a sampler, a Subset or a ConcatDataset over it; write "
            "DataLoader(mixture, batch_size=...), and mix such parts of the sources"
        )


def _settings_of(source: DataLoader[Any]) -> dict[str, Any]:
    sampler: Any = source.batch_sampler
    fields = {**workers_of(source), "salt": _salt(source)}
    if sampler is None:  # batch_size=None: each item is a batch
        return {**fields, "batch_size": 1, "batched": True, **_order(source, 1, False)}
    if type(sampler) is BatchSampler:
        cut: Any = {"batch_size": sampler.batch_size, "drop_last": sampler.drop_last}
        return {**fields, **cut, **_order(source, *cut.values())}
    _check_undivided(sampler)
    _check_lengths(sampler, source.dataset)
    return {
        **fields,
        "batch_size": None,
        "walk": walks.by_batches(sampler, source.dataset),
    }


def _check_lengths(sampler: Any, dataset: Any) -> None:
    """Refuse lengths of another dataset: items without one would never come."""
    lengths = getattr(sampler, "lengths", None)
    if isinstance(lengths, Lengths) and len(lengths) != len(dataset):
        raise DataError(
            f"{sampler!r} wants one length for each of {len(dataset)} items, got "
            f"{len(lengths)}; write [len(item) for item in dataset]"
        )


def workers_of(source: DataLoader[Any]) -> dict[str, Any]:
    """How `source` makes batches of items, and what it hands to torch's workers."""
    return {
        "collate": source.collate_fn,
        "num_workers": source.num_workers,
        "timeout": source.timeout,
        "worker_init_fn": source.worker_init_fn,
        "multiprocessing_context": source.multiprocessing_context,
        "prefetch_factor": source.prefetch_factor,
        "persistent_workers": source.persistent_workers,
        "pin_memory": source.pin_memory,
    }


def _order(source: DataLoader[Any], batch_size: int, drop_last: bool) -> dict[str, Any]:
    """`shuffle`, or an order of the sampler's own."""
    outer: Any = source.batch_sampler
    sampler: Any = source.sampler if outer is None else outer.sampler
    plain = getattr(sampler, "data_source", None) is source.dataset
    if type(sampler) is SequentialSampler and plain:
        return {"shuffle": False}
    if type(sampler) is RandomSampler and plain and _each_once(sampler):
        return {"shuffle": True}
    known = _known(sampler)
    if known is not None:
        return {"order": known}
    _check_undivided(sampler)
    walk = walks.by_indices(sampler, batch_size, drop_last, source.dataset)
    return {"walk": walk}


def _each_once(sampler: RandomSampler) -> bool:
    n = len(sampler.data_source)
    return not sampler.replacement and sampler.num_samples == n


def _known(sampler: Any) -> Order | None:
    """The sampler as arithmetic, where it is one of torch's."""
    kind = type(sampler)
    if kind is SequentialSampler:
        return Seeded(len(sampler.data_source))
    if kind is RandomSampler:
        n, count = len(sampler.data_source), sampler.num_samples
        if _each_once(sampler):
            return Seeded(n, shuffle=True)
        return Drawn(n, count) if sampler.replacement else Cycled(n, count)
    if kind is SubsetRandomSampler:
        return Among(torch.as_tensor(list(sampler.indices), dtype=torch.int64))
    if kind is WeightedRandomSampler:
        return _weighted(sampler)
    return None


def _weighted(sampler: WeightedRandomSampler) -> Weighted:
    weights = torch.as_tensor(sampler.weights, dtype=torch.float64)
    some = int(weights.count_nonzero())
    fine = weights.dim() == 1 and bool((weights >= 0).all()) and bool(weights.sum() > 0)
    if not fine or not bool(weights.isfinite().all()):
        raise DataError(
            "WeightedRandomSampler wants a list of finite weights of at least 0, one "
            f"of them above, got {_brief(weights)}; mend the weights"
        )
    if not sampler.replacement and sampler.num_samples > some:
        raise DataError(
            f"drawing {sampler.num_samples} items without replacement wants as many "
            f"with a weight, got {some}; write num_samples={some}, or replacement=True"
        )
    return Weighted(weights, sampler.num_samples, sampler.replacement)


def _brief(weights: Tensor) -> str:
    odd = weights[~((weights >= 0) & weights.isfinite())].tolist()[:3]
    return f"shape {tuple(weights.shape)} with {odd or 'only zeros'}"


def _check_undivided(sampler: Any) -> None:
    """Refuse a sampler that gives each rank its part already."""
    one: Any
    for one in (sampler, getattr(sampler, "sampler", None)):
        if hasattr(one, "num_replicas"):
            raise DataError(
                f"shard_loader wants the whole order, and gives each rank its part, "
                f"got {type(one).__name__} with num_replicas={one.num_replicas}, which "
                "cuts it before; write DataLoader(dataset, batch_size=..., "
                "shuffle=True)"
            )


def _salt(source: DataLoader[Any]) -> int | None:
    """What a generator of the user's own adds to the seed: the seed it was given."""
    batches: Any = source.batch_sampler
    sampler: Any = source.sampler if batches is None else batches
    sampler = getattr(sampler, "sampler", sampler)
    own = getattr(sampler, "generator", None)
    generator = own if isinstance(own, torch.Generator) else source.generator
    return None if generator is None else generator.initial_seed()


def check_settings(source: DataLoader[Any]) -> None:
    """Refuse what would change the order, or where batches arrive."""
    if not source.in_order:
        raise DataError(
            "shard_loader wants a DataLoader that keeps the order, got in_order=False, "
            "by which batches come as workers are ready; drop in_order="
        )
    if source.pin_memory_device:
        raise DataError(
            "batches arrive on the device of the Env, got pin_memory_device="
            f"{source.pin_memory_device!r}; drop pin_memory_device="
        )
