"""Attention kernels of TPUs and GPUs, of one device's arrays, and their gradients.

Both know segments. What a kernel does not know it refuses: nothing is silently dropped.

Dims: B batch, T tokens, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from spmd_train.parallel.rules import current_device

QKV = tuple[jax.Array, jax.Array, jax.Array]


def _pallas(name: str) -> Any:
    """A module of `jax.experimental.pallas.ops`: imported where its kernel runs, as it is slow."""
    with warnings.catch_warnings():
        # jax 0.12 points to tokamax, whose backward pass makes masks as large as the scores.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.{name}")


def _splash(part: str) -> Any:
    return _pallas(f"tpu.splash_attention.splash_attention_{part}")


def _triton() -> Any:
    return _pallas("gpu.attention")


def kernel_flops(flops: float) -> str:
    """A scope that tells the FLOPs of each kernel in it: their compilers don't know them."""
    return f"kernel_flops_{round(flops)}"


class Kernel(Protocol):
    """Causal attention within segments, of one device's arrays, and its gradient."""

    def why_not(self, length: int, *, softcap: float, window: int) -> str:
        """What the kernel cannot do of sequences of this length; empty: it can."""
        ...

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, **scoring: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, H, K], and of the softmax what its gradient needs, float32 [B, H, T].

        Args:
            q: scaled queries [B, T, H, K].
            k: keys [B, T, G, K].
            v: values.
            segments: int32 [B, T].
            scoring: `softcap` and `window`; 0: off.
        """
        ...

    def backward(self, saved: Any, out_grad: jax.Array, **scoring: Any) -> QKV:
        """Gradients of q, k and v; `saved` are q, k, v, segments and what `forward` returned."""
        ...


class Splash:
    """Splash attention: a flash attention that skips the blocks that its mask empties.

    Per pair of blocks it has 2 matmuls forward; backward 4 for keys and values, 3 for queries, in
    two kernels.
    """

    _WIDTH = 128
    """A TPU's lanes: heads are padded to whole ones, which costs nothing there."""

    def __init__(self, *, interpret: bool = False) -> None:
        """Makes it; `interpret` runs it on CPU, slowly."""
        self._interpret = interpret

    def why_not(self, length: int, *, softcap: float, window: int) -> str:
        """See `Kernel`."""
        return _why_no_multiple(length, self._WIDTH)

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, **scoring: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Kernel`."""
        info, _, told, flops = self._plan(q.shape, **scoring)
        splash = _splash("kernel")

        def one(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> Any:
            ids = splash.SegmentIds(s, s)
            return splash._splash_attention_forward(
                *(info, q, k, v, ids),
                sinks=None,
                save_residuals=True,
                residual_checkpoint_name=None,
                **told,
            )

        run: Any = jax.vmap(one)
        with jax.named_scope(kernel_flops(2 * flops)):
            out, (log_total,) = run(*self._heads_first(q, k, v), segments)
        return self._tokens_first(out, q), log_total

    def backward(self, saved: Any, out_grad: jax.Array, **scoring: Any) -> QKV:
        """See `Kernel`."""
        q, k, v, segments, out, log_total = saved
        _, infos, told, flops = self._plan(q.shape, **scoring)
        splash = _splash("kernel")

        def one(
            q: Any, k: Any, v: Any, out: Any, out_grad: Any, s: jax.Array, log_total: jax.Array
        ) -> Any:
            ids = splash.SegmentIds(s, s)
            residuals = (q, k, v, ids, None, out, log_total, *infos)
            return splash._splash_attention_bwd(
                save_residuals=False,
                residual_checkpoint_name=None,
                res=residuals,
                do=out_grad,
                **told,
            )[3:6]

        run: Any = jax.vmap(one)
        with jax.named_scope(kernel_flops(7 / 2 * flops)):
            grads = run(*self._heads_first(q, k, v, out, out_grad), segments, log_total)
        q_grad, k_grad, v_grad = map(self._tokens_first, grads, (q, k, v))
        return q_grad, k_grad, v_grad

    def _plan(
        self, shape: tuple[int, ...], *, softcap: float, window: int
    ) -> tuple[Any, tuple[Any, Any], dict[str, Any], int]:
        """The mask as the kernels walk it (forward; queries, keys), what else they are told.

        And FLOPs of one matmul over the pairs of blocks that it leaves.
        """
        splash, masks, mask_info = map(_splash, ("kernel", "mask", "mask_info"))
        b, t, h, k = shape
        block = next(size for size in (512, 384, 256, 128) if t % size == 0)
        mask = masks.CausalMask((t, t))
        if window:
            mask = masks.LocalMask((t, t), window_size=(window - 1, 0), offset=0)
        everywhere: Any = masks.MultiHeadMask([mask] * h), (block, block)
        rows, function = mask_info.process_mask(*everywhere, head_shards=1, q_seq_shards=1)
        columns, _ = mask_info.process_mask_dkv(*everywhere, head_shards=1, q_seq_shards=1)
        rows, columns = jax.tree.map(jnp.array, (rows, columns))

        cuts = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        told = {
            "mask_value": splash.DEFAULT_MASK_VALUE,
            "is_mqa": False,
            "block_sizes": splash.BlockSizes(**dict.fromkeys(cuts, block)),
            "mask_function": function,
            "attn_logits_soft_cap": softcap or None,
            "interpret": self._interpret,
        }
        blocks = t // block
        reach = min(blocks, math.ceil((window - 1) / block) + 1) if window else blocks
        pairs = reach * blocks - reach * (reach - 1) // 2
        return rows, (rows, columns), told, 2 * b * h * pairs * block**2 * self._padded(k)

    def _padded(self, width: int) -> int:
        return -(-width // self._WIDTH) * self._WIDTH

    def _heads_first(self, *arrays_BTHK: jax.Array) -> list[jax.Array]:
        width = arrays_BTHK[0].shape[3]
        pad = ((0, 0), (0, 0), (0, 0), (0, self._padded(width) - width))
        return [jnp.pad(x.swapaxes(1, 2), pad) for x in arrays_BTHK]

    def _tokens_first(self, x_BHTK: jax.Array, like: jax.Array) -> jax.Array:
        return x_BHTK.swapaxes(1, 2)[..., : like.shape[3]].astype(like.dtype)


class Triton:
    """The flash attention of `jax.experimental.pallas.ops.gpu`, on GPUs since Ampere.

    It knows as many key heads as query heads: keys and values are repeated on the device.
    """

    _FORWARD, _BACKWARD = 128, 64
    """Rows and columns of a block."""

    def __init__(self, *, interpret: bool = False) -> None:
        """Makes it; `interpret` runs it on CPU, slowly."""
        self._interpret = interpret

    def why_not(self, length: int, *, softcap: float, window: int) -> str:
        """See `Kernel`."""
        if not self._interpret and not _is_ampere(current_device()):
            return "that of gpu is for NVIDIA's since Ampere (compute capability 8.0)"
        if softcap or window:
            return "that of gpu knows no model.attention_softcap and no model.sliding_window"
        return _why_no_multiple(length, self._FORWARD)

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, **scoring: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Kernel`."""
        copies = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        with jax.named_scope(kernel_flops(2 * self._flops(q.shape, self._FORWARD))):
            return _triton().mha(
                *(q, k, v, segments),
                causal=True,
                block_sizes=self._blocks(),
                return_residuals=True,
                interpret=self._interpret,
            )

    def backward(self, saved: Any, out_grad: jax.Array, **scoring: Any) -> QKV:
        """See `Kernel`."""
        q, k, v, segments, out, log_total = saved
        g, copies = k.shape[2], q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        # Told of both kernels, the sum before the gradient and the gradient: half for each.
        with jax.named_scope(kernel_flops(7 / 2 * self._flops(q.shape, self._BACKWARD))):
            q_grad, *kv_grads, _ = _triton()._mha_backward(
                1.0, True, self._blocks(), "triton", None, 2, None, self._interpret, False, False,
                (q, k, v, segments, out, log_total), out_grad,
            )  # fmt: skip
        b, t, _, width = k.shape
        k_grad, v_grad = (
            x.reshape(b, t, g, copies, width).sum(3, dtype=jnp.float32).astype(x.dtype)
            for x in kv_grads
        )
        return q_grad, k_grad, v_grad

    def _blocks(self) -> Any:
        cuts = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        sizes = dict.fromkeys(cuts, self._BACKWARD)
        return _triton().BlockSizes(block_q=self._FORWARD, block_k=self._BACKWARD, **sizes)

    def _flops(self, shape: tuple[int, ...], block: int) -> int:
        """FLOPs of one matmul over all blocks that a causal mask leaves."""
        b, t, h, width = shape
        return b * h * t * (t + block) * width


def _is_ampere(device: Any) -> bool:
    """Whether a GPU has what the kernel is compiled to; AMD's tell a name, not a number."""
    major = str(device.compute_capability).partition(".")[0]
    return major.isdecimal() and int(major) >= 8


def _why_no_multiple(length: int, block: int) -> str:
    return f"it takes multiples of {block} tokens, not {length}" if length % block else ""
