"""An exponential moving average of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ema_update(ema: Any, params: Any, *, decay: float, step: jax.typing.ArrayLike) -> Any:
    """Moves the average towards the parameters.

    The decay is warmed up: `min(decay, (1 + step) / (10 + step))`, so that a short run's average is
    not that of its initial values (as in TensorFlow's ExponentialMovingAverage with `num_updates`).

    Args:
        ema: the average, a tree of float arrays. Keep it in float32: with a decay of 0.999 and
            more, a bfloat16 average is too coarse to move.
        params: the parameters after this step's update, same structure and shapes.
        decay: the highest decay.
        step: updates of the average before this one.

    Returns:
        The new average, in the old one's dtypes; the arithmetic is float32.
    """
    t = jnp.asarray(step, jnp.float32)
    weight = 1.0 - jnp.minimum(decay, (1.0 + t) / (10.0 + t))

    def one(average: jax.Array, param: jax.Array) -> jax.Array:
        old = average.astype(jnp.float32)
        return (old + weight * (param.astype(jnp.float32) - old)).astype(average.dtype)

    return jax.tree.map(one, ema, params)
