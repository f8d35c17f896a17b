"""The command asks for huge pages once, where that changes something."""

import os
import pathlib
import subprocess
import sys

import pytest

from spmd_train.cli.huge_pages import with_huge_pages

ASKING = {"switch": "always [madvise] never\n", "libc": "glibc 2.36"}


def test_cli_huge_pages_are_asked_for_and_what_was_set_stays():
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
        {"libc": "glibc 2.31"},
        {"libc": "musl 1.2"},
        {"libc": ""},
    ],
)
def test_cli_huge_pages_are_left_alone_where_nothing_changes(other):
    assert with_huge_pages({}, **(ASKING | other)) is None


def test_cli_huge_pages_change_neither_process_nor_command_line():
    code = (
        "import os, sys\n"
        "from spmd_train.cli import huge_pages\n"
        "huge_pages._SWITCH = type('Switch', (), {'exists': lambda s: True,\n"
        "    'read_text': lambda s: 'always [madvise] never'})()\n"
        "print(os.getpid(), sys.argv[1:], flush=True)\n"
        "huge_pages.ask_for_huge_pages()\n"
        "print(os.environ.get('GLIBC_TUNABLES'))\n"
    )
    environ = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES"}
    environ["PYTHONPATH"] = str(pathlib.Path(__file__).parent.parent)
    words = ["a word", "--config.a=1"]
    process = subprocess.run(
        [sys.executable, "-c", code, *words], env=environ, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    *starts, told = process.stdout.splitlines()
    if sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        assert len(starts) == 2 and told == "glibc.malloc.hugetlb=1"
    assert len(set(starts)) == 1 and "a word" in starts[0]
