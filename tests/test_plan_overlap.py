"""What is sent while it computes: by hand, and in what the TPU and GPU compilers made."""

import gzip
import pathlib

import pytest

from spmd_train.inspect.collectives import Collective, count_collectives
from spmd_train.plan.hlo_cost import program_cost
from spmd_train.plan.overlap import hidden_seconds, overlap, overlap_lines, purpose_of

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hlo"
DOT = "%d = f32[8,8] dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
HEAD = f"""HloModule m, num_partitions=4

%body (p: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {{
  %p = (f32[8,8], s32[]) parameter(0)
  %w = f32[8,8] get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  {DOT.replace("%d", "%inner")}
  ROOT %t = (f32[8,8], s32[]) tuple(%inner, %i)
}}

%condition (q: (f32[8,8], s32[])) -> pred[] {{
  %q = (f32[8,8], s32[]) parameter(0)
  ROOT %go = pred[] custom-call(%q), custom_call_target="go"
}}

"""
GROUPS = "channel_id=1, replica_groups=[1,4]<=[4], use_global_device_ids=true, dimensions={0}"
PAIRS = "channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
LOOP = (
    "%l = (f32[8,8], s32[]) while(%pair), condition=%condition, body=%body, "
    'backend_config={"known_trip_count":{"n":"6"}}'
)


def collective(**changes):
    fields = {
        **{"op": "all-gather", "axes": ("fsdp",), "slices": 1, "count": 1},
        **{"conditional": False, "dtype": "bf16", "group_size": 8, "bytes_each": 8},
        **{"wire_bytes_each": 7, "scope": "forward/blocks", "source": "dot_general"},
        **{"is_async": True, "name": "x"},
    }
    return Collective(**(fields | changes))


def told(text, **axes):
    return overlap(count_collectives(text, axis_sizes=axes), program_cost(text))


@pytest.mark.parametrize(
    "between, flops",
    [
        ("", 0),
        ("%c = f32[8,8] add(%w, %w)", 0),
        (DOT, 2 * 8**3),
        (LOOP, 6 * 2 * 8**3),
        (f"%n = f32[32,8] all-gather(%w), {GROUPS}", 0),
    ],
    ids=["nothing", "an addition", "a matmul", "a loop", "another gather"],
)
@pytest.mark.parametrize("start", ["all-gather-start", "async-start"])
def test_overlap_counts_only_matmuls_between_start_and_done(start, between, flops):
    call, done = GROUPS, start.replace("start", "done")
    wrapped = ""
    if start == "async-start":
        wrapped = f"""%wrapped (g: f32[8,8]) -> f32[32,8] {{
  %g = f32[8,8] parameter(0)
  ROOT %gathered = f32[32,8] all-gather(%g), {GROUPS}
}}

"""
        call = "calls=%wrapped"
    text = f"""{HEAD}{wrapped}ENTRY %main (w: f32[8,8], i: s32[]) -> f32[32,8] {{
  %w = f32[8,8] parameter(0)
  %i = s32[] parameter(1)
  %pair = (f32[8,8], s32[]) tuple(%w, %i)
  %before = f32[8,8] dot(%w, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %start = (f32[8,8], f32[32,8]) {start}(%w), {call}
  {between}
  %done = f32[32,8] {done}(%start)
  ROOT %after = f32[32,8] dot(%done, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    part = told(text, fsdp=4)["parameter_gathers"]
    sent = 3 * 8 * 8 * 4
    assert part.async_wire_bytes == sent
    assert (part.overlapped_wire_bytes, part.flops) == (sent * (flops > 0), flops)


# Weights of 1024 x 4096 and back in bf16, by 2 on tensor: see tests/fixtures/hlo/make.py.
@pytest.mark.parametrize(
    "compiler, gathers, reductions",
    [("tpu-jax0.10.2", 0.75, 0.0), ("tpu-jax0.12.0", 0.75, 0.0), ("gpu-jax0.10.2", 0.5, 0.25)],
)
def test_overlap_of_a_compiled_step(compiler, gathers, reductions):
    text = gzip.decompress((FIXTURES / f"train_step-{compiler}.txt.gz").read_bytes()).decode()
    found = told(text, data=2, fsdp=4, tensor=2)
    assert found["parameter_gathers"].share == gathers
    assert found["gradient_reductions"].share == reductions
    assert found["tensor_parallel"].wire_bytes > 0
    assert found["other"].wire_bytes == 0
    lines = list(overlap_lines(found))
    assert lines[0].startswith(f"gathers of parameters: {gathers:.1%} of 50,331,648 wire bytes")
    assert len(lines) == 3


def test_overlap_of_a_chain_of_fusions_is_what_carries_it():
    """What else stands between its start and its done moves nothing on."""
    text = gzip.decompress((FIXTURES / "train_step-tpu-jax0.10.2.txt.gz").read_bytes()).decode()
    found = count_collectives(text, axis_sizes={"data": 2, "fsdp": 4, "tensor": 2})
    assert [c.meanwhile for c in found if c.is_async] == [
        ("async-collective-start", "fusion.65", "async-collective-done"),
        ("async-collective-start.1", "fusion.72", "async-collective-done.1"),
        ("async-collective-start.2", "fusion.79", "fusion.86", "async-collective-done.2"),
    ]


@pytest.mark.parametrize(
    "changes, purpose",
    [
        ({}, "parameter_gathers"),
        ({"dtype": "s32"}, "other"),
        ({"axes": ("tensor",)}, "tensor_parallel"),
        ({"op": "all-reduce", "scope": "backward/blocks"}, "gradient_reductions"),
        ({"op": "reduce-scatter", "scope": "forward/loss"}, "gradient_reductions"),
        ({"op": "all-reduce", "scope": "", "source": ""}, "gradient_reductions"),
        ({"op": "all-reduce", "scope": "forward", "source": "reduce_sum"}, "other"),
        ({"op": "all-reduce", "scope": "optimizer", "source": "reduce_sum"}, "other"),
        ({"op": "all-reduce", "axes": ("tensor",), "scope": "backward"}, "tensor_parallel"),
        ({"op": "all-to-all"}, "other"),
        ({"op": "collective-permute"}, "other"),
    ],
)
def test_overlap_sorts_collectives_by_what_they_are_for(changes, purpose):
    assert purpose_of(collective(**changes)) == purpose


@pytest.mark.parametrize(
    "loop, purpose", [("ag", "parameter_gathers"), ("rs", "gradient_reductions")]
)
def test_overlap_of_a_collective_matmul_is_that_of_what_it_stands_for(loop, purpose):
    """XLA makes a loop of permutations of a gather or a reduction and its matmul."""
    permuted = f"""%start = (f32[8,8], f32[8,8]) collective-permute-start(%w), {PAIRS}
  {DOT}
  %inner = f32[8,8] collective-permute-done(%start)"""
    head = HEAD.replace(DOT.replace("%d", "%inner"), permuted)
    text = f"""{head}ENTRY %main (w: f32[8,8]) -> f32[8,8] {{
  %w = f32[8,8] parameter(0)
  %i = s32[] constant(0)
  %pair = (f32[8,8], s32[]) tuple(%w, %i)
  {LOOP}
  ROOT %y = f32[8,8] get-tuple-element(%l), index=0
}}
"""
    text = text.replace("%body", f"%wide.windowed_dot_general_body_{loop}.1")
    part = told(text, fsdp=4)[purpose]
    assert part.wire_bytes == part.overlapped_wire_bytes == 6 * 8 * 8 * 4
    assert part.flops == 6 * 2 * 8**3


def test_overlap_hides_no_more_than_is_computed_and_nothing_twice():
    sent = [collective(meanwhile=("a", "b")), collective(meanwhile=("b", "c")), collective()]
    assert hidden_seconds(sent, [2.0, 2.0, 2.0], {"a": 1.0, "b": 1.5, "d": 9.0}) == 2.5
    assert hidden_seconds(sent, [0.5, 0.25, 2.0], {"a": 1.0, "b": 1.5}) == 0.75
