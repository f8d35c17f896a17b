"""Which pipeline a mesh has, and how parameters get to their stages and gradients back."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.config import ConfigError, PipelineConfig, ShardingConfig, TrainConfig
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
from spmd_train.parallel.schedules import make_schedule
from spmd_train.parallel.stages import AXIS, Stages
from spmd_train.tasks import Batch, LayeredTask, Task
from spmd_train.train.state import FunctionalModel, Params, join

log = logging.getLogger(__name__)

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What the tick loop needs to know.

    Attributes:
        task: what is learnt.
        model: its module as a function of parameters.
        layout: mesh, rules and specs.
        schedule: the table.
        stages: which layers lie where.
        num_parts: accumulation parts; each goes through the whole schedule.
        gather: `step` or `microbatch`.
    """

    task: LayeredTask
    model: FunctionalModel
    layout: Layout
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
            to = NamedSharding(mesh, planned if back else specs)
            return jax.lax.with_sharding_constraint(w, to)
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
            if self._moved_dim(path) is not None:
                stacked = self.is_stacked(path)
                w = w.astype(compute_dtype(leaf_path(path), w, dtype, stacked=stacked))
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
        return jax.tree_util.tree_map_with_path(
            lambda path, g: self._move(move, path, g, back=True), grads
        )

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
        return slots * sum(s.size * s.dtype.itemsize for s in shapes) * layers[0] // layers[1]

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


def pipeline_rules(
    rules: Mapping[str, tuple[str, ...]],
    sharding: ShardingConfig,
    config: PipelineConfig,
    *,
    task: Task,
    mesh: Mesh,
) -> dict[str, tuple[str, ...]]:
    """The rule table for these stages: where the layers cannot lie stage by stage, `embed` does it.

    A device's even part of the layers is its stage only where the layers divide and it has one
    chunk. Otherwise all layers are sharded over `pipeline` on their `embed` dim, and one all-to-all
    per step brings each device its own; the config's own rules come first.
    """
    rules = dict(rules)
    if mesh.shape[AXIS] == 1:
        return {name: tuple(a for a in axes if a != AXIS) for name, axes in rules.items()}
    stages = _make_stages(task, mesh, config)
    if not stages.in_order and "layers" not in sharding.rules and "embed" not in sharding.rules:
        rules["layers"] = ()
        rules["embed"] = (*rules["embed"], AXIS)
    return rules


def _make_stages(task: Task, mesh: Mesh, config: PipelineConfig) -> Stages:
    if not isinstance(task, LayeredTask):
        raise ConfigError(
            f"mesh.pipeline: {mesh.shape[AXIS]} stages, but the task has no layers to divide among "
            "them; set mesh.pipeline to 1"
        )
    return stages_lib.make_stages(
        task.num_layers,
        num_devices=mesh.shape[AXIS],
        num_chunks=config.resolved_virtual_stages,
        balance=config.balance,
        head_layers=task.head_layers,
    )


def make_pipeline(
    task: Task,
    *,
    model: FunctionalModel,
    layout: Layout,
    config: PipelineConfig,
    train: TrainConfig,
) -> Pipeline | None:
    """The tick loop for a mesh; None where it has one stage.

    Raises:
        ConfigError: the layers do not fill the stages, or the batch does not divide.
    """
    mesh = layout.mesh
    if mesh.shape[AXIS] == 1:
        return None
    stages = _make_stages(task, mesh, config)
    assert isinstance(task, LayeredTask)
    schedule = make_schedule(
        config.schedule,
        num_stages=stages.num_devices,
        num_microbatches=_num_microbatches(config, train, layout),
        num_chunks=stages.num_chunks,
    )
    if schedule.num_microbatches < schedule.num_stages:
        log.warning(
            "pipeline.num_microbatches: %d microbatches do not fill %d stages: a device waits "
            "%.0f%% of the time; %d would make that %.0f%%",
            schedule.num_microbatches,
            schedule.num_stages,
            100 * schedule.bubble(),
            4 * schedule.num_stages,
            100
            * make_schedule(
                config.schedule,
                num_stages=stages.num_devices,
                num_microbatches=4 * schedule.num_stages,
                num_chunks=stages.num_chunks,
            ).bubble(),
        )
    pipe = Pipeline(
        task=task,
        model=model,
        layout=layout,
        schedule=schedule,
        stages=stages,
        num_parts=train.grad_accumulation,
        gather=config.gather,
    )
    for path, spec in layout.param_specs.items():
        _check_leaf(path, dims_of(spec, ndim=1), pipe)
    return pipe


def _check_leaf(path: str, dims: stages_lib.Dims, pipe: Pipeline) -> None:
    stages = pipe.stages
    if path.split("/")[0] == pipe.task.stack and AXIS in dims[0] and not stages.in_order:
        raise ConfigError(
            f"sharding: {path} has its layers over mesh axis {AXIS!r}, but these stages are no "
            f"even parts in order ({stages.num_layers} layers, {stages.num_devices} stages, "
            f"{stages.num_chunks} chunks each); shard another dim of it over {AXIS}, or none"
        )
    for i, dim in enumerate(dims):
        # A leaf that shares its last axis comes to the loop without it.
        ours = [a for a in (dim[:-1] if dim[-1:] == (AXIS,) else dim) if a in pipe.hand]
        left = [a for a in dim if a not in pipe.hand]
        # Gathered over the outer of them, the inner ones' parts of the dim are no longer in order.
        if ours and left:
            raise ConfigError(
                f"pipeline.gather: {pipe.gather!r} leaves {'+'.join(left)} to XLA, but dim {i} of "
                f"{path} is on {'+'.join(dim)}, of which the pipeline gathers {'+'.join(ours)}; "
                "set pipeline.gather to step, or change sharding.rules"
            )


def _num_microbatches(config: PipelineConfig, train: TrainConfig, layout: Layout) -> int:
    axes = layout.axes("batch")
    shards = layout.size(axes)
    rows = train.global_batch_size // (train.grad_accumulation * shards)
    stages = layout.mesh.shape[AXIS]
    if not config.num_microbatches:
        return max(n for n in range(1, min(rows, 4 * stages) + 1) if rows % n == 0)
    if rows % config.num_microbatches:
        near = [n for n in range(1, rows + 1) if rows % n == 0]
        best = min(near, key=lambda n: abs(n - config.num_microbatches))
        each = config.num_microbatches * train.grad_accumulation * shards
        raise ConfigError(
            f"pipeline.num_microbatches: {config.num_microbatches} does not divide the {rows} "
            f"sequences of train.global_batch_size = {train.global_batch_size} that each of "
            f"{shards} devices ({' x '.join(axes) or 'no axis divides it'}) has in each of "
            f"train.grad_accumulation = {train.grad_accumulation} parts; the nearest that does is "
            f"{best}, or make the batch a multiple of {each}"
        )
    return config.num_microbatches
