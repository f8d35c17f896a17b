"""A section of a Markdown page that a script writes anew, the others left as they are."""

import pathlib
import textwrap

WIDTH = 120


def write_section(path: pathlib.Path, heading: str, text: str) -> None:
    """Puts `text` below `## heading`, up to the next heading of that level, or at the end."""
    mark = f"## {heading}\n"
    before, found, after = path.read_text(encoding="utf-8").partition(mark)
    rest = after[after.index("\n## ") + 1 :] if "\n## " in after else ""
    if not found:
        before = before.rstrip() + "\n\n"
    paragraphs = "\n\n".join(map(wrapped, text.strip().split("\n\n")))
    parts = [before, mark, "\n", paragraphs, "\n", *(["\n", rest] if rest else [])]
    path.write_text("".join(parts), encoding="utf-8")


def wrapped(paragraph: str) -> str:
    """Prose in lines of at most `WIDTH`; tables, pictures, lists and code as they are."""
    if paragraph.startswith(("|", "!", "#", "- ", "```", "    ")):
        return paragraph
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
