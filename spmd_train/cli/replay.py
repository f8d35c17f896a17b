"""`spmd-train replay BUNDLE`: a bad step again, and where its numbers go wrong first."""

from __future__ import annotations

import argparse
import json

from spmd_train.replay import replay


def run(args: argparse.Namespace) -> int:
    """Repeats the step of a bundle."""
    found = replay(args.bundle)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"step {found['step']}: {found['why']}")
    print(f"again: loss {found['loss']}, gradient norm {found['grad_norm']}")
    for name in ("batch", "params", "grads"):
        bad = found[name]
        print(f"not finite in {name}: {', '.join(bad) if bad else 'nothing'}")
    return 0
