"""Memory for blocks, reused as soon as nobody holds the block any more.

The operating system clears fresh memory of this size first. That takes a tenth of a sample's time.
"""

import math
import weakref

import numpy as np


class Memory:
    """Lends uint8 arrays, and gets their memory back when they are gone.

    An array is gone when the array itself and everything made from it without a copy are gone: slices, Arrow
    tables, tensors. All of these keep the array's `_Loan` alive, and the end of the loan returns the memory.
    So memory that anybody can still read is never lent again. An array may be kept: that costs fresh memory,
    nothing else.
    """

    def __init__(self):
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Lends an array of this shape, uint8. It is not cleared: it may hold an earlier user's bytes."""
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
