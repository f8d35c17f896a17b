"""What of a step's sending runs while it computes, by the target's own compiler.

    python scripts/overlap_table.py --table=docs/speed.md

Each row is one `spmd-train plan` in a process of its own; needs libtpu (extra plan-tpu) and, for
GPUs, the extra plan-cuda. Two minutes a row; what is in --out already is not compiled again, and
--only=h100 leaves the other targets' rows as they are in the table.
"""

import argparse
import json
import pathlib

from plan_json import ROOT, markdown_table, plan_json, shown
from sections import write_section

# What the table calls it, and its environment. The last is what a DGX has between nodes.
FLAGS = {
    "off": {"SPMD_TRAIN_XLA_FLAGS": "off"},
    "on": {"SPMD_TRAIN_XLA_FLAGS": "on"},
    "on, network told": {
        "SPMD_TRAIN_XLA_FLAGS": "on",
        "XLA_FLAGS": "--xla_gpu_analytical_latency_estimator_options=nic_speed_gbps=50",
    },
}
# Config, target, sequences on each device, devices, flags. Four of the layers, all alike.
POINTS = (
    ("llama2_7b.py", "v5p:4x4x4", 2, 64, ("off", "on")),
    ("llama2_7b.py", "v5e:4x4", 1, 16, ("off", "on")),
    ("llama2_7b.py", "a100:2x8", 1, 16, ("off", "on")),
    ("llama2_7b.py", "h100:1x8", 1, 8, ("off", "on")),
    ("llama2_7b.py", "h100:2x8", 1, 16, tuple(FLAGS)),
)
HEADS = (
    "config, 4 layers",
    "target",
    "sequences a device",
    "flags",
    "gathers of parameters, GB: overlapped",
    "reductions of gradients, GB: overlapped",
    "temporaries, GiB",
    "predicted step",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "overlap")
    parser.add_argument("--only", default="", help="compile only for targets with this in them")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines, before = [HEADS], rows_of(args.table)
    for config, target, batch, devices, names in POINTS:
        for flags in names:
            path = args.out / f"{target.replace(':', '_')}-{flags.replace(', ', '-')}.json"
            if not path.exists() and args.only in target:
                words = ["model.num_layers=4", f"train.global_batch_size={batch * devices}"]
                told = plan_json(config, target, words, environment=FLAGS[flags])
                if told is None:
                    raise SystemExit(f"{path.name}: no plan")
                path.write_text(json.dumps(told))
            if path.exists():
                lines.append(shown(cells(config, batch, flags, json.loads(path.read_text()))))
            elif row := before.get((target, flags)):
                lines.append(row)
    text = (
        "Written by `python scripts/overlap_table.py`, on a machine without the hardware: what "
        "the target's own compiler schedules between the start and the done of a collective. Sent "
        "bytes count as overlapped if a matmul runs in between; the step is a roofline, in which "
        "they are hidden for as long as what runs in between takes. The flags are those of "
        "`spmd_train/xla_flags.py` (`SPMD_TRAIN_XLA_FLAGS=off` leaves them out). "
        "On v5e the compiler makes loops of permutations of gathers, reductions and their matmuls, "
        "with the flags and without. On A100 everything that is sent is waited for without the "
        "flags. On GPUs the compiler makes one of a layer's reduce-scatters, up to "
        "30 MiB of a device's part: that waits for the layer's last gradient, and nothing is left "
        "to run beside it. With the flag those with parts of over 1 MiB stay apart. What then runs "
        "alone is the layer's last, and the head's, which is summed before the backward pass to "
        "save memory. Between nodes XLA takes an H100's network for one of 25 GB/s, and orders the "
        "gathers by that; the last row tells it a DGX's: "
        f"`XLA_FLAGS={FLAGS['on, network told']['XLA_FLAGS']}`."
        "\n\n" + markdown_table(lines)
    )
    write_section(args.table, "Overlap", text)


def rows_of(page):
    """Target and flags to the row that the page has for them."""
    _, _, section = page.read_text(encoding="utf-8").partition("\n## Overlap\n")
    section, _, _ = section.partition("\n## ")
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {(line[1], line[3]): tuple(line) for line in lines}


def cells(config, batch, flags, plan):
    told = plan["details"]["overlap"]
    return (
        config.removesuffix(".py"),
        plan["target"],
        str(batch),
        flags,
        *(share(told[name]) for name in ("parameter_gathers", "gradient_reductions")),
        f"{plan['per_device']['temp_bytes'] / 2**30:.2f}",
        f"{plan['predicted']['step_seconds']:.3f} s",
    )


def share(part):
    return (
        f"{part['wire_bytes'] / 1e9:.2f}: {part['overlapped_wire_bytes'] / part['wire_bytes']:.0%}"
    )


if __name__ == "__main__":
    main()
