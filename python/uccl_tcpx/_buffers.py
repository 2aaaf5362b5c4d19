"""Where the bytes of an object lie: addresses, buffers, numpy arrays, torch tensors, and arrays in GPU memory. Imports none of their
packages."""

from __future__ import annotations

import ctypes as c
import operator
from typing import Any, NamedTuple, Optional

from .errors import invalid


class Memory(NamedTuple):
    """A contiguous range of bytes. `owner` keeps it from being freed or moved; None for a plain address."""

    addr: int
    size: int
    owner: Any
    readonly: bool


class _PyBuffer(c.Structure):
    _fields_ = [
        ("buf", c.c_void_p),
        ("obj", c.c_void_p),
        ("len", c.c_ssize_t),
        ("itemsize", c.c_ssize_t),
        ("readonly", c.c_int),
        ("ndim", c.c_int),
        ("format", c.c_char_p),
        ("shape", c.c_void_p),
        ("strides", c.c_void_p),
        ("suboffsets", c.c_void_p),
        ("internal", c.c_void_p),
    ]


_get = c.PYFUNCTYPE(c.c_int, c.py_object, c.POINTER(_PyBuffer), c.c_int)(("PyObject_GetBuffer", c.pythonapi))
_release = c.PYFUNCTYPE(None, c.POINTER(_PyBuffer))(("PyBuffer_Release", c.pythonapi))


def _of_view(view: memoryview) -> Memory:
    if not view.c_contiguous:
        raise invalid("the buffer is not contiguous")
    raw = _PyBuffer()
    _get(view, c.byref(raw), 0)
    address = raw.buf or 0
    _release(c.byref(raw))
    # While the view exists, its exporter neither frees nor moves the bytes.
    return Memory(address, view.nbytes, view, view.readonly)


def _of_tensor(tensor: Any) -> Memory:
    if not tensor.is_contiguous():
        raise invalid("the tensor is not contiguous")
    return Memory(int(tensor.data_ptr()), int(tensor.numel()) * int(tensor.element_size()), tensor, False)


def _of_gpu_array(array: Any) -> Memory:
    """See https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""
    interface = array.__cuda_array_interface__
    address, readonly = interface["data"]
    size = int(interface["typestr"][2:])
    if interface.get("strides") is not None:
        expected = size
        for length, stride in zip(reversed(interface["shape"]), reversed(interface["strides"])):
            if stride != expected and length > 1:
                raise invalid("the array is not contiguous")
            expected *= length
    for length in interface["shape"]:
        size *= length
    return Memory(int(address), size, array, bool(readonly))


def _of_object(buffer: Any) -> Optional[Memory]:
    kind = type(buffer)
    if hasattr(kind, "data_ptr") and hasattr(kind, "element_size"):
        return _of_tensor(buffer)
    if hasattr(buffer, "__cuda_array_interface__"):
        return _of_gpu_array(buffer)
    try:
        return _of_view(memoryview(buffer))
    except TypeError:
        return None


def memory_of(buffer: Any, size: Optional[int] = None) -> Memory:
    """The memory of a buffer, its first `size` bytes if that is given; or `size` bytes at an address."""
    memory = None if isinstance(buffer, int) else _of_object(buffer)
    size = size if size is None else operator.index(size)
    if memory is None:
        try:
            address = operator.index(buffer)
        except TypeError:
            raise invalid(f"{type(buffer).__name__} is neither an address nor a buffer, an array or a tensor") from None
        if size is None:
            raise invalid("an address needs a size")
        memory = Memory(address, size, None, False)
    elif size is not None:
        if size > memory.size:
            raise invalid(f"{size} bytes of a buffer of {memory.size}")
        memory = memory._replace(size=size)
    if memory.size < 0 or not 0 <= memory.addr < 1 << 64 or memory.addr + memory.size > 1 << 64:
        raise invalid(f"{memory.size} bytes at {memory.addr:#x}")
    return memory
