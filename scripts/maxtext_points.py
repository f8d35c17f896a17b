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
    """A model on a topology, what makes it here, and MaxText's figures (GiB; GB per step).

    `maxtext`: the arguments of scripts/peers/maxtext_peer.py that told them.
    """

    name: str
    config: str
    target: str
    overrides: tuple[str, ...]
    temp: float
    peak: float
    wire: float
    maxtext: str


POINTS = (
    Point(
        "Llama-2-7B, fsdp 256, 4 x 2,048 tokens, remat full",
        "llama2_7b.py",
        "v5e:16x16",
        ("data.sequence_length=2048", "train.global_batch_size=1024"),
        5_796_752_384 / GIB,
        4.13,
        52.5,
        "model_name=llama2-7b compile_topology=v5e-256 per_device_batch_size=4 "
        "max_target_length=2048 remat_policy=full",
    ),
    Point(
        "Llama-2-7B, fsdp 64, 4 x 4,096, every matmul's output kept",
        "llama2_7b.py",
        "v5p:4x4x4",
        (
            "train.global_batch_size=256",
            "model.remat=names",
            "model.remat_saved=query,key,value,out,gate,up,down",
        ),
        49.64,
        46.77,
        52.0,
        "model_name=llama2-7b compile_topology=v5p-128 per_device_batch_size=4 "
        "max_target_length=4096 remat_policy=minimal",
    ),
    Point(
        "Llama-3-8B, fsdp 64, 2 x 8,192, remat full",
        "llama3_8b.py",
        "v5p:4x4x4",
        ("train.global_batch_size=128",),
        17.32,
        14.55,
        58.3,
        "model_name=llama3-8b compile_topology=v5p-128 per_device_batch_size=2 "
        "max_target_length=8192 remat_policy=full",
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
        "model_name=llama2-7b compile_topology=v5p-128 per_device_batch_size=1 "
        "max_target_length=4096 remat_policy=full ici_fsdp_parallelism=16 ici_tensor_parallelism=4",
    ),
    Point(
        "Llama-3-8B, fsdp 256, 1 x 8,192, remat full",
        "llama3_8b.py",
        "v5e:16x16",
        ("train.global_batch_size=256",),
        8.09,
        6.41,
        59.98,
        "model_name=llama3-8b compile_topology=v5e-256 per_device_batch_size=1 "
        "max_target_length=8192 remat_policy=full",
    ),
    Point(
        "Llama-3-70B, fsdp 256, 1 x 8,192, remat full",
        "llama3_70b.py",
        "v5p:4x8x8",
        ("train.global_batch_size=256",),
        25.05,
        20.83,
        552.03,
        "model_name=llama3-70b compile_topology=v5p-512 per_device_batch_size=1 "
        "max_target_length=8192 remat_policy=full",
    ),
    Point(
        "Mixtral-8x7B, dropless, fsdp 64, 2 x 4,096, remat full",
        "mixtral_8x7b.py",
        "v5p:4x4x4",
        ("mesh.expert=1", "data.sequence_length=4096", "train.global_batch_size=128"),
        16.48,
        19.65,
        369.27,
        "model_name=mixtral-8x7b compile_topology=v5p-128 per_device_batch_size=2 "
        "max_target_length=4096 remat_policy=full",
    ),
    Point(
        "Llama-3-8B, fsdp 16 x context 4, a sequence of 32,768 on 4 chips, remat full",
        "llama3_8b.py",
        "v5p:4x4x4",
        (
            "mesh.context=4",
            "data.sequence_length=32768",
            "train.global_batch_size=16",
        ),
        9.27,
        8.56,
        75.64,
        "model_name=llama3-8b compile_topology=v5p-128 per_device_batch_size=0.25 "
        "max_target_length=32768 remat_policy=full ici_context_parallelism=4 "
        "ici_fsdp_parallelism=16",
    ),
)
HEADS = (
    "per device",
    "target",
    "temporaries, GiB: ours / MaxText",
    "peak, GiB",
    "wire, GB a step",
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
        "Adam moments, flash attention) are by the same compiler: the first four were taken once, "
        "the others are of MaxText 0.2.4 by `scripts/peers/maxtext_peer.py`, which also tells "
        "those of the second. Peak is the compiler's own; wire bytes are those of rings.\n\n"
        + markdown_table(lines)
        + "\n\nEvery matmul's output: what MaxText's policy `minimal` keeps. The output of "
        "attention's kernel is not among them, and made again by both.\n"
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
        f"{wire:.1f} / {point.wire:.1f}",
    )


if __name__ == "__main__":
    main()
