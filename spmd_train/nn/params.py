"""How a parameter is made: shape, logical axes and initializer in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_train.parallel.rules import LogicalAxes

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]


class ModelState(nnx.Variable):
    """What a step changes by a rule of its own, not by a gradient; `axes` as a parameter's."""


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: LogicalAxes, *, init: Initializer, dtype: str
) -> nnx.Param:
    """A parameter with its logical axes in the metadata (`axes`).

    Args:
        rngs: a fresh key is drawn from the stream `params`.
        shape: of the array.
        axes: one logical axis, or None, per dim.
        init: called as `init(key, shape, dtype)`.
        dtype: in which it is kept.

    Returns:
        The parameter.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.dtype(dtype)), axes=tuple(axes))


def normal(scale: float) -> Initializer:
    """Normal initializer with standard deviation `scale`."""
    return jax.nn.initializers.normal(scale)


zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones
