"""What XLA's GPU compiler wants to know of a GPU that is not here.

The numbers are those of XLA's own descriptions, xla/backends/gpu/target_config/specs/*.txtpb.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    name: str
    capability: int
    cores: int
    fpus: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2: int
    shared: int
    shared_optin: int


_HOPPER = {
    "capability": 9,
    "cores": 132,
    "fpus": 128,
    "clock_ghz": 1.98,
    "l2": 52428800,
    "shared": 233472,
    "shared_optin": 232448,
}
_AMPERE = {
    "capability": 8,
    "cores": 108,
    "fpus": 64,
    "clock_ghz": 1.41,
    "l2": 41943040,
    "shared": 167936,
    "shared_optin": 166912,
}
_SPECS = {
    "a100-40gb": _Spec(
        name="NVIDIA A100-SXM4-40GB", memory=42331013120, bandwidth=1555200000000, **_AMPERE
    ),
    "a100-80gb": _Spec(
        name="NVIDIA A100-SXM4-80GB", memory=85100068864, bandwidth=2039040000000, **_AMPERE
    ),
    "h100": _Spec(
        name="NVIDIA H100 80GB HBM3", memory=84942979072, bandwidth=3352320000000, **_HOPPER
    ),
    "h200": _Spec(name="NVIDIA H200", memory=151397597184, bandwidth=4800000000000, **_HOPPER),
    "b200": _Spec(
        name="NVIDIA B200",
        capability=10,
        cores=148,
        fpus=128,
        clock_ghz=1.965,
        memory=191514411008,
        bandwidth=7672320000000,
        l2=132644864,
        shared=233472,
        shared_optin=232448,
    ),
}


def gpu_target_config(chip_name: str) -> str:
    """XLA's `stream_executor.GpuTargetConfigProto` of a chip, as text.

    Args:
        chip_name: key of `CHIPS`: `a100-40gb`, `a100-80gb`, `h100`, `h200` or `b200`.
    """
    spec = _SPECS[chip_name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {spec.shared}
  shared_memory_per_block_optin: {spec.shared_optin}
  core_count: {spec.cores}
  fpus_per_core: {spec.fpus}
  clock_rate_ghz: {spec.clock_ghz}
  l2_cache_size: {spec.l2}
  memory_bandwidth: {spec.bandwidth}
  device_memory_size: {spec.memory}
  cuda_compute_capability {{ major: {spec.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{spec.name}"
"""
