"""Whole networks: Flax NNX modules that name logical axes and hold no mesh."""
