"""Who the bench compares, and how one of them is run in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
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


def _trainer(*flags: str, launcher: Iterable[str] = ()) -> Callable[[Job], list[str]]:
    return lambda job: [
        *("-m", "spmd_train", *launcher, "train", f"--config={job.problem / 'config.json'}"),
        *(*flags, f"--workdir={job.workdir}", f"--config.train.num_steps={job.num_steps}"),
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
    "trainer_processes": Peer(
        "spmd-train, 2 processes",
        _trainer(launcher=("launch", "--num_processes=2", "--hang_seconds=0", "--")),
        "jax",
        environment=_JAX | {"SPMD_TRAIN_HEARTBEAT_SECONDS": "3600"},  # It is held meanwhile.
    ),
    "bare_step": Peer(
        "its step in a bare loop, 2 devices", _script("bare_step.py"), "jax", environment=_JAX
    ),
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
        {"HOROVOD_GLOO_TIMEOUT_SECONDS": "3600"},  # It is held for longer than the default, 30.
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
    """A step of a run: its loss, and the seconds it had run by then, on the clock and of CPUs."""

    loss: float
    seconds: float
    cpu_seconds: float


class Run:
    """A peer in a process of its own, which can be held while others have the machine.

    Attributes:
        records: logged step to record.
    """

    def __init__(self, name: str, job: Job) -> None:
        """Starts it."""
        peer = PEERS[name]
        self.records: dict[int, Record] = {}
        self._name, self._job, self._venv = name, job, peer.venv
        self._log = job.workdir.with_suffix(".log")
        self._held, self._held_since = 0.0, 0.0
        self._stopped: list[int] = []
        shutil.rmtree(job.workdir, ignore_errors=True)
        job.workdir.parent.mkdir(parents=True, exist_ok=True)
        paths = f"{peer.python.parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": paths} | peer.environment
        # Of a session of its own: where a shell ends, the kernel wakes what is stopped of its jobs.
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [peer.python, *peer.arguments(job)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def until(self, step: int) -> None:
        """Waits until the step is logged.

        Raises:
            SystemExit: the run has failed.
        """
        while step not in self.records:
            ended = self._process.poll() is not None
            self._read()
            if ended and step not in self.records:
                told = self._log.read_text()[-3000:]
                raise SystemExit(f"{self._name}: exit {self._process.returncode}\n{told}")
            time.sleep(0.02)

    def hold(self) -> None:
        """Stops its processes; this time is not the run's."""
        self._stopped = list(_family(self._process.pid))
        self._held_since = time.time()
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undoes `hold`."""
        self._signal(signal.SIGCONT)
        self._held += time.time() - self._held_since

    def end(self) -> None:
        """Waits for its end.

        Raises:
            SystemExit: the run has failed.
        """
        try:
            self._process.wait()
        except (KeyboardInterrupt, SystemExit):  # Its session does not get the signal.
            self.kill()
            raise
        self.until(self._job.num_steps)
        # torch's DDP may abort at its very end, with all its steps logged.
        if self._process.returncode and self._venv is None:
            raise SystemExit(f"{self._name}: exit {self._process.returncode}, see {self._log}")

    def kill(self) -> None:
        """Ends it, whatever it is doing."""
        self._stopped = list(_family(self._process.pid))
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        path = self._job.workdir / "metrics.jsonl"
        finished = path.read_text().split("\n")[:-1] if path.exists() else []
        for values in map(json.loads, finished[len(self.records) :]):
            ticks = sum(_family(self._process.pid).values())
            seconds = values["time"] - self._held
            self.records[values["step"]] = Record(values["loss"], seconds, ticks / _TICKS)

    def _signal(self, number: int) -> None:
        for process in self._stopped:
            with contextlib.suppress(ProcessLookupError):  # It has just ended.
                os.kill(process, number)


_TICKS = os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> dict[int, int]:
    """A running process and those below it, to their ticks of user and system time; by /proc."""
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

    return {process: ticks[process] for process in ticks if is_below(process)}
