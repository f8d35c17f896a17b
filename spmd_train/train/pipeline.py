"""A mesh's pipeline, and how parameters get to their stages and gradients back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.parallel import stages as stages_lib
from spmd_train.parallel.rules import (
    Layout,
    axes_of,
    compute_dtype,
    dims_of,
    leaf_path,
    to_spec,
    vary,
)
from spmd_train.parallel.schedule_table import Schedule
from spmd_train.parallel.stages import AXIS, Stages
from spmd_train.tasks import Batch, LayeredTask
from spmd_train.train.state import FunctionalModel, Params, join

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What the tick loop needs to know.

    Attributes:
        task: what is learnt.
        model: its module as a function of parameters.
        layout: mesh, rules and specs in the loop: what splits a sequence shards no parameter.
        param_specs: of the parameters outside of it.
        schedule: the table.
        stages: which layers lie where.
        num_parts: accumulation parts; each goes through the whole schedule.
        gather: `step` or `microbatch`.
    """

    task: LayeredTask
    model: FunctionalModel
    layout: Layout
    param_specs: Mapping[str, P]
    schedule: Schedule
    stages: Stages
    num_parts: int
    gather: str

    @property
    def hand(self) -> tuple[str, ...]:
        """Mesh axes that the loop takes by hand."""
        names = ("replica", "data", "fsdp") if self.gather == "step" else ("replica", "data")
        return AXIS, *(a for a in self.layout.axes("batch") if a in names)

    def _moved_dim(self, path: Any) -> int | None:
        """The dim that a leaf has over `pipeline` and an axis that stays with XLA."""
        planned = self.layout.param_specs[leaf_path(path)]
        for i, dim in enumerate(dims_of(planned, ndim=len(planned))):
            by_layers = i == 0 and self.is_stacked(path)
            if not by_layers and dim[-1:] == (AXIS,) and set(dim) - set(self.hand):
                return i
        return None

    def _loop_dims(self, path: Any) -> stages_lib.Dims:
        """Mesh axes of each dim of a leaf as it comes to the loop."""
        planned = self.layout.param_specs[leaf_path(path)]
        dims = dims_of(planned, ndim=len(planned))
        if self._moved_dim(path) is None:
            return dims
        dims = [tuple(a for a in dim if a != AXIS) for dim in dims]
        return [(AXIS,), *dims[1:]] if self.is_stacked(path) else dims

    def _move(self, f: Callable[..., jax.Array], path: Any, w: jax.Array, *, back: bool) -> Any:
        """`f(shard, dim)` on a stacked leaf that comes to its stages before the loop.

        What is not stacked comes to all of them.
        """
        dim = self._moved_dim(path)
        if dim is None:
            return w
        planned, specs = self.layout.param_specs[leaf_path(path)], to_spec(self._loop_dims(path))
        mesh = self.layout.mesh
        if not self.is_stacked(path):
            return self._laid_out(w, planned if back else specs)
        return jax.shard_map(
            functools.partial(f, dim=dim),
            mesh=mesh,
            in_specs=specs if back else planned,
            out_specs=planned if back else specs,
            axis_names=set(axes_of(planned)),
        )(w)

    def to_stages(self, params: Params) -> Params:
        """Parameters as they come to the loop, outside of it."""
        dtype, layers = jnp.dtype(self.task.compute_dtype), self.stages.layers

        def one(path: Any, w: jax.Array) -> jax.Array:
            leaf = leaf_path(path)
            gathered = self.param_specs[leaf] != self.layout.param_specs[leaf]
            if gathered or self._moved_dim(path) is not None:
                w = w.astype(compute_dtype(leaf, w, dtype, stacked=self.is_stacked(path)))
            if gathered:
                w = self._laid_out(w, self.layout.param_specs[leaf])
            move = functools.partial(stages_lib.to_stages, all_layers=layers)
            return self._move(move, path, w, back=False)

        return jax.tree_util.tree_map_with_path(one, params)

    def from_stages(self, grads: Params) -> Params:
        """Gradients as planned, from how the loop leaves them."""
        move = functools.partial(
            stages_lib.from_stages,
            all_layers=self.stages.layers,
            num_layers=self.stages.num_layers,
        )

        def one(path: Any, g: jax.Array) -> jax.Array:
            g, leaf = self._move(move, path, g, back=True), leaf_path(path)
            planned = self.param_specs[leaf]
            return g if planned == self.layout.param_specs[leaf] else self._laid_out(g, planned)

        return jax.tree_util.tree_map_with_path(one, grads)

    def _laid_out(self, w: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(w, NamedSharding(self.layout.mesh, spec))

    def hand_dims(self, path: Any) -> stages_lib.Dims:
        """Mesh axes by hand of each dim of a leaf as it comes to the loop."""
        return stages_lib.by_hand(self._loop_dims(path), self.hand)

    def is_stacked(self, path: Any) -> bool:
        """Whether a leaf holds layers."""
        return leaf_path(path).split("/")[0] == self.task.stack

    def _auto_dims(self, path: Any, *, whole: bool) -> stages_lib.Dims:
        """What XLA shards of a leaf; of a whole stacked one, [V, N, ...]."""
        dims = [tuple(a for a in dim if a not in self.hand) for dim in self._loop_dims(path)]
        return [(), (), *dims[1:]] if whole and self.is_stacked(path) else dims

    def _on_shards(
        self,
        f: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
        tree: Params,
        own: jax.Array,
        *,
        to_whole: bool,
    ) -> Params:
        """Maps `f(path, shard, own layers if it is stacked)` over a tree: single devices' shards.

        The partitioner would undo its own sharding before a collective that is written by hand.
        """

        def specs(whole: bool) -> Tree:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: to_spec(self._auto_dims(path, whole=whole)), tree
            )

        def mapped(tree: Params, own: jax.Array) -> Params:
            return jax.tree_util.tree_map_with_path(
                lambda path, x: f(path, x, own.reshape(-1) if self.is_stacked(path) else None), tree
            )

        inner, outer = specs(not to_whole), specs(to_whole)
        axes = {a for spec in jax.tree.leaves(inner) for a in axes_of(spec)}
        if not axes:
            return mapped(tree, own)
        by_hand = jax.shard_map(mapped, in_specs=(inner, P()), out_specs=outer, axis_names=axes)
        return by_hand(tree, own)

    def deferred_bytes(self, *, rows: int) -> int:
        """What a device keeps for W, undivided by tensor parallelism; 0 where there is no W.

        Args:
            rows: examples of a microbatch on a device.
        """
        slots = self.schedule.num_deferred_slots
        if not slots:
            return 0

        def operands(params: Params, batch: Batch) -> Any:
            model = self.model.merge(params)
            x = self.task.embed(model, batch, key=None)
            return self.task.run_layers(model, x, batch, key=None, taps={}).operands

        batch = self.task.batch_shapes(rows)
        variables = join(self.model.abstract_params, self.model.abstract_model_state)
        shapes = jax.tree.leaves(jax.eval_shape(operands, variables, batch))
        layers = max(self.stages.sizes), self.stages.num_layers
        size = sum(s.size * s.dtype.itemsize for s in shapes) * layers[0] // layers[1]
        return slots * size // self.layout.size(self.layout.axes("sequence"))

    def whole(self, params: Params, own: jax.Array) -> Params:
        """Parameters of this device's stages, from its shards; cast to compute with."""
        dtype = jnp.dtype(self.task.compute_dtype)

        def one(path: Any, w: jax.Array, layers: jax.Array | None) -> jax.Array:
            stacked = layers is not None
            w = w.astype(compute_dtype(leaf_path(path), w, dtype, stacked=stacked))
            dims, every = self.hand_dims(path), self.stages.layers
            w = stages_lib.gather(w, dims, own_layers=layers, all_layers=every)
            return w.reshape(*every.shape[1:], *w.shape[1:]) if stacked else w

        return self._on_shards(one, params, own, to_whole=True)

    def accumulators(self, params: Params) -> Params:
        """Zeros for the gradients of whole parameters, float32, sharded as they are."""

        def one(path: Any, w: jax.Array) -> jax.Array:
            spec = to_spec(self._auto_dims(path, whole=True))
            return jax.lax.with_sharding_constraint(vary(jnp.zeros(w.shape, jnp.float32)), spec)

        return jax.tree_util.tree_map_with_path(one, params)

    def reduced(self, grads: Params, own: jax.Array) -> Params:
        """The way back of `whole`, summed over all axes by hand."""

        def one(path: Any, g: jax.Array, layers: jax.Array | None) -> jax.Array:
            return stages_lib.reduce(
                g if layers is None else g.reshape(-1, *g.shape[2:]),
                self.hand_dims(path),
                own_layers=layers,
                all_layers=self.stages.layers,
                num_layers=self.stages.num_layers,
                hand=self.hand,
            )

        return self._on_shards(one, grads, own, to_whole=False)
