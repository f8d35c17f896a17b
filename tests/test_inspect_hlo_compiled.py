"""The counter on what the TPU and GPU compilers made (tests/fixtures/hlo/make.py), by hand.

And on snippets of what they make elsewhere.
"""

import gzip
import pathlib

import pytest

from spmd_train.inspect.collectives import collective_summary, count_collectives
from spmd_train.inspect.hlo import parse_hlo

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hlo"
COMPILERS = ("tpu-jax0.10.2", "tpu-jax0.12.0", "gpu-jax0.10.2")
MIB = 2**20


def _text(name):
    return gzip.decompress((FIXTURES / f"{name}.txt.gz").read_bytes()).decode()


def _totals(collectives):
    """(op, axes) -> (bytes, wire bytes), per device and step."""
    totals = {}
    for c in collectives:
        payload, wire = totals.get((c.op, c.axes), (0, 0))
        totals[c.op, c.axes] = (payload + c.bytes, wire + c.wire_bytes)
    return totals


@pytest.mark.parametrize("compiler", COMPILERS)
def test_hlo_every_op_is_counted_on_tpu_and_gpu(compiler):
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    found = count_collectives(_text(f"every_op-{compiler}"), axis_sizes=axes)
    unknown = [c for c in found if c.count is None]
    assert [(c.op, c.axes, c.bytes_each) for c in unknown] == [("all-reduce", ("data",), MIB)]
    conditional = [c for c in found if c.conditional]
    assert [(c.op, c.axes, c.count) for c in conditional] == [("all-reduce", ("data",), 1)]
    # An array of 512 x 512 float32 is 1 MiB; three layers; two halves gathered on top of it.
    counted = {(c.op, c.axes): (c.count, c.bytes / MIB) for c in found if c.count is not None}
    assert counted == {
        ("all-reduce", ("data", "tensor")): (3, 3),
        ("collective-permute", ("fsdp",)): (3, 3),
        ("all-to-all", ("fsdp",)): (3, 3),
        ("all-gather", ("fsdp",)): (3, 6),
        ("reduce-scatter", ("fsdp", "tensor")): (3, 6),
        ("all-gather", ("tensor",)): (3, 3),
        ("all-reduce", ("data",)): (1, 1),
        ("collective-permute", ("tensor",)): (5, 5),
        ("ragged-all-to-all", ("data",)): (1, 1),
    }
    layer = {c.scope for c in found if c.count == 3}
    assert layer == {"layer"}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_hlo_train_step_sends_what_the_formulas_say(compiler):
    """4 layers of 1024 x 4096 and back, bfloat16, data 2 x fsdp 4 x tensor 2, batch 4096."""
    axes = {"data": 2, "fsdp": 4, "tensor": 2}
    found = count_collectives(_text(f"train_step-{compiler}"), axis_sizes=axes)
    weights = 4 * 2 * 1024 * 4096 * 2 // 2  # all layers, both matrices, on a tensor shard
    activations = 4 * (4096 // 8) * 1024 * 2
    assert _totals(found) == {
        # Gathered forward and backward; gradients scattered, then summed over data as shards.
        ("all-gather", ("fsdp",)): (2 * weights, 2 * weights * 3 // 4),
        ("reduce-scatter", ("fsdp",)): (weights, weights * 3 // 4),
        ("all-reduce", ("data",)): (weights // 4, weights // 4),
        ("all-reduce", ("tensor",)): (2 * activations, 2 * activations),
    }
    assert {c.count for c in found} == {4}
    assert {c.scope.split("/")[0] for c in found} == {"forward", "backward"}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_hlo_nested_loops_multiply_on_tpu_and_gpu(compiler):
    """6 rematerialized layers in 3 microbatches, fsdp 4 x tensor 4, batch 4096."""
    found = count_collectives(
        _text(f"nested_loops-{compiler}"), axis_sizes={"fsdp": 4, "tensor": 4}
    )
    weights = 3 * 6 * 2 * 1024 * 4096 * 2 // 4
    activations = 3 * 6 * (4096 // 4) * 1024 * 2
    assert _totals(found) == {
        ("all-gather", ("fsdp",)): (2 * weights, 2 * weights * 3 // 4),
        ("reduce-scatter", ("fsdp",)): (weights, weights * 3 // 4),
        ("all-reduce", ("tensor",)): (2 * activations, 2 * activations * 2 * 3 // 4),
    }
    assert {c.count for c in found} == {18}


def test_hlo_asynchronous_tpu_collective_in_several_fusions_counts_once():
    text = _text("train_step-tpu-jax0.10.2")
    instructions = [
        instruction
        for computation in parse_hlo(text).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "all-gather"
    ]
    channels = {i.attributes["channel_id"] for i in instructions}
    assert (len(instructions), len(channels)) == (11, 4)
    found = count_collectives(text, axis_sizes={"data": 2, "fsdp": 4, "tensor": 2})
    gathers = [c for c in found if c.op == "all-gather"]
    assert len(gathers) == 4
    assert sum(c.is_async for c in gathers) == 3


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0"])
def test_hlo_with_a_pallas_kernel_is_read(version):
    text = _text(f"pallas-tpu-jax{version}")
    assert "\n}}" in text
    (found,) = count_collectives(text, axis_sizes={"data": 4, "tensor": 4})
    payload = 2 * 2 * 512 * 128 * 2
    assert (found.op, found.axes) == ("all-reduce", ("data",))
    assert (found.bytes, found.wire_bytes) == (payload, 2 * payload * 3 // 4)


def test_hlo_async_start_with_a_computation_counts_once():
    """Not every release writes `reduce-scatter-start`."""
    text = """HloModule m, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%async_computation (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4] parameter(0)
  ROOT %rs = f32[2,4] reduce-scatter(%p), channel_id=3, replica_groups=[1,4]<=[4], use_global_device_ids=true, dimensions={0}, to_apply=%sum
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4] parameter(0)
  %start = ((f32[8,4]), f32[2,4], u32[]) async-start(%x), async_execution_thread="sparsecore", calls=%async_computation, metadata={op_name="jit(f)/transpose(jvp(block))/dot_general"}
  %update = ((f32[8,4]), f32[2,4], u32[]) async-update(%start), calls=%async_computation
  ROOT %done = f32[2,4] async-done(%update), calls=%async_computation
}
"""  # noqa: E501
    (found,) = count_collectives(text, axis_sizes={"x": 4})
    assert (found.op, found.count, found.bytes, found.wire_bytes) == ("reduce-scatter", 1, 128, 96)
    assert found.is_async
    assert (found.scope, found.source) == ("backward/block", "dot_general")


def test_hlo_synchronous_gpu_pair_hides_nothing():
    text = """HloModule m, num_partitions=2

ENTRY %main (x: bf16[8]) -> bf16[16] {
  %x = bf16[8] parameter(0)
  %start = (bf16[8], bf16[16]) all-gather-start(%x), channel_id=1, replica_groups=[1,2]<=[2], use_global_device_ids=true, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":SYNC}}
  ROOT %done = bf16[16] all-gather-done(%start), backend_config={"collective_backend_config":{"is_sync":SYNC}}
}
"""  # noqa: E501
    for sync, is_async in (("true", False), ("false", True)):
        (found,) = count_collectives(text.replace("SYNC", sync), axis_sizes={"x": 2})
        assert (found.bytes, found.wire_bytes, found.is_async) == (32, 16, is_async)
        summary = collective_summary([found])
        assert summary["async_wire_bytes"] == 16 * is_async


def test_hlo_permutation_split_into_send_and_receive_counts_once():
    text = """HloModule m, num_partitions=4

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %token = token[] after-all()
  %recv = (f32[8], u32[], token[]) recv(%token), channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3}}}
  %send = (f32[8], u32[], token[]) send(%x, %token), channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3}}}
  %to_host = (f32[8], u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true
  %recv-done = (f32[8], token[]) recv-done(%recv), channel_id=1
  %send-done = token[] send-done(%send), channel_id=1
  ROOT %y = f32[8] get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501
    (found,) = count_collectives(text, axis_sizes={"pipeline": 4})
    assert (found.op, found.axes) == ("collective-permute", ("pipeline",))
    assert (found.bytes, found.wire_bytes, found.is_async) == (32, 32, True)


def test_hlo_tpu_reduce_scatter_without_its_slice_is_an_all_reduce():
    """Only the fusion that XLA names so is run as a reduce-scatter."""
    text = """HloModule m, num_partitions=4

%NAME (p: f32[8]) -> f32[2] {
  %p = f32[8] parameter(0)
  %ar = f32[8] all-reduce(%p), channel_id=3, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %slice = f32[2] dynamic-slice(%ar, %zero), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8] parameter(0)
  ROOT %f = f32[2] fusion(%x), kind=kCustom, calls=%NAME
}
"""  # noqa: E501
    for name, op, wire in (
        ("all-reduce-scatter.3.clone", "reduce-scatter", 24),
        ("fused_computation.3", "all-reduce", 48),
    ):
        (found,) = count_collectives(text.replace("NAME", name), axis_sizes={"x": 4})
        assert (found.op, found.bytes, found.wire_bytes) == (op, 32, wire)


CONDITION = """HloModule m, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]) parameter(0)
  %x.1 = f32[8] get-tuple-element(%p), index=0
  %y = f32[8] all-gather(%x.1), channel_id=1, replica_groups={{0},{1},{2},{3}}, use_global_device_ids=true
  ROOT %t = (f32[8]) tuple(%y)
}

%condition (q: (f32[8])) -> pred[] {
  %q = (f32[8]) parameter(0)
  %x.2 = f32[8] get-tuple-element(%q), index=0
  %total = f32[8] all-reduce(%x.2), channel_id=2, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%sum
  ROOT %go = pred[] custom-call(%total), custom_call_target="go"
}

ENTRY %main (x: f32[8]) -> (f32[8]) {
  %x = f32[8] parameter(0)
  %t.1 = (f32[8]) tuple(%x)
  ROOT %w = (f32[8]) while(%t.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501


def test_hlo_loop_condition_runs_once_more_than_its_body():
    found = count_collectives(CONDITION, axis_sizes={"x": 4})
    assert {c.op: c.count for c in found} == {"all-gather": 6, "all-reduce": 7}
    alone = next(c for c in found if c.op == "all-gather")
    assert (alone.axes, alone.bytes, alone.wire_bytes) == ((), 6 * 32, 0)


def test_hlo_chain_of_fusions_without_a_start_counts_once_per_caller():
    text = """HloModule m, num_partitions=4

%step.1 (p: f32[8]) -> f32[32] {
  %p = f32[8] parameter(0)
  ROOT %ag.1 = f32[32] all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%step.2 (q: f32[8]) -> f32[32] {
  %q = f32[8] parameter(0)
  ROOT %ag.2 = f32[32] all-gather(%q), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%step.3 (r: f32[8]) -> f32[32] {
  %r = f32[8] parameter(0)
  ROOT %ag.3 = f32[32] all-gather(%r), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="1"}
}

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8] parameter(0)
  %f.1 = f32[32] fusion(%x), kind=kCustom, calls=%step.1
  %f.2 = f32[32] fusion(%x), kind=kCustom, calls=%step.2
  ROOT %f.3 = f32[32] fusion(%x), kind=kCustom, calls=%step.3
}
"""  # noqa: E501
    found = count_collectives(text, axis_sizes={"x": 4})
    assert [(c.count, c.bytes, c.is_async) for c in found] == [(1, 128, True)] * 2
