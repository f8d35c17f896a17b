"""Every projection of every model: `project`, and the layer that holds its kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from spmd_train.nn.params import Initializer, param, zeros
from spmd_train.parallel.rules import LogicalAxes, current_platform
from spmd_train.parallel.sequence import split_axes

SAVED_NAME = "projection"
"""The name under which a remat policy can keep a projection's output."""


def project(x: jax.Array, kernel: jax.Array, *, num_contracted: int = 1) -> jax.Array:
    """Contracts the last dims of `x` with the first dims of `kernel`.

    Args:
        x: [..., *contracted].
        kernel: [*contracted, *out], same dtype; accumulates in float32 on every platform.
        num_contracted: how many dims are contracted.

    Returns:
        [..., *out], in the dtype of `x`.
    """
    # Tokens of split sequences cannot be one dim without gathering them.
    if current_platform() == "cpu" and not split_axes():
        y = _project_cpu(x, kernel, num_contracted)
    else:
        y = _dot(x, kernel, num_contracted)
    return checkpoint_name(y, SAVED_NAME)


def _dot(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    dims = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
    return jax.lax.dot_general(x, kernel, (dims, ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project_cpu(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    return _dot(x, kernel, n)


def _project_cpu_fwd(x: jax.Array, kernel: jax.Array, n: int):
    return _dot(x, kernel, n), (x, kernel)


def _project_cpu_bwd(n: int, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    # XLA's CPU compiler makes the weight gradient of a 3-D x a transposing copy and a slow dot (a
    # third of the speed); with the tokens flattened to one dim it is one fast matmul.
    x, kernel = saved
    num_out = kernel.ndim - n
    out_dims = tuple(range(g.ndim - num_out, g.ndim)), tuple(range(n, kernel.ndim))
    dx = jax.lax.dot_general(g, kernel, (out_dims, ((), ())))
    x_2d = x.reshape(-1, math.prod(kernel.shape[:n]))
    g_2d = g.reshape(-1, math.prod(kernel.shape[n:]))
    return dx, (x_2d.T @ g_2d).reshape(kernel.shape)


_project_cpu.defvjp(_project_cpu_fwd, _project_cpu_bwd)


def grouped_project(x_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each group of rows times the kernel of its expert; called with one device's rows at a time.

    Args:
        x_RD: rows, those of the first expert first, then those of the second, ...
        kernel_EDF: same dtype; accumulates in float32 on every platform.
        sizes_E: int32, how many rows each expert has. Rows beyond their sum are no one's.

    Returns:
        [R, F], in the dtype of `x_RD`; what is in no one's rows is not defined.
    """
    return checkpoint_name(jax.lax.ragged_dot(x_RD, kernel_EDF, sizes_E), SAVED_NAME)


class Projection(nnx.Module):
    """A linear map from some dims to some others, with an optional bias."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        axes: LogicalAxes,
        *,
        use_bias: bool,
        init: Initializer,
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the kernel [*in_shape, *out_shape] and, if asked, the bias [*out_shape]."""
        self.num_contracted = len(in_shape)
        self.kernel = param(rngs, (*in_shape, *out_shape), axes, init=init, dtype=dtype)
        out_axes = axes[len(in_shape) :]
        # A bias on the residual stream is a vector like a norm's scale: not worth sharding.
        bias_axes = ("norm",) if out_axes == ("embed",) else out_axes
        self.bias = param(rngs, out_shape, bias_axes, init=zeros, dtype=dtype) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *in_shape] to [..., *out_shape]."""
        y = project(x, self.kernel[...].astype(x.dtype), num_contracted=self.num_contracted)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def dot_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., D] times [D, V] with a float32 result: logits."""
    return jnp.einsum("...d,dv->...v", x, kernel, preferred_element_type=jnp.float32)
