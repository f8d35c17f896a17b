"""Optimizers and schedules, out of optax."""

from spmd_train.optim.ema import ema_update as ema_update
from spmd_train.optim.offload import layer_shards as layer_shards
from spmd_train.optim.optimizer import make_optimizer as make_optimizer
from spmd_train.optim.rounding import (
    apply_updates_stochastically as apply_updates_stochastically,
)
from spmd_train.optim.schedule import make_schedule as make_schedule
