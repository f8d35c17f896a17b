"""Which pipeline a mesh has: rules, stages, schedule, microbatches; and what is impossible."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from spmd_train.config import ConfigError, PipelineConfig, ShardingConfig, TrainConfig
from spmd_train.parallel import stages as stages_lib
from spmd_train.parallel.rules import Layout, dims_of, leaf_path
from spmd_train.parallel.schedules import make_schedule
from spmd_train.parallel.stages import AXIS, Stages
from spmd_train.tasks import LayeredTask, Task
from spmd_train.train.pipeline import Pipeline
from spmd_train.train.state import FunctionalModel

log = logging.getLogger(__name__)


def pipeline_rules(
    rules: Mapping[str, tuple[str, ...]],
    sharding: ShardingConfig,
    config: PipelineConfig,
    *,
    model: FunctionalModel,
    mesh: Mesh,
) -> dict[str, tuple[str, ...]]:
    """The rule table for these stages: where the layers cannot lie stage by stage, `embed` does it.

    A device's even part of the layers is its stage only where the layers divide and it has one
    chunk. Otherwise all layers are sharded over `pipeline` on their `embed` dim, and one all-to-all
    per step brings each device its own; the config's own rules come first.

    Raises:
        ConfigError: that dim does not divide, or there are fewer layers than stages.
    """
    rules = dict(rules)
    if mesh.shape[AXIS] == 1:
        return {name: tuple(a for a in axes if a != AXIS) for name, axes in rules.items()}
    for name in ("batch", "sequence", "residual_sequence"):
        if AXIS in rules[name]:
            raise ConfigError(
                f"sharding.rules.{name}: {'+'.join(rules[name])} has {AXIS}, whose devices have "
                "other layers, not other tokens; leave it out, or set mesh.pipeline to 1"
            )
    stages = _make_stages(model.task, mesh, config)
    if not stages.in_order and "layers" not in sharding.rules and "embed" not in sharding.rules:
        rules["layers"] = ()
        whole = rules["sequence"]  # Innermost: gathered before the loop, by parts in order.
        embed = [a for a in rules["embed"] if a not in whole]
        rules["embed"] = (*embed, AXIS, *(a for a in rules["embed"] if a in whole))
        _check_embed(rules["embed"], stages, balance=config.balance, model=model, mesh=mesh)
    return rules


def _check_embed(
    axes: tuple[str, ...], stages: Stages, *, balance: str, model: FunctionalModel, mesh: Mesh
) -> None:
    shards = math.prod(mesh.shape[a] for a in axes)
    count = stages.num_devices * stages.num_chunks
    below = stages.num_layers // count * count
    cures = [f"{below} or {below + count} layers"] if stages.num_layers % count else []
    if balance == "flops":
        cures.append("pipeline.balance = layers")
    if stages.num_chunks > 1:
        cures.append("pipeline.virtual_stages = 1 (a schedule that is not interleaved)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params):
        names = model.logical_axes[leaf_path(path)] or ()
        for name, size in zip(names, leaf.shape, strict=False):
            if name == "embed" and size % shards:
                raise ConfigError(
                    f"model.num_layers: {stages.num_layers} layers are no even parts, in order, "
                    f"of mesh.pipeline = {stages.num_devices} stages with {stages.num_chunks} "
                    "chunks each, so that every device keeps a part of each layer's embed dim; "
                    f"but that of {leaf_path(path)}, {size}, does not divide over "
                    f"{' x '.join(a for a in axes if mesh.shape[a] > 1)} = {shards} devices. "
                    f"With {' or with '.join(cures)} it need not; the nearest embed dims that "
                    f"divide are {max(size // shards, 1) * shards} and "
                    f"{(size // shards + 1) * shards}"
                )


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
        layout=layout.with_whole_params(layout.axes("sequence")),
        param_specs=layout.param_specs,
        schedule=schedule,
        stages=stages,
        num_parts=train.grad_accumulation,
        gather=config.gather,
    )
    for path, spec in pipe.layout.param_specs.items():
        _check_leaf(path, dims_of(spec, ndim=1), pipe)
    return pipe


def _check_leaf(path: str, dims: stages_lib.Dims, pipe: Pipeline) -> None:
    stages = pipe.stages
    stacked = path.split("/")[0] == pipe.task.stack
    if stacked and dims[0] and dims[0][0] != AXIS:
        raise ConfigError(
            f"sharding.rules.layers, or the override of {path}: its layers are over "
            f"{'+'.join(dims[0])}, but stages are runs of layers; put {AXIS} first, or set it to "
            "none"
        )
    if stacked and dims[0] and not stages.in_order:
        raise ConfigError(
            f"sharding.rules.layers, or the override of {path}: its layers are over "
            f"{'+'.join(dims[0])}, but these stages are no even parts in order "
            f"({stages.num_layers} layers, {stages.num_devices} stages, {stages.num_chunks} chunks "
            "each); set sharding.rules.layers to none, or leave out sharding.rules.embed"
        )
    for i, dim in enumerate(dims):
        # A leaf that shares its last axis comes to the loop without it.
        ours = [a for a in (dim[:-1] if dim[-1:] == (AXIS,) else dim) if a in pipe.hand]
        left = [a for a in dim if a not in pipe.hand]
        # Gathered over the outer of them, the inner ones' parts of the dim are no longer in order.
        if ours and left:
            if pipe.gather == "microbatch" and set(left) <= {"fsdp"}:
                cure = "set pipeline.gather to step"
            elif ours == [AXIS]:
                cure = f"put {AXIS} last on that dim in sharding.rules"
            else:
                cure = "give them dims of their own in sharding.rules"
            raise ConfigError(
                f"pipeline.gather: {pipe.gather!r} leaves {'+'.join(left)} to XLA, but dim {i} of "
                f"{path} is on {'+'.join(dim)}, of which the pipeline gathers {'+'.join(ours)}; "
                f"{cure}"
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
