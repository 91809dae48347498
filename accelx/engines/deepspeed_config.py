"""The configuration that DeepSpeed is given: what the chain says, and what a user adds.

Pure: what does not fit together is refused before a model is made.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from accelx.engines.options import Options
from accelx.errors import PlacementError
from accelx.records import Transform

AUTO = "auto"  # in a user's configuration: left to accelx
STAGE = 2  # where nobody says another
NEVER = 1 << 62  # steps between two lines of its own log

# Where the chain says what a configuration of DeepSpeed may say, too.
_HOMES = {
    "optimizer": "the function that ax.init is given: lambda m: AdamW(m.parameters())",
    "scheduler": "with_schedule(...)",
    "train_batch_size": "the DataLoader's batch_size, that of all ranks together",
    "train_micro_batch_size_per_gpu": "the DataLoader's batch_size, and accumulate(n)",
    "data_types": "with_precision(...)",
    "communication_data_type": "with_precision(Precision(reduce=...))",
    "amp": "with_precision(...)",
    "fp16": 'with_precision("fp16")',
    "bf16": 'with_precision("bf16")',
    "torch_autocast": 'with_precision("bf16")',
}
# Settings of which DeepSpeed's own code, called as it is here, takes notice.
_PASSED = {
    "zero_optimization",
    "prescale_gradients",
    "gradient_predivide_factor",
    "activation_checkpointing",
    "comms_logger",
    "memory_breakdown",
}
_ZERO_NOT = {
    "zenflow": "updates of its own rhythm are no steps of ax.step",
    "zero_hpz_partition_size": "a second copy of slices is not saved nor tested",
    "zero_quantized_weights": "it computes with other numbers",
    "zero_quantized_gradients": "it computes with other numbers",
    "zero_quantized_nontrainable_weights": "it computes with other numbers",
    "cpu_offload": "it is an old name; write shard_model(offload=True)",
    "cpu_offload_params": 'it is an old name; write offload_param, {"device": "cpu"}',
}
_OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}  # from which stage
_FIXED = {  # what every configuration has
    "train_micro_batch_size_per_gpu": 1,  # asked for, and counts nothing here
    "gradient_accumulation_steps": 1,
    # the step is the only boundary: microbatches and their weights are accelx's
    "managed_gradient_accumulation": False,
    "gradient_clipping": 0.0,  # it would be 1.0 where nothing is said
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": NEVER,
    "timers": {"throughput": {"enabled": False}},
}


def stage_of(options: Options) -> int:
    """The ZeRO stage: that of `stage`, of the user's configuration, or 2."""
    said = _left(_zero(options).get("stage"))
    own = options.stage
    if own is not None and said is not None and own != said:
        raise _clash("zero_optimization.stage", said, f"shard_model(stage={own})")
    stage = next((s for s in (own, said) if s is not None), STAGE)
    if type(stage) is not int or stage not in range(4):
        raise PlacementError(
            f"shard_model(stage=...) wants ZeRO stage 0, 1, 2 or 3, got {stage!r}; "
            f"write stage={STAGE}"
        )
    return stage


def config(options: Options, tx: Transform) -> dict[str, Any]:
    """DeepSpeed's configuration of a chain. Raises PlacementError where they clash."""
    theirs = _theirs(options)
    _agrees(theirs, tx)
    made = {**_plain(theirs), **slicing(options)}
    reduce = None if (spec := tx.find("with_precision")) is None else spec.precision
    if reduce is not None and reduce.reduce is not None:
        made["communication_data_type"] = reduce.reduce
    return made


def slicing(options: Options) -> dict[str, Any]:
    """The part of it that no other pass has a say in: what is where, and in slices."""
    stage, zero = stage_of(options), _zero(options)
    for key, why in _ZERO_NOT.items():
        if _left(zero.get(key)) not in (None, False):
            raise PlacementError(
                f"zero_optimization.{key}={zero[key]!r} of the configuration is not "
                f"taken: {why}; leave it out"
            )
    made = copy.deepcopy(_FIXED)
    made["zero_optimization"] = _offloaded(options, stage, _plain(zero))
    made["zero_optimization"]["stage"] = stage
    # else stage 3 changes `linear` of torch itself, and with it other models' numbers
    made["zero_optimization"].setdefault("memory_efficient_linear", False)
    return made


def _theirs(options: Options) -> dict[str, Any]:
    """What the user's configuration says: settings that are left to accelx are out."""
    said = options.config or {}
    return {k: v for k, v in said.items() if _left(v) is not None}


def _zero(options: Options) -> dict[str, Any]:
    zero = (options.config or {}).get("zero_optimization") or {}
    if not isinstance(zero, Mapping):
        raise PlacementError(
            "zero_optimization of a configuration wants to be a dict, got "
            f'{zero!r}; write {{"stage": {STAGE}}}'
        )
    return dict(zero)  # type: ignore[reportUnknownArgumentType]


def _left(value: Any) -> Any:
    return None if value == AUTO else value


def _plain(said: Any) -> Any:
    """A copy without what is left to accelx."""
    if not isinstance(said, Mapping):
        return copy.deepcopy(said)
    return {k: _plain(v) for k, v in said.items() if v != AUTO}  # type: ignore[reportUnknownVariableType]


def _agrees(theirs: Mapping[str, Any], tx: Transform) -> None:
    """Refuse what the chain says otherwise, and what nothing here would heed."""
    clip, cut = tx.find("clip"), tx.find("accumulate")
    chain: dict[str, tuple[Any, str]] = {
        "gradient_clipping": (
            (0.0, "no clip in the chain") if clip is None else (clip.norm, repr(clip))
        ),
        "gradient_accumulation_steps": (
            (1, "no accumulate in the chain") if cut is None else (cut.n, repr(cut))
        ),
        **{
            key: (value, "what accelx needs")
            for key, value in _FIXED.items()
            if key.startswith(("zero_", "managed"))
        },
    }
    found = [_fault(key, said, chain) for key, said in theirs.items()]
    faults = [one for one in found if one is not None]
    if faults:
        many = f"{len(faults)} settings are not to be had as the configuration has them"
        each = "\n  ".join([f"{many}:", *faults])
        raise PlacementError(each if faults[1:] else faults[0])


def _fault(key: str, said: Any, chain: Mapping[str, tuple[Any, str]]) -> str | None:
    """What is wrong with a setting beside the chain, and what to write."""
    if key in chain:
        other, ours = chain[key]
        return None if said == other else str(_clash(key, said, ours))
    switch = said.get("enabled") if isinstance(said, Mapping) else said  # type: ignore[reportUnknownMemberType]
    if key in _PASSED or switch is False:
        return None
    if key in _HOMES:
        return (
            f"{key}={said!r} of the configuration has its place in the chain; "
            f"leave it out, and write {_HOMES[key]}"
        )
    return (
        f"{key}={said!r} of the configuration would have no effect: accelx "
        "calls DeepSpeed's gradients and update, not its loop; leave it out"
    )


def _clash(key: str, said: Any, ours: str) -> PlacementError:
    return PlacementError(
        f"the configuration says {key}={said!r}, but the other source is {ours}; "
        "leave one of them out, or write the same in both"
    )


def _offloaded(options: Options, stage: int, zero: dict[str, Any]) -> dict[str, Any]:
    """The settings of ZeRO with the optimizer where it is to be."""
    for key in _OFFLOADS:
        if not isinstance(zero.get(key) or {}, Mapping):
            raise PlacementError(
                f"zero_optimization.{key} wants to be a dict, got {zero[key]!r}; "
                'write {"device": "cpu"}'
            )
    if options.offload:
        said = zero.setdefault("offload_optimizer", {"device": "cpu"})
        if said.get("device") != "cpu":
            raise _clash(
                "zero_optimization.offload_optimizer", said, "shard_model(offload=True)"
            )
    for key in _OFFLOADS:
        where = (zero.get(key) or {}).get("device", "none")
        if where not in ("none", "cpu") or (zero.get(key) or {}).get("super_offload"):
            raise PlacementError(
                f"zero_optimization.{key} wants the device cpu, got {zero[key]!r}; "
                f'write {{"device": "cpu"}}'
            )
        if where == "cpu" and stage < _OFFLOADS[key]:
            raise PlacementError(
                f"{key} wants slices to offload, got stage={stage}, which keeps them "
                f"whole on every rank; write stage={max(2, _OFFLOADS[key])}, or leave "
                "it out"
            )
    away = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if stage in (1, 2) and not away:
        zero.setdefault("compute_grad_norm", False)  # clip takes it, where it is asked
    return zero


def check(options: Options, unused: str, tx: Transform) -> None:
    """Refuse what ZeRO cannot do, of the options and of the chain, by name."""
    stage = stage_of(options)
    config(options, tx)
    if unused == "allow":
        raise PlacementError(
            "deepspeed gives a weight without a gradient one of zeros, and unused="
            '"allow" wants it left alone; freeze such weights, or write '
            'shard_model(env, "ddp", unused="allow")'
        )
    for name, (least, why) in _CANNOT.items():
        asked = options.methods if name == "methods" else tx.find(name)
        if stage >= least and asked:
            raise PlacementError(
                f"{name} cannot be had with ZeRO stage {stage}: {why}; write stage="
                f'{least - 1}, or shard_model(env, "fsdp2")'
            )
    spec = tx.find("with_precision")
    wanted = None if spec is None else spec.precision
    if stage and wanted is not None and wanted.param not in (None, "fp32"):
        raise PlacementError(
            "ZeRO keeps the weights that it updates in fp32, but with_precision asks "
            f'for param={wanted.param!r}; write with_precision("bf16"), which computes '
            'in bf16, or stage=0, or shard_model(env, "fsdp2")'
        )


_CANNOT = {  # name -> from which stage, and why
    "clip_value": (1, "gradients are in flat slices inside DeepSpeed"),
    "with_ema": (3, "weights are in flat slices inside DeepSpeed"),
    "compile": (3, "gathering inside compiled blocks is not tested"),
    "methods": (3, "DeepSpeed gathers for forward alone"),
}
