"""Against torch and `transformers` themselves (extra `reference`): `make test-reference`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from interop_helpers import (
    EXPERT_FAMILIES,
    FAMILIES,
    REFERENCE,
    load,
    make_batch,
    make_reference_program,
    model_config,
    moe_config,
)
from safetensors.numpy import load_file

from spmd_train.interop import save_params
from spmd_train.parallel.rules import use_layout

# Warnings of torch and transformers are theirs.
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("default")]

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_reference_fixtures.py"
# Another CPU, or another version of torch, sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_reference_fixtures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_fixtures_are_what_the_script_makes(script, tmp_path):
    script.make(tmp_path)

    def files(root):
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    assert files(tmp_path) == files(REFERENCE)
    assert {name.partition("/")[0] for name in files(REFERENCE)} == {*FAMILIES, *EXPERT_FAMILIES}
    for name in files(REFERENCE):
        if name.endswith(".json"):
            made, kept = (json.loads((d / name).read_text()) for d in (tmp_path, REFERENCE))
            for config in (made, kept):
                del config["transformers_version"]
            assert made == kept, name
        else:
            made, kept = (load_file(d / name) for d in (tmp_path, REFERENCE))
            assert made.keys() == kept.keys(), name
            for tensor, value in kept.items():
                is_drawn = name.endswith("model.safetensors") or tensor == "ids"
                np.testing.assert_allclose(
                    made[tensor],
                    value,
                    rtol=0 if is_drawn else TOLERANCE,
                    atol=0 if is_drawn else TOLERANCE,
                    err_msg=f"{name} {tensor}",
                )


@pytest.mark.parametrize("family", FAMILIES + EXPERT_FAMILIES)
def test_reference_transformers_reads_our_export(script, family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    hf_dir, out = REFERENCE / family, tmp_path / "out"
    config, moe = model_config(hf_dir), moe_config(hf_dir)
    program = make_reference_program(config, moe=moe, mesh="fsdp2 x tensor2")
    params = load(program, hf_dir, config)
    save_params(params, config=config, moe=moe, hf_dir=out, dtype="float32", max_shard_bytes=50_000)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert (
        type(model).__name__ == json.loads((hf_dir / "config.json").read_text())["architectures"][0]
    )
    assert model.dtype == torch.float32

    ids = load_file(hf_dir / "expected.safetensors")["ids"]
    original = AutoModelForCausalLM.from_pretrained(hf_dir)
    with torch.no_grad():
        theirs, exported = (
            m.eval()(input_ids=torch.from_numpy(ids).long()).logits.numpy()
            for m in (original, model)
        )
    np.testing.assert_array_equal(exported, theirs)

    batch = make_batch(program, ids)
    with use_layout(program.layout):
        loss = program.model.task.loss(program.model.merge(params), batch, key=None)
    mean = float(loss.loss_sum / loss.weight_sum)
    log_probabilities = torch.log_softmax(torch.from_numpy(exported[:, :-1]), dim=-1)
    picked = log_probabilities.gather(-1, torch.from_numpy(ids[:, 1:, None]).long())
    assert mean == pytest.approx(-float(picked.mean()), rel=1e-6)
