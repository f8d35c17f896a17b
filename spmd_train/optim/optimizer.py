"""A config becomes one optax transformation: clip, precondition, decay, learning rate."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spmd_train.config import ConfigError, OptimizerConfig
from spmd_train.optim.muon import scale_by_muon_or_adam
from spmd_train.optim.offload import check_layers, with_host_state
from spmd_train.optim.schedule import make_schedule
from spmd_train.optim.state_dtype import with_state_dtype
from spmd_train.parallel.rules import LogicalAxes, leaf_path


def make_optimizer(
    config: OptimizerConfig,
    *,
    num_steps: int,
    params: Any,
    logical_axes: Mapping[str, LogicalAxes | None],
    layer_shards: Mapping[str, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer.

    The chain is: clip the gradient to `clip_norm` (global, over all parameters), precondition it
    (`name`), add `weight_decay` times the parameter where the mask says so, multiply by minus the
    learning rate. So weight decay is decoupled and follows the schedule (AdamW as in PyTorch).

    - adamw: Loshchilov and Hutter, arXiv:1711.05101.
    - lion: Chen et al., arXiv:2302.06675. Wants a 3 to 10 times smaller learning rate.
    - adafactor: Shazeer and Stern, arXiv:1804.04235, as Zhai et al., arXiv:2106.04560, use it: the
      learning rate is not multiplied by the parameter's norm, momentum `b1`, second-moment decay
      `1 - step**-0.8` up to `b2`. Second moments are factored over the two largest dims if both
      have 128 or more; updates are clipped to an RMS of 1 in each layer.
    - sgd: momentum `b1` (heavy ball).
    - muon: Jordan's Muon for each layer's matrices with momentum `b1`, AdamW for everything else;
      one learning rate for both. See `muon.py`.

    Args:
        config: the optimizer's.
        num_steps: steps of the run, for the schedule.
        params: nested dicts of arrays or ShapeDtypeStructs; only paths and shapes are used.
        logical_axes: parameter path to logical axes, None where the leaf has none. Stacked layers
            have "layers" among them.
        layer_shards: for `offload` = host: as `offload.with_host_state` has it.

    Returns:
        A transformation whose state is a dict: `clip`, `precondition`, `decay`, `schedule`. What
        mirrors a parameter in it has the parameter's path as the tail of its own. Updates are
        float32. Apply them with `optax.apply_updates`. Where `offload` is `host`, the update takes
        and gives moments in the host's memory. It takes `good=`, a bool scalar, where false the old
        state stays, or None.

    Raises:
        ConfigError: a schedule that cannot be, an invalid regular expression, a state dtype too
            coarse for the moments, moments that cannot be offloaded, muon without matrices.
    """
    _check_state_dtype(config)
    _check_offload(config)
    axes = jax.tree_util.tree_map_with_path(
        lambda path, _: logical_axes.get(leaf_path(path)), params
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    offloaded = config.offload == "host"
    chain = optax.named_chain(
        ("clip", optax.identity() if offloaded else clip),
        ("precondition", _PRECONDITIONERS[config.name](config, params, axes)),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=_decay_mask(config, params))),
        ("schedule", optax.scale_by_learning_rate(make_schedule(config, num_steps=num_steps))),
    )
    transform = _skipping(with_state_dtype(chain, dtype=config.state_dtype))
    if offloaded:
        check_layers(params, layer_shards or {})
        return with_host_state(transform, clip=clip, layer_shards=layer_shards or {})
    return transform


def _skipping(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same; where `good=` is false, nothing of the state changes but the schedule's step."""

    def update(
        updates: Any, state: Any, params: Any = None, *, good: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        new: Any
        updates, new = inner.update(updates, state, params)
        if good is not None:
            schedule = new["schedule"]
            new = jax.tree.map(functools.partial(jnp.where, good), new, state)
            new["schedule"] = schedule
        return updates, new

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _decay_mask(config: OptimizerConfig, params: Any) -> Any:
    """A tree of bools: which parameters are decayed."""
    try:
        exclude = re.compile(config.weight_decay_exclude)
    except re.error as error:
        raise ConfigError(
            f"optimizer.weight_decay_exclude = {config.weight_decay_exclude!r} is no regular "
            f"expression: {error}"
        ) from error
    if not exclude.pattern:
        return jax.tree.map(lambda _: True, params)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: exclude.search(leaf_path(path)) is None, params
    )


def _check_state_dtype(config: OptimizerConfig) -> None:
    if config.state_dtype == "float16":
        raise ConfigError(
            "optimizer.state_dtype = 'float16': squares of gradients below 2e-4 are 0 in it; use "
            "bfloat16 or float32"
        )
    decays = {"b1": config.b1} if config.name == "sgd" else {"b1": config.b1, "b2": config.b2}
    for name, decay in decays.items():
        # A moment m that decays to b * m rounds back to m where (1 - b) * m is less than half the
        # distance to bfloat16's next number; that is 2**-8 * m at most.
        if config.state_dtype == "bfloat16" and 1 - decay < 2**-8:
            raise ConfigError(
                f"optimizer.{name} = {decay}: a moment in bfloat16 cannot decay "
                f"that slowly (it rounds back to itself); with optimizer.state_dtype = 'bfloat16' "
                f"it must be at most {1 - 2**-8}; or use float32"
            )


def _check_offload(config: OptimizerConfig) -> None:
    if config.offload == "none":
        return
    if config.name == "adafactor":
        raise ConfigError(
            "optimizer.offload = 'host': adafactor's moments span layers, which are updated one at "
            "a time; set it to none, or optimizer.name to adamw, lion, muon or sgd"
        )
    if config.name == "sgd" and not config.b1:
        raise ConfigError(
            "optimizer.offload = 'host': sgd with optimizer.b1 = 0 has no moments; set it to none"
        )


def _adamw(config: OptimizerConfig, params: Any, axes: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)


def _lion(config: OptimizerConfig, params: Any, axes: Any) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)


def _sgd(config: OptimizerConfig, params: Any, axes: Any) -> optax.GradientTransformation:
    return optax.trace(decay=config.b1) if config.b1 else optax.identity()


def _adafactor(config: OptimizerConfig, params: Any, axes: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(
            # It is added to the squared gradient, `epsilon` to the root; in float32 it may be 0.
            epsilon=max(config.epsilon**2, 1e-30),
            decay_rate_fn=lambda step, _: jnp.minimum(
                1.0 - (jnp.asarray(step) + 1.0) ** -0.8, config.b2
            ),
        ),
        _clip_by_layer_rms(1.0, axes),
        optax.ema(config.b1, debias=False) if config.b1 else optax.identity(),
    )


def _clip_by_layer_rms(threshold: float, axes: Any) -> optax.GradientTransformation:
    """`optax.clip_by_block_rms`, but a stacked leaf holds one block per layer."""

    def clip(update: jax.Array, names: LogicalAxes | None) -> jax.Array:
        names = names or (None,) * update.ndim
        dims = tuple(i for i, name in enumerate(names) if name != "layers")
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=dims, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates, axes))


def _muon(config: OptimizerConfig, params: Any, axes: Any) -> optax.GradientTransformation:
    return scale_by_muon_or_adam(
        b1=config.b1,
        b2=config.b2,
        epsilon=config.epsilon,
        params=params,
        axes=axes,
    )


_PRECONDITIONERS: dict[str, Callable[[OptimizerConfig, Any, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
}
