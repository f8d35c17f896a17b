"""From the command line to the first step's loss: CPU and wall seconds by stage, and what compiles.

    python scripts/startup.py --table=docs/speed.md

Trains one step of the bench's problem twice a round, each time in a process of its own: with empty
caches, then with those that the first run has filled (XLA's and the tokens'). The process runs the
command line itself (`spmd_train.cli.main`) and only notes the time where a stage ends.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from plan_json import ROOT, markdown_table
from sections import write_section

from spmd_train.cli.allocator import choose_allocator
from spmd_train.cli.main import main as main_of_command

STAGES = {
    "imports": "Python, imports, the config, the device",
    "built": "the program's shapes and shardings",
    "data": "the data and the run's folder opened",
    "init": "init: traced, compiled, dispatched",
    "ready": "metric writers, the loader",
    "dispatched": "train step: traced, compiled, dispatched",
    "first_step": "until its loss is known",
}
_COMPILE = "/jax/core/compile/"
_EVENTS = {
    f"{_COMPILE}jaxpr_trace_duration": "traced",
    f"{_COMPILE}jaxpr_to_mlir_module_duration": "lowered",
    f"{_COMPILE}backend_compile_duration": "compiled",
}


def probe(argv: list[str], answer_path: pathlib.Path, *, began: float) -> int:
    """Runs a command line in this process and writes what happened until its first step's loss.

    The answer: `seconds`, stage to [CPU, wall] since this process began; `traced`, `lowered`,
    `compiled`: function to how often; `cache_hits`; `modules`: all that were imported.

    Args:
        argv: the words after `python -m spmd_train`.
        answer_path: where to write it, as JSON.
        began: when this process was started, seconds since 1970.

    Returns:
        The command's exit code.
    """
    # As the command itself does first: the time before it counts, and nothing is imported yet.
    choose_allocator()
    answer: dict[str, Any] = {"seconds": {}, "cache_hits": 0}
    counts = {name: collections.Counter() for name in _EVENTS.values()}

    def note(stage: str) -> None:
        if stage not in answer["seconds"]:
            answer["seconds"][stage] = (time.process_time(), time.time() - began)

    def counted(event: str, _: float, **facts: Any) -> None:
        if event in _EVENTS:
            name = facts["fun_name"].removeprefix("jit(").removesuffix(")")
            counts[_EVENTS[event]][name] += 1

    def cached(event: str, **_: Any) -> None:
        answer["cache_hits"] += event == "/jax/compilation_cache/cache_hits"

    def first_step() -> None:
        note("first_step")
        answer.update(counts, modules=sorted(sys.modules))
        answer_path.write_text(json.dumps(answer))

    # What the command imports, imported here: its functions must be there to be wrapped.
    training = importlib.import_module("spmd_train.cli.train").training
    running, observe = (importlib.import_module(f"spmd_train.{n}") for n in ("running", "observe"))
    monitoring = importlib.import_module("jax.monitoring")
    monitoring.register_event_duration_secs_listener(counted)
    monitoring.register_event_listener(cached)
    _around(training, "train", before=lambda: note("imports"))
    _around(training, "build", after=lambda: note("built"))
    _around(training, "start_from", before=lambda: note("data"), after=lambda: note("init"))
    _around(training, "run_loop", before=lambda: note("ready"))
    _around(observe.StepClock, "step_done", after=lambda: note("dispatched"))
    _around(running.NumbersWatch, "check", before=first_step)
    return main_of_command(argv)


def _around(
    owner: Any,
    name: str,
    *,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    function = vars(owner)[name]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        value = function(*args, **kwargs)
        after()
        return value

    setattr(owner, name, wrapped)


def measure(problem: pathlib.Path, folder: pathlib.Path, *, name: str) -> dict[str, Any]:
    """One step of the problem in a process of its own; caches are below `folder`."""
    answer_path, workdir = folder / f"{name}.json", folder / name
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / "xla"),
    }
    flags = ("train", f"--config={problem / 'config.json'}", f"--workdir={workdir}")
    keys = {"num_steps": 1, "checkpoint_every": 0}
    words = [f"--config.train.{key}={value}" for key, value in keys.items()]
    probe_flags = [f"--probe={answer_path}", f"--began={time.time()}"]
    command = [sys.executable, __file__, *probe_flags, *flags, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(answer_path.read_text())


def markdown(rounds: list[list[dict[str, Any]]]) -> str:
    """The stages as a table, medians of the rounds; what was compiled, which all must agree on.

    Args:
        rounds: each a cold and a warm answer of `probe`.
    """
    cold_and_warm = list(zip(*rounds, strict=True))
    stages = [
        statistics.median(_stage_seconds(answer, at)[name] for answer in answers)
        for name in STAGES
        for answers in cold_and_warm
        for at in (0, 1)
    ]
    totals = [
        statistics.median(answer["seconds"]["first_step"][at] for answer in answers)
        for answers in cold_and_warm
        for at in (0, 1)
    ]
    rows = [
        (words, *(f"{seconds:.2f}" for seconds in stages[4 * i : 4 * i + 4]))
        for i, words in enumerate(STAGES.values())
    ]
    heads = ("seconds", "cold: CPU", "wall", "warm: CPU", "wall")
    last = ("**command to first step**", *(f"**{seconds:.2f}**" for seconds in totals))
    told = []
    for name, answers in zip(("Cold", "Warm"), cold_and_warm, strict=True):
        (words,) = {_compilations(answer) for answer in answers}
        told.append(f"{name}: {words}.")
    return markdown_table([heads, *rows, last]) + "\n\n" + " ".join(told) + "\n"


def _stage_seconds(answer: dict[str, Any], at: int) -> dict[str, float]:
    ends = [answer["seconds"][stage][at] for stage in STAGES]
    return dict(zip(STAGES, (b - a for a, b in itertools.pairwise([0.0, *ends])), strict=True))


def _compilations(answer: dict[str, Any]) -> str:
    asked = sum(answer["compiled"].values())
    step = {answer[name]["train_step"] for name in _EVENTS.values()}
    if step != {1}:
        raise SystemExit(f"the train step is traced, lowered or compiled more than once: {answer}")
    return (
        f"{asked} programs ({' and '.join(answer['compiled'])}; nothing else is asked of XLA), "
        f"{asked - answer['cache_hits']} compiled, {answer['cache_hits']} read from the cache, "
        "each traced and lowered once"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--table", type=pathlib.Path, help="a page whose section is written anew")
    parser.add_argument("--probe", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args, argv = parser.parse_known_args()
    if args.probe:
        sys.exit(probe(argv, args.probe, began=args.began))
    if argv:
        parser.error(f"unknown: {argv}")
    bench = importlib.import_module("bench")  # Here: the probe imports what the command does.
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: args.cores])
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        bench.make_problem(folder / "problem", bench.SHAPES["S"], num_steps=1)
        for number in range(args.rounds):
            at = folder / str(number)
            at.mkdir()
            rounds.append([measure(folder / "problem", at, name=n) for n in ("cold", "warm")])
    facts, jax_version = bench.machine(), importlib.metadata.version("jax")
    text = (
        "From the command to the loss of the first step of S, by `python scripts/startup.py`, "
        "which runs the command line itself and notes when each stage ends: with empty caches, "
        f"then with those of that run. Medians of {args.rounds} rounds, {args.cores} core of an "
        f"{facts['cpu']} ({facts['vectors']}), Python {facts['python']}, jax {jax_version}, "
        f"{facts['date']}.\n\n"
    ) + markdown(rounds)
    print(text, end="")
    if args.table:
        write_section(args.table, "Start-up", text)


if __name__ == "__main__":
    main()
