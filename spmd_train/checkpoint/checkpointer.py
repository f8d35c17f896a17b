"""Saving and restoring: the one file that knows Orbax.

`WORKDIR/checkpoints/STEP/` holds `state` (the train state, as Orbax writes any tree) and `meta`
(JSON: the config, the data position, what made it). Both can be read without this project.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from spmd_train import cluster
from spmd_train.checkpoint import steps as step_folders
from spmd_train.config import CheckpointConfig, ConfigError

log = logging.getLogger(__name__)

_PART_BYTES = 4 << 20


class Checkpointer:
    """Saves and restores train states of one workdir.

    Orbax's own CheckpointManager is not used: it deletes old steps before the new one's manifest
    is written, and asks JAX's preemption service from a second thread about steps gone by.

    Attributes:
        directory: WORKDIR/checkpoints.
        committed: the last step that this process knows to be whole on disk; -1: none. After a
            save only process 0 knows.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, *, read_only: bool = False) -> None:
        """Opens `workdir/checkpoints`; unless `read_only` it is made, and rid of leavings."""
        self.directory = Path(workdir).absolute() / "checkpoints"
        self.committed = -1
        self._config = config
        self._read_only = read_only
        self._leader = cluster.is_leader()
        self._failures = 0
        self._saving: _Save | None = None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                # Weights hardly compress, and zstd takes five times the CPU of writing them.
                state=ocp.PyTreeCheckpointHandler(
                    use_compression=False, type_handler_registry=_array_handlers()
                ),
                meta=ocp.JsonCheckpointHandler(),
            )
        )
        if self._leader and not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            if gone := step_folders.remove_leavings(self.directory):
                log.warning("%s: removed unfinished saves: %s", self.directory, ", ".join(gone))

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first."""
        return step_folders.committed_steps(self.directory)

    def faults(self, step: int) -> list[str]:
        """What is wrong with a step, looked at as `checkpoint.verify` says; none: it is good."""
        return step_folders.faults(self.directory, step, how=self._config.verify)

    def newest_good(self, *, before: int | None = None) -> int | None:
        """The newest step that is whole; newer ones are put aside (`read_only`: passed over).

        Process 0 looks; the others are told.

        Args:
            before: only steps before this one; None: any. Needs `read_only`.
        """
        assert before is None or self._read_only
        found = -1
        if self._leader and not self._read_only:
            good = step_folders.newest_good(self.directory, how=self._config.verify)
            found = -1 if good is None else good
        elif self._leader:
            for step in reversed([s for s in self.steps() if before is None or s < before]):
                if not (told := self.faults(step)):
                    found = step
                    break
                log.warning("checkpoint %d is bad, trying an older one: %s", step, "; ".join(told))
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        self.committed = found
        return None if found < 0 else found

    def damaged(self, *, before: int | None = None) -> list[str]:
        """Folders of steps (before one) that were whole once and have been put aside."""
        names = step_folders.damaged_steps(self.directory)
        return [n for n in names if before is None or int(n.partition(".")[0]) < before]

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves a state; asynchronous: device memory is copied now, files are written later.

        The step counts once all of its files are written and their hashes with them. A save that
        fails is warned of and its leavings removed.

        Args:
            step: optimizer steps done.
            state: tree of arrays.
            meta: JSON to keep beside it.

        Raises:
            OSError: `checkpoint.max_failures` saves have failed, one after the other.
        """
        self._finish()
        self._saving = _Save(self, step)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            meta=ocp.args.JsonSave(meta | {"made_by": cluster.code_facts()}),
        )
        self._saving.start(self._orbax, args)
        if not self._config.asynchronous:
            self._finish()

    def wait(self) -> None:
        """Waits until everything saved is on disk; all processes must call it.

        Raises:
            OSError: the last save failed.
        """
        try:
            self._finish()
        finally:
            # Process 0 still reads and hashes all that was written. Who leaves before it waits in
            # JAX's barrier, which takes all processes down after SPMD_TRAIN_SHUTDOWN_SECONDS.
            cluster.meet_again()
        if self._failures:
            raise OSError(f"{self.directory}: the last checkpoint could not be written, see above")

    def settle(self) -> None:
        """Waits for the save under way, whether it succeeds or not."""
        self._finish()

    def _finish(self) -> None:
        """Waits for the save under way, and counts it if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        error = saving.result()
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        limit = self._config.max_failures
        log.warning(
            "the checkpoint of step %d could not be written (%d of checkpoint.max_failures=%d in a "
            "row); training goes on: %s",
            saving.step,
            self._failures,
            limit,
            _first_line(error),
        )
        if self._leader:
            step_folders.remove_leavings(self.directory, step=saving.step)
        if self._failures >= limit:
            raise OSError(
                f"{self.directory}: {limit} checkpoints in a row could not be written"
            ) from error

    def _commit(self, step: int) -> None:
        if self._leader:
            step_folders.commit(self.directory, step)
            step_folders.prune(
                self.directory,
                keep_last=self._config.keep_last,
                keep_every=self._config.keep_every,
            )
            self.committed = step

    def close(self) -> None:
        """Waits for what is being written and lets go."""
        try:
            self._finish()
        finally:
            self._orbax.close()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON kept beside a state."""
        return dict(
            self._orbax.restore(
                self.directory / str(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )["meta"]
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
        path = self.directory / str(step)
        return self._orbax.restore(path, args=ocp.args.Composite(state=args))["state"]

    def _check_leaves(self, step: int, abstract_state: Any, *, partial: bool) -> None:
        metadata: Any = self._orbax.metadata(self.directory / str(step)).item_metadata
        saved = _leaves(metadata["state"].tree)
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


def _array_handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """Replicas write a part of an array each; within a process not of small ones.

    A part is a slice, and the slice a program to compile, for each shape.
    """
    least = _PART_BYTES if jax.process_count() == 1 else None
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=least)
    numpy_arrays = (np.ndarray, ocp.type_handlers.NumpyHandler())
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler), numpy_arrays)


class _Save:
    """One save under way: Orbax writes, then a thread of ours hashes and commits."""

    def __init__(self, checkpointer: Checkpointer, step: int) -> None:
        self.step = step
        self._checkpointer = checkpointer
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, orbax: ocp.AsyncCheckpointer, args: Any) -> None:
        try:
            orbax.save(self._checkpointer.directory / str(self.step), args=args)
        except (OSError, ValueError, RuntimeError) as error:
            self._error = error
            return
        self._thread = threading.Thread(target=self._end, args=(orbax,), name="commit")
        self._thread.start()

    def _end(self, orbax: ocp.AsyncCheckpointer) -> None:
        try:
            orbax.wait_until_finished()
            self._checkpointer._commit(self.step)
        except Exception as error:  # Whatever Orbax, TensorStore and the disk raise; told later.
            self._error = error

    def result(self) -> Exception | None:
        if self._thread is not None:
            self._thread.join()
        return self._error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


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
