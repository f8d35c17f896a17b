"""The platform below JAX: XLA's flags, simulated devices, the compilation cache.

`start` must run before the first JAX computation; XLA reads its flags once.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from spmd_train.config import ConfigError

# YNNPACK fusions, on by default since jaxlib 0.10, are slower than Eigen's matmuls in a train step.
CPU_FLAGS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "-individual_dot,-individual_convolution,-dot,-reduce,-eltwise"
    ),
}


def cache_home() -> Path:
    """The folder for things that can be made again: $XDG_CACHE_HOME or ~/.cache, /spmd-train."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spmd-train"


def start(*, simulate_devices: int | None = None) -> None:
    """Sets JAX up for this process.

    XLA flags that the user set in `XLA_FLAGS`, and a compilation cache named in
    `JAX_COMPILATION_CACHE_DIR`, are left as they are.

    Args:
        simulate_devices: run on this many CPU devices in this process instead of what is there.

    Raises:
        ConfigError: JAX has already started with another number of devices.
    """
    given = os.environ.get("XLA_FLAGS", "")
    ours = [f"--{name}={value}" for name, value in CPU_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
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
