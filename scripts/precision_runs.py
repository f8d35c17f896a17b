"""Trains one model under every precision policy, and writes the table of docs/precision.md.

    python scripts/precision_runs.py --page=docs/precision.md
    python scripts/precision_runs.py --page=docs/precision.md --only=experts    # of one section

The model is configs/lm_tiny.py on this Python's standard library, and the same with 8 experts of
half its MLP's width, 2 for a token. All runs have the same seed but for one, which shows what
another seed alone makes of the loss. What lies finished in --out is not trained again.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
from sections import write_section

NEAREST = (
    "--config.model.compute_dtype=bfloat16",
    "--config.model.param_dtype=bfloat16",
    "--config.optimizer.state_dtype=bfloat16",
)
EXPERTS = ("--config.moe.num_experts=8", "--config.moe.expert_mlp_dim=176")
RUNS = {
    **{
        name: (f"--config.precision={name}",)
        for name in ("float32", "bf16", "bf16_moments", "bf16_params", "int8", "fp8")
    },
    "bf16_params, rounded to nearest": NEAREST,
    "float32, another seed": ("--config.precision=float32", "--config.train.seed=1"),
}
TABLES = {
    "What each does to the loss": RUNS,
    "What each does to the loss, with experts": {
        name: (f"--config.precision={name}", *EXPERTS)
        for name in ("float32", "bf16", "int8", "fp8")
    },
}
"""By the page's section, which says what its runs have."""
LAST = 0.1
"""Share of the steps, at the end, over which the training loss is averaged."""


def train(words, *, num_steps, workdir):
    """Runs `spmd-train train`, which says so where the run is finished already."""
    subprocess.run(
        [
            *(sys.executable, "-m", "spmd_train", "train", "--config=configs/lm_tiny.py"),
            f"--workdir={workdir}",
            f"--config.train.num_steps={num_steps}",
            f"--config.train.eval_every={num_steps}",
            "--config.train.checkpoint_every=100",
            "--config.train.log_every=1",
            "--config.sample.prompt=",
            *words,
        ],
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def losses(workdir, *, num_steps):
    """Mean training loss of the last steps, and the evaluation's at the end; nats per token."""
    found = {"train": {}, "eval": {}}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["split"] in found and "loss" in record:
            found[record["split"]][record["step"]] = record["loss"]
    last = [loss for step, loss in found["train"].items() if step > num_steps * (1 - LAST)]
    return sum(last) / len(last), found["eval"][num_steps]


def table(results, *, num_steps):
    yield "| policy | training loss | evaluation loss | gap to float32 |"
    yield "| --- | ---: | ---: | ---: |"
    base = results["float32"][1]
    for name, (training, evaluation) in results.items():
        gap = "" if name == "float32" else f"{evaluation - base:+.4f}"
        yield f"| {name} | {training:.4f} | {evaluation:.4f} | {gap} |"
    yield ""
    yield (
        f"Nats per byte after {num_steps} steps of `configs/lm_tiny.py`; the training loss is the "
        f"mean of the last {num_steps * LAST:.0f} steps. {platform.machine()} CPU, "
        f"{os.cpu_count()} cores, jax {jax.__version__}, Python {platform.python_version()}."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=pathlib.Path, help="page whose table is written anew")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/precision"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="", help="the tables whose headings have this")
    args = parser.parse_args()
    for heading, runs in TABLES.items():
        if args.only not in heading:
            continue
        results = {}
        for name, words in runs.items():
            folder = f"{name}, experts" if runs is not RUNS else name
            workdir = args.out / folder.replace(", ", "-").replace(" ", "_")
            train(words, num_steps=args.steps, workdir=workdir)
            results[name] = losses(workdir, num_steps=args.steps)
        text = "\n".join(table(results, num_steps=args.steps))
        print(text)
        if args.page:
            write_section(args.page, heading, text)


if __name__ == "__main__":
    main()
