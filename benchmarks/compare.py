"""How figures are taken and written down: interleaved rounds, medians of ratios.

The machine is shared, so a time by itself says little: every round runs each variant
once, in turn, and a variant's figure is the median over rounds of its time over that of
the first variant in the same round.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "benchmarks"


def interleaved(
    variants: dict[str, Callable[[], None]],
    rounds: int,
    meet: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; `meet` lines ranks up before each."""
    for run in variants.values():
        if meet:
            meet()
        run()  # warm
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        names = list(variants)
        for name in names if i % 2 == 0 else reversed(names):
            if meet:
                meet()
            start = clock()
            variants[name]()
            times[name].append(clock() - start)
    return times


def cpu() -> float:
    """CPU seconds of this process and of children that have ended, as workers do."""
    each = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in each)


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """For each variant: median ratio to the first, quartiles, median time."""
    first = next(iter(times.values()))
    found = {}
    for name, own in times.items():
        each = [a / b for a, b in zip(own, first, strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        found[name] = {
            "ratio": middle,
            "low": low,
            "high": high,
            "seconds": statistics.median(own),
        }
    return found


def write(
    name: str,
    title: str,
    goals: dict[str, str],
    found: dict[str, dict[str, float]],
    *,
    unit: str,
    per: float,
    rounds: int,
) -> None:
    """Write results/NAME.json, and a table and a plot under docs/benchmarks."""
    (HERE / "results").mkdir(exist_ok=True)
    DOCS.mkdir(parents=True, exist_ok=True)
    head = f"{date.today()}, {platform.machine()}, Python {platform.python_version()}"
    record = {
        "title": title,
        "when": head,
        "rounds": rounds,
        "unit": unit,
        "rows": found,
    }
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"### {title}",
        "",
        f"{head}, {rounds} interleaved rounds; ratio = median over rounds, with "
        "quartiles.",
        "",
        f"| variant | ratio | quartiles | median {unit} | goal |",
        "|---|---|---|---|---|",
    ]
    for variant, row in found.items():
        lines.append(
            f"| {variant} | {row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} "
            f"| {row['seconds'] * per:.1f} | {goals.get(variant, '')} |"
        )
    (DOCS / f"{name}.md").write_text("\n".join(lines) + f"\n\n![{title}]({name}.png)\n")
    _plot(name, title, found)
    print("\n".join(lines))


def _plot(name: str, title: str, found: dict[str, dict[str, float]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(found)
    middle = [found[n]["ratio"] for n in names]
    spread = [
        [found[n]["ratio"] - found[n]["low"] for n in names],
        [found[n]["high"] - found[n]["ratio"] for n in names],
    ]
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(names) + 1.2))
    colors = ["#888888" if "accelx" not in n else "#2563eb" for n in names]
    axes.barh(names, middle, xerr=spread, color=colors, capsize=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time over that of the first row (less is better)")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.png", dpi=120)
    plt.close(figure)
