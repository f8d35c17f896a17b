"""`spmd-train convert export`: a run's checkpoint becomes a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import jax

from spmd_train import experiment
from spmd_train.folders import make_folder, writing
from spmd_train.interop import hf_config, save_params


def run(args: argparse.Namespace) -> int:
    """Exports a checkpoint of `args.workdir` to `args.hf_dir`, in the dtype of its parameters."""
    model, moe, data = args.config.model, args.config.moe, args.config.data
    if model.positions == "rope":
        # Only readers of the export want to know; what was trained on is a lower bound.
        length = max(model.max_positions, data.sequence_length)
        model = dataclasses.replace(model, max_positions=length)
    hf_config(model, moe=moe)  # What cannot be exported need not be read.
    make_folder(args.hf_dir.absolute().parent, flag="hf_dir")
    _, params, step = experiment.load_params(args.config, workdir=args.workdir, step=args.step)
    with writing(args.hf_dir, flag="hf_dir"):
        files = save_params(
            params, config=model, moe=moe, hf_dir=args.hf_dir, dtype=model.param_dtype
        )
        tokenizer = Path(data.tokenizer)
        if tokenizer.is_file() and jax.process_index() == 0:
            files.append(f"tokenizer{tokenizer.suffix}")
            shutil.copyfile(tokenizer, args.hf_dir / files[-1])
    print(f"{args.hf_dir}: step {step} of {args.workdir} as {', '.join(files)}")
    return 0
