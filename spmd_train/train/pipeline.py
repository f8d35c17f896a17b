"""The tick loop: a pipeline schedule inside one jitted program.

One `shard_map` takes the pipeline axis by hand, and with it the axes that copy the model (`replica`,
`data`) and, with `pipeline.gather = "step"`, `fsdp`. In it a scan goes through the schedule's
ticks. Each slot of a tick is under a `lax.cond`, so that a device that has nothing to do computes
nothing. Only inputs of stages are kept between F and B; a B computes its stage once more. Between
ticks, activations go to the next device and gradients to the one before.

Tensor parallelism inside a stage stays with XLA: its collectives stand inside the branches, and all
devices of such a group take the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spmd_train.config import ConfigError, PipelineConfig, ShardingConfig, TrainConfig
from spmd_train.nn.projection import Operands, weight_gradients
from spmd_train.parallel import stages as stages_lib
from spmd_train.parallel.rules import (
    Layout,
    axes_of,
    constrain,
    dims_of,
    leaf_path,
    to_spec,
    vary,
)
from spmd_train.parallel.schedules import (
    Columns,
    Schedule,
    columns,
    forward_only,
    make_schedule,
)
from spmd_train.parallel.stages import AXIS, Layers, Stages
from spmd_train.tasks import Batch, LayeredTask, LossOutput, Task
from spmd_train.train.state import FunctionalModel, Params

log = logging.getLogger(__name__)

Tree = Any
Taps = dict[str, jax.Array]
ACTIVATION = ("batch", "residual_sequence", None)


class Calls(NamedTuple):
    """Units whose layers were computed, over all devices that share no work: int32 scalars."""

    forward: jax.Array
    backward: jax.Array
    weights: jax.Array


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

    def gradients(
        self, params: Params, batch: Batch, *, key: jax.Array | None
    ) -> tuple[Params, LossOutput, Calls]:
        """As `sum_gradients`: gradients of the mean loss in float32, and the sums of the batch."""
        scale = 1.0 / math.prod(next(iter(batch.values())).shape)
        loop = functools.partial(_gradients, self, scale=scale)
        grads, sums, calls = self._by_hand(loop, params, batch, key, with_grads=True)
        factor = 1.0 / (scale * jnp.maximum(sums.weight_sum, 1.0))
        return jax.tree.map(lambda g: g * factor, grads), sums, calls

    def sums(self, params: Params, batch: Batch) -> LossOutput:
        """The sums of a batch: a forward pass, for evaluation."""
        return self._by_hand(functools.partial(_sums, self), params, batch, None, with_grads=False)

    def _by_hand(self, loop: Any, params: Params, batch: Batch, key: Any, *, with_grads: bool):
        def spec(path: Any, _: Any) -> P:
            return to_spec(self._hand_dims(path))

        specs = jax.tree_util.tree_map_with_path(spec, params)
        copies = tuple(a for a in self.hand if a != AXIS)
        rows = {name: P(copies) for name in batch}
        # A device learns its place from data: an axis index is not known to every partitioner.
        place = np.arange(self.stages.num_devices), self.stages.layers
        f = jax.shard_map(
            loop,
            mesh=self.layout.mesh,
            in_specs=(specs, rows, P(), P(AXIS)),
            out_specs=(specs, P(), P()) if with_grads else P(),
            axis_names=set(self.hand),
        )
        return f(params, batch, key, jax.tree.map(jnp.asarray, place))

    def _hand_dims(self, path: Any) -> stages_lib.Dims:
        planned = self.layout.param_specs[leaf_path(path)]
        return stages_lib.by_hand(dims_of(planned, ndim=len(planned)), self.hand)

    def is_stacked(self, path: Any) -> bool:
        """Whether a leaf holds layers."""
        return leaf_path(path).split("/")[0] == self.task.stack

    def _auto_dims(self, path: Any, *, whole: bool) -> stages_lib.Dims:
        """What XLA shards of a leaf, as a shard or `whole`: there stacked leaves are [V, N, ...]."""
        planned = self.layout.param_specs[leaf_path(path)]
        dims = dims_of(planned, ndim=len(planned))
        dims = [tuple(a for a in dim if a not in self.hand) for dim in dims]
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

    def whole(self, params: Params, own: jax.Array) -> Params:
        """Parameters of this device's stages, from its shards; cast to compute with."""
        dtype = jnp.dtype(self.task.compute_dtype)

        def one(path: Any, w: jax.Array, layers: jax.Array | None) -> jax.Array:
            stacked = layers is not None
            w = w.astype(dtype) if w.ndim - stacked >= 2 else w
            dims, every = self._hand_dims(path), self.stages.layers
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
                self._hand_dims(path),
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
        return rules
    stages = _make_stages(task, mesh, config)
    if not stages.in_order and "layers" not in sharding.rules and "embed" not in sharding.rules:
        rules["layers"] = ()
        # Of axes on one dim, those by hand must be the outer ones.
        embed = rules["embed"]
        rules["embed"] = (*embed, AXIS) if config.gather == "step" else (AXIS, *embed)
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
        dims = dims_of(spec, ndim=1)
        if path.split("/")[0] == task.stack and AXIS in dims[0] and not stages.in_order:
            raise ConfigError(
                f"sharding: {path} has its layers over mesh axis {AXIS!r}, but these stages are no "
                f"even parts in order ({task.num_layers} layers, {stages.num_devices} stages, "
                f"{stages.num_chunks} chunks each); shard another dim of it over {AXIS}, or none"
            )
    return pipe


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


def _zeros(shapes: Tree) -> Tree:
    return vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def _cond(pred: jax.Array, yes: Callable[..., Tree], no: Callable[..., Tree], *operands: Tree):
    return jax.lax.cond(
        pred, lambda *args: vary(yes(*args)), lambda *args: vary(no(*args)), *operands
    )


def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, more)


class _Step:
    """A device's part of a step: its parameters, its place, and what a unit computes."""

    def __init__(self, pipe: Pipeline, params: Params, batch: Batch, key: Any, place: Any) -> None:
        self.pipe, self.key = pipe, key
        index, own = place
        self.device, self.own = index[0], own[0]
        params = vary(pipe.whole(params, self.own))
        self.blocks = params[pipe.task.stack]
        self.outer = {k: v for k, v in params.items() if k != pipe.task.stack}
        # Microbatch i is every n-th example from i on: each device keeps the rows it has.
        count = pipe.schedule.num_microbatches
        self.parts = {
            name: jnp.moveaxis(x.reshape(-1, pipe.num_parts, count, *x.shape[1:]), 0, 2)
            for name, x in vary(dict(batch)).items()
        }
        part = {name: x[0, 0] for name, x in self.parts.items()}
        self.activation = jax.eval_shape(self.embed, self.outer, part)
        self.sums = jax.eval_shape(lambda: self.head(self.outer, _zeros(self.activation), part))

    def merge(self, outer: Params, blocks: Params) -> Any:
        return self.pipe.model.merge({**outer, self.pipe.task.stack: blocks})

    def embed(self, outer: Params, part: Batch) -> jax.Array:
        model = self.merge(outer, self.chunk(0))
        return constrain(self.pipe.task.embed(model, part, key=self.key), ACTIVATION)

    def run(self, blocks: Params, x: jax.Array, part: Batch, chunk: Any, taps: Taps | None = None):
        """What leaves a chunk; with taps, also the operands of its weight gradients."""
        indices = self.own[chunk]
        exists = None if self.pipe.stages.is_even else indices >= 0
        model = self.merge(self.outer, blocks)
        layers = Layers(jnp.maximum(indices, 0), exists)
        y, operands = self.pipe.task.run_layers(
            model, x, part, key=self.key, layers=layers, taps=taps
        )
        y = constrain(y, ACTIVATION)
        return y if taps is None else (y, operands)

    def head(self, outer: Params, x: jax.Array, part: Batch) -> LossOutput:
        return self.pipe.task.head(self.merge(outer, self.chunk(0)), x, part)

    def empty_deferred(self) -> _Deferred:
        """Room for what B leaves to W."""
        part = {name: x[0, 0] for name, x in self.parts.items()}
        shapes: Operands = jax.eval_shape(
            lambda: self.run(self.chunk(0), _zeros(self.activation), part, 0, {})[1]
        )
        slots = self.pipe.schedule.num_deferred_slots
        room = jax.tree.map(lambda s: jax.ShapeDtypeStruct((slots, *s.shape), s.dtype), shapes)
        self.later = set(shapes.outputs)
        return _Deferred(_zeros(room.inputs), _zeros(room.outputs))

    def split(self, params: Params) -> tuple[Taps, Taps]:
        """A chunk's leaves by path: those that B makes gradients of, and the kernels left to W."""
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        flat = {leaf_path(path): x for path, x in leaves}
        later = {f"{name}/kernel" for name in self.later}
        assert later <= set(flat), later
        now = {path: x for path, x in flat.items() if path not in later}
        return now, {path: x for path, x in flat.items() if path in later}

    def nested(self, flat: Taps) -> Params:
        """A chunk's tree out of its leaves by path."""
        return jax.tree_util.tree_map_with_path(lambda path, _: flat[leaf_path(path)], self.blocks)

    def add(self, total: Params, grads: Taps | Params, chunk: jax.Array | int) -> Params:
        """Adds a chunk's gradients, a tree like the parameters or some leaves by path."""
        more = {leaf_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(grads)[0]}

        def one(path: Any, total: jax.Array) -> jax.Array:
            x = more.get(leaf_path(path))
            return total if x is None else total.at[chunk].add(x.astype(total.dtype))

        return jax.tree_util.tree_map_with_path(one, total)

    def chunk(self, chunk: jax.Array | int) -> Params:
        return jax.tree.map(lambda w: w[chunk], self.blocks)

    def is_first(self, chunk: jax.Array) -> jax.Array:
        return (self.device == 0) & (chunk == 0)

    def is_last(self, chunk: jax.Array) -> jax.Array:
        schedule = self.pipe.schedule
        return (self.device == schedule.num_stages - 1) & (chunk == schedule.num_chunks - 1)

    def send(self, x: jax.Array, *, forwards: bool) -> jax.Array:
        """To the next device (or the one before); around the ring where chunks need it."""
        schedule = self.pipe.schedule
        pairs = [(s, s + 1) for s in range(schedule.num_stages - 1)]
        if schedule.num_chunks > 1:
            pairs.append((schedule.num_stages - 1, 0))
        return jax.lax.ppermute(x, AXIS, pairs if forwards else [(b, a) for a, b in pairs])

    def scan(self, tick: Callable[..., Tree], carry: Tree, table: Schedule) -> Tree:
        """Goes through the ticks; `tick(carry, own row of the table, batch of a microbatch)`."""
        rows = _own_rows(columns(table), self.device)

        def part_of(parts: Batch, microbatch: jax.Array) -> Batch:
            return {n: jax.lax.dynamic_index_in_dim(x, microbatch, 0, False) for n, x in parts.items()}

        def run(carry: Tree, parts: Batch) -> tuple[Tree, None]:
            step = lambda c, row: (tick(c, row, functools.partial(part_of, parts)), None)
            return jax.lax.scan(step, carry, rows)

        if self.pipe.num_parts == 1:
            return run(carry, {n: x[0] for n, x in self.parts.items()})[0]
        return jax.lax.scan(run, carry, self.parts)[0]


def _own_rows(table: Columns, device: jax.Array) -> Columns:
    return Columns(*(jnp.asarray(c)[:, device] for c in table))


class _Deferred(NamedTuple):
    """What weight gradients will be made of, each array [slots, layers, B, T, ...]; a ring.

    Attributes:
        inputs: of projections.
        gradients: of their outputs.
    """

    inputs: Taps
    gradients: Taps

    def keep(self, inputs: Taps, gradients: Taps, microbatch: jax.Array) -> _Deferred:
        """With a microbatch's in its place."""

        def put(room: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(room, x, microbatch % room.shape[0], 0)

        return jax.tree.map(put, self, _Deferred(inputs, gradients))

    def get(self, microbatch: jax.Array) -> _Deferred:
        """A microbatch's."""
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, microbatch % x.shape[0], 0, False), self
        )


class _Carry(NamedTuple):
    """What goes from tick to tick.

    Attributes:
        x: the activation that has come from the device before.
        g: the gradient that has come from the device after.
        inputs: inputs of stages, [slots, B, T, D].
        blocks: gradients of the stacked parameters, float32.
        outer: of the others.
        sums: of the loss.
        calls: units computed.
        deferred: of what weight gradients will be made; None where B makes them.
    """

    x: jax.Array
    g: jax.Array
    inputs: jax.Array
    blocks: Params
    outer: Params
    sums: LossOutput
    calls: Calls
    deferred: _Deferred | None


def _gradients(
    pipe: Pipeline, params: Params, batch: Batch, key: Any, place: Any, *, scale: float
) -> tuple[Params, LossOutput, Calls]:
    step = _Step(pipe, params, batch, key, place)
    one = vary(jnp.float32(1))

    def forward(c: _Carry, row: Columns, part_of: Any) -> tuple[jax.Array, jax.Array, Calls]:
        part = part_of(row.forward_microbatch)
        chunk = row.forward_chunk
        x = _cond(step.is_first(chunk), lambda x: step.embed(step.outer, part), lambda x: x, c.x)

        def compute(x: jax.Array, calls: Calls) -> tuple[jax.Array, Calls]:
            y = step.run(step.chunk(chunk), x, part, chunk)
            return y, calls._replace(forward=calls.forward + 1)

        # The last stage's B will compute it.
        y, calls = _cond(step.is_last(chunk), lambda x, n: (x, n), compute, x, c.calls)
        return x, y, calls

    def head_backward(x: jax.Array, outer: Params, sums: LossOutput, part: Batch):
        def loss(outer: Params, x: jax.Array) -> tuple[jax.Array, LossOutput]:
            sums = step.head(outer, x, part)
            return sums.loss_sum * scale, sums

        _, pull, more = jax.vjp(loss, step.outer, x, has_aux=True)
        outer_grads, g = pull(one)
        return g, _add(outer, outer_grads), _add(sums, more)

    def backward(c: _Carry, row: Columns, part_of: Any) -> _Carry:
        part = part_of(row.backward_microbatch)
        chunk = row.backward_chunk
        x = jax.lax.dynamic_index_in_dim(c.inputs, row.backward_slot, 0, False)
        params, deferred = step.chunk(chunk), c.deferred
        if deferred is None:
            y, pull = jax.vjp(lambda p, x: step.run(p, x, part, chunk), params, x)
        else:
            now, later = step.split(params)
            taps = vary(jax.tree.map(lambda d: jnp.zeros_like(d[0]), deferred.gradients))
            y, pull, operands = jax.vjp(
                lambda p, x, taps: step.run(step.nested(p | later), x, part, chunk, taps),
                *(now, x, taps),
                has_aux=True,
            )
        g, outer, sums = _cond(
            step.is_last(chunk),
            lambda y, g, outer, sums: head_backward(y, outer, sums, part),
            lambda y, g, outer, sums: (g, outer, sums),
            *(y, c.g, c.outer, c.sums),
        )
        if deferred is None:
            grads, g = pull(g)
        else:
            grads, g, tap_grads = pull(g)
            deferred = deferred.keep(operands.inputs, tap_grads, row.backward_microbatch)
        blocks = step.add(c.blocks, grads, chunk)

        def embed_backward(g: jax.Array, outer: Params) -> Params:
            _, pull = jax.vjp(lambda outer: step.embed(outer, part), step.outer)
            return _add(outer, pull(g)[0])

        outer = _cond(step.is_first(chunk), embed_backward, lambda g, outer: outer, g, outer)
        calls = c.calls._replace(backward=c.calls.backward + 1)
        return c._replace(
            g=g, blocks=blocks, outer=outer, sums=sums, deferred=deferred, calls=calls
        )

    def weights(c: _Carry, row: Columns) -> _Carry:
        def one(i: jax.Array, state: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            assert c.deferred is not None
            grads = jax.vmap(weight_gradients)(*c.deferred.get(row.first_weights + i))
            by_path = {f"{name}/kernel": g for name, g in grads.items()}
            return step.add(state[0], by_path, 0), state[1] + 1

        start = c.blocks, c.calls.weights
        blocks, calls = jax.lax.fori_loop(vary(jnp.int32(0)), row.num_weights, one, start)
        return c._replace(blocks=blocks, calls=c.calls._replace(weights=calls))

    def tick(c: _Carry, row: Columns, part_of: Any) -> _Carry:
        with jax.named_scope("forward_slot"):
            x, y, calls = _cond(
                row.forward > 0, lambda c: forward(c, row, part_of), lambda c: (c.x, c.x, c.calls), c
            )
            old = jax.lax.dynamic_index_in_dim(c.inputs, row.forward_slot, 0, False)
            kept = jnp.where(row.forward > 0, x, old)
            inputs = jax.lax.dynamic_update_index_in_dim(c.inputs, kept, row.forward_slot, 0)
            c = c._replace(inputs=inputs, calls=calls)
        with jax.named_scope("backward_slot"):
            c = _cond(row.backward > 0, lambda c: backward(c, row, part_of), lambda c: c, c)
        if c.deferred is not None:
            with jax.named_scope("weights_slot"):
                c = weights(c, row)
        with jax.named_scope("send"):
            return c._replace(x=step.send(y, forwards=True), g=step.send(c.g, forwards=False))

    x = step.activation
    slots = pipe.schedule.num_input_slots
    stack = pipe.task.stack
    accumulators = pipe.accumulators({stack: step.blocks, **step.outer})
    start = _Carry(
        x=_zeros(x),
        g=_zeros(x),
        inputs=_zeros(jax.ShapeDtypeStruct((slots, *x.shape), x.dtype)),
        blocks=accumulators[stack],
        outer={k: v for k, v in accumulators.items() if k != stack},
        sums=_zeros(step.sums),
        calls=vary(Calls(*[jnp.int32(0)] * 3)),
        deferred=step.empty_deferred() if pipe.schedule.splits_backward else None,
    )
    end = step.scan(tick, start, pipe.schedule)
    grads = pipe.reduced({stack: end.blocks, **end.outer}, step.own)
    sums = jax.lax.psum(end.sums, pipe.hand)
    return grads, sums, jax.lax.psum(end.calls, pipe.hand)


def _sums(pipe: Pipeline, params: Params, batch: Batch, key: Any, place: Any) -> LossOutput:
    step = _Step(pipe, params, batch, key, place)
    schedule = pipe.schedule

    def tick(c: tuple[jax.Array, LossOutput], row: Columns, part_of: Any):
        def forward(x: jax.Array, sums: LossOutput) -> tuple[jax.Array, LossOutput]:
            part = part_of(row.forward_microbatch)
            chunk = row.forward_chunk
            x = _cond(step.is_first(chunk), lambda x: step.embed(step.outer, part), lambda x: x, x)
            y = step.run(step.chunk(chunk), x, part, chunk)
            sums = _cond(
                step.is_last(chunk),
                lambda y, sums: _add(sums, step.head(step.outer, y, part)),
                lambda y, sums: sums,
                *(y, sums),
            )
            return y, sums

        y, sums = _cond(row.forward > 0, forward, lambda *c: c, *c)
        return step.send(y, forwards=True), sums

    table = forward_only(
        num_stages=schedule.num_stages,
        num_microbatches=schedule.num_microbatches,
        num_chunks=schedule.num_chunks,
    )
    _, sums = step.scan(tick, (_zeros(step.activation), _zeros(step.sums)), table)
    return jax.lax.psum(sums, pipe.hand)
