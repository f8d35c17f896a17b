"""For a pod: the shape of Mixtral 8x7B (arXiv:2401.04088), 46,702,792,704 parameters.

A token takes 2 of the 8 experts of a layer: 12,879,925,248 of the parameters. Set `data.path` to
your text and `data.tokenizer` to its tokenizer; everything that needs no data (`spmd-train inspect
shardings`, ...) works as it stands, as does `spmd-train convert import`. The experts lie on
`mesh.expert`, which must divide 8.
"""

from ml_collections import ConfigDict

from spmd_train.config import default_config


def get_config() -> ConfigDict:
    """The config."""
    config = default_config()

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8

    config.model.num_layers = 32
    config.model.embed_dim = 4096
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.mlp_dim = 14336
    config.model.vocab_size = 32000
    config.model.norm_epsilon = 1e-5
    config.model.rope.theta = 1000000.0
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.loss.chunk_tokens = 512

    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.load_balancing_loss = 0.02

    config.data.source = "jsonl"
    config.data.path = "/path/to/text/**/*.jsonl"
    config.data.tokenizer = "/path/to/mixtral/tokenizer.json"
    config.data.sequence_length = 8192

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule.warmup_steps = 2000

    config.train.num_steps = 100_000
    config.train.global_batch_size = 512
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    return config
