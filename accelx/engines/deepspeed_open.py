"""DeepSpeed, imported where it is used, quietly, and leaving nothing behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from accelx.env import lent
from accelx.errors import MissingExtraError, PlacementError
from accelx.records import Env

OLDEST = (0, 19, 5)  # the first that offloads where the step is the boundary
SHARED = "deepspeed_shm_comm"  # a kernel for inference, compiled for half a minute


def initialize(env: Env, model: Any, optimizer: Any, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around `model` and a torch `optimizer`. A collective.

    The optimizer's groups hold flat slices afterwards, the model hooks and, under stage
    3, slices. Raises MissingExtraError where DeepSpeed is missing or too old.
    """
    with _ready(env) as deepspeed:
        try:
            made = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
        except (AssertionError, ValueError) as error:
            raise PlacementError(
                f"DeepSpeed does not take this model, {type(optimizer).__name__} and "
                f"configuration together ({error}), which is, with what accelx adds, "
                f"{config!r}; leave out, or change, what it names"
            ) from error
    return made[0]


def check(env: Env, zero: dict[str, Any]) -> None:
    """Refuse settings of ZeRO that DeepSpeed does not know, before a model is made.

    Raises PlacementError with what DeepSpeed says, MissingExtraError as `initialize`.
    """
    with _quietly(env):
        kind = _imported(env).runtime.zero.config.DeepSpeedZeroConfig
        try:
            kind(**zero)
        except ValueError as error:  # pydantic's
            said = [
                f"{'.'.join(map(str, one['loc'])) or 'all'}: {one['msg']}"
                for one in getattr(error, "errors", list)()
            ]
            raise PlacementError(
                f"zero_optimization of the configuration, {zero!r}, is not as "
                f"DeepSpeed wants it ({'; '.join(said) or error}); leave that out, or "
                "correct it"
            ) from error


def save(env: Env, engine: Any, folder: str, name: str) -> None:
    """Have DeepSpeed write a checkpoint of its own. A collective."""
    with _quietly(env):
        engine.save_checkpoint(folder, tag=name)


@contextmanager
def slicing(env: Env, config: dict[str, Any]) -> Generator[Callable[[Any], None]]:
    """A function that puts a slice of rank 0's weight in a weight's place, of stage 3.

    It is a collective. Raises MissingExtraError as `initialize`.
    """
    first: list[Any] = []

    def one(weight: Any) -> None:
        if first:
            first[0].convert_to_zero_parameters(param_list=[weight])
            return
        alone = torch.nn.ParameterList([weight])
        deepspeed.zero.Init(module=alone, config_dict_or_path=config)
        first.append(weight)

    with _ready(env) as deepspeed:
        yield one


@contextmanager
def _ready(env: Env) -> Generator[Any]:
    """The package, quiet, and in touch with the other ranks."""
    with _quietly(env):
        deepspeed = _imported(env)
        _join(deepspeed)
        _seated(deepspeed, env)
        yield deepspeed


@contextmanager
def _quietly(env: Env) -> Generator[None]:
    """Without its log and warnings, in an environment as it asks for, undone after.

    It takes LOCAL_RANK, which not every launcher sets, for the number of the device.
    """
    kind = env.device.partition(":")[0]
    before = logging.root.manager.disable
    with lent({"LOCAL_RANK": _number(env), "DS_ACCELERATOR": kind}):
        logging.disable(max(before, logging.WARNING))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


def _number(env: Env) -> str:
    return env.device.partition(":")[2] or str(env.local_rank)


def _imported(env: Env) -> Any:
    try:
        import deepspeed as imported
    except ImportError as error:
        raise MissingExtraError(
            'shard_model(env, "deepspeed") wants the package deepspeed, but it does '
            f"not import ({error}); write pip install 'accelx[deepspeed]'"
        ) from error
    deepspeed: Any = imported
    version = tuple(int(n) for n in deepspeed.__version__.split("+")[0].split(".")[:3])
    if version < OLDEST:
        raise MissingExtraError(
            f"accelx wants deepspeed {'.'.join(map(str, OLDEST))} or newer, got "
            f"{deepspeed.__version__}; write pip install 'accelx[deepspeed]'"
        )
    there, here = deepspeed.get_accelerator().device_name(), env.device.split(":")[0]
    if there != here:
        raise PlacementError(
            f"this rank's device is {env.device}, but deepspeed, which was imported "
            f"before, has chosen {there}; import it after ax.init, or start with "
            f"DS_ACCELERATOR={here}"
        )
    return deepspeed


def _seated(deepspeed: Any, env: Env) -> None:
    """Tell stage 3, which asks the environment within a step, too, its local rank.

    The one thing that its file wants of `os`; so no variable need be left behind.
    """
    lent_os = SimpleNamespace(environ={"LOCAL_RANK": _number(env)})
    deepspeed.runtime.zero.utils.os = lent_os


def _join(deepspeed: Any) -> None:
    """Have DeepSpeed talk over the group that is open, without compiling anything."""
    import torch.distributed as dist

    known = deepspeed.ops.__compatible_ops__
    possible = known.get(SHARED)
    known[SHARED] = False
    try:
        deepspeed.comm.init_distributed(verbose=False)
    finally:
        known[SHARED] = possible
    # names that torch 2.13 warns about, by those that it has in their place
    wire = deepspeed.comm.comm.cdb
    for ours, theirs in (
        ("all_gather_function", "all_gather_single"),
        ("reduce_scatter_function", "reduce_scatter_single"),
    ):
        setattr(wire, ours, getattr(dist, theirs, getattr(wire, ours)))
