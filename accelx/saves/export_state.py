"""How a run leaves for the tool whose engine has trained it."""

from __future__ import annotations

import os
from pathlib import Path

from accelx import comm
from accelx.errors import CheckpointError
from accelx.records import Env, check_env
from accelx.saves.together import alike
from accelx.state import State, check_state


def export_state(env: Env, state: State, out: str | os.PathLike[str]) -> str:
    """Write a run as a checkpoint of DeepSpeed's own, which its programs go on with.

    `out` is a folder of a file system that all ranks see. It gets
    `global_step{state.step}`, weights, buffers, the optimizer's state and counts, and
    `latest`: what `engine.save_checkpoint` writes, for the same stage and ranks; its
    ds_to_universal and zero_to_fp32 make of that what fits others. Not in it are the
    random streams, the data position and the slots of other passes: `save_state` has
    those. The state must be placed by shard_model(env, "deepspeed"); one of another
    engine gets there by save_state and load_state.

    A collective; the state is not spent. Returns the path of the checkpoint. Raises
    CheckpointError before anything is written where it cannot be, or is there already.
    """
    check_env("export_state", env)
    check_state("export_state", state)
    placed = state.slots.get("shard_model")
    write = None if placed is None else placed.export
    folder, tag = os.fspath(out), f"global_step{state.step}"
    made = Path(folder) / tag

    def ready() -> None:
        if write is None:
            raise CheckpointError(
                "export_state wants a state that DeepSpeed trains, on several ranks, "
                f"got one of {'no engine' if placed is None else placed.engine.name}; "
                "write save_state(env, url), then load_state(env, url) in a chain with "
                'shard_model(env, "deepspeed"), or export((env, state), out) for '
                "weights alone"
            )
        if "://" in folder:
            raise CheckpointError(
                f"DeepSpeed writes to a folder, got {folder!r}; write a path, and copy "
                "what is there"
            )
        if made.exists():
            raise CheckpointError(
                f"{made} is there already, and a checkpoint is never written over; "
                "give another folder, or delete it"
            )

    alike(env, ready)
    assert write is not None
    write(state, folder, tag)
    comm.barrier(env)
    return str(made)
