"""Two hosts with a real network between them, as namespaces of this machine; the link is cut."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess

import fault_helpers as faults
import pytest

from spmd_train.observe import read_examples

HOSTS = ("spmda", "spmdb")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
SILENCE = {"SPMD_TRAIN_HEARTBEAT_SECONDS": "10", "SPMD_TRAIN_SHUTDOWN_SECONDS": "20"}


def ip(words: str, *, host: str | None = None, check: bool = True) -> None:
    inside = ["-n", host] if host else []
    subprocess.run(["ip", *inside, *words.split()], check=check, capture_output=True)


@contextlib.contextmanager
def two_hosts():
    """A cable between two network namespaces, each with nothing else but its loopback."""
    try:
        for host in HOSTS:
            ip(f"netns add {host}")
        ip(f"link add {HOSTS[0]} type veth peer name {HOSTS[1]}")
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip(f"link set {host} netns {host}")
            ip(f"addr add {address}/24 dev {host}", host=host)
            ip("link set lo up", host=host)
            ip(f"link set {host} up", host=host)
        yield
    finally:
        for host in HOSTS:
            ip(f"netns del {host}", check=False)


def start(rank: int, workdir, log):
    """A rank on its host, which has a name of its own that resolves to its address."""
    names = workdir.parent / f"hosts{rank}"
    names.write_text(f"127.0.0.1 localhost\n{ADDRESSES[rank]} {HOSTS[rank]}\n")
    script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
    prefix = ["ip", "netns", "exec", HOSTS[rank], "unshare", "--uts", "sh", "-c", script]
    words = faults.command(workdir, devices=2, train__log_examples="true")
    place = {
        "SPMD_TRAIN_COORDINATOR_ADDRESS": f"{ADDRESSES[0]}:7777",
        "SPMD_TRAIN_NUM_PROCESSES": "2",
        "SPMD_TRAIN_PROCESS_ID": str(rank),
    }
    before = [*prefix, HOSTS[rank], str(names)]
    return faults.start(words, log=log, environ=place | SILENCE, before=before)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and ip"
)
def test_cluster_survives_a_cut_link(tmp_path):
    workdir = tmp_path / "run"
    with two_hosts():
        logs = [tmp_path / f"cut{rank}" for rank in (0, 1)]
        ranks = [start(rank, workdir, log) for rank, log in enumerate(logs)]
        faults.until(lambda: faults.steps_logged(workdir) >= 12, what="step 12")
        ip(f"link set {HOSTS[1]} down", host=HOSTS[1])
        for run, log in zip(ranks, logs, strict=True):
            assert faults.end(run, log=log, seconds=90) not in (0, 2, 75)
            assert re.search("heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED", log.read_text())
        assert faults.steps_logged(workdir) < faults.TINY["train.num_steps"]

        ip(f"link set {HOSTS[1]} up", host=HOSTS[1])
        logs = [tmp_path / f"again{rank}" for rank in (0, 1)]
        ranks = [start(rank, workdir, log) for rank, log in enumerate(logs)]
        for run, log in zip(ranks, logs, strict=True):
            assert faults.end(run, log=log) == 0, log.read_text()
        assert re.search(r"goes on from step [1-9]", logs[0].read_text())
    whole = tmp_path / "whole"
    words = ["launch", "--num_processes=2", "--simulate_devices=2", "--"]
    command = faults.command(whole, devices=0, train__log_examples="true")
    assert faults.run([*words, *command], log=tmp_path / "log") == 0
    faults.assert_same(faults.final_params(workdir), faults.final_params(whole))
    assert read_examples(workdir) == read_examples(whole)
