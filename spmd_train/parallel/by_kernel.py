"""Attention over split sequences by a kernel: scores never leave the chip.

What a kernel returns is a softmax over the keys that it was given; those over the keys of several
devices are merged here by their sums of exponentials.

Dims: B batch, T queries, S keys, H query heads, G key heads, R = H / G, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from spmd_train.parallel.blockwise import Gradients, Keys, Result, Tokens
from spmd_train.parallel.placement import Placement, Tiles, mine
from spmd_train.parallel.rules import Layout, dims_of

QKV = tuple[jax.Array, jax.Array, jax.Array]
"""Queries, keys and values, or what belongs to them."""
Segments = tuple[jax.Array, jax.Array]
"""Of queries and of keys."""

SAVED_NAME = "attention"
"""The name under which a remat policy can keep what a kernel's forward pass returns."""


class Scoring(NamedTuple):
    """How a query weighs a key: soft cap and sliding window; 0: off."""

    softcap: float
    window: int


class Kernel(Protocol):
    """Causal attention within segments, of one device's arrays, and its gradient.

    Attributes:
        sizes: tokens that a tile may have, the best first.
        lowest: `log_total` of a query that saw none of the keys is not above this.
    """

    sizes: tuple[int, ...]
    lowest: float

    def why_not(self, placement: Placement, scoring: Scoring, *, queries: int, keys: int) -> str:
        """What the kernel cannot do of sequences on these devices; empty: it can.

        Args:
            placement: with tiles of the kernel's sizes.
            scoring: soft cap and window.
            queries: tokens whose queries a device has.
            keys: tokens whose keys it meets at one time.
        """
        ...

    def walk(self, steps: Sequence[Tiles], scoring: Scoring) -> Any:
        """Tables (numpy, [C, L, ...] for C devices) that tell the kernel which tiles to compute."""
        ...

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: Segments,
        walk: Any,
        scoring: Scoring,
    ) -> tuple[jax.Array, jax.Array]:
        """Output [B, H, T, K], and of the softmax what its gradient needs, float32 [B, H, T].

        Args:
            q: scaled queries [B, H, T, K].
            k: keys [B, G, S, K].
            v: values.
            segments: int32, of queries [B, T] and keys [B, S].
            walk: this device's tables of one step.
            scoring: soft cap and window.
        """
        ...

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: Segments,
        walk: Any,
        scoring: Scoring,
        *,
        out_grad: jax.Array,
        log_total: jax.Array,
        dot: jax.Array,
    ) -> QKV:
        """Gradients of q, k and v.

        Args:
            q: as of `forward`, and so k, v, segments, walk, scoring.
            k: keys.
            v: values.
            segments: of queries and keys.
            walk: which tiles.
            scoring: soft cap and window.
            out_grad: [B, H, T, K].
            log_total: what `forward` returned, or of the softmax over these and more keys.
            dot: sum over K of the output times its gradient, float32 [B, H, T].
        """
        ...


def kernel_flops(flops: float) -> str:
    """A scope that tells the FLOPs of each kernel in it: their compilers don't know them."""
    return f"kernel_flops_{round(flops)}"


def why_no_multiple(placement: Placement, block: int) -> str:
    """For `Kernel.why_not`: of blocks that a kernel's tiles have to divide."""
    length = placement.block_length
    if length % block == 0:
        return ""
    cut = ""
    if placement.num_devices > 1:
        cut = f", the blocks that context.placement={placement.name} cuts {placement.length} into"
    return f"it takes multiples of {block} tokens, not {length}{cut}"


def lay_heads(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    layout: Layout,
    sequence: str | None,
    whole: bool,
) -> tuple[tuple[str, ...], tuple[str, ...], jax.Array, jax.Array]:
    """Which mesh axes share out the batch and the heads, those of keys as those of queries.

    Args:
        q_BTHK: queries.
        k_BTGK: keys.
        v_BTGK: values.
        layout: the layout in use.
        sequence: the logical axis of T; None: a device has whole sequences.
        whole: a device has to have the key heads that its query heads look at. Where the layout
            gives it others, each query head gets a key head of its own; else heads are left to XLA.

    Returns:
        Mesh axes of the batch, of the heads, keys, values.
    """
    names = ("batch", sequence, "heads", None), ("batch", sequence, "kv_heads", None)
    q_dims, k_dims = (
        dims_of(layout.activation_spec(x.shape, axes), ndim=4)
        for x, axes in zip((q_BTHK, k_BTGK), names, strict=True)
    )
    batch, heads = q_dims[0], q_dims[2]
    if k_dims[2] != heads and not whole:
        heads = ()
    elif k_dims[2] != heads:
        copies = q_BTHK.shape[2] // k_BTGK.shape[2]
        k_BTGK, v_BTGK = (jnp.repeat(x, copies, axis=2) for x in (k_BTGK, v_BTGK))
    return batch, heads, k_BTGK, v_BTGK


class Merged(NamedTuple):
    """A softmax over the keys so far: float32 [B, H, T, K] and log of its sum [B, H, T]."""

    out: jax.Array
    log_total: jax.Array


@dataclasses.dataclass(frozen=True)
class ByKernel:
    """`Attending` by a kernel."""

    kernel: Kernel
    scoring: Scoring

    def walk(self, steps: Sequence[Tiles], axes: Sequence[str]) -> Any:
        """See `Attending`."""
        tables = self.kernel.walk(steps, self.scoring)
        return jax.tree.map(lambda table: mine(table, axes), tables)

    def begin(self, q_BGRTK: jax.Array, keys: Keys) -> None:
        """See `Attending`: there is nothing to merge with yet."""
        return None

    def attend(
        self,
        running: Merged | None,
        q_BGRTK: jax.Array,
        queries: Tokens,
        keys: Keys,
        walk: Any,
    ) -> Merged:
        """See `Attending`. In the first step every query sees a key: itself."""
        segments = queries.segment_ids, keys.tokens.segment_ids
        out, log_total = self.kernel.forward(
            _heads(q_BGRTK), keys.k, keys.v, segments, walk, self.scoring
        )
        new = Merged(out.astype(jnp.float32), log_total)
        if running is None:
            return new
        # Of a query that saw no key here, what the kernel returns may be no number.
        seen = new.log_total > self.kernel.lowest
        highest = jnp.where(seen, jnp.maximum(running.log_total, new.log_total), running.log_total)
        shares = (
            jnp.exp(running.log_total - highest),
            jnp.where(seen, jnp.exp(new.log_total - highest), 0),
        )
        total = shares[0] + shares[1]
        old, more = ((share / total)[..., None] for share in shares)
        merged = running.out * old + jnp.where(seen[..., None], new.out, 0) * more
        return Merged(merged, highest + jnp.log(total))

    def finish(self, running: Merged) -> tuple[jax.Array, jax.Array]:
        """See `Attending`. [B, H, ...] where `Blocks` has [B, G, R, ...]."""
        return running.out[:, None], running.log_total[:, None]

    def gradients(
        self,
        grads: Gradients,
        q_BGRTK: jax.Array,
        queries: Tokens,
        result: Result,
        keys: Keys,
        walk: Any,
    ) -> Gradients:
        """See `Attending`."""
        segments = queries.segment_ids, keys.tokens.segment_ids
        q, k, v = self.kernel.backward(
            *(_heads(q_BGRTK), keys.k, keys.v, segments, walk, self.scoring),
            **{name: _heads(x) for name, x in result._asdict().items()},
        )
        return Gradients(*map(jnp.add, grads, (q.reshape(q_BGRTK.shape), k, v)))


def _heads(x_BGRT: jax.Array) -> jax.Array:
    """[B, G, R, ...] to [B, H, ...]."""
    b, g, r, *rest = x_BGRT.shape
    return x_BGRT.reshape(b, g * r, *rest)
