"""Devices of hardware that is not here, to compile for.

TPU programs are compiled by libtpu, GPU programs by JAX's CUDA plugin; neither needs a device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
from jax.experimental import topologies

from spmd_train import cluster
from spmd_train.config import ConfigError
from spmd_train.plan.gpu_specs import gpu_target_config
from spmd_train.plan.targets import TPUS, Target
from spmd_train.xla_flags import flags_in_force

log = logging.getLogger(__name__)

# libtpu asks a metadata server, and looks for its own devices, unless it is told not to. The
# accelerator type is only read to be there; the topology's name decides.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CHIPS_PER_HOST = (2, 2, 1)


@contextlib.contextmanager
def open_target(target: Target) -> Iterator[list[Any]]:
    """The devices of a target, while nobody else on this machine compiles for one.

    Args:
        target: from `parse_target`.

    Yields:
        Devices to lay a mesh over: simulated ones for `cpu:N`, else devices without hardware.

    Raises:
        ConfigError: the compiler for the target is not installed, or knows no such topology.
    """
    if target.platform == "cpu":
        cluster.start(simulate_devices=target.num_chips)
        yield list(jax.devices())
        return
    # JAX itself stays on the CPU, also on a machine that has accelerators.
    jax.config.update("jax_platforms", "cpu")
    # A program for devices that are not here can be compiled, but not read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    with _only_one():
        yield _tpu_devices(target) if target.platform == "tpu" else _gpu_devices(target)


def compiler_options(target: Target) -> Mapping[str, Any]:
    """XLA's options by name: those that training sets, and what hardware that is not here needs."""
    words = {"true": True, "false": False}
    options: dict[str, Any] = {}
    if target.platform != "cpu":
        # The CPU's are in XLA_FLAGS, which the process that compiles has read.
        flags = flags_in_force(target.platform, os.environ)
        options |= {name: words.get(value, value) for name, value in flags.items()}
    if target.platform == "gpu":
        # Autotuning times kernels on the device.
        options |= {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(_cuda_home())}
    return options


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Compiling for a pod takes gigabytes and a library that wants to be alone: one at a time."""
    path = cluster.cache_home() / "plan.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("another process compiles for a target (%s); waiting for it to end", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tpu_devices(target: Target) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ConfigError(
            f"--target={target.text}: needs TPU's compiler, libtpu, which is not installed; "
            "pip install 'spmd-train[plan-tpu]' (no TPU is needed)"
        )
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    shape = (*target.shape, 1)[:3]
    host = tuple(min(size, most) for size, most in zip(shape, _CHIPS_PER_HOST, strict=True))
    # A v4 or v5p chip's two cores are one device to JAX.
    chip_config = "megacore" if target.chip_name in ("v4", "v5p") else "default"
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{TPUS[target.chip_name]}:{'x'.join(map(str, target.shape))}",
            chips_per_host_bounds=host,
            chip_config_name=chip_config,
            num_slices=target.num_slices,
            wrap=(*target.wraps, False)[:3],
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--target={target.text}: libtpu refuses it: {error}") from error
    return list(topology.devices)


def _gpu_devices(target: Target) -> list[Any]:
    if importlib.util.find_spec("jax_plugins") is None or _cuda_home() is None:
        raise ConfigError(
            f"--target={target.text}: needs JAX's CUDA plugin with nvcc's ptxas and libdevice, "
            "which are not installed; pip install 'spmd-train[plan-cuda]' (no GPU is needed)"
        )
    nodes, gpus = target.shape
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu_target_config(target.chip_name),
        topology=f"1x{nodes}x{gpus}",
    )
    return list(topology.devices)


def _cuda_home() -> Path | None:
    """The folder of NVIDIA's pip packages that has ptxas and libdevice; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for home in Path(place).glob("cu1*"):
            if (home / "bin" / "ptxas").exists() and (home / "nvvm" / "libdevice").exists():
                return home
    return None
