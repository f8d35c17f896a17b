"""For a pod: the shape of Llama 2 7B (Touvron et al., arXiv:2307.09288), 6,738,415,616 parameters.

Set `data.path` to your text and `data.tokenizer` to its tokenizer; everything that needs no data
(`spmd-train inspect shardings`, ...) works as it stands.
"""

from ml_collections import ConfigDict

from spmd_train.config import ConfigError, default_config


def get_config(arg: str = "") -> ConfigDict:
    """The config; takes no argument."""
    if arg:
        raise ConfigError(f"llama2_7b.py:{arg}: this config takes no argument")
    config = default_config()

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.model.num_layers = 32
    config.model.embed_dim = 4096
    config.model.num_heads = 32
    config.model.mlp_dim = 11008
    config.model.vocab_size = 32000
    config.model.norm_epsilon = 1e-5
    config.model.rope.theta = 10000.0
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.loss.chunk_tokens = 512

    config.data.source = "jsonl"
    config.data.path = "/path/to/text/**/*.jsonl"
    config.data.tokenizer = "/path/to/llama2/tokenizer.model"
    config.data.sequence_length = 4096

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule.warmup_steps = 2000

    config.train.num_steps = 100_000
    config.train.global_batch_size = 1024
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    return config
