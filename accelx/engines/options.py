"""What each kind of placement takes, checked on data alone."""

from __future__ import annotations

import difflib
import math
from typing import Any

import attrs

from accelx.env_device import several
from accelx.env_part import sums_env
from accelx.errors import PlacementError
from accelx.records import Env, Transform, code

KINDS = ("ddp", "fsdp2", "hsdp", "deepspeed", "xla")
SLICED = ("fsdp2", "hsdp")
WHOLE = ("ddp", "deepspeed")  # a model that every rank makes in full
WITH_OPTIMIZERS = ("deepspeed",)  # that place once more, when there are optimizers
TOKENS = ("sequence", "expert")  # axes whose ranks have other tokens of one model
SHARING = ("stage", "tensor")  # axes whose ranks have other parts of it
MESH = ("replicate", "shard")  # axes of hsdp: copies outside, slices inside
HOOKS = ("bf16", "fp16", "powersgd")


@attrs.frozen(repr=False)
class PowerSGD:
    """Send gradients of matrices as two thin ones: `hook=PowerSGD(rank=4)`.

    `rank` is their width. The first `start` steps send gradients whole: what is learned
    first bears no loss. What a step leaves out is added to the next one's gradient.
    Vogels et al. 2019 (arXiv:1905.13727). Raises PlacementError.
    """

    rank: int = 1
    start: int = 1000

    def __attrs_post_init__(self) -> None:
        for name, least in (("rank", 1), ("start", 2)):
            got = getattr(self, name)
            if type(got) is not int or got < least:
                raise PlacementError(
                    f"PowerSGD({name}=...) wants a whole number of at least {least}, "
                    f"got {got!r}; write PowerSGD({name}={least})"
                )

    def __repr__(self) -> str:
        return code("PowerSGD", self)


Hook = str | PowerSGD


@attrs.frozen
class Options:
    """The settings of shard_model beside env, kind, blocks and unused."""

    reshard_after_forward: bool | int = True
    offload: bool | str = False
    ignored: Any = None
    prefetch: int = 0
    methods: tuple[str, ...] = ()
    hook: Hook | None = None
    static_graph: bool = False
    bucket_mb: float | None = None
    stage: int | None = None
    config: dict[str, Any] | None = None


_OF = {
    **dict.fromkeys(("reshard_after_forward", "ignored", "prefetch"), SLICED),
    "offload": (*SLICED, "deepspeed"),
    **dict.fromkeys(("stage", "config"), ("deepspeed",)),
    **dict.fromkeys(("hook", "static_graph", "bucket_mb"), ("ddp",)),
}
_INSTEAD = {
    "ignored": "leave it out: ddp keeps every weight whole",
    "hook": "write with_precision(Precision(reduce='bf16')) to send fewer bits",
}


def check(env: Env, kind: str, blocks: Any, options: Options) -> None:
    """Refuse what the kind does not take, or the Env cannot lay out.

    Raises PlacementError. One rank takes what many would, the axes left out: there is
    nothing to lay out.
    """
    one_of("shard_model(env, kind)", kind, KINDS)
    _device(env, kind)
    everyone, env = env, sums_env(env)
    _values(options)
    for field in attrs.fields(Options):
        kinds = _OF.get(field.name, KINDS)
        got = getattr(options, field.name)
        if got != field.default and kind not in kinds:
            instead = _INSTEAD.get(
                field.name, f"leave it out, or write {' or '.join(map(repr, kinds))}"
            )
            raise PlacementError(
                f"{field.name} is an option of {' and '.join(kinds)}, got "
                f"{field.name}={got!r} for {kind!r}; {instead}"
            )
    if options.prefetch and blocks is None:
        raise PlacementError(
            f"prefetch={options.prefetch} wants blocks that are gathered one at a time,"
            ' got none; write blocks="layers.*"'
        )
    if kind == "hsdp":
        laid_out(env, kind, everyone)
    if env.world > 1 and kind in SLICED:
        divides(options.reshard_after_forward, shards(env, kind))


def _device(env: Env, kind: str) -> None:
    """XLA devices and the kind "xla" come together, in one process."""
    if kind == "xla" and env.world > 1:
        raise PlacementError(several(env.world))
    if (env.device.partition(":")[0] == "xla") != (kind == "xla"):
        instead = (
            'connect(device="xla")' if kind == "xla" else 'shard_model(env, "xla")'
        )
        raise PlacementError(
            f'the kind "xla" is for the device xla and no other, got {kind!r} on '
            f"{env.device}; write {instead}"
        )


def placed_too(name: str, tx: Transform) -> None:
    """Refuse a chain in which a pass that cuts weights has no shard_model beside it."""
    if tx.find("shard_model") is None:
        raise PlacementError(
            f"{name} wants shard_model in the chain, which says how the model lies "
            f"over the other axes; write ax.chain(ax.shard_model(env), ax.{name}(env))"
        )


def one_of(where: str, got: object, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of `choices`, with the nearest."""
    if got not in choices:
        near = difflib.get_close_matches(str(got).lower(), choices, 1, 0.5)
        raise PlacementError(
            f"{where} wants one of {', '.join(map(repr, choices))}, got {got!r}; "
            f"write {(near or choices[1:2])[0]!r}"
        )


def shards(env: Env, kind: str) -> int:
    """In how many slices a weight is cut."""
    if kind == "hsdp" and env.world > 1:  # copies are over the outermost axis
        return env.world // env.axes[0].size
    return env.world


def copies(env: Env, kind: str) -> int:
    """How many ranks hold the same slice."""
    return env.world // shards(env, kind)


def _values(options: Options) -> None:
    reshard, bucket = options.reshard_after_forward, options.bucket_mb
    whole = "a whole number of at least"
    if type(reshard) is not bool and (type(reshard) is not int or reshard < 2):
        _wrong("reshard_after_forward", f"True, False or {whole} 2", reshard, "True")
    if options.offload not in (False, "cpu"):
        _wrong("offload", 'True, False or "cpu"', options.offload, "True")
    if type(options.prefetch) is not int or options.prefetch < 0:
        _wrong("prefetch", f"{whole} 0", options.prefetch, "1")
    if type(options.static_graph) is not bool:
        _wrong("static_graph", "True or False", options.static_graph, "True")
    if bucket is not None and not bucket > 0:
        _wrong("bucket_mb", "a positive number of MiB", bucket, "25")
    for name in options.methods:
        if not isinstance(name, str) or not name.replace(".", "_").isidentifier():  # type: ignore[reportUnnecessaryIsInstance]
            _wrong("methods", "names of methods", options.methods, '("generate",)')
    if isinstance(options.hook, PowerSGD) or options.hook is None:
        return
    one_of("shard_model(hook=...)", options.hook, HOOKS)


def _wrong(name: str, wanted: str, got: object, instead: str) -> None:
    raise PlacementError(
        f"shard_model({name}=...) wants {wanted}, got {got!r}; write {name}={instead}"
    )


def laid_out(env: Env, kind: str, everyone: Env | None = None) -> None:
    """Refuse axes that the kind does not lie over. Raises PlacementError.

    `everyone` has, beside those of `env`, the axes along which ranks share rows.
    """
    names = tuple(axis.name for axis in env.axes)
    if env.world == 1:
        return
    others = tuple(name for name in names if name not in TOKENS)
    if kind == "hsdp" and (others != MESH or names[0] != MESH[0]):
        whole = everyone or env
        there = [axis for axis in whole.axes if axis.name in (*TOKENS, *SHARING)]
        rest = whole.world // math.prod(axis.size for axis in there)
        inside = "".join(f",{axis.name}={axis.size}" for axis in there)
        raise PlacementError(
            "hsdp keeps copies over an axis called replicate, the outermost, each in "
            f"slices over one called shard, but the axes of this Env of {whole.world} "
            f"ranks are ({_shown(whole)}); write env = ax.connect(axes="
            f'"replicate={2 if rest % 2 == 0 else 1},shard=-1{inside}"), or "fsdp2"'
        )
    if kind == "fsdp2" and len(others) > 1:
        instead = '"hsdp"' if others == MESH else "ax.connect() without axes"
        raise PlacementError(
            f"fsdp2 shards over one axis, but this Env has ({_shown(env)}); write "
            f"{instead}"
        )


def _shown(env: Env) -> str:
    return ", ".join(f"{axis.name}={axis.size}" for axis in env.axes) or "none"


def divides(reshard: bool | int, size: int) -> None:
    """Refuse neighbours of unlike number among `size` slices. Raises PlacementError."""
    if type(reshard) is int and size % reshard:
        fits = [n for n in range(2, size + 1) if size % n == 0]
        raise PlacementError(
            f"reshard_after_forward={reshard} keeps weights in slices over {reshard} "
            f"ranks, but they are cut in {size}, which that does not divide; write "
            f"{' or '.join(map(str, fits)) or True}"
        )
