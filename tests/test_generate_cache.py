"""Generation out of the cache is the uncached forward pass, token for token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, program_of

from spmd_train import experiment
from spmd_train.config import ConfigError, parse
from spmd_train.data.tokenizers import load_tokenizer
from spmd_train.nn.attention import Tokens
from spmd_train.parallel.rules import use_layout
from spmd_train.train.generate import Sampling, generate, sample
from spmd_train.train.program import Program
from spmd_train.train.state import Params

PROMPTS = [[5, 9, 2, 40, 7], [11], [3, 3, 60]]
NEW = 6
GREEDY = Sampling(temperature=0)
VARIANTS = {
    "rope": dataclasses.replace(MODEL, num_heads=8, num_kv_heads=4, logit_softcap=5.0),
    "learned": dataclasses.replace(MODEL, positions="learned", max_positions=16, tied_head=True),
}


def uncached_greedy(program: Program, params: Params, prompt: Sequence[int]) -> list[int]:
    """Feeds the whole text again for every token, one prompt at a time, without a cache."""
    length = max(map(len, PROMPTS)) + NEW

    @jax.jit
    def next_token(params: Params, ids: jax.Array, end: jax.Array) -> jax.Array:
        with use_layout(program.layout):
            model = program.model.merge(params)
            place = jnp.arange(length)[None]
            hidden_BTD, _ = model(ids, tokens=Tokens((place < end).astype(jnp.int32), place))
            return jnp.argmax(hidden_BTD[0, end - 1] @ model.head_kernel())

    text = list(prompt)
    for _ in range(NEW):
        ids = jnp.array([text + [0] * (length - len(text))])
        text.append(int(next_token(params, ids, len(text))))
    return text[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_greedy_equals_the_uncached_forward_pass(variant: str) -> None:
    one = program_of({}, model=VARIANTS[variant])
    params = one.init(1).params
    expected = [uncached_greedy(one, params, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # they tell prompts apart
    assert generate(one, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY) == expected

    mesh = program_of({"fsdp": 2, "tensor": 2}, model=VARIANTS[variant])
    sharded = mesh.init(1).params
    kernel = sharded["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert generate(mesh, sharded, PROMPTS, max_new_tokens=NEW, sampling=GREEDY) == expected


def test_generate_stops_before_the_stop_token() -> None:
    program = program_of({})
    params = program.init(1).params
    whole = generate(program, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)
    stop = whole[0][2]
    stopped = generate(
        program, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, stop_token=stop
    )
    assert stopped == [t[: t.index(stop)] if stop in t else t for t in whole]
    assert len(stopped[0]) < NEW


def test_generate_draws_follow_the_seed() -> None:
    program = program_of({})
    params = program.init(1).params

    def draw(seed: int) -> list[list[int]]:
        return generate(
            program, params, PROMPTS, max_new_tokens=NEW, sampling=Sampling(), seed=seed
        )

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_generate_prompts_beyond_learned_positions_are_refused() -> None:
    model = {"positions": "learned", "max_positions": 300}
    config = parse(
        {
            "model": model,
            "data": {"sequence_length": 64},
            "sample": {"prompt": "x" * 60, "max_new_tokens": 256},
        }
    )
    tokenizer = load_tokenizer("bytes")
    match = r"max_new_tokens: 256 and a prompt of 61 .* is 300; ask for 239 at most"
    with pytest.raises(ConfigError, match=match):
        experiment.prompt_ids(config, [config.sample.prompt], tokenizer)
    assert len(experiment.prompt_ids(config, ["x" * 40], tokenizer)[0]) == 41


def test_generate_refuses_an_empty_prompt() -> None:
    program = program_of({})
    with pytest.raises(ValueError, match="at least one token"):
        generate(program, {}, [[1], []], max_new_tokens=1, sampling=GREEDY)


LOGITS = np.log([0.5, 0.25, 0.15, 0.1]).astype(np.float32)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.7), {0, 1}),
        (Sampling(top_p=0.76), {0, 1, 2}),
        (Sampling(top_k=3, top_p=0.8), {0, 1}),  # of the three: 0.56, 0.28, 0.17
        (Sampling(temperature=0), {0}),
        (Sampling(top_p=1e-6), {0}),
    ],
)
def test_generate_samples_only_what_is_allowed(sampling: Sampling, allowed: set[int]) -> None:
    draws = sample(jnp.tile(LOGITS, (4096, 1)), jax.random.key(0), sampling)
    assert set(np.unique(draws).tolist()) == allowed


def test_generate_samples_in_proportion() -> None:
    draws = sample(jnp.tile(LOGITS, (20_000, 1)), jax.random.key(0), Sampling(temperature=0.5))
    wanted = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    counts = np.bincount(draws, minlength=4) / 20_000
    assert np.abs(counts - wanted).max() < 5 * math.sqrt(0.25 / 20_000)
