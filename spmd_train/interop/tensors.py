"""How one of our parameters lies in a Hugging Face tensor: dims merged and moved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Range = tuple[int, int]
Read = Callable[[tuple[slice, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of our parameters in a Hugging Face tensor.

    Attributes:
        path: of our parameter.
        name: Hugging Face's; `{layer}` is the layer's number, `{expert}` the expert's. For each our
            parameter has a first dim more, in this order.
        dims: our dims in order, a letter each: `"DHK"`.
        hf_dims: Hugging Face's: a word per dim, which our dims make up, the outermost first:
            `"HK D"`.
        part: where S is among `hf_dims`: which of the fused tensors this is.
        num_parts: how many are fused.
    """

    path: str
    name: str
    dims: str
    hf_dims: str
    part: int = 0
    num_parts: int = 1

    @property
    def num_stacked(self) -> int:
        """First dims of our parameter along which there is a tensor each."""
        return self.name.count("{")

    def name_of(self, index: Sequence[int]) -> str:
        """Name of the tensor at this index of those dims."""
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    def hf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the tensor, for our parameter of this shape."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[d] for d in word) for word in self.hf_dims.split())

    def read(self, shape: Sequence[int], ranges: Sequence[Range], read: Read) -> np.ndarray:
        """Reads a part of one tensor of our parameter.

        Args:
            shape: of our parameter.
            ranges: start and stop along each of `dims`.
            read: gives a slice of the tensor.

        Returns:
            The part, dims as ours.
        """
        sizes = self._sizes(shape)
        wanted = {**dict(zip(self.dims, ranges, strict=True)), "S": (self.part, self.part + 1)}
        # Of a merged dim only the outermost is sliced in the file: that is one run of it.
        words = self.hf_dims.split()
        inner = [math.prod(sizes[d] for d in word[1:]) for word in words]
        block = read(
            tuple(
                slice(wanted[word[0]][0] * n, wanted[word[0]][1] * n)
                for word, n in zip(words, inner, strict=True)
            )
        )
        outer = {word[0]: wanted[word[0]][1] - wanted[word[0]][0] for word in words}
        letters = "".join(words)
        block = block.reshape([outer.get(d, sizes[d]) for d in letters])
        block = block[tuple(slice(None) if d in outer else slice(*wanted[d]) for d in letters)]
        return _moved(block, letters, self.dims)

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor made of its part of our parameter, or of all those that are fused in it."""
        letters = "".join(self.hf_dims.split())
        stacked = parts[0][None] if self.num_parts == 1 else np.stack(parts)
        moved = _moved(stacked, "S" + self.dims, letters)
        return moved.reshape(self.hf_shape(parts[0].shape))

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        ours = shape[len(shape) - len(self.dims) :]
        return {**dict(zip(self.dims, ours, strict=True)), "S": self.num_parts}


def _moved(array: np.ndarray, letters: str, wanted: str) -> np.ndarray:
    """Reorders dims; those that are not wanted have size 1 and are dropped."""
    dropped = [i for i, d in enumerate(letters) if d not in wanted]
    kept = [d for d in letters if d in wanted]
    return array.squeeze(tuple(dropped)).transpose([kept.index(d) for d in wanted])
