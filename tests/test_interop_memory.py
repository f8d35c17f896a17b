"""An import never holds the model twice: the peak of a process's memory says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

IMPORT = """
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
sys.path.append("tests")
from interop_helpers import REFERENCE, load, make_reference_program, model_config

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

mesh = {"1": "one device", "4": "fsdp2 x tensor2"}[sys.argv[2]]
small, large = REFERENCE / "llama", Path(sys.argv[1])
load(make_reference_program(model_config(small), mesh=mesh), small, model_config(small))
config = model_config(large)
program = make_reference_program(config, mesh=mesh)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here.
params = jax.block_until_ready(load(program, large, config))
num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(num_bytes, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("num_devices", [1, 4])
def test_interop_import_holds_the_model_once(num_devices, tmp_path):
    d, f, layers = 512, 1024, 32
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d,
        "intermediate_size": f,
        "num_attention_heads": 8,
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "vocab_size": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": (256, d), "model.norm.weight": (d,)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        tensors |= {f"{name}.mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
        tensors[f"{name}.mlp.down_proj.weight"] = (d, f)
        tensors |= {f"{name}.{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, tmp_path / "model.safetensors")

    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(tmp_path), str(num_devices)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    num_bytes, peak = map(int, done.stdout.split())
    print(f"{num_bytes / 2**20:.0f} MiB of parameters, peak {peak / 2**20:.0f} MiB")
    assert num_bytes > 300 * 2**20
    # The parameters, and one leaf (a fifth of them) on its way.
    assert num_bytes < peak < 1.5 * num_bytes
