"""What all ranks' measurements come to: pure, from what each of them found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelx.doctors import text
from accelx.text import size

Data = Mapping[str, Any]
APART = 1.0  # seconds between clocks: ages of checkpoints are told by them


def judged(each: Sequence[Data]) -> dict[str, Any]:
    """The ranks' findings, the speed of all together, and what is not well."""
    first = each[0]
    kept = ("world", "launcher", "backend")
    return {
        **{name: first[name] for name in kept},
        "hosts": len({one["host"] for one in each}),
        "ranks": [dict(one) for one in each],
        "all_reduce": _speeds(each),
        "warnings": [{"what": w, "remedy": r} for w, r in _warnings(each)],
    }


def _speeds(each: Sequence[Data]) -> list[dict[str, Any]]:
    """By the slowest rank; bandwidth as nccl-tests count it, of the bus."""
    world = each[0]["world"]
    found = list[dict[str, Any]]()
    for of_ranks in zip(*(one["all_reduce"] for one in each), strict=True):
        seconds = max(one["seconds"] for one in of_ranks)
        count = of_ranks[0]["bytes"]
        bus = 2 * (world - 1) / world * count / seconds
        found.append({"bytes": count, "seconds": seconds, "bandwidth": bus})
    return found


def _warnings(each: Sequence[Data]) -> Iterator[tuple[str, str]]:
    several = len({one["host"] for one in each}) > 1
    for one in each:
        who = f"rank {one['rank']} on {one['host']}"
        yield from _name(one, who, several)
        for port in one["ports"]:
            yield (
                f"{who} cannot reach rank {port['to']} at {port['address']}: "
                f"{port['why']}",
                "open ports between the nodes to each other, or name the interface "
                "that they share: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
            )
        ahead = one["clock"]["ahead"]
        if abs(ahead) > APART:
            yield (
                f"the clock of {who} is {abs(ahead):.1f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} that of rank 0",
                "set the clocks by NTP (chronyd or systemd-timesyncd)",
            )
        if not all(one["right"] for one in one["all_reduce"]):
            yield (
                f"{who} got wrong sums from all_reduce",
                "try backend='gloo', and NCCL_P2P_DISABLE=1 to find the faulty link",
            )


def _name(one: Data, who: str, several: bool) -> Iterator[tuple[str, str]]:
    if not one["resolves"]:
        yield (
            f"{who}: the host's own name does not resolve ({one['why']})",
            "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface",
        )
    elif several and all(a.startswith(("127.", "::1")) for a in one["resolves"]):
        yield (
            f"{who}: its name resolves to {', '.join(one['resolves'])}, which other "
            "nodes cannot reach",
            "mend /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface between nodes",
        )


def lines(data: Data) -> list[str]:
    """Tables of ranks and of speed, and what to change."""
    over = data["backend"] or "nothing: one process"
    return [
        f"{data['world']} ranks on {data['hosts']} hosts, by {data['launcher']}, "
        f"over {over}",
        "",
        *text.columns(
            ">rank host address device >connect >latency >clock ports",
            (_row(one) for one in data["ranks"]),
        ),
        "",
        *text.columns(">all_reduce >time >bandwidth", map(_speed, data["all_reduce"])),
        "",
        *_told(data["warnings"]),
    ]


def _row(one: Data) -> tuple[object, ...]:
    failed = [str(port["to"]) for port in one["ports"]]
    return (
        one["rank"],
        one["host"],
        one["address"],
        one["device"],
        text.duration(one["connect"]),
        text.duration(one["clock"]["latency"]),
        f"{'+' if one['clock']['ahead'] > 0 else ''}"
        f"{text.duration(one['clock']['ahead'])}",
        f"none to {', '.join(failed)}" if failed else "reached",
    )


def _speed(one: Data) -> tuple[str, str, str]:
    speed = f"{size(int(one['bandwidth']))}/s"
    return size(one["bytes"]), text.duration(one["seconds"]), speed


def _told(found: Sequence[Data]) -> list[str]:
    if not found:
        return ["nothing to warn of"]
    return [
        "warnings",
        *(f"  {one['what']}\n    -> {one['remedy']}" for one in found),
    ]
