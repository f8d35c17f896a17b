"""A real SLURM of one node: scripts/slurm.sbatch, stopped by a signal and requeued."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import fault_helpers as faults
import pytest

from spmd_train.observe import read_examples, read_jsonl

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def slurm(monkeypatch):
    """A cluster of this machine; a function that asks it something."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as name,
        contextlib.ExitStack() as s,
    ):
        folder = pathlib.Path(name)
        for part in ("state", "spool"):
            (folder / part).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        config = folder / "slurm.conf"
        config.write_text(
            CONFIG.format(host=socket.gethostname(), folder=folder, ports=free_ports(2))
        )
        monkeypatch.setenv("SLURM_CONF", str(config))
        munge = {"key-file": key} | {
            f"{kind}-file": folder / f"munge.{kind}" for kind in ("pid", "seed", "log")
        }
        words = [f"--{option}={path}" for option, path in munge.items()]
        socket_path = f"--socket={folder}/munge.socket"
        for command in (
            ["munged", "--foreground", "--force", socket_path, *words],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        ):
            log = s.enter_context((folder / f"{command[0]}.log").open("wb"))
            daemon = subprocess.Popen(command, stdout=log, stderr=log)
            s.callback(daemon.wait, 60)
            s.callback(daemon.terminate)
            time.sleep(1)

        def ask(*words: str) -> str:
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout

        faults.until(lambda: "idle" in ask("sinfo", "-h"), what="the node", seconds=60)
        yield ask
        ask("scancel", "--user=root")


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="needs root and Debian's slurmctld, slurmd, slurm-client and munge",
)
def test_cluster_slurm_requeues_a_stopped_job(slurm, tmp_path, monkeypatch):
    shims = tmp_path / "bin"
    shims.mkdir()
    program = shims / "spmd-train"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m spmd_train "$@"\n')
    program.chmod(0o755)
    for name, value in faults.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")

    workdir, log = tmp_path / "run", tmp_path / "log"
    words = faults.command(workdir, devices=2, train__log_examples="true")[1:]
    job = slurm(
        *("sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"),
        *("--gpus-per-node=0", f"--output={log}"),
        *(str(faults.ROOT / "scripts" / "slurm.sbatch"), *words),
    ).strip()

    def state() -> str:
        return slurm("squeue", "-h", "-j", job, "-o", "%T").strip()

    def told() -> str:
        return log.read_text() if log.exists() else ""

    faults.until(lambda: faults.steps_logged(workdir) >= 12, what="step 12")
    slurm("scancel", "--signal=TERM", job)
    faults.until(lambda: "stopped after step" in told(), what="the save")
    faults.until(lambda: state() == "PENDING", what="the requeue")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    last = faults.TINY["train.num_steps"]
    faults.until(lambda: faults.steps_logged(workdir) == last, what="the last step")
    faults.until(lambda: state() in ("", "COMPLETED"), what="the end")
    assert "process 1 of 2" in told() and "goes on from step" in told()
    assert [m["step"] for m in read_jsonl(workdir / "metrics.jsonl")] == list(range(1, last + 1))
    assert sorted(read_examples(workdir)) == list(range(last))
