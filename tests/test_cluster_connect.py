"""Who am I, how many are we: as flags, the environment and simulated clusters say it."""

from __future__ import annotations

import os
import re
import socket

import fault_helpers as faults
import pytest
import yaml

from spmd_train import cluster
from spmd_train.config import ConfigError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}

# Opens data after all others have.
LATE = """
import time
from spmd_train import training
def open_data(*args, __open=training.open_data, **kwargs):
    time.sleep(5)
    return __open(*args, **kwargs)
training.open_data = open_data
"""


@pytest.fixture
def nowhere(monkeypatch):
    """No sign of any cluster."""
    for names in cluster._SIGNS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    return monkeypatch


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "environ, name",
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # The shell of salloc: a job, but not a task of it.
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OpenMPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, "TPU"),
    ],
)
def test_cluster_is_recognized(nowhere, environ, name):
    for variable, value in environ.items():
        nowhere.setenv(variable, value)
    assert cluster._cluster_of_environment() == name


def test_cluster_flags_win_over_environment(nowhere):
    nowhere.setenv("SPMD_TRAIN_NUM_PROCESSES", "4")
    nowhere.setenv("SPMD_TRAIN_PROCESS_ID", "3")
    place = cluster._place_of_environment(cluster.Place(process_id=0, coordinator_address="h:1"))
    assert place == ("h:1", 4, 0)
    nowhere.setenv("SPMD_TRAIN_PROCESS_ID", "three")
    with pytest.raises(ConfigError, match="SPMD_TRAIN_PROCESS_ID='three'"):
        cluster.connect()


def test_cluster_incomplete_says_what_was_seen(nowhere):
    cluster.connect()
    cluster.connect(cluster.Place(num_processes=1))
    nowhere.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(ConfigError, match=r"--coordinator_address and --process_id.*SLURM_JOB_ID"):
        cluster.connect(cluster.Place(num_processes=2))
    with pytest.raises(ConfigError, match="coordinator_address=here: must be HOST:PORT"):
        cluster.connect(cluster.Place("here", num_processes=2, process_id=0))
    with pytest.raises(ConfigError, match=r"--process_id=2: must be 0 to 1, of 2 processes"):
        cluster.connect(cluster.Place("here:1", num_processes=2, process_id=2))


def test_cluster_that_cannot_be_read_says_what_was_seen(tmp_path):
    log = tmp_path / "log"
    environ = {"OMPI_COMM_WORLD_SIZE": "2"}
    code = faults.run(faults.command(tmp_path / "run", devices=1), log=log, environ=environ)
    text = log.read_text()
    assert code == 2 and "Traceback" not in text
    assert re.search(r"OpenMPI.*OMPI_COMM_WORLD_SIZE=2.*--process_id=I", text)


def test_cluster_slurm_processes_that_differ_are_named(tmp_path):
    """Two real processes under SLURM's variables; the second has another seed."""
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    address = str(port())
    runs = [
        faults.start(
            faults.command(tmp_path / "run", devices=1, train__seed=rank),
            log=log,
            environ=SLURM | {"SLURM_PROCID": str(rank), "JAX_COORDINATOR_PORT": address},
        )
        for rank, log in enumerate(logs)
    ]
    for run, log in zip(runs, logs, strict=True):
        assert faults.end(run, log=log) == 2, log.read_text()
        assert re.search(r"process 1 on .*: config.train.seed is 1, elsewhere 0", log.read_text())
    assert not (tmp_path / "run").exists()


def test_cluster_mistake_of_one_process_is_told_by_all(tmp_path):
    """Data that is missing on one of two hosts, which takes longer than the other to notice."""
    path = os.path.relpath(faults.text_of(tmp_path), faults.ROOT)
    words = faults.command(tmp_path / "run", devices=1, data__path=path)
    elsewhere = f"import os\nos.chdir({str(tmp_path)!r})\n"
    codes, told = faults.run_together(words, folder=tmp_path, prelude={1: elsewhere + LATE})
    assert codes == [2, 2], told
    for text, whose in zip(told, ("process 1 on .*: ", ""), strict=True):
        assert re.search(f"\nspmd-train: {whose}data.path=.*matches no file.*\n$", text), text
        assert not re.search(r"^[EFW]\d{4} |Traceback", text, re.M), "C++ and Python are silent"
    assert not (tmp_path / "run").exists()


def test_cluster_kubernetes_pods_of_the_jobset_train(tmp_path):
    """Two real processes with what scripts/k8s/jobset.yaml and Kubernetes put into their pods."""
    jobset = yaml.safe_load((faults.ROOT / "scripts" / "k8s" / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    address = f"127.0.0.1:{port()}"
    logs = [tmp_path / f"log{index}" for index in (0, 1)]
    runs = []
    for index, log in enumerate(logs):
        values = {
            "SPMD_TRAIN_COORDINATOR_ADDRESS": address,  # no DNS here
            "SPMD_TRAIN_NUM_PROCESSES": "2",
            "SPMD_TRAIN_PROCESS_ID": str(index),  # the annotation's value
        }
        environ = {one["name"]: values[one["name"]] for one in container["env"]}
        environ |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)}
        words = faults.command(tmp_path / "run", devices=1, train__num_steps=10)
        runs.append(faults.start(words, log=log, environ=environ))
    for index, (run, log) in enumerate(zip(runs, logs, strict=True)):
        assert faults.end(run, log=log) == 0, log.read_text()
        assert f"process {index} of 2" in log.read_text()
    assert container["command"][:2] == ["spmd-train", "train"]
    assert faults.steps_logged(tmp_path / "run") == 10


def test_cluster_missing_process_times_out(tmp_path):
    log = tmp_path / "log"
    environ = {
        "SPMD_TRAIN_COORDINATOR_ADDRESS": f"127.0.0.1:{port()}",
        "SPMD_TRAIN_NUM_PROCESSES": "2",
        "SPMD_TRAIN_PROCESS_ID": "0",
        "SPMD_TRAIN_CONNECT_SECONDS": "2",
    }
    code = faults.run(faults.command(tmp_path / "run", devices=1), log=log, environ=environ)
    assert code not in (0, 2, 75)
    assert "DEADLINE_EXCEEDED" in log.read_text()
