"""The bench's other side: the same training, written by hand in plain JAX and optax for one device.

No Flax, no config system, no data pipeline, no checkpoints: functions, one jit with donation, and a
loop over batches that lie in memory. Knows what a good CPU program wants: tokens in one dim for the
matmuls, heads before tokens and causal blocks of queries in attention, layers unrolled.

    python scripts/peers/bare_jax.py PROBLEM_DIR --workdir=DIR --num_steps=40 --log_every=10

PROBLEM_DIR is made by bench.py: config.json, weights.npz, batches.npz. Writes DIR/metrics.jsonl.

Shape suffixes: B batch, T tokens of a sequence, N = B * T, D width, H heads, K width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem

QUERY_BLOCK = 128


def rms_norm(x, scale, epsilon):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def rope(x_BHTK, cos, sin):
    a, b = jnp.split(x_BHTK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q_BHTK, k_BHTK, v_BHTK, mask_BTT):
    length, width = q_BHTK.shape[2:]
    block = min(QUERY_BLOCK, length)
    outputs = []
    for start in range(0, length, block):
        end = start + block
        q = q_BHTK[:, :, start:end] * width**-0.5
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k_BHTK[:, :, :end])
        scores = jnp.where(mask_BTT[:, None, start:end, :end], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        outputs.append(jnp.einsum("bhts,bhsk->bhtk", weights, v_BHTK[:, :, :end]))
    return jnp.concatenate(outputs, axis=2)


def layer(x_ND, p, *, cos, sin, mask_BTT, num_heads, epsilon):
    batch, length, _ = mask_BTT.shape
    h_ND = rms_norm(x_ND, p["attention_norm"], epsilon)
    q, k, v = (
        (h_ND @ p[name]).reshape(batch, length, num_heads, -1).swapaxes(1, 2)
        for name in ("query", "key", "value")
    )
    out_BHTK = attention(rope(q, cos, sin), rope(k, cos, sin), v, mask_BTT)
    x_ND += out_BHTK.swapaxes(1, 2).reshape(x_ND.shape[0], -1) @ p["out"]
    h_ND = rms_norm(x_ND, p["mlp_norm"], epsilon)
    return x_ND + (jax.nn.silu(h_ND @ p["gate"]) * (h_ND @ p["up"])) @ p["down"]


def mean_loss(params, batch, model):
    """Mean cross-entropy over the batch's tokens, nats."""
    positions_BT, segments_BT = batch["positions"], batch["segment_ids"]
    head_dim = model["embed_dim"] // model["num_heads"]
    frequency = model["rope"]["theta"] ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = positions_BT[:, None, :, None] * frequency
    causal = jnp.tril(jnp.ones((positions_BT.shape[1],) * 2, bool))
    mask_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & causal
    x_ND = params["embedding"][batch["tokens"].reshape(-1)]
    for p in params["layers"]:
        x_ND = layer(
            x_ND,
            p,
            cos=jnp.cos(angles),
            sin=jnp.sin(angles),
            mask_BTT=mask_BTT,
            num_heads=model["num_heads"],
            epsilon=model["norm_epsilon"],
        )
    x_ND = rms_norm(x_ND, params["final_norm"], model["norm_epsilon"])
    losses_N = optax.softmax_cross_entropy_with_integer_labels(
        x_ND @ params["head"], batch["targets"].reshape(-1)
    )
    weights_N = batch["weights"].reshape(-1)
    return jnp.sum(losses_N * weights_N) / jnp.sum(weights_N)


def train(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    batches: dict[str, np.ndarray],
    *,
    num_steps: int,
    log_every: int,
    log: Callable[[int, float], None],
) -> None:
    """Trains; calls `log(step, loss)` for step 1 and every `log_every`-th."""
    model, optimizer = config["model"], config["optimizer"]
    params = jax.tree.map(jnp.asarray, problem.plain_params(weights))
    decayed = jax.tree_util.tree_map_with_path(
        lambda p, _: p[-1].key not in problem.NOT_DECAYED, params
    )
    transform = optax.chain(
        optax.clip_by_global_norm(optimizer["clip_norm"]),
        optax.adamw(
            optimizer["learning_rate"],
            b1=optimizer["b1"],
            b2=optimizer["b2"],
            eps=optimizer["epsilon"],
            weight_decay=optimizer["weight_decay"],
            mask=decayed,
        ),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch, model)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = transform.init(params)
    pending = None
    for step in range(1, num_steps + 1):
        batch = {name: array[step - 1] for name, array in batches.items()}
        params, opt_state, loss = train_step(params, opt_state, batch)
        if pending is not None:  # Read while the next step runs.
            log(pending[0], float(pending[1]))
        pending = (step, loss) if problem.is_logged(step, log_every) else None
    if pending is not None:
        log(pending[0], float(pending[1]))


def main() -> None:
    args = problem.parse_arguments(__doc__)
    train(
        problem.read_config(args.problem),
        dict(np.load(args.problem / "weights.npz")),
        problem.read_batches(args.problem),
        num_steps=args.num_steps,
        log_every=args.log_every,
        log=problem.Log(args.workdir),
    )


if __name__ == "__main__":
    main()
