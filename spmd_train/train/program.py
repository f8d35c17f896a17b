"""The program: abstract state, sharding plan, and the jitted functions that everything else uses.

Training runs it, the planner lowers it for hardware that is not here, the inspector prints it.
Nothing else jits a train step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.config import (
    ConfigError,
    ContextConfig,
    OptimizerConfig,
    PipelineConfig,
    ShardingConfig,
    TrainConfig,
)
from spmd_train.optim import (
    apply_updates_stochastically,
    ema_update,
    layer_shards,
    make_optimizer,
    make_schedule,
)
from spmd_train.parallel.plan import LeafPlan, plan_params, plan_state, shardings_of
from spmd_train.parallel.rules import (
    Layout,
    LogicalAxes,
    current_platform,
    make_rules,
    use_layout,
)
from spmd_train.parallel.sequence import check_sequence, place
from spmd_train.tasks import Batch, LayeredTask, LossOutput, ModelState, Task
from spmd_train.train.accumulate import sum_gradients, sum_losses
from spmd_train.train.make_pipeline import make_pipeline, pipeline_rules
from spmd_train.train.pipeline import Pipeline
from spmd_train.train.state import FunctionalModel, Params, TrainState, join
from spmd_train.train.ticks import pipelined_gradients, pipelined_sums
from spmd_train.xla_flags import program_options

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted SPMD program for one mesh.

    Where `params` goes into a function, it is `TrainState.eval_params`.

    Attributes:
        model: the task's module as a function of its parameters.
        layout: mesh, rules and the specs of the parameters.
        plans: path to plan, for every leaf of the train state.
        abstract_state: the train state as ShapeDtypeStructs with shardings.
        abstract_batch: a global batch as ShapeDtypeStructs with shardings.
        init: `init(seed) -> TrainState`; made in place, never whole on one device.
        init_from: the same around given parameters, which are donated.
        train_step: `train_step(state, batch) -> (state, metrics)`; the state is donated. Metrics
            are replicated, scalars but for `expert_load`: sums over tokens (`loss_sum`,
            `weight_sum`, the task's own), `grad_norm` before clipping, `learning_rate`.
        eval_step: `eval_step(params, batch) -> metrics`: the sums of one batch.
        pipeline: the tick loop of the steps; None on a mesh of one stage.
    """

    model: FunctionalModel
    layout: Layout
    plans: Mapping[str, LeafPlan]
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[int], TrainState]
    init_from: Callable[[Params], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[Params, Batch], Metrics]
    pipeline: Pipeline | None = None

    @property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return self.layout.mesh

    def lower_train_step(self) -> jax.stages.Lowered:
        """The train step, lowered for the mesh's devices without running anything."""
        step: Any = self.train_step
        return step.lower(self.abstract_state, self.abstract_batch)


def make_program(
    task: Task,
    *,
    mesh: Mesh,
    sharding: ShardingConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    context: ContextConfig = ContextConfig(),  # noqa: B008 - frozen
    pipeline: PipelineConfig | None = None,
) -> Program:
    """Builds the program of a task on a mesh; compiles nothing yet.

    Args:
        task: what is learnt.
        mesh: from `make_mesh`.
        sharding: rules and overrides.
        optimizer: which, with its schedule.
        train: batch size, accumulation, seed and number of steps.
        context: how sequences are split, where the mesh splits them.
        pipeline: the schedule, where the mesh has stages; None: the default.

    Returns:
        The program.

    Raises:
        ConfigError: the plan is impossible, or the batch does not divide over the mesh.
    """
    model = FunctionalModel(task)
    pipeline = pipeline or PipelineConfig()
    rules = pipeline_rules(make_rules(sharding), sharding, pipeline, model=model, mesh=mesh)
    param_plans = plan_params(
        model.abstract_params,
        model.logical_axes,
        rules=rules,
        overrides=sharding.overrides,
        mesh=mesh,
    )
    # Overrides are the parameters'.
    param_plans |= plan_params(
        model.abstract_model_state, model.logical_axes, rules=rules, overrides={}, mesh=mesh
    )
    layout = Layout(mesh, rules, {path: plan.spec for path, plan in param_plans.items()}, context)
    batch_axes = task.batch_axes()
    shapes = task.batch_shapes(train.global_batch_size)
    num_microbatches = _num_microbatches(train, layout)
    for name, axes in batch_axes.items():
        if "sequence" in axes:
            check_sequence(shapes[name].shape[axes.index("sequence")], layout)
    _check_sequence(shapes, batch_axes, layout)
    pipe = make_pipeline(
        task,
        model=model,
        layout=layout,
        config=pipeline,
        train=dataclasses.replace(train, grad_accumulation=num_microbatches),
    )

    schedule = make_schedule(optimizer, num_steps=train.num_steps)
    transform = make_optimizer(
        optimizer,
        num_steps=train.num_steps,
        params=model.abstract_params,
        logical_axes=model.logical_axes,
        layer_shards=layer_shards(model.logical_axes, layout),
    )

    def start(params: Params, model_state: ModelState) -> TrainState:
        # A copy: the step donates both, and one buffer cannot be donated twice.
        ema = (
            jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
            if optimizer.ema_decay
            else None
        )
        return TrainState(jnp.int32(0), params, transform.init(params), ema, model_state)

    def init(seed: int | jax.Array) -> TrainState:
        return start(*model.init(jax.random.key(seed)))

    def init_from(params: Params) -> TrainState:
        return start(params, model.init(jax.random.key(0))[1])

    def placed(batch: Batch) -> Batch:
        return {name: place(x, batch_axes[name]) for name, x in batch.items()}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_layout(layout):
            batch = placed(batch)
            key = jax.random.fold_in(jax.random.key(train.seed), state.step)

            def loss(params: Params, microbatch: Batch) -> LossOutput:
                variables = join(params, state.model_state)
                return task.loss(model.merge(variables), microbatch, key=key)

            if pipe is not None:
                variables = join(state.params, state.model_state)
                grads, sums, _ = pipelined_gradients(pipe, variables, batch, key=key)
            else:
                grads, sums = sum_gradients(
                    loss,
                    state.params,
                    batch,
                    num_microbatches=num_microbatches,
                    layout=layout,
                )
            grad_norm, good = optax.tree.norm(grads), None
            if train.bad_step == "skip":
                good = jnp.isfinite(sums.loss_sum) & jnp.isfinite(grad_norm)
            with jax.named_scope("optimizer"):
                updates, opt_state = transform.update(
                    grads, state.opt_state, state.params, good=good
                )
                params: Any = (
                    apply_updates_stochastically(state.params, updates, key=key)
                    if optimizer.stochastic_rounding
                    else optax.apply_updates(state.params, updates)
                )
                ema = state.ema
                if ema is not None:
                    ema = ema_update(ema, params, decay=optimizer.ema_decay, step=state.step)
            metrics = _metrics(sums) | {
                "grad_norm": grad_norm,
                "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            }
            model_state = task.update_model_state(state.model_state, sums)
            if good is not None:  # The optimizer has seen to its own state.
                params, ema, model_state = jax.tree.map(
                    functools.partial(jnp.where, good),
                    (params, ema, model_state),
                    (state.params, state.ema, state.model_state),
                )
                metrics["skipped"] = 1 - good.astype(jnp.float32)
            return TrainState(state.step + 1, params, opt_state, ema, model_state), metrics

    def eval_step(params: Params, batch: Batch) -> Metrics:
        with use_layout(layout):
            batch = placed(batch)
            if pipe is not None:
                return _metrics(pipelined_sums(pipe, params, batch))
            loss = functools.partial(task.loss, model.merge(params), key=None)
            return _metrics(sum_losses(loss, batch, num_microbatches=num_microbatches))

    abstract = jax.eval_shape(init, 0)
    plans = plan_state(abstract, param_plans, rules=rules, mesh=mesh, offload=optimizer.offload)
    shardings = shardings_of(abstract, plans, mesh=mesh)
    abstract_batch = {
        name: jax.ShapeDtypeStruct(
            s.shape,
            s.dtype,
            sharding=NamedSharding(mesh, layout.activation_spec(s.shape, batch_axes[name])),
        )
        for name, s in shapes.items()
    }
    batch_shardings = {name: s.sharding for name, s in abstract_batch.items()}
    replicated = NamedSharding(mesh, P())
    with use_layout(layout):
        dtype = task.compute_dtype if isinstance(task, LayeredTask) else ""
        options = program_options(current_platform(), compute_dtype=dtype)
    return Program(
        model=model,
        layout=layout,
        plans=plans,
        abstract_state=jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            abstract,
            shardings,
        ),
        abstract_batch=abstract_batch,
        init=jax.jit(init, out_shardings=shardings),
        init_from=jax.jit(init_from, out_shardings=shardings, donate_argnums=0),
        train_step=jax.jit(
            train_step,
            compiler_options=options,
            in_shardings=(shardings, batch_shardings),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            eval_step,
            compiler_options=options,
            in_shardings=(join(shardings.params, shardings.model_state), batch_shardings),
            out_shardings=replicated,
        ),
        pipeline=pipe,
    )


def _metrics(sums: LossOutput) -> Metrics:
    return {"loss_sum": sums.loss_sum, "weight_sum": sums.weight_sum, **sums.metric_sums}


def _num_microbatches(train: TrainConfig, layout: Layout) -> int:
    """`train.grad_accumulation`, or the next number with which `train.max_device_batch` is kept.

    Raises:
        ConfigError: the batch does not divide over the mesh.
    """
    axes = layout.axes("batch")
    shards = layout.size(axes)
    microbatch = train.global_batch_size // train.grad_accumulation
    if microbatch % shards:
        step = shards * train.grad_accumulation
        near = max(step, round(train.global_batch_size / step) * step)
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} in {train.grad_accumulation} "
            f"microbatches is {microbatch} sequences, which do not divide over "
            f"{' x '.join(axes)} = {shards} devices; the nearest that does is {near}"
        )
    device_batch = train.global_batch_size // shards
    most = train.max_device_batch or device_batch
    return next(
        n
        for n in range(train.grad_accumulation, device_batch + 1)
        if device_batch % n == 0 and device_batch // n <= most
    )


def _check_sequence(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    axes_of: Mapping[str, LogicalAxes],
    layout: Layout,
) -> None:
    """An activation whose dim does not divide is not sharded; the sequence is worth an error."""
    dims = {dim for name, s in shapes.items() for dim in zip(axes_of[name], s.shape, strict=True)}
    lengths = [size for name, size in dims if name == "sequence"]
    for rule in ("sequence", "residual_sequence"):
        axes = layout.axes(rule)
        shards = layout.size(axes)
        for length in lengths:
            if length % shards:
                near = max(shards, round(length / shards) * shards)
                raise ConfigError(
                    f"data.sequence_length: {length} does not divide over {' x '.join(axes)} = "
                    f"{shards} devices (sharding.rules.{rule}); the nearest that does is {near}"
                )
