"""How many ranks, with which settings, and where each setting came from; pure."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Literal, NoReturn

import attrs

from accelx.errors import SpawnError
from accelx.launch.elastic import Elastic, decide_elastic
from accelx.launch.machine import Machine, cores, near, shares
from accelx.launch.options import PROGRAM
from accelx.launch.settings import KNOWN, Choice, File, decide
from accelx.launch.system import System, decide as decide_system

# Whoever sets one of these places threads on purpose; binding would fight it.
PER_CORE = 32  # ranks that a core may have, for trying things out
PLACED_BY = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


@attrs.frozen
class Asked:
    """The command line as a record."""

    target: str  # path of a script, dotted name of a module, or folder of a call
    args: tuple[str, ...] = ()  # the script's own
    kind: Literal["script", "module", "call"] = "script"
    show: bool = False
    config: str | None = None  # path of a settings file
    words: Mapping[str, str] = attrs.field(factory=dict[str, str])  # settings as given


@attrs.frozen
class Setting:
    """One resolved setting, and who decided it."""

    name: str
    value: str
    source: str  # "command line", "environment", a file or "default", and why


@attrs.frozen
class Plan:
    """Everything that is decided before a rank starts."""

    asked: Asked
    num_ranks: int
    host: str
    system: System
    grace: float  # seconds
    timeout: float | None  # seconds that the whole run may take
    prefix: bool
    log_dir: str | None
    exports: Mapping[str, str]  # variables that every rank gets
    shares: tuple[tuple[int, ...], ...]  # CPU numbers of each rank; empty: not bound
    settings: tuple[Setting, ...]  # as `--print` shows them
    elastic: Elastic | None = None  # None: ranks of this machine, started once


def asked_for(given: argparse.Namespace) -> Asked:
    """The record of what `parse` read."""
    words = {known.name: getattr(given, known.name) for known in KNOWN}
    return Asked(
        target=given.target,
        args=tuple(given.args),
        kind=given.kind or "script",
        show=given.print,
        config=given.config,
        words={name: text for name, text in words.items() if text is not None},
    )


def resolve(
    asked: Asked,
    environ: Mapping[str, str],
    machine: Machine,
    file: File | None = None,
) -> Plan:
    """The plan for a command line: each setting from the first source that has it.

    The sources are the command line, the environment, the file and the default, in that
    order. A call from a program has its arguments alone. Raises SpawnError for what
    cannot be started.
    """
    _check_outermost(asked, environ)
    call = asked.kind == "call"
    chosen = decide(asked.words, {} if call else environ, None if call else file)
    count = _num_ranks(chosen["num_ranks"], machine)
    ranks = int(count.value)
    check_gpus(ranks, machine.gpus, asked.target)
    check_cores(ranks, len(machine.cpus))
    threads = _threads(environ, machine, ranks)
    bound, cpus = _bound(
        chosen["bind"], environ, machine, ranks, int(_first(threads.value))
    )
    system = decide_system(machine.system, machine.has, environ)
    elastic, about = decide_elastic(chosen, ranks, asked.target, environ)
    if call and elastic is not None:
        _refuse_elastic(elastic)
    several = elastic is not None and elastic.most > 1
    exports = (threads, *(() if several else _interfaces(environ, system)))
    said = _said(asked, chosen, file)
    said += [
        Setting(name, _shown(name, c.value), c.source) for name, c in about.items()
    ]
    meeting = _picked(environ) if several else _meeting(environ)
    return Plan(
        asked=asked,
        num_ranks=ranks,
        host=machine.host,
        system=system,
        grace=chosen["grace"].value,
        timeout=chosen["timeout"].value,
        prefix=chosen["prefix"].value,
        log_dir=chosen["log_dir"].value,
        exports={s.name: s.value for s in exports if s.source != "environment"},
        shares=bound,
        settings=(count, *said, *meeting, *exports, cpus, _gpus(machine)),
        elastic=elastic,
    )


def check_gpus(num_ranks: int, gpus: int, target: str) -> None:
    """Refuse more ranks than CUDA devices, where torch will use such devices."""
    if 0 < gpus < num_ranks:
        hidden = f"CUDA_VISIBLE_DEVICES= {PROGRAM} -n {num_ranks} {target}"
        raise SpawnError(
            f"each rank wants a GPU of its own: {num_ranks} ranks were asked for and "
            f"{gpus} GPU{'s are' if gpus > 1 else ' is'} visible; write -n {gpus}, or "
            f"hide the GPUs to run on the CPU: {hidden}"
        )


def check_cores(num_ranks: int, cores: int) -> None:
    """Refuse so many ranks that starting them would bring the machine down."""
    most = PER_CORE * max(1, cores)
    if num_ranks > most:
        raise SpawnError(
            f"each rank is a process of its own with work for a core: {num_ranks} "
            f"ranks were asked for and {cores} cores are here, which carry {most} at "
            f"most; write -n {max(1, cores)}"
        )


def table(plan: Plan) -> str:
    """The plan as `--print` shows it."""
    rows = [("setting", "value", "from")]
    rows += [(s.name, s.value, s.source) for s in plan.settings]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    head = f"{plan.num_ranks} ranks of {plan.asked.target} on {plan.host}; none started"
    return "\n".join([head, "", *lines])


def _check_outermost(asked: Asked, environ: Mapping[str, str]) -> None:
    rank, world = environ.get("RANK"), environ.get("WORLD_SIZE", "1")
    if rank and world != "1" and asked.kind != "call":
        raise SpawnError(
            f"{PROGRAM} starts all ranks of a run, but this process already is rank "
            f"{rank} of {world}; write python {asked.target} here, or unset RANK and "
            "WORLD_SIZE"
        )


def _refuse_elastic(elastic: Elastic) -> NoReturn:
    raise SpawnError(
        "a function or a cell is run by ranks of this machine, which start once, got "
        f"nodes {elastic.nodes} and restarts {elastic.restarts}; write it to a script "
        f"and {PROGRAM} --nodes {elastic.nodes}, or leave both settings out"
    )


def _num_ranks(count: Choice, machine: Machine) -> Setting:
    if count.value is None:
        raise SpawnError(
            "the following is required: -n N, or ACCELX_NUM_RANKS=N in the "
            "environment, or num_ranks = N in accelx.toml\n"
            f"all options: {PROGRAM} --help"
        )
    if count.value != "auto":
        return Setting("num_ranks", str(count.value), count.source)
    nodes = len({cpu.node for cpu in machine.cpus})
    what = "GPU" if machine.gpus else "NUMA node"
    value = str(machine.gpus or nodes)
    return Setting("num_ranks", value, f"{count.source}: auto, one per {what}")


def _said(
    asked: Asked, chosen: Mapping[str, Choice], file: File | None
) -> list[Setting]:
    where = "default: accelx.toml of this folder"
    return [
        Setting(asked.kind, " ".join([asked.target, *asked.args]), "command line"),
        Setting(
            "config",
            file.path if file else "none",
            where if asked.config is None else "command line",
        ),
        *(
            Setting(name, _shown(name, chosen[name].value), chosen[name].source)
            for name in ("log_dir", "prefix", "grace", "timeout", "bind")
        ),
    ]


def _shown(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "auto" if name == "node_rank" else "none"
    return f"{value:g} s" if isinstance(value, float) else str(value)


def _meeting(environ: Mapping[str, str]) -> list[Setting]:
    taken = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    unused = f"; {' and '.join(taken)} of the environment not used" if taken else ""
    return [
        Setting("MASTER_ADDR", "127.0.0.1", f"default: this machine only{unused}"),
        Setting("MASTER_PORT", "a free one", f"default: taken at the start{unused}"),
    ]


def _picked(environ: Mapping[str, str]) -> list[Setting]:
    """The same of ranks on several nodes."""
    where = "default: of the node of rank 0, at each attempt"
    name, why = "GLOO_SOCKET_IFNAME", "what reaches the rendezvous"
    return [
        Setting("MASTER_ADDR", "an address", where),
        Setting("MASTER_PORT", "a free one", where),
        _variable(environ, name, "an interface", why),
    ]


def _interfaces(environ: Mapping[str, str], system: System) -> list[Setting]:
    return [
        _variable(environ, name, system.loopback, "this machine only")
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    ]


def _variable(environ: Mapping[str, str], name: str, default: str, why: str) -> Setting:
    if environ.get(name):
        return Setting(name, environ[name], "environment")
    return Setting(name, default, f"default: {why}")


def _threads(environ: Mapping[str, str], machine: Machine, ranks: int) -> Setting:
    name = "OMP_NUM_THREADS"
    given = environ.get(name, "")
    if given and not _first(given).isdecimal():
        raise SpawnError(
            f"{name} is a number of threads, got {given!r}; write {name}=4, or unset it"
        )
    if given:
        return Setting(name, given, "environment")
    whole = len(cores(machine.cpus))
    usable = whole if machine.quota is None else min(whole, max(1, int(machine.quota)))
    why = f"default: {usable} cores / {ranks} ranks"
    return Setting(name, str(max(1, usable // ranks)), why)


def _first(threads: str) -> str:
    return threads.partition(",")[
        0
    ].strip()  # OpenMP takes a list, one per nesting level


def _bound(
    bind: Choice,
    environ: Mapping[str, str],
    machine: Machine,
    ranks: int,
    threads: int,
) -> tuple[tuple[tuple[int, ...], ...], Setting]:
    whole = bind.value == "numa"
    split = (near if whole else shares)(machine.cpus, ranks)
    why = _why_shared(bind, environ, machine, ranks, threads)
    if why is not None:
        return (), Setting("cpus", "shared", why)
    if not split or not _binds(machine):
        raise SpawnError(
            f"--bind {bind.value} wants a core for each of {ranks} ranks, got "
            f"{len(cores(machine.cpus))} cores on {machine.system}; write --bind auto"
        )
    text = ", ".join(f"{rank}: {_ranges(cpus)}" for rank, cpus in enumerate(split))
    source = f"{bind.source}: {bind.value}"
    what = "whole NUMA nodes" if whole else "whole cores"
    return tuple(split), Setting("cpus", text, f"{source}, {what}")


def _why_shared(
    bind: Choice,
    environ: Mapping[str, str],
    machine: Machine,
    ranks: int,
    threads: int,
) -> str | None:
    """Why ranks are not bound to cores; None where they are."""
    if bind.value == "never":
        return f"{bind.source}: never"
    if bind.value in ("always", "numa"):
        return None
    each = len(cores(machine.cpus)) // ranks
    placed = [name for name in PLACED_BY if environ.get(name)]
    if placed:
        return f"environment: {placed[0]} places threads"
    if ranks == 1 or not _binds(machine):
        return "default: nothing to divide"
    if each < max(2, threads):
        # One core would hold a rank's loader workers and its own thread at once.
        return f"default: cores per rank: {each}; bound from {max(2, threads)}"
    return None


def _binds(machine: Machine) -> bool:
    return decide_system(machine.system, machine.has).binds


def _ranges(numbers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


def _gpus(machine: Machine) -> Setting:
    value = "one per rank, by local rank" if machine.gpus else "none used"
    return Setting("gpus", value, f"default: {machine.gpus} visible")
