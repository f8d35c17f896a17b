"""Matmuls of rows that are sorted by expert, on one device: each group of rows with its own kernel.

TPUs have kernels for it. XLA has none for CPUs and GPUs, and none anywhere for the gradient of the
kernels: it multiplies all rows by the kernels of all experts. There a loop goes over blocks of
rows, of which none has rows of two experts.

R rows, E experts, D in, F out, N blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd_train.parallel.manual import varying_zeros
from spmd_train.parallel.rules import current_platform

_TILE = 512


def grouped_by_kernel() -> bool:
    """Whether the platform has kernels for it: they do not tell JAX over what a result varies."""
    return current_platform() == "tpu"


def grouped_product(
    a: Any,
    b: Any,
    sizes_E: jax.Array,
    *,
    kernel_dim: int,
    dot: Callable[..., jax.Array],
    ragged_dot: Callable[..., jax.Array],
) -> jax.Array:
    """Each group's rows times its kernel.

    Args:
        a: [R, D], those of the first expert first; or a tree of arrays [R, ...].
        b: [E, D, F]; or a tree of arrays [E, ...].
        sizes_E: int32, rows of each expert; those beyond their sum are no one's.
        kernel_dim: which dim of `b` is summed over: 1, or 2 with `a` [R, F].
        dot: of a block of `a` and one expert's part of `b`, as `jax.lax.dot_general`.
        ragged_dot: of them whole, as `jax.lax.ragged_dot_general`.

    Returns:
        [R, F], or [R, D] with `kernel_dim` 2; what is in no one's rows is not defined.
    """
    if grouped_by_kernel():
        if kernel_dim == 2 and isinstance(b, jax.Array):
            return _gmm_transposed(a, b, sizes_E)
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (kernel_dim,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        return ragged_dot(a, b, sizes_E, numbers)
    leaves = jax.tree.leaves((a, b))
    num_rows = leaves[0].shape[0]
    blocks = _blocks(sizes_E, num_rows)

    def product(block: _Block) -> jax.Array:
        rows = jax.tree.map(lambda x: _rows(x, block.start, blocks.size), a)
        kernel = jax.tree.map(lambda x: _at(x, block.expert), b)
        return dot(rows, kernel, (((1,), (kernel_dim - 1,)), ((), ())))

    def put(out: jax.Array, block: _Block) -> tuple[jax.Array, None]:
        before = _rows(out, block.start, blocks.size)
        after = jnp.where(block.is_its[:, None], product(block), before)
        return jax.lax.dynamic_update_slice_in_dim(out, after, block.start, 0), None

    made = jax.eval_shape(product, jax.tree.map(lambda x: x[0], blocks.each))
    out = varying_zeros((num_rows, made.shape[1]), made.dtype, varying_like=[*leaves, sizes_E])
    return jax.lax.scan(put, out, blocks.each)[0]


def kernel_gradient(x_RD: jax.Array, g_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Of each group, its inputs (transposed) times the gradients of its outputs.

    Args:
        x_RD: rows, those of the first expert first.
        g_RF: same dtype.
        sizes_E: int32, rows of each expert; those beyond their sum are no one's.

    Returns:
        [E, D, F], summed in float32, in the dtype of `x_RD`.
    """
    if grouped_by_kernel():
        return _tgmm(x_RD, g_RF, sizes_E)
    blocks = _blocks(sizes_E, x_RD.shape[0])
    shape = x_RD.shape[1], g_RF.shape[1]
    likes = [x_RD, g_RF, sizes_E]
    sums = varying_zeros(shape, jnp.float32, varying_like=likes)
    out = varying_zeros((sizes_E.shape[0], *shape), x_RD.dtype, varying_like=likes)

    def add(state: tuple[jax.Array, jax.Array], block: _Block):
        sums_DF, out_EDF = state
        x, g = (_rows(rows, block.start, blocks.size) for rows in (x_RD, g_RF))
        x, g = (jnp.where(block.is_its[:, None], rows, 0) for rows in (x, g))
        product = jax.lax.dot_general(
            x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        sums_DF = jnp.where(block.is_first, 0, sums_DF) + product
        part = sums_DF.astype(out_EDF.dtype)[None]
        return (sums_DF, jax.lax.dynamic_update_slice_in_dim(out_EDF, part, block.expert, 0)), None

    return jax.lax.scan(add, (sums, out), blocks.each)[0][1]


class _Block(NamedTuple):
    """Rows of one expert; [N] of each.

    Attributes:
        expert: whose.
        start: of its rows, as many as `_Blocks.size`.
        is_its: which of them are its, bool [size].
        is_first: whether it is the expert's first block.
    """

    expert: jax.Array
    start: jax.Array
    is_its: jax.Array
    is_first: jax.Array


class _Blocks(NamedTuple):
    each: _Block
    size: int


def _blocks(sizes_E: jax.Array, num_rows: int) -> _Blocks:
    """As many as any sizes need; those that are not needed are empty ones of the last expert."""
    num_experts = sizes_E.shape[0]
    # A block more for each expert is then an eighth of the rows.
    wanted = max(1, num_rows // (8 * num_experts))
    size = min(num_rows, max(16, min(_TILE, 1 << (wanted.bit_length() - 1))))
    needed_E = -(-sizes_E // size)
    last_E = jnp.cumsum(needed_E)
    index = jnp.arange(num_rows // size + num_experts, dtype=jnp.int32)
    expert = jnp.sum(index[:, None] >= last_E[:-1], axis=1, dtype=jnp.int32)
    number = index - (last_E - needed_E)[expert]
    end_E = jnp.cumsum(sizes_E)
    begin = (end_E - sizes_E)[expert] + number * size
    # The last rows are in a block that begins before them.
    start = jnp.clip(begin, 0, num_rows - size)
    row = start[:, None] + jnp.arange(size, dtype=jnp.int32)
    is_its = (row >= begin[:, None]) & (row < end_E[expert][:, None])
    return _Blocks(_Block(expert, start, is_its, number == 0), size)


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


# JAX's own grouped matmuls of TPUs, megablox, in tiles that 16 MiB of fast memory have room for. On
# a CPU they are interpreted.
def _megablox() -> Any:
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _gmm_transposed(g_RF: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """XLA's own kernel has the transposed kernels copied: as much memory again."""
    tile, rows = _tiled(g_RF)
    dx_RD = _megablox().gmm(
        rows,
        kernel_EDF,
        sizes_E,
        preferred_element_type=g_RF.dtype,
        tiling=(tile, min(g_RF.shape[1], 1024), min(kernel_EDF.shape[1], 1024)),
        transpose_rhs=True,
        interpret=current_platform() != "tpu",
    )
    return dx_RD[: g_RF.shape[0]]


def _tgmm(x_RD: jax.Array, g_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    tile, x_rows = _tiled(x_RD)
    return _megablox().tgmm(
        x_rows.T,
        _tiled(g_RF)[1],
        sizes_E,
        preferred_element_type=x_RD.dtype,
        tiling=(tile, min(x_RD.shape[1], 512), min(g_RF.shape[1], 1024)),
        interpret=current_platform() != "tpu",
    )


def _tiled(x: jax.Array) -> tuple[int, jax.Array]:
    """Rows of a tile, and rows that whole tiles make."""
    tile = next((t for t in (_TILE, 256) if x.shape[0] % t == 0), 128)
    return tile, jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))
