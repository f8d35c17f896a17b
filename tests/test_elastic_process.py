"""The same command on fewer and on more devices and processes: same batches, same result."""

from __future__ import annotations

import fault_helpers as faults
import numpy as np
import pytest
from test_launch_faults import launch

from spmd_train.observe import read_examples, read_jsonl

# Float32 noise of other sums; the losses are 3 to 6.
LOSS_TOLERANCE = 2e-5


def losses(workdir):
    return [line["loss"] for line in read_jsonl(workdir / "metrics.jsonl")]


def test_elastic_devices(tmp_path):
    whole, workdir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    # At most one sequence at a time: two devices take four microbatches where eight took one.
    changes = {"train__log_examples": "true", "train__max_device_batch": 1}
    words = faults.command(whole, devices=8, train__num_steps=24, **changes)
    assert faults.run(words, log=log) == 0, log.read_text()
    for devices, steps in ((8, 6), (4, 12), (2, 18), (8, 24)):
        words = faults.command(workdir, devices=devices, train__num_steps=steps, **changes)
        assert faults.run(words, log=log) == 0, log.read_text()
    for size in ("data=8", "data=4", "data=2"):
        assert f"parameters on {size} " in log.read_text()
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=0, atol=LOSS_TOLERANCE)
    assert read_examples(workdir) == read_examples(whole)
    one, other = (faults.final_params(path, 24) for path in (whole, workdir))
    assert one.keys() == other.keys()


@pytest.mark.slow
def test_elastic_processes(tmp_path):
    whole, workdir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert faults.run(launch(whole, num_processes=4), log=log, seconds=500) == 0, log.read_text()
    for processes, steps in ((4, 20), (2, 40), (4, 60)):
        words = launch(workdir, num_processes=processes, train__num_steps=steps)
        assert faults.run(words, log=log, seconds=500) == 0, log.read_text()
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=0, atol=LOSS_TOLERANCE)
    assert read_examples(workdir) == read_examples(whole)
