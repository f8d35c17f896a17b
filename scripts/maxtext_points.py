"""The same models on the same topologies as MaxText, both compiled by libtpu 0.0.42.

    python scripts/maxtext_points.py --table=docs/speed.md

Memory is the compiler's, wire bytes those of rings, loops multiplied out. Needs libtpu (extra
plan-tpu); some minutes a point; what is in --out already is not compiled again.
"""

import argparse
import dataclasses
import json
import pathlib

from plan_json import ROOT, markdown_table, plan_json, shown
from sections import write_section

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Point:
    """A model on a topology, what makes it here, and MaxText's figures (GiB; GB per step)."""

    name: str
    config: str
    target: str
    overrides: tuple[str, ...]
    temp: float
    peak: float
    wire: float


POINTS = (
    Point(
        "Llama-2-7B, fsdp 256, 4 x 2,048 tokens, remat full",
        "llama2_7b.py",
        "v5e:16x16",
        ("data.sequence_length=2048", "train.global_batch_size=1024"),
        5_796_752_384 / GIB,
        4.13,
        52.5,
    ),
    Point(
        "Llama-2-7B, fsdp 64, 4 x 4,096, every matmul's output kept",
        "llama2_7b.py",
        "v5p:4x4x4",
        ("train.global_batch_size=256", "model.remat=projections"),
        49.64,
        46.77,
        52.0,
    ),
    Point(
        "the same, but for the output of attention's projection, made again",
        "llama2_7b.py",
        "v5p:4x4x4",
        (
            "train.global_batch_size=256",
            "model.remat=names",
            "model.remat_saved=query,key,value,attention,gate,up",
        ),
        49.64,
        46.77,
        52.0,
    ),
    Point(
        "Llama-3-8B, fsdp 64, 2 x 8,192, remat full",
        "llama3_8b.py",
        "v5p:4x4x4",
        ("train.global_batch_size=128",),
        17.32,
        14.55,
        58.3,
    ),
    Point(
        "Llama-2-7B, fsdp 16 x tensor 4, 1 x 4,096, remat full",
        "llama2_7b.py",
        "v5p:4x4x4",
        (
            "train.global_batch_size=64",
            "mesh.fsdp=16",
            "mesh.tensor=4",
            "sharding.rules.residual_sequence=tensor",
        ),
        4.78,
        4.42,
        62.2,
    ),
)
HEADS = (
    "per device",
    "target",
    "temporaries, GiB: ours / MaxText",
    "peak, GiB",
    "wire, GB a step",
    "compile s",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "maxtext")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [HEADS]
    for number, point in enumerate(POINTS):
        path = args.out / f"{number}.json"
        if not path.exists():
            flags = {"SPMD_TRAIN_XLA_FLAGS": "off"}
            told = plan_json(point.config, point.target, point.overrides, environment=flags)
            if told is None:
                raise SystemExit(f"{point.name}: no plan")
            path.write_text(json.dumps(told))
        lines.append(shown(cells(point, json.loads(path.read_text()))))
    text = (
        "Written by `python scripts/maxtext_points.py`: each point compiled by libtpu 0.0.42 on a "
        "machine without TPUs, of a device, without the flags of `spmd_train/xla_flags.py`, which "
        "take a little memory for overlap. MaxText's figures (bf16 compute, float32 weights and "
        "Adam moments, flash attention) were taken once, by the same compiler. Peak is the "
        "compiler's own; wire bytes are those of rings.\n\n"
        + markdown_table(lines)
        + "\n\nWith every matmul's output kept, MaxText's peak is too low for all of them: 4 x "
        "4,096 tokens by 4,096 (the input, query, key, value, attention's output and its "
        "projection) and twice by 11,008, in bfloat16, 32 times, are 45.5 GiB, the weights "
        "and moments 1.2 GiB more, and then there are gradients and gathered layers. It makes one "
        "of them again; so does the row below ours.\n"
    )
    write_section(args.table, "Against MaxText, by the same compiler", text)


def cells(point, plan):
    temp = plan["per_device"]["temp_bytes"] / GIB
    peak = plan["details"]["compiler_peak_bytes"] / GIB
    wire = plan["wire_bytes"] / 1e9
    return (
        point.name,
        point.target,
        f"{temp:.2f} / {point.temp:.2f}",
        f"{peak:.2f} / {point.peak:.2f}",
        f"{wire:.2f} / {point.wire:.1f}",
        f"{plan['compile_seconds']:.0f}",
    )


if __name__ == "__main__":
    main()
