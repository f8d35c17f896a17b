"""One `spmd-train plan` of a config that ships, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def plan_json(config, target, overrides, *, environment=None):
    """The plan's answer, also of what does not fit.

    Args:
        config: a file in configs/.
        target: as `--target` has it.
        overrides: `key=value` each.
        environment: variables beside this process's.

    Returns:
        The JSON, or None where the compiler fails; its own words are on standard error.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "spmd_train", "plan", f"--target={target}", "--json"),
            f"--config={ROOT / 'configs' / config}",
            *(f"--config.{override}" for override in overrides),
        ],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout) if done.returncode in (0, 3) else None


def shown(row):
    """The same, for who waits on standard error."""
    print(*row, sep=" | ", file=sys.stderr, flush=True)
    return row


def markdown_table(lines):
    """Heads and rows of text as Markdown."""
    heads, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))
