"""The local supervisor: N processes of one run, started, watched, restarted. Imports no JAX."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

PREEMPTED = 75
INTERRUPTED = 130
USER_ERROR = 2
_LONGEST_PAUSE = 30.0
_GRACE = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to supervise.

    Attributes:
        num_processes: of the run.
        max_restarts: in a row, without a new checkpoint in between.
        hang_seconds: without a step, until all is killed and restarted; 0: never.
        start_seconds: the same until an attempt's first step.
    """

    num_processes: int
    max_restarts: int
    hang_seconds: float
    start_seconds: float


@dataclasses.dataclass(frozen=True)
class _End:
    """How an attempt ended: the exit code to give, and why; restart if it is None."""

    code: int | None
    why: str


class Supervisor:
    """Runs a command as N processes until it is done."""

    def __init__(self, command: Sequence[str], options: Options) -> None:
        """Starts nothing yet.

        Args:
            command: `spmd-train`'s words.
            options: how.
        """
        self._command = list(command)
        self._options = options
        self._signals: list[int] = []
        self._checkpoint = -1
        self._failed_at: float | None = None
        self._writing = threading.Lock()

    def run(self) -> int:
        """Returns the exit code, once there is nothing more to do."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        attempt, fruitless = 0, 0
        while True:
            attempt += 1
            before = self._checkpoint
            end = self._attempt(attempt)
            if end.code is not None:
                self._say(f"attempt {attempt}: {end.why}")
                return end.code
            fruitless = 1 if self._checkpoint > before else fruitless + 1
            if fruitless > self._options.max_restarts:
                self._say(
                    f"attempt {attempt}: {end.why}. Giving up: restarted {fruitless - 1} times and "
                    f"no checkpoint after that of step {self._checkpoint} was written "
                    f"(--max_restarts={self._options.max_restarts})"
                )
                return 1
            pause = 0.0 if fruitless == 1 else min(_LONGEST_PAUSE, 2.0 ** (fruitless - 2))
            self._say(f"attempt {attempt}: {end.why}. Restarting all in {pause:g} s")
            limit = time.monotonic() + pause
            while time.monotonic() < limit and not self._signals:
                time.sleep(0.1)
            if self._signals:
                return self._told_to_stop()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _told_to_stop(self) -> int:
        return INTERRUPTED if signal.SIGINT in self._signals else PREEMPTED

    def _say(self, text: str) -> None:
        self._print(f"[launch] {text}\n".encode())

    def _print(self, line: bytes) -> None:
        with self._writing:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()

    def _attempt(self, attempt: int) -> _End:
        port = _free_port()
        ranks: list[_Rank] = []
        try:
            for rank in range(self._options.num_processes):
                ranks.append(_Rank(self, rank, port, self._command))
            self._say(
                f"attempt {attempt}: {len(ranks)} processes "
                f"{[r.process.pid for r in ranks]}, coordinator 127.0.0.1:{port}"
            )
            return self._watch(ranks)
        finally:
            for rank in ranks:
                rank.end()

    def _watch(self, ranks: list[_Rank]) -> _End:
        passed_on = 0
        while True:
            time.sleep(0.05)
            for number in self._signals[passed_on:]:
                passed_on += 1
                if self._signals.count(signal.SIGINT) > 1:
                    return _End(INTERRUPTED, "interrupted twice: all killed")
                self._say(f"{signal.Signals(number).name}: told all processes to save and stop")
                for rank in ranks:
                    rank.send(signal.SIGTERM)
            for rank in ranks:
                rank.read_heartbeat()
                self._checkpoint = max(self._checkpoint, rank.checkpoint)
            if self._failed_at is not None and all(rank.stepped for rank in ranks):
                seconds = time.monotonic() - self._failed_at
                self._say(f"stepping again {seconds:.1f} s after the failure")
                self._failed_at = None
            codes = [rank.process.poll() for rank in ranks]
            if all(code in (0, PREEMPTED, INTERRUPTED) for code in codes):
                code = max(code for code in codes if code is not None)
                return _End(
                    code, {0: "done", PREEMPTED: "preempted and saved"}.get(code, "stopped")
                )
            if self._signals and all(c in (0, PREEMPTED, -signal.SIGTERM) for c in codes):
                return _End(self._told_to_stop(), "stopped before there was anything to save")
            # One that dies can take others with it within the same look: all are named.
            dead = {
                rank: code
                for rank, code in zip(ranks, codes, strict=True)
                if code is not None and code not in (0, PREEMPTED, INTERRUPTED)
            }
            if dead:
                return self._failed(ranks, dead)
            if (silent := self._silent(ranks)) is not None:
                return silent

    def _failed(self, ranks: list[_Rank], dead: dict[_Rank, int]) -> _End:
        self._failed_at = time.monotonic()
        # The others are about to say why, or hang on the one that died.
        limit = time.monotonic() + _GRACE
        while time.monotonic() < limit and any(r.process.poll() is None for r in ranks):
            time.sleep(0.05)
        if any(r.process.poll() == USER_ERROR for r in ranks):
            return _End(USER_ERROR, "the command is mistaken, see above")
        how = "failed" if self._signals else "died"
        names = ", ".join(f"rank {r.rank} {how} ({_how(code)})" for r, code in dead.items())
        if self._signals:
            return _End(1, f"{names} while stopping")
        return _End(None, f"{names} at step {max(r.step for r in dead)}")

    def _silent(self, ranks: list[_Rank]) -> _End | None:
        options = self._options
        for rank in ranks:
            limit = options.hang_seconds if rank.stepped else options.start_seconds
            if not limit or rank.process.poll() is not None:
                continue
            if (seconds := time.monotonic() - rank.last_sign) > limit:
                break
        else:
            return None
        self._failed_at = time.monotonic()
        self._say(f"no step for {seconds:.0f} s; where every process is:")
        for other in ranks:
            self._say(f"rank {other.rank}, pid {other.process.pid}: {other.state()}")
            other.send(signal.SIGUSR1)
        time.sleep(_GRACE)
        return _End(None, f"hung: rank {rank.rank} made no step for {seconds:.0f} s")


class _Rank:
    """One process, its output and its heartbeat."""

    def __init__(
        self, supervisor: Supervisor, rank: int, port: int, command: Sequence[str]
    ) -> None:
        self.rank = rank
        self.step = -1
        self.checkpoint = -1
        self.stepped = False
        self.last_sign = time.monotonic()
        self._first_step: int | None = None
        # Without a name: nobody has to delete it, whoever is killed.
        self._heartbeat = tempfile.TemporaryFile()  # noqa: SIM115
        self._seen = b""
        self._print = supervisor._print
        options = supervisor._options
        environ = {
            **os.environ,
            "SPMD_TRAIN_SUPERVISOR": str(os.getpid()),
            "SPMD_TRAIN_HEARTBEAT": str(self._heartbeat.fileno()),
            "SPMD_TRAIN_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "SPMD_TRAIN_NUM_PROCESSES": str(options.num_processes),
            "SPMD_TRAIN_PROCESS_ID": str(rank),
        }
        if options.num_processes > 1 and Path("/dev/nvidia0").exists():
            environ.setdefault("JAX_LOCAL_DEVICE_IDS", str(rank))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spmd_train", *command],
            env=environ,
            pass_fds=[self._heartbeat.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C on the terminal reaches the supervisor alone, which passes it on once.
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _copy(self, output: BinaryIO) -> None:
        for line in output:
            self._print(b"[%d] %s" % (self.rank, line if line.endswith(b"\n") else line + b"\n"))

    def read_heartbeat(self) -> None:
        """Notes a step, if there was one since."""
        content = os.pread(self._heartbeat.fileno(), 64, 0)
        if content == self._seen or not content.endswith(b"\n"):
            return
        self._seen = content
        self.step, self.checkpoint = map(int, content.split())
        self.last_sign = time.monotonic()
        if self._first_step is None:
            self._first_step = self.step
        self.stepped = self.step > self._first_step

    def state(self) -> str:
        """What the operating system says of it."""
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "gone"
        letter = text.rpartition(")")[2].split()[0]
        known = {"T": "stopped by a signal: cannot answer", "Z": "dead", "D": "in the disk's hands"}
        return known.get(letter, "alive")

    def send(self, number: int) -> None:
        """Sends a signal, if it still lives."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Kills it and whatever it has started, and prints the rest of its output."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._heartbeat.close()
        self._reader.join(timeout=5)
        assert self.process.stdout is not None
        if not self._reader.is_alive():
            self.process.stdout.close()


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
