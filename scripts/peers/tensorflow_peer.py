"""The bench's problem in TensorFlow: two replicas under a tf.distribute strategy, jitted by XLA.

    python scripts/peers/tensorflow_peer.py PROBLEM_DIR --strategy=mirrored --workdir=DIR ...

`mirrored`: two logical CPU devices of one process. `multiworker`: two processes on this machine,
which this one starts. What XLA can take of a replica's step is jitted: the gradients, and the
update after them; the strategy's all-reduce lies between. Each replica updates a copy of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import problem

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
from tensorflow.python.eager import context

QUERY_BLOCK = 128
NUM_REPLICAS = 2


def rms_norm(x, scale, epsilon):
    return x * tf.math.rsqrt(tf.reduce_mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def rope(x_BHTK, cos, sin):
    a, b = tf.split(x_BHTK, 2, axis=-1)
    return tf.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q_BHTK, k_BHTK, v_BHTK, mask_BTT):
    length, width = q_BHTK.shape[2:]
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        q = q_BHTK[:, :, start:end] * width**-0.5
        scores = tf.matmul(q, k_BHTK[:, :, :end], transpose_b=True)
        scores = tf.where(mask_BTT[:, None, start:end, :end], scores, -1e30)
        outputs.append(tf.matmul(tf.nn.softmax(scores), v_BHTK[:, :, :end]))
    return tf.concat(outputs, axis=2)


def mean_loss(params, batch, model):
    """Mean cross-entropy over the batch's tokens, nats."""
    batch_size, length = batch["tokens"].shape
    width, epsilon = model["embed_dim"], model["norm_epsilon"]
    head_dim = width // model["num_heads"]
    split = [batch_size, length, -1, head_dim]
    frequency = model["rope"]["theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = tf.cast(batch["positions"], tf.float32)[:, None, :, None] * frequency.astype("f")
    cos, sin = tf.cos(angles), tf.sin(angles)
    segments = batch["segment_ids"]
    mask_BTT = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)
    x_ND = tf.gather(params["embedding"], tf.reshape(batch["tokens"], [-1]))
    for p in params["layers"]:
        h_ND = rms_norm(x_ND, p["attention_norm"], epsilon)
        heads = [tf.reshape(h_ND @ p[name], split) for name in ("query", "key", "value")]
        q, k, v = (tf.transpose(x_BTHK, (0, 2, 1, 3)) for x_BTHK in heads)
        out_BHTK = attention(rope(q, cos, sin), rope(k, cos, sin), v, mask_BTT)
        x_ND += tf.reshape(tf.transpose(out_BHTK, (0, 2, 1, 3)), [-1, width]) @ p["out"]
        h_ND = rms_norm(x_ND, p["mlp_norm"], epsilon)
        x_ND += (tf.nn.silu(h_ND @ p["gate"]) * (h_ND @ p["up"])) @ p["down"]
    logits_NV = rms_norm(x_ND, params["final_norm"], epsilon) @ params["head"]
    targets_N = tf.reshape(batch["targets"], [-1])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets_N, logits_NV))


def names_of(params: dict[str, Any]) -> dict[str, Any]:
    """The tree's leaves replaced by their names."""
    layer = {name: name for name in params["layers"][0]}
    return {name: name for name in params} | {"layers": [layer for _ in params["layers"]]}


def train(
    config: dict[str, Any],
    params: dict[str, Any],
    batches: dict[str, np.ndarray],
    *,
    strategy: tf.distribute.Strategy,
    num_steps: int,
    log_every: int,
    log: problem.Log | None,
) -> None:
    """Trains; calls `log(step, loss)` for step 1 and every `log_every`-th."""
    model, optimizer = config["model"], config["optimizer"]
    decays = [
        0.0 if name in problem.NOT_DECAYED else optimizer["weight_decay"]
        for name in tf.nest.flatten(names_of(params))
    ]
    flat = tf.nest.flatten(params)

    def own(values: list[np.ndarray]) -> list[tf.Variable]:
        # Of each replica its own, so that each can write it; all compute the same.
        kind = {
            "synchronization": tf.VariableSynchronization.ON_READ,
            "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
        }
        return [tf.Variable(value, **kind) for value in values]

    with strategy.scope():
        weights = own(flat)
        first, second = (own([np.zeros_like(w) for w in flat]) for _ in range(2))
        count = own([np.float32(0)])

    @tf.function(jit_compile=True)
    def gradients(weights, batch):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = mean_loss(tf.nest.pack_sequence_as(params, weights), batch, model)
        return loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)]

    @tf.function(jit_compile=True)
    def update(weights, first, second, count, grads):
        count += 1
        norm = tf.linalg.global_norm(grads)
        scale = tf.minimum(1.0, optimizer["clip_norm"] / norm)
        b1, b2, rate = optimizer["b1"], optimizer["b2"], optimizer["learning_rate"]
        new = []
        for w, m, v, g, decay in zip(weights, first, second, grads, decays, strict=True):
            g *= scale
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            root = tf.sqrt(v / (1 - b2**count)) + optimizer["epsilon"]
            new.append((w - rate * (m / (1 - b1**count) / root + decay * w), m, v))
        return *zip(*new, strict=True), count

    def replica_step(batch):
        context = tf.distribute.get_replica_context()
        own = [[variable.read_value() for variable in group] for group in (weights, first, second)]
        loss, grads = gradients(own[0], batch)
        loss, grads = context.all_reduce(tf.distribute.ReduceOp.MEAN, [loss, grads])
        *new, next_count = update(*own, count[0].read_value(), grads)
        for variables, values in zip((weights, first, second), new, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        count[0].assign(next_count)
        return loss

    @tf.function
    def train_step(batch):
        return strategy.experimental_local_results(strategy.run(replica_step, args=(batch,)))[0]

    share = batches["tokens"].shape[1] // strategy.num_replicas_in_sync

    def values(step: int, context: tf.distribute.distribute_lib.ValueContext) -> dict[str, Any]:
        rows = slice(
            context.replica_id_in_sync_group * share, (context.replica_id_in_sync_group + 1) * share
        )
        return {name: tf.constant(array[step - 1, rows]) for name, array in batches.items()}

    for step in range(1, num_steps + 1):
        batch = strategy.experimental_distribute_values_from_function(
            lambda context, step=step: values(step, context)
        )
        loss = train_step(batch)
        if problem.is_logged(step, log_every):
            loss = float(loss)
            if log is not None:
                log(step, loss)


def start_workers() -> None:
    """Runs this very command line once for each worker."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(NUM_REPLICAS)]
    workers = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    processes = []
    for index in range(NUM_REPLICAS):
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        environment = os.environ | {"TF_CONFIG": json.dumps(task)}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    raise SystemExit(max(abs(process.wait()) for process in processes))


def outlast_holds() -> None:
    """The bench holds the workers for longer than the 10 seconds after which they are given up."""
    context.context().configure_coordination_service(
        "standalone",
        service_leader="/job:worker/replica:0/task:0",
        coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=NUM_REPLICAS)],
        heartbeat_timeout_in_ms=3_600_000,
    )


def main() -> None:
    args = problem.parse_arguments(__doc__, strategy=["mirrored", "multiworker"])
    is_first = True
    if args.strategy == "multiworker":
        if "TF_CONFIG" not in os.environ:
            start_workers()
        is_first = json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0
        outlast_holds()
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration() for _ in range(NUM_REPLICAS)]
        tf.config.set_logical_device_configuration(cpu, logical)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(NUM_REPLICAS)])
    train(
        problem.read_config(args.problem),
        problem.read_params(args.problem),
        problem.read_batches(args.problem),
        strategy=strategy,
        num_steps=args.num_steps,
        log_every=args.log_every,
        log=problem.Log(args.workdir) if is_first else None,
    )


if __name__ == "__main__":
    main()
