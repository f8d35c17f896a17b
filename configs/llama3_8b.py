"""For a pod: the shape of Llama 3 8B (arXiv:2407.21783), 8,030,261,248 parameters.

`llama3_8b.py:3.1` has Llama 3.1's rescaled rotary frequencies. Set `data.path` to your text and
`data.tokenizer` to its tokenizer; everything that needs no data (`spmd-train inspect shardings`,
...) works as it stands.
"""

from ml_collections import ConfigDict

from spmd_train.config import ConfigError, default_config


def get_config(arg: str = "") -> ConfigDict:
    """The config of Llama 3 (""), or of Llama 3.1 ("3.1")."""
    if arg not in ("", "3.1"):
        raise ConfigError(f"llama3_8b.py:{arg}: the argument must be 3.1, or left out")
    config = default_config()

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.model.num_layers = 32
    config.model.embed_dim = 4096
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.mlp_dim = 14336
    config.model.vocab_size = 128256
    config.model.norm_epsilon = 1e-5
    config.model.rope.theta = 500000.0
    if arg == "3.1":
        config.model.rope.scaling = "llama3"
        config.model.rope.factor = 8.0
        config.model.rope.low_freq_factor = 1.0
        config.model.rope.high_freq_factor = 4.0
        config.model.rope.original_max_positions = 8192
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.loss.chunk_tokens = 512

    config.data.source = "jsonl"
    config.data.path = "/path/to/text/**/*.jsonl"
    config.data.tokenizer = "/path/to/llama3/tokenizer.json"
    config.data.sequence_length = 8192

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule.warmup_steps = 2000

    config.train.num_steps = 100_000
    config.train.global_batch_size = 512
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    return config
