"""Which experts a token takes, how much of each, and how even that is. All of it in float32.

B sequences of T tokens, E experts, K of them for a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spmd_train.config import MoEConfig
from spmd_train.parallel.sequence import sum_before


class Routing(NamedTuple):
    """Who goes where.

    Attributes:
        experts: int32 [B, T, K]; E: nowhere (padding, or beyond an expert's capacity).
        weights: float32 [B, T, K], of each expert's output.
    """

    experts: jax.Array
    weights: jax.Array


class RoutingStats(NamedTuple):
    """Of one layer, each sequence by itself: nothing depends on the mesh or on microbatches.

    Attributes:
        balance: float32 [B], Switch's loss of the sequence (arXiv:2101.03961, eq. 4), as
            DeepSeek-V3 takes it: E * sum over experts of the share of the sequence's choices times
            the mean of its scores; 1 where both are even.
        z_squared: float32 [B], mean over the sequence of log(Z)^2 of the router.
        load: float32 [B, E], how many of the sequence's tokens chose each expert.
        dropped: float32 [B], how many of these choices were beyond an expert's capacity.
    """

    balance: jax.Array
    z_squared: jax.Array
    load: jax.Array
    dropped: jax.Array


def expert_capacity(config: MoEConfig, *, length: int) -> int:
    """Tokens that an expert takes of a sequence of `length` tokens."""
    share = config.capacity_factor * length * config.top_k / config.num_experts
    return min(math.ceil(share), length)


def route(
    logits_BTE: jax.Array, *, bias_E: jax.Array | None, is_token_BT: jax.Array, config: MoEConfig
) -> tuple[Routing, RoutingStats]:
    """Chooses the `top_k` highest scores of each token; the lower expert wins a tie.

    With `dispatch = "capacity"` an expert takes the first `expert_capacity` tokens of a sequence
    (padding is not counted) that choose it, as first choice or later: no token displaces an
    earlier one, so that nothing is learnt from the future.

    Args:
        logits_BTE: float32.
        bias_E: added to the scores for the choice only (DeepSeek-V3); float32.
        is_token_BT: False for padding, which goes nowhere and counts for nothing.
        config: moe's.

    Returns:
        The routing; differentiable in its weights. And its statistics, differentiable in `balance`
        and `z_squared`.
    """
    num_experts = config.num_experts
    if config.scores == "softmax":
        scores_BTE = shares_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        shares_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    rank_BTE = jax.lax.stop_gradient(scores_BTE if bias_E is None else scores_BTE + bias_E)
    # Masks, not top_k and gathers: they stay local wherever the tokens are.
    choices = []
    for _ in range(config.top_k):
        is_choice_BTE = jax.nn.one_hot(jnp.argmax(rank_BTE, axis=-1), num_experts, dtype=jnp.bool)
        rank_BTE = jnp.where(is_choice_BTE, -jnp.inf, rank_BTE)
        choices.append(is_choice_BTE)
    weights_BTK = jnp.stack([jnp.sum(jnp.where(c, scores_BTE, 0), axis=-1) for c in choices], -1)
    if config.renormalize:
        weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20
    weights_BTK *= config.routed_scale

    chosen_BTE = sum(c.astype(jnp.float32) for c in choices) * is_token_BT[..., None]
    takes_BTE = chosen_BTE > 0
    if config.dispatch == "capacity":
        takes_BTE &= sum_before(chosen_BTE) < expert_capacity(config, length=logits_BTE.shape[1])
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    experts_BTK = jnp.stack(
        [jnp.min(jnp.where(c & takes_BTE, experts, num_experts), axis=-1) for c in choices], -1
    )

    load_BE = jnp.sum(chosen_BTE, axis=1)
    length_B = jnp.maximum(jnp.sum(is_token_BT.astype(jnp.float32), axis=1), 1)

    def mean(x: jax.Array) -> jax.Array:
        """Over the tokens of each sequence."""
        total = jnp.sum(jnp.where(is_token_BT[..., None], x, 0), axis=1)
        return total / length_B[:, None]

    balance_B = num_experts * jnp.sum(
        load_BE / (config.top_k * length_B[:, None]) * mean(shares_BTE), axis=-1
    )
    log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    stats = RoutingStats(
        balance=balance_B,
        z_squared=mean(jnp.square(log_z_BT)[..., None])[:, 0],
        load=load_BE,
        dropped=jnp.sum(load_BE, axis=-1) - jnp.sum(takes_BTE, axis=(1, 2), dtype=jnp.float32),
    )
    return Routing(experts_BTK, weights_BTK), stats
