"""FLOPs of one matmul, convolution or known kernel in HLO; a multiply and an add are two."""

from __future__ import annotations

import json
import math
import re

import numpy as np

from spmd_train.inspect.hlo import Computation, Instruction, array_bytes

_DIMS = re.compile(r"[a-z]\w*\[([\d,<= ]*)\]")
_WINDOW = re.compile(r"(\w+)=([\d_x\-]+)")
_GEMM = re.compile(r"__cublas\$(?:lt\$)?(?:matmul|gemm)")
_TOLD = re.compile(r"\bkernel_flops_(\d+)")
_COST = re.compile(r'\\?"cost_estimate\\?":\s*(\{[^}]*\})')


def dims_of(shape: str) -> tuple[int, ...]:
    """The dims of a shape; of the first array of a tuple."""
    match = _DIMS.search(shape)
    if match is None:
        raise ValueError(f"no array in the HLO shape {shape!r}")
    return tuple(int(d.removeprefix("<=")) for d in match[1].split(",") if d)


def instruction_flops(instruction: Instruction, computation: Computation) -> float | None:
    """FLOPs of one execution; 0 for what is no matmul, None for a kernel that does not tell.

    Args:
        instruction: any.
        computation: where it stands, for the shapes of its operands.

    Raises:
        ValueError: a matmul is written in a way that is not known here.
    """
    opcode = instruction.opcode
    if opcode == "dot":
        contracted = _indices(instruction.attributes.get("lhs_contracting_dims", "{}"))
        lhs = _operand_dims(instruction, computation, 0)
        return 2.0 * math.prod(dims_of(instruction.shape)) * math.prod(lhs[i] for i in contracted)
    if opcode == "convolution":
        return _convolution(instruction, computation)
    if opcode == "custom-call":
        return _custom_call(instruction, computation)
    return 0.0


def _custom_call(instruction: Instruction, computation: Computation) -> float | None:
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    config = instruction.attributes.get("backend_config", "")
    if _GEMM.search(target):
        numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', config)
        if numbers is None:
            raise ValueError(f"a matmul without dimension numbers: {config[:200]!r}")
        lhs = _operand_dims(instruction, computation, 0)
        contracted = [int(d) for d in re.findall(r"\d+", numbers[1])]
        return 2.0 * math.prod(dims_of(instruction.shape)) * math.prod(lhs[i] for i in contracted)
    if target == "tpu_custom_call" or target.startswith(("__cudnn", "__gpu$xla.gpu.triton")):
        if _takes_integers_alone(instruction, computation):
            return 0.0  # Tables for another kernel: of a grouped matmul, say.
        return told_flops(instruction.op_name) or _cost_estimate(config)
    return 0.0


def _takes_integers_alone(instruction: Instruction, computation: Computation) -> bool:
    shapes = [computation.instructions[name].shape for name in instruction.operands]
    return {dtype for shape in shapes for dtype, _ in array_bytes(shape)} <= {"s32", "u32"}


def told_flops(scope: str) -> float | None:
    """FLOPs of a kernel whose caller has told them by `parallel.by_kernel.kernel_flops`."""
    match = _TOLD.search(scope)
    return float(match[1]) if match else None


def _cost_estimate(config: str) -> float | None:
    """What a Pallas kernel's author has told of it."""
    cost = _COST.search(config)
    flops = json.loads(cost[1].replace("\\", "")).get("flops") if cost else None
    return float(flops) if flops else None


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """As XLA counts: only the places where a window meets the input (TPU matmuls are windows)."""
    attributes = instruction.attributes
    lhs_labels, rest = attributes["dim_labels"].split("_")
    rhs_labels, out_labels = rest.split("->")
    lhs = dict(zip(lhs_labels, _operand_dims(instruction, computation, 0), strict=True))
    rhs = dict(zip(rhs_labels, _operand_dims(instruction, computation, 1), strict=True))
    out = dict(zip(out_labels, dims_of(instruction.shape), strict=True))
    features = lhs["f"] // int(attributes.get("feature_group_count", 1))
    batch = lhs["b"] // int(attributes.get("batch_group_count", 1))
    window = dict(_WINDOW.findall(attributes.get("window", "").strip("{}")))
    spatial = sorted(label for label in out if label.isdigit())
    places = [
        _valid_places(window, i, lhs[label], rhs[label], out[label])
        for i, label in enumerate(spatial)
    ]
    return 2.0 * features * rhs["o"] * batch * math.prod(places)


def _valid_places(window: dict[str, str], i: int, size: int, kernel: int, out: int) -> int:
    """Pairs of an output place and a kernel place that meet the input, along one spatial dim."""

    def of(name: str, default: str) -> str:
        return window[name].split("x")[i] if name in window else default

    low = int(of("pad", "0_0").split("_")[0])
    stride, grown = int(of("stride", "1")), int(of("lhs_dilate", "1"))
    kernel_step = int(of("rhs_dilate", "1"))
    starts = np.arange(out) * stride - low
    count = 0
    for k in range(kernel):
        at = starts + k * kernel_step
        count += int(((at % grown == 0) & (at >= 0) & (at // grown < size)).sum())
    return count


def _operand_dims(instruction: Instruction, computation: Computation, i: int) -> tuple[int, ...]:
    return dims_of(computation.instructions[instruction.operands[i]].shape)


def _indices(text: str) -> list[int]:
    return [int(d) for d in re.findall(r"\d+", text)]
