"""A decoder-only transformer: pre-norm blocks, stacked and scanned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from spmd_train.config import ModelConfig, MoEConfig
from spmd_train.nn.attention import Attention, LayerCache, Tokens
from spmd_train.nn.dropout import DropoutKeys
from spmd_train.nn.embeddings import Embedding, rope_angles
from spmd_train.nn.mlp import MLP
from spmd_train.nn.moe import MoE
from spmd_train.nn.norms import NORMS
from spmd_train.nn.params import normal
from spmd_train.nn.projection import SAVED_NAME, Operands, Projection, Tape, recording
from spmd_train.nn.routing import RoutingStats
from spmd_train.parallel import by_kernel
from spmd_train.parallel.rules import (
    RESIDUAL,
    constrain,
    keep_all_but_gathered,
    unshard,
    vary,
)
from spmd_train.parallel.stages import Layers

REMAT_POLICIES: dict[str, Callable[[ModelConfig], Any]] = {
    "none": lambda config: keep_all_but_gathered(),
    "full": lambda config: jax.checkpoint_policies.nothing_saveable,
    "dots": lambda config: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED_NAME, by_kernel.SAVED_NAME),
    ),
    "projections": lambda config: jax.checkpoint_policies.save_only_these_names(
        SAVED_NAME, by_kernel.SAVED_NAME
    ),
    "names": lambda config: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=config.remat_names[0],
        names_which_can_be_offloaded=config.remat_names[1],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""`model.remat` to what makes a policy of `jax.checkpoint`; None: no checkpoint is needed."""


class Cache(NamedTuple):
    """What generation remembers.

    Attributes:
        layers: keys and values of every layer, each [L, B, S, G, K].
        tokens: segments and positions of the S places; segment 0 where there is nothing.
        end: next place to write, int32 scalar.
    """

    layers: LayerCache
    tokens: Tokens
    end: jax.Array


class Output(NamedTuple):
    """What a run of the network gives.

    Attributes:
        hidden: after the last norm, [B, T, D] in the compute dtype.
        cache: with the new tokens in it; None without one.
        routing: of each layer's experts, every array with a first dim L; None in a dense model.
    """

    hidden: jax.Array
    cache: Cache | None
    routing: RoutingStats | None


class Block(nnx.Module):
    """Attention and MLP (or experts), each normalized before and added after."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, *, rngs: nnx.Rngs) -> None:
        """Makes one layer's parameters."""
        norm = {"epsilon": config.norm_epsilon, "dtype": config.param_dtype, "rngs": rngs}
        # GPT-2: projections that write the residual stream start smaller the deeper the network.
        out_scale = config.init_scale / (2 * config.num_layers) ** 0.5
        self.attention_norm = NORMS[config.norm](config.embed_dim, **norm)
        self.attention = Attention(config, out_scale=out_scale, rngs=rngs)
        self.mlp_norm = NORMS[config.norm](config.embed_dim, **norm)
        self.mlp = (
            MoE(config, moe, out_scale=out_scale, rngs=rngs)
            if moe.num_experts
            else MLP(config, out_scale=out_scale, rngs=rngs)
        )

    def __call__(
        self, x_BTD: jax.Array, *, dropout: DropoutKeys | None, tokens: Tokens, **attention: Any
    ) -> tuple[jax.Array, tuple[LayerCache | None, RoutingStats | None]]:
        """One layer; `tokens` and `attention` are handed to `Attention`."""

        def add(x: jax.Array, y: jax.Array, place: int) -> jax.Array:
            y = constrain(y, RESIDUAL)
            return x + (y if dropout is None else dropout.fold_in(place).drop(y))

        with jax.named_scope("attention"):
            # Norms run on the shard of the residual stream; the projections see whole sequences.
            h_BTD = constrain(self.attention_norm(x_BTD), ("batch", "sequence", None))
            y_BTD, cache = self.attention(h_BTD, tokens=tokens, **attention)
            x_BTD = add(x_BTD, y_BTD, 0)
        with jax.named_scope("mlp"):
            h_BTD = constrain(self.mlp_norm(x_BTD), ("batch", "sequence", None))
            if isinstance(self.mlp, MoE):
                y_BTD, routing = self.mlp(h_BTD, is_token_BT=tokens.segment_ids > 0)
            else:
                y_BTD, routing = self.mlp(h_BTD), None
            x_BTD = add(x_BTD, y_BTD, 1)
        return x_BTD, (cache, routing)


class Transformer(nnx.Module):
    """The network of `ModelConfig`, with experts as `MoEConfig` says."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes all parameters; those of the blocks are stacked along a first dim `layers`."""
        self.config = config
        dtype, scale = config.param_dtype, config.init_scale
        table = {"scale": scale, "dtype": dtype, "rngs": rngs}
        self.embedding = Embedding(config.vocab_size, config.embed_dim, ("vocab", "embed"), **table)
        self.positions = (
            Embedding(config.max_positions, config.embed_dim, ("positions", "embed"), **table)
            if config.positions == "learned"
            else None
        )
        self.blocks = _stack(config, moe, key=rngs.params())
        self.final_norm = NORMS[config.norm](
            config.embed_dim, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs
        )
        self.head = (
            None
            if config.tied_head
            else Projection(
                (config.embed_dim,),
                (config.vocab_size,),
                ("embed", "vocab"),
                use_bias=False,
                init=normal(scale),
                dtype=dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        ids_BT: jax.Array,
        *,
        tokens: Tokens,
        dropout: DropoutKeys | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """`run`, without the routing."""
        return self.run(ids_BT, tokens=tokens, dropout=dropout, cache=cache)[:2]

    def run(
        self,
        ids_BT: jax.Array,
        *,
        tokens: Tokens,
        dropout: DropoutKeys | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Runs the network up to its last norm.

        Args:
            ids_BT: token ids, int32 [B, T].
            tokens: their segments and positions.
            dropout: keys of the step; None in evaluation.
            cache: earlier tokens; the new ones are added to it.

        Returns:
            The output.
        """
        x_BTD = self.embed(ids_BT, tokens=tokens, dropout=dropout)
        x_BTD, cache, routing, _ = self.run_blocks(
            x_BTD, tokens=tokens, dropout=dropout, cache=cache
        )
        return Output(self.finish(x_BTD), cache, routing)

    def embed(self, ids_BT: jax.Array, *, tokens: Tokens, dropout: DropoutKeys | None) -> jax.Array:
        """What enters the first block, [B, T, D] in the compute dtype."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        with jax.named_scope("embed"):
            x_BTD = self.embedding(ids_BT, path="embedding", dtype=dtype)
            if self.positions is not None:
                x_BTD += self.positions(tokens.positions, path="positions", dtype=dtype)
            x_BTD = constrain(x_BTD, RESIDUAL)
            return x_BTD if dropout is None else dropout.fold_in(config.num_layers).drop(x_BTD)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The last norm: hidden states [B, T, D] from what leaves the last block."""
        with jax.named_scope("final_norm"):
            norm = _ready(self.final_norm, "final_norm", jnp.dtype(self.config.compute_dtype))
            return constrain(norm(x_BTD), ("batch", "sequence", None))

    def run_blocks(
        self,
        x_BTD: jax.Array,
        *,
        tokens: Tokens,
        dropout: DropoutKeys | None,
        cache: Cache | None = None,
        layers: Layers | None = None,
        taps: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache | None, RoutingStats | None, Operands | None]:
        """Runs the blocks one after another.

        Args:
            x_BTD: what enters the first of them.
            tokens: segments and positions.
            dropout: keys of the step; None in evaluation.
            cache: earlier tokens; the new ones are added to it.
            layers: which ones the parameters of `blocks` are; None: all, in order.
            taps: kernels' gradients are left for later: arrays like the outputs of the projections,
                by their paths in a block, stacked; those not named tell their outputs.

        Returns:
            What leaves the last; the cache (None without one); the routing (None in a dense model);
            of what the kernels' gradients are made, stacked (None without taps).
        """
        config = self.config
        # Else the lookup of learned positions decides how they lie, and masks send them around.
        tokens = Tokens(*(constrain(x, ("batch", "sequence")) for x in tokens))
        graphdef, stacked = nnx.split(self.blocks)
        dtype = jnp.dtype(config.compute_dtype)
        if layers is None:
            layers = Layers(jnp.arange(config.num_layers))
        rope = None
        if self.positions is None:
            head_dim = config.resolved_head_dim
            rope = rope_angles(tokens.positions, config.rope, head_dim=head_dim)
        attention: dict[str, Any] = {"tokens": tokens, "rope": rope}
        seen = tokens
        if cache is not None:
            seen = Tokens(
                *(
                    jax.lax.dynamic_update_slice(old, new, (0, cache.end))
                    for old, new in zip(cache.tokens, tokens, strict=True)
                )
            )
            attention |= {"cached": seen, "cache_index": cache.end}

        def run(x: jax.Array, xs: tuple[Layers, Any, LayerCache | None, Any]):
            x = checkpoint_name(x, "block_input")
            which, params, cache, taps = xs
            params = unshard(params, "blocks", dtype=dtype, stacked=True)
            keys = None if dropout is None else dropout.fold_in(which.indices)
            block = nnx.merge(graphdef, params)
            tape = None if taps is None else Tape(block, taps)
            with recording(tape):
                y, (cache, routing) = block(x, dropout=keys, cache=cache, **attention)
            return y, (cache, routing, tape and tape.operands)

        def layer(x: jax.Array, xs: tuple[Layers, Any, LayerCache | None, Any]):
            exists = xs[0].exists
            if exists is None:
                return run(x, xs)
            shapes = jax.eval_shape(run, x, xs)[1]
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            # An empty place computes nothing: stages of fewer layers take less time.
            return jax.lax.cond(exists, lambda x: vary(run(x, xs)), lambda x: vary((x, nothing)), x)

        policy = REMAT_POLICIES[config.remat](config)
        if policy is not None:
            # prevent_cse is not needed inside a scan and costs barriers.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        with jax.named_scope("blocks"):
            x_BTD, (caches, routing, operands) = jax.lax.scan(
                layer,
                x_BTD,
                (layers, stacked, None if cache is None else cache.layers, taps),
                unroll=min(config.scan_unroll, len(layers.indices)),
            )
        if cache is None or caches is None:
            return x_BTD, None, routing, operands
        return x_BTD, Cache(caches, seen, cache.end + x_BTD.shape[1]), routing, operands

    def head_kernel(self) -> jax.Array:
        """The output head [D, V] in the compute dtype, gathered over the tokens' mesh axes."""
        dtype = jnp.dtype(self.config.compute_dtype)
        if self.head is None:
            return _ready(self.embedding, "embedding", dtype).table[...].T
        return _ready(self.head, "head", dtype).kernel[...]

    def empty_cache(self, *, batch_size: int, length: int) -> Cache:
        """A cache for `length` tokens of `batch_size` sequences."""
        config = self.config
        assert self.positions is None or length <= config.max_positions, length
        shape = (batch_size, length, config.resolved_kv_heads, config.resolved_head_dim)
        zeros = jnp.zeros((config.num_layers, *shape), jnp.dtype(config.compute_dtype))
        zeros = constrain(zeros, ("layers", "batch", "sequence", "kv_heads", None))
        nothing = jnp.zeros((batch_size, length), jnp.int32)
        return Cache(LayerCache(zeros, zeros), Tokens(nothing, nothing), jnp.int32(0))


def _stack(config: ModelConfig, moe: MoEConfig, *, key: jax.Array) -> Block:
    """A Block whose parameters carry all layers along a first dim."""

    def one(layer_key: jax.Array) -> nnx.State:
        return nnx.split(Block(config, moe, rngs=nnx.Rngs(params=layer_key)))[1]

    graphdef = nnx.split(nnx.eval_shape(lambda: Block(config, moe, rngs=nnx.Rngs(params=0))))[0]
    stacked = jax.vmap(one)(jax.random.split(key, config.num_layers))
    stacked = jax.tree.map(
        lambda p: p.replace(axes=("layers", *p.axes)),
        stacked,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.merge(graphdef, stacked)


def _ready(module: Any, path: str, dtype: jnp.dtype) -> Any:
    """The module with its parameters cast and gathered."""
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, unshard(params, path, dtype=dtype))
