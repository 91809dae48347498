"""Which stored weights a model starts from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from accelx.match import Selector
from accelx.records import Pass, Rules, Transform, code


@attrs.frozen(repr=False)
class LoadWeights:
    """Spec of load_weights."""

    url: str
    rename: Any = None
    only: Any = None
    strict: bool = True

    def __repr__(self) -> str:
        return code("load_weights", self)

    def fills(self, name: str) -> bool:
        """Whether the weight `name` gets its numbers here, or an error is raised."""
        from accelx.saves.load import takes

        return self.strict and takes(self.only, name)


def load_weights(
    url: str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    only: Selector | tuple[Selector, ...] | None = None,
    strict: bool = True,
) -> Transform:
    """Start from the weights at `url`: safetensors of any origin, or a checkpoint.

    `url` is a path or fsspec URL: of a .safetensors file; of a folder with
    model.safetensors or model.safetensors.index.json, as transformers writes; or what
    save_state was given. Each rank reads the bytes of its own slices, into place. In a
    chain the model may be on the meta device, and one given as a function is, under
    fsdp2, made without numbers that would be overwritten. `state.slots["load_weights"]`
    says what was read.

    rename: {name in the file: name here}, or a function of the former. only: globs over
    names here, or a function (name, None) -> bool; what it does not take stays as it
    is. strict: whether names that are missing, or left over in the file, are an error.
    Floats are cast into the model's dtype, rounding to nearest; other dtypes must be
    the model's. Tied names are one weight, of which the file may hold any name.

    Alone, `load_weights(url)(module)` fills a plain or placed module and returns it,
    without a collective. Not neutral. Raises CheckpointError that lists all names,
    shapes and dtypes that do not fit, before a number is read; DamagedError for a file
    that is not sound. Effects: reads the store, fills the model in place; in a chain,
    collectives.
    """
    kept = tuple(only) if isinstance(only, list) else only
    spec = LoadWeights(os.fspath(url), rename, kept, strict)
    rules = (
        Rules(once=True, why="the second would overwrite the weights of the first"),
        Rules(
            after=("shard_model", "with_precision"),
            why="weights are read into their slices, in their dtypes",
        ),
    )
    one = Pass(
        "load_weights",
        spec,
        place=lambda state, tx: _placed(spec, state, tx),
        alone=lambda model: _alone(spec, model),
        rules=rules,
    )
    return Transform((one,))


def _placed(spec: LoadWeights, state: Any, tx: Transform) -> Any:
    from accelx.engines import copies
    from accelx.saves.contents import flat_of
    from accelx.saves.weights import load_into
    from accelx.state import with_slot

    shard, env = tx.find("shard_model"), None
    if shard is None:
        state = attrs.evolve(state, model=copies.furnished(state.model, tx))
    else:
        env = shard.env
    loaded = load_into(
        *(state.model, spec.url, spec.rename, spec.only, spec.strict, env),
        flat_of(state),
    )
    return with_slot(state, "load_weights", loaded)


def _alone(spec: LoadWeights, model: Any) -> Any:
    from torch import nn

    from accelx.errors import PlacementError
    from accelx.saves.weights import load_into

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"load_weights(url)(module) wants a torch.nn.Module, got "
            f"{type(model).__name__}; put it into a chain for ax.init, or write "
            "load_weights(url)(Net(...))"
        )
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise PlacementError(
            f"load_weights alone wants memory to read into, but the weights of this "
            f"{type(model).__name__} are on the meta device; write "
            "ax.init(ax.load_weights(url), module).model"
        )
    load_into(model, spec.url, spec.rename, spec.only, spec.strict, None)
    return model
