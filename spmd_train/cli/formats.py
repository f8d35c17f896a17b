"""Figures as people read them."""

from __future__ import annotations

import math

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """Bytes in the unit that leaves at most three digits before the point: `1.50 GiB`."""
    if count < 1000:
        return f"{count:.0f} B"
    unit = min(int(math.log(count / 1000, 1024)) + 1, len(_UNITS))
    return f"{count / 1024**unit:.2f} {_UNITS[unit - 1]}"
