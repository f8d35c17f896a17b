"""The folder of checkpoints: which steps are whole, which are bad, which may go.

A step `STEP/` counts once `STEP/MANIFEST.json` is there, which names every other file with its size
and its hash and is written last, in one atomic step. Knows files only, neither JAX nor Orbax.
Besides steps the folder may hold `STEP.bad-K` (quarantined), and what a killed process left:
`STEP.trash` (half deleted) and Orbax's temporary folders.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "MANIFEST.json"
_SAMPLE = 8
# Against damage, not against a stranger, who could write the manifest, too. The first is what is
# written: ten times as fast as the second, which older manifests have.
_HASHES: dict[str, Callable[[], Any]] = {
    "xxh3_128": xxhash.xxh3_128,
    "blake2b": lambda: hashlib.blake2b(digest_size=32),
}
_HASH = next(iter(_HASHES))
_LEAVINGS = re.compile(r"\d+\.(trash|orbax-checkpoint-tmp.*)")
_BAD = re.compile(r"\d+\.bad-\d+")

log = logging.getLogger(__name__)


def all_steps(folder: Path) -> list[int]:
    """Steps that have a folder, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))


def committed_steps(folder: Path) -> list[int]:
    """Steps with a manifest, oldest first."""
    return [step for step in all_steps(folder) if (folder / str(step) / MANIFEST).is_file()]


def bad_steps(folder: Path) -> list[str]:
    """Names of quarantined folders."""
    return sorted(p.name for p in folder.glob("*.bad-*") if _BAD.fullmatch(p.name))


def damaged_steps(folder: Path) -> list[str]:
    """Names of quarantined folders that were whole once: their saves had been finished."""
    return [name for name in bad_steps(folder) if (folder / name / MANIFEST).is_file()]


def commit(folder: Path, step: int) -> int:
    """Hashes every file of a step and writes its manifest: from now on the step counts.

    Args:
        folder: of the checkpoints.
        step: whose files are all written.

    Returns:
        Bytes that were hashed.
    """
    root = folder / str(step)
    names = list(_files(root))
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda name: _digest(root / name, _HASH), names))
    files = {
        name: {"bytes": (root / name).stat().st_size, _HASH: digest}
        for name, digest in zip(names, digests, strict=True)
    }
    manifest = {"step": step, "files": files, "blake2b": _digest_of(files)}
    partial = root / (MANIFEST + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(root / MANIFEST)
    _sync(root)
    return sum(entry["bytes"] for entry in files.values())


def faults(folder: Path, step: int, *, how: str) -> list[str]:
    """What is wrong with a step.

    Args:
        folder: of the checkpoints.
        step: one of `all_steps`.
        how: `full` hashes every file; `sample` looks at every size and hashes some files, others
            each time; `off` wants a manifest only.

    Returns:
        A sentence for each fault; none: the step is whole.
    """
    root = folder / str(step)
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
        kind = _HASH if any(_HASH in f for f in manifest["files"].values()) else "blake2b"
        files = {name: (f["bytes"], f[kind]) for name, f in manifest["files"].items()}
        if manifest["step"] != step or manifest["blake2b"] != _digest_of(manifest["files"]):
            return [f"{MANIFEST}: was changed after it was written"]
    except FileNotFoundError:
        return [f"{MANIFEST}: missing; the save was not finished"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST}: unreadable ({type(error).__name__}: {str(error)[:200]})"]
    if how == "off":
        return []
    there = set(_files(root))
    told = [f"{name}: missing" for name in files if name not in there]
    told += [f"{name}: not in the manifest" for name in sorted(there - files.keys())]
    for name in sorted(there & files.keys()):
        size = (root / name).stat().st_size
        if size != files[name][0]:
            told.append(f"{name}: {size} bytes, not {files[name][0]}")
    if told:
        return told
    names = sorted(files)
    if how == "sample":
        names = random.sample(names, min(_SAMPLE, len(names)))
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _digest(root / name, kind), names)
        return [
            f"{name}: its content is not what was written (hash differs)"
            for name, digest in zip(names, digests, strict=True)
            if digest != files[name][1]
        ]


def quarantine(folder: Path, step: int) -> Path:
    """Renames a step so that nothing restores it, and nothing of it is lost.

    Returns:
        Its new path, `STEP.bad-K`.
    """
    number = 1
    while (target := folder / f"{step}.bad-{number}").exists():
        number += 1
    (folder / str(step)).rename(target)
    return target


def delete(folder: Path, name: str | int) -> None:
    """Deletes a step or a quarantined folder; killed half-way, it is gone nevertheless."""
    path = folder / str(name)
    if not path.name.endswith(".trash"):
        trash = folder / f"{path.name.partition('.')[0]}.trash"
        shutil.rmtree(trash, ignore_errors=True)
        path = path.rename(trash)
    shutil.rmtree(path)


def remove_leavings(folder: Path, *, step: int | None = None) -> list[str]:
    """Deletes what interrupted saves and deletions left.

    Args:
        folder: of the checkpoints.
        step: only this step's; None: every step's.

    Returns:
        Names of what was deleted.
    """
    names = [p.name for p in folder.iterdir() if _LEAVINGS.fullmatch(p.name)]
    if step is not None:
        names = [name for name in names if name.partition(".")[0] == str(step)]
        if step in all_steps(folder) and step not in committed_steps(folder):
            names.append(str(step))
    for name in names:
        shutil.rmtree(folder / name)
    return names


def prune(folder: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Deletes committed steps that need not be kept.

    Args:
        folder: of the checkpoints.
        keep_last: newest steps to keep.
        keep_every: besides, keep each step that this divides; 0: none.

    Returns:
        The steps deleted.
    """
    old = committed_steps(folder)[:-keep_last]
    gone = [step for step in old if not keep_every or step % keep_every]
    for step in gone:
        delete(folder, step)
    return gone


def newest_good(folder: Path, *, how: str, steps: Sequence[int] | None = None) -> int | None:
    """The newest whole step; every newer one is quarantined, with a warning.

    Args:
        folder: of the checkpoints.
        how: as of `faults`.
        steps: the candidates; None: all of the folder.
    """
    for step in reversed(all_steps(folder) if steps is None else steps):
        told = faults(folder, step, how=how)
        if not told:
            return step
        target = quarantine(folder, step)
        log.warning(
            "checkpoint %d is bad and was put aside as %s: %s", step, target, "; ".join(told[:5])
        )
    return None


def _files(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".partial"):
            yield path.relative_to(root).as_posix()


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _HASHES[kind]).hexdigest()


def _digest_of(files: Any) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
