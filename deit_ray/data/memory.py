"""Memory for blocks, used again once nobody holds it.

The system clears fresh memory of this size first, which takes a tenth of the time of a sample.
"""

import math
import weakref

import numpy as np


class Memory:
    """Lends uint8 arrays, and takes their memory back when they are gone.

    An array is gone when the array itself and everything made from it without a copy are gone: slices, Arrow
    tables, tensors. All of these keep the array's `_Loan` alive, and the end of the loan returns the memory.
    So memory that anybody can still read is never lent again, and an array that is kept costs fresh memory,
    nothing else.
    """

    def __init__(self):
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape; its bytes are those of an earlier user."""
        memory = self._free_of(math.prod(shape))
        loan = _Loan(memory, shape)
        weakref.finalize(loan, self._free.append, memory).atexit = False
        return np.asarray(loan)

    def _free_of(self, size: int) -> np.ndarray:
        for place, memory in enumerate(self._free):
            if len(memory) >= size:
                return self._free.pop(place)
        return np.empty(size, np.uint8)


class _Loan:
    """Owner of an array's memory in NumPy's eyes.

    Every array keeps a reference to the object that it was made of by `__array_interface__`
    (https://numpy.org/doc/stable/reference/arrays.interface.html).
    """

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...]):
        self.__array_interface__ = memory.__array_interface__ | {"shape": shape}
        self.memory = memory
