"""The train state, and the model as a pure function of its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from spmd_train.parallel.rules import LogicalAxes, leaf_path
from spmd_train.tasks import Task

Params = dict[str, Any]
"""Nested dicts of arrays: names as in the module, leaves plain arrays."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: optimizer steps done, int32 scalar.
        params: nested dicts of arrays, in the parameter dtype.
        opt_state: optax's.
        ema: moving average of the parameters, float32; None when it is off.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and sample with: the average where there is one."""
        return self.params if self.ema is None else self.ema


class FunctionalModel:
    """A task's module split into its static half and a pure tree of parameters."""

    def __init__(self, task: Task) -> None:
        """Traces the module's construction; nothing is allocated."""
        self.task = task
        abstract = nnx.eval_shape(lambda: task.make_model(jax.random.key(0)))
        self._graphdef, state = nnx.split(abstract)
        self._structure = jax.tree.structure(state)
        self.abstract_params: Params = nnx.to_pure_dict(state)
        variables = jax.tree_util.tree_flatten_with_path(
            state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )[0]
        self.logical_axes: dict[str, LogicalAxes | None] = {
            leaf_path(path): variable.get_metadata().get("axes") for path, variable in variables
        }
        paths = [leaf_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        pure = jax.tree_util.tree_flatten_with_path(self.abstract_params)[0]
        assert paths == [leaf_path(p) for p, _ in pure], "module and pure tree differ in order"

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, a function of the key alone."""
        return nnx.to_pure_dict(nnx.split(self.task.make_model(key))[1])

    def merge(self, params: Params) -> Any:
        """The module with these parameters."""
        state = jax.tree.unflatten(self._structure, jax.tree.leaves(params))
        return nnx.merge(self._graphdef, state)
