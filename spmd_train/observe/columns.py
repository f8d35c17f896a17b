"""Tables of text for people."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence


def columns(lines: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> Iterator[str]:
    """Lines whose cells stand below each other, two blanks between them.

    Args:
        lines: the heads and the rows, all of the same length.
        right: columns that are aligned at their right end, as numbers are.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
