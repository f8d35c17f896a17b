"""An optimizer whose moments wait in the host's memory and are updated a layer at a time.

Brought to the device all at once they would be there together: on TPUs old and new ones in buffers
of their own. A loop over the layers holds one layer's at a time (on GPUs: `layer_shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spmd_train.config import ConfigError
from spmd_train.parallel.rules import (
    Layout,
    LogicalAxes,
    current_platform,
    dims_of,
    leaf_path,
    mirrored,
    use_layout,
)

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


def with_host_state(
    inner: optax.GradientTransformationExtraArgs,
    *,
    clip: optax.GradientTransformation,
    layer_shards: Mapping[str, int],
) -> optax.GradientTransformationExtraArgs:
    """Streams what mirrors a parameter in the state through the device.

    Args:
        inner: the transformation, which takes `good=`; each layer of each parameter must be updated
            by itself.
        clip: stateless, before `inner`; sees all gradients at once.
        layer_shards: path of each parameter that stacks layers along its first dim and is taken
            by them, to the number of devices that share that dim out.

    Returns:
        A transformation with `inner`'s state. Its update takes that state with the moments in the
        host's memory (`memory_kind="pinned_host"`) and gives it back there.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, good: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        grads = clip.update(updates, optax.EmptyState())[0]
        paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        owners = [
            mirrored(leaf_path(path), paths)
            for path, _ in jax.tree_util.tree_leaves_with_path(state)
        ]

        # A leaf's type may not tell that it is there, and the loop's carry must.
        state = jax.tree.unflatten(
            jax.tree.structure(state),
            [
                leaf if owner is None or _space(leaf) == _HOST else jax.device_put(leaf, _HOST)
                for leaf, owner in zip(jax.tree.leaves(state), owners, strict=True)
            ],
        )

        def step(grads: list[Any], state_: list[Any], params_: list[Any]) -> tuple[Any, Any]:
            # Leaves that are None belong to another call: nothing of what comes of them is used.
            trees = [
                jax.tree.unflatten(
                    jax.tree.structure(tree),
                    [
                        jnp.zeros(like.shape, like.dtype) if leaf is None else leaf
                        for leaf, like in zip(leaves, jax.tree.leaves(tree), strict=True)
                    ],
                )
                for leaves, tree in ((grads, updates), (state_, state), (params_, params))
            ]
            new_updates, new = inner.update(*trees, good=good)
            return jax.tree.leaves(new_updates), jax.tree.leaves(new)

        grad_leaves, state_leaves, param_leaves = map(jax.tree.leaves, (grads, state, params))
        stacked = [path in layer_shards for path in paths]
        in_loop = [owner in layer_shards for owner in owners]
        once_updates, once_state = step(
            _only(grad_leaves, stacked, wanted=False),
            [
                None if looped else leaf if owner is None else jax.device_put(leaf, _DEVICE)
                for leaf, owner, looped in zip(state_leaves, owners, in_loop, strict=True)
            ],
            _only(param_leaves, stacked, wanted=False),
        )
        once_state = [
            leaf if owner is None or looped else jax.device_put(leaf, _HOST)
            for leaf, owner, looped in zip(once_state, owners, in_loop, strict=True)
        ]
        if not any(stacked):
            return (
                jax.tree.unflatten(jax.tree.structure(updates), once_updates),
                jax.tree.unflatten(jax.tree.structure(state), once_state),
            )

        shards = [layer_shards.get(path, 1) for path in paths]
        state_shards = [layer_shards.get(owner or "", 1) for owner in owners]
        (num_steps,) = {
            leaf.shape[0] // n
            for leaf, n, looped in zip(param_leaves, shards, stacked, strict=True)
            if looped
        }

        def body(i: jax.Array, carry: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
            written, held = carry
            brought = _each(_layers_of, i, held, state_shards)
            new_updates, new_state = step(
                _each(_layers_of, i, written, shards),
                [
                    old if owner is None else leaf
                    for leaf, old, owner in zip(
                        jax.device_put(brought, _DEVICE), state_leaves, owners, strict=True
                    )
                ],
                _each(_layers_of, i, _only(param_leaves, stacked), shards),
            )
            return (
                _each(_with_layers, i, written, shards, new_updates),
                _each(
                    _with_layers,
                    i,
                    held,
                    state_shards,
                    jax.device_put(_only(new_state, in_loop), _HOST),
                ),
            )

        # Each layer's update is written over its gradient, new moments over the old ones.
        looped = jax.lax.fori_loop(
            0, num_steps, body, (_only(grad_leaves, stacked), _only(state_leaves, in_loop))
        )
        both = [
            [once if leaf is None else leaf for leaf, once in zip(mine, others, strict=True)]
            for mine, others in zip(looped, (once_updates, once_state), strict=True)
        ]
        return (
            jax.tree.unflatten(jax.tree.structure(updates), both[0]),
            jax.tree.unflatten(jax.tree.structure(state), both[1]),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


def check_layers(params: Any, layer_shards: Mapping[str, int]) -> None:
    """Refuses parameters of which devices have different numbers of layers.

    Raises:
        ConfigError: there are such.
    """
    found: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if (name := leaf_path(path)) in layer_shards:
            found.setdefault(leaf.shape[0] // layer_shards[name], name)
    if len(found) > 1:
        raise ConfigError(
            "optimizer.offload = 'host': layers are updated one at a time, but of "
            + " and ".join(f"{name} a device has {count}" for count, name in found.items())
            + "; give their first dims the same axes in sharding.overrides, or set it to none"
        )


def layer_shards(logical_axes: Mapping[str, LogicalAxes | None], layout: Layout) -> dict[str, int]:
    """Path of each parameter to take by layers, to the devices that share out that dim.

    None on GPUs: their kernels read the host's memory themselves, so a whole parameter's moments
    take little of the device's, and XLA (jaxlib 0.10.2) refuses the loop, in which it copies from
    the host to the host.
    """
    with use_layout(layout):
        if current_platform() == "gpu":
            return {}
    return {
        path: layout.size(dims_of(spec, ndim=1)[0])
        for path, spec in layout.param_specs.items()
        if (logical_axes.get(path) or ("",))[0] == "layers"
    }


def _space(x: jax.Array) -> Any:
    return jax.typeof(x).memory_space


def _only(
    leaves: Sequence[Any], belongs: Sequence[bool], *, wanted: bool = True
) -> list[Any | None]:
    return [leaf if b == wanted else None for leaf, b in zip(leaves, belongs, strict=True)]


def _each(f: Callable[..., Any], i: jax.Array, leaves: Sequence[Any], *more: Sequence[Any]) -> list:
    return [
        None if leaf is None else f(i, leaf, *rest)
        for leaf, *rest in zip(leaves, *more, strict=True)
    ]


def _layers_of(i: jax.Array, x: jax.Array, shards: int) -> jax.Array:
    """Layer i of each device's run of layers: [shards, ...]; nothing is sent."""
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(by_shard, i, axis=1, keepdims=False)


def _with_layers(i: jax.Array, x: jax.Array, shards: int, layers: jax.Array) -> jax.Array:
    """`x` with these as what `_layers_of` gives."""
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    return jax.lax.dynamic_update_index_in_dim(by_shard, layers, i, axis=1).reshape(x.shape)
