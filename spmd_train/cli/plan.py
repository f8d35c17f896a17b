"""`spmd-train plan`: will it fit, what crosses the network, how fast."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging

from spmd_train import experiment
from spmd_train.cli.targets import open_devices
from spmd_train.plan.advice import advise
from spmd_train.plan.answer import make_plan
from spmd_train.plan.compiled import DoesNotFitError, compile_step
from spmd_train.plan.document import as_json, format_plan

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Compiles `args.config` for `args.target` and tells what comes of it; 3: it does not fit."""
    with open_devices(args) as (target, devices, options):
        build = functools.partial(experiment.build, devices=devices)
        program = build(args.config).program
        log.info("compiling for %s, which can take minutes", target.text)
        step, needed = None, None
        try:
            step = compile_step(program, options=options)
        except DoesNotFitError as error:
            log.info("the compiler refuses: %s", error)
            needed = error.needed_bytes
        plan = make_plan(
            args.config, target=target, program=program, step=step, needed_bytes=needed
        )
        if not plan.fits:
            advice = advise(args.config, plan=plan, build=build, options=options)
            plan = dataclasses.replace(plan, advice=advice)
    if args.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        for line in format_plan(plan):
            print(line)
    return 0 if plan.fits else 3
