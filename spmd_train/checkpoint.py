"""Checkpoints: the one file that knows Orbax.

`WORKDIR/checkpoints/STEP/` holds `state` (the train state, as Orbax writes any tree) and `meta`
(JSON: the config, the data position, what made it). Both can be read without this project.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax
import jax
import orbax.checkpoint as ocp

from spmd_train.config import CheckpointConfig, ConfigError


class Checkpointer:
    """Saves and restores train states of one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig, *, read_only: bool = False) -> None:
        """Opens `workdir/checkpoints`, which is made unless `read_only`."""
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else config.keep_last,
            keep_period=config.keep_every or None,
            enable_async_checkpointing=config.asynchronous,
            create=not read_only,
            read_only=read_only,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves a state; asynchronous: device memory is copied now, files are written later.

        Args:
            step: optimizer steps done.
            state: tree of arrays.
            meta: JSON to keep beside it.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            meta=ocp.args.JsonSave(meta | {"made_by": _versions()}),
        )
        self._manager.save(step, args=args, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON kept beside a state."""
        return dict(
            self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]
        )

    def restore(self, step: int, abstract_state: Any, *, partial: bool = False) -> Any:
        """Restores a state straight into its planned sharding.

        Args:
            step: one of `steps()`.
            abstract_state: tree of ShapeDtypeStructs with shardings.
            partial: read only the leaves of `abstract_state`, which must all be there.

        Returns:
            The tree of arrays.

        Raises:
            ConfigError: leaves are missing, left over, or of another shape or dtype.
        """
        self._check_leaves(step, abstract_state, partial=partial)
        args = ocp.args.PyTreeRestore(
            item=abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            partial_restore=partial,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def _check_leaves(self, step: int, abstract_state: Any, *, partial: bool) -> None:
        saved = _leaves(self._manager.item_metadata(step)["state"].tree)
        wanted = _leaves(abstract_state)
        told = [f"{path}: the checkpoint has none" for path in wanted if path not in saved]
        if not partial:
            told += [f"{path}: the config has none" for path in saved if path not in wanted]
        told += [
            f"{path}: {saved[path]} in the checkpoint, {leaf} in the config"
            for path, leaf in wanted.items()
            if path in saved and saved[path] != leaf
        ]
        if told:
            shown = "\n  ".join(told[:20]) + (f"\n  and {len(told) - 20} more" * (len(told) > 20))
            raise ConfigError(
                f"the config does not fit the checkpoint of step {step} in {self.directory}:\n"
                f"  {shown}\nuse the config it was made with (config.json in the workdir), or "
                "another --workdir; nothing was loaded"
            )

    def wait(self) -> None:
        """Waits until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written and lets go."""
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def _leaves(tree: Any) -> dict[str, _Leaf]:
    """Path to shape and dtype; paths as Orbax stores them: keys, fields and indices alike."""
    flat = ocp.tree.to_flat_dict(ocp.tree.serialize_tree(tree, keep_empty_nodes=False))
    return {
        "/".join(map(str, path)): _Leaf(tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in flat.items()
        if hasattr(leaf, "shape") and leaf.dtype is not None
    }


def _versions() -> dict[str, str]:
    return {"jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__}
