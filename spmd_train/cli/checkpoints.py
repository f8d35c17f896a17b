"""`spmd-train checkpoints list|verify|prune`."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from spmd_train.checkpoint import steps
from spmd_train.config import ConfigError
from spmd_train.folders import writing


def run(args: argparse.Namespace) -> int:
    """Does what the verb's last word says."""
    folder = args.workdir / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"--workdir={args.workdir}: has no checkpoints; train writes them")
    return {"list": _list, "verify": _verify, "prune": _prune}[args.verb.words[1]](args, folder)


def _list(args: argparse.Namespace, folder: Path) -> int:
    rows: list[dict[str, Any]] = []
    for name in [*map(str, steps.all_steps(folder)), *steps.bad_steps(folder)]:
        files = [path.stat() for path in (folder / name).rglob("*") if path.is_file()]
        finished = (folder / name / steps.MANIFEST).is_file()
        state = "bad" if "." in name else "finished" if finished else "unfinished"
        rows.append(
            {
                "name": name,
                "state": state,
                "bytes": sum(file.st_size for file in files),
                "time": max((file.st_mtime for file in files), default=0.0),
            }
        )
    if args.json:
        print(json.dumps({"checkpoints": rows}))
        return 0
    for row in rows:
        when = datetime.datetime.fromtimestamp(row["time"]).isoformat(" ", "seconds")
        print(f"{row['name']:>12}  {row['state']:<10}  {row['bytes']:>16,} bytes  {when}")
    return 0


def _verify(args: argparse.Namespace, folder: Path) -> int:
    there = steps.all_steps(folder)
    if args.step is not None and args.step not in there:
        raise ConfigError(f"--step={args.step}: {folder} has steps {there or 'none'}")
    wanted = there if args.step is None else [args.step]
    told = {step: steps.faults(folder, step, how="full") for step in wanted}
    if args.json:
        rows = [{"step": s, "good": not faults, "faults": faults} for s, faults in told.items()]
        print(json.dumps({"checkpoints": rows}))
    else:
        for step, faults in told.items():
            print(f"{step:>12}  {'BAD' if faults else 'good'}")
            for fault in faults:
                print(f"{'':14}{fault}")
    return 1 if any(told.values()) else 0


def _prune(args: argparse.Namespace, folder: Path) -> int:
    keep = args.config.checkpoint
    bad = steps.bad_steps(folder)
    with writing(args.workdir, flag="workdir", cure="run this as a user who may delete there"):
        for name in bad:
            steps.delete(folder, name)
        gone = steps.prune(folder, keep_last=keep.keep_last, keep_every=keep.keep_every)
    deleted = [*map(str, gone), *bad]
    if args.json:
        print(json.dumps({"deleted": deleted, "kept": steps.committed_steps(folder)}))
    else:
        print(f"deleted: {', '.join(deleted) or 'nothing'}")
    return 0
