"""The trainer's own step in a bare loop: what the trainer's loop around it costs.

Two devices of one process, the allocator that the command line takes, batches that lie in memory;
no data pipeline, no metrics but the loss, no watchers, no checkpoints.

    python scripts/peers/bare_step.py PROBLEM_DIR --workdir=DIR --num_steps=40 --log_every=10
"""

from __future__ import annotations

import jax
import problem

from spmd_train import cluster, experiment
from spmd_train.cli import allocator
from spmd_train.config import parse


def main() -> None:
    args = problem.parse_arguments(__doc__)
    cluster.start(simulate_devices=2)
    config = parse(problem.read_config(args.problem))
    program = experiment.build(config).program
    state = program.init(config.train.seed)
    data, rows = experiment.open_data(config, split="train"), config.train.global_batch_size
    batches = [data.batch(n, global_batch_size=rows) for n in range(args.num_steps)]
    shardings = {name: x.sharding for name, x in program.abstract_batch.items()}
    log = problem.Log(args.workdir)
    pending: tuple[int, jax.Array] | None = None
    for step in range(1, args.num_steps + 1):
        batch = {name: batches[step - 1][name] for name in shardings}
        state, metrics = program.train_step(state, jax.device_put(batch, shardings))
        if pending is not None:  # Read while the next step runs.
            log(pending[0], float(pending[1]))
        loss = metrics["loss_sum"] / metrics["weight_sum"]
        pending = (step, loss) if problem.is_logged(step, args.log_every) else None
    if pending is not None:
        log(pending[0], float(pending[1]))


if __name__ == "__main__":
    allocator.choose_allocator()
    main()
