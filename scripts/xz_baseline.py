"""What `xz -9` makes of the evaluation split, in the trainer's own unit: bits per byte of text.

    python scripts/xz_baseline.py [--config=configs/lm_tiny.py]

The documents are those that the trainer evaluates on (`bits_per_byte` of the split "eval"), all of
them and nothing else. Beat it with them in one archive, and with each in one of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma

from spmd_train import experiment
from spmd_train.config import load_config, parse
from spmd_train.data import Dataset

PRESET = 9 | lzma.PRESET_EXTREME


def documents(data: Dataset) -> list[bytes]:
    """The split's documents in UTF-8."""
    found = []
    for stream in data.streams:
        for begin, end in itertools.pairwise(stream.starts.tolist()):
            found.append(data.tokenizer.decode(stream.tokens[begin:end].tolist()).encode())
    assert sum(map(len, found)) == sum(s.num_bytes for s in data.streams), "not the whole split"
    return found


def baseline(data: Dataset) -> dict[str, float]:
    """Bits per byte with one archive of all documents, and with an archive for each."""
    texts = documents(data)
    num_bytes = sum(map(len, texts))
    together = len(lzma.compress(b"".join(texts), preset=PRESET))
    apart = sum(len(lzma.compress(text, preset=PRESET)) for text in texts)
    return {
        "documents": len(texts),
        "bytes": num_bytes,
        "bits_per_byte": 8 * together / num_bytes,
        "bits_per_byte_each_alone": 8 * apart / num_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/lm_tiny.py", help="FILE[:ARG]")
    args = parser.parse_args()
    config = parse(load_config(args.config))
    print(json.dumps(baseline(experiment.open_data(config, split="eval"))))


if __name__ == "__main__":
    main()
