"""Writes the table of what each mesh axis sends, by formula and as counted in the compiled step.

    python scripts/wire_table.py --table=docs/wire.md

Every row trains one model on 8 simulated devices (the pipeline: on 4, one stage of a layer each).
The formulas are here, the counts are `spmd_train.inspect.collectives`'. Exits with 1 if a row's sum
is not within 1.1 times of its formula.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import sys
from typing import NamedTuple

import jax

from spmd_train.config import (
    ContextConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PipelineConfig,
    ShardingConfig,
    TrainConfig,
)
from spmd_train.inspect.collectives import count_collectives
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.rules import leaf_path
from spmd_train.tasks import LanguageModel
from spmd_train.train.program import make_program

MODEL = ModelConfig(num_layers=4, embed_dim=128, num_heads=8, mlp_dim=256, vocab_size=512)
EXPERTS = MoEConfig(num_experts=16, top_k=2, expert_mlp_dim=64)
LENGTH, BATCH = 128, 16
FLOAT = 4
LIMIT = 1.1

HEAD = f"""# What each axis sends

Written by `make wire-table`: bytes that a device sends in a step, by ring algorithms, of a model of
{MODEL.num_layers} layers (D = {MODEL.embed_dim}, {MODEL.num_heads} heads, MLP {MODEL.mlp_dim},
vocabulary {MODEL.vocab_size}) in float32 on {BATCH} sequences of {LENGTH} tokens. With experts:
{EXPERTS.num_experts} of width {EXPERTS.expert_mlp_dim}, {EXPERTS.top_k} for a token. One axis at a
time, of n devices; the formulas of several multiply as their shards do. "Counted" is what XLA's CPU
compiler made of the step, loops multiplied out; what is sent without a formula (scalars, norms'
gradients, ids) is in the count.

P: bytes of all parameters as float32, of which P_blocks, P_experts, P_embedding, P_head (matrices)
and P_norms. A: bytes of the residual stream of a device's tokens. L: layers. M: microbatches. K:
bytes of a device's keys and values, dK of their gradients, Q and O of its queries and outputs, ids
of its segments and positions. An exchange of dropless experts beyond the first is not counted.

Under fsdp and context, the vectors of a device's tokens travel and not the embedding table, where
the tokens are fewer than its rows; else P_embedding is gathered, and its gradient reduce-scattered.
"""


class Term(NamedTuple):
    """What one kind of collective sends."""

    op: str
    formula: str
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A program of one axis."""

    axis: str
    size: int = 8
    what: str = ""
    moe: MoEConfig = MoEConfig()  # noqa: RUF009 - frozen
    context: ContextConfig = ContextConfig()  # noqa: RUF009
    pipeline: PipelineConfig = PipelineConfig()  # noqa: RUF009
    sharding: ShardingConfig = ShardingConfig()  # noqa: RUF009

    @property
    def name(self):
        return f"{self.axis} {self.size}" + f", {self.what}" * bool(self.what)


ROWS = (
    Row(axis="data"),
    Row(axis="fsdp"),
    Row(axis="tensor"),
    Row(
        axis="tensor",
        what="residual stream sharded",
        sharding=ShardingConfig(rules={"residual_sequence": "tensor"}),
    ),
    *(
        Row(axis="context", what=method, context=ContextConfig(method=method))
        for method in ("ring", "all_gather", "ulysses")
    ),
    Row(axis="expert", what="dropless", moe=EXPERTS),
    Row(axis="expert", what="capacity", moe=dataclasses.replace(EXPERTS, dispatch="capacity")),
    *(
        Row(
            axis="pipeline",
            size=4,
            what=schedule,
            pipeline=PipelineConfig(schedule=schedule, num_microbatches=8),
        )
        for schedule in ("gpipe", "1f1b", "zero_bubble")
    ),
)


def build(row):
    return make_program(
        LanguageModel(
            model_config=MODEL,
            moe_config=row.moe,
            loss_config=LossConfig(),
            sequence_length=LENGTH,
        ),
        mesh=make_mesh(
            MeshConfig(**{"data": 1, row.axis: row.size}), devices=jax.devices()[: row.size]
        ),
        sharding=row.sharding,
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(global_batch_size=BATCH),
        context=row.context,
        pipeline=row.pipeline,
    )


def parameter_bytes(program):
    """P and its parts, as float32."""
    parts = {"all": 0, "blocks": 0, "experts": 0, "embedding": 0, "head": 0, "norms": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.model.abstract_params):
        name, size = leaf_path(path), FLOAT * leaf.size
        parts["all"] += size
        if name.endswith("/scale"):
            parts["norms"] += size
        else:
            parts[name.split("/")[0]] += size
        if "/experts/" in name:
            parts["experts"] += size
    return parts


def terms_of(row, program):
    p, n = parameter_bytes(program), row.size
    ring, twice = (n - 1) / n, 2 * (n - 1) / n
    layers, tokens = MODEL.num_layers, BATCH * LENGTH
    stream = FLOAT * tokens * MODEL.embed_dim
    if row.axis == "data":
        return [Term("all-reduce", "2(n-1)/n P", twice * p["all"])]
    gathered = 2 * p["blocks"] + p["head"]
    summed = p["blocks"] + p["head"] + p["norms"]
    sharded = [
        Term("all-gather", "(n-1)/n (2 P_blocks + P_head)", ring * gathered),
        Term("all-reduce", "2(n-1)/n (P_blocks + P_head + P_norms)", twice * summed),
        Term("all-to-all", "2(n-1)/n A", twice * stream / n),
    ]
    if row.axis == "fsdp":
        return sharded
    if row.axis == "tensor":
        # Outputs of attention and MLP; in the backward pass the gradients of five inputs: query,
        # key, value, gate, up. Two more of embedding and head, and four numbers a token.
        summed = (7 * layers + 2) * stream + 4 * FLOAT * tokens
        terms = [Term("all-reduce", "2(n-1)/n ((7 L + 2) A + 4 of a token)", twice * summed)]
        if row.sharding.rules:
            gathered = (4 * layers + 2) * stream
            terms.append(Term("all-gather", "(n-1)/n (4 L + 2) A", ring * gathered))
        return terms
    if row.axis == "context":
        return [*context_terms(row), *sharded]
    if row.axis == "expert":
        return [*expert_terms(row, stream / n), shared_term(p, twice)]
    schedule = program.pipeline.schedule
    sent = 2 * schedule.num_ticks * stream / schedule.num_microbatches
    outer = p["all"] - p["blocks"] - p["norms"] * 2 * layers / (2 * layers + 1)
    return [
        Term("collective-permute", f"2 ticks A / M, {schedule.num_ticks} ticks", sent),
        Term("all-reduce", "2(n-1)/n (P_embedding + P_head + last norm)", twice * outer),
    ]


def context_terms(row):
    """K: a device's keys and values; dK: their gradients; ids: segments and positions."""
    n, layers, tokens = row.size, MODEL.num_layers, BATCH * LENGTH // row.size
    keys = queries = 2 * FLOAT * tokens * MODEL.num_heads * MODEL.resolved_head_dim
    ids, sums = 2 * FLOAT * tokens, FLOAT * tokens * MODEL.num_heads
    # Tokens, targets, segments, positions and weights go to where zig-zag wants them.
    placed = Term("collective-permute", "5 numbers of a token", 5 * FLOAT * tokens)
    # Gathered ids are the same in all layers, and gathered once.
    gathered = Term("all-gather", "(n-1) ids", (n - 1) * ids)
    if row.context.method == "ring":
        sent = layers * (2 * (n - 1) * (keys + ids) + n * keys)
        return [Term("collective-permute", "L (2(n-1) (K + ids) + n dK)", sent), placed]
    if row.context.method == "all_gather":
        sent = layers * (n - 1) * keys
        return [
            Term("all-gather", "2 L (n-1) K", 2 * sent),
            gathered,
            Term("reduce-scatter", "L (n-1) dK", sent),
            placed,
        ]
    sent = layers * (n - 1) / n * (2 * (queries + keys) + sums)
    formula = "(n-1)/n L (2 (Q + O + K) + row sums)"
    return [Term("all-to-all", formula, sent), gathered, placed]


def expert_terms(row, stream):
    """Four ways: tokens there, outputs back, and so their gradients."""
    moe, n = row.moe, row.size
    name = "capacity_factor" if moe.dispatch == "capacity" else "exchange_factor"
    factor = {"capacity": moe.capacity_factor, "dropless": moe.exchange_factor}[moe.dispatch]
    sent = (n - 1) / n * MODEL.num_layers * 4 * factor * moe.top_k * stream
    return [Term("all-to-all", f"(n-1)/n L 4 {name} top_k A", sent)]


def shared_term(p, twice):
    return Term("all-reduce", "2(n-1)/n (P - P_experts)", twice * (p["all"] - p["experts"]))


def counted(row, program):
    """Op to wire bytes; an exchange beyond the first, which a step may need or not, is left out."""
    compiled = program.lower_train_step().compile(
        compiler_options={"xla_backend_optimization_level": 0}
    )
    found = count_collectives(compiled.as_text(), axis_sizes=dict(program.mesh.shape))
    ops = {c.op: 0 for c in found if c.axes}
    for c in found:
        if c.axes:
            ops[c.op] += c.wire_bytes or 0
    return ops


def lines_of(row):
    """The row's cells, and its sum over the formula's."""
    program = build(row)
    terms, ops = terms_of(row, program), counted(row, program)
    terms = sorted(terms, key=lambda term: term.op)
    lines = []
    for op, group in itertools.groupby(terms, key=lambda term: term.op):
        same = list(group)
        value = sum(term.value for term in same)
        formula = " + ".join(term.formula for term in same)
        lines.append((row.name, op, formula, *figures(value, ops.pop(op, 0))))
    lines += [(row.name, op, "none", *figures(0, size)) for op, size in sorted(ops.items())]
    total = sum(term.value for term in terms)
    sent = sum(size for *_, size, _ in lines)
    return lines, sent / total


def figures(value, size):
    return round(value), size, size / value if value else math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=pathlib.Path, help="page to write")
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    args = parser.parse_args()
    if args.table and args.only:
        parser.error(f"--only={args.only}: the page has all rows; leave out --table")
    jax.config.update("jax_num_cpu_devices", 8)
    page = [HEAD, "| axis | collective | formula | bytes | counted | counted / formula |"]
    page.append("| --- | --- | --- | ---: | ---: | ---: |")
    outside = []
    for row in ROWS:
        if not row.name.startswith(args.only):
            continue
        lines, ratio = lines_of(row)
        for name, op, formula, value, size, times in lines:
            cell = "" if math.isnan(times) else f"{times:.3f}"
            page.append(f"| {name} | {op} | {formula} | {value:,} | {size:,} | {cell} |")
        page.append(f"| {row.name} | **all** | | | | **{ratio:.3f}** |")
        print(f"{row.name}: counted / formula = {ratio:.3f}", file=sys.stderr, flush=True)
        if not 1 / LIMIT < ratio < LIMIT:
            outside.append(row.name)
    text = "\n".join(page) + "\n"
    if args.table:
        args.table.write_text(text)
    print(text)
    return f"not within {LIMIT} of the formula: {', '.join(outside)}" if outside else 0


if __name__ == "__main__":
    sys.exit(main())
