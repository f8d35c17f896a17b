"""Every projection of every model: `project`, the layer that holds its kernel, and a tape.

The tape parts a projection's backward pass in two: the gradient of its input now, that of its
kernel later, from what the tape has kept (`weight_gradients`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from spmd_train.nn.cpu import MatrixProduct, matrix_product
from spmd_train.nn.grouped import kernel_gradient
from spmd_train.nn.params import Initializer, param, zeros
from spmd_train.nn.quantization import Dot, dots_of
from spmd_train.parallel.manual import no_gradient
from spmd_train.parallel.rules import LogicalAxes, vary

SAVED_NAME = "projection"
"""The name under which a remat policy can keep a projection's output."""


def project(
    x: jax.Array, kernel: jax.Array, *, num_contracted: int = 1, quantization: str = "none"
) -> jax.Array:
    """Contracts the last dims of `x` with the first dims of `kernel`.

    Args:
        x: [..., *contracted].
        kernel: [*contracted, *out], same dtype; accumulates in float32 on every platform.
        num_contracted: how many dims are contracted.
        quantization: `model.quantization`, of the output and the gradient of `x`. The gradient of
            the kernel, a sum over tokens, is that of an unquantized product, in the dtype of `x`:
            a scale over tokens would depend on how a batch is split.

    Returns:
        [..., *out], in the dtype of `x`.
    """
    # XLA's CPU compiler makes the weight gradient of a 3-D x a transposing copy and a slow dot (a
    # third of the speed), and transposes a kernel of heads for that of x; of two dims each they are
    # fast matmuls.
    product = matrix_product()
    if product or quantization != "none":
        y = _project(x, kernel, num_contracted, quantization, product)
    else:
        y = _output(x, kernel, num_contracted, quantization, None)
    return checkpoint_name(y, SAVED_NAME)


def _output(
    x: jax.Array, kernel: jax.Array, n: int, quantization: str, product: MatrixProduct | None
) -> jax.Array:
    if product and quantization == "none":
        y = product(*_flat(x, kernel, n), (1, 0))
        return y.reshape(*x.shape[: x.ndim - n], *kernel.shape[n:])
    contracted = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
    return dots_of(quantization).output(x, kernel, (contracted, ((), ())))


def _flat(x: jax.Array, kernel: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    kernel_2d = kernel.reshape(math.prod(kernel.shape[:n]), -1)
    return x.reshape(-1, kernel_2d.shape[0]), kernel_2d


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(
    x: jax.Array, kernel: jax.Array, n: int, quantization: str, product: MatrixProduct | None
) -> jax.Array:
    return _output(x, kernel, n, quantization, product)


def _project_fwd(x: jax.Array, kernel: jax.Array, *how: Any):
    return _output(x, kernel, *how), (x, kernel)


def _project_bwd(
    n: int,
    quantization: str,
    product: MatrixProduct | None,
    saved: tuple[jax.Array, jax.Array],
    g: jax.Array,
):
    x, kernel = saved
    input_gradient = dots_of(quantization).input_gradient
    if product:
        x_2d, kernel_2d = _flat(x, kernel, n)
        g_2d = g.reshape(-1, kernel_2d.shape[1])
        if quantization == "none":
            dx = product(g_2d, kernel_2d, (1, 1))
        else:
            dx = input_gradient(g_2d, kernel_2d, (((1,), (1,)), ((), ())))
        return dx.reshape(x.shape), product(x_2d, g_2d, (0, 0)).reshape(kernel.shape)
    num_tokens, num_out = x.ndim - n, kernel.ndim - n
    contracted = tuple(range(g.ndim - num_out, g.ndim)), tuple(range(n, kernel.ndim))
    dx = input_gradient(g, kernel, (contracted, ((), ())))
    tokens = tuple(range(num_tokens))
    return dx, jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))


_project.defvjp(_project_fwd, _project_bwd)


def project_by_experts(
    x: jax.Array,
    kernel_EDF: jax.Array,
    sizes_E: jax.Array | None = None,
    *,
    quantization: str = "none",
    in_axes: Sequence[str] = (),
    out_axes: Sequence[str] = (),
) -> jax.Array:
    """Each expert's rows times its kernel; called with one device's rows at a time.

    Args:
        x: [R, D] with `sizes_E`: rows of the first expert first, then those of the second, ...;
            without: [E, R, D].
        kernel_EDF: same dtype; accumulates in float32 on every platform.
        sizes_E: int32, how many rows each expert has. Rows beyond their sum are no one's.
        quantization: as of `project`.
        in_axes: mesh axes over which D is split: the result is a part of the sum.
        out_axes: mesh axes over which F is split.

    Returns:
        [R, F] or [E, R, F], in the dtype of `x`; what is in no one's rows is not defined.
    """
    y = _project_by_experts(x, kernel_EDF, sizes_E, quantization, tuple(in_axes), tuple(out_axes))
    return checkpoint_name(y, SAVED_NAME)


def _by_experts(
    dot: Dot,
    x: jax.Array,
    kernel_EDF: jax.Array,
    sizes_E: jax.Array | None,
    *,
    kernel_dim: int,
    split: Sequence[str],
) -> jax.Array:
    """Sums over the last dim of `x` and `kernel_dim`."""
    experts = ((0,), (0,)) if sizes_E is None else ((), ())
    dims = ((x.ndim - 1,), (kernel_dim,)), experts
    return dot(x, kernel_EDF, dims, sizes=sizes_E, split=split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _project_by_experts(
    x: jax.Array,
    kernel_EDF: jax.Array,
    sizes_E: jax.Array | None,
    quantization: str,
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
) -> jax.Array:
    dot = dots_of(quantization).output
    return _by_experts(dot, x, kernel_EDF, sizes_E, kernel_dim=1, split=in_axes)


def _project_by_experts_fwd(x: jax.Array, kernel_EDF: jax.Array, sizes_E: Any, *how: Any):
    return _project_by_experts(x, kernel_EDF, sizes_E, *how), (x, kernel_EDF, sizes_E)


def _project_by_experts_bwd(
    quantization: str,
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    saved: tuple[jax.Array, jax.Array, jax.Array | None],
    g: jax.Array,
):
    x, kernel_EDF, sizes_E = saved
    dot = dots_of(quantization).input_gradient
    dx = _by_experts(dot, g, kernel_EDF, sizes_E, kernel_dim=2, split=out_axes)
    if sizes_E is None:
        return dx, jnp.einsum("erd,erf->edf", x, g), None
    return dx, kernel_gradient(x, g, sizes_E), no_gradient(sizes_E)


_project_by_experts.defvjp(_project_by_experts_fwd, _project_by_experts_bwd)


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
        quantization: str = "none",
    ) -> None:
        """Makes the kernel [*in_shape, *out_shape] and, if asked, the bias [*out_shape].

        Raises:
            ConfigError: what `quantization` needs is not installed.
        """
        self.num_contracted = len(in_shape)
        self.quantization = quantization
        dots_of(quantization)  # Refuses here, before anything is trained or written.
        self.kernel = param(rngs, (*in_shape, *out_shape), axes, init=init, dtype=dtype)
        out_axes = axes[len(in_shape) :]
        # A bias on the residual stream is a vector like a norm's scale: not worth sharding.
        bias_axes = ("norm",) if out_axes == ("embed",) else out_axes
        self.bias = param(rngs, out_shape, bias_axes, init=zeros, dtype=dtype) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *in_shape] to [..., *out_shape]."""
        kernel, tape = self.kernel[...].astype(x.dtype), _tape.get()
        y = self.multiply(x, kernel) if tape is None else tape.project(self, x, kernel)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def multiply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """`project` with this kernel, its bias left out."""
        return project(
            x, kernel, num_contracted=self.num_contracted, quantization=self.quantization
        )


def dot_float32(
    x: jax.Array, kernel: jax.Array, *, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """[..., D] times [D, V] with a float32 result: logits.

    `precision`: of the product of float32 inputs, which accelerators round by default.
    """
    return jnp.einsum(
        "...d,dv->...v", x, kernel, preferred_element_type=jnp.float32, precision=precision
    )


class Operands(NamedTuple):
    """What the kernel gradients of a layer are made of.

    Attributes:
        inputs: of the projections, by their path in the layer; several paths, joined by `+`, where
            they share an input.
        outputs: of the projections that had no tap.
    """

    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]


@jax.custom_vjp
def _tapped(y: jax.Array, tap: jax.Array) -> jax.Array:
    """`y`; the gradient goes to the tap as well."""
    return y


_tapped.defvjp(lambda y, tap: (y, None), lambda _, g: (g, g))


class Tape:
    """Runs the projections of one layer without the gradients of their kernels."""

    def __init__(self, layer: nnx.Module, taps: Mapping[str, jax.Array]) -> None:
        """Finds the projections of the layer; `taps` are arrays shaped as their outputs."""
        self._names = {
            id(module): "/".join(map(str, path))
            for path, module in nnx.iter_graph(layer)
            if isinstance(module, Projection)
        }
        self._taps = taps
        self._inputs: dict[str, jax.Array] = {}
        self._outputs: dict[str, jax.Array] = {}

    def project(self, projection: Projection, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """What the projection does; its kernel's gradient is zero, its output's is the tap's."""
        name = self._names[id(projection)]
        assert name not in self._inputs, f"{name} is used twice in a layer"
        y = projection.multiply(x, jax.lax.stop_gradient(kernel))
        self._inputs[name] = x
        if name in self._taps:
            return _tapped(y, self._taps[name])
        self._outputs[name] = y
        return y

    @property
    def operands(self) -> Operands:
        """What has been kept, each input once."""
        sharing: dict[int, list[str]] = {}
        for name, x in self._inputs.items():
            sharing.setdefault(id(x), []).append(name)
        inputs = {"+".join(names): self._inputs[names[0]] for names in sharing.values()}
        return Operands(inputs, self._outputs)


_tape: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("tape", default=None)


@contextlib.contextmanager
def recording(tape: Tape | None) -> Iterator[None]:
    """Lets the projections called inside go through a tape; None: they do not."""
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)


def weight_gradients(
    inputs: Mapping[str, jax.Array], tap_gradients: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Gradients of kernels from what a tape has kept.

    Args:
        inputs: `Operands.inputs`, [B, T, *contracted] each.
        tap_gradients: of the taps, [B, T, *out] each, by the projections' paths.

    Returns:
        [*contracted, *out] by the projections' paths, in the dtype of the inputs.
    """
    gradients = {}
    for names, x in inputs.items():
        for name in names.split("+"):
            g = tap_gradients[name]
            kernel = vary(jnp.zeros((*x.shape[2:], *g.shape[2:]), x.dtype))
            # Linear in the kernel, so that its value does not matter and is not computed with.
            _, pull = jax.vjp(functools.partial(project, x, num_contracted=x.ndim - 2), kernel)
            gradients[name] = pull(g)[0]
    return gradients
