"""Real runs under `spmd-train launch`, with faults by a seeded schedule.

    PYTHONPATH=. python scripts/chaos.py --faults=50 --seed=0

Trains a tiny model to its end twice: once in peace, once while processes are killed, stopped and
told to go, and checkpoints are damaged. Then asks: are the final parameters, bit for bit, those of
the run in peace; was each example consumed once; is no process and no unfinished file left?
Prints a line for each fault, and a table of the seconds until the run steps again. Exit code 0 if
every promise was kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fault_helpers as helpers  # noqa: E402

from spmd_train.checkpoint import steps as folders  # noqa: E402
from spmd_train.observe import read_examples  # noqa: E402
from spmd_train.observe.account import account  # noqa: E402
from spmd_train.observe.goodput import read_goodput  # noqa: E402

HANG_SECONDS = 20
# Of every process of the run: while the file is there, each batch has a weight that is no number.
POISONER = """
import importlib.abc, importlib.machinery, os, sys

class Poisoner(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "spmd_train.data.dataset":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def patched(module):
            run(module)
            batch = module.Dataset.batch
            def poisoned(self, step, **options):
                made = batch(self, step, **options)
                if os.path.exists(os.environ["CHAOS_POISON"]):
                    made["weights"][0, 3] = float("nan")
                return made
            module.Dataset.batch = poisoned
        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Poisoner())
"""


class Chaos:
    """One run, and what is done to it."""

    def __init__(self, args: argparse.Namespace, folder: pathlib.Path) -> None:
        self.folder, self.workdir, self.log = folder, folder / "run", folder / "log"
        self.random = random.Random(args.seed)
        self.args = args
        # Enough that the run does not end before the last fault; a full disk takes nothing back.
        self.num_steps = 20 + (24 if args.disk else 12) * args.faults
        self.seen: set[int] = set()
        self.launcher: subprocess.Popen[bytes] | None = None
        self.offset = 0
        self.poison = folder / "poison"
        self.environ = {
            "PYTHONPATH": f"{folder / 'poisoner'}{os.pathsep}{ROOT}",
            "CHAOS_POISON": str(self.poison),
        }
        (folder / "poisoner").mkdir(exist_ok=True)
        (folder / "poisoner" / "sitecustomize.py").write_text(POISONER)

    def words(self, workdir: pathlib.Path) -> list[str]:
        changes = {
            "train__num_steps": self.num_steps,
            "train__checkpoint_every": 5,
            "train__log_examples": "true",
            "checkpoint__keep_last": 3,
        }
        flags = {
            "num_processes": self.args.num_processes,
            "simulate_devices": self.args.devices,
            "hang_seconds": HANG_SECONDS,
            "max_restarts": 5,
        }
        told = [f"--{name}={value}" for name, value in flags.items()]
        return ["launch", *told, "--", *helpers.command(workdir, devices=0, **changes)]

    def start(self) -> None:
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        self.launcher = helpers.start(self.words(self.workdir), log=self.log, environ=self.environ)
        self.seen.add(self.launcher.pid)

    def ranks(self) -> list[int]:
        """Process ids of the attempt that goes on."""
        text = self.log.read_bytes()[self.offset :].decode(errors="replace")
        found = re.findall(r"attempt \d+: \d+ processes \[([\d, ]+)\]", text)
        pids = [int(pid) for pid in found[-1].split(",")] if found else []
        self.seen.update(pids)
        return pids

    def attempts(self) -> int:
        """How many there were, over all launches."""
        return len(re.findall(rb"attempt \d+: \d+ processes", self.log.read_bytes()))

    def until_stepping(self, wanted: int, *, after: int = 0) -> None:
        """Waits for so many steps of the attempt that goes on, or of a new launch.

        Args:
            wanted: how many.
            after: in an attempt after so many.
        """
        while self.attempts() <= after and self.launcher and self.launcher.poll() is None:
            time.sleep(0.01)
        before = self.lines()
        limit = time.monotonic() + 400
        while self.lines() - before < wanted:
            assert self.launcher is not None
            if self.launcher.poll() is not None:
                return
            assert time.monotonic() < limit, self.log.read_text()[-3000:]
            time.sleep(0.01)
        self.ranks()

    def lines(self) -> int:
        """Steps that were reported, over all attempts."""
        return len(re.findall(rb"\] train +\d", self.log.read_bytes())) if self.log.exists() else 0

    def wait(self, code: int) -> None:
        assert self.launcher is not None
        got = helpers.end(self.launcher, log=self.log, seconds=400)
        assert got == code, f"exit code {got}, not {code}:\n{self.log.read_text()[-3000:]}"

    def kill_rank(self) -> None:
        os.kill(self.random.choice(self.ranks()), signal.SIGKILL)

    def kill_coordinator(self) -> None:
        os.kill(self.ranks()[0], signal.SIGKILL)

    def take_port(self) -> None:
        """The restart's coordinator finds its port in use; the restart after that has another."""
        ports = re.compile(rb"coordinator 127.0.0.1:(\d+)")
        known = len(ports.findall(self.log.read_bytes()))
        os.kill(self.ranks()[0], signal.SIGKILL)
        helpers.until(
            lambda: len(ports.findall(self.log.read_bytes())) > known, what="the next attempt"
        )
        port = int(ports.findall(self.log.read_bytes())[known])
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen()
            helpers.until(
                lambda: len(ports.findall(self.log.read_bytes())) > known + 1,
                what="the attempt after it",
            )

    def poison_batch(self) -> None:
        """NaN in every batch, until a step's numbers are bad; all ranks stop before they save."""
        bad = b"the loss is nan"
        before = self.log.read_bytes().count(bad)
        self.poison.touch()
        try:
            helpers.until(
                lambda: self.log.read_bytes().count(bad) > before, what="the step is refused"
            )
        finally:
            self.poison.unlink()

    def stop_rank(self) -> None:
        os.kill(self.random.choice(self.ranks()), signal.SIGSTOP)
        time.sleep(HANG_SECONDS)

    def terminate_rank(self) -> None:
        os.kill(self.random.choice(self.ranks()), signal.SIGTERM)
        self.wait(75)
        self.start()

    def terminate_launcher(self) -> None:
        assert self.launcher is not None
        self.launcher.send_signal(signal.SIGTERM)
        time.sleep(self.random.random())
        self.launcher.send_signal(signal.SIGTERM)
        self.wait(75)
        self.start()

    def kill_launcher(self) -> None:
        assert self.launcher is not None
        self.launcher.kill()
        self.launcher.wait()
        helpers.until(lambda: not any(map(alive, self.ranks())), what="the ranks end")
        self.start()

    def kill_in_save(self) -> None:
        folder = self.workdir / "checkpoints"

        def saving() -> bool:
            names = [p.name for p in folder.iterdir() if "bad" not in p.name]
            return any(not (folder / name / folders.MANIFEST).exists() for name in names)

        limit = time.monotonic() + 60
        while not saving() and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(self.random.choice((0.0, 0.05, 0.2)))
        os.kill(self.random.choice(self.ranks()), signal.SIGKILL)

    def _damage(self, damage: Callable[[pathlib.Path], object]) -> None:
        assert self.launcher is not None
        self.launcher.kill()
        self.launcher.wait()
        helpers.until(lambda: not any(map(alive, self.ranks())), what="the ranks end")
        folder = self.workdir / "checkpoints"
        if there := folders.committed_steps(folder):
            damage(folder / str(there[-1]))
        self.start()

    def _file(self, step: pathlib.Path) -> pathlib.Path:
        files = [p for p in sorted(step.rglob("*")) if p.is_file() and p.stat().st_size]
        return self.random.choice(files)

    def flip_bit(self) -> None:
        def flip(step: pathlib.Path) -> None:
            path = self._file(step)
            content = bytearray(path.read_bytes())
            at = self.random.randrange(len(content) * 8)
            content[at // 8] ^= 1 << at % 8
            path.write_bytes(content)

        self._damage(flip)

    def truncate(self) -> None:
        self._damage(lambda step: os.truncate(path := self._file(step), path.stat().st_size // 2))

    def delete_file(self) -> None:
        self._damage(lambda step: self._file(step).unlink())

    def empty_step(self) -> None:
        self._damage(lambda step: (shutil.rmtree(step), step.mkdir()))

    def fill_disk(self) -> None:
        """No room for a checkpoint until a save has failed (--disk: the run has a small one)."""
        failed = b"could not be written ("
        before = self.log.read_bytes().count(failed)
        ballast = self.workdir / "ballast"
        with ballast.open("wb") as file:
            # A few pages stay, for metrics and the log of examples.
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.workdir).free - 2**18)
        try:
            helpers.until(
                lambda: self.log.read_bytes().count(failed) > before, what="a save that fails"
            )
        finally:
            ballast.unlink()

    FAULTS = (
        kill_rank,
        kill_coordinator,
        kill_in_save,
        take_port,
        poison_batch,
        stop_rank,
        terminate_rank,
        terminate_launcher,
        kill_launcher,
        flip_bit,
        truncate,
        delete_file,
        empty_step,
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def leavings(workdir: pathlib.Path) -> list[str]:
    """Unfinished files and temporary folders of a run that has ended."""
    checkpoints = workdir / "checkpoints"
    left = [p.name for p in checkpoints.iterdir() if not re.fullmatch(r"\d+(\.bad-\d+)?", p.name)]
    left += [
        str(s)
        for s in set(folders.all_steps(checkpoints)) - set(folders.committed_steps(checkpoints))
    ]
    return left + [str(p) for p in workdir.rglob("*.partial")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=len(Chaos.FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--folder", type=pathlib.Path, help="to work in, and to keep")
    parser.add_argument("--kinds", help="only these, comma-separated (default: all)")
    parser.add_argument("--disk", action="store_true", help="of 128 MiB, and it gets full, too")
    args = parser.parse_args()
    if args.disk and "CHAOS_MOUNTS" not in os.environ:
        # Mounts of its own, for which one need not be root.
        os.environ["CHAOS_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, *sys.argv])
    kinds = Chaos.FAULTS + ((Chaos.fill_disk,) if args.disk else ())
    if args.kinds:
        by_name = {kind.__name__: kind for kind in kinds}
        if unknown := set(args.kinds.split(",")) - by_name.keys():
            parser.error(f"--kinds: no such fault {sorted(unknown)}; there are {sorted(by_name)}")
        kinds = tuple(by_name[name] for name in args.kinds.split(","))
    folder = args.folder or pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(args, folder)
    if args.disk:
        chaos.workdir.mkdir()
        disk = ["mount", "-t", "tmpfs", "-o", "size=128m", "chaos", str(chaos.workdir)]
        subprocess.run(disk, check=True)
    peace = folder / "peace"
    assert helpers.run(chaos.words(peace), log=folder / "peace.log", seconds=900) == 0
    # Each kind once, then again, in an order of the seed's.
    schedule: list[Callable[[Chaos], None]] = []
    while len(schedule) < args.faults:
        schedule += chaos.random.sample(kinds, len(kinds))
    done: collections.Counter[str] = collections.Counter()
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    chaos.start()
    for fault in schedule[: args.faults]:
        chaos.until_stepping(chaos.random.randint(2, 8))
        if chaos.launcher is not None and chaos.launcher.poll() is not None:
            break
        began, attempts = time.monotonic(), chaos.attempts()
        fault(chaos)
        done[fault.__name__] += 1
        chaos.until_stepping(1, after=0 if fault is Chaos.fill_disk else attempts)
        seconds[fault.__name__].append(time.monotonic() - began)
        print(
            f"{sum(done.values()):3d} {fault.__name__:<20} {seconds[fault.__name__][-1]:6.1f} s",
            flush=True,
        )
    chaos.wait(0)
    chaos.ranks()
    one = helpers.final_params(peace, chaos.num_steps)
    other = helpers.final_params(chaos.workdir, chaos.num_steps)
    promises = {
        "all faults were injected": sum(done.values()) == args.faults,
        "final state bitwise equal": {k: v.tobytes() for k, v in one.items()}
        == {k: v.tobytes() for k, v in other.items()},
        "examples exactly once": read_examples(peace) == read_examples(chaos.workdir),
        "no process left": not any(map(alive, chaos.seen)),
        "no unfinished file left": not leavings(chaos.workdir),
    }
    print("| fault | times | seconds until the next step, mean | most |\n|---|---|---|---|")
    for name, taken in sorted(seconds.items()):
        print(f"| {name} | {len(taken)} | {sum(taken) / len(taken):.1f} | {max(taken):.1f} |")
    time_spent = account(read_goodput(chaos.workdir / "goodput.jsonl"))
    told = {
        "faults": done,
        "attempts": len(time_spent.attempts),
        "steps_done_again": time_spent.wasted_steps,
        "promises": promises,
    }
    print(json.dumps(told, indent=1))
    if all(promises.values()) and args.folder is None:
        shutil.rmtree(folder)
    else:
        print(f"kept: {folder}")
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
