"""The verbs of `spmd-train`: they read flags, build an experiment, and print."""
