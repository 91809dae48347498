"""The report of a machine: its data, and how that reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelx.doctors import text
from accelx.doctors.advice import advice
from accelx.text import size

Data = Mapping[str, Any]


def report(found: Data) -> dict[str, Any]:
    """What `look` found, with what to change."""
    return {**found, "warnings": advice(found)}


def lines(data: Data) -> list[str]:
    """The report as text that can be pasted anywhere."""
    return [
        *text.facts("accelx doctor", _versions(data)),
        *text.facts("machine", _machine(data)),
        *text.facts("devices", _devices(data)),
        *text.facts("where this process stands", _place(data)),
        *text.facts("other variables", data["variables"].items()),
        *text.facts("limits", _limits(data)),
        *text.facts("optional packages", _packages(data)),
        *_warnings(data["warnings"]),
    ]


def _versions(data: Data) -> Iterator[tuple[str, object]]:
    torch = data["torch"]
    yield "accelx", data["accelx"]
    yield "python", data["python"]
    built = (torch["cuda"] and f"CUDA {torch['cuda']}") or torch["hip"] or "CPU"
    yield "torch", f"{torch['version']}, built for {built}"
    others = [(k, v) for k, v in data["required"].items() if k != "torch"]
    yield "with", ", ".join(f"{name} {found or 'MISSING'}" for name, found in others)


def _machine(data: Data) -> Iterator[tuple[str, object]]:
    system, cpu, memory = data["system"], data["cpu"], data["memory"]
    inside = ", in a container" if system["container"] else ""
    yield "system", f"{system['name']}{inside}"
    quota = f", quota {cpu['quota']:g}" if cpu["quota"] is not None else ""
    nodes = f", {cpu['nodes']} NUMA nodes" if cpu["nodes"] > 1 else ""
    yield "cpus", f"{cpu['usable']} on {cpu['cores']} cores{nodes}{quota}"
    bound = f"{cpu['usable']} of {cpu['present']} CPUs"
    yield "bound to", "all of them" if cpu["usable"] == cpu["present"] else bound
    yield "memory", f"{_size(memory['total'])}, {_size(memory['available'])} available"
    if memory["limit"] is not None:
        yield "container", f"{size(memory['limit'])}, {_size(memory['used'])} used"


def _devices(data: Data) -> Iterator[tuple[str, object]]:
    torch = data["torch"]
    for number, device in enumerate(torch["devices"]):
        more = f", {size(device['memory'])}" if "memory" in device else ""
        yield f"{torch['accelerator']}:{number}", f"{device['name']}{more}"
    if not torch["devices"]:
        yield "accelerator", "none that torch can use"
    if torch["driver"] is not None:
        yield "driver", torch["driver"]
    yield "threads", torch["threads"]
    names = ", ".join(torch["backends"]) or "none"
    yield "backends", f"{names} {torch['nccl']}" if torch["nccl"] else names


def _place(data: Data) -> Iterator[tuple[str, object]]:
    found = data["detected"]
    read = ", ".join(f"{k}={v}" for k, v in found["variables"].items())
    if found["error"]:
        yield "cannot tell", found["error"]
        return
    alone = "one process: no launcher's variables are set"
    yield "launcher", alone if found["launcher"] == "none" else found["launcher"]
    if read:
        yield "because of", read
    yield "rank", f"{found['rank']} of {found['world']}"
    if found["world"] > 1:
        here = f"{found['local_rank']} of {found['local_world']}"
        yield "on node", f"{found['node']} of {found['nodes']}, local rank {here}"
        yield "meets at", found["rendezvous"]
    yield "device", f"{found['device']}, with several ranks over {found['backend']}"


def _limits(data: Data) -> Iterator[tuple[str, object]]:
    for name, limit in data["limits"].items():
        value = size(limit) if limit is not None and name == "memlock" else limit
        yield name, "unlimited" if limit is None else value
    for name, folder in data["folders"].items():
        yield name, f"{size(folder['size'])}, {size(folder['free'])} free"


def _packages(data: Data) -> Iterator[tuple[str, object]]:
    known = data["optional"].items()
    yield "installed", ", ".join(f"{k} {v}" for k, v in known if v) or "none"
    yield "not", ", ".join(k for k, v in known if not v) or "none"


def _warnings(found: list[dict[str, str]]) -> list[str]:
    if not found:
        return ["nothing to warn of"]
    each = [f"  {one['what']}\n    -> {one['remedy']}" for one in found]
    return ["warnings", *each]


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)
