"""A mixture of experts in the place of a block's MLP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_train.config import ModelConfig, MoEConfig
from spmd_train.nn.dispatch import kernel_axes, run_experts
from spmd_train.nn.mlp import MLP
from spmd_train.nn.params import Initializer, ModelState, normal, param
from spmd_train.nn.projection import dot_float32
from spmd_train.nn.routing import RoutingStats, route
from spmd_train.parallel.rules import LogicalAxes, constrain


class Kernel(nnx.Module):
    """A kernel alone."""

    def __init__(
        self, shape: tuple[int, ...], axes: LogicalAxes, *, init: Initializer, dtype: str, rngs
    ) -> None:
        """Makes the kernel [*shape]."""
        self.kernel = param(rngs, shape, axes, init=init, dtype=dtype)


class Experts(nnx.Module):
    """Many MLPs without biases: each kernel has a first dim more."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, *, out_scale: float, rngs: nnx.Rngs
    ) -> None:
        """Makes the kernels; `out_scale` initializes those that write the residual."""
        d, f, e = config.embed_dim, moe.expert_width(config), moe.num_experts
        common = {"dtype": config.param_dtype, "rngs": rngs}
        into = {"init": normal(config.init_scale), **common}
        axes = kernel_axes("up")
        self.gate = Kernel((e, d, f), axes, **into) if config.mlp == "swiglu" else None
        self.up = Kernel((e, d, f), axes, **into)
        self.down = Kernel((e, f, d), kernel_axes("down"), init=normal(out_scale), **common)

    def kernels(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Name to kernel, [E, in, out]."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {n: k.kernel[...].astype(dtype) for n, k in named.items() if k is not None}


class MoE(nnx.Module):
    """Routed experts, and shared ones that every token takes.

    `bias` (with `balance = "bias"`) is no parameter: `update_bias` changes it once per step.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, *, out_scale: float, rngs: nnx.Rngs
    ) -> None:
        """Makes router and experts; `out_scale` initializes what writes the residual."""
        self.config = moe
        self.quantization = config.quantization
        self.router = Kernel(
            (config.embed_dim, moe.num_experts),
            ("embed", None),
            init=normal(config.init_scale),
            dtype=config.param_dtype,
            rngs=rngs,
        )
        self.experts = Experts(config, moe, out_scale=out_scale, rngs=rngs)
        self.shared = (
            MLP(config, out_scale=out_scale, rngs=rngs, width=moe.shared_width(config))
            if moe.num_shared_experts
            else None
        )
        self.bias = (
            ModelState(jnp.zeros(moe.num_experts, jnp.float32), axes=(None,))
            if moe.balance == "bias"
            else None
        )

    def __call__(
        self, x_BTD: jax.Array, *, is_token_BT: jax.Array
    ) -> tuple[jax.Array, RoutingStats]:
        """Maps [B, T, D] to [B, T, D]; padding gets nothing but the shared experts."""
        with jax.named_scope("router"):
            x32_BTD = x_BTD.astype(jnp.float32)
            # Its gradient is summed whole: XLA would make parts of it and permute them between
            # devices, for which a pipeline's idle stages would have to wait.
            kernel_DE = constrain(self.router.kernel[...].astype(jnp.float32), (None, None))
            logits_BTE = dot_float32(x32_BTD, kernel_DE, precision=jax.lax.Precision.HIGHEST)
            routing, stats = route(
                constrain(logits_BTE, ("batch", "sequence", None)),
                bias_E=None if self.bias is None else self.bias[...],
                is_token_BT=is_token_BT,
                config=self.config,
            )
        with jax.named_scope("experts"):
            kernels = self.experts.kernels(x_BTD.dtype)
            y_BTD = run_experts(
                x_BTD, routing, kernels, config=self.config, quantization=self.quantization
            )
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BTD += self.shared(x_BTD)
        return y_BTD, stats


def update_bias(bias: jax.Array, load: jax.Array, *, speed: float) -> jax.Array:
    """Moves each expert's bias by `speed`: up if its load is below the mean, else down.

    DeepSeek-V3's balance without a loss (Wang et al., arXiv:2408.15664, algorithm 1).

    Args:
        bias: [..., E].
        load: how many tokens of the whole global batch chose each expert; same shape.
        speed: `moe.bias_update_speed`.

    Returns:
        The new bias.
    """
    return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
