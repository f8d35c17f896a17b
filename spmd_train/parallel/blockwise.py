"""Attention by pairs of tiles, with an online softmax: no array as large as queries times keys.

Blockwise attention as in Liu et al., arXiv:2310.01889 (after Rabe and Staats, arXiv:2112.05682, and
FlashAttention, arXiv:2205.14135). Softmax and sums are in float32; matrices are multiplied in the
dtype of the keys. Which pairs are computed is given (`placement.Tiles`).

Dims: B batch, T queries, S keys, G key heads, R query heads to each of them, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from spmd_train.parallel.manual import varying_zeros
from spmd_train.parallel.placement import Tiles, mine

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Tokens(NamedTuple):
    """Which tokens may see which: same segment (0 is padding), and not a later position.

    Attributes:
        segment_ids: int32 [B, T], 0 where there is no token.
        positions: int32 [B, T], counted within the segment.
    """

    segment_ids: jax.Array
    positions: jax.Array


def visible(queries: Tokens, keys: Tokens, *, window: int) -> jax.Array:
    """Bool [B, T, S]: same segment and 0 <= distance, < `window` where that is not 0."""
    same_BTS = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    query_BT1, key_B1S = queries.positions[:, :, None], keys.positions[:, None, :]
    seen_BTS = same_BTS & (query_BT1 >= key_B1S)
    return seen_BTS & (query_BT1 - key_B1S < window) if window else seen_BTS


class Running(NamedTuple):
    """An online softmax: highest score and sum of exponentials [B, G, R, T], output [.., K]."""

    highest: jax.Array
    total: jax.Array
    out: jax.Array


class Keys(NamedTuple):
    """Keys and values [B, G, S, K] with their segments and positions [B, S]."""

    k: jax.Array
    v: jax.Array
    tokens: Tokens


class Gradients(NamedTuple):
    """Of the scaled queries [B, G, R, T, K] and of keys and values [B, G, S, K]; float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Result(NamedTuple):
    """What the gradient of the queries' rows needs.

    Attributes:
        out_grad: [B, G, R, T, K], in the dtype to multiply in.
        log_total: log of the sum of exponentials, float32 [B, G, R, T].
        dot: sum over K of output times its gradient, float32 [B, G, R, T].
    """

    out_grad: jax.Array
    log_total: jax.Array
    dot: jax.Array


def output_dot(out: jax.Array, out_grad: jax.Array) -> jax.Array:
    """`Result.dot` of [..., K], which a softmax's gradient subtracts."""
    return jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), axis=-1)


def zero_gradients(q_BGRTK: jax.Array, keys: Keys) -> Gradients:
    """Gradients to add to."""
    like = (q_BGRTK, keys.k, keys.v)
    q, k, v = (varying_zeros(x.shape, jnp.float32, varying_like=like) for x in like)
    return Gradients(q, k, v)


class Attending(Protocol):
    """How a device attends to keys that it has: step after step, into one softmax."""

    def walk(self, steps: Sequence[Tiles], axes: Sequence[str]) -> Any:
        """This device's tables of pairs of tiles: arrays [L, ...] for L steps."""
        ...

    def begin(self, q_BGRTK: jax.Array, keys: Keys) -> Any:
        """The softmax over no key yet."""
        ...

    def attend(
        self, running: Any, q_BGRTK: jax.Array, queries: Tokens, keys: Keys, walk: Any
    ) -> Any:
        """Takes keys into the softmax.

        Args:
            running: so far.
            q_BGRTK: queries, scaled.
            queries: their segments and positions.
            keys: keys and values.
            walk: of one step, the pairs of tiles to compute.

        Returns:
            The softmax with them.
        """
        ...

    def finish(self, running: Any) -> tuple[jax.Array, jax.Array]:
        """Output [B, G, R, T, K] and log of the sum of exponentials [B, G, R, T], float32."""
        ...

    def gradients(
        self,
        grads: Gradients,
        q_BGRTK: jax.Array,
        queries: Tokens,
        result: Result,
        keys: Keys,
        walk: Any,
    ) -> Gradients:
        """Adds the gradients of `attend` for the same pairs of tiles."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """A device's pairs of tiles, of one step or of L alike.

    Attributes:
        tiles: int32 [N, 2] or [L, N, 2]: tile of the queries, tile of the keys.
        counts: int32 [] or [L], how many of the N to compute; None: `all` of them.
        all: the number of pairs, where it is the same on all devices and in all steps.
    """

    tiles: jax.Array
    counts: jax.Array | None
    all: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Attention in plain JAX, a pair of tiles at a time.

    Attributes:
        softcap: of the scores; 0: off.
        window: a key is visible if it is less than so many positions before; 0: off.
        tile: tokens of a tile.
    """

    softcap: float
    window: int
    tile: int

    def walk(self, steps: Sequence[Tiles], axes: Sequence[str]) -> Pairs:
        """See `Attending`."""
        longest = max(tiles.pairs.shape[1] for tiles in steps)
        pairs = np.stack(
            [np.pad(t.pairs, ((0, 0), (0, longest - t.pairs.shape[1]), (0, 0))) for t in steps],
            axis=1,
        )
        counts = np.stack([tiles.counts for tiles in steps], axis=1)
        alike = bool((counts == counts[0, 0]).all())
        return Pairs(mine(pairs, axes), None if alike else mine(counts, axes), int(counts[0, 0]))

    def begin(self, q_BGRTK: jax.Array, keys: Keys) -> Running:
        """See `Attending`."""
        like = (q_BGRTK, keys.k, keys.v)
        out = varying_zeros(q_BGRTK.shape, jnp.float32, varying_like=like)
        return Running(out[..., 0] + _LOWEST, out[..., 0], out)

    def attend(
        self, running: Running, q_BGRTK: jax.Array, queries: Tokens, keys: Keys, walk: Pairs
    ) -> Running:
        """See `Attending`. A query's sums are right once it has met a key that it sees."""

        def body(n: jax.Array | int, running: Running) -> Running:
            i, j = walk.tiles[n, 0] * self.tile, walk.tiles[n, 1] * self.tile
            _, _, v, scores, _ = self._scores(q_BGRTK, queries, keys, i, j)
            highest, total, out = (_cut(x, i, self.tile, 3) for x in running)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(highest - new)
            total = total * shrink + jnp.sum(weights, axis=-1)
            out = out * shrink[..., None] + jnp.einsum(
                "bgrts,bgsk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return Running(
                *(
                    jax.lax.dynamic_update_slice_in_dim(whole, part, i, 3)
                    for whole, part in zip(running, (new, total, out), strict=True)
                )
            )

        return jax.lax.fori_loop(0, walk.all if walk.counts is None else walk.counts, body, running)

    def finish(self, running: Running) -> tuple[jax.Array, jax.Array]:
        """See `Attending`."""
        return running.out / running.total[..., None], running.highest + jnp.log(running.total)

    def gradients(
        self,
        grads: Gradients,
        q_BGRTK: jax.Array,
        queries: Tokens,
        result: Result,
        keys: Keys,
        walk: Pairs,
    ) -> Gradients:
        """See `Attending`; the weights are made again."""

        def body(n: jax.Array | int, grads: Gradients) -> Gradients:
            i, j = walk.tiles[n, 0] * self.tile, walk.tiles[n, 1] * self.tile
            q, k, v, scores, slope = self._scores(q_BGRTK, queries, keys, i, j)
            out_grad, log_total, dot = (_cut(x, i, self.tile, 3) for x in result)
            weights = jnp.exp(scores - log_total[..., None])
            float32: Any = {"preferred_element_type": jnp.float32}
            weights_grad = jnp.einsum("bgrtk,bgsk->bgrts", out_grad, v, **float32)
            scores_grad = weights * (weights_grad - dot[..., None]) * slope
            scores_grad = scores_grad.astype(k.dtype)
            parts = (
                jnp.einsum("bgrts,bgsk->bgrtk", scores_grad, k, **float32),
                jnp.einsum("bgrts,bgrtk->bgsk", scores_grad, q, **float32),
                jnp.einsum("bgrts,bgrtk->bgsk", weights.astype(v.dtype), out_grad, **float32),
            )
            places = zip(grads, parts, (i, j, j), (3, 2, 2), strict=True)
            return Gradients(
                *(
                    jax.lax.dynamic_update_slice_in_dim(
                        whole, _cut(whole, start, self.tile, axis) + part, start, axis
                    )
                    for whole, part, start, axis in places
                )
            )

        return jax.lax.fori_loop(0, walk.all if walk.counts is None else walk.counts, body, grads)

    def _scores(
        self, q_BGRTK: jax.Array, queries: Tokens, keys: Keys, i: jax.Array, j: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | float]:
        """A tile of queries, of keys, of values, their scores, and the soft cap's derivative."""
        q = _cut(q_BGRTK, i, self.tile, 3)
        k, v = _cut(keys.k, j, self.tile, 2), _cut(keys.v, j, self.tile, 2)
        scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
        slope: jax.Array | float = 1.0
        if self.softcap:
            bent = jnp.tanh(scores / self.softcap)
            scores, slope = self.softcap * bent, 1 - jnp.square(bent)
        seen = visible(
            Tokens(*(_cut(x, i, self.tile, 1) for x in queries)),
            Tokens(*(_cut(x, j, self.tile, 1) for x in keys.tokens)),
            window=self.window,
        )
        return q, k, v, jnp.where(seen[:, None, None], scores, _LOWEST), slope


def _cut(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
