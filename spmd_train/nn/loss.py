"""Cross-entropy over a vocabulary, without all the logits at one time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spmd_train.nn.projection import dot_float32
from spmd_train.parallel.manual import sum_over_tokens
from spmd_train.parallel.rules import constrain


class LossSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars.

    Attributes:
        loss: cross-entropy and z-loss; the others have no gradient.
        cross_entropy: of -log p(target), nats.
        correct: of tokens whose likeliest prediction is the target.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array


def softcapped(logits: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(logits / cap)` (Gemma 2, arXiv:2408.00118); 0: unchanged."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def _sums(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    softcap: float,
    z_loss: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    logits_BTV = softcapped(dot_float32(hidden_BTD, kernel_DV), softcap)
    logits_BTV = constrain(logits_BTV, ("batch", "sequence", "vocab"))
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    is_target = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype) == targets_BT[..., None]
    gold_BT = jnp.sum(jnp.where(is_target, logits_BTV, 0), axis=-1)
    correct_BT = gold_BT >= jnp.max(logits_BTV, axis=-1)
    cross_entropy = loss = jnp.sum(weights_BT * (log_z_BT - gold_BT))
    if z_loss:
        loss += z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT))
    return loss, jax.lax.stop_gradient((cross_entropy, jnp.sum(weights_BT * correct_BT)))


def cross_entropy_sums(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    *,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    softcap: float,
    z_loss: float,
    chunk: int,
) -> LossSums:
    """Sums of the loss over all tokens; logits and sums in float32.

    Args:
        hidden_BTD: last hidden states.
        kernel_DV: the output head, gathered over the tokens' mesh axes.
        targets_BT: int32.
        weights_BT: float32, 0 where there is nothing to predict.
        softcap: of the logits; 0: off.
        z_loss: weight of log(Z)^2.
        chunk: tokens of each sequence whose logits exist at one time; 0: all.

    Returns:
        The sums.
    """
    sums = functools.partial(_sums, softcap=softcap, z_loss=z_loss)
    args = hidden_BTD, kernel_DV, targets_BT, weights_BT
    if chunk == 0 or chunk >= hidden_BTD.shape[1]:
        loss, others = sums(*args)
    else:
        loss, others = sum_over_tokens(sums, *args, kernel_axes=("embed", "vocab"), chunk=chunk)
    return LossSums(loss, *others)
