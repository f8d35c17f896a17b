"""Logical axes to mesh axes, and the context in which modules name only logical ones.

A module says `constrain(x_BTD, ("batch", "residual_sequence", None))`; what that means on today's
mesh is decided here, from the rule table of the config. Outside `use_layout` it means nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.config import MESH_AXES, ConfigError, ContextConfig, ShardingConfig
from spmd_train.config.keys import nearest

DEFAULT_RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("replica", "data", "fsdp", "expert"),
    "sequence": ("context",),
    # The residual stream between blocks; ("context", "tensor") is Megatron's sequence parallelism.
    "residual_sequence": ("context",),
    # Parameters, and the activations they make.
    "embed": ("fsdp", "context"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "positions": (),
    "norm": (),
    "layers": ("pipeline",),
    "expert": ("expert",),
}

_TOKENS = ("batch", "sequence", "residual_sequence")
"""Logical axes of activations alone."""

LogicalAxes = tuple[str | None, ...]
RESIDUAL: LogicalAxes = ("batch", "residual_sequence", None)
"""Of what goes from block to block, [B, T, D]."""

KEPT_IN_FULL = re.compile(r"(^|/)router/")
"""Matrices that compute in their own dtype: which expert a token takes is decided in float32."""


def mesh_axes_of(text: Any, *, where: str) -> tuple[str, ...]:
    """Parses 'fsdp', 'context+tensor' or 'none' into mesh axes.

    Raises:
        ConfigError: a name is no mesh axis.
    """
    names = tuple(n.strip() for n in str(text).split("+"))
    if names in (("none",), ("",), ("None",)):
        return ()
    for name in names:
        if name not in MESH_AXES:
            raise ConfigError(
                f"{where}: {text!r} is no mesh axis; allowed: none, {', '.join(MESH_AXES)}, or "
                "several joined by +"
            )
    return names


def make_rules(config: ShardingConfig) -> dict[str, tuple[str, ...]]:
    """The default table with the config's own rules laid over it.

    Raises:
        ConfigError: a rule names an unknown logical or mesh axis.
    """
    rules = dict(DEFAULT_RULES)
    for name, axes in config.rules.items():
        if name not in rules:
            raise ConfigError(
                f"sharding.rules.{name}: no such logical axis; known: {', '.join(rules)}; "
                f"the nearest is {nearest(name, rules)}"
            )
        rules[name] = mesh_axes_of(axes, where=f"sharding.rules.{name}")
    return rules


def to_spec(dims: Sequence[tuple[str, ...]]) -> P:
    """A PartitionSpec from the mesh axes of each dim, shortest form."""
    entries: list[Any] = [None if not a else a[0] if len(a) == 1 else tuple(a) for a in dims]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def dims_of(spec: P, *, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes of each dim: `to_spec` undone."""
    dims: list[tuple[str, ...]] = [
        () if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec
    ]
    return dims + [()] * (ndim - len(dims))


def axes_of(spec: P) -> tuple[str, ...]:
    """All mesh axes of a spec."""
    return tuple(a for dim in dims_of(spec, ndim=len(spec)) for a in dim)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What modules' logical axes mean now: a mesh, a rule table, the planned specs.

    Sequences split over mesh axes are attended to and placed as `context` says.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    param_specs: Mapping[str, P] = dataclasses.field(default_factory=dict)
    context: ContextConfig = dataclasses.field(default_factory=ContextConfig)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of a logical axis that are larger than 1 on this mesh."""
        if name is None:
            return ()
        return tuple(a for a in self.rules[name] if self.mesh.shape[a] > 1)

    def size(self, axes: Sequence[str]) -> int:
        """Number of shards over these mesh axes."""
        size = 1
        for axis in axes:
            size *= self.mesh.shape[axis]
        return size

    def with_whole_params(self, over: Collection[str]) -> Layout:
        """The layout in which these mesh axes shard no parameter."""

        def without(axes: Sequence[str]) -> tuple[str, ...]:
            return tuple(a for a in axes if a not in over)

        rules = {n: axes if n in _TOKENS else without(axes) for n, axes in self.rules.items()}
        specs = {
            path: to_spec([without(dim) for dim in dims_of(spec, ndim=len(spec))])
            for path, spec in self.param_specs.items()
        }
        return dataclasses.replace(self, rules=rules, param_specs=specs)

    def with_copies(self, axis: str) -> Layout:
        """The layout in which `axis` shards no parameter: it copies the model and splits the batch.

        The mesh's own where `axis` has size 1.
        """
        if self.mesh.shape[axis] == 1:
            return self
        whole = self.with_whole_params((axis,))
        rules = {**whole.rules, "batch": (axis, *whole.rules["batch"])}
        return dataclasses.replace(whole, rules=rules)

    def constrain_params(self, params: Any) -> Any:
        """Lays a tree of parameters out as this layout says."""

        def one(path: Any, w: jax.Array) -> jax.Array:
            return _constrain(w, self.param_specs[leaf_path(path)], self.mesh)

        return jax.tree_util.tree_map_with_path(one, params)

    @property
    def gathered(self) -> frozenset[str]:
        """Mesh axes that hold shards of parameters but compute with whole ones (`unshard`)."""
        tokens = frozenset((*self.axes("batch"), *self.axes("sequence")))
        return tokens - frozenset(self.axes("expert"))

    @property
    def computes_whole(self) -> bool:
        """Whether devices compute with whole parameters, those of their stage."""
        axes = {a for spec in self.param_specs.values() for a in axes_of(spec)}
        return axes <= self.gathered | {"pipeline"}

    def activation_spec(self, shape: Sequence[int], axes: LogicalAxes) -> P:
        """The spec of an activation: axes in order, each mesh axis once, only dims that divide."""
        used: set[str] = set(manual_axes())
        dims: list[tuple[str, ...]] = []
        for size, name in zip(shape, axes, strict=True):
            mesh_axes = tuple(a for a in self.axes(name) if a not in used)
            if size % self.size(mesh_axes):
                mesh_axes = ()
            used.update(mesh_axes)
            dims.append(mesh_axes)
        return to_spec(dims)


_layout: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Gives logical axes their meaning while a function is traced."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current_device() -> Any:
    """A device of those that a program is being traced for."""
    layout = _layout.get()
    return layout.mesh.devices.flat[0] if layout else jax.devices()[0]


def current_platform() -> str:
    """The platform a program is being traced for: 'cpu', 'gpu' or 'tpu'."""
    platform: str = current_device().platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def current_layout() -> Layout | None:
    """The layout of `use_layout`, or None outside."""
    return _layout.get()


def manual_axes() -> tuple[str, ...]:
    """Mesh axes that a surrounding `shard_map` has taken into its own hands."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def vary(tree: Any) -> Any:
    """Marks arrays as differing over all manual axes, so that no gradient is summed unasked."""
    manual = manual_axes()

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in manual if a not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if manual else tree


def _constrain(x: jax.Array, spec: P, mesh: Mesh) -> jax.Array:
    manual = manual_axes()
    # Inside a shard_map the mesh of the context knows which axes are manual; outside, none is.
    sharding = spec if manual else NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(x, sharding)


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Shards an activation by its logical axes; the identity outside `use_layout`."""
    layout = _layout.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return _constrain(x, layout.activation_spec(x.shape, axes), layout.mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(w: jax.Array, whole: P, sharded: P, mesh: Mesh) -> jax.Array:
    return _constrain(w, whole, mesh)


def _gather_fwd(w: jax.Array, whole: P, sharded: P, mesh: Mesh) -> tuple[jax.Array, None]:
    return _constrain(w, whole, mesh), None


def _gather_bwd(whole: P, sharded: P, mesh: Mesh, _: None, g: jax.Array) -> tuple[jax.Array]:
    # Constraining the gradient to the shard (not to `whole`, which autodiff would do) lets XLA
    # reduce-scatter partial sums instead of all-reducing them.
    return (_constrain(g, sharded, mesh),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def compute_dtype(path: str, w: jax.Array, dtype: Any, *, stacked: bool = False) -> Any:
    """What a parameter is computed with in: vectors (norm scales) and routers keep their dtype."""
    return w.dtype if w.ndim - stacked < 2 or KEPT_IN_FULL.search(path) else dtype


def unshard(
    params: nnx.State,
    path: str,
    *,
    dtype: jnp.dtype,
    stacked: bool = False,
    keep: Collection[str] = (),
) -> nnx.State:
    """Makes parameters ready to compute with: cast, then gathered over the tokens' mesh axes.

    Matrices are cast to `dtype` first, so that half the bytes travel; vectors (norm scales) and
    routers keep theirs. Shards along tensor and expert axes stay where they are. The gradient
    takes the way back: one reduce-scatter (or all-reduce) per leaf.

    Args:
        params: parameters below `path`, or one layer's slice of them.
        path: where they are in the parameter tree, as in `blocks`.
        dtype: the compute dtype.
        stacked: they are one layer's slice of stacked parameters: the plan has one dim more.
        keep: mesh axes that are not gathered over.

    Returns:
        The same tree.
    """
    layout = _layout.get()

    def one(key_path: Any, variable: jax.Array) -> jax.Array:
        leaf = path + "/" + leaf_path(key_path)
        w = variable.astype(compute_dtype(leaf, variable, dtype))
        if layout is None or layout.mesh.size == 1:
            return w
        planned = dims_of(layout.param_specs[leaf], ndim=w.ndim + stacked)[stacked:]
        manual = set(manual_axes())
        gathered = (layout.gathered - set(keep)) | manual
        whole = [tuple(a for a in dim if a not in gathered) for dim in planned]
        sharded = [tuple(a for a in dim if a not in manual) for dim in planned]
        if whole == sharded:
            return w
        return _gather(w, to_spec(whole), to_spec(sharded), layout.mesh)

    return jax.tree_util.tree_map_with_path(one, params)


def keep_all_but_gathered() -> Callable[..., bool] | None:
    """A policy of `jax.checkpoint` that recomputes nothing but what `unshard` gathers.

    Without it the backward pass of a scan finds the gathered parameters of all layers in memory.

    Returns:
        The policy; None if no parameter is gathered.
    """
    layout = _layout.get()
    if layout is None or layout.gathered.isdisjoint(
        axis for spec in layout.param_specs.values() for axis in axes_of(spec)
    ):
        return None

    def keep(primitive: Any, *_: Any, **params: Any) -> bool:
        # Activations, which are constrained too, stay sharded by their batch.
        return primitive.name != "sharding_constraint" or not layout.gathered.isdisjoint(
            axes_of(params["sharding"].spec)
        )

    return keep


def mirrored(path: str, params: Collection[str]) -> str | None:
    """The parameter whose path is the tail of a leaf's; None if there is none."""
    parts = path.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((tail for tail in tails if tail in params), None)


def leaf_path(key_path: Sequence[Any]) -> str:
    """A leaf's path as users write it: `blocks/attention/query/kernel`."""
    keys = [k for k in key_path if not isinstance(k, jax.tree_util.GetAttrKey) or k.name != "value"]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
