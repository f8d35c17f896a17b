"""MaxText's own train step, compiled for TPUs that are not here: its memory, and what it sends.

    python3.12 -m venv .venv-peers/maxtext
    .venv-peers/maxtext/bin/pip install -r scripts/peers/requirements-maxtext.txt
    PYTHONPATH=. .venv-peers/maxtext/bin/python scripts/peers/maxtext_peer.py \\
      model_name=llama2-7b compile_topology=v5p-128 per_device_batch_size=4 \\
      max_target_length=4096 remat_policy=minimal

The arguments are MaxText's; scripts/maxtext_points.py has those of each point. Prints a JSON
document: bytes of a device by the compiler, wire bytes as `spmd-train plan` counts them.
"""

import json
import os
import pathlib
import sys

from spmd_train.inspect.collectives import count_collectives

SETTINGS = (
    "run_name=compiled",
    "base_output_directory=/tmp/maxtext",
    "hardware=cpu",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "compile_topology_num_slices=1",
    "dtype=bfloat16",
    "weight_dtype=float32",
    "gradient_clipping_threshold=1.0",
    "attention=flash",
)


def told(compiled, num_devices):
    memory = compiled.memory_analysis()
    found = count_collectives(compiled.as_text(), axis_sizes={"fsdp": num_devices})
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "compiler_peak_bytes": memory.peak_memory_in_bytes,
        "wire_bytes": round(sum((c.count or 0) * c.wire_bytes_each for c in found)),
    }


def main():
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    from maxtext.trainers.pre_train import train_compile

    compile_step = train_compile.jit_and_compile

    def compile_and_tell(func, args, kwargs, mesh, *rest):
        compiled = compile_step(func, args, kwargs, mesh, *rest)
        print(json.dumps(told(compiled, mesh.size)))
        return compiled

    train_compile.jit_and_compile = compile_and_tell
    base = pathlib.Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    train_compile.main([sys.argv[0], str(base), *SETTINGS, *sys.argv[1:]])


if __name__ == "__main__":
    main()
