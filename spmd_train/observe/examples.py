"""The log of consumed examples: which ids each step was fed, as the hosts really read them.

`WORKDIR/examples/PROCESS.jsonl` has a line for each batch of each attempt, never taken back. So
what was repeated after a crash is there twice, and `read_examples` checks that it was the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

_FOLDER = "examples"


def log_examples(
    batches: Iterable[Mapping[str, np.ndarray]], *, workdir: Path, process: int, first_batch: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Passes batches on, and writes down which rows and examples they hold.

    Args:
        batches: this host's rows, each with `row` and `example_id`.
        workdir: of the run.
        process: whose rows they are.
        first_batch: number of the first batch.
    """
    path = Path(workdir) / _FOLDER / f"{process}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _cut_unfinished_line(file.fileno(), path.read_bytes())
        for number, batch in enumerate(batches, first_batch):
            line = {
                "batch": number,
                "rows": batch["row"].tolist(),
                "ids": batch["example_id"].tolist(),
            }
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            yield batch


def _cut_unfinished_line(handle: int, content: bytes) -> None:
    os.ftruncate(handle, content.rfind(b"\n") + 1)


def read_examples(workdir: Path) -> dict[int, dict[int, int]]:
    """Batch number to row to example id, over all processes and attempts.

    Raises:
        ValueError: a batch that was repeated did not hold the same examples.
    """
    batches: dict[int, dict[int, int]] = {}
    for path in sorted((Path(workdir) / _FOLDER).glob("*.jsonl")):
        content = path.read_bytes()
        for text in content[: content.rfind(b"\n") + 1].splitlines():
            line = json.loads(text)
            batch = batches.setdefault(line["batch"], {})
            for row, example in zip(line["rows"], line["ids"], strict=True):
                if batch.setdefault(row, example) != example:
                    raise ValueError(
                        f"{path}: batch {line['batch']}, row {row} held example {batch[row]} and, "
                        f"when it was repeated, {example}"
                    )
    return batches
