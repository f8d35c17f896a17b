"""Restarts this process, before anything else, with a memory allocator that suits XLA on CPUs.

XLA on CPUs allocates a step's temporaries anew each step, hundreds of MB at once. glibc gives such
memory back to the kernel, which maps and zeroes it again page by page; oneTBB's allocator (the
package `tbb`) keeps it. Where that is not installed, glibc is told to ask for huge pages: fewer
faults, each still zeroed. docs/speed.md has what that is worth.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
import sysconfig
from collections.abc import Mapping

# "off" leaves the process with the allocator that it has.
_SWITCH = "SPMD_TRAIN_ALLOCATOR"
# From this size on, oneTBB keeps what is freed for the next of that size.
_KEPT_BYTES = 8 << 20
_LIBRARIES = ("libtbbmalloc.so.2", "libtbbmalloc_proxy.so.2")
_ACCELERATORS = ("libtpu", "jax_plugins")
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_libraries(environ: Mapping[str, str], libraries: str) -> dict[str, str] | None:
    """The environment to start anew with, so that the allocator in these libraries serves.

    Args:
        environ: of this process.
        libraries: paths, joined by colons; "": none are installed.

    Returns:
        None: leave it, as there are none, or something is preloaded: these or the user's own.
    """
    if not libraries or environ.get("LD_PRELOAD"):
        return None
    kept = {"TBB_MALLOC_SET_HUGE_SIZE_THRESHOLD": str(_KEPT_BYTES)}
    return {**kept, **environ, "LD_PRELOAD": libraries}


def with_huge_pages(environ: Mapping[str, str], *, switch: str, libc: str) -> dict[str, str] | None:
    """The environment to start anew with, so that glibc asks for huge pages.

    Args:
        environ: of this process.
        switch: what the kernel says of them, `huge_page_switch()`.
        libc: name and version, `libc_version()`; the tunable exists since glibc 2.35.

    Returns:
        None: leave it, as it would change nothing, or the user has set the tunable or preloads an
        allocator.
    """
    name, _, version = libc.partition(" ")
    known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    given = environ.get("GLIBC_TUNABLES", "")
    tunable = "glibc.malloc.hugetlb"
    if not known or "[madvise]" not in switch or tunable in given or environ.get("LD_PRELOAD"):
        return None
    return {**environ, "GLIBC_TUNABLES": ":".join(filter(None, [given, f"{tunable}=1"]))}


def keeping_libraries() -> str:
    """oneTBB's allocator where the package `tbb` of this Python has put it, or ""."""
    for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")):
        folder = pathlib.Path(sysconfig.get_path("data", scheme), "lib")
        if all((folder / name).exists() for name in _LIBRARIES):
            return ":".join(str(folder / name) for name in _LIBRARIES)
    return ""


def huge_page_switch() -> str:
    """What the kernel says of transparent huge pages: "always [madvise] never"; "": nothing."""
    return _HUGE_PAGES.read_text() if _HUGE_PAGES.exists() else ""


def libc_version() -> str:
    """Name and version of the C library, "glibc 2.36", or ""."""
    name = "CS_GNU_LIBC_VERSION"
    return (os.confstr(name) if name in os.confstr_names else None) or ""


def _computes_on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def choose_allocator() -> None:
    """Starts this very command line anew, in this process, if that changes something.

    On Linux alone; an allocator is replaced only where nothing but the CPU computes.
    """
    if sys.platform != "linux" or os.environ.get(_SWITCH) == "off":
        return
    environ = with_libraries(os.environ, keeping_libraries()) if _computes_on_cpu() else None
    environ = environ or with_huge_pages(os.environ, switch=huge_page_switch(), libc=libc_version())
    if environ is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
