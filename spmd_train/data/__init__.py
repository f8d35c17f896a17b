"""Documents on disk to packed batches: sources, tokenizers, the token cache, the loader."""

from spmd_train.data.dataset import Dataset as Dataset
from spmd_train.data.dataset import open_dataset as open_dataset
from spmd_train.data.tokenizers import Tokenizer as Tokenizer
from spmd_train.data.tokenizers import load_tokenizer as load_tokenizer
from spmd_train.data.windows import Batch as Batch
