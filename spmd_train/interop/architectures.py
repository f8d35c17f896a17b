"""The public architectures our transformer covers, as data.

One table says which of our parameters is which Hugging Face tensor, another which of our config
keys is which key of `config.json`; import and export both read them.

Letters of dims: V vocab, D embed, P positions, H query heads, G key/value heads, K head dim, F mlp,
E experts, and S: which of the tensors fused in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from spmd_train.config import ModelConfig
from spmd_train.interop.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Key:
    """One of our keys in `config.json`.

    Attributes:
        ours: our key, as in `num_layers` (of `model`) or `moe.top_k`.
        theirs: Hugging Face's.
        default: what `transformers` takes where `config.json` is silent or null: a value, or a
            function of our keys read so far. None: it must be there.
        aliases: other names of theirs, read where the first is not there.
    """

    ours: str
    theirs: str
    default: Any | Callable[[Mapping[str, Any]], Any] = None
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A class of `transformers`.

    Attributes:
        name: the class, as in `architectures` of `config.json`.
        model_type: as in `config.json`.
        prefix: which names in files saved from the network without its head lack.
        tensors: where our parameters are. Those that a config switches off are not there.
        unused: regular expression of tensors that older files hold and nobody reads.
        keys: what `config.json` says of our config.
        fixed: our keys that the architecture decides: a value, or a function of those read.
        requires: keys of `config.json` of which we can only do some values: what `transformers`
            takes where it is silent, and those values, the one to write first.
        written: keys of `config.json` that are written, but not read.
    """

    name: str
    model_type: str
    prefix: str
    tensors: tuple[Tensor, ...]
    unused: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    requires: Mapping[str, tuple[Any, tuple[Any, ...]]]
    written: Mapping[str, Callable[[ModelConfig], Any]]


_Projections = tuple[tuple[str, str, str, str, str], ...]

_DENSE_MLP: _Projections = (
    ("mlp/gate", "mlp.gate_proj", "DF", "F D", "F"),
    ("mlp/up", "mlp.up_proj", "DF", "F D", "F"),
    ("mlp/down", "mlp.down_proj", "FD", "D F", "D"),
)


def _experts(module: str, *, gate: str, up: str, down: str) -> _Projections:
    """Router and experts below `module`; the projections of an expert under these names."""
    expert = module + ".experts.{expert}."
    return (
        ("mlp/router", f"{module}.gate", "DE", "E D", "E"),
        ("mlp/experts/gate", expert + gate, "DF", "F D", "F"),
        ("mlp/experts/up", expert + up, "DF", "F D", "F"),
        ("mlp/experts/down", expert + down, "FD", "D F", "D"),
    )


def _decoder_tensors(mlp: _Projections) -> tuple[Tensor, ...]:
    layer, attn = "model.layers.{layer}", "self_attn"
    projections = (
        ("attention/query", f"{attn}.q_proj", "DHK", "HK D", "HK"),
        ("attention/key", f"{attn}.k_proj", "DGK", "GK D", "GK"),
        ("attention/value", f"{attn}.v_proj", "DGK", "GK D", "GK"),
        ("attention/out", f"{attn}.o_proj", "HKD", "D HK", "D"),
        *mlp,
    )
    norms = (
        ("attention_norm", "input_layernorm", "D"),
        ("attention/query_norm", f"{attn}.q_norm", "K"),
        ("attention/key_norm", f"{attn}.k_norm", "K"),
        ("mlp_norm", "post_attention_layernorm", "D"),
    )
    return (
        Tensor("embedding/table", "model.embed_tokens.weight", "VD", "V D"),
        *(Tensor(f"blocks/{p}/scale", f"{layer}.{n}.weight", d, d) for p, n, d in norms),
        *(
            tensor
            for path, name, dims, hf_dims, bias in projections
            for tensor in (
                Tensor(f"blocks/{path}/kernel", f"{layer}.{name}.weight", dims, hf_dims),
                Tensor(f"blocks/{path}/bias", f"{layer}.{name}.bias", bias, bias),
            )
        ),
        Tensor("final_norm/scale", "model.norm.weight", "D", "D"),
        Tensor("head/kernel", "lm_head.weight", "DV", "V D"),
    )


def _gpt2_tensors() -> tuple[Tensor, ...]:
    layer = "transformer.h.{layer}"
    norms = (
        ("blocks/attention_norm", f"{layer}.ln_1"),
        ("blocks/mlp_norm", f"{layer}.ln_2"),
        ("final_norm", "transformer.ln_f"),
    )
    # GPT-2's Conv1D keeps its kernels [in, out], like us.
    projections = (
        ("attention/out", "attn.c_proj", "HKD", "HK D", "D"),
        ("mlp/up", "mlp.c_fc", "DF", "D F", "F"),
        ("mlp/down", "mlp.c_proj", "FD", "F D", "D"),
    )
    fused = (("query", "H"), ("key", "G"), ("value", "G"))
    c_attn = f"{layer}.attn.c_attn"
    return (
        Tensor("embedding/table", "transformer.wte.weight", "VD", "V D"),
        Tensor("positions/table", "transformer.wpe.weight", "PD", "P D"),
        *(
            tensor
            for path, name in norms
            for tensor in (
                Tensor(f"{path}/scale", f"{name}.weight", "D", "D"),
                Tensor(f"{path}/bias", f"{name}.bias", "D", "D"),
            )
        ),
        *(
            tensor
            for i, (path, h) in enumerate(fused)
            for tensor in (
                Tensor(
                    f"blocks/attention/{path}/kernel",
                    f"{c_attn}.weight",
                    f"D{h}K",
                    f"D S{h}K",
                    part=i,
                    num_parts=3,
                ),
                Tensor(
                    f"blocks/attention/{path}/bias",
                    f"{c_attn}.bias",
                    f"{h}K",
                    f"S{h}K",
                    part=i,
                    num_parts=3,
                ),
            )
        ),
        *(
            tensor
            for path, name, dims, hf_dims, bias in projections
            for tensor in (
                Tensor(f"blocks/{path}/kernel", f"{layer}.{name}.weight", dims, hf_dims),
                Tensor(f"blocks/{path}/bias", f"{layer}.{name}.bias", bias, bias),
            )
        ),
        Tensor("head/kernel", "lm_head.weight", "DV", "V D"),
    )


_NO_SOFTCAP = {"logit_softcap": 0.0, "attention_softcap": 0.0, "sliding_window": 0}
_NO_EXPERTS = {"moe.num_experts": 0}
_EXPERTS = {"moe.scores": "softmax", "moe.num_shared_experts": 0, "moe.routed_scale": 1.0}
_DECODER_FIXED = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", **_NO_SOFTCAP}


def _same_heads(model: Mapping[str, Any]) -> int:
    return model["num_heads"]


def _head_width(model: Mapping[str, Any]) -> int:
    return model["embed_dim"] // model["num_heads"]


def _decoder(
    name: str,
    model_type: str,
    *,
    keys: tuple[Key, ...],
    fixed: Mapping[str, Any],
    head_dim: Any = _head_width,
    requires: Mapping[str, tuple[Any, tuple[Any, ...]]] | None = None,
    mlp: _Projections = _DENSE_MLP,
    mlp_keys: tuple[Key, ...] = (Key("mlp_dim", "intermediate_size"),),
    norm_epsilon: float = 1e-6,
    written: Mapping[str, Callable[[ModelConfig], Any]] | None = None,
) -> Architecture:
    """Llama and those that differ from it in a few switches, or in the MLP."""
    return Architecture(
        name=name,
        model_type=model_type,
        prefix="model.",
        tensors=_decoder_tensors(mlp),
        unused=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        keys=(
            Key("num_layers", "num_hidden_layers"),
            Key("embed_dim", "hidden_size"),
            Key("num_heads", "num_attention_heads"),
            Key("num_kv_heads", "num_key_value_heads", _same_heads),
            Key("head_dim", "head_dim", head_dim),
            *mlp_keys,
            Key("vocab_size", "vocab_size"),
            Key("norm_epsilon", "rms_norm_eps", norm_epsilon),
            Key("tied_head", "tie_word_embeddings", False),
            *keys,
        ),
        fixed={**_DECODER_FIXED, **(_NO_EXPERTS if mlp is _DENSE_MLP else _EXPERTS), **fixed},
        requires={"hidden_act": ("silu", ("silu", "swish")), **(requires or {})},
        written={
            "max_position_embeddings": lambda config: config.max_positions,
            **(written or {}),
        },
    )


_BIAS_OF_ALL = (
    Key("attention_bias", "attention_bias", False),
    Key("attention_out_bias", "attention_bias", False),
)
_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
_QWEN_REQUIRES = {"use_sliding_window": (False, (False,))}
_EVERY_LAYER = {"decoder_sparse_step": (1, (1,)), "mlp_only_layers": (None, ([], None))}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _decoder(
            "LlamaForCausalLM",
            "llama",
            keys=(*_BIAS_OF_ALL, Key("mlp_bias", "mlp_bias", False)),
            fixed={"qk_norm": False},
        ),
        _decoder(
            "Qwen3ForCausalLM",
            "qwen3",
            keys=_BIAS_OF_ALL,
            fixed={"qk_norm": True, "mlp_bias": False},
            head_dim=128,
            requires=_QWEN_REQUIRES,
        ),
        _decoder(
            "Qwen2ForCausalLM",
            "qwen2",
            keys=(),
            fixed={
                "qk_norm": False,
                "attention_bias": True,
                "attention_out_bias": False,
                "mlp_bias": False,
            },
            requires=_QWEN_REQUIRES,
        ),
        _decoder(
            "MistralForCausalLM",
            "mistral",
            keys=(),
            fixed={"qk_norm": False, **_NO_BIAS},
            requires={"sliding_window": (4096, (None,))},
        ),
        _decoder(
            "MixtralForCausalLM",
            "mixtral",
            keys=(),
            fixed={"qk_norm": False, "moe.renormalize": True, **_NO_BIAS},
            requires={"sliding_window": (None, (None,))},
            mlp=_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
            mlp_keys=(
                Key("moe.num_experts", "num_local_experts", 8, ("num_experts",)),
                Key("moe.top_k", "num_experts_per_tok", 2),
                Key("moe.expert_mlp_dim", "intermediate_size"),
            ),
            norm_epsilon=1e-5,
        ),
        _decoder(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            keys=_BIAS_OF_ALL,
            fixed={"qk_norm": True, "mlp_bias": False},
            requires={**_QWEN_REQUIRES, **_EVERY_LAYER},
            mlp=_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
            mlp_keys=(
                Key("moe.num_experts", "num_experts", 128, ("num_local_experts",)),
                Key("moe.top_k", "num_experts_per_tok", 8),
                Key("moe.expert_mlp_dim", "moe_intermediate_size"),
                Key("moe.renormalize", "norm_topk_prob", False),
            ),
            # Of layers without experts, which are none.
            written={"intermediate_size": lambda config: config.mlp_dim},
        ),
        Architecture(
            name="GPT2LMHeadModel",
            model_type="gpt2",
            prefix="transformer.",
            tensors=_gpt2_tensors(),
            unused=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
            keys=(
                Key("num_layers", "n_layer"),
                Key("embed_dim", "n_embd"),
                Key("num_heads", "n_head"),
                Key("mlp_dim", "n_inner", lambda model: 4 * model["embed_dim"]),
                Key("vocab_size", "vocab_size"),
                Key("max_positions", "n_positions"),
                Key("norm_epsilon", "layer_norm_epsilon", 1e-5),
                Key("tied_head", "tie_word_embeddings", True),
            ),
            fixed={
                "num_kv_heads": _same_heads,
                "head_dim": _head_width,
                "norm": "layernorm",
                "positions": "learned",
                "mlp": "gelu",
                "attention_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
                "qk_norm": False,
                **_NO_SOFTCAP,
                **_NO_EXPERTS,
            },
            requires={
                "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
                "scale_attn_weights": (True, (True,)),
                "scale_attn_by_inverse_layer_idx": (False, (False,)),
                "add_cross_attention": (False, (False,)),
            },
            written={
                "resid_pdrop": lambda config: config.dropout,
                "embd_pdrop": lambda config: config.dropout,
                "attn_pdrop": lambda config: 0.0,
            },
        ),
    )
}
