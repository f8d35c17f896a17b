"""Text from a model: a prompt is read in one pass, then a token at a time out of a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spmd_train.models.transformer import Cache, Transformer
from spmd_train.nn.attention import Tokens
from spmd_train.nn.loss import softcapped
from spmd_train.nn.projection import dot_float32
from spmd_train.parallel.rules import Layout, constrain, use_layout
from spmd_train.train.program import Program
from spmd_train.train.state import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it; 0: the likeliest token (greedy).
        top_k: only the k likeliest; 0: all.
        top_p: only the likeliest whose probabilities sum to p (Holtzman et al., arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token per row, int32 [B], from float32 logits [B, V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    lowest_B1 = ordered_BV[:, -1:]
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        lowest_B1 = ordered_BV[:, sampling.top_k - 1, None]
        ordered_BV = jnp.where(ordered_BV < lowest_B1, -jnp.inf, ordered_BV)
    if sampling.top_p < 1:
        probability_BV = jax.nn.softmax(ordered_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        last_B1 = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True) - 1
        lowest_B1 = jnp.take_along_axis(ordered_BV, last_B1, axis=-1)
    kept_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, kept_BV, axis=-1).astype(jnp.int32)


def generate(
    program: Program,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[list[int]]:
    """Continues prompts, all in one batch.

    Args:
        program: whose model and layout to use; the batch is padded to fill the mesh.
        params: sharded as the program plans.
        prompts: token ids, each at least one, of any lengths.
        max_new_tokens: tokens to add to each.
        sampling: how they are drawn.
        seed: of the draws; a prompt's draws depend on its place in the batch alone.
        stop_token: a continuation ends before it; None: never.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: no prompt, or an empty one.
    """
    if not prompts or any(not len(p) for p in prompts):
        raise ValueError("generate: every prompt needs at least one token")
    layout = _layout_of(program)
    shards = layout.size(layout.axes("batch"))
    batch_size = -(-len(prompts) // shards) * shards
    longest = max(map(len, prompts))
    # Padded on the left, so that every next token is written at the same place of the cache.
    ids = np.zeros((batch_size, longest), np.int32)
    positions, segment_ids = np.zeros_like(ids), np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        ids[row, start:] = prompt
        positions[row, start:] = np.arange(len(prompt))
        segment_ids[row, start:] = 1
    run = _continue(program, layout, max_new_tokens, sampling)
    told = Tokens(jnp.asarray(segment_ids), jnp.asarray(positions))
    tokens = np.asarray(run(params, jnp.asarray(ids), told, jax.random.key(seed)))
    continuations = []
    for row in range(len(prompts)):
        new = tokens[row].tolist()
        if stop_token in new:
            new = new[: new.index(stop_token)]
        continuations.append(new)
    return continuations


def _layout_of(program: Program) -> Layout:
    """Prompts are in their own order; and a token at a time cannot fill a pipeline.

    Its devices split the prompts instead, each with all layers, gathered once for all the tokens.
    """
    layout = program.layout.with_copies("pipeline")
    context = dataclasses.replace(layout.context, placement="contiguous")
    return dataclasses.replace(layout, context=context)


def _continue(program: Program, layout: Layout, max_new_tokens: int, sampling: Sampling):
    """The jitted function; one compilation per shape of the prompt."""

    def step(model: Transformer, ids_BT: jax.Array, tokens: Tokens, cache: Cache):
        hidden_BTD, cache_after = model(ids_BT, tokens=tokens, cache=cache)
        assert cache_after is not None
        logits_BV = dot_float32(hidden_BTD[:, -1], model.head_kernel())
        logits_BV = softcapped(logits_BV, model.config.logit_softcap)
        return constrain(logits_BV, ("batch", None)), cache_after

    @jax.jit
    def run(params: Params, ids_BT: jax.Array, tokens: Tokens, key: jax.Array) -> jax.Array:
        if layout.param_specs != program.layout.param_specs:
            params = layout.constrain_params(params)
        with use_layout(layout):
            model = program.model.merge(params)
            batch_size, length = ids_BT.shape
            cache = model.empty_cache(batch_size=batch_size, length=length + max_new_tokens)
            logits_BV, cache = step(model, ids_BT, tokens, cache)

            def one(carry: tuple[jax.Array, jax.Array, Cache], index: jax.Array):
                logits_BV, position_B, cache = carry
                new_B = sample(logits_BV, jax.random.fold_in(key, index), sampling)
                tokens = Tokens(jnp.ones_like(new_B)[:, None], position_B[:, None])
                logits_BV, cache = step(model, new_B[:, None], tokens, cache)
                return (logits_BV, position_B + 1, cache), new_B

            start = logits_BV, tokens.positions[:, -1] + 1, cache
            _, new_NB = jax.lax.scan(one, start, jnp.arange(max_new_tokens))
            return new_NB.T

    return run
