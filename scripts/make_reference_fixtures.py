"""Makes tests/fixtures/reference: tiny random models of `transformers`, and what they compute.

    pip install 'spmd-train[reference]'
    python scripts/make_reference_fixtures.py [--out=tests/fixtures/reference]

Each family gets a Hugging Face checkpoint directory with random weights (a standard deviation of
0.2, norm scales away from 1, biases away from 0, so that a mistake shows) and, of one batch,
`expected.safetensors`:

    ids [B, T]         a batch of token ids
    logits [B, T, V]   float32
    loss []            transformers' own: mean cross-entropy of ids[:, 1:], nats
    grad/NAME          of that loss, for every parameter

`llama/training.safetensors` is a plain eager loop, transformers' model and `torch.optim.AdamW`:

    ids [20, B, T], loss [20], grad_norm [20] before clipping, final/NAME   weights after 20 steps

Everything is float32 and a function of fixed seeds.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
# With head_dim 8 and theta 10000 the wavelengths are 6.3, 63, 628 and 6283 positions: one is kept,
# one blended, two divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
BATCH, LENGTH, NUM_STEPS = 4, 33, 20
NOT_DECAYED = re.compile("norm|bias|embed_tokens")


def make_models() -> dict[str, PreTrainedModel]:
    """One randomly initialized model per family."""
    models = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(**SIZES | {"num_hidden_layers": 3}, rope_parameters=LLAMA3_ROPE)
        ),
        "llama_tied": lambda: LlamaForCausalLM(
            LlamaConfig(
                **SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
            )
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=96,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**SIZES | {"intermediate_size": 20}, num_local_experts=4)
        ),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES,
                head_dim=16,
                moe_intermediate_size=12,
                num_experts=8,
                num_experts_per_tok=3,
                norm_topk_prob=True,
            )
        ),
    }
    return {name: _randomized(make(), seed) for seed, (name, make) in enumerate(models.items())}


def _randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_scale = weight.ndim == 1 and name.endswith("weight")
            weight.normal_(1.0 if is_scale else 0.0, 0.2, generator=generator)
    model.set_attn_implementation("eager")
    return model.float().eval()


def make_ids(*shape: int, seed: int) -> torch.Tensor:
    """Token ids with something to learn: each follows from the one before, four times in five."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(SIZES["vocab_size"], shape, generator=generator)
    follows = torch.rand(shape, generator=generator) < 0.8
    ids = noise.clone()
    for t in range(1, shape[-1]):
        next_ids = (5 * ids[..., t - 1] + 3) % SIZES["vocab_size"]
        ids[..., t] = torch.where(follows[..., t], next_ids, noise[..., t])
    return ids


def expected(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients of one batch."""
    ids = make_ids(BATCH, LENGTH, seed=100)
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return {
        "ids": ids.int(),
        "logits": output.logits.detach(),
        "loss": output.loss.detach(),
        **{f"grad/{name}": grad for name, grad in _saved_grads(model).items()},
    }


def _saved_grads(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients as they would be saved: in memory transformers fuses the experts of a layer."""
    copy = deepcopy(model)
    with torch.no_grad():
        for weight, of in zip(copy.parameters(), model.parameters(), strict=True):
            weight.copy_(of.grad)
    with tempfile.TemporaryDirectory() as folder:
        copy.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def train(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Twenty steps of AdamW; changes the model."""
    ids = make_ids(NUM_STEPS, BATCH, LENGTH, seed=200)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if NOT_DECAYED.search(n) is None], "weight_decay": 0.1},
        {"params": [p for n, p in named if NOT_DECAYED.search(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
    final = {f"final/{name}": p.detach().clone() for name, p in named}
    return {
        "ids": ids.int(),
        "loss": torch.stack(losses),
        "grad_norm": torch.stack(norms),
        **final,
    }


def make(out: Path) -> None:
    """Writes every fixture below `out`."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for name, model in make_models().items():
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        save_file(expected(model), out / name / "expected.safetensors")
        if name == "llama":
            save_file(train(model), out / name / "training.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent.parent / "tests" / "fixtures" / "reference"
    parser.add_argument("--out", type=Path, default=default)
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
