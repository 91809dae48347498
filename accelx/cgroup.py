"""Where Linux keeps what it grants this process: its control group and those around."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")  # of proc/ and sys/


def folders(controller: str, root: Path = ROOT) -> list[Path]:
    """The folders of a controller ("memory", "cpu"), the process's own group first.

    In cgroup v2, v1, or both. What a folder has not is not limited there.
    """
    found: list[Path] = []
    for line in text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        # A container sees its own group at the top, by whatever name the host has.
        here = base / path.strip("/")
        found += [here, *(up for up in here.parents if up.is_relative_to(base))]
    return found


def text(path: Path) -> str:
    """What a file holds; nothing where it is not."""
    try:
        return path.read_text().strip()
    except OSError:  # not Linux, or a sandbox without it
        return ""
