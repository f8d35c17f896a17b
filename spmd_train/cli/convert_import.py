"""`spmd-train convert import`: a Hugging Face checkpoint becomes a run to go on from."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax

from spmd_train import experiment
from spmd_train.interop import open_params


def run(args: argparse.Namespace) -> int:
    """Imports `args.hf_dir` into `args.workdir`."""
    sizes: list[int] = []

    def open_(abstract_params: Any) -> Callable[[], Any]:
        sizes.extend(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params))
        return open_params(
            args.hf_dir,
            config=args.config.model,
            moe=args.config.moe,
            abstract_params=abstract_params,
        )

    experiment.import_params(args.config, workdir=args.workdir, open_=open_)
    print(f"{args.workdir}: {sum(sizes):,} parameters of {args.hf_dir}, as checkpoint 0")
    tokenizer = args.hf_dir / "tokenizer.json"
    if tokenizer.is_file() and args.config.data.tokenizer != str(tokenizer):
        print(
            f"its tokens are those of {tokenizer}, but data.tokenizer is "
            f"{args.config.data.tokenizer}: to train, eval and generate add\n"
            f"  --config.data.tokenizer={tokenizer}"
        )
    return 0
