"""What the makers say their chips can do, per JAX device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_GIB = 2**30

_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_AMPERE = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/"
    "nvidia-ampere-architecture-whitepaper.pdf"
)
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_DGX = "https://docs.nvidia.com/dgx/dgx{0}-user-guide/introduction-to-dgx{0}.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device's hardware: usually a chip, half a chip for TPU7x.

    Attributes:
        device_kinds: `jax.Device.device_kind` of it, exactly.
        flops: compute dtype to the highest dense matmul rate, FLOP/s, at JAX's default precision:
            float32 matmuls run in bfloat16 on TPUs and in TF32 on NVIDIA GPUs since Ampere
            (https://docs.jax.dev/en/latest/201/precision.html); `float8`: either 8-bit format. A
            dtype that the chip has no fast matmul for, or of which no page tells, is not in it.
        hbm_bytes: nominal memory; the runtime keeps some of it for itself.
        hbm_bandwidth: bytes/s.
        source: where the numbers are from.
        ici_bandwidth: bytes/s that a device can send over ICI or NVLink, all its links together;
            half of what makers print as bidirectional. None: it has none, or it is not known.
        ici_links: links to neighbours that this is spread over, two to a torus dim; 0: a switch,
            any peer at the whole rate.
        dcn_bandwidth: bytes/s that a device can send out of its slice or node; None: not known.
        network_source: where the network's numbers are from.
        host_bandwidth: bytes/s from its host's memory, and as many to it at the same time; None:
            not known. Of GPUs half of what `source` prints for PCIe, of TPUs what
            https://jax-ml.github.io/scaling-book/tpus says.
    """

    device_kinds: tuple[str, ...]
    flops: Mapping[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    source: str
    ici_bandwidth: float | None = None
    ici_links: int = 0
    dcn_bandwidth: float | None = None
    network_source: str = ""
    host_bandwidth: float | None = None


def _tpu(
    device_kinds: tuple[str, ...],
    bfloat16: float,
    gib: int,
    bandwidth: float,
    source: str,
    *,
    ici: float,
    links: int,
    dcn: float | None,
    host: float | None,
    network_source: str = "",
    int8: float | None = None,
    float8: float | None = None,
) -> Chip:
    eight_bit = {"int8": int8, "float8": float8}
    return Chip(
        device_kinds=device_kinds,
        flops={"bfloat16": bfloat16, "float32": bfloat16}
        | {dtype: rate for dtype, rate in eight_bit.items() if rate},
        hbm_bytes=gib * _GIB,
        hbm_bandwidth=bandwidth,
        source=_TPU + source,
        ici_bandwidth=ici,
        ici_links=links,
        dcn_bandwidth=dcn,
        network_source=network_source or _TPU + source,
        host_bandwidth=host,
    )


def _gpu(
    device_kinds: tuple[str, ...],
    sixteen_bit: float,
    tf32: float,
    gigabytes: int,
    bandwidth: float,
    source: str,
    nvlink: float | None = None,
    dcn: float | None = None,
    network_source: str = "",
    *,
    host: float | None,
    float8: bool = True,
) -> Chip:
    # Data sheets since Ampere print rates with 2:4 sparsity; a dense matmul has half of them.
    flops = {"bfloat16": sixteen_bit, "float16": sixteen_bit, "float32": tf32}
    flops["int8"] = 2 * sixteen_bit
    return Chip(
        device_kinds=device_kinds,
        flops=flops | ({"float8": 2 * sixteen_bit} if float8 else {}),
        hbm_bytes=gigabytes * 10**9,
        hbm_bandwidth=bandwidth,
        source=source,
        ici_bandwidth=nvlink,
        dcn_bandwidth=dcn,
        network_source=network_source,
        host_bandwidth=host,
    )


# NVLink 3, 4 and 5; a 200 or 400 Gb/s network card to each GPU of a DGX.
_DGX_A100 = (300e9, 25e9, _DGX.format("a100"))
_DGX_H100 = (450e9, 50e9, _DGX.format("h100"))
_DGX_B200 = (900e9, 50e9, _DGX.format("b200"))

CHIPS: dict[str, Chip] = {
    # Six links of 50 GB/s. Of v4's way out of a slice no page tells.
    "v4": _tpu(
        ("TPU v4",),
        275e12,
        32,
        1200e9,
        "v4",
        ici=300e9,
        links=6,
        dcn=None,
        host=16e9,
        network_source="https://arxiv.org/abs/2304.01433",
        int8=275e12,
    ),
    # A pod of 256 has 6.4 Tb/s to the data centre. (The page's 800 GiB/s are its former 819 GB/s.)
    "v5e": _tpu(
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        16,
        819e9,
        "v5e",
        ici=200e9,
        links=4,
        dcn=3.125e9,
        host=15e9,
        int8=393e12,
    ),
    "v5p": _tpu(
        ("TPU v5p", "TPU v5"),
        459e12,
        95,
        2765e9,
        "v5p",
        ici=600e9,
        links=6,
        dcn=6.25e9,
        host=15e9,
        float8=459e12,
    ),
    # To the data centre a chip has 100 Gb/s: of v6e's and TPU7x's the latter's page tells.
    "v6e": _tpu(
        ("TPU v6 lite", "TPU v6e"),
        918e12,
        32,
        1638e9,
        "v6e",
        ici=400e9,
        links=4,
        dcn=12.5e9,
        host=32e9,
        network_source=_TPU + "tpu7x",
        int8=1836e12,
        float8=918e12,
    ),
    # A chip has 2307 TFLOP/s (4614 in float8), 192 GiB, 7380 GB/s, 600 GB/s of ICI each way and
    # 100 Gb/s to the data centre; JAX shows each of its two halves as a device.
    "v7x": _tpu(
        ("TPU7x",),
        1153.5e12,
        96,
        3690e9,
        "tpu7x",
        ici=300e9,
        links=6,
        dcn=6.25e9,
        host=None,
        float8=2307e12,
    ),
    "t4": Chip(
        # No bfloat16 and no TF32 in Turing's tensor cores.
        device_kinds=("Tesla T4", "NVIDIA T4"),
        flops={"float16": 65e12, "float32": 8.1e12, "int8": 130e12},
        hbm_bytes=16 * 10**9,
        hbm_bandwidth=320e9,
        source=_NVIDIA + "tesla-t4/",
        host_bandwidth=16e9,
    ),
    "l4": _gpu(("NVIDIA L4",), 121e12, 60e12, 24, 300e9, _NVIDIA + "l4/", host=32e9),
    "a100-40gb": _gpu(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB", "A100-PCIE-40GB"),
        312e12,
        156e12,
        40,
        1555e9,
        _AMPERE,
        *_DGX_A100,
        host=32e9,
        float8=False,
    ),
    "a100-80gb": _gpu(
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        312e12,
        156e12,
        80,
        2039e9,
        _A100,
        *_DGX_A100,
        host=32e9,
        float8=False,
    ),
    "a100-pcie-80gb": _gpu(
        ("NVIDIA A100 80GB PCIe",), 312e12, 156e12, 80, 1935e9, _A100, host=32e9, float8=False
    ),
    "h100": _gpu(
        ("NVIDIA H100 80GB HBM3",), 989.4e12, 494.7e12, 80, 3350e9, _HOPPER, *_DGX_H100, host=64e9
    ),
    "h100-pcie": _gpu(("NVIDIA H100 PCIe",), 756e12, 378e12, 80, 2000e9, _HOPPER, host=64e9),
    "h200": _gpu(
        ("NVIDIA H200",), 989.4e12, 494.7e12, 141, 4800e9, _NVIDIA + "h200/", *_DGX_H100, host=64e9
    ),
    "b200": _gpu(
        ("NVIDIA B200",), 2250e12, 1125e12, 180, 8000e9, _NVIDIA + "hgx/", *_DGX_B200, host=None
    ),
}
"""Short name, as in a target like `v5e:16x16` or `h100:4x8`, to chip. CPUs have no entry."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, None if it is not in the table.

    Only whole names match: an H100 that is cut up by MIG, say, is no H100.
    """
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
