"""The command takes an allocator that keeps a step's temporaries, or asks for huge pages."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from spmd_train.cli.allocator import keeping_libraries, with_huge_pages, with_libraries

ASKING = {"switch": "always [madvise] never\n", "libc": "glibc 2.36"}


def test_cli_allocator_that_keeps_is_preloaded_unless_the_user_preloads():
    environ = with_libraries({"A": "1"}, "/lib/a.so:/lib/b.so")
    assert environ == {
        "A": "1",
        "LD_PRELOAD": "/lib/a.so:/lib/b.so",
        "TBB_MALLOC_SET_HUGE_SIZE_THRESHOLD": "8388608",
    }
    assert with_libraries(environ, "/lib/a.so:/lib/b.so") is None
    assert with_libraries({"LD_PRELOAD": "mine.so"}, "/lib/a.so") is None
    assert with_libraries({}, "") is None


def test_cli_allocator_huge_pages_are_asked_for_and_what_was_set_stays():
    environ = with_huge_pages({"A": "1", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, **ASKING)
    assert environ == {
        "A": "1",
        "GLIBC_TUNABLES": "glibc.malloc.perturb=1:glibc.malloc.hugetlb=1",
    }
    assert with_huge_pages(environ, **ASKING) is None


@pytest.mark.parametrize(
    "other",
    [
        {"switch": "[always] madvise never\n"},
        {"switch": "always madvise [never]\n"},
        {"switch": ""},
        {"libc": "glibc 2.31"},
        {"libc": "musl 1.2"},
        {"libc": ""},
    ],
)
def test_cli_allocator_huge_pages_are_left_alone_where_nothing_changes(other):
    assert with_huge_pages({}, **(ASKING | other)) is None
    assert with_huge_pages({"LD_PRELOAD": "mine.so"}, **ASKING) is None


def start(code: str, *words: str, **environ: str) -> list[str]:
    """The lines that this code prints, in a process with these words and variables."""
    ours = ("GLIBC_TUNABLES", "LD_PRELOAD", "JAX_PLATFORMS", "SPMD_TRAIN_ALLOCATOR")
    environ = {n: v for n, v in os.environ.items() if n not in ours} | environ
    environ["PYTHONPATH"] = str(pathlib.Path(__file__).parent.parent)
    process = subprocess.run(
        [sys.executable, "-c", code, *words], env=environ, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


CHOOSE = f"""
import os, sys
from spmd_train.cli import allocator
allocator.huge_page_switch = lambda: {ASKING["switch"]!r}
allocator.libc_version = lambda: {ASKING["libc"]!r}
print(os.getpid(), sys.argv[1:], flush=True)
allocator.choose_allocator()
print(os.environ.get('LD_PRELOAD'), os.environ.get('GLIBC_TUNABLES'))
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="allocators are chosen on Linux")
with_tbb = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="pyproject.toml asks for tbb on Linux on x86-64",
)


@with_tbb
def test_cli_allocator_starts_the_same_command_anew_once():
    *starts, chosen = start(CHOOSE, "a word", "--config.a=1", JAX_PLATFORMS="cpu")
    assert len(starts) == 2 and len(set(starts)) == 1 and "a word" in starts[0]
    assert "libtbbmalloc_proxy" in chosen
    assert chosen == f"{keeping_libraries()} None"


@on_linux
def test_cli_allocator_is_not_replaced_beside_an_accelerator():
    *starts, chosen = start(CHOOSE, JAX_PLATFORMS="cuda,cpu")
    assert len(starts) == 2 and chosen == "None glibc.malloc.hugetlb=1"


@on_linux
def test_cli_allocator_is_left_to_the_user():
    _, chosen = start(CHOOSE, JAX_PLATFORMS="cpu", SPMD_TRAIN_ALLOCATOR="off")
    assert chosen == "None None"


@with_tbb
def test_cli_allocator_keeps_the_memory_of_large_arrays():
    """Page faults of an array that comes and goes: once, not each time."""
    code = """
import resource
import numpy as np
from spmd_train.cli import allocator
allocator.choose_allocator()
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        np.empty(64 << 20, np.uint8)[::4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(1), faults(10))
"""
    first, later = map(int, start(code, JAX_PLATFORMS="cpu")[-1].split())
    assert first >= later * 10, (first, later)
    (told,) = start(code, JAX_PLATFORMS="cpu", SPMD_TRAIN_ALLOCATOR="off")
    first, later = map(int, told.split())
    assert later >= first * 5, (first, later)
