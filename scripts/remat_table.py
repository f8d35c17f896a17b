"""What each way to rematerialize keeps in memory and computes again, by TPU's own compiler.

    python scripts/remat_table.py --table=docs/memory.md

Each row is one `spmd-train plan` of the same few layers in a process of its own; needs libtpu
(extra plan-tpu). Some minutes a row.
"""

import argparse
import pathlib

from plan_json import ROOT, markdown_table, plan_json, shown
from sections import write_section

ROWS = (
    ("none", "", ""),
    ("projections", "", ""),
    ("names", "query,key,value,attention", ""),
    ("names", "attention", ""),
    ("names", "attention", "block_input"),
    ("names", "query,key,value,attention", "gate,up"),
    ("full", "", ""),
)
HEADS = (
    "model.remat",
    "remat_saved",
    "remat_offloaded",
    "temporaries, GiB",
    "in the host's memory, GiB",
    "FLOPs, program / model",
    "predicted step",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "memory.md")
    parser.add_argument("--config", default="llama2_7b.py", help="in configs/")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 2,048 tokens per device")
    parser.add_argument("--target", default="v5e:4x4")
    args = parser.parse_args()
    lines = [HEADS]
    for row in ROWS:
        lines.append(shown(cells(row, args)))
    text = (
        f"Written by `python scripts/remat_table.py`: {args.layers} layers of `{args.config}` on "
        f"{args.target} (fsdp 16), {args.batch} sequences of 2,048 tokens on each device, per "
        "device. Temporaries and the host's memory are libtpu's, the step is a roofline, in which "
        "moving to the host and back takes no time.\n\n" + markdown_table(lines)
    )
    write_section(args.table, "What is kept", text)


def cells(row, args):
    remat, saved, offloaded = row
    words = {
        "model.num_layers": args.layers,
        "data.sequence_length": 2048,
        "train.global_batch_size": 16 * args.batch,
        "model.remat": remat,
        "model.remat_saved": saved,
        "model.remat_offloaded": offloaded,
    }
    plan = plan_json(args.config, args.target, [f"{key}={value}" for key, value in words.items()])
    if plan is None:
        raise SystemExit(f"{row}: no plan")
    memory, flops, step = plan["per_device"], plan["flops"], plan["predicted"]["step_seconds"]
    if plan["compile_seconds"] is None:
        return (*row, f"{memory['temp_bytes'] / 2**30:.2f}, **does not fit**", "", "", "")
    return (
        *row,
        f"{memory['temp_bytes'] / 2**30:.2f}",
        f"{plan['details']['host_temp_bytes'] / 2**30:.2f}",
        f"{flops['program'] / flops['model']:.3f}",
        f"{step:.3f} s",
    )


if __name__ == "__main__":
    main()
