"""Sequences that the mesh splits: laying them on the devices, and whether they can be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spmd_train.config import MESH_AXES, ConfigError
from spmd_train.parallel.manual import by_hand_over, opaque
from spmd_train.parallel.placement import Placement, blocks_of, blocks_per_device
from spmd_train.parallel.rules import Layout, LogicalAxes, axes_of, current_layout


def split_axes() -> tuple[str, ...]:
    """The mesh axes that split a sequence here; () outside `use_layout` and where none does."""
    layout = current_layout()
    return () if layout is None else layout.axes("sequence")


def place(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Lays a sequence on the devices as `context.placement` says, if any axis splits it.

    Args:
        x: in the sequence's own order.
        axes: its logical axes.

    Returns:
        The same shape. For zig-zag each device gets its two blocks from the devices that hold them
        in order: every element travels at most once.

    Raises:
        ConfigError: the sequence does not divide.
    """
    layout = current_layout()
    split = split_axes()
    if layout is None or not split or "sequence" not in axes:
        return x
    dim = axes.index("sequence")
    check_sequence(x.shape[dim], layout)
    if layout.context.placement == "contiguous":
        return x
    spec = layout.activation_spec(x.shape, axes)
    c = layout.size(split)
    holder = {block: i for i in range(c) for block in (i, 2 * c - 1 - i)}

    def exchange(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=dim)
        # The even blocks go to different devices, and so do the odd ones.
        even = jax.lax.ppermute(first, split, [(i, holder[2 * i]) for i in range(c)])
        odd = jax.lax.ppermute(second, split, [(i, holder[2 * i + 1]) for i in range(c)])
        starts_even = jax.lax.axis_index(split) % 2 == 0
        parts = jnp.where(starts_even, even, odd), jnp.where(starts_even, odd, even)
        return jnp.concatenate(parts, axis=dim)

    manual = tuple(a for a in MESH_AXES if a in axes_of(spec))
    return opaque(by_hand_over(exchange, layout, manual, (spec,), spec))(x)


def placement_of(length: int, *, window: int, sizes: tuple[int, ...]) -> Placement:
    """Where the layout in use has sequences of `length` tokens; of one device where none splits.

    Args:
        length: of a whole sequence.
        window: of sliding-window attention; 0: none.
        sizes: see `Placement`.

    Raises:
        ConfigError: the sequence does not divide.
    """
    layout, split = current_layout(), split_axes()
    what = {"length": length, "window": window, "sizes": sizes}
    if layout is None or not split:
        return Placement(name="contiguous", num_devices=1, **what)
    check_sequence(length, layout)
    return Placement(name=layout.context.placement, num_devices=layout.size(split), **what)


def sum_before(x_BTE: jax.Array) -> jax.Array:
    """For each token the sum over those before it, in the sequence's own order.

    Args:
        x_BTE: [B, T, E], laid out as `place` does. No value travels, only sums of blocks.

    Returns:
        The same shape.
    """
    layout, split = current_layout(), split_axes()
    length = x_BTE.shape[1]
    order = [0]
    if layout is not None and split:
        held = blocks_of(layout.context.placement, num_devices=layout.size(split))
        order = [block for blocks in held for block in blocks]
    if length % len(order):  # Not split: a token that is generated.
        order = [0]
    x_BNSE = x_BTE.reshape(x_BTE.shape[0], len(order), length // len(order), x_BTE.shape[2])
    inside = jnp.cumsum(x_BNSE, axis=2) - x_BNSE
    is_before = np.less.outer(order, order).astype(x_BTE.dtype)
    # Counts: by default accelerators would round what they multiply.
    blocks = jnp.einsum(
        "bme,mn->bne", jnp.sum(x_BNSE, axis=2), is_before, precision=jax.lax.Precision.HIGHEST
    )
    return (inside + blocks[:, :, None]).reshape(x_BTE.shape)


def check_sequence(length: int, layout: Layout) -> None:
    """Raises ConfigError if a sequence of `length` tokens does not divide over the devices."""
    c = layout.size(layout.axes("sequence"))
    blocks = blocks_per_device(layout.context.placement) * c if c > 1 else 1
    if length % blocks:
        below = max(blocks, length // blocks * blocks)
        near = sorted({below, below + blocks} if length > blocks else {blocks})
        raise ConfigError(
            f"data.sequence_length: {length} does not divide over mesh.context = {c} devices with "
            f"context.placement={layout.context.placement}, which cuts it into {blocks} blocks; "
            f"the nearest that do are {' and '.join(map(str, near))}"
        )


def check_heads(num_heads: int, num_kv_heads: int, layout: Layout) -> None:
    """Raises ConfigError if `ulysses` cannot give every device whole heads."""
    c = layout.size(layout.axes("sequence"))
    if c == 1 or layout.context.method != "ulysses":
        return
    shards, kv_shards = (layout.size(layout.axes(name)) for name in ("heads", "kv_heads"))
    own, own_kv = num_heads // shards, num_kv_heads // kv_shards
    for key, heads, over, fits in (
        ("num_heads", num_heads, shards, own % c == 0),
        ("num_kv_heads", num_kv_heads, kv_shards, own_kv % c == 0 or c % own_kv == 0),
    ):
        if not fits:
            unit = c * over
            near = max(unit, round(heads / unit) * unit)
            raise ConfigError(
                f"model.{key}: {heads} heads over {over} tensor shards do not divide over "
                f"mesh.context = {c} devices, as context.method=ulysses needs; the nearest that "
                f"do are {near}; or use context.method=ring or all_gather"
            )
