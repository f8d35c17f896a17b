"""The learning rate over the steps."""

from __future__ import annotations

import optax

from spmd_train.config import ConfigError, OptimizerConfig


def make_schedule(config: OptimizerConfig, *, num_steps: int) -> optax.Schedule:
    """Warm-up from 0, then constant, cosine, linear or wsd (warm-up, stable, decay).

    Step n (from 0) uses the schedule's value at n: with warm-up, step 0 learns nothing, and the
    highest rate is that of step `warmup_steps`. A run shorter than its warm-up is all warm-up.
    After the decay the rate stays at `end_factor` of the highest. wsd is Hu et al.,
    arXiv:2404.06395, with a linear decay (Hägele et al., arXiv:2405.18392).

    Args:
        config: the optimizer's; `learning_rate` is the highest rate.
        num_steps: steps of the whole run.

    Returns:
        A function from step to learning rate; floats or float32 scalars.

    Raises:
        ConfigError: the decay ends before it begins, or wsd has no decay or no room for it.
    """
    schedule = config.schedule
    peak, warmup = config.learning_rate, schedule.warmup_steps
    end = peak * schedule.end_factor
    if schedule.name == "wsd":
        begin = num_steps - schedule.decay_steps
        if schedule.decay_steps == 0 or begin < warmup:
            raise ConfigError(
                f"optimizer.schedule.decay_steps = {schedule.decay_steps}: wsd decays over the "
                "last decay_steps steps, at least 1, and warmup_steps + decay_steps must fit into "
                f"the run: warmup_steps = {warmup}, train.num_steps = {num_steps}"
            )
        pieces = [
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, end, schedule.decay_steps),
        ]
        boundaries = [begin]
    elif schedule.name == "constant":
        pieces, boundaries = [optax.constant_schedule(peak)], []
    else:
        if 0 < schedule.decay_steps <= warmup:
            raise ConfigError(
                f"optimizer.schedule.decay_steps = {schedule.decay_steps}: the step where decay "
                f"ends, after warmup_steps = {warmup}; 0 means train.num_steps"
            )
        length = max((schedule.decay_steps or num_steps) - warmup, 1)
        if schedule.name == "cosine":
            pieces = [optax.cosine_decay_schedule(peak, length, alpha=schedule.end_factor)]
        else:
            pieces = [optax.linear_schedule(peak, end, length)]
        boundaries = []
    if warmup:
        pieces.insert(0, optax.linear_schedule(0.0, peak, warmup))
        boundaries.insert(0, warmup)
    return optax.join_schedules(pieces, boundaries)
