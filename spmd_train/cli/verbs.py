"""The verbs of the command line and their words: one table."""

from __future__ import annotations

import dataclasses

from spmd_train.cli.flags import (
    CONFIG,
    HF_DIR,
    JSON,
    NEEDED_TARGET,
    PROCESSES,
    RUN_CONFIG,
    SIMULATE_DEVICES,
    STEP,
    TARGET,
    WORKDIR,
    Flag,
    at_least,
    config_name,
    file,
    folder,
    stage,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb.

    Attributes:
      words: what it is called by.
      module: where its `run(args: argparse.Namespace) -> int` is; imported when it runs.
      summary: one line.
      about: what it does, reads and writes.
      example: a command.
      flags: what it takes, besides `--config.a.b=VALUE`.
      uses_devices: whether JAX is started for it.
      takes_command: whether another verb's words follow after `--`; they are in `args.command`.
    """

    words: tuple[str, ...]
    module: str
    summary: str
    about: str
    example: str
    flags: tuple[Flag, ...]
    uses_devices: bool = True
    takes_command: bool = False

    @property
    def uses_processes(self) -> bool:
        """Whether it runs on several processes at one time."""
        return PROCESSES[0] in self.flags

    @property
    def takes_diff(self) -> bool:
        """Whether a second config is read for it, with `--diff.a.b=VALUE` laid over it."""
        return any(flag.name == "diff" for flag in self.flags)

    @property
    def takes_config(self) -> bool:
        """Whether a config is read for it."""
        return any(flag.name == "config" for flag in self.flags)


_INSPECT = (CONFIG, SIMULATE_DEVICES, JSON)
_COMPILED = (CONFIG, TARGET, SIMULATE_DEVICES, JSON)

VERBS: tuple[Verb, ...] = (
    Verb(
        words=("train",),
        module="spmd_train.cli.train",
        summary="train; the same line again resumes",
        about="Trains what the config says and writes a run's folder. Stopped at any point, the "
        "same command line goes on from the newest checkpoint, on this mesh or on another.",
        example="spmd-train train --config=configs/lm_tiny.py --workdir=runs/tiny "
        "--config.train.num_steps=500",
        flags=(CONFIG, WORKDIR, SIMULATE_DEVICES, *PROCESSES),
    ),
    Verb(
        words=("eval",),
        module="spmd_train.cli.eval",
        summary="evaluate a checkpoint, on any mesh",
        about="Measures a checkpoint on the whole evaluation split.",
        example="spmd-train eval --workdir=runs/tiny --step=300 --json",
        flags=(RUN_CONFIG, WORKDIR, STEP, SIMULATE_DEVICES, JSON, *PROCESSES),
    ),
    Verb(
        words=("generate",),
        module="spmd_train.cli.generate",
        summary="continue prompts with a checkpoint",
        about="Samples text from a checkpoint, all the prompts in one batch.",
        example="spmd-train generate --workdir=runs/tiny --prompt='import ' --prompt='class ' "
        "--temperature=0.7",
        flags=(
            RUN_CONFIG,
            WORKDIR,
            Flag(
                name="prompt",
                metavar="TEXT",
                required=True,
                repeats=True,
                help="the beginning; give it again for a batch",
            ),
            Flag(
                name="max_new_tokens",
                metavar="N",
                config_key="sample.max_new_tokens",
                help="tokens generated for each prompt",
            ),
            Flag(
                name="temperature",
                metavar="X",
                config_key="sample.temperature",
                help="0: greedy",
            ),
            Flag(
                name="top_k",
                metavar="K",
                config_key="sample.top_k",
                help="sample among the K likeliest tokens; 0: all",
            ),
            Flag(
                name="top_p",
                metavar="P",
                config_key="sample.top_p",
                help="sample among the likeliest tokens of this total probability",
            ),
            Flag(
                name="seed",
                metavar="N",
                type=at_least(0),
                default=0,
                help="of the sampling (default: 0)",
            ),
            STEP,
            SIMULATE_DEVICES,
            JSON,
        ),
    ),
    Verb(
        words=("plan",),
        module="spmd_train.cli.plan",
        summary="will it fit, what crosses the network, how fast: before there is hardware",
        about="Compiles the train step with the compiler of hardware that is not here and reads "
        "out memory, collectives and FLOPs; predicts the step time from the chip's data sheet. "
        "Exits with 3 if it does not fit the devices' memory. With --search it looks for the "
        "fastest mesh that fits.",
        example="spmd-train plan --config=configs/llama3_8b.py --target=v5p:4x4x8",
        flags=(
            CONFIG,
            NEEDED_TARGET,
            Flag(
                name="search",
                default=False,
                help="rank meshes, remat, accumulation, pipeline schedules; compile the best few",
            ),
            Flag(
                name="html",
                metavar="FILE",
                type=file,
                help="write the plan as one HTML page, too",
            ),
            SIMULATE_DEVICES,
            JSON,
        ),
    ),
    Verb(
        words=("inspect", "config"),
        module="spmd_train.cli.inspect_config",
        summary="every key of the config, its value and its meaning",
        about="Prints the whole resolved config: each key's value, its meaning and what it allows; "
        "a * marks what differs from the default.",
        example="spmd-train inspect config --config=configs/llama3_8b.py:3.1",
        flags=_INSPECT,
        uses_devices=False,
    ),
    Verb(
        words=("inspect", "shardings"),
        module="spmd_train.cli.inspect_shardings",
        summary="how each parameter lies on the mesh, and why",
        about="Prints every parameter: its path, shape, dtype and PartitionSpec, the reason for "
        "it, the bytes it takes per device, and the totals. Allocates nothing.",
        example="spmd-train inspect shardings --config=configs/llama3_70b.py --simulate_devices=8",
        flags=_COMPILED,
    ),
    Verb(
        words=("inspect", "collectives"),
        module="spmd_train.cli.inspect_collectives",
        summary="what the train step sends between devices",
        about="Compiles the train step and prints the collectives that XLA made: which, how many, "
        "over which mesh axes, and how many bytes.",
        example="spmd-train inspect collectives --simulate_devices=8 --config.mesh.fsdp=8",
        flags=_COMPILED,
    ),
    Verb(
        words=("inspect", "memory"),
        module="spmd_train.cli.inspect_memory",
        summary="what the train step takes of a device's memory",
        about="Compiles the train step and prints the compiler's own account of its memory.",
        example="spmd-train inspect memory --simulate_devices=8 --config.model.remat=full",
        flags=_COMPILED,
    ),
    Verb(
        words=("inspect", "hlo"),
        module="spmd_train.cli.inspect_hlo",
        summary="the train step's program, or what differs between two",
        about="Prints the train step's program as XLA has it. With --diff=FILE, or with "
        "--diff.a.b=VALUE for any key of the config, or with both, compiles a second program, too, "
        "and prints instead what differs: memory, FLOPs, size, and every collective with its count "
        "and bytes. What is said by --config.a.b=VALUE holds for both, what is said by "
        "--diff.a.b=VALUE for the second alone.",
        example="spmd-train inspect hlo --simulate_devices=8 --diff.mesh.data=1 --diff.mesh.fsdp=8",
        flags=(
            CONFIG,
            Flag(
                name="diff",
                metavar="FILE[:ARG]",
                type=config_name,
                help="compare with this config (default, where a --diff.a.b=VALUE is given: the "
                "one of --config)",
            ),
            Flag(
                name="stage",
                metavar="STAGE",
                type=stage,
                default="compiled",
                help="compiled: optimized HLO, for one device of the mesh; lowered: StableHLO "
                "before XLA has divided it (default: compiled)",
            ),
            Flag(
                name="out",
                metavar="FILE",
                type=file,
                help="write the program here instead of printing it; the second one to FILE.diff",
            ),
            TARGET,
            SIMULATE_DEVICES,
            JSON,
        ),
    ),
    Verb(
        words=("inspect", "context"),
        module="spmd_train.cli.inspect_context",
        summary="how a split sequence shares out attention's work",
        about="Prints which blocks of a sequence each device of mesh.context has, how many "
        "query-key pairs are its work, how uneven that is, and the bytes that attention sends. "
        "Compiles nothing.",
        example="spmd-train inspect context --simulate_devices=8 --config.mesh.context=8",
        flags=_INSPECT,
    ),
    Verb(
        words=("inspect", "schedule"),
        module="spmd_train.cli.inspect_schedule",
        summary="the pipeline's ticks, and what they cost",
        about="Prints what each stage of the pipeline does in each tick, the part of the time in "
        "which it waits, and what is kept and sent; draws it, too. Compiles nothing.",
        example="spmd-train inspect schedule --simulate_devices=4 --config.mesh.pipeline=4 "
        "--config.pipeline.schedule=zero_bubble --svg=schedule.svg",
        flags=(
            *_INSPECT,
            Flag(
                name="svg",
                metavar="FILE",
                type=file,
                help="also draw it, to this file",
            ),
        ),
    ),
    Verb(
        words=("convert", "import"),
        module="spmd_train.cli.convert_import",
        summary="a Hugging Face checkpoint into a run's folder",
        about="Reads a Hugging Face checkpoint, leaf by leaf into the planned sharding, and writes "
        "it as a checkpoint of a run that eval, generate and train go on from.",
        example="spmd-train convert import --config=configs/llama3_8b.py --hf_dir=Meta-Llama-3-8B "
        "--workdir=runs/llama3",
        flags=(CONFIG, WORKDIR, HF_DIR, SIMULATE_DEVICES),
    ),
    Verb(
        words=("convert", "export"),
        module="spmd_train.cli.convert_export",
        summary="a run's checkpoint into a Hugging Face folder",
        about="Writes a checkpoint as config.json and safetensors files, for transformers' "
        "from_pretrained.",
        example="spmd-train convert export --workdir=runs/llama3 --hf_dir=exported",
        flags=(RUN_CONFIG, WORKDIR, HF_DIR, STEP, SIMULATE_DEVICES),
    ),
    Verb(
        words=("checkpoints", "list"),
        module="spmd_train.cli.checkpoints",
        summary="the checkpoints of a run",
        about="Prints each checkpoint's step, bytes and time of writing, and what was put aside as "
        "bad. Reads no data: `checkpoints verify` does.",
        example="spmd-train checkpoints list --workdir=runs/tiny",
        flags=(WORKDIR, JSON),
        uses_devices=False,
    ),
    Verb(
        words=("checkpoints", "verify"),
        module="spmd_train.cli.checkpoints",
        summary="whether they are whole",
        about="Hashes every file of the checkpoints and compares with what was written. Changes "
        "nothing. Exit code 1 if one is bad.",
        example="spmd-train checkpoints verify --workdir=runs/tiny --step=300",
        flags=(
            WORKDIR,
            Flag(name="step", metavar="N", type=at_least(0), help="only this one (default: all)"),
            JSON,
        ),
        uses_devices=False,
    ),
    Verb(
        words=("checkpoints", "prune"),
        module="spmd_train.cli.checkpoints",
        summary="delete old and bad ones",
        about="Deletes what was put aside as bad, and the good checkpoints that "
        "checkpoint.keep_last and checkpoint.keep_every of the run's config do not keep. Not for a "
        "run that is going on.",
        example="spmd-train checkpoints prune --workdir=runs/tiny --config.checkpoint.keep_last=1",
        flags=(RUN_CONFIG, WORKDIR, JSON),
        uses_devices=False,
    ),
    Verb(
        words=("report",),
        module="spmd_train.cli.report",
        summary="where a run's time went, as text and as one HTML page",
        about="Adds up goodput.jsonl over all attempts of a run: training, waiting, evaluation, "
        "saves, starts, work done again, time when nothing ran. Writes a page with the loss curve, "
        "the throughput and the restarts.",
        example="spmd-train report --workdir=runs/tiny",
        flags=(
            WORKDIR,
            Flag(
                name="html",
                metavar="FILE",
                type=file,
                help="where to write the page (default: WORKDIR/report.html)",
            ),
            JSON,
        ),
        uses_devices=False,
    ),
    Verb(
        words=("launch",),
        module="spmd_train.cli.launch",
        summary="local processes, supervised and restarted",
        about="Runs train as N processes on this machine. If one dies or all hang, all are ended "
        "and restarted from the newest good checkpoint, until that brings no new checkpoint any "
        "more. SIGTERM and Ctrl-C are passed on: all save after the same step.",
        example="spmd-train launch --num_processes=2 --simulate_devices=2 -- train "
        "--workdir=runs/tiny",
        flags=(
            Flag(
                name="num_processes",
                metavar="N",
                type=at_least(1),
                required=True,
                help="processes; of GPUs each gets one",
            ),
            Flag(
                name="max_restarts",
                metavar="K",
                type=at_least(0),
                default=3,
                help="restarts in a row without a new checkpoint (default: 3)",
            ),
            Flag(
                name="simulate_devices",
                metavar="N",
                type=at_least(1),
                help="run each process on N CPU devices",
            ),
            Flag(
                name="hang_seconds",
                metavar="T",
                type=at_least(0),
                default=600,
                help="seconds without a step until all stacks are printed and all is restarted; "
                "must be longer than an evaluation; 0: never (default: 600)",
            ),
            Flag(
                name="start_seconds",
                metavar="T",
                type=at_least(0),
                default=3600,
                help="the same until the first step: tokenizing, compiling (default: 3600)",
            ),
        ),
        uses_devices=False,
        takes_command=True,
    ),
    Verb(
        words=("replay",),
        module="spmd_train.cli.replay",
        summary="a bad step again",
        about="Repeats the step on which a run has stopped because its numbers were bad, from the "
        "checkpoint before it, and names the arrays that are not finite.",
        example="spmd-train replay runs/tiny/bad_steps/57",
        flags=(
            Flag(
                name="bundle",
                metavar="BUNDLE",
                positional=True,
                type=folder,
                required=True,
                help="WORKDIR/bad_steps/STEP of the run",
            ),
            SIMULATE_DEVICES,
            JSON,
        ),
    ),
)
