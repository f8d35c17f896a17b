"""Eight CPU devices before JAX starts, and one compilation cache for all tests."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "SPMD_TRAIN_TEST_CACHE", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
