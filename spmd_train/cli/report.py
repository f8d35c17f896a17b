"""`spmd-train report`: where a run's time went."""

from __future__ import annotations

import argparse
import json

from spmd_train.cli.files import write_file
from spmd_train.observe.report import as_document, as_html, as_text, read_report


def run(args: argparse.Namespace) -> int:
    """Prints the report and writes its page."""
    report = read_report(args.workdir)
    path = args.html or args.workdir / "report.html"
    write_file(path, as_html(report), flag="html")
    if args.json:
        print(json.dumps(as_document(report) | {"html": str(path)}, allow_nan=False))
        return 0
    for line in as_text(report):
        print(line)
    print(f"written: {path}")
    return 0
