"""Which files a source has, and a digest of what is in them."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import logging
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from spmd_train.config import ConfigError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one source.

    Attributes:
      kind: the kind of source, a key of `DataConfig.source`.
      root: folder that names are relative to: the part of the glob before its first wildcard, so
        that a document keeps its name, and its split, when files are added or the folder moves.
      paths: the files, sorted.
      where: how messages call them: the config key with its value.
    """

    kind: str
    root: Path
    paths: tuple[Path, ...]
    where: str

    def names(self) -> Iterator[tuple[str, Path]]:
        """Each file with its name relative to the root."""
        for path in self.paths:
            yield path.relative_to(self.root).as_posix(), path


def find_files(kind: str, pattern: str, *, key: str) -> Files:
    """The files of a source.

    Args:
      kind: kind of source (`DataConfig.source`).
      pattern: a glob; for hf_dataset a folder; for stdlib empty.
      key: the config key that holds the pattern, for messages.

    Raises:
      ConfigError: nothing matches, or the pattern does not suit the kind.
    """
    where = f"{key}={pattern!r}"
    if kind == "stdlib":
        if pattern:
            raise ConfigError(
                f"{where} would not be read: the source is 'stdlib', which reads this Python's own "
                f"library. Set {key.rpartition('.')[0]}.source to the kind of these files"
            )
        root = Path(sysconfig.get_path("stdlib"))
        found = _library_modules(root)
        where = f"the standard library in {root}"
    elif not pattern:
        raise ConfigError(f"{key} is empty: source {kind!r} needs the path of its files")
    elif kind == "hf_dataset":
        root = Path(pattern).expanduser()
        _check_dataset_folder(root, where)
        found = [p for p in root.rglob("*") if p.suffix in (".arrow", ".json")]
    else:
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            raise ConfigError(f"{where} is a folder: give a glob, such as {pattern}/**/*")
        root = _fixed_part(pattern)
        found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    paths = tuple(sorted(path for path in found if path.is_file()))
    if not paths:
        raise ConfigError(
            f"{where} matches no file (from {Path.cwd()}): correct it. ** crosses folders; on a "
            "command line, quote wildcards"
        )
    return Files(kind, root, paths, where)


def _library_modules(root: Path) -> list[Path]:
    """The library's own Python files, without installed packages."""
    found = []
    for folder, subfolders, names in os.walk(root):
        # Pruned in place: os.walk then does not enter them.
        foreign = {"site-packages", "dist-packages", "__pycache__"}
        subfolders[:] = [name for name in subfolders if name not in foreign]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


def _fixed_part(pattern: str) -> Path:
    """The folder before the first wildcard."""
    fixed = Path(pattern).parent
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    return fixed


def _check_dataset_folder(root: Path, where: str) -> None:
    if (root / "state.json").is_file():
        return
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in root.glob("*/state.json"))
        raise ConfigError(
            f"{where} holds several splits: {', '.join(splits)}. Name the folder of one, and that "
            "of another as eval_path"
        )
    raise ConfigError(
        f"{where} is not a folder written by datasets.Dataset.save_to_disk (it has no state.json)"
    )


def content_digest(files: Files, *, memo_dir: Path) -> str:
    """A digest of the names, sizes and bytes of the files: the same wherever they lie.

    Reading everything is cheap, but not free, so the digest is remembered under what the file
    system says of the files: place, inode, size, modification and change time. A change time,
    unlike a modification time, cannot be set back. One younger than two seconds is not relied
    upon: a file can change again within one tick of the clock.

    Raises:
      ConfigError: a file cannot be read.
    """
    signature, settled = stat_signature(files)
    memo = memo_dir / signature
    if memo.is_file() and len(known := memo.read_text()) == 32:
        return known
    size = sum(path.stat().st_size for path in files.paths)
    if size > 1e9:
        logger.info("%s: digesting %.1f GB to look for cached tokens", files.where, size / 1e9)
    digest = hashlib.blake2b(digest_size=16)
    for name, path in files.names():
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise ConfigError(f"{files.where}: cannot read {path}: {error.strerror}") from error
        digest.update(f"{name!r} {path.stat().st_size} {content}\n".encode())
    if settled:
        # In a cache shared read-only the digest is only made anew each time.
        with contextlib.suppress(OSError):
            memo_dir.mkdir(parents=True, exist_ok=True)
            fresh = memo.with_name(f"{signature}.{os.getpid()}.tmp")
            fresh.write_text(digest.hexdigest())
            fresh.replace(memo)
    return digest.hexdigest()


def stat_signature(files: Files) -> tuple[str, bool]:
    """A digest of what the file system says of the files, and whether it can be relied upon."""
    settled_ns = time.time_ns() - 2_000_000_000
    signature = hashlib.blake2b(os.fsencode(files.root.absolute()), digest_size=16)
    newest_ns = 0
    for path in files.paths:
        stat = path.stat()
        newest_ns = max(newest_ns, stat.st_ctime_ns)
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        signature.update(repr((os.fsencode(path.absolute()), *seen)).encode())
    return signature.hexdigest(), newest_ns < settled_ns
