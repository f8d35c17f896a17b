"""For one GPU or a Colab: a byte-level model of 100 million parameters (14 layers, width 768).

Trains on the standard library as it stands. On text of your own: `--config.data.source=text
--config.data.path='/data/**/*.txt'`, and for a tokenizer `--config.data.tokenizer=FILE
--config.model.vocab_size=N`. Out of memory: raise `--config.train.grad_accumulation`, which
changes nothing that a step learns.
"""

from ml_collections import ConfigDict

from spmd_train.config import ConfigError, default_config


def get_config(arg: str = "") -> ConfigDict:
    """The config; takes no argument."""
    if arg:
        raise ConfigError(f"lm_100m.py:{arg}: this config takes no argument")
    config = default_config()

    config.model.num_layers = 14
    config.model.embed_dim = 768
    config.model.num_heads = 12
    config.model.mlp_dim = 2048
    config.model.vocab_size = 256
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "projections"

    config.data.source = "stdlib"
    config.data.tokenizer = "bytes"
    config.data.sequence_length = 1024

    config.optimizer.learning_rate = 6e-4
    config.optimizer.schedule.warmup_steps = 200

    config.train.num_steps = 5000
    config.train.global_batch_size = 64
    config.train.grad_accumulation = 4
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.sample.prompt = "def "
    return config
