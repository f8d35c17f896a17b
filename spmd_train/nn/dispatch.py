"""Tokens to their experts and back, on one device's tokens and, by all-to-all, between devices.

Every device sorts its own choices by expert. Experts are sharded over the mesh axis of the logical
axis `expert`, which also splits the batch: a device sends each choice's token to the device that
has the expert, and gets the output back, by one all-to-all each way.

An all-to-all has a fixed size, the load has not. `dropless` is exact for any load: an exchange
carries `exchange_factor` times the even share to each device, and as many exchanges follow as the
fullest pair of devices needs (usually one; agreed on by one integer's all-reduce). Per exchange
and way a device sends (X - 1) / X * exchange_factor * choices * embed_dim numbers, X devices;
beyond the first, exchanges are recomputed in the backward pass, so that they take no memory.
`capacity` has one exchange of a fixed size, capacity_factor in place of exchange_factor.

A T tokens of a device (B * T above), K choices a token, E experts, G of them on a device, X devices
that share them, S rows for one destination, R rows in all, D embed, F mlp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from spmd_train.config import MESH_AXES, MoEConfig
from spmd_train.nn.activations import swiglu
from spmd_train.nn.grouped import grouped_by_kernel
from spmd_train.nn.projection import SAVED_NAME, project_by_experts
from spmd_train.nn.routing import Routing, expert_capacity
from spmd_train.parallel.manual import (
    add_up_parts,
    by_hand_over,
    no_gradient,
    opaque,
    psum,
)
from spmd_train.parallel.rules import (
    LogicalAxes,
    current_layout,
    dims_of,
    manual_axes,
    to_spec,
)

Kernels = Mapping[str, jax.Array]
"""`up` [E, D, F], `down` [E, F, D] and, where the MLP is gated, `gate` [E, D, F]."""


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, index_M: jax.Array, inverse_NJ: jax.Array) -> jax.Array:
    """Rows of `x_ND`; zeros where the index is out of bounds.

    Args:
        x_ND: rows.
        index_M: which row each output row is.
        inverse_NJ: which output rows (all of them) each row is; out of bounds: none. With it the
            gradient is a gather too, and not a scatter.

    Returns:
        [M, D].
    """
    return jnp.take(x_ND, index_M, axis=0, mode="fill", fill_value=0)


def _gather_rows_fwd(x_ND: jax.Array, index_M: jax.Array, inverse_NJ: jax.Array):
    return gather_rows(x_ND, index_M, inverse_NJ), (index_M, inverse_NJ)


def _gather_rows_bwd(saved: tuple[jax.Array, jax.Array], g_MD: jax.Array):
    index_M, inverse_NJ = saved
    g_NJD = jnp.take(g_MD, inverse_NJ, axis=0, mode="fill", fill_value=0)
    dx_ND = jnp.sum(g_NJD.astype(jnp.float32), axis=1).astype(g_MD.dtype)
    return dx_ND, no_gradient(index_M), no_gradient(inverse_NJ)


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


class _Sorted(NamedTuple):
    """A device's choices, sorted by expert.

    Attributes:
        order: int32 [T * K], the choices, sorted; choice c is token c // K's.
        places: int32 [T * K], where each choice is in that order.
        ends: int32 [E + 1], where the rows of the experts before each one end: from `ends[e]` to
            `ends[e + 1]` are those of e.
    """

    order: jax.Array
    places: jax.Array
    ends: jax.Array


def _sort(experts_TK: jax.Array, num_experts: int) -> _Sorted:
    experts = experts_TK.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    is_before = experts[:, None] < jnp.arange(num_experts + 1, dtype=jnp.int32)
    ends = jnp.sum(is_before, axis=0, dtype=jnp.int32)
    return _Sorted(order.astype(jnp.int32), jnp.argsort(order).astype(jnp.int32), ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Exchange:
    """How the choices of a device travel.

    Attributes:
        num_experts: E.
        num_devices: X.
        axes: mesh axes of the experts.
        mlp_axes: mesh axes over which F is split.
        quantization: `model.quantization`.
        num_bins: X (dropless) or E (capacity): what choices are sent to.
        size: S, rows sent to each bin in one round.
        one_round: whether that is enough whatever the load.
    """

    num_experts: int
    num_devices: int
    axes: tuple[str, ...]
    mlp_axes: tuple[str, ...]
    quantization: str
    num_bins: int
    size: int
    one_round: bool

    def num_rounds(self, order: _Sorted) -> jax.Array:
        """Rounds that this device needs."""
        bins = order.ends[:: self.num_experts // self.num_bins]
        return -(-jnp.max(bins[1:] - bins[:-1]) // self.size)

    def round(
        self,
        index: jax.Array | int,
        x_TD: jax.Array,
        weights_TK: jax.Array,
        kernels: Kernels,
        experts_TK: jax.Array,
        order: _Sorted,
    ) -> jax.Array:
        """What the choices of one round add to the tokens, float32 [T, D]."""
        num_choices, num_rows = experts_TK.size, self.num_bins * self.size
        k, per_bin = experts_TK.shape[1], self.num_experts // self.num_bins
        # Row s of a bin is the choice at `start` of the bin + round * S + s in the order.
        first = order.ends[:-1:per_bin] + index * self.size
        place = first[:, None] + jnp.arange(self.size, dtype=jnp.int32)
        is_row = place < order.ends[per_bin::per_bin, None]
        choice = jnp.take(order.order, place.reshape(-1), mode="clip")
        choice_R = jnp.where(is_row.reshape(-1), choice, num_choices)
        experts = experts_TK.reshape(-1)
        bin_of = jnp.minimum(experts // per_bin, self.num_bins - 1)
        offset = order.places - first[bin_of]
        travels = (experts < self.num_experts) & (offset >= 0) & (offset < self.size)
        row_TK = jnp.where(travels, bin_of * self.size + offset, num_rows).reshape(-1, k)

        token_R = jnp.where(choice_R < num_choices, choice_R // k, x_TD.shape[0])
        rows_RD = gather_rows(x_TD, token_R, row_TK)
        if self.num_bins == self.num_experts:
            out_RD = self._batched(rows_RD, kernels)
        else:
            expert_R = jnp.take(experts, choice_R, mode="fill", fill_value=self.num_experts)
            out_RD = self._grouped(rows_RD, expert_R, kernels)
        y_CD = gather_rows(out_RD, row_TK.reshape(-1), choice_R[:, None])
        y_TKD = y_CD.reshape(*experts_TK.shape, -1).astype(jnp.float32)
        return jnp.einsum("tkd,tk->td", y_TKD, weights_TK)

    def _all_to_all(self, x: jax.Array) -> jax.Array:
        """[X, ...]: part i goes to device i, and becomes the part of this device there."""
        if self.num_devices == 1:
            return x
        return jax.lax.all_to_all(x, self.axes, split_axis=0, concat_axis=0, tiled=True)

    def _batched(self, rows_RD: jax.Array, kernels: Kernels) -> jax.Array:
        """Capacity: every expert has the same number of rows of each device."""
        x, g, s = self.num_devices, self.num_experts // self.num_devices, self.size
        rows_XGSD = self._all_to_all(rows_RD.reshape(x, g, s, -1))
        rows_GRD = jnp.moveaxis(rows_XGSD, 0, 1).reshape(g, x * s, -1)
        out_GRD = self._mlp(rows_GRD, kernels)
        out_XGSD = jnp.moveaxis(out_GRD.reshape(g, x, s, -1), 1, 0)
        return self._all_to_all(out_XGSD).reshape(rows_RD.shape)

    def _grouped(self, rows_RD: jax.Array, expert_R: jax.Array, kernels: Kernels) -> jax.Array:
        """Dropless: rows of any number for each expert."""
        x, g = self.num_devices, self.num_experts // self.num_devices
        if x == 1:  # They are in order.
            return self._mlp(rows_RD, kernels, _sizes(expert_R, g))
        # Counted from the first of the device that gets them; G: no row.
        local = jnp.where(expert_R < self.num_experts, expert_R % g, g)
        local = self._all_to_all(local.reshape(x, -1)).reshape(-1)
        rows = self._all_to_all(rows_RD.reshape(x, -1, rows_RD.shape[1])).reshape(rows_RD.shape)
        order = jnp.argsort(local, stable=True)
        back, sizes = jnp.argsort(order), _sizes(local, g)
        rows = gather_rows(rows, order, back[:, None])
        out = self._mlp(rows, kernels, sizes)
        out = gather_rows(out, back, order[:, None])
        return self._all_to_all(out.reshape(x, -1, rows_RD.shape[1])).reshape(rows_RD.shape)

    def _mlp(self, rows: jax.Array, kernels: Kernels, sizes: jax.Array | None = None) -> jax.Array:
        """SwiGLU or GELU, as `nn.mlp.MLP`; of F, this device's part of the sum."""
        project = functools.partial(
            project_by_experts, sizes_E=sizes, quantization=self.quantization
        )
        up = project(rows, kernels["up"], out_axes=self.mlp_axes)
        if "gate" in kernels:
            hidden = swiglu(project(rows, kernels["gate"], out_axes=self.mlp_axes), up)
        else:
            hidden = jax.nn.gelu(up, approximate=True)
        return project(hidden, kernels["down"], in_axes=self.mlp_axes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Argument:
    """In the place of a residual that is an argument: there is no need to save it twice."""

    index: int


def _without(pull: Any, args: Any) -> Any:
    leaves = {id(leaf): _Argument(i) for i, leaf in enumerate(jax.tree.leaves(args))}
    return jax.tree.map(lambda leaf: leaves.get(id(leaf), leaf), pull)


def _with(pull: Any, args: Any) -> Any:
    leaves = jax.tree.leaves(args)
    return jax.tree.map(
        lambda leaf: leaves[leaf.index] if isinstance(leaf, _Argument) else leaf,
        pull,
        is_leaf=lambda leaf: isinstance(leaf, _Argument),
    )


def kernel_axes(name: str) -> LogicalAxes:
    """Logical axes of an expert's kernel: those of `down`, or of the others."""
    return ("expert", "mlp", "embed") if name == "down" else ("expert", "embed", "mlp")


def _sizes(expert_R: jax.Array, num_experts: int) -> jax.Array:
    of_each = expert_R[:, None] == jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.sum(of_each, axis=0, dtype=jnp.int32)


def _exchange(
    config: MoEConfig, *, num_rows: int, length: int, part: int, devices: int, **how: Any
) -> _Exchange:
    """How `num_rows` sequences of `length` tokens travel, of which a device has `part` tokens."""
    if config.dispatch == "capacity":
        bins = config.num_experts
        size = num_rows * min(expert_capacity(config, length=length), part)
    else:
        bins, choices = devices, num_rows * part * config.top_k
        share = choices if devices == 1 else config.exchange_factor * choices / devices
        size = min(math.ceil(share), choices)
    return _Exchange(
        num_experts=config.num_experts,
        num_devices=devices,
        num_bins=bins,
        size=size,
        one_round=config.dispatch == "capacity" or devices == 1,
        **how,
    )


def run_experts(
    x_BTD: jax.Array,
    routing: Routing,
    kernels: Kernels,
    *,
    config: MoEConfig,
    quantization: str = "none",
) -> jax.Array:
    """The weighted sum of the outputs of each token's experts.

    On a mesh each device works on its own tokens (`shard_map` over the axes of batch, sequence,
    experts and mlp), with a derivative rule of its own, so that it can stand inside another
    `shard_map`. What tensor parallelism leaves to sum up is summed after the outputs have come
    back and have been weighted: T rows of it, not K * T.

    Args:
        x_BTD: tokens; sharded as `batch` and `sequence`.
        routing: of each token.
        kernels: gathered over the tokens' mesh axes, but for those of the logical axis `expert`.
        config: moe's.
        quantization: `model.quantization`.

    Returns:
        [B, T, D] in the dtype of `x_BTD`; zero where no expert took the token.
    """
    layout = current_layout()
    length, num_hidden = x_BTD.shape[1], kernels["up"].shape[2]
    if layout is None:
        token_dims: list[tuple[str, ...]] = [(), ()]
        expert_axes, mlp_axes = (), ()
    else:
        token_dims = dims_of(layout.activation_spec(x_BTD.shape[:2], ("batch", "sequence")), ndim=2)
        # Experts whose axes do not split the batch (one row, say) are gathered.
        expert_axes = layout.axes("expert")
        if not set(expert_axes) <= set(token_dims[0]):
            expert_axes = ()
        taken = {*token_dims[0], *token_dims[1], *manual_axes()}
        mlp_axes = tuple(a for a in layout.axes("mlp") if a not in taken)
        if num_hidden % layout.size(mlp_axes):
            mlp_axes = ()
    token_axes = (*token_dims[0], *token_dims[1])
    axes = tuple(a for a in MESH_AXES if a in (*token_axes, *mlp_axes))
    size = (lambda names: 1) if layout is None else layout.size
    exchange = _exchange(
        config,
        num_rows=x_BTD.shape[0] // size(token_dims[0]),
        length=length,
        part=length // size(token_dims[1]),
        devices=size(expert_axes),
        axes=expert_axes,
        mlp_axes=mlp_axes,
        quantization=quantization,
    )

    def sort_choices(experts_BTK: jax.Array) -> tuple[jax.Array, _Sorted]:
        experts_TK = experts_BTK.reshape(-1, config.top_k)
        return experts_TK, _sort(experts_TK, config.num_experts)

    def add_up(x_BTD: jax.Array, weights_BTK: jax.Array, kernels: Kernels, *args: Any, index: Any):
        x_TD, weights_TK = x_BTD.reshape(-1, x_BTD.shape[2]), weights_BTK.reshape(-1, config.top_k)
        return exchange.round(index, x_TD, weights_TK, kernels, *args).reshape(x_BTD.shape)

    if layout is None or not axes:
        y_BTD = add_up(x_BTD, routing.weights, kernels, *sort_choices(routing.experts), index=0)
        return y_BTD.astype(x_BTD.dtype)

    def varying(tree: Any) -> Any:
        def one(x: jax.Array) -> jax.Array:
            missing = set(axes) - jax.typeof(x).manual_axis_type.varying
            return jax.lax.pcast(x, tuple(a for a in axes if a in missing), to="varying")

        return jax.tree.map(one, tree)

    def total(tree: Any, over: tuple[str, ...]) -> Any:
        return psum(tree, over) if over else tree

    def more_rounds(order: _Sorted, start: Any, add: Any) -> Any:
        """`add(index, sums)` for every round after the first."""
        if exchange.one_round:
            return start
        count = jax.lax.pmax(exchange.num_rounds(order), axes)
        with jax.named_scope("if_needed"):  # By it the planner knows that it hardly ever runs.
            return jax.lax.while_loop(
                lambda state: state[0] < count,
                lambda state: (state[0] + 1, add(state[0], state[1])),
                (jnp.int32(1), start),
            )[1]

    def outputs(x: jax.Array, weights: jax.Array, kernels: Kernels, experts: jax.Array):
        args = varying((x, weights, kernels))
        sort = sort_choices(varying(experts))
        y, pull = jax.vjp(lambda *args: add_up(*args, *sort, index=0), *args)
        y = more_rounds(sort[1], y, lambda i, sums: sums + add_up(*args, *sort, index=i))
        y = total(y.astype(x.dtype), mlp_axes)
        return y, jax.tree.map(lambda leaf: leaf[None], _without(pull, args))

    def gradients(
        pull: Any, g: jax.Array, x: jax.Array, weights: jax.Array, kernels: Kernels, experts
    ):
        args, g = varying((x, weights, kernels)), varying(g.astype(jnp.float32))
        sort = sort_choices(varying(experts))
        grads = _with(jax.tree.map(lambda leaf: leaf[0], pull), args)(g)

        def add(index: jax.Array, sums: Any) -> Any:
            more = jax.vjp(lambda *args: add_up(*args, *sort, index=index), *args)[1](g)
            return jax.tree.map(jnp.add, sums, more)

        dx, dweights, dkernels = more_rounds(sort[1], grads, add)
        dkernels = jax.tree.map(lambda part: part[None], dkernels)
        return *total((dx, dweights), mlp_axes), dkernels

    spec = to_spec(token_dims)
    copies = tuple(a for a in token_axes if a not in expert_axes)
    kernel_dims = {name: [expert_axes, (), mlp_axes] for name in kernels}
    kernel_dims["down"] = [expert_axes, mlp_axes, ()]
    kernel_specs = {name: to_spec(dims) for name, dims in kernel_dims.items()}
    parts_specs = {name: to_spec([copies, *dims]) for name, dims in kernel_dims.items()}
    in_specs = (spec, spec, kernel_specs, spec)
    each = P(axes)
    # No axis stays with XLA: a kernel of a platform's own cannot be partitioned.
    by_hand = functools.partial(
        by_hand_over,
        layout=layout,
        axes=[a for a in MESH_AXES if a not in manual_axes()],
        check=not grouped_by_kernel(),
    )

    @jax.custom_vjp
    def run(x: jax.Array, weights: jax.Array, kernels: Kernels, experts: jax.Array) -> jax.Array:
        return forward(x, weights, kernels, experts)[0]

    def forward(*args: Any):
        run = by_hand(outputs, in_specs=in_specs, out_specs=(spec, each))
        y, pull = opaque(run)(*args)
        # Remat sees one step here: with a projection's outputs it keeps what else goes with them.
        pull = jax.tree.map(lambda leaf: checkpoint_name(leaf, SAVED_NAME), pull)
        return y, (pull, args)

    def backward(saved: Any, g: jax.Array):
        pull, args = saved
        specs = (each, spec, *in_specs)
        run = by_hand(gradients, in_specs=specs, out_specs=(spec, spec, parts_specs))
        dx, dweights, parts = opaque(run)(pull, g, *args)
        dkernels = {
            name: add_up_parts(part, copies, kernel_axes(name), layout=layout)
            for name, part in parts.items()
        }
        return dx, dweights, dkernels, no_gradient(args[3])

    run.defvjp(forward, backward)
    return run(x_BTD, routing.weights, dict(kernels), routing.experts)
