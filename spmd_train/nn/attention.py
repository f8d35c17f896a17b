"""Every attention of every model: `attend`, and the layer around it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from spmd_train.config import ModelConfig
from spmd_train.nn.cpu import cut, softmax_attend
from spmd_train.nn.embeddings import apply_rope
from spmd_train.nn.flash import flash_attend, kernel_for
from spmd_train.nn.norms import RMSNorm
from spmd_train.nn.params import normal
from spmd_train.nn.projection import Projection
from spmd_train.parallel.blockwise import Tokens, visible
from spmd_train.parallel.context import attend_split
from spmd_train.parallel.rules import constrain, current_platform
from spmd_train.parallel.sequence import split_axes

QUERY_BLOCK = {"cpu": 128, "gpu": 512, "tpu": 512}
"""Queries whose scores are computed at one time, by platform: less work is done for masked keys."""
KEPT_SCORES = 1024
"""Longer sequences make the scores again in the backward pass: memory linear in the length."""


def check_attention(config: ModelConfig, *, length: int) -> None:
    """Refuses `model.attention = flash` where `attend` will not do it; needs the layout in use.

    Raises:
        ConfigError: there is no kernel for sequences of so many tokens, split as they are.
    """
    if config.attention == "flash":
        scoring = {"softcap": config.attention_softcap, "window": config.sliding_window}
        kernel_for(length, needed=True, **scoring)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    queries: Tokens,
    keys: Tokens,
    in_order: bool,
    softcap: float = 0.0,
    window: int = 0,
    method: str = "auto",
) -> jax.Array:
    """Causal grouped-query attention within segments; scores and softmax in float32.

    Of tokens in order the platform's kernel does it (`nn.flash`), if it has one that can; else it
    is done by blocks. Where the layout splits sequences over devices, so is this, with either
    (`parallel.context`).

    Args:
        q_BTHK: queries [B, T, H, K].
        k_BSGK: keys [B, S, G, K]; H is a multiple of G.
        v_BSGK: values, as the keys.
        queries: segments and positions of the queries.
        keys: segments and positions of the keys.
        in_order: queries and keys are the same tokens in order (or placed on the devices as the
            layout says), and positions count up by one within a segment: so that no key to the
            right of a query, nor left of its window, can be visible, and is not computed.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0: off.
        window: a key is visible if it is less than so many positions before; 0: off.
        method: `model.attention`.

    Returns:
        [B, T, H, K] in the dtype of `q_BTHK`.

    Raises:
        ConfigError: `method` is flash, and there is no kernel for it.
    """
    chex.assert_equal_shape([k_BSGK, v_BSGK])
    scoring: dict[str, Any] = {"softcap": softcap, "window": window}
    length, kernel = q_BTHK.shape[1], None
    if in_order and method != "blocks":
        kernel = kernel_for(length, needed=method == "flash", **scoring)
    if in_order and split_axes():
        return attend_split(q_BTHK, k_BSGK, v_BSGK, tokens=queries, kernel=kernel, **scoring)
    if kernel:
        segments = queries.segment_ids
        return flash_attend(q_BTHK, k_BSGK, v_BSGK, kernel=kernel, segments_BT=segments, **scoring)
    size = QUERY_BLOCK[current_platform()]
    if not in_order or length <= size:
        return _attend_block(q_BTHK, k_BSGK, v_BSGK, queries, keys, softcap, window)

    # One block of queries after another against the keys so far: half the work.
    block = _attend_block
    if length > KEPT_SCORES:
        block = jax.checkpoint(_attend_block, static_argnums=(5, 6))
    rows = tuple((start, min(start + size, length)) for start in range(0, length, size))
    seen = tuple(
        (max(0, start + 1 - window) // size * size if window else 0, end) for start, end in rows
    )
    parts = (
        cut(q_BTHK, rows),
        cut(k_BSGK, seen),
        cut(v_BSGK, seen),
        [Tokens(*(x[:, start:end] for x in queries)) for start, end in rows],
        [Tokens(*(x[:, first:end] for x in keys)) for first, end in seen],
    )
    outputs = [block(*part, softcap, window) for part in zip(*parts, strict=True)]
    return jnp.concatenate(outputs, axis=1)


def _attend_block(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    queries: Tokens,
    keys: Tokens,
    softcap: float,
    window: int,
) -> jax.Array:
    b, t, h, k = q_BTHK.shape
    g, r = k_BSGK.shape[2], h // k_BSGK.shape[2]
    # Heads before tokens, and the queries of a group in one dim: plain batched matmuls, without
    # which XLA's CPU compiler transposes the scores (the largest arrays there are).
    q_BTGRK = (q_BTHK / math.sqrt(k)).astype(q_BTHK.dtype).reshape(b, t, g, r, k)
    q_BGXK = q_BTGRK.transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, k)
    k_BGSK, v_BGSK = k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    visible_BTS = visible(queries, keys, window=window)
    if current_platform() == "cpu" and q_BTHK.dtype in (jnp.float32, jnp.bfloat16) and not softcap:
        out_BGXK = softmax_attend(q_BGXK, k_BGSK, v_BGSK, visible_BTS)
    else:
        out_BGXK = plain_attend(q_BGXK, k_BGSK, v_BGSK, visible_BTS, softcap)
    return out_BGXK.reshape(b, g, r, t, k).transpose(0, 3, 1, 2, 4).reshape(b, t, h, k)


def plain_attend(
    q_BGXK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    visible_BTS: jax.Array,
    softcap: float = 0.0,
) -> jax.Array:
    """`nn.cpu.softmax_attend` of any dtype, with or without a soft cap; XLA derives it."""
    b, t, s = visible_BTS.shape
    scores = jnp.einsum("bgxk,bgsk->bgxs", q_BGXK, k_BGSK, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores_BGRTS = scores.reshape(b, k_BGSK.shape[1], -1, t, s)
    scores_BGRTS = jnp.where(visible_BTS[:, None, None], scores_BGRTS, jnp.finfo(jnp.float32).min)
    weights_BGXS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BGSK.dtype).reshape(scores.shape)
    return jnp.einsum("bgxs,bgsk->bgxk", weights_BGXS, v_BGSK)


class LayerCache(NamedTuple):
    """Keys and values of one layer, both [B, S, G, K]."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Grouped-query self-attention with RoPE, optional biases and QK-norm."""

    def __init__(self, config: ModelConfig, *, out_scale: float, rngs: nnx.Rngs) -> None:
        """Makes the projections; `out_scale` initializes the one that writes the residual."""
        d, k = (config.embed_dim,), config.resolved_head_dim
        h, g = (config.num_heads, k), (config.resolved_kv_heads, k)
        kv_axes = ("embed", "kv_heads", "head_dim")
        common = {"dtype": config.param_dtype, "rngs": rngs}
        projection = {"quantization": config.quantization, **common}
        inner = {"use_bias": config.attention_bias, "init": normal(config.init_scale), **projection}
        self.scoring = {
            "softcap": config.attention_softcap,
            "window": config.sliding_window,
            "method": config.attention,
        }
        self.query = Projection(d, h, ("embed", "heads", "head_dim"), **inner)
        self.key = Projection(d, g, kv_axes, **inner)
        self.value = Projection(d, g, kv_axes, **inner)
        self.out = Projection(
            h,
            d,
            ("heads", "head_dim", "embed"),
            use_bias=config.attention_out_bias,
            init=normal(out_scale),
            **projection,
        )
        norm = {"epsilon": config.norm_epsilon, **common}
        self.query_norm = RMSNorm(k, **norm) if config.qk_norm else None
        self.key_norm = RMSNorm(k, **norm) if config.qk_norm else None

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        tokens: Tokens,
        rope: tuple[jax.Array, jax.Array] | None,
        cache: LayerCache | None = None,
        cached: Tokens | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends.

        Args:
            x_BTD: [B, T, D].
            tokens: segments and positions of the T tokens.
            rope: from `rope_angles`, or None.
            cache: keys and values of earlier tokens; the new ones are written at `cache_index`.
            cached: segments and positions of the cache's S places, the new tokens included.
            cache_index: first place to write.

        Returns:
            [B, T, D], and the cache with the new tokens in it (None without one).
        """
        q, k, v = (
            checkpoint_name(constrain(make(x_BTD), ("batch", "sequence", heads, None)), name)
            for make, heads, name in (
                (self.query, "heads", "query"),
                (self.key, "kv_heads", "key"),
                (self.value, "kv_heads", "value"),
            )
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is None:
            out = attend(q, k, v, queries=tokens, keys=tokens, in_order=True, **self.scoring)
        else:
            assert cached is not None
            start = (0, cache_index, 0, 0)
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.keys, k.astype(cache.keys.dtype), start),
                jax.lax.dynamic_update_slice(cache.values, v.astype(cache.values.dtype), start),
            )
            out = attend(q, *cache, queries=tokens, keys=cached, in_order=False, **self.scoring)
        y_BTD = self.out(constrain(out, ("batch", "sequence", "heads", None)))
        return checkpoint_name(y_BTD, "out"), cache
