"""The least time of a step, by hand."""

import dataclasses

import pytest

from spmd_train.parallel.chips import CHIPS
from spmd_train.plan.hlo_cost import Operation, ProgramCost
from spmd_train.plan.network import NetworkTime
from spmd_train.plan.roofline import roofline

H100, A100, V6E = CHIPS["h100"], CHIPS["a100-80gb"], CHIPS["v6e"]


def times(*operations, chip, bubble=0.0, ici=0.0, hidden=0.0, host_bytes=0):
    network = NetworkTime(ici=ici, dcn=0.0, hidden=hidden)
    cost = ProgramCost(
        operations=tuple(
            Operation(
                count=count,
                flops=flops,
                hbm_bytes=hbm_bytes,
                phase="forward",
                scope="",
                dtype=dtype,
                instruction="dot",
            )
            for count, flops, hbm_bytes, dtype in operations
        ),
        num_instructions=len(operations),
        unknown_loops=0,
        unknown_kernels=(),
    )
    return roofline(
        cost, network=network, chip=chip, dtype="bfloat16", bubble=bubble, host_bytes=host_bytes
    )


@pytest.mark.parametrize(
    ("chip", "dtype", "rate"),
    [
        (H100, "bf16", 989.4e12),
        (H100, "f32", 494.7e12),
        (H100, "f8e4m3fn", 1978.8e12),
        (H100, "s8", 1978.8e12),
        (V6E, "s8", 1836e12),
        (V6E, "f8e5m2", 918e12),
        # An A100 multiplies no float8: it is converted, at the compute dtype's rate at best.
        (A100, "f8e4m3fn", 312e12),
    ],
)
def test_plan_roofline_takes_each_matmul_at_the_rate_of_its_dtype(chip, dtype, rate):
    assert times((3, 1e12, 0, dtype), chip=chip).compute == pytest.approx(3e12 / rate)


def test_plan_roofline_of_a_kernel_is_the_longer_of_matmuls_and_memory():
    busy, moving = (1, 1e13, 10, "bf16"), (2, 0.0, 10**10, "")
    told = times(busy, moving, chip=H100)
    assert told.on_chip == pytest.approx(1e13 / 989.4e12 + 2e10 / 3350e9)
    assert told.bound == "compute"
    waiting = times(busy, moving, chip=H100, bubble=0.25)
    assert waiting.step == pytest.approx(told.step * 4 / 3)
    sending = times(busy, moving, chip=H100, ici=0.5, hidden=0.375)
    assert sending.step == pytest.approx(told.step + 0.125)


def test_plan_roofline_waits_for_moments_to_come_and_to_go():
    busy = (1, 1e12, 10, "bf16")
    told, moving = (times(busy, chip=H100, host_bytes=n) for n in (0, 64 * 10**9))
    assert (told.host, moving.host) == (0.0, 2.0)
    assert moving.step == pytest.approx(told.step + 2)
    assert moving.bound == "host"
    unknown = dataclasses.replace(H100, host_bandwidth=None)
    assert times(busy, chip=unknown).step == told.step
    assert times(busy, chip=unknown, host_bytes=1).step is None
