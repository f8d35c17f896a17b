"""What two keys may not say together, as far as that shows without a device or a file.

Each check yields a `Conflict`; `parse` reports them all. What depends on the devices (a mesh that
does not fill them, a dim that does not divide) is found by `parallel`; whether files exist, by
`data`. No check here forbids to shorten a run: `train.num_steps` may be any number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from spmd_train.config import precision, schema
from spmd_train.config.keys import nearest, nearest_divisor


class Conflict(NamedTuple):
    """Keys that contradict each other.

    Attributes:
      values: each key's whole path and its value.
      message: what is allowed, and the cure.
    """

    values: Mapping[str, Any]
    message: str


_UNAVAILABLE_AXES = ("replica",)


def conflicts(config: schema.ExperimentConfig) -> Iterator[Conflict]:
    """All contradictions in a config whose single values are each allowed."""
    yield from _mesh_conflicts(config.mesh)
    yield from _sharding_conflicts(config.sharding)
    yield from _pipeline_conflicts(config)
    yield from _model_conflicts(config.model)
    yield from _remat_conflicts(config.model, config.moe)
    yield from _moe_conflicts(config)
    yield from _data_conflicts(config.data)
    yield from _length_conflicts(config)
    yield from _optimizer_conflicts(config.optimizer)
    yield from _rounding_conflicts(config)
    yield from _batch_conflicts(config.train)
    yield from _lint_conflicts(config.plan)


def precision_conflicts(config: schema.ExperimentConfig) -> Iterator[Conflict]:
    """What contradicts the policy of a config to which it has not yet been applied."""
    values = precision.contradicted(config)
    if values:
        wanted = precision.policy(config.precision)
        message = precision.cure(config.precision, {path: wanted[path] for path in values})
        yield Conflict({"precision": config.precision, **values}, message)


def _mesh_conflicts(mesh: schema.MeshConfig) -> Iterator[Conflict]:
    within = {f"mesh.{axis}": getattr(mesh, axis) for axis in schema.MESH_AXES}
    between = {f"mesh.dcn.{axis}": getattr(mesh.dcn, axis) for axis in schema.MESH_AXES}
    rest = {path: size for path, size in within.items() if size == -1}
    if len(rest) > 1:
        yield Conflict(
            rest, "at most one axis may be -1, the rest of the devices; give the others a size"
        )
    for path, size in {**within, **between}.items():
        if path.rpartition(".")[2] in _UNAVAILABLE_AXES and size != 1:
            yield Conflict(
                {path: size},
                "this axis is not yet possible in this version and must be 1; "
                "use the other axes of the mesh",
            )


def _pipeline_conflicts(config: schema.ExperimentConfig) -> Iterator[Conflict]:
    pipeline = config.pipeline
    if pipeline.schedule != "interleaved" and pipeline.virtual_stages > 1:
        yield Conflict(
            {
                "pipeline.schedule": pipeline.schedule,
                "pipeline.virtual_stages": pipeline.virtual_stages,
            },
            "only the schedule interleaved has more than one virtual stage on a device",
        )


def _sharding_conflicts(sharding: schema.ShardingConfig) -> Iterator[Conflict]:
    for name, spec in sharding.rules.items():
        yield from _axes_conflicts(f"sharding.rules.{name}", spec, [spec])
    for pattern, spec in sharding.overrides.items():
        path = f"sharding.overrides.{pattern}"
        yield from _pattern_conflicts(path, spec, pattern)
        yield from _axes_conflicts(path, spec, spec.split(","))


def _axes_conflicts(path: str, value: str, dims: list[str]) -> Iterator[Conflict]:
    axes = [axis.strip() for dim in dims if dim.strip() != "none" for axis in dim.split("+")]
    for axis in axes:
        if axis not in schema.MESH_AXES:
            yield Conflict(
                {path: value},
                f"{axis!r} is no mesh axis; must be none, axes of {', '.join(schema.MESH_AXES)}, "
                f"or several of them joined by +; the nearest is {nearest(axis, schema.MESH_AXES)}",
            )
        elif axes.count(axis) > 1:
            yield Conflict({path: value}, f"{axis} may shard only one dim, and once")
            return


def _pattern_conflicts(path: str, value: str, pattern: str) -> Iterator[Conflict]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Conflict({path: value}, f"{pattern!r} must be a regular expression: {error}")


def _remat_conflicts(model: schema.ModelConfig, moe: schema.MoEConfig) -> Iterator[Conflict]:
    texts = {
        "model.remat_saved": model.remat_saved,
        "model.remat_offloaded": model.remat_offloaded,
    }
    if any(texts.values()) != (model.remat == "names"):
        yield Conflict(
            {"model.remat": model.remat, **texts},
            "names to save or to offload go with model.remat=names, which needs some",
        )
    for (path, text), names in zip(texts.items(), model.remat_names, strict=True):
        for name in names:
            if name not in schema.REMAT_NAMES:
                yield Conflict(
                    {path: text},
                    f"{name!r} must be one of {', '.join(schema.REMAT_NAMES)}; the nearest is "
                    f"{nearest(name, schema.REMAT_NAMES)}",
                )
            elif name in ("gate", "up", "down") and moe.num_experts and not moe.num_shared_experts:
                yield Conflict(
                    {path: text, "moe.num_experts": moe.num_experts},
                    f"{name!r} is of an MLP that all tokens share, and this model has routed "
                    "experts only; leave it out, or set model.remat to projections, for theirs",
                )
            elif name == "gate" and model.mlp != "swiglu":
                yield Conflict(
                    {path: text, "model.mlp": model.mlp}, "only swiglu has a gate; leave it out"
                )
    saved, offloaded = model.remat_names
    for name in saved:
        if name in offloaded:
            yield Conflict(texts, f"{name} must be in one of them")


def _model_conflicts(model: schema.ModelConfig) -> Iterator[Conflict]:
    heads = {"model.num_heads": model.num_heads}
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield Conflict(
            {**heads, "model.num_kv_heads": model.num_kv_heads},
            "num_kv_heads must divide num_heads: each of them serves as many query heads",
        )
    if not model.head_dim and model.embed_dim % model.num_heads:
        yield Conflict(
            {"model.embed_dim": model.embed_dim, **heads},
            "num_heads must divide embed_dim, or set model.head_dim",
        )
    elif model.positions == "rope" and model.resolved_head_dim % 2:
        yield Conflict(
            {"model.embed_dim": model.embed_dim, **heads, "model.head_dim": model.head_dim},
            f"rope turns pairs of a head's dims, so a head's width, {model.resolved_head_dim}, "
            "must be even",
        )
    rope = model.rope
    if rope.scaling == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        yield Conflict(
            {
                "model.rope.low_freq_factor": rope.low_freq_factor,
                "model.rope.high_freq_factor": rope.high_freq_factor,
            },
            "low_freq_factor must be less than high_freq_factor",
        )


def _moe_conflicts(config: schema.ExperimentConfig) -> Iterator[Conflict]:
    moe, mesh = config.moe, config.mesh
    experts = {"moe.num_experts": moe.num_experts}
    sizes = {"mesh.expert": mesh.expert, "mesh.dcn.expert": mesh.dcn.expert}
    shards = mesh.expert * mesh.dcn.expert
    sharded = {name: size for name, size in sizes.items() if size != 1}
    if not moe.num_experts:
        if sharded:
            yield Conflict(
                {**experts, **sharded},
                "a dense model has no experts to shard: set moe.num_experts, or mesh.expert to 1 "
                "and give its devices to mesh.data or mesh.fsdp",
            )
        return
    if shards > 0 and moe.num_experts % shards:
        best = nearest_divisor(moe.num_experts, shards)
        multiple = max(round(moe.num_experts / shards), 1) * shards
        yield Conflict(
            {**experts, **sharded},
            f"{moe.num_experts} experts do not divide over {shards} shards; the nearest that work "
            f"are {best} shards, or {multiple} experts",
        )
    if moe.top_k > moe.num_experts:
        yield Conflict(
            {**experts, "moe.top_k": moe.top_k},
            f"a token cannot take more experts than there are; top_k may be 1 to {moe.num_experts}",
        )
    if config.model.mlp_bias:
        yield Conflict({**experts, "model.mlp_bias": True}, "experts have no biases; set it false")


def _data_conflicts(data: schema.DataConfig) -> Iterator[Conflict]:
    if data.mixture:
        for name, source in data.mixture.items():
            path = f"data.mixture.{name}"
            if not re.fullmatch(r"\w[\w.-]*", name):
                yield Conflict(
                    {path: {}}, "the name must be of letters, digits, '_', '-' and '.' only"
                )
            yield from _source_conflicts(path, source)
    else:
        yield from _source_conflicts("data", data)
    if data.tokenizer != "bytes" and not data.tokenizer.endswith((".json", ".model")):
        yield Conflict(
            {"data.tokenizer": data.tokenizer},
            "must be bytes, or the path of a tokenizer.json (Hugging Face) or a .model file "
            "(SentencePiece)",
        )


def _source_conflicts(
    path: str, source: schema.DataConfig | schema.SourceConfig
) -> Iterator[Conflict]:
    kind = {f"{path}.source": source.source}
    if source.source == "stdlib":
        for name, value in (("path", source.path), ("eval_path", source.eval_path)):
            if value:
                yield Conflict(
                    {**kind, f"{path}.{name}": value},
                    f"stdlib reads no files; set {path}.source to the kind of the files "
                    f"(text, jsonl, ...) or {name} to nothing",
                )
        return
    if not source.path:
        yield Conflict(
            {**kind, f"{path}.path": ""},
            f"a {source.source} source needs {path}.path, such as /data/**/*",
        )
    if source.source != "text" and not source.text_key:
        yield Conflict(
            {**kind, f"{path}.text_key": ""},
            "must name the field that holds the text",
        )


def _length_conflicts(config: schema.ExperimentConfig) -> Iterator[Conflict]:
    model, data, loss, sample = config.model, config.data, config.loss, config.sample
    length = {"data.sequence_length": data.sequence_length}
    if loss.chunk_tokens and data.sequence_length % loss.chunk_tokens:
        yield Conflict(
            {**length, "loss.chunk_tokens": loss.chunk_tokens},
            "chunk_tokens must divide sequence_length, or be 0",
        )
    if data.tokenizer == "bytes" and model.vocab_size < 256:
        yield Conflict(
            {"data.tokenizer": data.tokenizer, "model.vocab_size": model.vocab_size},
            "bytes need a vocab_size of at least 256",
        )
    if model.positions == "learned":
        table = {"model.positions": "learned", "model.max_positions": model.max_positions}
        if model.max_positions < data.sequence_length:
            yield Conflict(
                {**table, **length}, "max_positions must be at least sequence_length, or use rope"
            )
        if sample.prompt and model.max_positions <= sample.max_new_tokens:
            yield Conflict(
                {**table, "sample.max_new_tokens": sample.max_new_tokens},
                "max_positions must hold the prompt and max_new_tokens",
            )


def _optimizer_conflicts(optimizer: schema.OptimizerConfig) -> Iterator[Conflict]:
    schedule = optimizer.schedule
    kind = {"optimizer.schedule.name": schedule.name}
    decay = {"optimizer.schedule.decay_steps": schedule.decay_steps}
    if schedule.name == "wsd" and not schedule.decay_steps:
        yield Conflict({**kind, **decay}, "wsd needs the number of steps of its final decay")
    if schedule.name == "constant" and schedule.decay_steps:
        yield Conflict({**kind, **decay}, "constant does not decay: set decay_steps to 0")
    if schedule.name in ("cosine", "linear") and 0 < schedule.decay_steps <= schedule.warmup_steps:
        yield Conflict(
            {**kind, **decay, "optimizer.schedule.warmup_steps": schedule.warmup_steps},
            "decay ends at step decay_steps, which must come after warmup_steps (or be 0: the "
            "run's last step)",
        )
    exclude = optimizer.weight_decay_exclude
    yield from _pattern_conflicts("optimizer.weight_decay_exclude", exclude, exclude)


def _rounding_conflicts(config: schema.ExperimentConfig) -> Iterator[Conflict]:
    if config.optimizer.stochastic_rounding and config.model.param_dtype == "float32":
        yield Conflict(
            {"optimizer.stochastic_rounding": True, "model.param_dtype": "float32"},
            "float32 parameters are not rounded; set param_dtype=bfloat16, or "
            "stochastic_rounding=false",
        )


def _batch_conflicts(train: schema.TrainConfig) -> Iterator[Conflict]:
    if train.global_batch_size % train.grad_accumulation:
        yield Conflict(
            {
                "train.global_batch_size": train.global_batch_size,
                "train.grad_accumulation": train.grad_accumulation,
            },
            "grad_accumulation must divide global_batch_size; the nearest that does is "
            f"{nearest_divisor(train.global_batch_size, train.grad_accumulation)}",
        )


def _lint_conflicts(plan: schema.PlanConfig) -> Iterator[Conflict]:
    for name in plan.silent:
        if name not in schema.LINTS:
            yield Conflict(
                {"plan.silence": plan.silence},
                f"{name!r} is no lint; there are {', '.join(schema.LINTS)}; the nearest is "
                f"{nearest(name, schema.LINTS)}",
            )
