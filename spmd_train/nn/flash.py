"""Attention by a platform's own kernel: scores never leave the chip.

| platform | kernel |
|---|---|
| tpu | JAX's splash attention, in Pallas (`nn.splash`) |
| gpu | flash attention, in Pallas on Triton (`nn.triton`) |

Each also attends over split sequences (`parallel.context`).

Dims: B batch, T tokens, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spmd_train.config import MESH_AXES, ConfigError
from spmd_train.nn.splash import Splash
from spmd_train.nn.triton import Triton
from spmd_train.parallel.blockwise import output_dot
from spmd_train.parallel.by_kernel import SAVED_NAME, Kernel, Scoring, lay_heads
from spmd_train.parallel.manual import by_hand_over, no_gradient, opaque
from spmd_train.parallel.placement import Placement
from spmd_train.parallel.rules import (
    current_layout,
    current_platform,
    manual_axes,
    to_spec,
)
from spmd_train.parallel.sequence import placement_of, split_axes

KERNELS: dict[str, Kernel] = {"tpu": Splash(), "gpu": Triton()}
"""Platform to its kernel."""


def kernel_for(length: int, *, softcap: float, window: int, needed: bool) -> Kernel | None:
    """This platform's kernel, if it can attend to such sequences as the layout lays them.

    Raises:
        ConfigError: there is none, and it is needed.
    """
    platform, layout = current_platform(), current_layout()
    kernel = KERNELS.get(platform)
    why = f"there is none for {platform}, only for {' and '.join(KERNELS)}"
    if kernel:
        placement = placement_of(length, window=window, sizes=kernel.sizes)
        queries = keys = length
        if layout is not None and split_axes():
            own, method = length // placement.num_devices, layout.context.method
            queries, keys = {"ring": (own, own), "all_gather": (own, length)}.get(
                method, (length, length)
            )
        why = kernel.why_not(placement, Scoring(softcap, window), queries=queries, keys=keys)
    if why and needed:
        raise ConfigError(
            f"model.attention=flash: no attention kernel: {why}; take auto, which then computes "
            "blocks"
        )
    return None if why else kernel


def flash_attend(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    kernel: Kernel,
    segments_BT: jax.Array,
    softcap: float,
    window: int,
) -> jax.Array:
    """`attend` of tokens in order, by the platform's kernel.

    A kernel is a device's own: this is a `shard_map` over every mesh axis, with its own derivative
    rule, so that it can stand inside another `shard_map`.

    Args:
        q_BTHK: queries, global arrays as everywhere outside a `shard_map`.
        k_BTGK: keys.
        v_BTGK: values.
        kernel: the platform's.
        segments_BT: int32.
        softcap: of the scores; 0: off.
        window: a key is visible if it is less than so many positions before; 0: off.

    Returns:
        [B, T, H, K] in the dtype of `q_BTHK`.
    """
    layout, scoring = current_layout(), Scoring(softcap, window)
    placement = Placement(
        name="contiguous",
        num_devices=1,
        length=q_BTHK.shape[1],
        window=window,
        sizes=kernel.sizes,
    )
    q_BTHK = (q_BTHK / math.sqrt(q_BTHK.shape[3])).astype(q_BTHK.dtype)

    batch, heads, free = (), (), []
    if layout is not None and layout.mesh.size > 1:
        batch, heads, k_BTGK, v_BTGK = lay_heads(
            q_BTHK, k_BTGK, v_BTGK, layout=layout, sequence=None, whole=True
        )
        free = [a for a in MESH_AXES if a not in manual_axes()]
    by_hand = functools.partial(by_hand_over, layout=layout, axes=free, check=False)
    spec, tokens, totals = (to_spec(d) for d in ([batch, (), heads], [batch], [batch, heads]))
    qkv = (spec, spec, spec)

    def walk() -> Any:
        return jax.tree.map(
            lambda x: jnp.asarray(x[0, 0]), kernel.walk([placement.whole()], scoring)
        )

    def run_forward(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> Any:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out, log_total = kernel.forward(q, k, v, (s, s), walk(), scoring)
        return out.swapaxes(1, 2), log_total

    def run_backward(saved: Any, out_grad: jax.Array) -> Any:
        *qkv, s, out, log_total = saved
        q, k, v, out, out_grad = (x.swapaxes(1, 2) for x in (*qkv, out, out_grad))
        result = {"out_grad": out_grad, "log_total": log_total, "dot": output_dot(out, out_grad)}
        grads = kernel.backward(q, k, v, (s, s), walk(), scoring, **result)
        return tuple(x.swapaxes(1, 2) for x in grads)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> Any:
        run = by_hand(run_forward, in_specs=(*qkv, tokens), out_specs=(spec, totals))
        with jax.named_scope("flash"):
            made = opaque(run)(q, k, v, s)
        out, log_total = (checkpoint_name(x, SAVED_NAME) for x in made)
        return out, (q, k, v, s, out, log_total)

    def backward(saved: Any, out_grad: jax.Array) -> tuple[Any, ...]:
        run = by_hand(run_backward, in_specs=((*qkv, tokens, spec, totals), spec), out_specs=qkv)
        with jax.named_scope("flash"):
            return *opaque(run)(saved, out_grad), no_gradient(saved[3])

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
        return forward(q, k, v, s)[0]

    attention.defvjp(forward, backward)
    return attention(q_BTHK, k_BTGK, v_BTGK, segments_BT)
