"""XLA's flags by platform: what a train step gains by, why, and who says so.

What the user sets in a platform's variable is left as it is; SPMD_TRAIN_XLA_FLAGS=off leaves all.

Tried on GPUs and left out, by the compiler of the CUDA plugin 0.10.2 on Llama-2-7B for h100:2x8,
32 layers (what has no number: 4), where the flags below hide 76% of the reduce-scatters (none
without them) and 55% of the gathers (as without); all of it compiled, none of it run:

- `xla_gpu_enable_pipelined_all_reduce` takes a layer's gradients into the next iteration and hides
  97%, for 0.4 GiB more: a predicted step 1% shorter, 8% with 12.5 GB/s a GPU between the nodes.
- `xla_gpu_enable_pipelined_all_gather` hides less of both; so does combining a layer's gathers
  (`xla_gpu_all_gather_combine_threshold_bytes`, which NVIDIA advises): none of them.
  `xla_gpu_enable_while_loop_double_buffering` hides 61% of the gathers; the step is 0.5% shorter.
- `xla_gpu_experimental_parallel_collective_overlap_limit=2` hides 87% of the gathers, but two
  collectives among the same GPUs can wait for one another for ever: of that
  https://github.com/openxla/xla/pull/19026 and, in 2026, 40656.
- `xla_gpu_enable_analytical_latency_estimator` hides 91% of the gathers: a predicted step 8%
  shorter, 10% on A100, none longer. But it hides fewer of the reductions on one node and with
  tensor parallelism, has no estimate for some collectives, and nobody recommends it: NVIDIA has
  XLA schedule by another model on H100, which can be told of the network by who knows it
  (`xla_gpu_analytical_latency_estimator_options=nic_speed_gbps=50`; docs/speed.md, Overlap).
- No change: `xla_gpu_enable_pipelined_reduce_scatter` (true by default, but gradients are
  all-reduces when it runs), loops of permutations with tensor parallelism
  (`xla_gpu_threshold_for_windowed_einsum_mib=0`),
  `xla_gpu_experimental_collective_start_as_early_as_possible`,
  `xla_gpu_enable_while_loop_reduce_scatter_code_motion`. Nothing is disabled in
  `xla_gpu_disable_async_collectives`: every collective of a step is asynchronous.

Tried on TPUs for sums of gradients over fsdp and left out, all by libtpu 0.0.42. On v5p:2x2x1,
where they are reduce-scatters, `xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter` runs
out of a kernel's memory, so there they overlap with nothing. On v5p:4x4x4 they are all-reduces; in
a scanned MLP of 4096 x 11008 nothing made reduce-scatters of them
(`xla_tpu_enable_3d_reduce_scatter_decomposer`, `xla_tpu_enable_all_reduce_scatter_fusion`,
`xla_tpu_assign_all_reduce_scatter_layout`, ...), `xla_tpu_enable_ici_rs_pipelining` took memory and
hid nothing, and offloading them to the sparse cores
(`xla_tpu_enable_sparse_core_collective_offload_all_reduce`) overlapped as much for less memory; but
that has not been seen to run.
"""

from __future__ import annotations

import os
import pathlib
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
_SCATTERS = "a layer's reduce-scatters are not made one: that has nothing left to run beside it"
_NVIDIA = "https://docs.nvidia.com/jax-toolbox/environment-variables"
_SCHEDULE = "collectives run while something is computed: without it not on several nodes of A100s"
_COMBINED = "https://github.com/openxla/xla/pull/18838"
_REDUCTIONS = "sums of gradients over data wait for the end of the backward pass, and for less"

_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"

FLAGS: dict[str, dict[str, Flag]] = {
    "cpu": {
        _YNNPACK: Flag(
            "-individual_dot,-individual_convolution,-dot,-eltwise",
            "YNNPACK's matmuls, on by default in jaxlib 0.10, are slower than Eigen's; its sums "
            "are faster than XLA's own",
            "docs/speed.md",
        ),
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": Flag("true", _SCHEDULE, _NVIDIA),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": Flag("1048576", _SCATTERS, _COMBINED),
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

VARIABLES = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
"""Where a platform's compiler reads them, once, when JAX starts."""

_SWITCH = "SPMD_TRAIN_XLA_FLAGS"


def flags_in_force(platform: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Name to value of the platform's flags in the table: the user's value, or else the table's."""
    if environ.get(_SWITCH) == "off":
        return {}
    given = _given(environ.get(VARIABLES.get(platform, ""), ""))
    return {name: given.get(name, flag.value) for name, flag in FLAGS.get(platform, {}).items()}


def program_options(platform: str, *, compute_dtype: str) -> dict[str, str]:
    """Compiler options of a program that computes in this dtype, beyond the process's flags.

    YNNPACK multiplies bfloat16 by the CPU's own instructions, if it has any: twice as fast as Eigen
    multiplies float32, which all else makes of bfloat16 first (docs/speed.md).
    """
    flag = FLAGS["cpu"].get(_YNNPACK)
    ours = flag is not None and flags_in_force("cpu", os.environ).get(_YNNPACK) == flag.value
    if platform != "cpu" or compute_dtype != "bfloat16" or not ours or not _multiplies_bfloat16():
        return {}
    return {_YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def _multiplies_bfloat16() -> bool:
    path = pathlib.Path("/proc/cpuinfo")
    words = path.read_text().split() if path.exists() else []
    return "avx512_bf16" in words or "amx_bf16" in words


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
