"""The attention kernel of GPUs, of one device's arrays.

Dims: B batch, T queries, S keys, H query heads, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spmd_train.nn.runs import Block, Runs, runs_of
from spmd_train.parallel.by_kernel import QKV, Scoring, Segments, kernel_flops, why_no_multiple
from spmd_train.parallel.placement import Placement, Tiles
from spmd_train.parallel.rules import current_device


class Triton:
    """Flash attention in Pallas on Triton, on NVIDIA's GPUs since Ampere.

    Per pair of blocks it has 2 matmuls forward; backward 4 for keys and values, 3 for queries, in
    two kernels.
    """

    sizes: tuple[int, ...] = (512, 256, 128)
    lowest: float = float(0.25 * jnp.finfo(jnp.float32).min)
    _FORWARD = Block(queries=128, keys=64)
    _BACKWARD = Block(queries=64, keys=64)

    def __init__(self, *, interpret: bool = False) -> None:
        """Makes it; `interpret` runs it on CPU, slowly."""
        self._interpret = interpret

    def why_not(self, placement: Placement, scoring: Scoring, *, queries: int, keys: int) -> str:
        """See `Kernel`."""
        if not self._interpret and not _is_ampere(current_device()):
            return "that of gpu is for NVIDIA's since Ampere (compute capability 8.0)"
        return why_no_multiple(placement, min(self.sizes))

    def walk(self, steps: Sequence[Tiles], scoring: Scoring) -> Runs:
        """See `Kernel`."""
        return runs_of(steps, (self._FORWARD, self._BACKWARD), scoring.window)

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: Segments,
        walk: Runs,
        scoring: Scoring,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Kernel`."""
        # Here, as Pallas is slow to import.
        from spmd_train.nn import triton_kernels

        told: dict[str, Any] = {"block": self._FORWARD, "interpret": self._interpret}
        with jax.named_scope(kernel_flops(2 * self._flops(q, walk.met[0]))):
            return triton_kernels.forward(q, k, v, segments, walk, scoring, **told)

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: Segments,
        walk: Runs,
        scoring: Scoring,
        *,
        out_grad: jax.Array,
        log_total: jax.Array,
        dot: jax.Array,
    ) -> QKV:
        """See `Kernel`."""
        from spmd_train.nn import triton_kernels

        told: dict[str, Any] = {"out_grad": out_grad, "log_total": log_total, "dot": dot}
        told |= {"block": self._BACKWARD, "interpret": self._interpret}
        given = q, k, v, segments, walk, scoring
        flops = self._flops(q, walk.met[1])
        with jax.named_scope(kernel_flops(3 * flops)):
            q_grad = triton_kernels.queries_backward(*given, **told)
        with jax.named_scope(kernel_flops(4 * flops)):
            return q_grad, *triton_kernels.keys_backward(*given, **told)

    def _flops(self, q: jax.Array, met: int) -> int:
        """Of one matmul over pairs of a query and a key."""
        b, h, _, width = q.shape
        return 2 * b * h * met * width


def _is_ampere(device: Any) -> bool:
    """Whether a GPU has what the kernel is compiled to; AMD's tell a name, not a number."""
    major = str(device.compute_capability).partition(".")[0]
    return major.isdecimal() and int(major) >= 8
