"""For a large pod: the shape of Llama 3 70B (arXiv:2407.21783), 70,553,706,496 parameters.

`llama3_70b.py:3.1` has Llama 3.1's rescaled rotary frequencies. What is not said here is as in
`llama3_8b.py`. Set `data.path` to your text and `data.tokenizer` to its tokenizer; everything that
needs no data (`spmd-train inspect shardings`, ...) works as it stands.
"""

import pathlib

from ml_collections import ConfigDict

from spmd_train.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    """The config of Llama 3 (""), or of Llama 3.1 ("3.1")."""
    config = load_config(f"{pathlib.Path(__file__).with_name('llama3_8b.py')}:{arg}")

    config.model.num_layers = 80
    config.model.embed_dim = 8192
    config.model.num_heads = 64
    config.model.mlp_dim = 28672

    config.optimizer.learning_rate = 1.5e-4
    return config
