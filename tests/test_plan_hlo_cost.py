"""FLOPs and bytes of compiled programs, by hand."""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import pytest

from spmd_train.plan.hlo_cost import program_cost
from spmd_train.plan.live import live_at_peak

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hlo"


def fixture(name):
    return gzip.decompress((FIXTURES / f"{name}.txt.gz").read_bytes()).decode()


def text_of(f, *shapes, dtype=jnp.float32):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(f).lower(*arrays).compile().as_text()


def test_plan_hlo_cost_multiplies_loops_out():
    def run(x, w):
        def outer(x, _):
            def inner(x, wi):
                return jnp.tanh(x @ wi), None

            return jax.lax.scan(inner, x, w)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    cost = program_cost(text_of(run, (32, 64), (5, 64, 64)))
    assert cost.flops == 3 * 5 * 2 * 32 * 64 * 64
    assert cost.unknown_loops == 0
    assert cost.flops_by("dtype") == {"f32": cost.flops}


def test_plan_hlo_cost_of_a_convolution_counts_places_that_meet_the_input():
    def run(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (2, 1), [(1, 1), (0, 0)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    cost = program_cost(text_of(run, (2, 8, 6, 3), (3, 2, 3, 5)))
    # Rows: outputs 0..3 start at -1, 1, 3, 5, each with 3 taps, of which one is outside.
    rows, columns = 4 * 3 - 1, 5 * 2
    assert cost.flops == 2 * 2 * 3 * 5 * rows * columns


def test_plan_hlo_cost_knows_loops_that_nobody_can_count():
    def run(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    cost = program_cost(text_of(run, (16, 16), (16, 16)))
    assert cost.unknown_loops == 1
    assert cost.flops == 2 * 16**3


@pytest.mark.parametrize("compiler", ["tpu-jax0.10.2", "tpu-jax0.12.0", "gpu-jax0.10.2"])
def test_plan_hlo_cost_of_other_compilers(compiler):
    """fixtures/hlo/make.py: 6 layers of 1024 x 4096 and back, 3 microbatches of 4096, 16 devices.

    Twice forward, for the remat, of which the second leaves the last product out.
    """
    cost = program_cost(fixture(f"nested_loops-{compiler}"))
    product = 2 * 4096 * 1024 * 4096 / 16
    forward, recomputed, backward = 2, 1, 4
    assert cost.flops == 3 * 6 * product * (forward + recomputed + backward)
    assert set(cost.flops_by("dtype")) == {"bf16"}
    by_phase = cost.flops_by("phase")
    assert by_phase["forward"] == 3 * 6 * product * forward
    assert cost.unknown_kernels == ()


def test_plan_hlo_cost_names_kernels_that_do_not_tell():
    cost = program_cost(fixture("pallas-tpu-jax0.10.2"))
    assert len(cost.unknown_kernels) == 1


def test_plan_hlo_cost_of_a_kernel_that_makes_tables_is_nothing():
    """As for a TPU's grouped matmul: its author tells of no FLOPs, and it takes no floats."""
    text = """HloModule step, is_scheduled=true

ENTRY %main (sizes: s32[4]) -> s32[11] {
  %sizes = s32[4]{0} parameter(0)
  ROOT %tables = s32[11]{0} custom-call(%sizes), custom_call_target="tpu_custom_call"
}
"""
    cost = program_cost(text)
    assert (cost.flops, cost.unknown_kernels) == (0, ())


def test_plan_hlo_cost_of_a_kernel_that_tells_is_of_the_dtype_that_it_multiplies():
    """As of a backward pass of attention: block numbers first, float32 sums in and out."""
    text = """HloModule step, is_scheduled=true

ENTRY %main (blocks: s32[1,16], q: bf16[8,128], sums: f32[8]) -> (f32[8], f32[8,128]) {
  %blocks = s32[1,16]{1,0} parameter(0)
  %q = bf16[8,128]{1,0} parameter(1)
  %sums = f32[8]{0} parameter(2)
  ROOT %kernel = (f32[8]{0}, f32[8,128]{1,0}) custom-call(%blocks, %sums, %q), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/flash/kernel_flops_4096/call"}
}
"""
    cost = program_cost(text)
    assert cost.flops_by("dtype") == {"bf16": 4096}


def test_plan_hlo_cost_counts_bytes_read_and_written():
    text = text_of(lambda x, w: x @ w, (128, 256), (256, 64))
    assert program_cost(text).hbm_bytes == 4 * (128 * 256 + 256 * 64 + 128 * 64)

    def of_a_slice(x, w):
        return jax.lax.scan(lambda x, wi: (x * wi, None), x, w)[0]

    # Each of the 50 layers reads its own slice, not all of them.
    cost = program_cost(text_of(of_a_slice, (64, 64), (50, 64, 64)))
    assert 50 * 3 * 64 * 64 * 4 <= cost.hbm_bytes < 50 * 8 * 64 * 64 * 4


def test_plan_hlo_cost_of_a_slice_brought_on_chip_is_what_it_brings():
    """As a TPU prefetches a layer of a stack of 50: HBM is read once, nothing is written there."""
    text = """HloModule step, is_scheduled=true

ENTRY %main (stack: f32[50,8,128]) -> f32[1,8,128] {
  %stack = f32[50,8,128]{2,1,0} parameter(0)
  %start = ((f32[50,8,128]{2,1,0}), f32[1,8,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), \
slice={[3:4], [0:8], [0:128]}
  %layer = f32[1,8,128]{2,1,0:S(1)} slice-done(%start)
  %again = f32[1,8,128]{2,1,0:S(1)} slice(%stack), slice={[4:5], [0:8], [0:128]}
  ROOT %kept = f32[1,8,128]{2,1,0} slice(%stack), slice={[5:6], [0:8], [0:128]}
}
"""
    layer = 8 * 128 * 4
    assert [op.hbm_bytes for op in program_cost(text).operations] == [layer, layer, 2 * layer]


def test_plan_live_arrays_at_the_fullest_moment():
    def run(x, w):
        with jax.named_scope("wide"):
            h = jnp.sin(x @ w)
        return h @ w.T @ x

    live = live_at_peak(text_of(run, (256, 256), (256, 2048)))
    assert live[0].bytes == 256 * 2048 * 4
    assert live[0].scope == "wide"
    stats = jax.jit(run).lower(
        jax.ShapeDtypeStruct((256, 256), jnp.float32),
        jax.ShapeDtypeStruct((256, 2048), jnp.float32),
    )
    temporary = stats.compile().memory_analysis().temp_size_in_bytes
    assert sum(array.bytes for array in live) <= 1.05 * temporary


def test_plan_live_arrays_of_a_tpu_program_are_not_more_than_its_compiler_has():
    """nested_loops on libtpu 0.0.42.1: the kept activations lead, 6 layers of [1024, 1024]."""
    live = live_at_peak(fixture("nested_loops-tpu-jax0.10.2"))
    assert live[0].bytes == max(array.bytes for array in live)
    shapes = {array.shape for array in live}
    assert any(shape.startswith("bf16[6,") for shape in shapes)
