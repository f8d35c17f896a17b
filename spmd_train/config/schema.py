"""What a config may say: frozen dataclasses, each field with its meaning and its limits.

This is the only place where a key, its type, its default and its meaning are written down.
`spmd_train.config.default_config()` is made from it, `spmd-train inspect config` prints it, and
`spmd_train.config.parse()` checks a `ConfigDict` against it. No JAX here: `--help` stays fast.
"""

# ruff: noqa: RUF009 - section() is a dataclasses.field; ruff cannot see that through a function.

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

MESH_AXES = ("replica", "pipeline", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axis names, outermost (slowest network) first."""

DTYPES = ("float32", "bfloat16")

CUSTOM = "custom"
PRECISIONS = (CUSTOM, "float32", "bf16", "bf16_moments", "bf16_params", "int8", "fp8")
"""Names of precision policies; `config.precision` has what they set."""


def key(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    or_equal: float | None = None,
) -> Any:
    """A config key: a dataclass field with its meaning and its limits in the metadata.

    Args:
      default: the value where the config is silent; its type is the field's annotation.
      doc: the meaning, for `spmd-train inspect config`.
      choices: the only values allowed.
      at_least: smallest value allowed.
      at_most: greatest value allowed.
      above: the value must be greater than this.
      or_equal: one value allowed outside the other limits.
    """
    limits = {
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "or_equal": or_equal,
    }
    metadata = {"doc": doc, **{name: v for name, v in limits.items() if v is not None}}
    return dataclasses.field(default=default, metadata=metadata)


def mapping(doc: str) -> Any:
    """A config key that holds names of the user's own choosing."""
    return dataclasses.field(default_factory=dict, metadata={"doc": doc})


def section(cls: type) -> Any:
    """A config section: a nested dataclass with all its defaults."""
    return dataclasses.field(default_factory=cls, metadata={"doc": (cls.__doc__ or "").strip()})


def _names(text: str) -> tuple[str, ...]:
    """Of a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DcnMeshConfig:
    """Sizes of the mesh axes between slices or nodes (the slow network); multiply `mesh.AXIS`."""

    replica: int = key(1, "slices or nodes along replica", at_least=1)
    pipeline: int = key(1, "slices or nodes along pipeline", at_least=1)
    data: int = key(1, "slices or nodes along data", at_least=1)
    fsdp: int = key(1, "slices or nodes along fsdp", at_least=1)
    expert: int = key(1, "slices or nodes along expert", at_least=1)
    context: int = key(1, "slices or nodes along context", at_least=1)
    tensor: int = key(1, "slices or nodes along tensor", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes within one slice or node; one may be -1: the rest of the devices."""

    replica: int = key(1, "independent replicas", at_least=1, or_equal=-1)
    pipeline: int = key(1, "pipeline stages", at_least=1, or_equal=-1)
    data: int = key(
        -1, "copies of the model, each on its own part of the batch", at_least=1, or_equal=-1
    )
    fsdp: int = key(
        1, "shards of parameters, gradients and optimizer state (ZeRO-3)", at_least=1, or_equal=-1
    )
    expert: int = key(1, "shards of the experts", at_least=1, or_equal=-1)
    context: int = key(
        1, "shards of the sequence, and of all that fsdp shards", at_least=1, or_equal=-1
    )
    tensor: int = key(1, "shards of every layer (Megatron)", at_least=1, or_equal=-1)
    dcn: DcnMeshConfig = section(DcnMeshConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How logical axes become mesh axes."""

    rules: Mapping[str, str] = mapping(
        "logical axis -> mesh axis, 'axis+axis' or none; laid over parallel/rules.py's default "
        "table. residual_sequence=tensor gives Megatron's sequence parallelism"
    )
    overrides: Mapping[str, str] = mapping(
        "parameter path (regular expression, whole path) -> one mesh axis, 'axis+axis' or none "
        "per dim, comma-separated: 'fsdp,none,tensor'"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How sequences are split over mesh.context, where that is not 1."""

    method: str = key(
        "ring",
        "how queries meet keys of other devices: keys go round (ring), are gathered, or tokens are "
        "exchanged for heads (ulysses: heads must divide)",
        choices=("ring", "all_gather", "ulysses"),
    )
    placement: str = key(
        "zigzag",
        "which tokens a device has: two blocks, one from either end, so that causal attention is "
        "the same work on each (zigzag); or one block (contiguous)",
        choices=("zigzag", "contiguous"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How microbatches go through the stages of `mesh.pipeline`."""

    schedule: str = key(
        "1f1b",
        "gpipe: all forwards, then all backwards; 1f1b: a backward as soon as there can be one; "
        "interleaved: 1f1b with several virtual stages on a device; zero_bubble: 1f1b with weight "
        "gradients where a device would wait",
        choices=("gpipe", "1f1b", "interleaved", "zero_bubble"),
    )
    num_microbatches: int = key(
        0,
        "parts that go through the pipeline in a step (of each of train.grad_accumulation's); 0: "
        "as many as the batch allows, up to 4 per stage",
        at_least=0,
    )
    virtual_stages: int = key(
        0, "interleaved: runs of layers on a device; 0: 2 (the other schedules have 1)", at_least=0
    )
    balance: str = key(
        "layers",
        "what virtual stages have as much of as can be: layers, or FLOPs with the head counted in "
        "(flops); stages of unlike size bring their layers together by an all-to-all per step",
        choices=("layers", "flops"),
    )
    gather: str = key(
        "step",
        "fsdp inside a stage: its weights are gathered once per step and kept, or once per "
        "microbatch (less memory, more traffic); `spmd-train inspect schedule` tells the cost",
        choices=("step", "microbatch"),
    )

    @property
    def resolved_virtual_stages(self) -> int:
        """Virtual stages per device."""
        return self.virtual_stages or (2 if self.schedule == "interleaved" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864)."""

    theta: float = key(10000.0, "base of the frequencies", above=0)
    scaling: str = key("none", "llama3 rescales low frequencies", choices=("none", "llama3"))
    factor: float = key(8.0, "llama3: how much longer the context becomes", at_least=1)
    low_freq_factor: float = key(1.0, "llama3: wavelengths above original/low are divided", above=0)
    high_freq_factor: float = key(4.0, "llama3: wavelengths below original/high are kept", above=0)
    original_max_positions: int = key(8192, "llama3: context before scaling, tokens", at_least=1)


REMAT_NAMES = ("block_input", "query", "key", "value", "attention", "out", "gate", "up", "down")
"""Arrays of a block that `model.remat = names` can keep; `attention`: what a kernel returns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = key(4, "transformer blocks", at_least=1)
    embed_dim: int = key(256, "width of the residual stream", at_least=1)
    num_heads: int = key(4, "query heads", at_least=1)
    num_kv_heads: int = key(0, "key and value heads (GQA); 0: num_heads", at_least=0)
    head_dim: int = key(0, "width of a head; 0: embed_dim / num_heads", at_least=0)
    mlp_dim: int = key(688, "hidden width of the MLP", at_least=1)
    vocab_size: int = key(256, "rows of the embedding table", at_least=2)
    norm: str = key("rmsnorm", "normalization before each block", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = key(1e-5, "added to the variance", above=0)
    positions: str = key("rope", "how order is told", choices=("rope", "learned"))
    max_positions: int = key(2048, "rows of the table of learned positions", at_least=1)
    rope: RopeConfig = section(RopeConfig)
    mlp: str = key("swiglu", "swiglu (gated) or gelu (tanh form)", choices=("swiglu", "gelu"))
    tied_head: bool = key(False, "the output head is the embedding table")
    attention_bias: bool = key(False, "biases on query, key and value")
    attention_out_bias: bool = key(False, "bias on the attention's output projection")
    mlp_bias: bool = key(False, "biases in the MLP")
    qk_norm: bool = key(False, "RMSNorm on each query and key head (Qwen3)")
    dropout: float = key(0.0, "on embeddings and block outputs", at_least=0, at_most=0.99)
    logit_softcap: float = key(0.0, "cap * tanh(logits / cap); 0: off", at_least=0)
    attention_softcap: float = key(0.0, "the same on attention scores; 0: off", at_least=0)
    sliding_window: int = key(
        0, "a token sees only so many tokens, itself and those before it; 0: all", at_least=0
    )
    attention: str = key(
        "auto",
        "how it is computed: by the platform's kernel (flash), in plain JAX by blocks of queries "
        "(blocks), or flash where there is a kernel that takes the shapes (auto); so it is, too, "
        "what a device does of split sequences (context.method)",
        choices=("auto", "flash", "blocks"),
    )
    remat: str = key(
        "none",
        "what the backward pass recomputes: none, everything in a block (full), all but outputs "
        "of matmuls and attention kernels (dots), of projections and those (projections), or what "
        "remat_saved and remat_offloaded name (names)",
        choices=("none", "full", "dots", "projections", "names"),
    )
    remat_saved: str = key("", f"remat = names: kept; of {', '.join(REMAT_NAMES)}, comma-separated")
    remat_offloaded: str = key(
        "", "remat = names: kept in the host's memory until the backward pass; of the same"
    )
    scan_unroll: int = key(1, "layers per iteration of the layer scan", at_least=1)
    init_scale: float = key(0.02, "standard deviation of the initial weights", above=0)
    param_dtype: str = key("float32", "dtype in which parameters are kept", choices=DTYPES)
    compute_dtype: str = key("float32", "dtype of activations and matmuls", choices=DTYPES)
    quantization: str = key(
        "none",
        "projections multiply in 8 bits, forwards and for the gradients of their inputs (extra: "
        "quantization): int8, or fp8 (E4M3; gradients E5M2); gradients of kernels, attention "
        "scores and logits stay in compute_dtype or float32",
        choices=("none", "int8", "fp8"),
    )

    @property
    def remat_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What `remat_saved` and `remat_offloaded` name."""
        return _names(self.remat_saved), _names(self.remat_offloaded)

    @property
    def resolved_kv_heads(self) -> int:
        """Key and value heads: `num_kv_heads`, or where that is 0 `num_heads`."""
        return self.num_kv_heads or self.num_heads

    @property
    def resolved_head_dim(self) -> int:
        """Width of a head: `head_dim`, or where that is 0 `embed_dim / num_heads`."""
        return self.head_dim or self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: the MLP of every block becomes many, of which a token takes a few."""

    num_experts: int = key(0, "experts of a block; 0: a dense model", at_least=0)
    top_k: int = key(2, "experts that a token takes", at_least=1)
    expert_mlp_dim: int = key(0, "hidden width of an expert; 0: model.mlp_dim", at_least=0)
    num_shared_experts: int = key(0, "experts that every token takes besides", at_least=0)
    shared_mlp_dim: int = key(0, "width of a shared expert; 0: that of the others", at_least=0)
    scores: str = key("softmax", "what the router's logits become", choices=("softmax", "sigmoid"))
    renormalize: bool = key(True, "a token's chosen scores are divided by their sum")
    routed_scale: float = key(1.0, "then multiplied by this (DeepSeek-V3: 2.5)", above=0)
    balance: str = key(
        "loss",
        "what evens out the load: a loss of each sequence (loss), a bias on the scores that only "
        "the choice sees (bias), or nothing (none)",
        choices=("none", "loss", "bias"),
    )
    load_balancing_loss: float = key(
        0.01, "balance = loss: its weight (Switch, arXiv:2101.03961)", at_least=0
    )
    bias_update_speed: float = key(
        0.001, "balance = bias: its change per step (DeepSeek-V3, arXiv:2408.15664)", above=0
    )
    router_z_loss: float = key(
        0.0, "weight of log(Z)^2 of the router (ST-MoE, arXiv:2202.08906)", at_least=0
    )
    dispatch: str = key(
        "dropless",
        "every token is served (dropless), or an expert takes so many tokens of a sequence, the "
        "first ones (capacity)",
        choices=("dropless", "capacity"),
    )
    capacity_factor: float = key(
        1.25, "capacity: tokens an expert takes of a sequence / its even share", above=0
    )
    exchange_factor: float = key(
        1.5,
        "dropless over mesh.expert: tokens that a device sends each other in one exchange / their "
        "even share; if a load needs more, there are more exchanges",
        above=0,
    )

    def expert_width(self, model: ModelConfig) -> int:
        """Hidden width of an expert."""
        return self.expert_mlp_dim or model.mlp_dim

    def shared_width(self, model: ModelConfig) -> int:
        """Hidden width of all shared experts together: side by side they are one MLP."""
        return self.num_shared_experts * (self.shared_mlp_dim or self.expert_width(model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The language-model loss."""

    z_loss: float = key(0.0, "weight of log(Z)^2 (PaLM, arXiv:2204.02311)", at_least=0)
    chunk_tokens: int = key(
        0,
        "sequence positions whose float32 logits exist at one time; 0: all of them. Must divide "
        "data.sequence_length",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents in a mixture."""

    source: str = key(
        "text",
        "kind of source",
        choices=("stdlib", "text", "jsonl", "parquet", "arrayrecord", "hf_dataset"),
    )
    path: str = key("", "files, as a glob (** crosses folders); hf_dataset: a folder")
    eval_path: str = key("", "files of the evaluation split; empty: eval_fraction of path's")
    text_key: str = key(
        "text", "field that holds the text (jsonl, parquet, arrayrecord, hf_dataset)"
    )
    weight: float = key(1.0, "share of the mixture, relative", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it becomes tokens, how tokens become batches."""

    source: str = key(
        "stdlib",
        "stdlib: the source code of this Python's standard library; else the kind of file",
        choices=("stdlib", "text", "jsonl", "parquet", "arrayrecord", "hf_dataset"),
    )
    path: str = key("", "files, as a glob (** crosses folders); hf_dataset: a folder")
    eval_path: str = key("", "files of the evaluation split; empty: eval_fraction of path's")
    eval_fraction: float = key(
        0.01, "share of documents held out for evaluation", above=0, at_most=0.5
    )
    text_key: str = key(
        "text", "field that holds the text (jsonl, parquet, arrayrecord, hf_dataset)"
    )
    mixture: Mapping[str, SourceConfig] = mapping(
        "name -> {source, path, eval_path, text_key, weight}; when not empty it replaces "
        "source and path"
    )
    tokenizer: str = key(
        "bytes", "bytes, or the path of a tokenizer.json (Hugging Face) or .model (SentencePiece)"
    )
    sequence_length: int = key(256, "tokens in a packed sequence", at_least=2)
    cache_dir: str = key(
        "", "tokenized data; empty: $XDG_CACHE_HOME/spmd-train or ~/.cache/spmd-train"
    )
    prefetch: int = key(4, "batches made ahead of the step", at_least=1)
    num_threads: int = key(2, "threads that make batches", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    name: str = key(
        "cosine",
        "after warm-up: constant, down by cosine or linear, or flat and then linear (wsd)",
        choices=("constant", "cosine", "linear", "wsd"),
    )
    warmup_steps: int = key(0, "steps from 0 to the learning rate", at_least=0)
    decay_steps: int = key(
        0, "wsd: steps of the final decay; cosine, linear: 0, or where decay ends", at_least=0
    )
    end_factor: float = key(0.1, "last learning rate / highest", at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, out of optax."""

    name: str = key("adamw", "which", choices=("adamw", "lion", "adafactor", "sgd", "muon"))
    learning_rate: float = key(1e-3, "highest learning rate", at_least=0)
    schedule: ScheduleConfig = section(ScheduleConfig)
    weight_decay: float = key(0.1, "decoupled, times the learning rate", at_least=0)
    weight_decay_exclude: str = key(
        "norm|bias|embedding|positions",
        "parameters whose path this regular expression finds are not decayed; empty: decay all",
    )
    b1: float = key(
        0.9,
        "first-moment decay; sgd, muon: momentum (0.95 is usual for muon)",
        at_least=0,
        at_most=0.9999999,
    )
    b2: float = key(0.95, "second-moment decay", at_least=0, at_most=0.9999999)
    epsilon: float = key(1e-8, "added to the denominator", above=0)
    clip_norm: float = key(1.0, "gradients are scaled down to this global norm; 0: off", at_least=0)
    ema_decay: float = key(
        0.0, "exponential moving average of parameters; 0: off", at_least=0, at_most=0.9999999
    )
    state_dtype: str = key("float32", "dtype in which moments are kept", choices=DTYPES)
    offload: str = key(
        "none",
        "where moments wait between steps: with the parameters (none), or in the host's memory, "
        "out of which each step takes them a layer at a time (host); adamw, lion, muon, sgd with "
        "momentum",
        choices=("none", "host"),
    )
    stochastic_rounding: bool = key(
        False,
        "parameters kept in bfloat16 are updated in float32 and rounded up or down at random, so "
        "that on average nothing is lost; else to the nearest, which loses small updates",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    num_steps: int = key(300, "optimizer steps", at_least=1, at_most=2**31 - 1)
    global_batch_size: int = key(16, "sequences per optimizer step, over all devices", at_least=1)
    grad_accumulation: int = key(1, "microbatches a step is split into", at_least=1)
    seed: int = key(0, "of initialization, data order and dropout", at_least=0, at_most=2**31 - 1)
    log_every: int = key(10, "steps between metrics", at_least=1)
    eval_every: int = key(100, "steps between evaluations, and one at the end; 0: none", at_least=0)
    checkpoint_every: int = key(
        100, "steps between checkpoints, and one at the end; 0: none", at_least=0
    )
    bad_step: str = key(
        "abort",
        "after a loss or gradient that is no number, or a spike: stop; leave the state as it was "
        "(decided on the device, not for spikes); or go back to the newest checkpoint and skip the "
        "batches since",
        choices=("abort", "skip", "rollback"),
    )
    max_bad_steps: int = key(
        10, "skipped steps in a row, or rollbacks to one checkpoint, that end the run", at_least=1
    )
    spike_factor: float = key(
        0.0,
        "a gradient norm over this many times the median of the last 100 is a bad step; 0: off",
        above=1,
        or_equal=0,
    )
    max_device_batch: int = key(
        0,
        "most sequences that each part of the mesh's batch axes has at one time; grad_accumulation "
        "grows until they fit, as on fewer devices than before; 0: no limit",
        at_least=0,
    )
    check_replicas_every: int = key(
        1000,
        "steps between comparisons of the state's copies on different devices, which find silent "
        "corruption; besides, before each checkpoint; 0: never",
        at_least=0,
    )
    log_examples: bool = key(
        False, "write the ids of all consumed examples to WORKDIR/examples/PROCESS.jsonl"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are kept, and how far they are trusted."""

    keep_last: int = key(2, "newest checkpoints kept", at_least=1)
    keep_every: int = key(0, "besides, keep each step that this divides; 0: none", at_least=0)
    asynchronous: bool = key(True, "write while training goes on")
    verify: str = key(
        "full",
        "before a restore: hash every file; all sizes and a sample of hashes; or only see that the "
        "save was finished",
        choices=("full", "sample", "off"),
    )
    on_drift: str = key(
        "warn",
        "going on from a checkpoint of other versions, other code or a config that learns "
        "something else: tell the differences, refuse, or say nothing",
        choices=("warn", "refuse", "ignore"),
    )
    max_failures: int = key(
        3, "failed saves in a row (a full disk) that end the run; fewer are warned of", at_least=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text generated at the end of a training run."""

    prompt: str = key("", "the beginning; empty: no sample")
    max_new_tokens: int = key(200, "tokens generated", at_least=1)
    temperature: float = key(0.8, "0: greedy", at_least=0)
    top_k: int = key(0, "sample among the k likeliest tokens; 0: all", at_least=0)
    top_p: float = key(
        1.0, "sample among the likeliest tokens of this total probability", above=0, at_most=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What is written down beside metrics.jsonl."""

    tensorboard: bool = key(True, "write WORKDIR/tensorboard")
    wandb_project: str = key("", "Weights & Biases project (extra: wandb); empty: off")
    straggler_every: int = key(
        100,
        "steps between comparisons of the processes' times, which name one that holds the others "
        "up; 0: never",
        at_least=0,
    )
    peak_flops: float = key(
        0.0, "FLOP/s of one device, for MFU; 0: from the table of chips (none for CPUs)", at_least=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipConfig:
    """Figures of a target's chip, per JAX device; 0: those of the table of chips."""

    flops: float = key(0.0, "dense matmul FLOP/s in model.compute_dtype", at_least=0)
    hbm_bytes: float = key(0.0, "memory, bytes", at_least=0)
    hbm_bandwidth: float = key(0.0, "of the memory, bytes/s", at_least=0)
    ici_bandwidth: float = key(0.0, "sent over ICI or NVLink by a device, bytes/s", at_least=0)
    dcn_bandwidth: float = key(0.0, "sent out of its slice or node, bytes/s", at_least=0)
    host_bandwidth: float = key(
        0.0, "from its host's memory, and as much to it, bytes/s", at_least=0
    )


LINTS = (
    "replicated-parameter",
    "unused-axis",
    "reshard-in-scan",
    "gathered-optimizer-state",
    "slow-network-per-layer",
    "float32-matmul",
    "grows-with-depth",
)
"""What `plan` looks for: plan/lints.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `spmd-train plan` reckons with; training does not read it."""

    tokens: int = key(0, "tokens to train on; 0: those of train.num_steps", at_least=0)
    dollars_per_device_hour: float = key(0.0, "price of a device; 0: not told", at_least=0)
    watts_per_device: float = key(0.0, "power of a device, all included; 0: not told", at_least=0)
    silence: str = key("", f"lints not to report, comma-separated, of {', '.join(LINTS)}")
    chip: ChipConfig = section(ChipConfig)

    @property
    def silent(self) -> tuple[str, ...]:
        """What `silence` names."""
        return _names(self.silence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole experiment."""

    task: str = key("language_model", "what is learnt", choices=("language_model",))
    precision: str = key(
        CUSTOM,
        "a policy that sets model.{param_dtype, compute_dtype, quantization} and optimizer."
        "{state_dtype, stochastic_rounding}, which may then not say otherwise: docs/precision.md; "
        "custom: they are as they say themselves",
        choices=PRECISIONS,
    )
    mesh: MeshConfig = section(MeshConfig)
    sharding: ShardingConfig = section(ShardingConfig)
    pipeline: PipelineConfig = section(PipelineConfig)
    context: ContextConfig = section(ContextConfig)
    model: ModelConfig = section(ModelConfig)
    moe: MoEConfig = section(MoEConfig)
    loss: LossConfig = section(LossConfig)
    data: DataConfig = section(DataConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    sample: SampleConfig = section(SampleConfig)
    observe: ObserveConfig = section(ObserveConfig)
    plan: PlanConfig = section(PlanConfig)
