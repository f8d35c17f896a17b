"""Model FLOPs against XLA's own count and published sizes; chips; memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from spmd_train.config import ModelConfig, ObserveConfig
from spmd_train.observe import device_memory_bytes, device_peak_flops, mfu, model_flops_per_token
from spmd_train.parallel.chips import CHIPS, chip_of


def xla_flops_per_token(config: ModelConfig, length: int) -> float:
    """What XLA counts for forward and backward of the matmuls of a decoder, written out here."""
    d, h, v = config.embed_dim, config.num_heads, config.vocab_size
    k = config.num_kv_heads or h
    q = config.head_dim or d // h
    gated = config.mlp == "swiglu"
    shapes = {"q": (d, h, q), "k": (d, k, q), "v": (d, k, q), "o": (h, q, d)}
    shapes |= {"up": (d, config.mlp_dim), "down": (config.mlp_dim, d)}
    if gated:
        shapes["gate"] = (d, config.mlp_dim)

    def loss(x, layers, head):
        for w in layers:
            query = jnp.einsum("td,dhq->thq", x, w["q"])
            key = jnp.repeat(jnp.einsum("td,dkq->tkq", x, w["k"]), h // k, axis=1)
            value = jnp.repeat(jnp.einsum("td,dkq->tkq", x, w["v"]), h // k, axis=1)
            scores = jnp.einsum("thq,shq->hts", query, key)  # not causal: all of T x T
            x = jnp.einsum("hts,shq->thq", scores, value).reshape(length, h * q)
            x = x @ w["o"].reshape(h * q, d)
            up = x @ w["up"]
            x = ((x @ w["gate"]) * up if gated else up) @ w["down"]
        return jnp.sum((x @ head) ** 2)

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, "float32")

    layers = [{name: array(*s) for name, s in shapes.items()} for _ in range(config.num_layers)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradient.lower(array(length, d), layers, array(d, v)).compile()
    return compiled.cost_analysis()["flops"] / length


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 2}, {"mlp": "gelu"}, {"head_dim": 64}, {"num_layers": 3}],
    ids=str,
)
def test_observe_flops_are_what_xla_counts(changes):
    config = ModelConfig(
        **{"num_layers": 2, "embed_dim": 128, "num_heads": 4, "mlp_dim": 384, "vocab_size": 512}
        | changes
    )
    length = 256
    head_dim = config.head_dim or 32
    # Ours credits half of the attention matrix; XLA is made to compute the whole of it.
    skipped = 6 * config.num_layers * config.num_heads * head_dim * length
    ours = model_flops_per_token(config, sequence_length=length) + skipped
    assert ours == pytest.approx(xla_flops_per_token(config, length), rel=0.02)


def test_observe_flops_of_llama2_7b_follow_from_its_published_size():
    config = ModelConfig(
        num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=11008, vocab_size=32000
    )
    # 6,738,415,616 parameters (meta-llama/Llama-2-7b), less the embedding table and 65 norms.
    matmuls = 6_738_415_616 - 32000 * 4096 - 65 * 4096
    per_token = model_flops_per_token(config, sequence_length=4096)
    assert per_token == 6 * matmuls + 6 * 32 * 4096 * 4096
    tied = dataclasses.replace(config, tied_head=True)  # still multiplied by
    assert model_flops_per_token(tied, sequence_length=4096) == per_token


def test_observe_mfu_is_the_share_of_all_devices():
    # PaLM 540B, arXiv:2204.02311, section 4.1: 238.3K tokens/s on 6144 TPU v4 is 46.2%.
    config = ModelConfig(
        num_layers=118, embed_dim=18432, num_heads=48, num_kv_heads=1, head_dim=256,
        mlp_dim=4 * 18432, vocab_size=256_000,
    )  # fmt: skip
    per_token = model_flops_per_token(config, sequence_length=2048)
    share = mfu(
        238.3e3,
        flops_per_token=per_token,
        num_devices=6144,
        peak_flops=CHIPS["v4"].flops["bfloat16"],
    )
    assert share == pytest.approx(0.462, abs=0.01)
    assert mfu(None, flops_per_token=1.0, num_devices=1, peak_flops=1.0) is None
    assert mfu(1.0, flops_per_token=1.0, num_devices=1, peak_flops=None) is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("Tesla T4", "t4"), ("NVIDIA L4", "l4"),
    ],
)  # fmt: skip
def test_observe_chip_is_found_by_device_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_observe_chips_are_matched_by_their_whole_name():
    for kind in ("cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40S", "TPU v4 lite"):
        assert chip_of(kind) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_observe_chips_have_plausible_numbers_and_a_source():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert 10e9 < chip.hbm_bytes < 300e9
        # The arithmetic intensity of every one of them: FLOPs per byte of memory traffic.
        sixteen_bit = chip.flops.get("bfloat16", chip.flops.get("float16"))
        assert 50 < sixteen_bit / chip.hbm_bandwidth < 700
        assert chip.flops["float32"] <= sixteen_bit
        for dtype in ("int8", "float8"):
            assert chip.flops.get(dtype, sixteen_bit) / sixteen_bit == pytest.approx(1.5, abs=0.51)


def test_observe_peak_flops_is_the_configs_or_the_tables():
    def peak(kind, dtype="bfloat16", **config):
        return device_peak_flops(ObserveConfig(**config), device_kind=kind, dtype=dtype)

    assert peak("TPU v5 lite") == 197e12
    assert peak("TPU v5 lite", peak_flops=1e12) == 1e12
    assert peak(jax.devices()[0].device_kind) is None
    assert peak("cpu", peak_flops=2e11) == 2e11
    assert peak("Tesla T4") is None and peak("Tesla T4", "float16") == 65e12


def test_observe_memory_names_what_it_measured():
    (key,) = host = device_memory_bytes(jax.devices())
    assert key == "host_memory_bytes" and 2**26 < host[key] < 2**42

    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"bytes_in_use": 1, "peak_bytes_in_use": self.peak}

    assert device_memory_bytes([Device(5), Device(9)]) == {"device_memory_bytes": 9}


def test_observe_flops_of_a_window_are_of_the_keys_that_it_shows():
    length, window = 64, 16
    config = ModelConfig(num_layers=2, embed_dim=128, num_heads=4, sliding_window=window)
    whole = dataclasses.replace(config, sliding_window=0)
    saved = model_flops_per_token(whole, sequence_length=length) - model_flops_per_token(
        config, sequence_length=length
    )
    # Of T x T / 2 pairs those of a triangle of T - W a side are hidden; 12 FLOPs a pair and number.
    pairs = (length - window) ** 2 / 2
    assert saved == pytest.approx(12 * 2 * 128 * pairs / length)
