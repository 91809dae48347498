"""What torch does for each word of a tensor-parallel plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from accelx.errors import PlacementError

MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("column", "column_gather", "loss"), (nn.Linear,)),
    **dict.fromkeys(("row", "row_scatter", "row_whole"), (nn.Linear,)),
    **dict.fromkeys(("embedding", "embedding_scatter"), (nn.Embedding,)),
}
POSITIONS = 1  # the dim of an activation that counts positions


def parallel_style(style: Any) -> Any:
    """torch's ParallelStyle for a style that cuts a module; None for one by hooks."""
    from torch.distributed.tensor import Replicate, Shard, parallel as tp

    whole, positions = Replicate(), Shard(POSITIONS)
    made: dict[str, Callable[[], Any]] = {
        "column": tp.ColwiseParallel,
        "column_gather": lambda: tp.ColwiseParallel(output_layouts=whole),
        "loss": lambda: tp.ColwiseParallel(use_local_output=False),
        "row": tp.RowwiseParallel,
        "row_whole": lambda: tp.RowwiseParallel(input_layouts=whole),
        "row_scatter": lambda: tp.RowwiseParallel(output_layouts=positions),
        "embedding": lambda: tp.RowwiseParallel(input_layouts=whole),
        "embedding_scatter": lambda: tp.RowwiseParallel(
            input_layouts=whole, output_layouts=positions
        ),
        "sequence": lambda: tp.SequenceParallel(use_local_output=True),
        "sequence_gather": lambda: tp.SequenceParallel(use_local_output=True),
    }
    if not isinstance(style, str):
        return style
    return made[style]() if style in made else None


def hook(module: nn.Module, style: Any, mesh: Any) -> None:
    """Add what a style does to the inputs or the output of `module`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def moved(x: Tensor, before: Any, after: Any) -> Any:
        cut = DTensor.from_local(x, mesh, [before], run_check=False)
        return cut.redistribute(placements=[after])

    whole, positions = Replicate(), Shard(POSITIONS)
    if style == "scatter":
        first_input(module, lambda x: moved(x, whole, positions).to_local())
    elif style == "gather":
        # as a DTensor: the sum of its gradients and their cut are one collective
        first_input(module, lambda x: moved(x, positions, whole))
    elif style == "sequence_gather":
        module.register_forward_hook(
            lambda m, args, out: moved(out, positions, whole).to_local()
        )


def first_input(module: nn.Module, change: Callable[[Tensor], Any]) -> None:
    """Change the first floating tensor that `module` is called with."""

    def before(m: nn.Module, args: Any, kwargs: Any) -> Any:
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:i], change(value), *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, name: change(value)}
        raise PlacementError(
            f"a {type(m).__name__} whose input is cut wants a floating tensor, got "
            "none; name another module in the plan of shard_tensors"
        )

    module.register_forward_pre_hook(before, with_kwargs=True)
