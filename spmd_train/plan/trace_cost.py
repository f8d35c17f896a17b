"""FLOPs and kept activations of a traced program: before any compiler, whatever the model.

Counted on the jaxpr of one device's program, so for all devices together; loops multiplied out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from spmd_train.plan.dot_flops import told_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceCost:
    """What a step does, over all devices.

    Attributes:
        flops: of its matmuls and convolutions.
        kept_wide: bytes that the layers keep for the backward pass in arrays as wide as the
            residual stream: split over the batch, not over tensor.
        kept_inner: the same in other arrays (heads, MLP, scores): split over tensor, too.
    """

    flops: float
    kept_wide: float
    kept_inner: float


def trace_cost(program: Any, *, embed_dim: int, num_layers: int) -> TraceCost:
    """Counts a step on its jaxpr.

    Args:
        program: a `Program` on a mesh of one device.
        embed_dim: width of the residual stream, by which kept arrays are told apart.
        num_layers: length of the scan over layers.
    """
    step: Any = program.train_step
    traced = step.trace(program.abstract_state, program.abstract_batch)
    wide, inner = _kept(traced.jaxpr.jaxpr, embed_dim=embed_dim, num_layers=num_layers)
    flops = _flops(traced.jaxpr.jaxpr)
    return TraceCost(flops=flops, kept_wide=wide, kept_inner=inner)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += _dot_flops(eqn, contracted)
        elif name == "ragged_dot_general":  # A row counts once; so do rows of no group.
            numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            total += _dot_flops(eqn, numbers[0][0])
        elif name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output
        elif name == "pallas_call":
            cost = eqn.params.get("cost_estimate")
            total += told_flops(str(eqn.source_info.name_stack)) or (cost.flops if cost else 0.0)
        else:
            inner = [_flops(sub) for sub in _subjaxprs(eqn)]
            if inner:
                total += (max if name == "cond" else sum)(inner) * _times(eqn)
    return total


def _dot_flops(eqn: Any, contracted: Sequence[int]) -> float:
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def _times(eqn: Any) -> int:
    if eqn.primitive.name == "scan":
        return int(eqn.params["length"])
    if eqn.primitive.name == "shard_map":
        # Inside, shapes are those of one shard.
        mesh, axes = eqn.params["mesh"], eqn.params.get("manual_axes", ())
        return math.prod(mesh.shape[axis] for axis in axes)
    return 1


def _kept(jaxpr: Any, *, embed_dim: int, num_layers: int) -> tuple[float, float]:
    """Bytes that scans over the layers stack up: what is carried from forward to backward."""
    wide = inner = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            # What is carried has the shape that it has inside; JAX's versions name it differently.
            inside = eqn.params["jaxpr"].out_avals
            pairs = zip(eqn.outvars, inside, strict=True)
            stacked = [var for var, aval in pairs if var.aval.shape != aval.shape]
            if eqn.params["length"] == num_layers and not eqn.params["reverse"]:
                for var in stacked:
                    aval = var.aval
                    size = math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
                    # Parameters that pass through are kept as parameters already.
                    if aval.ndim < 3:
                        continue
                    if aval.shape[-1] == embed_dim:
                        wide += size
                    else:
                        inner += size
                continue
        parts = [_kept(s, embed_dim=embed_dim, num_layers=num_layers) for s in _subjaxprs(eqn)]
        if parts:
            largest = max(parts, key=sum)
            wide, inner = wide + largest[0], inner + largest[1]
    return wide, inner


def _subjaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
