"""What each thing that is done for XLA's CPU compiler is worth: a train step without it.

    python scripts/cpu_cures.py --shape=S --cores=1

Each row is a process of its own that trains the bench's problem with one cure left out. The CPU
time of one core hardly depends on what else the machine does; --cores=2 tells how two are used.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

import bench
import jax
import numpy as np

from spmd_train import cluster, experiment, xla_flags
from spmd_train.cli import allocator
from spmd_train.config import load_config, parse
from spmd_train.nn import attention, cpu, embeddings, mlp, projection

CURES = {
    "keeping the step's temporaries: huge pages instead": "kept",
    "keeping them, nor huge pages": "pages",
    "angles of RoPE computed once": "rope",
    "a projection's gradients as two-dimensional matmuls": "gradients",
    "rows of 2 KiB kept apart": "apart",
    "SwiGLU's own derivative": "swiglu",
    "causal attention by blocks of queries": "blocks",
    "attention's own derivative": "attention",
    "gradients of blocks added up in place": "cut",
    "YNNPACK's matmuls off": "ynnpack",
    "YNNPACK's sums on": "sums",
    "layers unrolled (`model.scan_unroll`)": "unrolled",
    "float32: bfloat16 activations and matmuls instead": "float32",
}
OVERRIDES = {
    "unrolled": ("model.scan_unroll", "1"),
    "float32": ("model.compute_dtype", "bfloat16"),
}
WARM_STEPS = 2


def environment_of(cure: str) -> dict[str, str]:
    """The variables of a row's process: its allocator, as the command chooses it."""
    environ = {**os.environ, "LD_PRELOAD": "", "GLIBC_TUNABLES": ""}
    if cure == "pages":
        return environ
    libraries = "" if cure == "kept" else allocator.keeping_libraries()
    switch, libc = allocator.huge_page_switch(), allocator.libc_version()
    return (
        allocator.with_libraries(environ, libraries)
        or allocator.with_huge_pages(environ, switch=switch, libc=libc)
        or environ
    )


def leave_out(cure: str) -> None:
    """Undoes a cure in this process; those of the environment and the config are elsewhere."""
    if cure == "rope":
        _replace(embeddings, "computed_once", lambda x: x)
    elif cure == "gradients":
        _replace(projection, "matrix_product", lambda: None)
    elif cure == "apart":
        _replace(projection, "matrix_product", lambda: cpu.together)
    elif cure == "swiglu":
        _replace(mlp, "swiglu", lambda gate, up: jax.nn.silu(gate) * up)
    elif cure == "blocks":
        attention.QUERY_BLOCK["cpu"] = sys.maxsize
    elif cure == "attention":
        _replace(attention, "softmax_attend", attention.plain_attend)
    elif cure == "cut":
        _replace(attention, "cut", lambda x, spans: [x[:, start:end] for start, end in spans])
    elif cure == "ynnpack":
        xla_flags.FLAGS["cpu"].clear()
    elif cure == "sums":
        ((name, flag),) = xla_flags.FLAGS["cpu"].items()
        xla_flags.FLAGS["cpu"][name] = flag._replace(value=f"{flag.value},-reduce")


def _replace(module: ModuleType, name: str, value: Any) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


def measure(problem: pathlib.Path, *, without: str, num_steps: int) -> dict[str, float]:
    """Trains in this process; seconds a step: the least CPU time, the median of the clock."""
    leave_out(without)
    cluster.start()
    overrides = [OVERRIDES[without]] if without in OVERRIDES else []
    config = parse(load_config(str(problem / "config.json"), overrides))
    program = experiment.build(config).program
    state = program.init(config.train.seed)
    dataset = experiment.open_data(config, split="train")
    records = []
    for step in range(num_steps):
        batch = dataset.batch(step, global_batch_size=config.train.global_batch_size)
        batch = {name: batch[name] for name in program.abstract_batch}
        begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        state, _ = jax.block_until_ready(program.train_step(state, batch))
        now, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - begin
        cpu_seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        records.append((cpu_seconds, seconds, now.ru_minflt - used.ru_minflt))
    cpu_seconds, seconds, faults = np.array(records[WARM_STEPS:]).T
    return {
        "cpu_seconds": float(cpu_seconds.min()),
        "seconds": float(np.median(seconds)),
        "page_faults": float(np.median(faults)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="S", choices=bench.SHAPES)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--num_steps", type=int, default=10)
    every = ",".join(CURES.values())
    parser.add_argument("--only", default=every, help=f"comma-separated: {every}")
    parser.add_argument("--problem", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.problem:
        answer = measure(args.problem, without=args.without, num_steps=args.num_steps)
        print(json.dumps(answer))
        return
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: args.cores])
    print(f"| {args.shape}, {args.cores} core | CPU s a step | s a step | page faults a step |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        problem = pathlib.Path(folder) / "problem"
        bench.make_problem(problem, bench.SHAPES[args.shape], num_steps=1)
        chosen = {name: cure for name, cure in CURES.items() if cure in args.only.split(",")}
        for name, cure in {"all of them": "", **chosen}.items():
            flags = [f"--problem={problem}", f"--without={cure}", f"--num_steps={args.num_steps}"]
            done = subprocess.run(
                [sys.executable, __file__, *flags],
                env=environment_of(cure),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            cells = json.loads(done.stdout.splitlines()[-1])
            words = name if not cure else f"without {name}"
            print(
                f"| {words} | {cells['cpu_seconds']:.3f} | {cells['seconds']:.3f} "
                f"| {cells['page_faults']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
