"""Which names are public, and which file each comes from when it is first used."""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers read it as true; `typing` would cost 5 ms here

if TYPE_CHECKING:
    from . import testing as testing
    from .comm import (
        barrier as barrier,
        broadcast as broadcast,
        gather as gather,
        gather_objects as gather_objects,
        gather_rows as gather_rows,
        main_first as main_first,
        on_main as on_main,
        pad as pad,
        reduce as reduce,
        split as split,
    )
    from .data.files import from_files as from_files
    from .data.lengths import by_length as by_length, by_tokens as by_tokens
    from .data.mix import mix as mix
    from .data.pack import block_mask as block_mask, pack as pack
    from .data.sample import sample_rng as sample_rng, seeded as seeded
    from .engines.options import PowerSGD as PowerSGD
    from .engines.placed import Placed as Placed
    from .env import close as close, connect as connect, detect as detect
    from .env_part import along as along
    from .equivalences.check import check_equivalence as check_equivalence
    from .errors import (
        AccelxError as AccelxError,
        CheckpointError as CheckpointError,
        CheckpointWarning as CheckpointWarning,
        CollectiveError as CollectiveError,
        DamagedError as DamagedError,
        DataError as DataError,
        DetectError as DetectError,
        LossError as LossError,
        MissingExtraError as MissingExtraError,
        NeutralityWarning as NeutralityWarning,
        OrderError as OrderError,
        PlacementError as PlacementError,
        PrecisionError as PrecisionError,
        SpawnError as SpawnError,
        SpentStateError as SpentStateError,
        StorageError as StorageError,
        UnusedParameterError as UnusedParameterError,
    )
    from .explain import explain as explain
    from .fit import fit_batch as fit_batch
    from .launch.magic import load_ipython_extension as load_ipython_extension
    from .loader import Loader as Loader
    from .memory import MemoryReport as MemoryReport, memory_report as memory_report
    from .nonfinite import (
        NonFiniteError as NonFiniteError,
        find_nonfinite as find_nonfinite,
    )
    from .optimizers import param_groups as param_groups
    from .passes.accumulate import accumulate as accumulate
    from .passes.clip import clip as clip
    from .passes.clip_value import clip_value as clip_value
    from .passes.compile import compile as compile, recompiles as recompiles
    from .passes.load_state import load_state as load_state
    from .passes.load_weights import load_weights as load_weights
    from .passes.on_preempt import on_preempt as on_preempt
    from .passes.quantize import quantize as quantize
    from .passes.remat import remat as remat
    from .passes.save_state import save_state as save_state
    from .passes.shard_experts import shard_experts as shard_experts
    from .passes.shard_loader import shard_loader as shard_loader
    from .passes.shard_model import shard_model as shard_model
    from .passes.shard_sequence import shard_sequence as shard_sequence
    from .passes.shard_stages import shard_stages as shard_stages
    from .passes.shard_tensors import shard_tensors as shard_tensors
    from .passes.with_diloco import with_diloco as with_diloco
    from .passes.with_ema import with_ema as with_ema
    from .passes.with_local_sgd import with_local_sgd as with_local_sgd
    from .passes.with_lockstep import with_lockstep as with_lockstep
    from .passes.with_precision import with_precision as with_precision
    from .passes.with_schedule import with_schedule as with_schedule
    from .records import (
        Axis as Axis,
        Engine as Engine,
        Env as Env,
        Mean as Mean,
        Out as Out,
        Pass as Pass,
        Precision as Precision,
        Rules as Rules,
        Transform as Transform,
    )
    from .report import describe as describe
    from .rng import seed as seed
    from .rows import row_weights as row_weights
    from .run import (
        apply as apply,
        evaluating as evaluating,
        feed as feed,
        frozen as frozen,
        grads as grads,
        init as init,
        measure as measure,
        step as step,
    )
    from .run_averaged import averaged as averaged
    from .saves.commit import latest as latest
    from .saves.convert import import_state as import_state
    from .saves.export import export as export
    from .saves.export_state import export_state as export_state
    from .saves.retain import retain as retain
    from .saves.stream import stream_weights as stream_weights
    from .schedules import (
        warmup_cosine as warmup_cosine,
        warmup_linear as warmup_linear,
    )
    from .spawn import spawn as spawn
    from .state import State as State, fork as fork, with_slot as with_slot
    from .transform import (
        chain as chain,
        identity as identity,
        transform as transform,
    )

# File -> the public names it defines. A test holds the imports above to it.
_NAMES = {
    "errors": (
        *("AccelxError", "CheckpointError", "CollectiveError", "DamagedError"),
        *("DataError", "DetectError", "LossError", "MissingExtraError", "OrderError"),
        *("PlacementError", "PrecisionError", "SpawnError", "SpentStateError"),
        *("StorageError", "UnusedParameterError"),
        *("CheckpointWarning", "NeutralityWarning"),
    ),
    "records": (
        *("Axis", "Engine", "Env", "Mean", "Out", "Pass", "Precision", "Rules"),
        "Transform",
    ),
    "transform": ("chain", "identity", "transform"),
    "explain": ("explain",),
    "state": ("State", "fork", "with_slot"),
    "optimizers": ("param_groups",),
    "schedules": ("warmup_cosine", "warmup_linear"),
    "engines.placed": ("Placed",),
    "env": ("close", "connect", "detect"),
    "env_part": ("along",),
    "loader": ("Loader",),
    "data.files": ("from_files",),
    "data.lengths": ("by_length", "by_tokens"),
    "data.mix": ("mix",),
    "data.pack": ("block_mask", "pack"),
    "data.sample": ("sample_rng", "seeded"),
    "rows": ("row_weights",),
    "fit": ("fit_batch",),
    "report": ("describe",),
    "rng": ("seed",),
    "comm": (
        *("barrier", "broadcast", "gather", "gather_objects", "gather_rows"),
        *("main_first", "on_main", "pad", "reduce", "split"),
    ),
    "engines.options": ("PowerSGD",),
    "passes.accumulate": ("accumulate",),
    "passes.clip": ("clip",),
    "passes.clip_value": ("clip_value",),
    "passes.compile": ("compile", "recompiles"),
    "passes.load_state": ("load_state",),
    "passes.load_weights": ("load_weights",),
    "passes.on_preempt": ("on_preempt",),
    "passes.quantize": ("quantize",),
    "passes.remat": ("remat",),
    "passes.save_state": ("save_state",),
    "passes.shard_experts": ("shard_experts",),
    "passes.shard_loader": ("shard_loader",),
    "passes.shard_model": ("shard_model",),
    "passes.shard_stages": ("shard_stages",),
    "passes.shard_sequence": ("shard_sequence",),
    "passes.shard_tensors": ("shard_tensors",),
    "passes.with_diloco": ("with_diloco",),
    "passes.with_ema": ("with_ema",),
    "passes.with_local_sgd": ("with_local_sgd",),
    "passes.with_lockstep": ("with_lockstep",),
    "passes.with_precision": ("with_precision",),
    "passes.with_schedule": ("with_schedule",),
    "run": (
        *("apply", "evaluating", "feed", "frozen", "grads", "init", "measure"),
        "step",
    ),
    "run_averaged": ("averaged",),
    "saves.commit": ("latest",),
    "saves.convert": ("import_state",),
    "saves.export": ("export",),
    "saves.export_state": ("export_state",),
    "saves.retain": ("retain",),
    "saves.stream": ("stream_weights",),
    "spawn": ("spawn",),
    "launch.magic": ("load_ipython_extension",),
    "testing": ("testing",),
    "equivalences.check": ("check_equivalence",),
    "memory": ("MemoryReport", "memory_report"),
    "nonfinite": ("NonFiniteError", "find_nonfinite"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll] one list, not two


def _public(name: str, module: ModuleType) -> object:
    """What `name` stands for: in its file, or the file itself where it is the name."""
    if _HOMES[name] == name and not hasattr(module, name):
        return module
    return getattr(module, name)


class _Package(ModuleType):
    """The package itself, whose public names win over files of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # Importing accelx/transform.py binds that file to `accelx.transform`, where the
        # function of that name belongs. The import statement binds by setattr.
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = _public(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # cloudpickle sends functions with their globals, where `ax` is; a module of a
        # plain class it sends by name.
        return import_module, (self.__name__,)


if not TYPE_CHECKING:  # a checker would take it to mean that any name is there

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = _public(name, import_module(f"{__name__}.{home}"))
        setattr(sys.modules[__name__], name, value)  # the next look-up costs nothing
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
