"""`spmd-train plan`: will it fit, what crosses the network, how fast."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from spmd_train import experiment
from spmd_train.cli.files import check_folder, write_file
from spmd_train.cli.targets import open_devices
from spmd_train.config import ExperimentConfig
from spmd_train.plan.advice import advise
from spmd_train.plan.answer import Plan, make_plan
from spmd_train.plan.compiled import DoesNotFitError, compile_step
from spmd_train.plan.document import as_json, format_plan
from spmd_train.plan.page import as_html
from spmd_train.plan.search import search
from spmd_train.plan.search_table import format_search, search_as_json
from spmd_train.plan.targets import Target

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Compiles `args.config` for `args.target` and tells what comes of it; 3: it does not fit."""
    check_folder(args.html, flag="html")
    result = None
    with open_devices(args) as (target, devices, options):
        build = functools.partial(experiment.build, devices=devices)
        if args.search:
            result = search(
                args.config,
                target=target,
                devices=devices,
                build=experiment.build,
                options=options,
            )
            plan = result.winner.plan if result.winner else None
        else:
            plan = _plan(args.config, target=target, build=build, options=options)
    if args.html and plan:
        write_file(args.html, as_html(plan), flag="html")
        log.info("written to %s", args.html)
    if args.json:
        document = as_json(plan) if plan else {"target": target.text, "fits": False}
        if result:
            document["search"] = search_as_json(result)
        print(json.dumps(document, indent=2))
        return 0 if plan and plan.fits else 3
    if result:
        for line in format_search(result, target=target):
            print(line)
        print("")
    for line in format_plan(plan) if plan else ():
        print(line)
    return 0 if plan and plan.fits else 3


def _plan(
    config: ExperimentConfig,
    *,
    target: Target,
    build: Callable[[ExperimentConfig], Any],
    options: Mapping[str, Any],
) -> Plan:
    program = build(config).program
    log.info("compiling for %s, which can take minutes", target.text)
    step, needed = None, None
    try:
        step = compile_step(program, options=options)
    except DoesNotFitError as error:
        log.info("the compiler refuses: %s", error)
        needed = error.needed_bytes
    plan = make_plan(config, target=target, program=program, step=step, needed_bytes=needed)
    if plan.fits:
        return plan
    advice = advise(config, plan=plan, build=build, options=options)
    return dataclasses.replace(plan, advice=advice)
