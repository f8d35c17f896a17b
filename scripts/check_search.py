"""Whether the search's order is the order of measured step times, on 8 simulated devices.

    python scripts/check_search.py --table=docs/plans.md

Takes the best and the worst layouts that the search names for a small model, runs a few steps of
each and writes both orders down. Exits with 1 if a layout of the upper end is slower than one of
the lower end. Eight devices share this machine's cores, so that work and bytes count here, but
waiting (a pipeline's bubble) does not, and the search knows that.
"""

import argparse
import pathlib
import sys

import jax
from made_up import Run
from sections import write_section

from spmd_train import experiment
from spmd_train.config import parse
from spmd_train.plan.search import search
from spmd_train.plan.targets import parse_target

CONFIG = {
    "model": {
        "num_layers": 4,
        "embed_dim": 128,
        "num_heads": 4,
        "mlp_dim": 352,
        "vocab_size": 512,
    },
    "data": {"sequence_length": 128},
    "train": {"global_batch_size": 32},
    "optimizer": {"name": "adamw"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ends", type=int, default=3, help="layouts measured at each end")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each")
    parser.add_argument("--table", type=pathlib.Path, help="page to write the table into")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    result = search(
        parse(CONFIG),
        target=parse_target("cpu:8"),
        devices=jax.devices(),
        build=experiment.build,
        options={},
        num_compiled=1,
    )
    ends = [("top", *pair) for pair in first_of_each(result.ranked, args.ends)]
    ends += [("bottom", *pair) for pair in first_of_each(result.ranked[::-1], args.ends)[::-1]]
    configs = [candidate.applied_to(parse(CONFIG)) for _, candidate, _ in ends]
    vocab_size = CONFIG["model"]["vocab_size"]
    runs = [Run(experiment.build(c).program, vocab_size=vocab_size) for c in configs]
    for _ in range(args.steps):  # Each in turn: what else the machine does hits all alike.
        for run in runs:
            run.step()
    measured = [(*row, min(run.seconds)) for row, run in zip(ends, runs, strict=True)]
    worst_top = max(row[3] for row in measured if row[0] == "top")
    best_bottom = min(row[3] for row in measured if row[0] == "bottom")
    text = section(measured, kept=worst_top < best_bottom, considered=result.num_considered)
    print(text)
    if args.table:
        write_section(args.table, "The search's order", text)
    return 0 if worst_top < best_bottom else 1


def first_of_each(ranked, count):
    """The first candidates, no two with the same mesh and schedule."""
    chosen = {}
    for candidate, found in ranked:
        if len(chosen) < count:
            chosen.setdefault(candidate.key, (candidate, found))
    return list(chosen.values())


def section(measured, *, kept, considered):
    fastest = min(seconds for *_, seconds in measured)
    least = min(found.step for _, _, found, _ in measured)
    lines = [
        f"| {end} | {candidate.name} | {found.step / least:.2f} | {seconds / fastest:.2f} "
        f"| {seconds * 1e3:.0f} |"
        for end, candidate, found, seconds in measured
    ]
    table = "\n".join(lines)
    verdict = (
        "Every layout of the top is faster than every one of the bottom."
        if kept
        else "**The order is not kept**: one of the top is slower than one of the bottom."
    )
    return f"""Written by `python scripts/check_search.py --table=docs/plans.md`: the first and last
layouts of a search's order ({considered} considered) for a model of 4 layers, width 128, 32
sequences of 128 tokens, on 8 simulated CPU devices; formulas against the least of measured steps,
each relative to the smallest. Only the ends are compared: between layouts whose
formulas differ by a factor of 1.3 or less the order was seen not to hold.

| end | layout | formulas | measured | ms |
| --- | --- | --- | --- | --- |
{table}

{verdict}
"""


if __name__ == "__main__":
    sys.exit(main())
