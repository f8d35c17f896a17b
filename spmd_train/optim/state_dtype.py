"""Optimizer state in one dtype, arithmetic in another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from spmd_train.parallel.rules import leaf_path


def with_state_dtype(
    inner: optax.GradientTransformation, *, dtype: str
) -> optax.GradientTransformation:
    """Keeps the moments of a transformation in `dtype`; it computes in float32 whatever they are.

    A moment is a float leaf whose path in the state ends in a parameter's path. Counts and
    constants of the algorithm keep their own dtypes. Gradients and parameters of any float dtype
    come in; updates go out in float32.

    Args:
        inner: the transformation.
        dtype: a float dtype's name.

    Returns:
        A transformation whose state has the same structure.
    """

    def store(state: Any, params: Any) -> Any:
        paths = {leaf_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]}

        def one(key_path: Any, leaf: jax.Array) -> jax.Array:
            parts = leaf_path(key_path).split("/")
            is_moment = any("/".join(parts[i:]) in paths for i in range(len(parts)))
            return _cast(leaf, dtype) if is_moment else leaf

        return jax.tree_util.tree_map_with_path(one, state)

    def init(params: Any) -> Any:
        return store(inner.init(params), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new_updates, new_state = inner.update(_float32(updates), _float32(state), _float32(params))
        return new_updates, store(new_state, updates)

    return optax.GradientTransformation(init, update)


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _cast(leaf, "float32"), tree)
