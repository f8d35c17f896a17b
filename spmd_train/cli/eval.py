"""`spmd-train eval`."""

from __future__ import annotations

import argparse
import json

from spmd_train import experiment


def run(args: argparse.Namespace) -> int:
    """Evaluates a checkpoint on the whole evaluation split."""
    data = experiment.open_data(args.config, split="eval")
    built, params, step = experiment.load_params(args.config, workdir=args.workdir, step=args.step)
    values = built.evaluate(params, data)
    if args.json:
        print(json.dumps({"step": step, "split": "eval", **values}))
    else:
        print(f"step {step}: " + ", ".join(f"{n} {v:.6g}" for n, v in sorted(values.items())))
    return 0
