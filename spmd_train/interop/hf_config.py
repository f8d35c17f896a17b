"""Between `config.json` of a Hugging Face checkpoint and our `model` section."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmd_train.config import ConfigError, ModelConfig, MoEConfig, RopeConfig
from spmd_train.config.keys import keys_of
from spmd_train.interop.architectures import ARCHITECTURES, Architecture

NO_EXPERTS = MoEConfig()

_LONGEST = 200
_LLAMA3_KEYS = {
    "rope.factor": "factor",
    "rope.low_freq_factor": "low_freq_factor",
    "rope.high_freq_factor": "high_freq_factor",
    "rope.original_max_positions": "original_max_position_embeddings",
}


def _json(value: Any) -> str:
    """A value as it looks in the file, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory.

    Raises:
        ConfigError: it is not there, or no JSON object.
    """
    path = hf_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--hf_dir: cannot read {path}: {error.strerror}; it must be a Hugging Face checkpoint "
            "directory: config.json and model.safetensors"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return config


def architecture_of(config_json: Mapping[str, Any]) -> Architecture:
    """The architecture that a `config.json` names.

    Raises:
        ConfigError: it is not one of ours.
    """
    names = config_json.get("architectures")
    known = [name for name in ARCHITECTURES if isinstance(names, list) and name in names]
    if not known:
        raise ConfigError(
            f"config.json: architectures = {_json(names)} is not supported; supported: "
            + ", ".join(ARCHITECTURES)
        )
    return ARCHITECTURES[known[0]]


def model_config_from_hf(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` says of our model.

    Args:
        config_json: as written by any `transformers` since 4, the RoPE keys in the old form
            (`rope_theta`, `rope_scaling`) or that of 5 (`rope_parameters`).

    Returns:
        Our `model` keys as in `num_layers`, `rope.theta`, and `moe` keys as in `moe.top_k`; all
        those that change what is computed.

    Raises:
        ConfigError: the architecture or one of its features is not supported, or a size is missing.
    """
    architecture = architecture_of(config_json)
    refused = [
        f"{key} = {_json(value)}; supported: {' or '.join(map(_json, allowed))}"
        for key, (default, allowed) in architecture.requires.items()
        if (value := config_json.get(key, default)) not in allowed
    ]
    if "quantization_config" in config_json:
        refused.append("quantization_config: quantized weights; supported: float weights")
    layer_types = config_json.get("layer_types") or []
    if any(layer_type != "full_attention" for layer_type in layer_types):
        refused.append(f'layer_types = {_json(layer_types)}; supported: all "full_attention"')
    model: dict[str, Any] = {}
    for key in architecture.keys:
        names = (key.theirs, *key.aliases)
        value = next((v for n in names if (v := config_json.get(n)) is not None), None)
        if value is None:
            value = key.default(model) if callable(key.default) else key.default
        section = MoEConfig if key.ours.startswith("moe.") else ModelConfig
        model[key.ours] = _accept(section, key.ours.removeprefix("moe."), key.theirs, value)
    model |= {k: v(model) if callable(v) else v for k, v in architecture.fixed.items()}
    if model["positions"] == "rope":
        rope, refused_rope = _rope_from_hf(config_json)
        model |= rope
        refused += refused_rope
    if refused:
        raise ConfigError(
            f"config.json: this {architecture.name} does what is not supported:\n  "
            + "\n  ".join(refused)
        )
    return model


def _rope_from_hf(config_json: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    # The order in which transformers 5 looks: a rope_scaling replaces rope_parameters, and what
    # they lack is at the top level.
    inner = config_json.get("rope_scaling") or config_json.get("rope_parameters") or {}
    if not isinstance(inner, Mapping) or any(isinstance(v, Mapping) for v in inner.values()):
        return {}, [f"RoPE parameters {_json(inner)}; supported: the same for all layers"]
    rope = {**config_json, **inner}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = []
    if kind not in ("default", "llama3"):
        refused.append(f"rope_type = {_json(kind)}; supported: default or llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refused.append("partial_rotary_factor: supported: 1, or none")
    model = {
        "rope.theta": _accept(RopeConfig, "theta", "rope_theta", rope.get("rope_theta", 10000.0)),
        "rope.scaling": "llama3" if kind == "llama3" else "none",
    }
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", rope.get("max_position_embeddings"))
        for ours, theirs in _LLAMA3_KEYS.items():
            name = ours.removeprefix("rope.")
            model[ours] = _accept(RopeConfig, name, theirs, rope.get(theirs))
    return model, refused


def _accept(section: type, name: str, theirs: str, value: Any) -> Any:
    """The value in our key's type, if it is one that our schema allows."""
    try:
        return keys_of(section)[name].accept(value)
    except ValueError as error:
        raise ConfigError(f"config.json: {theirs} = {_json(value)} {error}") from error


def check_model_config(
    config: ModelConfig, config_json: Mapping[str, Any], *, moe: MoEConfig = NO_EXPERTS
) -> Architecture:
    """Compares our config with a checkpoint's.

    Args:
        config: ours.
        config_json: the checkpoint's.
        moe: ours.

    Returns:
        The architecture.

    Raises:
        ConfigError: the architecture is not supported, or keys differ: each with both values, and
            the overrides to paste.
    """
    ours = _flat(config, moe)
    differing = {k: v for k, v in model_config_from_hf(config_json).items() if ours[k] != v}
    if differing:
        lines = [
            f"{_path(key)}: {_text(ours[key])} in the config, {_text(value)} in the checkpoint"
            for key, value in differing.items()
        ]
        overrides = [f"--config.{_path(key)}={_text(value)}" for key, value in differing.items()]
        raise ConfigError(
            "the config's model is not the checkpoint's:\n  "
            + "\n  ".join(lines)
            + "\nadd to the command line:\n  "
            + " ".join(overrides)
        )
    return architecture_of(config_json)


def hf_config(config: ModelConfig, *, moe: MoEConfig = NO_EXPERTS) -> dict[str, Any]:
    """The `config.json` of our model: the first architecture that computes the same.

    Not told: `moe.dispatch`. They serve every token; with capacity, ours drops some.

    RoPE is told in the old form (`rope_theta`, `rope_scaling`), which every version reads. No
    token has a special meaning (`bos_token_id`, `eos_token_id`): our config knows of none.

    Raises:
        ConfigError: no supported architecture has these features together.
    """
    if moe.num_experts and moe.balance == "bias":
        raise ConfigError(
            "moe.balance = bias: no architecture of Hugging Face's that we can write has the "
            "experts' biases; what was trained with loss or none can be exported"
        )
    ours = _flat(config, moe)
    reasons = []
    for architecture in ARCHITECTURES.values():
        written = _write(architecture, config, ours)
        read = model_config_from_hf(written)
        differing = [
            f"{_path(key)} = {_text(ours[key])} (it has {_text(value)})"
            for key, value in read.items()
            if ours[key] != value
        ]
        if not differing:
            return written
        reasons.append(f"{architecture.name}: " + ", ".join(differing))
    raise ConfigError(
        "the model fits no architecture of Hugging Face's that we can write:\n  "
        + "\n  ".join(reasons)
    )


def _write(
    architecture: Architecture, config: ModelConfig, ours: Mapping[str, Any]
) -> dict[str, Any]:
    written = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **{key.theirs: ours[key.ours] for key in architecture.keys},
        **{key: allowed[0] for key, (_, allowed) in architecture.requires.items()},
        **{key: value(config) for key, value in architecture.written.items()},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if architecture.fixed["positions"] == "rope":
        written["rope_theta"] = config.rope.theta
        written["rope_scaling"] = None
        if config.rope.scaling == "llama3":
            numbers = {theirs: ours[key] for key, theirs in _LLAMA3_KEYS.items()}
            written["rope_scaling"] = {"rope_type": "llama3", **numbers}
    return written


def _flat(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """All keys as in `num_layers`, `rope.theta`, `moe.top_k`, with zeros resolved."""
    flat = dataclasses.asdict(config)
    rope = flat.pop("rope")
    return {
        **flat,
        **{f"rope.{name}": value for name, value in rope.items()},
        **{f"moe.{name}": value for name, value in dataclasses.asdict(moe).items()},
        "moe.expert_mlp_dim": moe.expert_width(config),
        "num_kv_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
    }


def _path(key: str) -> str:
    return key if key.startswith("moe.") else f"model.{key}"


def _text(value: Any) -> str:
    """A value as `--config.KEY=VALUE` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
