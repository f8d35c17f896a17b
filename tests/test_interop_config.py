"""config.json of Hugging Face against our model section, both ways."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from interop_helpers import FAMILIES, REFERENCE

from spmd_train.config import ConfigError, ModelConfig, MoEConfig, RopeConfig, load_config, parse
from spmd_train.interop import hf_config, model_config_from_hf
from spmd_train.interop.hf_config import check_model_config

CONFIGS = Path(__file__).parent.parent / "configs"

# As published with the weights.
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA3_8B = {
    **LLAMA2_7B,
    "attention_bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA31_8B = {
    **LLAMA3_8B,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
MISTRAL_7B_V3 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


@pytest.mark.parametrize(
    ("flag", "published"),
    [
        ("llama2_7b.py", LLAMA2_7B),
        ("llama3_8b.py", LLAMA3_8B),
        ("llama3_8b.py:3.1", LLAMA31_8B),
        ("llama3_70b.py", LLAMA3_70B),
    ],
)
def test_interop_config_of_pods_is_the_published_one(flag, published):
    model = parse(load_config(str(CONFIGS / flag))).model
    check_model_config(model, published)
    with pytest.raises(ConfigError, match="num_layers"):
        check_model_config(dataclasses.replace(model, num_layers=3), published)


def test_interop_config_of_qwen3_and_mistral_and_gpt2():
    qwen = model_config_from_hf(QWEN3_06B)
    assert qwen["qk_norm"] and qwen["tied_head"] and not qwen["attention_bias"]
    assert (qwen["head_dim"], qwen["num_kv_heads"], qwen["rope.theta"]) == (128, 8, 1e6)
    assert model_config_from_hf({**QWEN3_06B, "head_dim": None})["head_dim"] == 128
    mistral = model_config_from_hf(MISTRAL_7B_V3)
    assert (mistral["head_dim"], mistral["norm"], mistral["mlp"]) == (128, "rmsnorm", "swiglu")
    gpt2 = model_config_from_hf(GPT2)
    assert (gpt2["mlp_dim"], gpt2["tied_head"], gpt2["max_positions"]) == (3072, True, 1024)
    assert (gpt2["num_kv_heads"], gpt2["head_dim"], gpt2["positions"]) == (12, 64, "learned")
    assert "rope.theta" not in gpt2


def test_interop_config_reads_both_forms_of_rope():
    old = LLAMA31_8B
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": 500000.0, **old["rope_scaling"]}
    assert model_config_from_hf(old) == model_config_from_hf(new)
    plain = {**new, "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}
    assert model_config_from_hf(plain)["rope.theta"] == 3.0
    assert model_config_from_hf(plain)["rope.scaling"] == "none"
    older = {**old, "rope_scaling": {**old["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert model_config_from_hf(old) == model_config_from_hf(older)


@pytest.mark.parametrize(
    ("published", "change", "told"),
    [
        (LLAMA3_8B, {"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM.*LlamaForCausal"),
        (LLAMA3_8B, {"architectures": None}, "architectures = null"),
        (LLAMA3_8B, {"hidden_act": "relu"}, 'hidden_act = "relu"; supported: "silu"'),
        (LLAMA3_8B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type = "yarn"'),
        (LLAMA3_8B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type = "linear"'),
        (LLAMA3_8B, {"rope_scaling": {"rope_type": "llama3"}}, "factor = null must be a number"),
        (
            LLAMA3_8B,
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "RoPE parameters",
        ),
        (LLAMA3_8B, {"num_attention_heads": 0}, "num_attention_heads = 0 must be .* at least 1"),
        (LLAMA3_8B, {"rms_norm_eps": "small"}, 'rms_norm_eps = "small" must be a number'),
        (LLAMA3_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA3_8B, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA3_8B, {"hidden_size": None}, "hidden_size = null must be a whole number"),
        (MISTRAL_7B_V3, {"sliding_window": 4096}, "sliding_window = 4096; supported: null"),
        (QWEN3_06B, {"use_sliding_window": True}, "use_sliding_window = true"),
        (QWEN3_06B, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (GPT2, {"activation_function": "gelu"}, 'activation_function = "gelu"'),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_interop_config_refuses_what_we_cannot_compute(published, change, told):
    with pytest.raises(ConfigError, match=told):
        model_config_from_hf({**published, **change})


def test_interop_config_silent_mistral_has_a_sliding_window():
    silent = {k: v for k, v in MISTRAL_7B_V3.items() if k != "sliding_window"}
    with pytest.raises(ConfigError, match="sliding_window = 4096"):
        model_config_from_hf(silent)


@pytest.mark.parametrize("family", FAMILIES)
def test_interop_config_overrides_to_paste_make_it_fit(family):
    config_json = json.loads((REFERENCE / family / "config.json").read_text())
    flag = str(CONFIGS / "lm_tiny.py")
    model = parse(load_config(flag)).model
    with pytest.raises(ConfigError) as caught:
        check_model_config(model, config_json)
    message = str(caught.value)
    assert f"model.vocab_size: {model.vocab_size} in the config, 96 in the checkpoint" in message
    overrides = re.findall(r"--config\.(\S+)=(\S+)", message)
    assert ("model.embed_dim", "32") in overrides
    # The fixtures are too small for bytes and for the sample at the end.
    overrides += [("data.tokenizer", "tokenizer.json"), ("data.sequence_length", "64")]
    overrides += [("sample.prompt", "")]
    config = parse(load_config(flag, overrides))
    assert (
        check_model_config(config.model, config_json, moe=config.moe).name
        in config_json["architectures"]
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig(), "LlamaForCausalLM"),
        (ModelConfig(attention_bias=True, attention_out_bias=True), "LlamaForCausalLM"),
        (ModelConfig(mlp_bias=True, tied_head=True, head_dim=128), "LlamaForCausalLM"),
        (ModelConfig(rope=RopeConfig(scaling="llama3", theta=5e5)), "LlamaForCausalLM"),
        (ModelConfig(attention_bias=True, num_kv_heads=2), "Qwen2ForCausalLM"),
        (ModelConfig(qk_norm=True), "Qwen3ForCausalLM"),
    ],
)
def test_interop_config_export_reads_back_the_same(config, name):
    written = hf_config(config)
    assert written["architectures"] == [name]
    check_model_config(config, json.loads(json.dumps(written)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ModelConfig(logit_softcap=30.0), "model.logit_softcap = 30.0"),
        (ModelConfig(attention_softcap=50.0), "model.attention_softcap = 50.0"),
        (ModelConfig(norm="layernorm"), "model.norm = layernorm"),
        (ModelConfig(attention_out_bias=True), "model.attention_out_bias = true"),
        (ModelConfig(qk_norm=True, mlp_bias=True), "model.mlp_bias = true"),
    ],
)
def test_interop_config_export_refuses_what_no_architecture_has(config, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        hf_config(config)


def test_interop_config_compares_every_key_that_changes_the_result():
    """A new key of the model must be mapped here, or an export would silently leave it out."""
    computed_the_same = {"dropout", "remat", "scan_unroll", "init_scale", "max_positions"}
    computed_the_same |= {"param_dtype", "compute_dtype", "quantization", "attention"}
    computed_the_same |= {"remat_saved", "remat_offloaded"}
    compared = {key.partition(".")[0] for key in model_config_from_hf(LLAMA31_8B)} - {"moe"}
    assert compared | computed_the_same == {f.name for f in dataclasses.fields(ModelConfig)}
    keys = model_config_from_hf(LLAMA31_8B)
    rope = {key.removeprefix("rope.") for key in keys if key.startswith("rope.")}
    assert rope == {f.name for f in dataclasses.fields(RopeConfig)}


QWEN3_30B_A3B = QWEN3_06B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def test_interop_config_reads_experts():
    keys = model_config_from_hf(QWEN3_30B_A3B)
    moe = {k.removeprefix("moe."): v for k, v in keys.items() if k.startswith("moe.")}
    assert moe == {
        "num_experts": 128,
        "top_k": 8,
        "expert_mlp_dim": 768,
        "renormalize": True,
        "scores": "softmax",
        "num_shared_experts": 0,
        "routed_scale": 1.0,
    }
    renamed = {k: v for k, v in QWEN3_30B_A3B.items() if k != "num_experts"}
    assert model_config_from_hf(renamed | {"num_local_experts": 128}) == keys
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        model_config_from_hf(QWEN3_30B_A3B | {"mlp_only_layers": [0]})


@pytest.mark.parametrize(
    ("config", "moe", "name"),
    [
        (ModelConfig(), MoEConfig(num_experts=8), "MixtralForCausalLM"),
        (ModelConfig(qk_norm=True), MoEConfig(num_experts=8, top_k=4), "Qwen3MoeForCausalLM"),
    ],
)
def test_interop_config_export_of_experts_reads_back_the_same(config, moe, name):
    written = json.loads(json.dumps(hf_config(config, moe=moe)))
    assert written["architectures"] == [name]
    check_model_config(config, written, moe=moe)
    with pytest.raises(ConfigError, match=r"--config\.moe\.num_experts=8"):
        check_model_config(config, written)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"balance": "bias"}, "moe.balance = bias"),
        ({"scores": "sigmoid"}, "moe.scores = sigmoid"),
        ({"num_shared_experts": 1}, "moe.num_shared_experts = 1"),
        ({"renormalize": False}, "moe.renormalize = false"),
    ],
)
def test_interop_config_export_refuses_experts_that_no_architecture_has(change, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        hf_config(ModelConfig(), moe=MoEConfig(num_experts=8, **change))
