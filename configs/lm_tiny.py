"""The default: a byte-level model of the standard library's own source, for a laptop's CPU.

0.9 million parameters (4 layers, width 128); needs no download. `make train` trains it in minutes.
"""

from ml_collections import ConfigDict

from spmd_train.config import ConfigError, default_config


def get_config(arg: str = "") -> ConfigDict:
    """The config; takes no argument."""
    if arg:
        raise ConfigError(f"lm_tiny.py:{arg}: this config takes no argument")
    config = default_config()

    config.model.num_layers = 4
    config.model.embed_dim = 128
    config.model.num_heads = 4
    config.model.mlp_dim = 352
    config.model.vocab_size = 256
    config.model.scan_unroll = 4  # A scan costs a CPU more than a larger program does.

    config.data.source = "stdlib"
    config.data.tokenizer = "bytes"
    config.data.sequence_length = 256

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.b1 = 0.95
    config.optimizer.schedule.warmup_steps = 30

    config.train.num_steps = 700
    config.train.global_batch_size = 8
    config.train.log_every = 20
    config.train.eval_every = 350
    config.train.checkpoint_every = 350
    config.sample.prompt = "def "
    return config
