"""The device mesh: seven named axes, sizes from the config, laid out along the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from spmd_train.config import MESH_AXES, ConfigError, MeshConfig
from spmd_train.config.keys import divisors


def mesh_sizes(config: MeshConfig, *, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes within a slice, with -1 resolved.

    Args:
        config: sizes asked for.
        num_devices: devices there are, over all slices.

    Returns:
        Axis name to size, in the order of `MESH_AXES`. Times `dcn_sizes` they fill the devices.

    Raises:
        ConfigError: the sizes do not multiply to `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    slices = math.prod(dcn_sizes(config).values())
    fixed = slices * math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
    if slices > 1:
        asked = f"{asked}, times {slices} slices" if asked else f"{slices} slices"
    if free:
        if num_devices % fixed:
            raise ConfigError(
                f"mesh.{free[0]}: -1 cannot be resolved: the other axes ({asked}) take {fixed} "
                f"devices, which does not divide the {num_devices} there are; the nearest numbers "
                f"that do are {_divisors_near(fixed, num_devices)}"
            )
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ConfigError(
            f"mesh: {asked or 'every axis 1'} takes {fixed} devices, but there are {num_devices}; "
            "set one axis to -1 to give it the rest"
        )
    return sizes


def _divisors_near(number: int, total: int) -> str:
    """The divisors of `total` next to a number that is none."""
    below = max((n for n in divisors(total) if n < number), default=None)
    above = min((n for n in divisors(total) if n > number), default=None)
    return " and ".join(str(n) for n in (below, above) if n is not None)


def dcn_sizes(config: MeshConfig) -> dict[str, int]:
    """Sizes of the mesh axes between slices or nodes, in the order of `MESH_AXES`."""
    return {axis: getattr(config.dcn, axis) for axis in MESH_AXES}


def slices_of(devices: Iterable[Any]) -> list[int]:
    """For each device its slice or node: between two of them lies the slow network."""
    devices = list(devices)
    slices = [int(getattr(device, "slice_index", 0) or 0) for device in devices]
    if len(set(slices)) > 1 or devices[0].platform == "tpu":
        return slices
    return [int(device.process_index) for device in devices]


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as a mesh of all seven axes.

    Within a slice JAX's `mesh_utils` places neighbours of an axis next to each other on the
    physical network; between slices only the axes of `mesh.dcn` cross.

    Args:
        config: sizes of the axes.
        devices: real, simulated, or of a topology without hardware; default: all there are.

    Returns:
        A mesh whose axis types are all Auto: XLA propagates shardings.

    Raises:
        ConfigError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(mesh_sizes(config, num_devices=len(devices)).values())
    between = tuple(dcn_sizes(config).values())
    if math.prod(between) > 1:
        sliced = len({getattr(d, "slice_index", 0) for d in devices}) > 1 or (
            devices[0].platform == "tpu"
        )
        _check_slices(config, devices, "slices" if sliced else "processes")
        try:
            grid = mesh_utils.create_hybrid_device_mesh(
                sizes,
                between,
                devices,
                process_is_granule=not sliced,
                allow_split_physical_axes=True,
            )
        except ValueError as error:
            wanted = " x ".join(f"{a}={n}" for a, n in dcn_sizes(config).items() if n > 1)
            raise ConfigError(
                f"mesh.dcn: {wanted} does not fit the {'slices' if sliced else 'processes'} "
                f"that these {len(devices)} devices form: {error}"
            ) from error
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _check_slices(config: MeshConfig, devices: Sequence[Any], kind: str) -> None:
    """Refuses a `mesh.dcn` for another number of slices (or processes) than the devices form."""
    numbers = slices_of(devices)
    wanted = {axis: size for axis, size in dcn_sizes(config).items() if size > 1}
    there, asked = len(set(numbers)), math.prod(wanted.values())
    if there != asked:
        keys = ", ".join(f"mesh.dcn.{axis} = {size}" for axis, size in wanted.items())
        cure = f"make their product {there}"
        if there == 1:
            cure = "leave them 1 and give mesh.AXIS the devices"
        raise ConfigError(
            f"{keys}: asks for {asked} {kind}, and these {len(devices)} devices form {there}; "
            f"{cure}"
        )


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Sizes of mesh axes as people read them: `data=2 x fsdp=4`, or `one device`."""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
