"""What moments in the host's memory save on a device and cost in a step, by its own compiler.

    python scripts/offload_table.py --table=docs/memory.md

Each row is one `spmd-train plan` in a process of its own; needs libtpu and JAX's CUDA
plugin (extras plan-tpu and plan-cuda). A minute or two a row.
"""

import argparse
import pathlib

from plan_json import ROOT, markdown_table, plan_json, shown
from sections import write_section

TARGETS = ("v5e:2x4", "h100:1x8")
LAYERS, LENGTH = 4, 2048
HEADS = (
    "target",
    "optimizer.offload",
    "arguments, GB",
    "temporaries, GB",
    "peak, GB",
    "moments in the host's memory, GB",
    "of the step moving them",
    "predicted step",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "memory.md")
    args = parser.parse_args()
    lines = [HEADS]
    for target in TARGETS:
        for offload in ("none", "host"):
            lines.append(shown(cells(target, offload)))
    text = (
        f"Written by `python scripts/offload_table.py`: {LAYERS} layers of `llama2_7b.py` (fsdp "
        f"8), a sequence of {LENGTH:,} tokens on each of 8 devices, per device. Bytes (GB: 10^9) "
        "are of the programs that libtpu and XLA's GPU compiler made, the step is a roofline on "
        "data-sheet rates; none has run.\n\n" + markdown_table(lines)
    )
    write_section(args.table, "What moments in the host's memory save", text)


def cells(target, offload):
    words = {
        "model.num_layers": LAYERS,
        "data.sequence_length": LENGTH,
        "train.global_batch_size": 8,
        "optimizer.offload": offload,
    }
    plan = plan_json("llama2_7b.py", target, [f"{key}={value}" for key, value in words.items()])
    if plan is None or plan["compile_seconds"] is None:
        raise SystemExit(f"{target}, {offload}: no plan")
    memory, details = plan["per_device"], plan["details"]
    sizes = (memory["argument_bytes"], memory["temp_bytes"], memory["peak_bytes"])
    return (
        target,
        offload,
        *(f"{size / 1e9:.3f}" for size in (*sizes, details["state"]["host"])),
        f"{details['seconds']['host']:.3f} s",
        f"{plan['predicted']['step_seconds']:.3f} s",
    )


if __name__ == "__main__":
    main()
