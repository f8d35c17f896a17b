"""What the proofs about faults share: a tiny run as a real process, and its final parameters."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
TINY = {
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "data.source": "text",
    "data.sequence_length": 32,
    "train.global_batch_size": 8,
    "train.num_steps": 60,
    "train.checkpoint_every": 10,
    "train.eval_every": 0,
    "train.log_every": 1,
    # Constant, so that runs of different lengths are one program and compile once.
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule.name": "constant",
    "optimizer.schedule.warmup_steps": 0,
    "observe.tensorboard": "false",
    "sample.prompt": "",
}


def text_of(folder: pathlib.Path) -> pathlib.Path:
    """A small text to train on."""
    path = folder / "text.txt"
    if not path.exists():
        rng = np.random.default_rng(0)
        path.write_text("".join(chr(97 + c) for c in rng.integers(0, 26, 200_000)))
    return path


def command(workdir: pathlib.Path, *, devices: int = 2, **changes: Any) -> list[str]:
    """The words of `train` for a tiny run; `train__num_steps=3` sets `train.num_steps`."""
    keys = TINY | {
        "data.path": text_of(workdir.parent),
        "data.cache_dir": workdir.parent / "tokens",
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    lm = ROOT / "configs" / "lm_tiny.py"
    simulate = [f"--simulate_devices={devices}"] if devices else []
    return ["train", f"--config={lm}", f"--workdir={workdir}", *simulate, *words]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a child: this checkout, the CPU, the tests' compilation cache."""
    cache = os.environ.get("SPMD_TRAIN_TEST_CACHE", str(ROOT / ".jax_cache"))
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **(extra or {}),
    }


def start(
    words: Sequence[str],
    *,
    log: pathlib.Path,
    environ: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """`spmd-train WORDS` as a process, perhaps run by another command; it writes to a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [*before, sys.executable, "-m", "spmd_train", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(environ),
            cwd=ROOT,
            start_new_session=True,
        )


def run_together(
    words: Sequence[str],
    *,
    folder: pathlib.Path,
    prelude: Mapping[int, str],
    num_processes: int = 2,
    seconds: float = 300,
) -> tuple[list[int], list[str]]:
    """Runs `spmd-train WORDS` as processes of one run, without a supervisor.

    Args:
        words: the command.
        folder: for `logRANK`.
        prelude: Python that a rank runs first.
        num_processes: of the run.
        seconds: until they are killed.

    Returns:
        Exit codes and what was said, by rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    main = "import sys\nfrom spmd_train.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    logs = [folder / f"log{rank}" for rank in range(num_processes)]
    runs = []
    for rank, log in enumerate(logs):
        place = {
            "SPMD_TRAIN_COORDINATOR_ADDRESS": address,
            "SPMD_TRAIN_NUM_PROCESSES": str(num_processes),
            "SPMD_TRAIN_PROCESS_ID": str(rank),
        }
        with log.open("wb") as output:
            runs.append(
                subprocess.Popen(
                    [sys.executable, "-c", prelude.get(rank, "") + main, *words],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(place),
                    cwd=ROOT,
                    start_new_session=True,
                )
            )
    codes = [end(run, log=log, seconds=seconds) for run, log in zip(runs, logs, strict=True)]
    return codes, [log.read_text() for log in logs]


def end(process: subprocess.Popen[bytes], *, log: pathlib.Path, seconds: float = 300) -> int:
    """Waits for it, and kills it if that takes too long."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"hangs:\n{log.read_text()[-4000:]}") from None


def run(words: Sequence[str], *, log: pathlib.Path, seconds: float = 300, **options: Any) -> int:
    """Starts and ends it."""
    return end(start(words, log=log, **options), log=log, seconds=seconds)


def until(condition: Callable[[], bool], *, what: str, seconds: float = 240) -> None:
    """Waits for a condition."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


def steps_logged(workdir: pathlib.Path) -> int:
    """The last step in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def final_params(workdir: pathlib.Path, step: int = TINY["train.num_steps"]) -> dict[str, Any]:
    """Everything in a checkpoint, read by Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(path, restore_args=args)
    flat = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys() and len(one) > 10
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name
