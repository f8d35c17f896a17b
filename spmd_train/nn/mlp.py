"""The feed-forward half of a block."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from spmd_train.config import ModelConfig
from spmd_train.nn.activations import swiglu
from spmd_train.nn.params import normal
from spmd_train.nn.projection import Projection
from spmd_train.parallel.rules import constrain


class MLP(nnx.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202) or GELU in the tanh form (GPT-2)."""

    def __init__(
        self, config: ModelConfig, *, out_scale: float, rngs: nnx.Rngs, width: int | None = None
    ) -> None:
        """Makes the projections.

        Args:
            config: the model's.
            out_scale: initializes the projection that writes the residual.
            rngs: of the initial values.
            width: hidden; None: `config.mlp_dim`.
        """
        d, f, axes = (config.embed_dim,), (width or config.mlp_dim,), ("embed", "mlp")
        common = {
            "use_bias": config.mlp_bias,
            "dtype": config.param_dtype,
            "quantization": config.quantization,
            "rngs": rngs,
        }
        self.gate = (
            Projection(d, f, axes, init=normal(config.init_scale), **common)
            if config.mlp == "swiglu"
            else None
        )
        self.up = Projection(d, f, axes, init=normal(config.init_scale), **common)
        self.down = Projection(f, d, axes[::-1], init=normal(out_scale), **common)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        up_BTF = checkpoint_name(self.up(x_BTD), "up")
        if self.gate is None:
            hidden_BTF = jax.nn.gelu(up_BTF, approximate=True)
        else:
            hidden_BTF = swiglu(checkpoint_name(self.gate(x_BTD), "gate"), up_BTF)
        y_BTD = self.down(constrain(hidden_BTF, ("batch", "sequence", "mlp")))
        return checkpoint_name(y_BTD, "down")
