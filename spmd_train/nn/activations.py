"""What stands between the projections of a feed-forward."""

from __future__ import annotations

import jax


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202).

    Only the two are kept for the backward pass, not the sigmoid and the product besides.

    Args:
        gate: any shape.
        up: same shape and dtype.

    Returns:
        The same shape and dtype.
    """
    return jax.nn.silu(gate) * up


def _swiglu_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_bwd)
