"""The HLO reader: text that breaks line-based readers, shapes, name stacks, trip counts."""

import pytest

from spmd_train.inspect.hlo import array_bytes, clean_op_name, parse_hlo, split_list
from spmd_train.inspect.loops import trip_count

PALLAS = """HloModule jit_f, is_scheduled=true, frontend_attributes={a="{"}, num_partitions=4

FileNames
1 "/home/me/odd {name}.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%add.1 (a.2: f32[], b.3: f32[]) -> f32[] {
  %b.3 = f32[] parameter(1)
  %a.2 = f32[] parameter(0)
  ROOT %add.4 = f32[] add(%a.2, %b.3), metadata={op_name="say \\"}\\" twice"}
}

ENTRY %main.9 (param.6: f32[8,4]) -> f32[8,4] {
  %param.6 = f32[8,4]{1,0:T(8,128)} parameter(0), sharding={devices=[4,1]<=[4]}
  %kernel = (f32[8,4]{1,0:T(8,128)S(1)}, /*index=1*/f32[]) custom-call(%param.6, /*index=1*/%param.6), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"all-reduce(\\": {}}"
}}, metadata={op_name="jit(f)/kernel"}
  %get-tuple-element.2 = f32[8,4]{1,0} get-tuple-element(%kernel), index=0
  ROOT %all-reduce.7 = f32[8,4]{1,0} all-reduce(%get-tuple-element.2), channel_id=1, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%add.1, backend_config={"debug":"\\ncolors {1}","n":[{"a":"}"}]}
}

"""  # noqa: E501


def test_hlo_reads_strings_braces_and_line_breaks_in_attributes():
    module = parse_hlo(PALLAS)
    assert (module.name, module.num_partitions, module.replica_count) == ("jit_f", 4, 1)
    assert list(module.computations) == ["add.1", "main.9"]
    assert module.entry.name == "main.9"
    assert module.num_instructions == 7
    assert [i.opcode for i in module.entry.instructions.values()] == [
        "parameter",
        "custom-call",
        "get-tuple-element",
        "all-reduce",
    ]
    kernel, reduce = (module.entry.instructions[n] for n in ("kernel", "all-reduce.7"))
    assert kernel.operands == ("param.6", "param.6")
    assert kernel.shape == "(f32[8,4]{1,0:T(8,128)S(1)}, /*index=1*/f32[])"
    assert kernel.op_name == "jit(f)/kernel"
    assert module.entry.root is reduce
    assert reduce.attributes["replica_groups"] == "[1,4]<=[4]"
    assert reduce.callees == {"to_apply": ("add.1",)}


def test_hlo_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="no HloModule"):
        parse_hlo("module @jit_f {}")
    with pytest.raises(ValueError, match=r"cannot read this HLO instruction.*surprise"):
        parse_hlo(PALLAS.replace("%get-tuple-element.2 = f32[8,4]{1,0}", "surprise:"))
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo(PALLAS.replace("ENTRY ", ""))


@pytest.mark.parametrize(
    ("shape", "arrays"),
    [
        ("f32[]", [("f32", 4)]),
        ("bf16[4,1024]{1,0:T(8,128)(2,1)S(1)}", [("bf16", 8192)]),
        ("(s4[3]{0}, pred[7], /*index=2*/f8e4m3fn[<=5], c64[2])",
         [("s4", 2), ("pred", 7), ("f8e4m3fn", 5), ("c64", 16)]),
        ("((f32[2]), token[], u32[0])", [("f32", 8), ("token", 0), ("u32", 0)]),
    ],
)  # fmt: skip
def test_hlo_array_bytes(shape, arrays):
    assert array_bytes(shape) == arrays


def test_hlo_element_type_without_size_is_refused():
    with pytest.raises(ValueError, match="quux"):
        array_bytes("quux[3]")


def test_hlo_split_list_keeps_brackets_and_strings_whole():
    assert split_list('a={1,2}, b="x,y", c=f(1,[2,3]), ') == ["a={1,2}", 'b="x,y"', "c=f(1,[2,3])"]


@pytest.mark.parametrize(
    ("op_name", "scope", "source"),
    [
        ("jit(step)/jvp()/while/body/closed_call/mlp/bd,df->bf/dot_general",
         "forward/mlp/bd,df->bf", "dot_general"),
        ("jit(step)/train/transpose(jvp(model))/while/body/eval_jaxpr/checkpoint/mlp/dot_general",
         "backward/train/model/mlp", "dot_general"),
        ("jit(s)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/mlp/"
         "jit(relu)/max", "recompute/mlp", "max"),
        ("jit(s)/optimizer/reduce_sum", "optimizer", "reduce_sum"),
        ("jit(f)/shard_map/cond/branch_1_fun/psum", "", "psum"),
        ("jit(f)/vmap(attention)/custom_vjp_call/dot", "attention", "dot"),
        ("jit(o)/train/(jvp(model)/head/reduce_sum:transpose(jvp(model))/head/dot_general)",
         "forward/train/model/head + backward/train/model/head", "reduce_sum+dot_general"),
        ("", "", ""),
    ],
)  # fmt: skip
def test_hlo_op_name_becomes_scope_and_source(op_name, scope, source):
    assert clean_op_name(op_name) == (scope, source)


LOOP = """HloModule loop

%step (a: s32[], b: s32[]) -> s32[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %r = s32[] {update}(%a, %b)
}}

%body (p: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {{
  %p = (s32[], f32[4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %c = s32[] constant({step})
  %j = s32[] copy(%i)
  %next = s32[] fusion(%j, %c), kind=kLoop, calls=%step
  ROOT %t = (s32[], f32[4], s32[]) tuple(%next, %x, %n)
}}

%less (a.1: s32[], b.1: s32[]) -> pred[] {{
  %a.1 = s32[] parameter(0)
  %b.1 = s32[] parameter(1)
  ROOT %c.1 = pred[] compare(%a.1, %b.1), direction={direction}
}}

%condition (p.1: (s32[], f32[4], s32[])) -> pred[] {{
  %p.1 = (s32[], f32[4], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  ROOT %c.2 = pred[] fusion(%i.1, %n.1), kind=kLoop, calls=%less
}}

ENTRY %main (x.1: f32[4], bound: s32[]) -> (s32[], f32[4], s32[]) {{
  %x.1 = f32[4] parameter(0)
  %bound = s32[] parameter(1)
  %start = s32[] constant({start})
  %stop = s32[] constant({stop})
  %t.1 = (s32[], f32[4], s32[]) tuple(%start, %x.1, {bound})
  ROOT %w = (s32[], f32[4], s32[]) while(%t.1), condition=%condition, body=%body{known}
}}
"""


def _trips(**changes):
    parts = {
        "update": "add", "step": 1, "direction": "LT", "start": 0, "stop": 7, "bound": "%stop",
        "known": "",
    } | changes  # fmt: skip
    module = parse_hlo(LOOP.format(**parts))
    return trip_count(module, module.entry, module.entry.root)


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 7),
        ({"start": 2, "step": 3}, 2),  # 2, 5
        ({"start": 3}, 4),
        ({"start": 9}, 0),
        ({"direction": "LE"}, 8),
        ({"direction": "NE"}, 7),
        ({"direction": "NE", "step": 2}, None),  # steps over it
        ({"update": "subtract", "direction": "GT", "start": 7, "stop": 0}, 7),
        ({"step": -2, "direction": "GE", "start": 7, "stop": 0}, 4),  # 7, 5, 3, 1
        ({"step": 0}, None),
        ({"step": -1}, None),
        ({"update": "multiply", "start": 1}, None),
        ({"bound": "%bound"}, None),  # an argument of the program
        ({"bound": "%bound", "known": ', backend_config={"known_trip_count":{"n":"11"}}'}, 11),
    ],
)
def test_hlo_trip_count(changes, trips):
    assert _trips(**changes) == trips
