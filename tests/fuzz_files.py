"""Feeds damaged files to every reader of strangers' files: `fuzz_files.py FOLDER SEED ROUNDS`.

FOLDER holds a whole file of each kind. A reader may accept what it is given or raise ConfigError;
anything else, a write, another process, or much memory ends this process with a message.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

from spmd_train.checkpoint import steps
from spmd_train.config import ConfigError, load_config, parse
from spmd_train.data import load_tokenizer
from spmd_train.interop import model_config_from_hf
from spmd_train.interop.hf_config import read_config
from spmd_train.interop.safetensors_dir import open_tensors
from spmd_train.observe import report
from spmd_train.train.bad_numbers import read_bundle

EXTRA_MEMORY = 1 << 30
STRANGE = (
    None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), "", "x", "../../../etc/passwd",
    "/etc/passwd", "a.b", "\0", "\ud800", "x" * 100_000, [], [[]], {}, {"a": {"b": 1}},
    [1, "x", None],
)  # fmt: skip
FORBIDDEN = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "shutil.rmtree", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
    "os.fork", "socket.connect", "pickle.find_class", "ctypes.dlopen",
}  # fmt: skip
seen: list[str] = []
watching = False


def watch(event: str, args: tuple[Any, ...]) -> None:
    """Notes whatever a mere reader does not do."""
    if not watching:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in FORBIDDEN:
        seen.append(f"{event} {args}")


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes cut, turned, put in or taken out; lengths at the beginning made huge."""
    data = bytearray(content)
    match rng.randrange(6):
        case 0:
            del data[rng.randrange(len(data) + 1) :]
        case 1:
            for _ in range(rng.choice((1, 1, 8, 64))):
                at = rng.randrange(len(data) * 8)
                data[at // 8] ^= 1 << at % 8
        case 2:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.choice((1, 4, 1000)))
        case 3:
            at = rng.randrange(len(data))
            del data[at : at + rng.choice((1, 4, 1000))]
        case 4:
            huge = rng.choice((2**20, 2**31 - 1, 2**32, 2**40, 2**63, 2**64 - 1))
            data[:8] = struct.pack("<Q", huge)
        case 5:
            deep = rng.choice((b"[", b'{"a":', b'{"files":['))
            data = bytearray(deep * 200_000)
    return bytes(data)


def twist(value: Any, rng: random.Random) -> Any:
    """JSON with one node replaced, taken out or put in."""
    value = copy.deepcopy(value)
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            nodes.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(value)
    if not nodes or rng.random() < 0.02:
        return rng.choice(STRANGE)
    node, key = rng.choice(nodes)
    choice = rng.random()
    if choice < 0.15 and isinstance(node, dict):
        del node[key]
    elif choice < 0.3 and isinstance(node, dict):
        node[str(rng.choice(("../x", "", "\0", "x" * 1000, "a.b")))] = node[key]
    else:
        node[key] = rng.choice(STRANGE)
    return value


def twisted(content: bytes, rng: random.Random) -> bytes:
    """Of JSON: its bytes or its nodes."""
    if rng.random() < 0.4:
        return damage(content, rng)
    return json.dumps(twist(json.loads(content), rng)).encode("utf-8", "surrogatepass")


def twisted_manifest(content: bytes, rng: random.Random) -> bytes:
    """A stranger can make the manifest's own hash right."""
    if rng.random() < 0.4:
        return damage(content, rng)
    manifest = twist(json.loads(content), rng)
    if isinstance(manifest, dict) and "files" in manifest:
        manifest["blake2b"] = steps._digest_of(manifest["files"])
    return json.dumps(manifest).encode("utf-8", "surrogatepass")


def twisted_tensors(content: bytes, rng: random.Random) -> bytes:
    """safetensors: the bytes, or the header's nodes with a length that fits."""
    if rng.random() < 0.5:
        return damage(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(twist(json.loads(content[8 : 8 + size]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def twisted_lines(content: bytes, rng: random.Random) -> bytes:
    """Of JSON lines: one of them, or the bytes."""
    if rng.random() < 0.3:
        return damage(content, rng)
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(twist(json.loads(lines[at]), rng)).encode()
    return b"\n".join(lines) + b"\n"


def read_whole_report(folder: pathlib.Path) -> object:
    told = report.read_report(folder)
    return report.as_html(told), json.dumps(report.as_document(told))


def read_run_config(folder: pathlib.Path) -> object:
    return parse(load_config(str(folder / "config.json")))


KINDS: dict[str, tuple[str, Callable[..., bytes], Callable[[pathlib.Path], object]]] = {
    "run": ("config.json", twisted, read_run_config),
    "hf": ("config.json", twisted, lambda f: model_config_from_hf(read_config(f))),
    "tensors": ("model.safetensors", twisted_tensors, open_tensors),
    "index": ("model.safetensors.index.json", twisted, open_tensors),
    "step": (
        "7/MANIFEST.json",
        twisted_manifest,
        lambda f: steps.faults(f, 7, how="full") or (),
    ),
    "bundle": ("bundle.json", twisted, read_bundle),
    "batch": ("batch.npz", damage, read_bundle),
    "account": ("goodput.jsonl", twisted_lines, read_whole_report),
    "metrics": ("metrics.jsonl", twisted_lines, read_whole_report),
    "tokens": ("tokenizer.json", twisted, lambda f: load_tokenizer(str(f / "tokenizer.json"))),
    "pieces": ("pieces.model", damage, lambda f: load_tokenizer(str(f / "pieces.model"))),
}
"""Folder to its file that is damaged, how, and its reader."""


def fuzz(root: pathlib.Path, kind: str, rng: random.Random, rounds: int) -> tuple[int, int]:
    """How often the reader accepted and refused."""
    global watching
    name, change, read = KINDS[kind]
    shutil.rmtree(root / "fuzzed", ignore_errors=True)
    shutil.copytree(root / kind, root / "fuzzed")
    whole = (root / kind / name).read_bytes()
    accepted = refused = 0
    read(root / "fuzzed")
    for number in range(rounds):
        content = change(whole, rng)
        (root / "fuzzed" / name).write_bytes(content)
        watching = True
        try:
            read(root / "fuzzed")
            accepted += 1
        except ConfigError as error:
            assert len(str(error)) < 20_000, f"{kind} {number}: a message of {len(str(error))}"
            refused += 1
        except BaseException:
            watching = False
            kept = root / f"crash-{kind}-{number}"
            kept.write_bytes(content)
            traceback.print_exc()
            sys.exit(f"{kind}, round {number}: {name} is not refused but crashes; kept: {kept}")
        finally:
            watching = False
        if seen:
            sys.exit(f"{kind}, round {number}: {seen[:3]}")
    return accepted, refused


def main() -> None:
    """Every kind in turn, with the memory that this process has now and a little more."""
    root, seed, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for kind, (_, _, read) in KINDS.items():
        read(root / kind)  # Whatever is imported or made once.
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    told = {kind: fuzz(root, kind, random.Random(f"{seed} {kind}"), rounds) for kind in KINDS}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"accepted_refused": told, "peak_kilobytes": peak}))


if __name__ == "__main__":
    main()
