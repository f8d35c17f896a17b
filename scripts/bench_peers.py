"""Who the bench compares, and how one of them is run in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from spmd_train import cluster
from spmd_train.xla_flags import FLAGS

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venv-peers"


class Job(NamedTuple):
    """One run of a peer, which writes WORKDIR/metrics.jsonl: `step`, `loss`, `time`."""

    problem: pathlib.Path
    workdir: pathlib.Path
    num_steps: int
    log_every: int
    checkpoint_every: int = 0


@dataclasses.dataclass(frozen=True)
class Peer:
    """Something that trains the problem.

    Attributes:
        label: its name in the table.
        arguments: of its Python, for a job.
        module: what must be importable there.
        venv: whose Python, below `VENVS`; None: this one.
        environment: variables that are set for it.
    """

    label: str
    arguments: Callable[[Job], list[str]]
    module: str
    venv: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def python(self) -> pathlib.Path:
        """The interpreter that it runs in."""
        return VENVS / self.venv / "bin" / "python" if self.venv else pathlib.Path(sys.executable)


def _trainer(*flags: str) -> Callable[[Job], list[str]]:
    return lambda job: [
        *("-m", "spmd_train", "train", f"--config={job.problem / 'config.json'}", *flags),
        *(f"--workdir={job.workdir}", f"--config.train.num_steps={job.num_steps}"),
        f"--config.train.log_every={job.log_every}",
        f"--config.train.checkpoint_every={job.checkpoint_every}",
    ]


def _script(name: str, *flags: str) -> Callable[[Job], list[str]]:
    def arguments(job: Job) -> list[str]:
        common = [f"--workdir={job.workdir}", f"--num_steps={job.num_steps}"]
        path = ROOT / "scripts" / "peers" / name
        return [str(path), str(job.problem), *flags, *common, f"--log_every={job.log_every}"]

    return arguments


def _under(launcher: Iterable[str], arguments: Callable[[Job], list[str]]):
    return lambda job: [*launcher, *arguments(job)]


_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
_HOROVODRUN = ("-m", "horovod.runner.launch", "--gloo", "-np", "2", "python")
_JAX = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(cluster.cache_home() / "xla"),
}
_XLA_FLAGS = " ".join(f"--{name}={flag.value}" for name, flag in FLAGS["cpu"].items())

PEERS = {
    "trainer": Peer(
        "spmd-train, 2 devices", _trainer("--simulate_devices=2"), "jax", environment=_JAX
    ),
    "trainer_one": Peer("spmd-train, 1 device", _trainer(), "jax", environment=_JAX),
    "bare_jax": Peer(
        "bare JAX", _script("bare_jax.py"), "jax", environment=_JAX | {"XLA_FLAGS": _XLA_FLAGS}
    ),
    "torch_eager": Peer(
        "PyTorch eager", _script("torch_peer.py", "--mode=eager"), "torch", "torch"
    ),
    "torch_compile": Peer(
        "torch.compile", _script("torch_peer.py", "--mode=compile"), "torch", "torch"
    ),
    "torch_ddp": Peer(
        "PyTorch DDP, 2 processes",
        _under(_TORCHRUN, _script("torch_peer.py", "--mode=ddp")),
        "torch",
        "torch",
        {"OMP_NUM_THREADS": "1"},
    ),
    "tf_mirrored": Peer(
        "TF Mirrored, 2 devices",
        _script("tensorflow_peer.py", "--strategy=mirrored"),
        "tensorflow",
        "tensorflow",
    ),
    "tf_multiworker": Peer(
        "TF MultiWorker, 2 processes",
        _script("tensorflow_peer.py", "--strategy=multiworker"),
        "tensorflow",
        "tensorflow",
    ),
    "horovod": Peer(
        "Horovod, 2 processes",
        _under(_HOROVODRUN, _script("torch_peer.py", "--mode=horovod")),
        "horovod.torch",
        "horovod",
    ),
}


def version_of(peer: Peer) -> str:
    """The version of the framework that a peer would run.

    Raises:
        ImportError: it cannot; says why in one line.
    """
    if not peer.python.exists():
        raise ImportError(f"no {peer.python.relative_to(ROOT)}; `make bench-peers` makes it")
    code = f"import {peer.module}, {peer.module.split('.')[0]} as m; print(m.__version__)"
    found = subprocess.run([peer.python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise ImportError(found.stderr.strip().splitlines()[-1])
    return found.stdout.strip().splitlines()[-1]


class Record(NamedTuple):
    """A step of a run: its loss, when it was known, and the CPU time of its processes by then."""

    loss: float
    time: float
    cpu_seconds: float


def run(name: str, job: Job) -> dict[int, Record]:
    """Runs a peer in a process of its own.

    Returns:
        Logged step to record.
    """
    peer, log_path = PEERS[name], job.workdir.with_suffix(".log")
    shutil.rmtree(job.workdir, ignore_errors=True)
    job.workdir.parent.mkdir(parents=True, exist_ok=True)
    paths = f"{peer.python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths} | peer.environment
    records: dict[int, Record] = {}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [peer.python, *peer.arguments(job)], env=environment, stdout=log, stderr=log
        )
        while True:
            ended = process.poll() is not None
            lines = _lines(job.workdir / "metrics.jsonl")[len(records) :]
            cpu_seconds = _cpu_seconds(process.pid) if lines else 0.0
            for values in map(json.loads, lines):
                records[values["step"]] = Record(values["loss"], values["time"], cpu_seconds)
            if ended:
                break
            time.sleep(0.05)
    # torch's DDP may abort at its very end, with all its steps logged.
    failed = process.returncode and peer.venv is None
    if failed or job.num_steps not in records:
        raise SystemExit(f"{name}: exit {process.returncode}\n{log_path.read_text()[-3000:]}")
    return records


def _lines(path: pathlib.Path) -> list[str]:
    """The finished lines of a file that is being written."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _cpu_seconds(pid: int) -> float:
    """User and system time of a running process and those below it; NaN where no /proc tells."""
    parents, ticks = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # It has just ended.
            continue
        process = int(path.parent.name)
        parents[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))

    def is_below(process: int) -> bool:
        while process in parents and process != pid:
            process = parents[process]
        return process == pid

    family = [ticks[process] for process in ticks if is_below(process)]
    return sum(family) / os.sysconf("SC_CLK_TCK") if pid in ticks else float("nan")
