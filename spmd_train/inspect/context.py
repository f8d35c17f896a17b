"""How a split sequence shares out attention's work, and what that sends: counted, not compiled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from spmd_train.config import ModelConfig
from spmd_train.parallel.placement import Placement, Tiles, imbalance
from spmd_train.parallel.rules import Layout


def context_report(
    model: ModelConfig, layout: Layout, *, length: int, rows: int, passes: int
) -> dict[str, Any]:
    """Attention's work per device and the bytes that it sends, as JSON.

    Args:
        model: its heads, window and dtype.
        layout: mesh, rules, method and placement.
        length: tokens of a sequence.
        rows: sequences of a microbatch that a device has a part of.
        passes: how often a step runs each layer forward and backward: microbatches.

    Returns:
        `devices` C, `method`, `placement`, `sequence_length`, `sliding_window`,
        `tokens_per_device`,
        `blocks` (of each device). `visible_pairs`: query-key pairs of each device, for a sequence
        that is one document; `imbalance`: their maximum over their mean. `computed_pairs` and
        `computed_imbalance`: the same of what is computed, whole tiles, where ring steps wait for
        the busiest device (`ring_imbalance`: the sum of the steps' maxima over the mean).
        `layer_bytes`: what a device sends per layer and microbatch, `forward` (once more where the
        backward pass recomputes it) and `backward`; `step_bytes`: of all layers and microbatches.
    """
    axes = layout.axes("sequence")
    devices = layout.size(axes)
    method = layout.context.method
    name = layout.context.placement if devices > 1 else "contiguous"
    placement = Placement(
        name=name, num_devices=devices, length=length, window=model.sliding_window
    )
    visible = placement.visible_pairs()
    if method == "ulysses":  # Every device sees all tokens, in its own heads.
        visible = [sum(visible) // devices] * devices
        steps = [placement.whole()] * devices
        computed = [_pairs(steps[0])[0] // devices] * devices
        waited = sum(computed)
    else:
        tiles = [t for _, t in placement.ring()] if method == "ring" else [placement.gathered()]
        computed = [sum(p) for p in zip(*map(_pairs, tiles), strict=True)]
        waited = sum(max(_pairs(t)) for t in tiles) * devices
    forward, backward = layer_bytes(model, layout, placement, rows=rows)
    return {
        "devices": devices,
        "method": method,
        "placement": name,
        "sequence_length": length,
        "sliding_window": model.sliding_window,
        "tokens_per_device": length // devices,
        "blocks": [list(blocks) for blocks in placement.blocks],
        "visible_pairs": visible,
        "imbalance": imbalance(visible),
        "computed_pairs": computed,
        "computed_imbalance": imbalance(computed),
        "ring_imbalance": waited / sum(computed),
        "layer_bytes": {"forward": forward, "backward": backward},
        "step_bytes": (forward + backward) * model.num_layers * passes,
    }


def _pairs(tiles: Tiles) -> list[int]:
    return [int(count) * tiles.size**2 for count in tiles.counts]


def layer_bytes(
    model: ModelConfig, layout: Layout, placement: Placement, *, rows: int
) -> tuple[int, int]:
    """Bytes that a device sends for one layer's attention, forward and backward.

    With C devices, b rows, n = T / C tokens: a shard of keys and values is 2 b n G K in the compute
    dtype, of segments and positions 2 b n int32, of the keys' gradients 2 b n G K float32.

    | method | forward | backward |
    |---|---|---|
    | ring | hops (keys + ids) | hops (keys + ids) + (hops + 1) gradients |
    | all_gather | (C-1) (keys + ids) | (C-1) (keys + ids + gradients) |
    | ulysses | (C-1)/C (queries + outputs + keys) + (C-1) ids | the same, and b n H float32 |

    A ring has C-1 hops, fewer where a window leaves steps without work; gradients go home by one
    more. Ulysses sends a key head
    once for each device that needs it.
    """
    c = placement.num_devices
    if c == 1:
        return 0, 0
    heads = model.num_heads // layout.size(layout.axes("heads"))
    kv_heads = model.resolved_kv_heads // layout.size(layout.axes("kv_heads"))
    tokens = rows * placement.length // c
    size = jnp.dtype(model.compute_dtype).itemsize
    width = model.resolved_head_dim
    keys, ids = 2 * tokens * kv_heads * width * size, 2 * tokens * 4
    if layout.context.method == "ulysses":
        queries = 2 * tokens * heads * width * size
        sent = queries + keys * max(1, c // kv_heads)
        everywhere = (c - 1) * ids
        return (
            sent * (c - 1) // c + everywhere,
            (sent + tokens * heads * 4) * (c - 1) // c + everywhere,
        )
    hops = len(placement.ring()) - 1 if layout.context.method == "ring" else c - 1
    gradients = 2 * tokens * kv_heads * width * 4
    rounds = hops + 1 if hops and layout.context.method == "ring" else hops
    return hops * (keys + ids), hops * (keys + ids) + rounds * gradients
