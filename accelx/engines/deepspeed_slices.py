"""How DeepSpeed cuts weights, moments and gradients into flat slices, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx.errors import CheckpointError
from accelx.records import Env
from accelx.saves.flat import Flat
from accelx.saves.optim import Seen

Run = tuple[int, int]


@attrs.frozen(eq=False)
class Part:
    """What this rank updates of one weight: elements `at`... of a flat slice."""

    weight: Any
    at: int
    runs: tuple[Run, ...]  # of every rank, as elements of the weight
    rank: int

    def of(self, flat: Tensor) -> Flat:
        """The weight's part of a tensor that lies as the slice does."""
        low, high = self.runs[self.rank]
        local = flat.detach()[self.at : self.at + high - low]
        shape = tuple(getattr(self.weight, "ds_shape", self.weight.shape))
        return Flat(local, shape, self.runs, self.rank, self.weight.requires_grad)


@attrs.frozen(eq=False)
class Slice:
    """One flat slice that the optimizer updates, and what weights lie in it."""

    master: Tensor  # (n,)
    parts: tuple[Part, ...]


def slices(zero: Any, stage: int, env: Env) -> list[Slice]:
    """The slices of a ZeRO optimizer on this rank."""
    if stage == 3:
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [_by_weight(master, weights, env) for master, weights in pairs]
    return [
        _by_group(
            master,
            zip(weights, zero.round_robin_bit16_offsets[i], strict=True),
            int(zero.partition_size[i]),
            env,
        )
        for i, (master, weights) in enumerate(
            zip(
                zero.single_partition_of_fp32_groups,
                zero.round_robin_bit16_groups,
                strict=True,
            )
        )
    ]


def _by_weight(master: Tensor, weights: Any, env: Env) -> Slice:
    """Stage 3: each weight is cut into as many runs as there are ranks."""
    parts, at = list[Part](), 0
    for weight in weights:
        size, total = weight.partition_numel(), weight.ds_numel
        runs = tuple(
            (min(total, r * size), min(total, (r + 1) * size)) for r in range(env.world)
        )
        parts.append(Part(weight, at, runs, env.rank))
        at += size
    return Slice(master, tuple(parts))


def _by_group(master: Tensor, weights: Any, size: int, env: Env) -> Slice:
    """Stages 1 and 2: the weights of a group, end to end, are cut into runs."""
    parts = list[Part]()
    for weight, start in weights:

        def inside(
            element: int, start: int = start, total: int = weight.numel()
        ) -> int:
            return max(0, min(total, element - start))

        runs = tuple(
            (inside(r * size), inside((r + 1) * size)) for r in range(env.world)
        )
        at = start + runs[env.rank][0] - env.rank * size
        parts.append(Part(weight, max(0, at), runs, env.rank))
    return Slice(master, tuple(parts))


def weights(model: Any, env: Env) -> dict[int, Flat]:
    """Stage 3: every weight of the model, frozen ones too, as it lies."""
    found: dict[int, Flat] = {}
    for weight in model.parameters():
        one = _by_weight(weight.ds_tensor, [weight], env)
        found[id(weight)] = one.parts[0].of(weight.ds_tensor)
    return found


def seen(optimizer: Any, groups: list[list[Any]], cut: list[Slice]) -> Seen:
    """The optimizer over `cut` as one over the weights of `groups`."""
    copies = [
        {**real, "params": params}
        for real, params in zip(optimizer.param_groups, groups, strict=True)
    ]
    state: dict[Any, dict[str, Any]] = {}
    for one in cut:
        held = optimizer.state.get(one.master) or {}
        for part in one.parts if held else ():
            state[part.weight] = {k: _of(v, one, part) for k, v in held.items()}
    likes = {id(p.weight): p.of(one.master) for one in cut for p in one.parts}
    return Seen(
        type(optimizer).__name__,
        copies,
        state,
        likes,
        lambda state: _put(state, optimizer, cut),
        optimizer.param_groups,
    )


def _of(value: Any, one: Slice, part: Part) -> Any:
    if isinstance(value, Tensor) and value.shape == one.master.shape:
        return part.of(value)
    return value  # a count that the whole slice shares


def _put(state: Mapping[Any, Any], optimizer: Any, cut: list[Slice]) -> None:
    for one in cut:
        held = [state.get(part.weight) or {} for part in one.parts]
        keys = [set(each) for each in held]
        if any(each != keys[0] for each in keys):
            raise CheckpointError(
                "ZeRO updates the weights of a group as one, which wants the same "
                "kinds of optimizer state for each, but the checkpoint has "
                f"{sorted(map(sorted, keys))}; load it without: "
                'only=("model.**", "step", "skipped"), or give such weights groups of '
                "their own"
            )
        if keys and keys[0]:
            now = optimizer.state[one.master]
            for key in held[0]:
                now[key] = _joined(key, [h[key] for h in held], one, now.get(key))


def _joined(key: str, values: list[Any], one: Slice, there: Any) -> Any:
    """One value for the slice: runs side by side, or what all of them share."""
    if not isinstance(values[0], Flat):
        if any(value != values[0] for value in values):
            raise CheckpointError(
                f"ZeRO updates the weights of a group as one, which wants one {key!r} "
                f"for all of them, but the checkpoint has {values[:5]}; load it "
                'without: only=("model.**", "step", "skipped")'
            )
        return values[0]
    if there is None or there.dtype != values[0].dtype:
        like = one.master
        there = torch.zeros(like.shape, dtype=values[0].dtype, device=like.device)
    for part, value in zip(one.parts, values, strict=True):
        part.of(there).local.copy_(value.local)
    return there
