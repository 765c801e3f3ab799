"""Numbers of bytes for people."""

from __future__ import annotations

__all__ = ["byte_unit", "human_bytes"]

UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(number: float) -> str:
    """Write a number of bytes in decimal units, with three digits.

    >>> human_bytes(26), human_bytes(1_724_320)
    ('26 B', '1.72 MB')
    """
    size, unit = byte_unit(number)
    number /= size
    decimals = 0 if size == 1 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{decimals}f} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Return the size and the name of the unit for numbers of bytes up to this one."""
    size = 1.0
    for unit in UNITS[:-1]:
        # 999.5 would be written as 1000: it belongs to the next unit.
        if largest < 999.5 * size:
            return size, unit
        size *= 1000
    return size, UNITS[-1]
