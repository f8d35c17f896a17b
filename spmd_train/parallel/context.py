"""Attention over sequences that are split over devices (mesh axis `context`).

| method | what travels, per layer | |
|---|---|---|
| `ring` | keys and values, a device a step | Liu et al., arXiv:2310.01889 |
| `all_gather` | all keys and values to all devices at once | Llama 3, arXiv:2407.21783 |
| `ulysses` | queries, keys, values, outputs: tokens for heads | DeepSpeed, arXiv:2309.14509 |

Each is a `shard_map` over every axis that shards the attention's arrays, with its own derivative
rule: the backward pass makes a tile's scores again, so that memory stays linear in the tokens of
a device, and it can stand inside another `shard_map`. What a device computes is done by the
platform's kernel (`by_kernel`), where it has one that can, else in plain JAX (`blockwise`).

Dims: B batch, T a device's queries, S keys, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from spmd_train.config import MESH_AXES
from spmd_train.parallel.blockwise import Attending, Blocks, Tokens
from spmd_train.parallel.by_kernel import SAVED_NAME, ByKernel, Kernel, Scoring, lay_heads
from spmd_train.parallel.context_methods import METHODS, Split
from spmd_train.parallel.manual import by_hand_over, no_gradient, opaque
from spmd_train.parallel.rules import (
    axes_of,
    current_layout,
    current_platform,
    manual_axes,
    to_spec,
)
from spmd_train.parallel.sequence import check_heads, placement_of


def attend_split(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    tokens: Tokens,
    softcap: float,
    window: int,
    kernel: Kernel | None = None,
) -> jax.Array:
    """`nn.attention.attend` for tokens that lie on the devices as the layout places them.

    Args:
        q_BTHK: queries, global arrays as everywhere outside a `shard_map`.
        k_BTGK: keys.
        v_BTGK: values.
        tokens: segments and positions, [B, T].
        softcap: of the scores; 0: off.
        window: a key is visible if it is less than so many positions before; 0: off.
        kernel: that computes it; None: plain JAX does.

    Returns:
        [B, T, H, K] in the dtype of `q_BTHK`.

    Raises:
        ConfigError: the sequence or (ulysses) the heads do not divide over the devices.
    """
    layout = current_layout()
    assert layout is not None
    axes = layout.axes("sequence")
    assert not set(axes) & set(manual_axes()), "attend_split takes whole sequences"
    sizes = kernel.sizes if kernel else ()
    placement = placement_of(q_BTHK.shape[1], window=window, sizes=sizes)
    check_heads(q_BTHK.shape[2], k_BTGK.shape[2], layout)
    method = METHODS[layout.context.method]

    batch, heads, k_BTGK, v_BTGK = lay_heads(
        q_BTHK, k_BTGK, v_BTGK, layout=layout, sequence="sequence", whole=kernel is not None
    )
    kv_copies = max(1, layout.size(axes) // (k_BTGK.shape[2] // layout.size(heads)))
    by_groups = current_platform() == "cpu" and "pipeline" in manual_axes()
    by: Attending = Blocks(softcap, window, placement.tile)
    if kernel:
        by = ByKernel(kernel, Scoring(softcap, window))
    split = Split(axes, placement, by, kv_copies, by_groups)
    spec = to_spec([batch, axes, heads])
    token_spec = to_spec([batch, axes])
    qkv_specs = (spec, spec, spec)
    entered = method.entered(batch, axes, heads)
    # A kernel is a device's own: XLA cannot share it out over the axes that are left to it.
    taken = set(MESH_AXES) - set(manual_axes()) if kernel else set(axes_of(spec))
    manual = tuple(a for a in MESH_AXES if a in taken)
    by_hand = functools.partial(by_hand_over, layout=layout, axes=manual, check=kernel is None)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, Any]:
        qkv: tuple[jax.Array, ...] = (q, k, v)
        with jax.named_scope(layout.context.method):
            if method.enter:
                run = functools.partial(method.enter, split)
                run = by_hand(run, in_specs=qkv_specs, out_specs=(entered,) * 3)
                qkv = opaque(run)(*qkv)
            run = functools.partial(method.forward, split)
            run = by_hand(run, in_specs=((entered,) * 3, token_spec), out_specs=(spec, entered))
            out, log_total = opaque(run)(qkv, tokens)
        if kernel:
            out, log_total = (checkpoint_name(x, SAVED_NAME) for x in (out, log_total))
        return out, ((*qkv, log_total), out, tokens)

    def backward(residuals: Any, out_grad: jax.Array) -> tuple[Any, ...]:
        saved, out, tokens = residuals
        run = by_hand(
            functools.partial(method.backward, split),
            in_specs=((entered,) * 4, token_spec, spec, spec),
            out_specs=qkv_specs,
        )
        with jax.named_scope(layout.context.method):
            grads = opaque(run)(saved, tokens, out, out_grad)
        return *grads, jax.tree.map(no_gradient, tokens)

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens) -> jax.Array:
        return forward(q, k, v, tokens)[0]

    attention.defvjp(forward, backward)
    return attention(q_BTHK, k_BTGK, v_BTGK, tokens)
