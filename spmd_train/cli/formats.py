"""Figures as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Bytes: `1.50 GiB`, never more than three digits before the point but for the largest."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count /= 1024
        power += 1
    return f"{count:.0f} B" if power == 0 else f"{count:.2f} {units[power]}"
