"""How a train step's costs grow with the model and the mesh: tables, plots, exponents.

    python scripts/plan_growth.py
    python scripts/plan_growth.py --no_run

Each point is a process of its own that traces, compiles, plans and, on at most 16 simulated
devices, runs a step of a small model under FSDP over all devices. What was measured is kept under
docs/growth/ and not measured again; --no_run writes the page from there. Times are seconds of CPU,
which other work on the machine changes little. The points on TPU pods need libtpu (extra plan-tpu).
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from sections import write_section

ROOT = pathlib.Path(__file__).parent.parent
BASE = {
    "model.num_layers": 4,
    "model.embed_dim": 128,
    "model.num_heads": 4,
    "model.mlp_dim": 352,
    "model.vocab_size": 4096,
    "model.scan_unroll": 1,
    "model.remat": "full",
    "data.sequence_length": 128,
    "optimizer.name": "adamw",
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "train.global_batch_size": 16,
}
POD = {"model.embed_dim": 1024, "model.mlp_dim": 2816, "train.global_batch_size": 1024}
# Name, heading, config key or empty for the devices, fixed keys, targets or values.
SWEEPS = (
    ("layers", "layers", "model.num_layers", {}, (4, 16, 48, 96)),
    ("vocabulary", "vocabulary", "model.vocab_size", {}, (1024, 8192, 65536, 262144)),
    ("sequence", "tokens of a sequence", "data.sequence_length", {}, (128, 512, 1024, 2048)),
    (
        "devices",
        "simulated CPU devices",
        "",
        {"train.global_batch_size": 64},
        ("cpu:1", "cpu:4", "cpu:16", "cpu:64"),
    ),
    (
        "chips",
        "TPU chips that are not here",
        "",
        POD,
        ("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x16"),
    ),
)
MEASURES = {
    "hlo_bytes": ("HLO text, kB", 1e-3),
    "num_instructions": ("HLO instructions", 1.0),
    "compile_seconds": ("trace and compile, CPU s", 1.0),
    "plan_seconds": ("plan, CPU s", 1.0),
    "host_bytes": ("host memory, GB", 1e-9),
    "step_seconds": ("step, CPU s", 1.0),
}
MOST_RUN = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, default=ROOT / "docs" / "growth")
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "growth.md")
    parser.add_argument("--only", default="", help="measure only the sweep of this name")
    parser.add_argument("--no_run", action="store_true", help="only write the page")
    parser.add_argument("--point", help="measure one point, given as JSON, and print it")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(**json.loads(args.point))))
        return
    args.rows.mkdir(parents=True, exist_ok=True)
    for name, heading, key, fixed, values in SWEEPS:
        path = args.rows / f"{name}.json"
        points = json.loads(path.read_text()) if path.exists() else {}
        for value in () if args.no_run or args.only not in ("", name) else values:
            if str(value) in points:
                continue
            target, changes = ("cpu:8", {key: value}) if key else (value, {})
            points[str(value)] = run_point(target, BASE | fixed | changes)
            path.write_text(json.dumps(points, indent=1) + "\n")
        if points:
            (args.rows / f"{name}.svg").write_text(plot(points, heading))
            write_section(args.table, f"Growth with {heading}", section(name, heading, points))


def run_point(target, config):
    print(f"{target} {config} ...", file=sys.stderr, flush=True)
    point = json.dumps({"target": target, "config": config})
    with tempfile.TemporaryDirectory() as cache:  # Nothing is to come from earlier compilations.
        done = subprocess.run(
            [sys.executable, __file__, f"--point={point}"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def measure(*, target, config):
    """A point: what its program costs to make and to run."""
    from made_up import Run  # These start JAX.

    from spmd_train import experiment
    from spmd_train.config import ExperimentConfig, with_values
    from spmd_train.plan.answer import make_plan
    from spmd_train.plan.compiled import compile_step
    from spmd_train.plan.targets import parse_target
    from spmd_train.plan.topologies import compiler_options, open_target

    where, parsed = parse_target(target), with_values(ExperimentConfig(), config)
    with open_target(where) as devices:
        program = experiment.build(parsed, devices=devices).program
        begin = time.process_time()
        step = compile_step(program, options=compiler_options(where))
        middle = time.process_time()
        plan = make_plan(parsed, target=where, program=program, step=step)
        end = time.process_time()
        seconds = None
        host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if where.platform == "cpu" and where.num_chips <= MOST_RUN:
            run = Run(program, vocab_size=parsed.model.vocab_size)
            for _ in range(5):
                run.step()
            seconds = min(run.cpu_seconds)
    return {
        "size": where.num_chips,
        "hlo_bytes": len(step.hlo_text.encode()),
        "num_instructions": plan.cost.num_instructions,
        "compile_seconds": middle - begin,
        "plan_seconds": end - middle,
        "host_bytes": host_bytes,
        "step_seconds": seconds,
    }


def sizes_of(points):
    """What a sweep changes, as a number: the key's value, or the devices of a target."""
    return [int(name) if name.isdigit() else point["size"] for name, point in points.items()]


def curves(points):
    """Measure to (size, value), where it was measured."""
    sizes = sizes_of(points)
    drawn = {}
    for measure_name in MEASURES:
        pairs = [(n, p[measure_name]) for n, p in zip(sizes, points.values(), strict=True)]
        pairs = [(n, value) for n, value in pairs if value is not None]
        if len(pairs) > 1:
            drawn[measure_name] = pairs
    return drawn


def exponent(pairs):
    """b of the power law a * size**b that fits best, all points alike."""
    x, y = np.log(np.array(pairs, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def plot(points, heading):
    """Each measure against the size, relative to the smallest size, both logarithmic."""
    from spmd_train.observe.html import line_chart

    series = {
        MEASURES[name][0].split(",")[0]: [(n, value / pairs[0][1]) for n, value in pairs]
        for name, pairs in curves(points).items()
    }
    svg = "".join(line_chart(series, logarithmic=True))
    head = (
        f"<title>{heading}</title><style>text{{font:11px sans-serif}}.grid{{stroke:#ddd}}</style>"
    )
    head += "<rect width='100%' height='100%' fill='white'/>"
    opened, rest = svg.split(">", 1)
    return f"{opened} xmlns='http://www.w3.org/2000/svg'>{head}{rest}\n"


def section(name, heading, points):
    drawn = curves(points)
    heads = [heading, *(MEASURES[m][0] for m in drawn)]
    lines = [heads, ["---"] * len(heads)]
    for label, point in points.items():
        values = [point[m] for m in drawn]
        scaled = [v and v * MEASURES[m][1] for m, v in zip(drawn, values, strict=True)]
        lines.append([label, *("" if v is None else f"{v:,.4g}" for v in scaled)])
    lines.append(["**exponent**", *(f"**{exponent(pairs):.2f}**" for pairs in drawn.values())])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"![relative to the smallest](growth/{name}.svg)\n\n{table}\n"


if __name__ == "__main__":
    main()
