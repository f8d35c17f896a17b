"""Matmuls in eight bits: operands scaled and rounded as they come, by qwix.

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


class Dot(Protocol):
    """A product of two arrays."""

    def __call__(
        self, a: jax.Array, b: jax.Array, dims: tuple[Sequence[int], Sequence[int]]
    ) -> jax.Array:
        """Sums over the `dims` of `a` and of `b`; those of `a` that are left come first."""
        ...


class Dots(NamedTuple):
    """How a projection multiplies.

    Attributes:
        output: inputs by the kernel.
        input_gradient: gradients of the output by the kernel.
    """

    output: Dot
    input_gradient: Dot


def _dot(a: jax.Array, b: jax.Array, dims: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    return jax.lax.dot_general(a, b, (dims, ((), ())))


def _quantized_dot(
    a: jax.Array,
    b: jax.Array,
    dims: tuple[Sequence[int], Sequence[int]],
    *,
    qwix: Any,
    a_dtype: Any,
    b_dtype: Any,
    calibration: str,
) -> jax.Array:
    def quantize(x: jax.Array, contracted: Sequence[int], dtype: Any) -> Any:
        kept = [dim for dim in range(x.ndim) if dim not in contracted]
        # Scales in float32: in bfloat16 they, and what they divide, would be rounded once more.
        return qwix.quantize(
            x.astype(jnp.float32), dtype, channelwise_axes=kept, calibration_method=calibration
        )

    return qwix.dot_general(
        quantize(a, dims[0], a_dtype),
        quantize(b, dims[1], b_dtype),
        (dims, ((), ())),
        preferred_element_type=a.dtype,
    )


class _Format(NamedTuple):
    """Dtype of inputs and kernels, that of gradients, and how qwix finds a scale."""

    forward: Any
    gradient: Any
    calibration: str


_FORMATS = {
    # By itself qwix takes the largest magnitude to 127.5, where float noise decides how it rounds.
    "int8": _Format(jnp.int8, jnp.int8, f"absmax,{127.5 / 127}"),
    "fp8": _Format(jnp.float8_e4m3fn, jnp.float8_e5m2, "absmax"),
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
    dot: Callable[..., Any] = functools.partial(
        _quantized_dot, qwix=qwix, b_dtype=form.forward, calibration=form.calibration
    )
    return Dots(
        functools.partial(dot, a_dtype=form.forward), functools.partial(dot, a_dtype=form.gradient)
    )
