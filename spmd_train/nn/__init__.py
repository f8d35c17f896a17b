"""Layers that know logical axes only.

How a platform lowers a projection lives in `projection`, an attention in `attention`, and nowhere
else. Dims: B batch, T query tokens, S key tokens, D embed, H query heads, G key/value heads,
K head dim, F mlp, V vocab.
"""
