"""XLA's flags by platform: what a train step gains by, why, and who says so.

What the user sets in a platform's variable is left as it is; SPMD_TRAIN_XLA_FLAGS=off leaves all.
GPUs have none: what NVIDIA recommends (https://docs.nvidia.com/jax-toolbox), the latency-hiding
scheduler, is on by default in jaxlib 0.10 and changes nothing in a compiled step.

Tried for sums of gradients over fsdp and left out, all by libtpu 0.0.42. On v5p:2x2x1, where they
are reduce-scatters, `xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter` runs out of a
kernel's memory, so there they overlap with nothing. On v5p:4x4x4 they are all-reduces; in a scanned
MLP of 4096 x 11008 nothing made reduce-scatters of them
(`xla_tpu_enable_3d_reduce_scatter_decomposer`, `xla_tpu_enable_all_reduce_scatter_fusion`,
`xla_tpu_assign_all_reduce_scatter_layout`, ...), `xla_tpu_enable_ici_rs_pipelining` took memory and
hid nothing, and offloading them to the sparse cores
(`xla_tpu_enable_sparse_core_collective_offload_all_reduce`) overlapped as much for less memory; but
that has not been seen to run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag's value, what it is for, and a page that says so."""

    value: str
    why: str
    source: str


_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py"
_GATHERS = "all-gathers run while something is computed; by default those of v5p do not"
_SUMS = (
    "sums of gradients over fsdp run while something is computed; by default those of v5p do not"
)
_APART = "large sums are not made one: those wait for the last of them, and for nothing else"
_REDUCTIONS = "sums of gradients over data wait for the end of the backward pass, and for less"

FLAGS: dict[str, dict[str, Flag]] = {
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": Flag(
            "-individual_dot,-individual_convolution,-dot,-reduce,-eltwise",
            "YNNPACK's fusions, on by default in jaxlib 0.10, are slower than Eigen's matmuls",
            "docs/speed.md",
        ),
    },
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": Flag("true", _GATHERS, _MAXTEXT),
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": Flag("true", _GATHERS, _MAXTEXT),
        "xla_tpu_enable_async_collective_fusion_multiple_steps": Flag("true", _GATHERS, _MAXTEXT),
        "xla_tpu_overlap_compute_collective_tc": Flag("true", _GATHERS, _MAXTEXT),
        "xla_enable_async_all_gather": Flag("true", _GATHERS, _MAXTEXT),
        "xla_enable_async_all_reduce": Flag("true", _SUMS, _MAXTEXT),
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": Flag("true", _SUMS, _MAXTEXT),
        "xla_jf_crs_combiner_threshold_in_bytes": Flag("4194304", _APART, "docs/speed.md"),
        "xla_tpu_enable_data_parallel_all_reduce_opt": Flag("true", _REDUCTIONS, _MAXTEXT),
        "xla_tpu_data_parallel_opt_different_sized_ops": Flag("true", _REDUCTIONS, _MAXTEXT),
    },
}
"""Platform to its flags."""

VARIABLES = {"cpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
"""Where a platform's compiler reads them, once, when JAX starts."""

_SWITCH = "SPMD_TRAIN_XLA_FLAGS"


def flags_in_force(platform: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Name to value of the platform's flags in the table: the user's value, or else the table's."""
    if environ.get(_SWITCH) == "off":
        return {}
    given = _given(environ.get(VARIABLES.get(platform, ""), ""))
    return {name: given.get(name, flag.value) for name, flag in FLAGS.get(platform, {}).items()}


def set_flags() -> None:
    """Adds to this process's variables what the user has not set; XLA reads them once."""
    for platform, variable in VARIABLES.items():
        text = os.environ.get(variable, "")
        flags = flags_in_force(platform, os.environ)
        ours = [f"--{n}={value}" for n, value in flags.items() if n not in _given(text)]
        os.environ[variable] = " ".join([text, *ours]).strip()


def _given(text: str) -> dict[str, str]:
    """`--name=value --switch` as name to value."""
    words = (word.removeprefix("--").partition("=") for word in text.split())
    return {name: value if sign else "true" for name, sign, value in words}
