"""Size and compile time of the train step against depth and number of devices.

    python scripts/plan_growth.py --table=docs/plans.md
    python scripts/plan_growth.py --table=docs/plans.md --tpu

Each row is one `spmd-train inspect hlo` in a process of its own: a small model on simulated
devices, or (--tpu, needs libtpu) on TPU topologies.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from sections import write_section

ROOT = pathlib.Path(__file__).parent.parent
MODEL = (
    *("model.embed_dim=1024", "model.num_heads=8", "model.mlp_dim=2816", "model.scan_unroll=1"),
    *("model.remat=full", "data.sequence_length=256", "optimizer.name=adamw"),
    *("mesh.data=1", "mesh.fsdp=-1", "train.global_batch_size=1024"),
)
DEPTHS = tuple(("cpu:8", layers) for layers in (8, 20, 40, 80))
CPUS = tuple((f"cpu:{devices}", 8) for devices in (16, 32, 64))
TPUS = tuple((f"v5p:{shape}", 8) for shape in ("2x2x2", "4x4x4", "8x8x16"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tpu", action="store_true", help="on TPU topologies")
    parser.add_argument("--table", type=pathlib.Path, help="page to write the table into")
    args = parser.parse_args()
    rows = []
    for target, layers in TPUS if args.tpu else (*DEPTHS, *CPUS):
        told = measure(target, layers)
        rows.append(
            f"| {target} | {layers} | {told['num_instructions']:,} | {told['hlo_bytes'] / 1e6:.2f} "
            f"| {told['num_collectives']} | {told['compile_seconds']:.1f} |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    table = "\n".join(rows)
    what = "TPU topologies" if args.tpu else "simulated CPU devices"
    command = "python scripts/plan_growth.py --table=docs/plans.md" + " --tpu" * args.tpu
    text = f"""Written by `{command}`:
a model of width 1,024 under FSDP over all of the {what}, 1,024 sequences. The seconds depend on
what else the machine does.

| target | layers | HLO instructions | HLO text, MB | collectives executed | compile s |
| --- | --- | --- | --- | --- | --- |
{table}
"""
    print(text)
    if args.table:
        write_section(args.table, f"Growth with depth and devices: {what}", text)


def measure(target, layers):
    words = [f"--config.{word}" for word in MODEL]
    words += [f"--config.model.num_layers={layers}", f"--target={target}", "--json"]
    with tempfile.TemporaryDirectory() as cache:  # Nothing is to come from the compilation cache.
        done = subprocess.run(
            [sys.executable, "-m", "spmd_train", "inspect", "hlo", *words, "--out=/dev/null"],
            cwd=ROOT,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
