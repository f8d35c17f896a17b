"""The attention kernel of TPUs: JAX's splash attention, of one device's arrays.

Dims: B batch, T queries, S keys, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spmd_train.parallel.by_kernel import QKV, Scoring, Segments, kernel_flops, why_no_multiple
from spmd_train.parallel.placement import Placement, Tiles


def _splash(part: str) -> Any:
    """A module of splash attention: imported where it runs, as it is slow."""
    with warnings.catch_warnings():
        # jax 0.12 points to tokamax, whose backward pass makes masks as large as the scores.
        warnings.simplefilter("ignore", DeprecationWarning)
        package = "jax.experimental.pallas.ops.tpu.splash_attention"
        return importlib.import_module(f"{package}.splash_attention_{part}")


class _Table(NamedTuple):
    """For each tile of one side the tiles of the other that it meets, as splash's `MaskInfo`.

    Attributes:
        next: which tile comes next, int16 or int32 [..., 1, I, W].
        kind: what is visible of it, int8: 0 nothing, 1 what a mask says, 2 all.
        mask: which mask, int8.
    """

    next: Any
    kind: Any
    mask: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Walk:
    """How splash goes over pairs of tiles.

    Attributes:
        rows: keys of each tile of queries.
        columns: queries of each tile of keys, these in the last dim.
        size: tokens of a tile.
        pairs: how many pairs, on the device that has most.
    """

    rows: _Table
    columns: _Table
    size: int = dataclasses.field(metadata={"static": True})
    pairs: int = dataclasses.field(metadata={"static": True})


class Splash:
    """Splash attention: a flash attention that skips the blocks that its mask empties.

    Per pair of blocks it has 2 matmuls forward; backward 4 for keys and values, 3 for queries, in
    two kernels. Which pairs it walks over, and which of a few masks each is under, are arrays: so
    one kernel serves devices that have different pairs.
    """

    sizes: tuple[int, ...] = (512, 384, 256, 128)
    lowest: float = float(0.5 * jnp.finfo(jnp.float32).min)
    _WIDTH = 128
    """A TPU's lanes: heads are padded to whole ones, which costs nothing there."""
    _MOST_PAIRS = 250_000
    """Of 4 bytes each in `_Table`: what fits into 1 MiB of scalar memory (tried on v5e)."""

    def __init__(self, *, interpret: bool = False) -> None:
        """Makes it; `interpret` runs it on CPU, slowly."""
        self._interpret = interpret

    def why_not(self, placement: Placement, scoring: Scoring, *, queries: int, keys: int) -> str:
        """See `Kernel`."""
        tile = placement.tile
        reach = min(keys // tile, scoring.window // tile + 2) if scoring.window else keys // tile
        if queries // tile * reach > self._MOST_PAIRS:
            return (
                f"{queries:,} queries and {keys:,} keys on a device have more tiles than a TPU's "
                "scalar memory; split sequences further (mesh.context), or by ring"
            )
        return why_no_multiple(placement, self._WIDTH)

    def walk(self, steps: Sequence[Tiles], scoring: Scoring) -> _Walk:
        """See `Kernel`."""
        size = steps[0].size
        partial = _partial_masks(size, scoring.window)
        rows, columns = (_tables(steps, by, list(partial)) for by in (0, 1))
        columns = jax.tree.map(lambda x: x.swapaxes(-1, -2), columns)
        return _Walk(rows, columns, size, max(int(tiles.counts.max()) for tiles in steps))

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: Segments,
        walk: _Walk,
        scoring: Scoring,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Kernel`."""
        splash = _splash("kernel")
        info = self._mask(walk.rows, walk.size, scoring)
        cuts = dict.fromkeys(("block_q", "block_kv"), walk.size)

        def one(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> Any:
            return splash._splash_attention_forward(
                *(info, q, k, v, splash.SegmentIds(*ids)),
                sinks=None,
                save_residuals=True,
                residual_checkpoint_name=None,
                block_sizes=splash.BlockSizes(**cuts),
                **self._told(scoring),
            )

        run: Any = jax.vmap(one)
        with jax.named_scope(kernel_flops(2 * self._flops(q, walk))):
            out, (log_total,) = run(*self._padded(q, k, v), *segments)
        return out[..., : q.shape[3]], log_total

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: Segments,
        walk: _Walk,
        scoring: Scoring,
        *,
        out_grad: jax.Array,
        log_total: jax.Array,
        dot: jax.Array,
    ) -> QKV:
        """See `Kernel`."""
        splash = _splash("kernel")
        rows, columns = (self._mask(x, walk.size, scoring) for x in (walk.rows, walk.columns))
        columns = columns._replace(partial_mask_blocks=rows.partial_mask_blocks.swapaxes(1, 2))
        told = self._told(scoring)
        told |= dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.HEAD_DIM_MINOR)
        told |= {"bq": walk.size, "bkv": walk.size}
        flops = self._flops(q, walk)

        def one(q: Any, k: Any, v: Any, out_grad: Any, *rest: jax.Array) -> Any:
            *ids, log_total, dot = rest
            given = q, k, v, splash.SegmentIds(*ids), None, log_total, out_grad, dot
            with jax.named_scope(kernel_flops(4 * flops)):
                _, k_grad, v_grad = splash._splash_attention_bwd_dkv(
                    *given,
                    bkv_compute=walk.size,
                    use_fused_bwd_kernel=False,
                    mask_info=columns,
                    **told,
                )
            with jax.named_scope(kernel_flops(3 * flops)):
                q_grad = splash._splash_attention_bwd_dq(*given, mask_info=rows, **told)
            return q_grad, k_grad, v_grad

        run: Any = jax.vmap(one)
        grads = run(*self._padded(q, k, v, out_grad), *segments, log_total, dot)
        q_grad, k_grad, v_grad = (x[..., : q.shape[3]] for x in grads)
        return q_grad, k_grad, v_grad

    def _mask(self, table: _Table, size: int, scoring: Scoring) -> Any:
        masks = np.stack(list(_partial_masks(size, scoring.window).values()))
        return _splash("mask_info").MaskInfo(
            data_next=table.next,
            mask_next=table.mask,
            block_mask=table.kind,
            partial_mask_blocks=jnp.asarray(masks),
            q_sequence=None,
        )

    def _told(self, scoring: Scoring) -> dict[str, Any]:
        return {
            "mask_value": _splash("kernel").DEFAULT_MASK_VALUE,
            "is_mqa": False,
            "mask_function": None,
            "attn_logits_soft_cap": scoring.softcap or None,
            "interpret": self._interpret,
        }

    def _flops(self, q: jax.Array, walk: _Walk) -> int:
        """Of one matmul over all pairs."""
        b, h, _, width = q.shape
        return 2 * b * h * walk.pairs * walk.size**2 * self._lanes(width)

    def _lanes(self, width: int) -> int:
        return -(-width // self._WIDTH) * self._WIDTH

    def _padded(self, *arrays: jax.Array) -> list[jax.Array]:
        width = arrays[0].shape[3]
        pad = ((0, 0), (0, 0), (0, 0), (0, self._lanes(width) - width))
        return [jnp.pad(x, pad) for x in arrays]


def _partial_masks(size: int, window: int) -> dict[int, np.ndarray]:
    """Distance in tiles between queries and keys, to the mask there, where it hides some keys."""
    within = np.arange(size)[:, None] - np.arange(size)
    masks = {}
    for tiles in {0, *(range(window // size, window // size + 2) if window else ())}:
        distance = tiles * size + within
        mask = (distance >= 0) & (distance < window if window else True)
        if mask.any() and not mask.all():
            masks[tiles] = mask
    return masks


def _tables(steps: Sequence[Tiles], by: int, partial: list[int]) -> _Table:
    """By queries (0) or by keys (1): numpy [C, L, 1, I, W]; what pads repeats a tile, unseen."""
    devices = range(len(steps[0].counts))
    size = (steps[0].queries, steps[0].keys)[by].shape[1]
    found = []
    for c in devices:
        for tiles in steps:
            pairs = tiles.pairs[c, : tiles.counts[c]]
            pairs = pairs[np.argsort(pairs[:, by], kind="stable")]
            of, met = pairs[:, by], pairs[:, 1 - by]
            place = np.arange(len(pairs)) - np.searchsorted(of, of)
            away = tiles.queries[c, pairs[:, 0]] - tiles.keys[c, pairs[:, 1]]
            found.append((of, place, met, away))
    width = 1 + max(int(place.max(initial=0)) for _, place, _, _ in found)
    shape = (len(found), size, width)
    other = (steps[0].queries, steps[0].keys)[1 - by].shape[1]
    table = _Table(
        np.zeros(shape, np.int16 if other <= np.iinfo(np.int16).max else np.int32),
        np.zeros(shape, np.int8),
        np.zeros(shape, np.int8),
    )
    for n, (of, place, met, away) in enumerate(found):
        table.next[n, of, place] = met
        table.kind[n, of, place] = np.where(np.isin(away, partial), 1, 2)
        for i, distance in enumerate(partial):
            table.mask[n, of, place] += np.int8(i) * (away == distance)
    np.maximum.accumulate(table.next, axis=2, out=table.next)
    return jax.tree.map(lambda x: x.reshape(len(devices), len(steps), 1, size, width), table)
