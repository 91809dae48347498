"""How amounts read, wherever they are shown."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes, in the decimal units that stores bill by: 1234567 is 1.23 MB."""
    if count < 1000:
        return f"{count} B"
    value, units = float(count), iter(("kB", "MB", "GB", "TB", "PB", "EB"))
    unit = "B"
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
