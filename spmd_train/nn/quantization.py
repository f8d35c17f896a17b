"""Matmuls in eight bits, by qwix: operands scaled and rounded as they come.

Every scale belongs to what is not summed over: a token, or a channel of a kernel. So it depends on
nothing that lies in another microbatch or on another part of the batch, and costs a mesh that
splits the dim summed over one number per token or channel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from spmd_train.config import ConfigError
from spmd_train.nn.grouped import grouped_product

Dims = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""Of `a` and of `b`: dims that are summed over; dims that both have (`jax.lax.dot_general`)."""


class Dot(Protocol):
    """A product of two arrays."""

    def __call__(
        self,
        a: jax.Array,
        b: jax.Array,
        dims: Dims,
        *,
        sizes: jax.Array | None = None,
        split: Sequence[str] = (),
    ) -> jax.Array:
        """As `jax.lax.dot_general`: dims of both, those of `a` that are left, those of `b`.

        Args:
            a: any shape.
            b: in the dtype of `a`.
            dims: summed over, and of both.
            sizes: int32 [E]: `b` has a first dim of E more, and so many rows of `a`, which has
                two dims, are for each (`nn.grouped`).
            split: mesh axes, manual ones, over which what is summed over is split. The result is
                this device's part of the sum.

        Returns:
            In the dtype of `a`.
        """
        ...


class Dots(NamedTuple):
    """How a projection multiplies.

    Attributes:
        output: inputs by the kernel.
        input_gradient: gradients of the output by the kernel.
    """

    output: Dot
    input_gradient: Dot


def _dot(
    a: jax.Array,
    b: jax.Array,
    dims: Dims,
    *,
    sizes: jax.Array | None = None,
    split: Sequence[str] = (),
) -> jax.Array:
    del split  # Each part is exact.
    if sizes is None:
        return jax.lax.dot_general(a, b, dims)
    return grouped_product(
        a,
        b,
        sizes,
        kernel_dim=dims[0][1][0],
        dot=jax.lax.dot_general,
        ragged_dot=jax.lax.ragged_dot_general,
    )


def _quantized_dot(
    a: jax.Array,
    b: jax.Array,
    dims: Dims,
    *,
    sizes: jax.Array | None = None,
    split: Sequence[str] = (),
    qwix: Any,
    a_dtype: Any,
    b_dtype: Any,
) -> jax.Array:
    def quantize(x: jax.Array, contracted: Sequence[int], dtype: Any) -> Any:
        # Scales in float32: in bfloat16 they, and what they divide, would be rounded once more.
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=tuple(contracted), keepdims=True)
        if split:  # What one device would have found.
            largest = jax.lax.pcast(jax.lax.pmax(largest, split), split, to="varying")
        is_integer = jnp.issubdtype(dtype, jnp.integer)
        limits = jnp.iinfo(dtype) if is_integer else jnp.finfo(dtype)
        # A row of nothing, or next to it, has no scale of its own that float32 could hold.
        scale = largest / float(limits.max)
        scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)
        x = x / scale
        return qwix.QArray((jnp.round(x) if is_integer else x).astype(dtype), scale)

    operands = quantize(a, dims[0][0], a_dtype), quantize(b, dims[0][1], b_dtype)
    dot = functools.partial(qwix.dot_general, preferred_element_type=a.dtype)
    if sizes is None:
        return dot(*operands, dims)
    ragged_dot = functools.partial(qwix.ragged_dot_general, preferred_element_type=a.dtype)
    return grouped_product(
        *operands, sizes, kernel_dim=dims[0][1][0], dot=dot, ragged_dot=ragged_dot
    )


class _Format(NamedTuple):
    """Dtype of inputs and kernels, and that of gradients."""

    forward: Any
    gradient: Any


_FORMATS = {
    "int8": _Format(jnp.int8, jnp.int8),
    "fp8": _Format(jnp.float8_e4m3fn, jnp.float8_e5m2),
}


@functools.cache
def dots_of(quantization: str) -> Dots:
    """How projections multiply under `model.quantization`.

    - none: in the dtype of the operands, accumulating in float32.
    - int8: symmetric, the largest magnitude is 127; accumulates in int32.
    - fp8: E4M3 forward, E5M2 for gradients (Micikevicius et al., arXiv:2209.05433), scaled so that
      the largest magnitude is the format's; accumulates as the platform does.

    Raises:
        ConfigError: qwix is not installed.
    """
    if quantization == "none":
        return Dots(_dot, _dot)
    try:
        qwix = importlib.import_module("qwix")
    except ImportError as error:
        raise ConfigError(
            f"model.quantization = {quantization!r} needs the package qwix: "
            "pip install 'spmd-train[quantization]', or set it to none"
        ) from error
    form = _FORMATS[quantization]
    dot: Callable[..., Any] = functools.partial(_quantized_dot, qwix=qwix, b_dtype=form.forward)
    return Dots(
        functools.partial(dot, a_dtype=form.forward), functools.partial(dot, a_dtype=form.gradient)
    )
