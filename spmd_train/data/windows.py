"""Windows of a token stream as arrays that a step can eat.

Shape suffixes: B rows of a batch, T positions of a window.
"""

from __future__ import annotations

import numpy as np

from spmd_train.data.cache import TokenStream

Batch = dict[str, np.ndarray]
"""What a step reads, by name:

    tokens       int32 [B, T]    inputs
    targets      int32 [B, T]    the token after each input
    segment_ids  int32 [B, T]    1, 2, ... by document within a row; 0 on padding
    positions    int32 [B, T]    from 0 at the start of the row and of each document
    weights      float32 [B, T]  1; 0 on padding
    row          int32 [B]       which row of the global batch
    example_id   int64 [B]       which window of the data, the same in each epoch; -1 on padding
"""


def read_windows(stream: TokenStream, windows_B: np.ndarray, *, length: int) -> Batch:
    """Reads windows: window i predicts tokens i * length + 1 ... (i + 1) * length of the stream.

    Args:
      stream: the tokens.
      windows_B: which windows, int64 [B]. The last one of a stream may be padded.
      length: T.

    Returns:
      tokens, targets, segment_ids, positions and weights of a `Batch`.
    """
    first_B = windows_B * length
    at_BT = first_B[:, None] + np.arange(length)
    real_BT = at_BT < stream.num_tokens
    ids_BS = stream.tokens[np.minimum(first_B[:, None] + np.arange(length + 1), stream.num_tokens)]
    begins_BT = _document_starts(stream, first_B, length=length)
    begins_BT[:, 0] = True
    steps_T = np.arange(length, dtype=np.int32)
    start_BT = np.maximum.accumulate(np.where(begins_BT, steps_T, 0), axis=1)
    return {
        "tokens": np.where(real_BT, ids_BS[:, :-1], 0).astype(np.int32),
        "targets": np.where(real_BT, ids_BS[:, 1:], 0).astype(np.int32),
        "segment_ids": np.where(real_BT, np.cumsum(begins_BT, axis=1), 0).astype(np.int32),
        "positions": np.where(real_BT, steps_T - start_BT, 0).astype(np.int32),
        "weights": real_BT.astype(np.float32),
    }


def _document_starts(stream: TokenStream, first_B: np.ndarray, *, length: int) -> np.ndarray:
    """Where documents start in windows: bool [B, T]."""
    low_B = np.searchsorted(stream.starts, first_B, side="left")
    high_B = np.searchsorted(stream.starts, first_B + length, side="left")
    count_B = high_B - low_B
    rows = np.repeat(np.arange(len(first_B)), count_B)
    # The n-th start of a row is entry low + n of the stream's starts.
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    starts = stream.starts[low_B[rows] + nth]
    begins_BT = np.zeros((len(first_B), length), bool)
    begins_BT[rows, starts - first_B[rows]] = True
    return begins_BT
