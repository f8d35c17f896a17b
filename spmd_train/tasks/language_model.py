"""Next-token prediction over packed documents."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_train.config import LossConfig, ModelConfig, MoEConfig
from spmd_train.models.transformer import Transformer
from spmd_train.nn.attention import Tokens
from spmd_train.nn.dropout import DropoutKeys, dropout_keys
from spmd_train.nn.loss import cross_entropy_sums
from spmd_train.nn.moe import update_bias
from spmd_train.nn.routing import RoutingStats
from spmd_train.parallel.rules import LogicalAxes, vary
from spmd_train.parallel.stages import Layers
from spmd_train.tasks.base import Batch, LayersOutput, LossOutput, ModelState, add_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The task `language_model`.

    A batch holds, each [B, T]: `tokens`, `targets`, `segment_ids` (0: padding), `positions` (int32)
    and `weights` (float32); and `row` [B], the index of each example in the global batch.
    """

    model_config: ModelConfig
    loss_config: LossConfig
    sequence_length: int
    moe_config: MoEConfig = MoEConfig()  # noqa: RUF009 - frozen

    @property
    def stack(self) -> str:
        """Where the layers are among the parameters."""
        return "blocks"

    @property
    def compute_dtype(self) -> str:
        """The dtype of activations and matmuls."""
        return self.model_config.compute_dtype

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return self.model_config.num_layers

    @property
    def head_layers(self) -> float:
        """The head's matmul, in those of a block; attention counts its causal half."""
        c, k = self.model_config, self.model_config.resolved_head_dim
        moe, width = self.moe_config, c.mlp_dim
        if moe.num_experts:
            width = moe.top_k * moe.expert_width(c) + moe.shared_width(c)
        mlp = (3 if c.mlp == "swiglu" else 2) * width * c.embed_dim
        projections = 2 * (c.num_heads + c.resolved_kv_heads) * k * c.embed_dim
        attention = self.sequence_length * c.num_heads * k
        return c.vocab_size * c.embed_dim / (mlp + projections + attention)

    def make_model(self, key: jax.Array) -> Transformer:
        """Builds the transformer."""
        return Transformer(self.model_config, self.moe_config, rngs=nnx.Rngs(params=key))

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch."""
        ids = jax.ShapeDtypeStruct((batch_size, self.sequence_length), jnp.int32)
        return {
            "tokens": ids,
            "targets": ids,
            "segment_ids": ids,
            "positions": ids,
            "weights": jax.ShapeDtypeStruct(ids.shape, jnp.float32),
            "row": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def batch_axes(self) -> dict[str, LogicalAxes]:
        """Logical axes of a batch."""
        shapes = self.batch_shapes(1)
        return {n: ("batch", "sequence")[: len(s.shape)] for n, s in shapes.items()}

    def loss(self, model: nnx.Module, batch: Batch, *, key: jax.Array | None) -> LossOutput:
        """Cross-entropy in nats, plus the z-loss and those of the router.

        The metrics are `cross_entropy` and `accuracy`; with experts also `load_balancing_loss` and
        `router_z_loss` (means over layers, unweighted), `expert_load` and `expert_dropped`.
        """
        x_BTD = self.embed(model, batch, key=key)
        x_BTD, sums, _ = self.run_layers(model, x_BTD, batch, key=key)
        output = self.head(model, x_BTD, batch)
        return output if sums is None else add_sums(output, sums)

    def embed(self, model: nnx.Module, batch: Batch, *, key: jax.Array | None) -> jax.Array:
        """What enters the first block, [B, T, D]."""
        assert isinstance(model, Transformer)
        tokens, dropout = self._tokens(batch), self._dropout(batch, key)
        return model.embed(batch["tokens"], tokens=tokens, dropout=dropout)

    def run_layers(
        self,
        model: nnx.Module,
        x: jax.Array,
        batch: Batch,
        *,
        key: jax.Array | None,
        layers: Layers | None = None,
        taps: dict[str, jax.Array] | None = None,
    ) -> LayersOutput:
        """Runs the blocks; what they add to the loss is their routers'."""
        assert isinstance(model, Transformer)
        tokens, dropout = self._tokens(batch), self._dropout(batch, key)
        x, _, routing, operands = model.run_blocks(
            x, tokens=tokens, dropout=dropout, layers=layers, taps=taps
        )
        sums = None if routing is None else self._routing_sums(routing, batch, layers)
        return LayersOutput(x, sums, operands)

    def head(self, model: nnx.Module, x: jax.Array, batch: Batch) -> LossOutput:
        """The loss of what leaves the last block."""
        assert isinstance(model, Transformer)
        hidden_BTD = model.finish(x)
        with jax.named_scope("loss"):
            sums = cross_entropy_sums(
                hidden_BTD,
                model.head_kernel(),
                targets_BT=batch["targets"],
                weights_BT=batch["weights"],
                softcap=self.model_config.logit_softcap,
                z_loss=self.loss_config.z_loss,
                chunk=self.loss_config.chunk_tokens,
            )
        return LossOutput(
            loss_sum=sums.loss,
            weight_sum=jnp.sum(batch["weights"]),
            metric_sums={"cross_entropy": sums.cross_entropy, "accuracy": sums.correct},
        )

    def _routing_sums(
        self, routing: RoutingStats, batch: Batch, layers: Layers | None
    ) -> LossOutput:
        """The router's losses, each layer's and each sequence's times the tokens it counts."""
        moe, weights_B = self.moe_config, jnp.sum(batch["weights"], axis=1)
        balance, z_squared = (
            jnp.sum(x_LB * weights_B) for x_LB in (routing.balance, routing.z_squared)
        )
        loss_sum = moe.router_z_loss * z_squared
        if moe.balance == "loss":
            loss_sum += moe.load_balancing_loss * balance
        num_layers, load_LE = self.model_config.num_layers, jnp.sum(routing.load, axis=1)
        if layers is not None:
            # An empty place of the stack has no load, so that it may add to any layer's.
            zeros_LE = jnp.zeros((num_layers, moe.num_experts), load_LE.dtype)
            load_LE = vary(zeros_LE).at[layers.indices].add(load_LE)
        metric_sums = {
            "load_balancing_loss": balance / num_layers,
            "router_z_loss": z_squared / num_layers,
            "expert_load": load_LE,
            "expert_dropped": jnp.sum(routing.dropped),
        }
        return LossOutput(loss_sum, jnp.zeros_like(loss_sum), metric_sums)

    def update_model_state(self, model_state: ModelState, sums: LossOutput) -> ModelState:
        """Moves the experts' biases towards an even load."""
        if not model_state:
            return model_state
        update = functools.partial(
            update_bias,
            load=sums.metric_sums["expert_load"],
            speed=self.moe_config.bias_update_speed,
        )
        return jax.tree.map(update, model_state)

    def _tokens(self, batch: Batch) -> Tokens:
        return Tokens(batch["segment_ids"], batch["positions"])

    def _dropout(self, batch: Batch, key: jax.Array | None) -> DropoutKeys | None:
        rate = self.model_config.dropout
        return dropout_keys(rate, key, batch["row"]) if rate and key is not None else None
