"""Checkpoints: Orbax writes them (`checkpointer`), a manifest of hashes commits them (`steps`)."""

from spmd_train.checkpoint.checkpointer import Checkpointer as Checkpointer
