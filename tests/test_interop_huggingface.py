"""Checkpoint directories in and out: the same tensors, every layout of files, every mistake."""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from interop_helpers import (
    EXPERT_FAMILIES,
    FAMILIES,
    REFERENCE,
    load,
    make_reference_program,
    model_config,
    moe_config,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from spmd_train.config import ConfigError
from spmd_train.interop import huggingface, model_config_from_hf, save_params

SHARDED = "fsdp2 x tensor2"


@pytest.fixture
def llama(tmp_path):
    """A copy of the fixture, to be spoilt."""
    hf_dir = tmp_path / "llama"
    shutil.copytree(REFERENCE / "llama", hf_dir)
    return hf_dir


def edit(hf_dir, change) -> None:
    """Rewrites the tensors of a checkpoint."""
    tensors = load_file(hf_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, hf_dir / "model.safetensors")


def load_any(hf_dir, **changes):
    config = model_config(hf_dir, **changes)
    return load(make_reference_program(config), hf_dir, config)


def assert_trees_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", FAMILIES + EXPERT_FAMILIES)
def test_interop_export_is_the_import_undone(family, tmp_path):
    hf_dir, out = REFERENCE / family, tmp_path / "new" / "out"
    config, moe = model_config(hf_dir), moe_config(hf_dir)
    mesh = "expert2 x tensor2" if moe.num_experts else SHARDED
    params = load(make_reference_program(config, moe=moe, mesh=mesh), hf_dir, config)
    files = save_params(params, config=config, moe=moe, hf_dir=out, dtype="float32")
    assert sorted(files) == sorted(p.name for p in out.iterdir())
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    was, now = load_file(hf_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert was.keys() == now.keys()
    for name in was:
        np.testing.assert_array_equal(now[name], was[name], err_msg=name)
    with safe_open(out / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    old, new = (json.loads((d / "config.json").read_text()) for d in (hf_dir, out))
    assert new["architectures"] == old["architectures"]
    assert new["model_type"] == old["model_type"]
    assert model_config_from_hf(new) == model_config_from_hf(old)


def test_interop_several_files(tmp_path):
    hf_dir, out = REFERENCE / "llama", tmp_path / "out"
    config = model_config(hf_dir)
    program = make_reference_program(config, mesh=SHARDED)
    params = load(program, hf_dir, config)
    limit = 20_000
    files = save_params(params, config=config, hf_dir=out, dtype="float32", max_shard_bytes=limit)
    shards = [f for f in files if f.endswith(".safetensors")]
    assert len(shards) > 4
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        tensors = load_file(out / shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        assert {index["weight_map"][name] for name in tensors} == {shard}
        found.update(tensors)
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    again = load(program, out, config)
    assert_trees_equal(params, again)


@pytest.mark.parametrize("mesh", ["one device", SHARDED])
def test_interop_converts_dtypes(mesh, tmp_path):
    hf_dir, out = REFERENCE / "qwen3", tmp_path / "out"
    exact = load_any(hf_dir)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), exact)
    config = model_config(hf_dir, param_dtype="bfloat16")
    program = make_reference_program(config, mesh=mesh)
    params = load(program, hf_dir, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert_trees_equal(params, rounded)

    save_params(params, config=config, hf_dir=out, dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with safe_open(out / "model.safetensors", framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    again = load_any(out)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}
    assert_trees_equal(again, jax.tree.map(lambda x: x.astype(np.float32), rounded))


def test_interop_reads_gpt2_as_it_is_published(tmp_path):
    """Without `transformer.`, and with the buffers of old versions."""
    hf_dir = tmp_path / "gpt2"
    shutil.copytree(REFERENCE / "gpt2", hf_dir)

    def old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))

    edit(hf_dir, old)
    assert_trees_equal(load_any(hf_dir), load_any(REFERENCE / "gpt2"))


def test_interop_tied_head_may_be_stored_twice(tmp_path):
    hf_dir = tmp_path / "llama_tied"
    shutil.copytree(REFERENCE / "llama_tied", hf_dir)
    table = "model.embed_tokens.weight"
    edit(hf_dir, lambda tensors: tensors.update({"lm_head.weight": tensors[table]}))
    assert_trees_equal(load_any(hf_dir), load_any(REFERENCE / "llama_tied"))
    edit(hf_dir, lambda tensors: tensors.update({"lm_head.weight": tensors[table] + 1}))
    with pytest.raises(ConfigError, match=r"lm_head.weight: is not the embedding table"):
        load_any(hf_dir)


def test_interop_names_every_tensor_that_does_not_fit(llama):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((32, 32), np.float32)
        tensors["model.norm.weight"] = np.ones(32, np.int8)

    edit(llama, spoil)
    with pytest.raises(ConfigError) as caught:
        load_any(llama)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == [
        "lm_head.weight [96, 32]: missing",
        "model.layers.0.self_attn.q_proj.bias [32]: the config has no such parameter",
        "model.layers.1.mlp.up_proj.weight [48, 32]: missing",
        "model.layers.2.self_attn.k_proj.weight: [32, 32] in the checkpoint, must be [16, 32]",
        "model.norm.weight: dtype I8, must be F64, F32, F16, BF16",
    ]


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/hosts", "..", "", "gone", 3])
def test_interop_index_may_not_leave_the_directory(llama, name):
    (llama / "model.safetensors").rename(llama.parent / "weights.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"index\.json: "):
        load_any(llama)


def test_interop_reads_links_as_the_hub_keeps_them(llama):
    (llama / "model.safetensors").rename(llama.parent / "blob")
    (llama / "model.safetensors").symlink_to("../blob")
    assert_trees_equal(load_any(llama), load_any(REFERENCE / "llama"))


def test_interop_says_which_file_is_damaged(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ConfigError, match=r"model\.safetensors: no whole safetensors file"):
        load_any(llama)


def test_interop_never_loads_a_pickle(llama):
    (llama / "model.safetensors").unlink()
    (llama / "expected.safetensors").unlink()
    (llama / "training.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load_any(llama)
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a Python pickle.*convert it"):
        load_any(llama)


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_interop_config_json_must_be_there_and_json(llama, text):
    config = model_config(llama)
    program = make_reference_program(config)
    (llama / "config.json").unlink()
    if text is not None:
        (llama / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ConfigError, match=r"config\.json: "):
        load(program, llama, config)


def test_interop_export_overwrites_nothing_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    config = model_config(REFERENCE / "llama")
    params = load_any(REFERENCE / "llama")
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        save_params(params, config=config, hf_dir=full, dtype="float32")
    assert [p.name for p in full.iterdir()] == ["notes.txt"]

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(huggingface, "save_file", disk_full)
        with pytest.raises(OSError, match="No space"):
            save_params(params, config=config, hf_dir=tmp_path / "out", dtype="float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
    save_params(params, config=config, hf_dir=empty, dtype="float32")
    assert (empty / "model.safetensors").stat().st_mode == (empty / "config.json").stat().st_mode
