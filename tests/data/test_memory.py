"""Memory is reused once nobody holds it, and never before."""

import gc
import weakref

import numpy as np
import pyarrow as pa
import pytest
import torch

from deit_ray.data.memory import Memory

HOLDERS = {
    "the array": lambda array: array,
    "a slice": lambda array: array[1:],
    "a slice of a slice, turned": lambda array: array[1:][:, 2:].T,
    "an Arrow table": lambda array: pa.table({"images": arrow_row(array)}),
    "an Arrow buffer": lambda array: pa.py_buffer(array).slice(5, 3),
    "a tensor": lambda array: torch.from_numpy(array).permute(1, 0)[2:],
    "a memoryview": lambda array: memoryview(array)[1:],
}
SHAPE = (40, 100)


def arrow_row(array: np.ndarray) -> pa.Array:
    """A column whose only row is the array's bytes, not copied."""
    ends = pa.py_buffer(np.array([0, array.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, ends, pa.py_buffer(array)])


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_array_that_somebody_holds_is_not_lent_again(holder):
    memory = Memory()
    array = memory.take(SHAPE)
    array[:] = 1
    first = address(array)
    held = HOLDERS[holder](array)
    before = bytes_of(held)
    del array
    gc.collect()
    others = [memory.take(SHAPE) for _ in range(3)]
    for other in others:
        other[:] = 2
    assert bytes_of(held) == before
    assert len({first, *map(address, others)}) == 4
    del held
    assert address(memory.take(SHAPE)) == first


def bytes_of(held) -> bytes:
    if isinstance(held, pa.Table):
        return held["images"][0].as_py()
    return np.array(held).tobytes()


def test_memory_is_used_again_for_arrays_that_fit():
    memory = Memory()
    first = address(memory.take((8, 10)))  # nobody keeps the array
    for shape in ((8, 10), (4, 10), (80,), (2, 5, 8)):
        array = memory.take(shape)
        assert (array.shape, array.dtype, address(array)) == (shape, np.uint8, first)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        del array
    larger = memory.take((9, 10))
    assert address(larger) != first
    assert address(memory.take((8, 10))) == first


def test_an_array_outlives_the_memory_that_lent_it_and_leaves_nothing_behind():
    memory = Memory()
    array = memory.take(SHAPE)
    array[:] = 7
    owned = weakref.ref(array.base.memory)
    del memory
    gc.collect()
    assert (array == 7).all()
    del array
    gc.collect()
    assert owned() is None
