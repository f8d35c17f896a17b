"""The train state, and the model as a pure function of its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from spmd_train.nn import params as nn_params
from spmd_train.parallel.rules import LogicalAxes, leaf_path
from spmd_train.tasks import ModelState, Task

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
        model_state: what the model changes by rules of its own (biases of experts); mostly empty.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None
    model_state: ModelState = dataclasses.field(default_factory=dict)

    @property
    def eval_params(self) -> Params:
        """What to evaluate and sample with: the parameters, or their average where there is one,
        and the model state, in one tree.
        """
        return join(self.params if self.ema is None else self.ema, self.model_state)


def join(params: Params, model_state: ModelState) -> Params:
    """Parameters and model state in one tree, as they are in the module."""
    if not model_state:
        return params
    return unflatten_dict(flatten_dict(params) | flatten_dict(model_state))


class FunctionalModel:
    """A task's module split into its static half and a pure tree of parameters."""

    def __init__(self, task: Task) -> None:
        """Traces the module's construction; nothing is allocated."""
        self.task = task
        abstract = nnx.eval_shape(lambda: task.make_model(jax.random.key(0)))
        self._graphdef, state = nnx.split(abstract)
        self._structure = jax.tree.structure(state)
        variables = jax.tree_util.tree_flatten_with_path(
            state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )[0]
        self.logical_axes: dict[str, LogicalAxes | None] = {
            leaf_path(path): variable.get_metadata().get("axes") for path, variable in variables
        }
        self._model_state = {
            leaf_path(path)
            for path, variable in variables
            if isinstance(variable, nn_params.ModelState)
        }
        paths = [leaf_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        pure_tree = nnx.to_pure_dict(state)
        pure = jax.tree_util.tree_flatten_with_path(pure_tree)[0]
        assert paths == [leaf_path(p) for p, _ in pure], "module and pure tree differ in order"
        self.abstract_params, self.abstract_model_state = self.split(pure_tree)

    def split(self, tree: Params) -> tuple[Params, ModelState]:
        """Undoes `join`."""
        if not self._model_state:
            return tree, {}
        flat = flatten_dict(tree)
        state = {p: leaf for p, leaf in flat.items() if "/".join(map(str, p)) in self._model_state}
        params = {p: leaf for p, leaf in flat.items() if p not in state}
        return unflatten_dict(params), unflatten_dict(state)

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Initial parameters and model state, a function of the key alone."""
        return self.split(nnx.to_pure_dict(nnx.split(self.task.make_model(key))[1]))

    def merge(self, params: Params) -> Any:
        """The module with these parameters; with a model state, `join` them first."""
        state = jax.tree.unflatten(self._structure, jax.tree.leaves(params))
        return nnx.merge(self._graphdef, state)
