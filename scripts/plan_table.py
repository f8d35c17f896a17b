"""Plans the pod configs on the topologies they are meant for and writes the table of the docs.

    python scripts/plan_table.py --only=llama3_70b
    python scripts/plan_table.py --no_compile

Each row is one `spmd-train plan` in a process of its own, whose answer is kept under --rows with
the commit that it was made at; a row that is there is not compiled again: remove it to have it
anew. Needs libtpu (extra plan-tpu) and, for the GPU rows, the extra plan-cuda.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from plan_json import ROOT, markdown_table, plan_json
from sections import write_section

# Name, config, target, overrides. Batches as in issue 6's figures of MaxText where there are any.
ROWS = (
    ("Llama-3-8B, 1 x 8,192", "llama3_8b.py", "v5e:16x16", ("train.global_batch_size=256",)),
    (
        "Llama-2-7B, 4 x 2,048 tokens",
        "llama2_7b.py",
        "v5e:16x16",
        ("data.sequence_length=2048", "train.global_batch_size=1024"),
    ),
    (
        "Mixtral 8x7B, 1 x 8,192, experts 8",
        "mixtral_8x7b.py",
        "v5p:4x4x4",
        ("train.global_batch_size=64",),
    ),
    (
        "Llama-2-7B, pipeline 4, tensor 4",
        "llama2_7b.py",
        "v5p:4x4x4",
        (
            "train.global_batch_size=256",
            "mesh.pipeline=4",
            "mesh.tensor=4",
            "mesh.fsdp=4",
        ),
    ),
    ("Llama-3-70B, 1 x 8,192", "llama3_70b.py", "v5p:8x8x16", ("train.global_batch_size=1024",)),
    ("Llama-2-7B, 4 x 4,096", "llama2_7b.py", "v5p:4x4x4", ("train.global_batch_size=256",)),
    ("Llama-3-8B, 1 x 8,192", "llama3_8b.py", "h100:4x8", ("train.global_batch_size=32",)),
    ("Llama-3-8B, 2 x 8,192", "llama3_8b.py", "v5p:4x4x4", ("train.global_batch_size=128",)),
    ("Llama-3-8B, 2 x 8,192", "llama3_8b.py", "v5p:4x4x8", ("train.global_batch_size=256",)),
)
HEADS = (
    "config, per device",
    "target",
    "mesh",
    "peak GiB",
    "of it temporary",
    "collectives / step",
    "wire GB / step",
    "async",
    "FLOPs, program / model",
    "predicted step",
    "MFU",
    "bound",
    "compile s",
    "commit",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, default=ROOT / "docs" / "plans")
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "plans.md")
    parser.add_argument("--only", default="", help="compile only rows with this in their file name")
    parser.add_argument("--no_compile", action="store_true", help="only write the table")
    args = parser.parse_args()
    args.rows.mkdir(parents=True, exist_ok=True)
    lines, missing = [], []
    for name, config, target, overrides in ROWS:
        path = args.rows / f"{row_name(config, target, overrides)}.json"
        if not path.exists() and not args.no_compile and args.only in path.name:
            compile_row(path, config, target, overrides)
        if path.exists():
            lines.append(cells(name, json.loads(path.read_text())))
        else:
            missing.append(f"{name} on {target}")
    write_section(args.table, "The pod configs", section(lines, missing))


def row_name(config, target, overrides):
    words = (config.removesuffix(".py"), target, *overrides)
    return "-".join(word.replace(":", "_").replace("=", "_") for word in words)


def compile_row(path, config, target, overrides):
    print(f"{path.name} ...", file=sys.stderr, flush=True)
    made_at = commit()
    told = plan_json(config, target, overrides)
    if told is None:
        # A compiler's fault in one row must not keep the others from the table.
        print(f"{path.name}: no plan", file=sys.stderr, flush=True)
        return
    path.write_text(json.dumps(told | {"commit": made_at}, indent=1) + "\n")


def commit():
    words = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def cells(name, plan):
    memory, flops, told = plan["per_device"], plan["flops"], plan["predicted"]
    mesh = " x ".join(f"{a} {n}" for a, n in plan["mesh"].items() if n > 1)
    if plan["compile_seconds"] is None:
        peak = f"{memory['peak_bytes'] / 2**30:.2f}, **does not fit**"
        return (name, plan["target"], mesh, peak, *[""] * (len(HEADS) - 5), plan["commit"])
    step, mfu = told["step_seconds"], told["mfu"]
    return (
        name,
        plan["target"],
        mesh,
        f"{memory['peak_bytes'] / 2**30:.2f}" + ("" if plan["fits"] else ", **does not fit**"),
        f"{memory['temp_bytes'] / 2**30:.2f}",
        executed(plan["collectives"]),
        f"{plan['wire_bytes'] / 1e9:.1f}",
        f"{plan['details']['async_wire_bytes'] / max(plan['wire_bytes'], 1):.0%}",
        f"{flops['program'] / flops['model']:.3f}" if flops["program"] else "",
        f"{step:.3f} s" if step else "",
        f"{mfu:.1%}" if mfu else "",
        told["bound"] or "",
        f"{plan['compile_seconds']:.0f}",
        plan["commit"],
    )


def executed(collectives):
    """How many of each kind a device executes; the loops' trips multiplied out."""
    counts, unknown = {}, 0
    for row in collectives:
        unknown += row["count"] is None
        counts[row["op"]] = counts.get(row["op"], 0) + (row["count"] or 0)
    told = [f"{n:,} {op}" for op, n in sorted(counts.items(), key=lambda item: -item[1]) if n]
    return ", ".join(told + ([f"{unknown} in loops of unknown length"] if unknown else []))


def section(lines, missing):
    text = markdown_table([HEADS, *lines])
    told = f"\n\nNot compiled: {'; '.join(missing)}." if missing else ""
    return f"""Written by `make plan-table`: each row compiled by the target's own compiler on a
machine without the hardware, at the commit that it names; its whole answer is in `docs/plans/`,
and `python scripts/plan_table.py --no_compile` writes the table from there. Peak and temporary
memory (of a device) and collectives are the compiler's; wire bytes are those of ring algorithms;
step time and MFU are a roofline on data-sheet rates, the best that the program could do. The
seconds of compiling depend on the machine: these were of one core that other work shared.

{text}{told}
"""


if __name__ == "__main__":
    main()
