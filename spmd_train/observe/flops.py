"""Model FLOPs and their utilization."""

from __future__ import annotations

from spmd_train.config import ModelConfig, MoEConfig, ObserveConfig
from spmd_train.models.sizes import layer_matmul_parameters
from spmd_train.parallel.chips import chip_of


def matmul_parameters(
    config: ModelConfig,
    moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
) -> int:
    """Weights that a token is multiplied by: all kernels and the head, tied or not.

    Of the experts, those that a token takes. Not counted: the embedding and position tables
    (looked up), norm scales, biases.
    """
    layers = config.num_layers * layer_matmul_parameters(config, moe)
    return layers + config.embed_dim * config.vocab_size


def model_flops_per_token(
    config: ModelConfig,
    moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
    *,
    sequence_length: int,
) -> float:
    """FLOPs that training a decoder on one token takes, forward and backward.

    `6 N + 6 L H Q T` with N matmul parameters (of experts, those that a token takes), L layers, H
    query heads, Q head_dim, T tokens. That is PaLM's count (Chowdhery et al., arXiv:2204.02311,
    appendix B: `6 N + 12 L H Q T`) with the attention term **halved**, because a causal token
    attends to (T + 1) / 2 positions on average: work that a kernel may skip is not credited.
    With `model.sliding_window` = W < T it attends to W (1 - W / 2T) on average. Recomputation
    (remat) is not counted, nor are embedding lookups, norms and softmax. Document boundaries in
    packed sequences are ignored.

    Args:
        config: the model's.
        moe: its experts.
        sequence_length: tokens in a sequence.

    Returns:
        FLOPs per token; a multiply and an add are two.
    """
    attention = 6 * config.num_layers * config.num_heads * config.resolved_head_dim
    # The keys that a window hides leave a triangle of the queries' pairs, of T - W a side.
    hidden = max(sequence_length - (config.sliding_window or sequence_length), 0)
    attention *= sequence_length - hidden**2 / sequence_length
    return float(6 * matmul_parameters(config, moe) + attention)


def device_peak_flops(config: ObserveConfig, *, device_kind: str, dtype: str) -> float | None:
    """The highest rate of one device: `observe.peak_flops`, else the table's, else None.

    Args:
        config: observe's.
        device_kind: `jax.Device.device_kind`.
        dtype: the model's compute dtype.

    Returns:
        FLOP/s; None for devices that are not in the table (CPUs) or lack that dtype.
    """
    if config.peak_flops:
        return config.peak_flops
    chip = chip_of(device_kind)
    return chip.flops.get(dtype) if chip else None


def mfu(
    tokens_per_second: float | None,
    *,
    flops_per_token: float,
    num_devices: int,
    peak_flops: float | None,
) -> float | None:
    """Model FLOPs utilization: the share of the peak rate that went into the model.

    PaLM, arXiv:2204.02311, section 4.1.

    Args:
        tokens_per_second: over all devices.
        flops_per_token: from `model_flops_per_token`.
        num_devices: devices of the mesh.
        peak_flops: of one device, FLOP/s.

    Returns:
        A fraction of 1; None if the speed or the peak is not known.
    """
    if tokens_per_second is None or peak_flops is None:
        return None
    return tokens_per_second * flops_per_token / (num_devices * peak_flops)
