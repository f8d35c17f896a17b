"""Restarts this process, before anything else, with huge pages in its memory allocator.

XLA on CPUs allocates a step's temporaries anew each step. Where Linux gives huge pages only to
those who ask (`[madvise]`), each 4 KiB of them is a page fault; glibc asks if it is told to when
the process starts. docs/speed.md has what that is worth.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping

_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"


def with_huge_pages(environ: Mapping[str, str], *, switch: str, libc: str) -> dict[str, str] | None:
    """The environment to start anew with.

    Args:
        environ: of this process.
        switch: what the kernel says of transparent huge pages: "always [madvise] never".
        libc: name and version, "glibc 2.36"; the tunable exists since 2.35.

    Returns:
        None: leave it, as it would change nothing, or the user has set the tunable.
    """
    name, _, version = libc.partition(" ")
    known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    given = environ.get(_VARIABLE, "")
    if not known or "[madvise]" not in switch or _TUNABLE in given:
        return None
    return {**environ, _VARIABLE: ":".join(filter(None, [given, f"{_TUNABLE}=1"]))}


def ask_for_huge_pages() -> None:
    """Starts this very command line anew, in this process, if that changes something."""
    if sys.platform != "linux" or not _SWITCH.exists():
        return
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    environ = with_huge_pages(os.environ, switch=_SWITCH.read_text(), libc=libc or "")
    if environ is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
