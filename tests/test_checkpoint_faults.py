"""Damaged, half-written and impossible checkpoints: what is restored is what was saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.checkpoint import Checkpointer, steps
from spmd_train.cli.main import main
from spmd_train.config import CheckpointConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with good checkpoints of steps 3 and 7."""
    workdir = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpointer(workdir, CheckpointConfig())) as checkpoints:
        for step in (3, 7):
            checkpoints.save(step, _state(step), {"data": {"step": step}})
        checkpoints.wait()
    (workdir / "config.json").write_text("{}")
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def _sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, P("data"))


def _state(step):
    x = jnp.arange(512, dtype=jnp.float32) * step
    return {"a": jax.device_put(x, _sharding()), "b": jax.device_put(jnp.int32([step] * 8))}


def _restore(workdir, **config):
    """The step that a run would go on from, and its state."""
    config = CheckpointConfig(**config)
    with contextlib.closing(Checkpointer(workdir, config)) as checkpoints:
        step = checkpoints.newest_good()
        if step is None:
            return None, None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0)
        )
        return step, checkpoints.restore(step, abstract)


def _data_files(workdir, step):
    root = workdir / "checkpoints" / str(step)
    return [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != steps.MANIFEST]


def _flip(path, seed=0):
    content = bytearray(path.read_bytes())
    at = int(np.random.default_rng(seed).integers(len(content) * 8))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


DAMAGE = {
    "bit flip": lambda d: _flip(max((d / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)),
    "truncation": lambda d: os.truncate(d / "state" / "manifest.ocdbt", 9),
    "deletion": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
    "empty directory": lambda d: (shutil.rmtree(d), d.mkdir()),
    "no manifest": lambda d: (d / steps.MANIFEST).unlink(),
    "flipped manifest": lambda d: (d / steps.MANIFEST).write_text(
        (d / steps.MANIFEST).read_text().replace('"bytes": ', '"bytes": 1')
    ),
    "manifest of another step": lambda d: shutil.copy(
        d.parent / "3" / steps.MANIFEST, d / steps.MANIFEST
    ),
    "extra file": lambda d: (d / "state" / "extra").write_text("?"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoint_damage_falls_back(workdir, caplog, damage):
    folder = workdir / "checkpoints"
    DAMAGE[damage](folder / "7")
    with caplog.at_level(logging.WARNING):
        step, state = _restore(workdir)
    assert step == 3
    np.testing.assert_array_equal(state["a"], np.arange(512, dtype=np.float32) * 3)
    assert (folder / "7.bad-1").is_dir() and not (folder / "7").exists()
    assert "checkpoint 7 is bad" in caplog.text


def test_checkpoint_every_flipped_bit_is_found(workdir):
    for seed, path in enumerate(_data_files(workdir, 7) * 3):
        content = path.read_bytes()
        if content:
            _flip(path, seed)
            told = steps.faults(workdir / "checkpoints", 7, how="full")
            assert len(told) == 1 and path.name in told[0]
            path.write_bytes(content)
    assert steps.faults(workdir / "checkpoints", 7, how="full") == []


def test_checkpoint_manifest_of_blake2b_counts(workdir):
    """What versions before XXH3 wrote."""
    root = workdir / "checkpoints" / "7"
    manifest = json.loads((root / steps.MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        del entry["xxh3_128"]
        content = (root / name).read_bytes()
        entry["blake2b"] = hashlib.blake2b(content, digest_size=32).hexdigest()
    listed = json.dumps(manifest["files"], sort_keys=True).encode()
    manifest["blake2b"] = hashlib.blake2b(listed, digest_size=32).hexdigest()
    (root / steps.MANIFEST).write_text(json.dumps(manifest))
    assert steps.faults(workdir / "checkpoints", 7, how="full") == []
    _flip(root / "meta" / "metadata")
    assert steps.faults(workdir / "checkpoints", 7, how="full")


def test_checkpoint_verify_levels(workdir):
    largest = max(_data_files(workdir, 7), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    _flip(largest)
    assert steps.faults(workdir / "checkpoints", 7, how="off") == []
    found = [bool(steps.faults(workdir / "checkpoints", 7, how="sample")) for _ in range(60)]
    assert any(found) and not all(found)
    largest.write_bytes(content[:-1])
    assert steps.faults(workdir / "checkpoints", 7, how="sample")
    assert steps.faults(workdir / "checkpoints", 7, how="off") == []


def test_checkpoint_both_bad_and_neither_is_restored(workdir):
    DAMAGE["deletion"](workdir / "checkpoints" / "3")
    DAMAGE["no manifest"](workdir / "checkpoints" / "7")
    assert _restore(workdir) == (None, None)
    # 7 may be a save that was not finished.
    assert steps.damaged_steps(workdir / "checkpoints") == ["3.bad-1"]


def test_checkpoint_leavings_are_removed(workdir):
    folder = workdir / "checkpoints"
    for name in ("9.orbax-checkpoint-tmp", "2.trash", "9.orbax-checkpoint-tmp-123"):
        shutil.copytree(folder / "3", folder / name)
    (folder / "notes").mkdir()
    assert _restore(workdir)[0] == 7
    assert sorted(p.name for p in folder.iterdir()) == ["3", "7", "notes"]


def test_checkpoint_old_ones_go_after_the_new_one_counts(tmp_path, monkeypatch):
    config = CheckpointConfig(keep_last=1, keep_every=4, max_failures=9)
    with contextlib.closing(Checkpointer(tmp_path, config)) as checkpoints:
        for step in (1, 4, 6):
            checkpoints.save(step, _state(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6]
        monkeypatch.setattr(steps, "commit", _disk_full)
        checkpoints.save(8, _state(8), {})
    assert steps.all_steps(tmp_path / "checkpoints") == [4, 6]


def _disk_full(*_):
    raise OSError(28, "No space left on device")


def test_checkpoint_failures_warn_then_end(tmp_path, monkeypatch, caplog):
    config = CheckpointConfig(max_failures=2)
    commit = steps.commit
    checkpoints = Checkpointer(tmp_path, config)
    checkpoints.save(1, _state(1), {})
    checkpoints.wait()
    monkeypatch.setattr(steps, "commit", _disk_full)
    checkpoints.save(2, _state(2), {})
    with pytest.raises(OSError, match="could not be written"):
        checkpoints.wait()
    assert "the checkpoint of step 2 could not be written (1 of" in caplog.text
    assert "No space left on device" in caplog.text
    assert steps.all_steps(tmp_path / "checkpoints") == [1]
    # Room again: saves succeed, and the count begins anew.
    monkeypatch.setattr(steps, "commit", commit)
    checkpoints.save(3, _state(3), {})
    checkpoints.wait()
    assert checkpoints.committed == 3
    monkeypatch.setattr(steps, "commit", _disk_full)
    checkpoints.save(4, _state(4), {})
    checkpoints.save(5, _state(5), {})
    with pytest.raises(OSError, match="2 checkpoints in a row"):
        checkpoints.wait()
    checkpoints.close()
    assert _restore(tmp_path)[0] == 3


def test_checkpoint_verbs(workdir, capsys):
    flag = f"--workdir={workdir}"

    def answer(*words, code=0):
        assert main(["checkpoints", *words, flag, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    assert [row["name"] for row in answer("list")["checkpoints"]] == ["3", "7"]
    assert all(row["good"] for row in answer("verify")["checkpoints"])
    DAMAGE["bit flip"](workdir / "checkpoints" / "7")
    rows = answer("verify", code=1)["checkpoints"]
    assert [row["good"] for row in rows] == [True, False]
    assert "hash differs" in rows[1]["faults"][0]
    assert answer("verify", "--step=3")["checkpoints"][0]["good"]
    assert _restore(workdir)[0] == 3
    assert [row["state"] for row in answer("list")["checkpoints"]] == ["finished", "bad"]
    assert answer("prune") == {"deleted": ["7.bad-1"], "kept": [3]}
    assert main(["checkpoints", "list", flag]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["checkpoints", "verify", flag, "--step=7"]) == 2
    assert main(["checkpoints", "list", f"--workdir={workdir}/none"]) == 2


def test_checkpoint_prune_of_anothers_is_refused(saved, capsys):
    with tempfile.TemporaryDirectory() as name:
        workdir = shutil.copytree(saved, pathlib.Path(name) / "run")
        folder = workdir / "checkpoints"
        (folder / "7").rename(folder / "7.bad-1")
        for way in (pathlib.Path(name), workdir):
            way.chmod(0o755)  # Others may read.
        folder.chmod(0o555)
        if root := os.geteuid() == 0:
            os.seteuid(65534)
        try:
            assert main(["checkpoints", "prune", f"--workdir={workdir}"]) == 2
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
        told = capsys.readouterr().err
        assert re.search(r"--workdir=\S+: cannot .*7.bad-1.*a user who may", told)
        assert sorted(p.name for p in folder.iterdir()) == ["3", "7.bad-1"]
