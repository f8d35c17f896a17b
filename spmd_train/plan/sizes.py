"""What the train state takes on a device, by kind: exact, from the sharding plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from spmd_train.parallel.plan import LeafPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes per device.

    Attributes:
        parameters: the model's.
        optimizer: everything else that a step carries: moments, moving average, counters.
        host: what of that waits in the host's memory, not in `optimizer`.
        gradients: float32 gradients of all parameters, sharded like them.
    """

    parameters: int
    optimizer: int
    host: int
    gradients: int


def state_bytes(plans: Mapping[str, LeafPlan]) -> StateBytes:
    """Adds up `Program.plans`."""
    params = [plan for path, plan in plans.items() if path.startswith("params/")]
    rest = [plan for path, plan in plans.items() if not path.startswith("params/")]
    return StateBytes(
        parameters=sum(plan.bytes_per_device for plan in params),
        optimizer=sum(plan.bytes_per_device for plan in rest if plan.memory == "device"),
        host=sum(plan.bytes_per_device for plan in rest if plan.memory == "host"),
        gradients=sum(
            plan.bytes_per_device * 4 // np.dtype(_numpy(plan.dtype)).itemsize for plan in params
        ),
    )


def num_params(plans: Mapping[str, LeafPlan]) -> int:
    """Numbers in the parameters."""
    shapes: Sequence[tuple[int, ...]] = [
        plan.shape for path, plan in plans.items() if path.startswith("params/")
    ]
    return sum(math.prod(shape) for shape in shapes)


def _numpy(dtype: str) -> str:
    return {"bfloat16": "float16"}.get(dtype, dtype)
