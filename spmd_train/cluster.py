"""The platform below JAX: who am I, how many are we, XLA's flags, the compilation cache.

`start` must run before the first JAX computation; XLA reads its flags once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import faulthandler
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
from jax._src.distributed import global_state  # Its barrier has no public name.

from spmd_train.config import ConfigError
from spmd_train.xla_flags import set_flags

log = logging.getLogger(__name__)


def cache_home() -> Path:
    """The folder for things that can be made again: $XDG_CACHE_HOME or ~/.cache, /spmd-train."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spmd-train"


TIMEOUTS = {
    "SPMD_TRAIN_CONNECT_SECONDS": 300,  # until all processes have reached the coordinator
    "SPMD_TRAIN_COMPILE_SECONDS": 3600,  # for the slowest to restore and compile
    "SPMD_TRAIN_HEARTBEAT_SECONDS": 100,  # of silence, until a process is taken for dead
    "SPMD_TRAIN_SHUTDOWN_SECONDS": 300,  # for all processes to leave together
}
_FAREWELL_SECONDS = 3
_rounds = itertools.count()
_told_before: list[str] = []
SUPERVISOR = "SPMD_TRAIN_SUPERVISOR"
"""The environment variable in which `spmd-train launch` leaves its process id."""

_SIGNS = {
    "SLURM": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    "OpenMPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
    "TPU": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES"),
}


class Place(NamedTuple):
    """Where this process is among several; None: to be found by JAX.

    Attributes:
        coordinator_address: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which this one is, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def _place_of_environment(given: Place) -> Place:
    """What was not given explicitly, out of SPMD_TRAIN_COORDINATOR_ADDRESS and the like."""
    values: list[str | int | None] = []
    for name, value in given._asdict().items():
        variable = f"SPMD_TRAIN_{name.upper()}"
        text = os.environ.get(variable)
        if value is None and text:
            if name != "coordinator_address" and not text.isdecimal():
                raise ConfigError(f"{variable}={text!r}: must be a whole number")
            value = text if name == "coordinator_address" else int(text)
        values.append(value)
    return Place(*values)  # pyright: ignore[reportArgumentType]


def _cluster_of_environment() -> str | None:
    """The cluster whose signs say that this is one of several processes."""
    environ = os.environ
    several = {
        "SLURM": "SLURM_PROCID" in environ and _number("SLURM_NTASKS") > 1,
        "OpenMPI": _number("OMPI_COMM_WORLD_SIZE") > 1,
        "Kubernetes": all(name in environ for name in _SIGNS["Kubernetes"]),
        "TPU": "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or _number("MEGASCALE_NUM_SLICES") > 1,
    }
    return next((name for name, is_so in several.items() if is_so), None)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def connect(given: Place = Place()) -> None:  # noqa: B008 - immutable
    """Joins the other processes of this run, if there are any.

    What is given wins over `SPMD_TRAIN_{COORDINATOR_ADDRESS,NUM_PROCESSES,PROCESS_ID}`, and these
    over what JAX finds by itself: TPU pods, SLURM, OpenMPI, Kubernetes.

    Args:
        given: explicit flags.

    Raises:
        ConfigError: there are several processes, but not enough is known to connect them.
        TimeoutError: not all of them came.
    """
    place = _place_of_environment(given)
    cluster = _cluster_of_environment()
    known = [value is not None for value in place]
    if place.num_processes == 1 or (not any(known) and cluster is None and not _on_tpu_vm()):
        return
    if any(known) and not all(known) and cluster is None:
        names = [f"--{name}" for name, value in place._asdict().items() if value is None]
        raise ConfigError(
            f"{' and '.join(names)} must be given too: no cluster is recognized that would tell; "
            f"seen: {_seen()}"
        )
    address = place.coordinator_address
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"--coordinator_address={address}: must be HOST:PORT")
    count, number = place.num_processes, place.process_id
    if count is not None and number is not None and number >= count:
        raise ConfigError(f"--process_id={number}: must be 0 to {count - 1}, of {count} processes")
    seconds = _timeouts()
    try:
        jax.distributed.initialize(
            *place,
            cluster_detection_method="deactivate" if all(known) else None,
            initialization_timeout=seconds["SPMD_TRAIN_CONNECT_SECONDS"],
            heartbeat_timeout_seconds=seconds["SPMD_TRAIN_HEARTBEAT_SECONDS"],
            shutdown_timeout_seconds=seconds["SPMD_TRAIN_SHUTDOWN_SECONDS"],
        )
    except (ValueError, KeyError, TypeError) as error:
        if not any(known) and cluster is None:  # a TPU VM by itself
            return
        raise ConfigError(
            f"this is one of several processes ({cluster or 'as the flags say'}), but they cannot "
            f"be connected: {error}; seen: {_seen()}. Give --coordinator_address=HOST:PORT, "
            "--num_processes=N and --process_id=I"
        ) from error
    except RuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(
            f"not all processes came within SPMD_TRAIN_CONNECT_SECONDS="
            f"{seconds['SPMD_TRAIN_CONNECT_SECONDS']}: {_seen()}, {place}: {error}"
        ) from error
    log.info("process %d of %d on %s", jax.process_index(), jax.process_count(), host())


def meet(name: str, *, seconds: float | None = None) -> None:
    """Waits until all processes are here, without any device.

    Collectives are less patient: those of CPUs give up when another process comes 30 s late.

    Args:
        name: of the place; each is passed once.
        seconds: how long; None: SPMD_TRAIN_COMPILE_SECONDS.

    Raises:
        JaxRuntimeError: not all came; it names those that did not.
    """
    client = global_state.client
    if client is not None:
        seconds = _timeouts()["SPMD_TRAIN_COMPILE_SECONDS"] if seconds is None else seconds
        client.wait_at_barrier(f"spmd_train/{name}", int(seconds * 1000))


def meet_again() -> None:
    """`meet`, at a place without a name; all processes must come as often."""
    meet(f"again {next(_rounds)}")


def tell_all(text: str) -> list[str]:
    """What each process has to say, by process; all must call it, as often. Needs no device."""
    client = global_state.client
    if client is None:
        return [text]
    number = next(_rounds)
    folder = f"spmd_train/told/{number}/"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
    meet(f"told {number}")
    told = {int(key.rpartition("/")[2]): said for key, said in client.key_value_dir_get(folder)}
    if is_leader():
        # Whoever has met here has read what was told before.
        for old in _told_before:
            client.key_value_delete(old)
        _told_before[:] = [folder]
    return [told[process] for process in range(jax.process_count())]


@contextlib.contextmanager
def sharing_mistakes() -> Iterator[None]:
    """What one process finds mistaken within, all raise, when all have come to the end of it.

    Else those that find nothing go on to wait for the one that leaves, and fail less clearly.

    Raises:
        ConfigError: this process's own, or the first of another.
    """
    mine: ConfigError | None = None
    try:
        yield
    except ConfigError as error:
        mine = error
    told = tell_all("" if mine is None else f"process {jax.process_index()} on {host()}: {mine}")
    if mine is not None:
        raise mine
    if others := [text for text in told if text]:
        raise ConfigError(others[0])


def is_leader() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def connected() -> bool:
    """Whether this process has joined others."""
    return global_state.client is not None


def abandon(code: int) -> NoReturn:
    """Ends this process, one of several; JAX's own exit would wait for the others.

    Args:
        code: to exit with.
    """
    with contextlib.suppress(Exception):  # The others may be gone, or fail likewise: let them tell.
        meet("failed", seconds=_FAREWELL_SECONDS)
        jax.distributed.shutdown()  # In order: whoever outlives the coordinator ends with a stack.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _timeouts() -> dict[str, int]:
    for name in TIMEOUTS:
        text = os.environ.get(name, "")
        if text and not (text.isdecimal() and int(text)):
            raise ConfigError(f"{name}={text!r}: must be a whole number of seconds, at least 1")
    return {name: _number(name) or default for name, default in TIMEOUTS.items()}


def _on_tpu_vm() -> bool:
    devices = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    allowed = (jax.config.values["jax_platforms"] or "tpu").split(",")
    return devices and "tpu" in allowed and "TPU_SKIP_MDS_QUERY" not in os.environ


def _seen() -> str:
    names = [name for names in _SIGNS.values() for name in names]
    names += [f"SPMD_TRAIN_{name.upper()}" for name in Place._fields]
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return ", ".join(found) or "no variable of any cluster"


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


@functools.cache
def code_facts() -> dict[str, str]:
    """What code this process runs: a hash of this package, and versions."""
    digest = hashlib.blake2b(digest_size=16)
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"spmd_train": digest.hexdigest(), "python": platform.python_version(), **versions}


def check_same(facts: Mapping[str, str]) -> None:
    """Compares facts over all processes, before one that differs lets the others wait for ever.

    Args:
        facts: name to value; must be the same everywhere.

    Raises:
        ConfigError: they are not; the processes that differ from the most are named, with what
            differs.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps({"host": host(), "facts": dict(facts)}, sort_keys=True)
    told = [json.loads(text) for text in tell_all(mine)]
    versions = [json.dumps(one["facts"], sort_keys=True) for one in told]
    common = json.loads(collections.Counter(versions).most_common(1)[0][0])
    lines = [
        f"process {index} on {one['host']}: {name} is {one['facts'].get(name)}, "
        f"elsewhere {common.get(name)}"
        for index, one in enumerate(told)
        for name in sorted(common.keys() | one["facts"].keys())
        if one["facts"].get(name) != common.get(name)
    ]
    if lines:
        raise ConfigError(
            "the processes of this run are not the same:\n  "
            + "\n  ".join(lines[:20])
            + "\nstart all of them with the same command line, config and code"
        )


def _obey_supervisor() -> None:
    """SIGUSR1 prints every thread's stack; without its supervisor this process ends."""
    if not hasattr(signal, "SIGUSR1"):
        return
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
        if os.getppid() != int(supervisor):
            raise SystemExit("the supervisor has ended")


def start(*, simulate_devices: int | None = None) -> None:
    """Sets JAX up for this process.

    XLA's flags are those of `xla_flags`; what the user set, and a compilation cache named in
    `JAX_COMPILATION_CACHE_DIR`, are left as they are.

    Args:
        simulate_devices: run on this many CPU devices in this process instead of what is there.

    Raises:
        ConfigError: JAX has already started with another number of devices.
    """
    _obey_supervisor()
    set_flags()
    if simulate_devices is not None:
        if simulate_devices < 1:
            raise ConfigError(f"--simulate_devices: {simulate_devices}; allowed: 1 or more")
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", simulate_devices)
        except RuntimeError as error:
            if jax.device_count() != simulate_devices:
                raise ConfigError(
                    f"--simulate_devices: {simulate_devices}, but JAX already runs in this "
                    f"process with {jax.device_count()} devices; set it before anything uses JAX"
                ) from error
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Of a second by default; a run has few programs, and small ones recur at each start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
