"""`spmd-train generate`."""

from __future__ import annotations

import argparse
import json

from spmd_train import experiment
from spmd_train.data import load_tokenizer


def run(args: argparse.Namespace) -> int:
    """Continues prompts with a checkpoint."""
    built, params, _ = experiment.load_params(args.config, workdir=args.workdir, step=args.step)
    tokenizer = load_tokenizer(args.config.data.tokenizer)
    texts = experiment.sample_text(built, params, args.prompt, tokenizer, seed=args.seed)
    if args.json:
        pairs = zip(args.prompt, texts, strict=True)
        print(json.dumps([{"prompt": p, "continuation": text} for p, text in pairs]))
    else:
        for prompt, text in zip(args.prompt, texts, strict=True):
            print(prompt + text)
    return 0
