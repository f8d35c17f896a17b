"""What attention over split sequences takes, by kernels and in plain JAX, by a target's compiler.

    python scripts/context_table.py --table=docs/memory.md
    python scripts/context_table.py --table=docs/memory.md --target=h100:1x4

Each row is one `spmd-train plan` of the same few layers in a process of its own; needs libtpu
(extra plan-tpu), for h100 XLA's GPU compiler (plan-cuda). Two minutes a row, five for the blocks.
"""

import argparse
import pathlib

from plan_json import ROOT, markdown_table, plan_json, shown
from sections import write_section

ROWS = [(m, a) for m in ("ring", "all_gather", "ulysses") for a in ("blocks", "flash")]
HEADS = (
    "context.method",
    "model.attention",
    "temporaries, GiB",
    "to and from HBM, GiB",
    "sent, GiB",
    "FLOPs, program / model",
    "predicted step",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "memory.md")
    parser.add_argument("--config", default="llama3_8b.py", help="in configs/")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=32768, help="tokens of the one sequence")
    parser.add_argument("--target", default="v5p:2x2x1")
    args = parser.parse_args()
    lines = [HEADS]
    for row in ROWS:
        lines.append(shown(cells(*row, args)))
    text = (
        f"Written by `python scripts/context_table.py --target={args.target}`: {args.layers} "
        f"layers of `{args.config}` with 32,768 words, a sequence of {args.length:,} tokens on 4 "
        "chips (context 4, zigzag; parameters are copies: `sharding.rules.embed=fsdp`), per device "
        "and step; `model.remat` full. Temporaries and traffic are of the program that the "
        "target's compiler made, the step is a roofline.\n\n" + markdown_table(lines)
    )
    write_section(args.table, f"Split sequences on {args.target}", text)


def cells(method, attention, args):
    words = {
        "model.num_layers": args.layers,
        "model.vocab_size": 32768,
        "model.attention": attention,
        "context.method": method,
        "mesh.fsdp": 1,
        "mesh.context": 4,
        "sharding.rules.embed": "fsdp",
        "data.sequence_length": args.length,
        "train.global_batch_size": 1,
        "train.grad_accumulation": 1,
    }
    plan = plan_json(args.config, args.target, [f"{key}={value}" for key, value in words.items()])
    if plan is None or plan["compile_seconds"] is None:
        raise SystemExit(f"{method}, {attention}: no plan")
    flops = plan["flops"]
    return (
        method,
        attention,
        f"{plan['per_device']['temp_bytes'] / 2**30:.2f}",
        f"{plan['details']['program_hbm_traffic_bytes'] / 2**30:.1f}",
        f"{plan['wire_bytes'] / 2**30:.2f}",
        f"{flops['program'] / flops['model']:.3f}",
        f"{plan['predicted']['step_seconds']:.3f} s",
    )


if __name__ == "__main__":
    main()
