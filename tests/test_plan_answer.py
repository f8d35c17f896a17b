"""`spmd-train plan` on CPU targets: its contract, its figures, its exit codes."""

import dataclasses
import json
import math
import pathlib

import jax
import pytest

from spmd_train import experiment
from spmd_train.cli.main import main
from spmd_train.config import MeshConfig, parse, schema
from spmd_train.inspect.collectives import Collective
from spmd_train.parallel.schedules import SCHEDULES
from spmd_train.plan import search as search_module
from spmd_train.plan.candidates import Ticks
from spmd_train.plan.compiled import CompiledStep, DoesNotFitError, compile_step
from spmd_train.plan.estimate import estimate
from spmd_train.plan.hlo_cost import program_cost
from spmd_train.plan.lints import LINTS, find_lints
from spmd_train.plan.search import search
from spmd_train.plan.sizes import state_bytes
from spmd_train.plan.targets import parse_target
from spmd_train.plan.trace_cost import trace_cost

TINY = f"--config={pathlib.Path(__file__).parent.parent / 'configs' / 'lm_tiny.py'}"
SMALL = {
    "model": {
        "num_layers": 4,
        "embed_dim": 64,
        "mlp_dim": 128,
        "vocab_size": 256,
        "scan_unroll": 1,
    },
    "data": {"sequence_length": 64},
    "train": {"global_batch_size": 16},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "optimizer": {"name": "adamw"},
}
WORDS = [
    f"--config.{section}.{key}={value}"
    for section, keys in SMALL.items()
    for key, value in keys.items()
]


@pytest.fixture
def answer(capsys):
    def answer(*argv, code=0):
        assert main(["plan", TINY, "--target=cpu:8", *WORDS, *argv, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return answer


def small(**sections):
    return parse({k: SMALL.get(k, {}) | sections.get(k, {}) for k in {*SMALL, *sections}})


def test_plan_json_is_the_contract(answer, tmp_path):
    told = answer(
        f"--html={tmp_path / 'plan.html'}",
        "--config.plan.chip.flops=1e10",
        "--config.plan.chip.hbm_bandwidth=1e12",
        "--config.plan.chip.ici_bandwidth=1e8",
        "--config.plan.tokens=1000000",
        "--config.plan.dollars_per_device_hour=2",
        "--config.plan.watts_per_device=500",
    )
    assert list(told) == [
        *("target", "num_devices", "mesh", "fits", "hbm_bytes", "per_device", "collectives"),
        *("wire_bytes", "flops", "compile_seconds", "predicted", "details"),
    ]
    assert (told["target"], told["num_devices"], told["fits"]) == ("cpu:8", 8, True)
    assert {a: n for a, n in told["mesh"].items() if n > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    memory = told["per_device"]
    assert memory["peak_bytes"] == (
        memory["argument_bytes"]
        + memory["output_bytes"]
        - memory["alias_bytes"]
        + memory["temp_bytes"]
    )
    assert told["collectives"] and all(
        list(row) == ["op", "axes", "network", "count", "bytes", "wire_bytes", "scope"]
        for row in told["collectives"]
    )
    assert told["wire_bytes"] == sum(row["wire_bytes"] for row in told["collectives"])
    # 6 FLOPs for each weight and token, and causal attention: by hand.
    layer = 4 * 64 * 64 + 3 * 64 * 128
    per_token = 6 * (4 * layer + 64 * 256) + 6 * 4 * 64 * 64
    assert told["flops"]["model"] == per_token * 16 * 64 / 8
    assert told["flops"]["program"] > told["flops"]["model"]
    predicted = told["predicted"]
    assert predicted["tokens_per_second"] == pytest.approx(16 * 64 / predicted["step_seconds"])
    assert predicted["mfu"] == pytest.approx(
        told["flops"]["model"] / predicted["step_seconds"] / 1e10
    )
    assert predicted["bound"] == "ici"
    seconds = told["details"]["seconds"]
    assert seconds["compute"] == pytest.approx(told["flops"]["program"] / 1e10)
    assert seconds["step"] == pytest.approx(seconds["on_chip"] + seconds["ici"])
    run = told["details"]["run"]
    assert run["device_hours"] == pytest.approx(1e6 / predicted["tokens_per_second"] / 3600 * 8)
    assert run["dollars"] == pytest.approx(2 * run["device_hours"])
    assert run["kilowatt_hours"] == pytest.approx(0.5 * run["device_hours"])
    page = (tmp_path / "plan.html").read_text()
    assert page.startswith("<!doctype html>") and "Memory of a device" in page
    assert "fsdp, ICI</span>" in page and f"MFU {predicted['mfu']:.1%}" in page.split("<h2>")[0]
    assert "http" not in page.split("<pre>")[0]


def test_plan_that_does_not_fit_exits_with_3_and_names_what_does(answer):
    whole = answer("--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.mesh.tensor=1")
    limit = whole["per_device"]["peak_bytes"] * 0.7
    told = answer(
        "--config.mesh.data=8",
        "--config.mesh.fsdp=1",
        "--config.mesh.tensor=1",
        f"--config.plan.chip.hbm_bytes={limit}",
        code=3,
    )
    assert told["fits"] is False and told["hbm_bytes"] == int(limit)
    words = told["details"]["advice"].split()
    assert words and all(word.startswith("--config.") for word in words)
    changed = answer(
        *("--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.mesh.tensor=1", *words),
        f"--config.plan.chip.hbm_bytes={limit}",
    )
    assert changed["fits"] is True


def test_plan_of_a_program_that_the_compiler_refuses(answer, monkeypatch):
    refusal = DoesNotFitError("XLA:TPU: Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G")
    assert refusal.needed_bytes == 20.5 * 2**30

    def refuse(*args, **kwargs):
        raise refusal

    monkeypatch.setattr("spmd_train.cli.plan.compile_step", refuse)
    monkeypatch.setattr("spmd_train.plan.advice.compile_step", refuse)
    told = answer(code=3)
    assert told["per_device"]["peak_bytes"] == 20.5 * 2**30
    assert told["fits"] is False and told["collectives"] == []
    assert told["details"]["advice"].startswith("not found in")


def test_plan_lints_have_names_that_silence_them(answer, capsys):
    # 256 x 64 embeddings are too small to mind; an axis that nothing uses is not.
    words = ["--config.sharding.rules.mlp=none", "--config.sharding.rules.heads=none"]
    words += ["--config.sharding.rules.kv_heads=none", "--config.sharding.rules.vocab=none"]
    lints = {lint["name"]: lint["message"] for lint in answer(*words)["details"]["lints"]}
    assert "mesh axis tensor of size 2 shards nothing" in lints["unused-axis"]
    silenced = answer(*words, "--config.plan.silence=unused-axis")["details"]["lints"]
    assert "unused-axis" not in {lint["name"] for lint in silenced}
    argv = ["plan", TINY, "--target=cpu:8", *WORDS, "--config.plan.silence=unused-axs"]
    assert main(argv) == 2
    assert "'unused-axs' is no lint; there are replicated-param" in capsys.readouterr().err
    assert tuple(LINTS) == schema.LINTS


def collective(**changes):
    fields = {
        **{"op": "all-gather", "axes": ("fsdp",), "slices": 1, "count": 4},
        **{"conditional": False, "dtype": "f32", "group_size": 8, "bytes_each": 2**25},
        **{"wire_bytes_each": 2**25, "scope": "forward/blocks/mlp", "source": "dot_general"},
        **{"is_async": False, "name": "x"},
    }
    return Collective(**(fields | changes))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("reshard-in-scan", {"op": "all-to-all"}),
        ("gathered-optimizer-state", {"scope": "optimizer/mul", "count": 1}),
        ("slow-network-per-layer", {"slices": 2}),
        ("", {}),
        ("", {"op": "collective-permute", "source": "ppermute"}),
        ("", {"slices": 2, "count": 1}),
    ],
)
def test_plan_lints_on_what_a_step_sends(name, changes):
    config = small(mesh={"data": 1, "fsdp": 8, "tensor": 1})
    step = CompiledStep(
        hlo_text="",
        memory={},
        collectives=[collective(**changes)],
        lower_seconds=0.0,
        compile_seconds=0.0,
    )
    program = experiment.build(config).program
    lints = find_lints(config, program=program, step=step, cost=None, target=parse_target("cpu:8"))
    assert [lint.name for lint in lints] == ([name] if name else [])


@pytest.mark.parametrize(
    "mesh", [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_plan_state_bytes_are_the_compilers_argument_bytes(mesh):
    program = experiment.build(small(mesh=mesh)).program
    step = compile_step(program)
    state = state_bytes(program.plans)
    batch = {k: v for k, v in program.abstract_batch.items() if k != "row"}  # For dropout alone.
    batch_bytes = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in batch.values()
    )
    assert state.parameters + state.optimizer + batch_bytes == step.memory["argument_bytes"]


@pytest.mark.parametrize("remat", ["none", "projections", "full"])
def test_plan_traced_flops_are_the_compiled_programs(remat):
    config = small(model={"remat": remat}, mesh={"data": 1, "fsdp": 8, "tensor": 1})
    cost = program_cost(compile_step(experiment.build(config).program).hlo_text)
    alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
    traced = trace_cost(
        experiment.build(alone, devices=jax.devices()[:1]).program, embed_dim=64, num_layers=4
    )
    assert traced.flops / 8 == cost.flops


def run_search(config, *, target="cpu:8", **changes):
    return search(
        config,
        target=parse_target(target),
        devices=jax.devices(),
        build=experiment.build,
        options={},
        num_compiled=2,
        **changes,
    )


def test_plan_search_recommends_what_compiles_and_fits(monkeypatch):
    compiled = []

    def sometimes(program, *, options):
        mesh = {a: n for a, n in program.mesh.shape.items() if n > 1}
        compiled.append(mesh)
        if len(compiled) == 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: the compiler has a fault")
        return compile_step(program, options=options)

    monkeypatch.setattr(search_module, "compile_step", sometimes)
    result = run_search(small())
    assert result.winner is not None and result.rows[0] is result.winner
    winner = {a: n for a, n in result.winner.candidate.mesh.items() if n > 1}
    assert winner in compiled[1:] and winner != compiled[0]
    failed = [row for row in result.rows if row.verdict.startswith("failed to compile")]
    assert [{a: n for a, n in r.candidate.mesh.items() if n > 1} for r in failed] == compiled[:1]
    # Meshes of 8 over three axes, remat policies, accumulations that divide the batch of 16.
    assert result.num_considered >= 100
    assert all(row.verdict for row in result.rows)
    again = parse(_nested(result.winner.candidate.overrides))
    program = experiment.build(small(mesh=dataclasses.asdict(again.mesh))).program
    assert {a: n for a, n in program.mesh.shape.items() if n > 1} == winner


def test_plan_search_refuses_what_it_would_overwrite(capsys):
    words = ("--config.model.remat=names", "--config.model.remat_saved=query", "--search")
    assert main(["plan", TINY, "--target=cpu:8", *words]) == 2
    assert "it chooses among none, projections, dots, full itself" in capsys.readouterr().err


def test_plan_search_does_not_compile_what_cannot_fit(monkeypatch):
    monkeypatch.setattr(
        search_module, "compile_step", lambda *args, **kwargs: pytest.fail("compiled")
    )
    result = run_search(small(plan={"chip": {"hbm_bytes": 1e5}}))
    assert result.winner is None
    assert result.num_too_large == result.num_considered
    assert {row.plan for row in result.rows} == {None}


def test_plan_search_tries_pipelines_and_says_what_they_wait_for(monkeypatch):
    compiled = []

    def note(program, *, options):
        compiled.append(program.pipeline and program.pipeline.schedule.name)
        raise jax.errors.JaxRuntimeError("INTERNAL: not now")

    monkeypatch.setattr(search_module, "compile_step", note)
    # Where the network is slow, few activations are less than all weights or all sums.
    chip = {"flops": 1e12, "hbm_bandwidth": 1e13, "ici_bandwidth": 1e7}
    config = small(
        model={"mlp_dim": 1024},
        train={"global_batch_size": 16},
        data={"sequence_length": 16},
        plan={"chip": chip | {"hbm_bytes": 1e12}},
    )
    result = run_search(config, target="h100:1x8")
    assert compiled[0] in ("1f1b", "zero_bubble", "interleaved")
    rows = [row for row in result.rows if row.candidate.ticks]
    assert {row.candidate.ticks.schedule for row in rows} == set(SCHEDULES)
    best = min(rows, key=lambda row: row.seconds).candidate
    assert best.ticks.num_stages == best.mesh["pipeline"] == 4
    assert best.overrides["pipeline.num_microbatches"] == best.ticks.num_microbatches >= 8
    # With a fast network a stage's waiting is what it loses by.
    fast = small(
        model={"compute_dtype": "float32"},
        plan={"chip": {k: 1e15 for k in chip} | {"flops": 1e9, "hbm_bytes": 1e12}},
        train={"global_batch_size": 8},
    )
    result = run_search(fast, target="h100:1x8")
    deep = [r for r in result.rows if r.candidate.ticks and r.candidate.ticks.schedule == "gpipe"]
    assert deep and all("bubble: a stage waits" in row.verdict for row in deep)
    one = Ticks("gpipe", 4, 8, 1)
    assert one.bubble == pytest.approx(3 / 11)  # (P - 1) / (M + P - 1)


@pytest.mark.parametrize(("target", "part"), [("h100:1x8", 0.52 / 3), ("cpu:8", 0.0)])
def test_plan_search_hides_of_the_network_what_that_compiler_does(monkeypatch, target, part):
    """Parameters gathered take a third of the time over fsdp, gradients summed two."""
    found = {}

    def note(candidate, *args, **kwargs):
        answer = estimate(candidate, *args, **kwargs)
        if candidate.mesh["fsdp"] == 8 and candidate.remat == "none" and not candidate.ticks:
            found[candidate.accumulation] = answer
        return answer

    monkeypatch.setattr(search_module, "estimate", note)
    chip = {"flops": 1e9, "hbm_bandwidth": 1e9, "ici_bandwidth": 1e9, "hbm_bytes": 1}
    run_search(small(plan={"chip": chip}), target=target)
    parts = found[1].parts
    assert parts["ici"] > 0
    on_chip = max(parts["compute"], parts["hbm"])
    assert found[1].step == pytest.approx(on_chip + parts["ici"] * (1 - part))


def test_plan_of_a_pipeline_counts_its_units_and_its_bubble(answer, tmp_path):
    words = ("--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    words += ("--config.mesh.pipeline=4", "--config.pipeline.num_microbatches=8")
    rates = ("--config.plan.chip.flops=1e10", "--config.plan.chip.hbm_bandwidth=1e12")
    rates += ("--config.plan.chip.ici_bandwidth=1e15", f"--html={tmp_path / 'plan.html'}")
    told = answer(*words, *rates)
    layers, head = 6 * 4 * (4 * 64 * 64 + 3 * 64 * 128), 6 * 64 * 256
    attention = 2 * 6 * 4 * 64 * 64  # Whole, not its causal half.
    tokens = 16 * 64 / 2
    # A stage has a layer, runs it once forward, once more and twice backward; the count is that of
    # the last one, which has the head, but also of the first F, which is left out there.
    expected = (layers + attention) / 4 * tokens * 4 / 3 + head * tokens
    assert told["flops"]["program"] == pytest.approx(expected, rel=0.05)
    seconds = told["details"]["seconds"]
    share = seconds["bubble"] / (seconds["bubble"] + seconds["on_chip"])
    assert share == pytest.approx(Ticks("1f1b", 4, 8, 1).bubble)
    page = (tmp_path / "plan.html").read_text()
    assert "<svg" in page and "stage 3" in page and "waits for stages" in page


def _nested(overrides):
    config = {}
    for path, value in overrides.items():
        *sections, name = path.split(".")
        at = config
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return config
