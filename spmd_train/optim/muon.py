"""Muon for the matrices of stacked layers, Adam for the rest.

Muon (Jordan, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
orthogonal matrix, approximately, by Newton-Schulz iterations. optax does that; what is decided here
is which dims of a stacked parameter make a matrix.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from spmd_train.config import ConfigError
from spmd_train.parallel.rules import LogicalAxes

BATCH_AXES = ("layers", "expert")
HEAD_AXES = ("heads", "kv_heads", "head_dim")


def muon_dims(axes: LogicalAxes | None) -> MuonDimensionNumbers | None:
    """Which dims of a parameter are rows and which are columns of the matrices in it.

    Each layer (and expert, and pipeline stage) has a matrix of its own. Heads and head_dim are one
    dim of it: the query kernel [layers, embed, heads, head_dim] is, per layer, the matrix
    [embed, heads * head_dim] that the layer multiplies by.

    Args:
        axes: logical axes of the parameter.

    Returns:
        The dims, or None if the parameter is not Muon's: it belongs to no layer (embedding, head,
        positions) or is no matrix (norm scales, biases).
    """
    if axes is None or "layers" not in axes:
        return None
    groups: dict[str | int, list[int]] = {}
    for dim, name in enumerate(axes):
        if name not in BATCH_AXES:
            groups.setdefault("heads" if name in HEAD_AXES else dim, []).append(dim)
    if len(groups) != 2:
        return None
    rows, columns = groups.values()
    return MuonDimensionNumbers(reduction_axis=tuple(rows), output_axis=tuple(columns))


def scale_by_muon_or_adam(
    *, b1: float, b2: float, epsilon: float, params: Any, axes: Any
) -> optax.GradientTransformation:
    """Muon where `muon_dims` finds matrices, Adam elsewhere.

    Muon's updates are multiplied by `0.2 * sqrt(max(rows, columns))` (Liu et al.,
    arXiv:2502.16982), which gives them the root mean square of a typical AdamW update: AdamW's
    learning rate and weight decay carry over.

    Args:
        b1: momentum of both; Muon's is Nesterov's.
        b2: second-moment decay of Adam.
        epsilon: added to Adam's denominator and to the norm that Muon divides by.
        params: nested dicts; only the structure is used.
        axes: the same structure; each leaf logical axes or None.

    Returns:
        The transformation, without learning rate or decay.

    Raises:
        ConfigError: no parameter is Muon's.
    """
    dims = jax.tree.map(lambda _, names: muon_dims(names) or optax.MaskedNode(), params, axes)
    labels = jax.tree.map(lambda _, names: "muon" if muon_dims(names) else "adam", params, axes)
    if "muon" not in jax.tree.leaves(labels):
        raise ConfigError(
            "optimizer.name = 'muon': no parameter is a matrix of a layer (logical axes 'layers' "
            "and two more); use adamw"
        )

    def match_adam_rms(update: jax.Array, dim_numbers: MuonDimensionNumbers) -> jax.Array:
        sides = (dim_numbers.reduction_axis, dim_numbers.output_axis)
        longest = max(np.prod(np.take(update.shape, side)) for side in sides)
        return 0.2 * float(longest) ** 0.5 * update

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=b1, eps=epsilon, weight_dimension_numbers=dims),
        optax.stateless(lambda updates, _: jax.tree.map(match_adam_rms, updates, dims)),
    )
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)
    return optax.partition({"muon": muon, "adam": adam}, labels)
