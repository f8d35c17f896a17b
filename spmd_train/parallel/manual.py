"""Two computations that each device does on its own rows, with the one sum at the end by hand.

Both have their own derivative rules: a loop then accumulates gradients locally and communicates
once, and they can stand inside another `shard_map` (whose automatic derivative they would break).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from spmd_train.config import MESH_AXES
from spmd_train.parallel.rules import (
    Layout,
    LogicalAxes,
    axes_of,
    current_layout,
    current_platform,
    dims_of,
    manual_axes,
    to_spec,
    vary,
)

Tree = Any


def by_hand_over(
    f: Callable[..., Any],
    layout: Layout | None,
    axes: Collection[str],
    in_specs: Any,
    out_specs: Any,
    *,
    check: bool = True,
) -> Callable[..., Any]:
    """`f` on each device's shards over `axes`; the other axes stay with XLA.

    `check`: JAX proves what is the same on several devices, which a kernel does not tell it. Inside
    another shard_map the results then count as differing over all of its axes.
    """
    if not check:
        f = _untold(f)
    if layout is not None and axes:
        # Inside another shard_map the mesh is the context's, which knows what is manual already.
        f = jax.shard_map(
            f,
            mesh=None if manual_axes() else layout.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(axes),
            check_vma=check,
        )
    return f if check else lambda *args: vary(f(*args))


def _untold(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of arrays of which JAX does not know over what they vary, as it won't of their gradients.

    Without checks every operation forgets it; one that changes nothing does.
    """

    def forgotten(x: jax.Array) -> jax.Array:
        return x[None].reshape(x.shape) if jax.typeof(x).manual_axis_type.varying else x

    return lambda *args: f(*jax.tree.map(forgotten, args))


def opaque(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` as one step that automatic differentiation takes or leaves whole.

    For the parts of a custom derivative rule. A scan over layers, and `jax.checkpoint`, otherwise
    look into them and keep what is known early: attention's masks of all tiles at once; and cutting
    a nested `shard_map` in two they make one that does not lower. (`custom_vmap` is what JAX has
    that is opaque; nothing here is batched.)
    """
    return jax.custom_batching.sequential_vmap(f)


def psum(tree: Tree, axes: Sequence[str]) -> Tree:
    """`jax.lax.psum`, on CPU in float32 at least.

    XLA's CPU compiler aborts over a bfloat16 sum in a `shard_map` that leaves axes to XLA.
    """

    return jax.tree.map(_in_float32(lambda x: jax.lax.psum(x, tuple(axes))), tree)


def _psum_scatter(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    add = functools.partial(
        jax.lax.psum_scatter, axis_name=tuple(axes), scatter_dimension=dim, tiled=True
    )
    return _in_float32(add)(x)


def _in_float32(add: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def run(x: jax.Array) -> jax.Array:
        if current_platform() == "cpu" and x.dtype == jnp.bfloat16:
            return add(x.astype(jnp.float32)).astype(x.dtype)
        return add(x)

    return run


def varying_zeros(
    shape: Sequence[int], dtype: Any, *, varying_like: Sequence[jax.Array]
) -> jax.Array:
    """Zeros to accumulate in: they vary over the manual axes that what is added varies over."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in varying_like))
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, tuple(axes), to="varying") if axes else zeros


def add_up_parts(
    partial: jax.Array, axes: Sequence[str], names: LogicalAxes, *, layout: Layout | None
) -> jax.Array:
    """The sum of the parts that devices have of a parameter's gradient: ZeRO's reduce-scatter.

    Args:
        partial: [N, *shape], one part for each device of `axes`.
        axes: mesh axes.
        names: the parameter's logical axes; those on `axes` shard the sum.
        layout: of the forward pass: a derivative may be taken outside its `use_layout`.

    Returns:
        [*shape].
    """
    if layout is None or not axes:
        return partial[0]
    spec = layout.activation_spec(partial.shape[1:], names)
    dims = dims_of(spec, ndim=len(names))
    kept = [tuple(a for a in dim if a not in axes) for dim in dims]
    scattered = [tuple(a for a in dim if a in axes) for dim in dims]
    copies = tuple(a for a in axes if a not in axes_of(spec))

    def add(x: jax.Array) -> jax.Array:
        x = x[0]
        for dim, over in enumerate(scattered):
            if over:
                x = _psum_scatter(x, over, dim)
        return psum(x, copies) if copies else x

    # By hand over the axes that stay, too: XLA would gather them for a reduce-scatter.
    by_hand = {*axes, *axes_of(spec)}
    summed = to_spec([k + s for k, s in zip(kept, scattered, strict=True)])
    return by_hand_over(add, layout, by_hand, to_spec([tuple(axes), *kept]), summed)(partial)


def columns_to_keep(
    path: str, *, shape: Sequence[int], axes: tuple[str, str], ids: jax.Array, tokens: LogicalAxes
) -> tuple[str, ...]:
    """The mesh axes over whose shards of a table's columns a lookup is best spread.

    Vectors of the tokens then travel instead of the table: less, where a device has fewer tokens
    than the table rows.

    Args:
        path: of the table in the parameters.
        shape: [R, D].
        axes: logical axes of R and D.
        ids: what is to be looked up.
        tokens: its logical axes.

    Returns:
        Mesh axes for `unshard` to keep and `take_rows` to be told; () if the table is to be whole.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return ()
    rows, columns = dims_of(layout.param_specs[path], ndim=2)
    spec = layout.activation_spec(ids.shape, tokens)
    spread = layout.gathered & set(axes_of(spec))
    if not columns or columns != layout.axes(axes[1]) or not spread.issuperset(columns):
        return ()
    own_tokens = ids.size // layout.size(axes_of(spec))
    return columns if own_tokens * layout.size(rows) <= shape[0] else ()


def take_rows(
    table_RD: jax.Array,
    ids: jax.Array,
    *,
    axes: tuple[str, str],
    tokens: LogicalAxes,
    columns: tuple[str, ...] = (),
) -> jax.Array:
    """Looks up rows of a table whose rows may be sharded.

    Every device looks its own tokens up in its own rows; one sum over the rows' mesh axes completes
    them. (Left to XLA's partitioner, a gather from a sharded table replicates the activations, and
    inside a `shard_map` it crashes.)

    Args:
        table_RD: gathered over the tokens' mesh axes, but for `columns`.
        ids: int32, one dim per entry of `tokens`.
        axes: logical axes of R and D.
        tokens: logical axes of the ids.
        columns: from `columns_to_keep`: devices look up each other's tokens in their columns.

    Returns:
        [*ids.shape, D].
    """
    layout = current_layout()
    if layout is None:
        return jnp.take(table_RD, ids, axis=0)
    ids_spec = layout.activation_spec(ids.shape, tokens)
    token_axes = axes_of(ids_spec)
    taken = (*token_axes, *manual_axes())
    row_axes = tuple(a for a in layout.axes(axes[0]) if a not in taken)
    by_hand = (*row_axes, *token_axes)
    table_spec = to_spec([row_axes, columns])
    summed = tuple(a for a in token_axes if a not in columns)

    def everyones(ids: jax.Array) -> jax.Array:
        """The ids of all devices that have a share of this one's rows' columns."""
        return jax.lax.all_gather(ids, columns, axis=0, tiled=True) if columns else ids

    def exchange(x: jax.Array, *, split: int, concat: int) -> jax.Array:
        if not columns:
            return x
        return jax.lax.all_to_all(x, columns, split_axis=split, concat_axis=concat, tiled=True)

    def own(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
        """The ids as this device counts its rows, and which of them it has."""
        if row_axes:
            ids = ids - jax.lax.axis_index(row_axes) * num_rows
        return ids, (ids >= 0) & (ids < num_rows)

    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        ids = everyones(ids)
        if row_axes:
            ids, here = own(ids, table.shape[0])
            found = jnp.take(table, jnp.where(here, ids, 0), axis=0)
            found = psum(jnp.where(here[..., None], found, 0), row_axes)
        else:
            found = jnp.take(table, ids, axis=0)
        return exchange(found, split=0, concat=ids.ndim)

    def own_gradient(ids: jax.Array, g: jax.Array, table: jax.Array) -> jax.Array:
        ids, g = everyones(ids), exchange(g, split=ids.ndim, concat=0)
        ids, here = own(ids, table.shape[0])
        # Rows of other devices are dropped: they are out of bounds.
        ids = jnp.where(here, ids, table.shape[0])
        zeros = varying_zeros(table.shape, jnp.float32, varying_like=(ids, g, table))
        total = zeros.at[ids].add(g.astype(jnp.float32), mode="drop")
        return total.astype(table.dtype)[None]

    @jax.custom_vjp
    def take(table: jax.Array, ids: jax.Array) -> jax.Array:
        return by_hand_over(look_up, layout, by_hand, (table_spec, ids_spec), ids_spec)(table, ids)

    def forward(table: jax.Array, ids: jax.Array):
        return take(table, ids), (table, ids)

    def backward(saved: tuple[jax.Array, jax.Array], g: jax.Array):
        table, ids = saved
        specs = (ids_spec, ids_spec, table_spec)
        parts = to_spec([summed, row_axes, columns])
        partial = by_hand_over(own_gradient, layout, by_hand, specs, parts)(ids, g, table)
        grad = add_up_parts(partial, summed, axes, layout=layout)
        return grad, np.zeros(ids.shape, jax.dtypes.float0)

    take.defvjp(forward, backward)
    return take(table_RD, ids)


def sum_over_tokens(
    f: Callable[..., tuple[jax.Array, Tree]],
    hidden_BTD: jax.Array,
    kernel: jax.Array,
    *labels_BT: jax.Array,
    kernel_axes: LogicalAxes,
    chunk: int,
) -> tuple[jax.Array, Tree]:
    """Sums `f(hidden, kernel, *labels)` over devices and, on each, over chunks of the sequence.

    Where gradients are wanted, they are made with the sum, chunk by chunk, and only scaled in the
    backward pass: whatever `f` makes for a chunk is made once and lives no longer than the chunk.
    The kernel's gradient is accumulated in float32 on each device and summed over the devices once.

    Args:
        f: returns a sum over the tokens it is given, differentiable in the first two, and a tree of
            others, which have no gradient.
        hidden_BTD: activations.
        kernel: the same on all devices that split the batch and the sequence.
        *labels_BT: what else belongs to each token; not differentiated.
        kernel_axes: its logical axes, by which its gradient is sharded.
        chunk: tokens of a device's sequence per chunk; if it does not divide them, the next
            smaller number that does.

    Returns:
        What `f` returns, over all tokens.
    """
    layout = current_layout()
    spec = (
        P() if layout is None else layout.activation_spec(labels_BT[0].shape, ("batch", "sequence"))
    )
    axes = tuple(a for a in MESH_AXES if a in axes_of(spec))

    def by_hand(g: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return by_hand_over(g, layout, axes, in_specs, out_specs)

    def total(x: Tree) -> Tree:
        return psum(x, axes) if axes else x

    def split(x: jax.Array) -> jax.Array:
        length = x.shape[1]
        size = next(n for n in range(min(chunk, length), 0, -1) if length % n == 0)
        return jnp.moveaxis(x.reshape(x.shape[0], length // size, size, *x.shape[2:]), 1, 0)

    def scan(g: Callable[..., tuple[Tree, Tree]], *args: jax.Array) -> tuple[Tree, Tree]:
        """Sums the first part of what `g` makes of each chunk, stacks the second."""
        hidden, kernel, *labels = args
        kernel = jax.lax.pcast(kernel, axes, to="varying") if axes else kernel
        parts = split(hidden), *map(split, labels)
        shapes, _ = jax.eval_shape(g, parts[0][0], kernel, *(x[0] for x in parts[1:]))

        def add(sums: Tree, part: Any) -> tuple[Tree, Tree]:
            more, made = g(part[0], kernel, *part[1:])
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, more), made

        zeros = jax.tree.map(
            lambda s: varying_zeros(s.shape, jnp.float32, varying_like=(hidden, kernel)), shapes
        )
        return jax.lax.scan(add, zeros, parts)

    def sums_of(*args: jax.Array) -> Tree:
        return total(scan(lambda *part: (f(*part), ()), *args)[0])

    def with_gradients(hidden: jax.Array, kernel: jax.Array, *labels: jax.Array) -> Any:
        def g(*part: jax.Array) -> tuple[Tree, jax.Array]:
            sums, (hidden_grad, kernel_grad) = jax.value_and_grad(f, (0, 1), has_aux=True)(*part)
            return (sums, kernel_grad), hidden_grad

        (sums, kernel_grad), hidden_grads = scan(g, hidden, kernel, *labels)
        hidden_grad = jnp.moveaxis(hidden_grads, 0, 1).reshape(hidden.shape)
        return total(sums), hidden_grad, kernel_grad.astype(kernel.dtype)[None]

    @jax.custom_vjp
    def summed(*args: jax.Array) -> Tree:
        return by_hand(sums_of, (spec, P(), *[spec] * len(labels_BT)), P())(*args)

    def forward(*args: jax.Array) -> tuple[Tree, Any]:
        out_specs = P(), spec, to_spec([axes])
        run = by_hand(with_gradients, (spec, P(), *[spec] * len(labels_BT)), out_specs)
        sums, hidden_grad, partial = run(*args)
        kernel_grad = add_up_parts(partial, axes, kernel_axes, layout=layout)
        # Summed first: else the whole gradient waits in memory for the backward pass of all layers.
        grads = jax.lax.optimization_barrier((hidden_grad, kernel_grad))
        return sums, (*grads, args[2:])

    def backward(saved: Any, g: tuple[jax.Array, Tree]) -> tuple[Any, ...]:
        *grads, labels = saved
        scaled = ((g[0] * grad).astype(grad.dtype) for grad in grads)
        return *scaled, *map(no_gradient, labels)

    summed.defvjp(forward, backward)
    return summed(hidden_BTD, kernel, *labels_BT)


def no_gradient(x: jax.Array) -> Any:
    """The cotangent of an array that is not differentiated."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
