"""How much a transformer multiplies, counted from its config."""

from __future__ import annotations

from spmd_train.config import ModelConfig, MoEConfig


def layer_matmul_parameters(config: ModelConfig, moe: MoEConfig) -> int:
    """Weights of one block that a token is multiplied by.

    Of the experts, those that a token takes: `top_k` and the shared ones; and the router. Not
    counted: norm scales, biases.
    """
    head_dim = config.resolved_head_dim
    attention = 2 * config.embed_dim * head_dim * (config.num_heads + config.resolved_kv_heads)
    width, router = config.mlp_dim, 0
    if moe.num_experts:
        width = moe.top_k * moe.expert_width(config) + moe.shared_width(config)
        router = config.embed_dim * moe.num_experts
    return attention + {"swiglu": 3, "gelu": 2}[config.mlp] * config.embed_dim * width + router
