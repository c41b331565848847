"""Arrays in: whatever the user holds becomes memory the compiled core can read, copied only where it must be.

numpy arrays, torch tensors on the CPU, DLPack objects and buffers are read in place; strided, unaligned and
foreign-endian memory is copied; CUDA tensors travel through a pinned host buffer.  Neither torch nor
ml_dtypes is imported here: a torch tensor can only exist where torch is already loaded, and the core sees
16-bit floats as their bits in a uint16 array beside a dtype name.
"""

from __future__ import annotations

import operator
import sys
from functools import cache
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from offramp.errors import InputError

FloatName: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]

_FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")
# To ask numpy for the name of a dtype takes as long as to calibrate a hundred samples.
_NAMES = {np.dtype(name): name for name in ("float16", "float32", "float64", "bool", "uint8")}


class Floats(NamedTuple):
    """Floating-point memory for the core: C-contiguous, aligned, native byte order."""

    values: NDArray[Any]
    """float32 or float64 values, or uint16 holding the bits of float16 or bfloat16."""
    dtype: FloatName
    """What the memory means."""


class Labels(NamedTuple):
    """Flags for the core."""

    values: NDArray[np.uint8]
    """C-contiguous."""
    dtype: np.dtype[Any]
    """The dtype they were given in, in native byte order."""


def as_floats(value: Any, argument: str) -> Floats:
    """Read floating-point values from any supported holder, in place where its memory allows.

    Parameters
    ----------
    value : array_like
        Any shape, not empty; float16, bfloat16, float32 or float64.  A Python list is read as numpy reads it,
        and whole numbers in it become float64.
    argument : str
        The name that errors start with.

    Raises
    ------
    TypeError
        Another dtype, or an object that is no array.
    ValueError
        Nothing in it, or nested lists of unequal lengths.
    """
    array, name = _memory(value, argument)
    if isinstance(value, (list, tuple)) and array.dtype.kind in "iu":
        array, name = array.astype(np.float64), "float64"
    _require_values(array, argument)
    if name not in _FLOAT_NAMES:
        raise TypeError(
            f"{argument} has dtype {name}: give float16, bfloat16, float32 or float64, for instance"
            f" {argument}.astype('float64')"
        )
    array = _readable(array)
    return Floats(array.view(np.uint16) if array.dtype.itemsize == 2 else array, cast("FloatName", name))


def tensor_row(value: Any) -> tuple[int, int, FloatName] | None:
    """Where a torch tensor of one row lies, its length and dtype, if it can be read as it is; ``None`` for all else.

    By its address: to view it as a numpy array takes two microseconds.
    """
    torch = sys.modules.get("torch")
    if torch is None or type(value) is not torch.Tensor:
        return None
    name = float_names(torch).get(value.dtype)
    if name is None or not value.is_cpu or value.layout is not torch.strided or value.ndim != 1:
        return None
    if value.requires_grad or value.is_neg() or not value.is_contiguous():
        return None
    address, count = value.data_ptr(), value.shape[0]
    return (address, count, name) if count and address % value.element_size() == 0 else None


@cache
def float_names(torch: Any) -> dict[Any, FloatName]:
    """Name torch's dtypes as the core does; torch is handed over, as it is not imported here."""
    return {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def as_labels(value: Any, argument: str) -> Labels:
    """Read flags that are 0 or 1, one byte each.

    bool and uint8 memory is used in place, its values left for the core to check.

    Raises
    ------
    TypeError
        Neither bool nor an integer dtype.
    ValueError
        Nothing in it, or an integer other than 0 and 1 (the first one and its position are named).
    """
    array, name = _memory(value, argument)
    _require_values(array, argument)
    if array.dtype.kind not in "biu" or name == "bfloat16":
        raise TypeError(f"{argument} has dtype {name}: give bool or integers 0 and 1")
    array = _readable(array)
    if array.dtype.itemsize == 1 and array.dtype.kind in "bu":
        return Labels(array.view(np.uint8), array.dtype)
    outside = (array != 0) & (array != 1)
    if outside.any():
        first = np.unravel_index(int(outside.argmax()), array.shape)
        raise InputError(not_a_label(argument, position(first), int(array[first])))
    return Labels(array.astype(np.uint8), array.dtype)


def as_targets(value: Any, argument: str) -> tuple[NDArray[np.float64], bool]:
    """Read numbers in [0, 1], such as accuracies to reach: float64 (E,), and whether a single one was given.

    Raises
    ------
    TypeError
        Not numbers.
    ValueError
        More than one dimension, none given, NaN, or outside [0, 1].
    """
    # What is given most often, read in a tenth of the time.
    if type(value) is float and 0.0 <= value <= 1.0:
        return np.array([value]), True
    array, name = _memory(value, argument)
    if name == "bfloat16":
        array = bfloat16_to_float32(array.view(np.uint16))
    if array.size and array.dtype.kind not in "iuf":
        raise TypeError(
            f"{argument} has dtype {name}: give a number from 0 to 1, or an array of such numbers"
        )
    if array.ndim > 1:
        raise InputError(f"{argument} has shape {array.shape}: give one number or an array of shape (E,)")
    _require_values(array, argument)
    targets = np.ascontiguousarray(array.reshape(-1), dtype=np.float64)
    outside = ~((targets >= 0.0) & (targets <= 1.0))
    if outside.any():
        first = int(outside.argmax())
        where = f"{argument}[{first}]" if array.ndim else "it"
        raise InputError(f"{argument} must lie in [0, 1], but {where} is {float(targets[first])!r}")
    return targets, array.ndim == 0


def as_thread_count(threads: SupportsIndex | None) -> int:
    """Read a thread count for the core, which takes 0 as "every core this process may use"."""
    if threads is None:
        return 0
    if type(threads) is not int and (isinstance(threads, bool) or not isinstance(threads, SupportsIndex)):
        raise TypeError(f"threads must be a whole number or None, not {type(threads).__name__}")
    count = operator.index(threads)
    if count < 1:
        raise InputError(f"threads must be at least 1, but it is {count}; None takes every core available")
    return min(count, 1024)


def require_same_shape(
    argument: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]
) -> None:
    """Refuse two arrays that should pair up but do not."""
    if shape != other_shape:
        raise InputError(f"{argument} has shape {shape} but {other} has shape {other_shape}: make them equal")


def restore_floats(memory: NDArray[Any], dtype: FloatName, given: Any) -> NDArray[Any]:
    """Turn the core's memory back into the dtype of what the user gave.

    numpy has no bfloat16 of its own: where the user's array does not bring one along, the values become
    float32.
    """
    if dtype == "float16":
        return memory.view(np.float16)
    if dtype != "bfloat16":
        return memory
    given_dtype = getattr(given, "dtype", None)
    if isinstance(given_dtype, np.dtype) and given_dtype.name == "bfloat16":
        return memory.view(given_dtype)
    return bfloat16_to_float32(memory)


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact values of bfloat16 numbers given as their bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def position(index: tuple[Any, ...]) -> str:
    """Write an index as Python does: ``[3]``, ``[1, 3]``."""
    return f"[{', '.join(str(int(i)) for i in index)}]"


def not_a_label(argument: str, where: str, value: int) -> str:
    """Describe a flag that is neither 0 nor 1; the core words it the same."""
    return f"{argument} must hold only 0 and 1, but {argument}{where} is {value}"


def _require_values(array: NDArray[Any], argument: str) -> None:
    if array.size == 0:
        raise InputError(f"{argument} is empty: give at least one value")


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """Make memory aligned, C-contiguous and of native byte order; no copy when it is so already."""
    flags = array.flags
    # np.require takes two microseconds to find that nothing is required.
    if flags.c_contiguous and flags.aligned and array.dtype.isnative:
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.require(array, requirements=["C", "A"])


def _memory(value: Any, argument: str) -> tuple[NDArray[Any], str]:
    """Find a numpy view of the value (a copy only where there is no other way) and its dtype's name."""
    if type(value) is np.ndarray:
        return value, _dtype_name(value)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_memory(torch, value, argument)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{argument} is a masked array: give the values to use, for instance {argument}.compressed()"
        )
    if isinstance(value, np.ndarray):
        return value, _dtype_name(value)
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return _dlpack_memory(torch, value, argument)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{argument} is no regular array: {error}") from error
    except (TypeError, RuntimeError, BufferError) as error:
        if hasattr(value, "__dlpack__"):
            return _dlpack_memory(torch, value, argument)
        raise TypeError(f"{argument} cannot be read as an array ({error}): give a numpy array") from error
    if array.dtype.hasobject:
        raise TypeError(f"{argument} is {type(value).__name__}, not an array of numbers: give a numpy array")
    return array, _dtype_name(array)


def _dtype_name(array: NDArray[Any]) -> str:
    if (name := _NAMES.get(array.dtype)) is not None:
        return name
    # numpy has no bfloat16 of its own; ml_dtypes registers one under this name.
    return str(array.dtype.newbyteorder("=").name)


def _dlpack_memory(torch: Any, value: Any, argument: str) -> tuple[NDArray[Any], str]:
    try:
        array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        # numpy reads neither bfloat16 nor other devices; torch does both, where it is loaded.
        if torch is not None:
            return _torch_memory(torch, torch.from_dlpack(value), argument)
        raise TypeError(f"{argument} cannot be read through DLPack ({error}): give a numpy array") from error
    return array, _dtype_name(array)


def _torch_memory(torch: Any, tensor: Any, argument: str) -> tuple[NDArray[Any], str]:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{argument} is a sparse or quantized tensor: give a dense one, as .to_dense() makes")
    if tensor.device.type == "meta":
        raise TypeError(f"{argument} is a tensor on the meta device and holds no values: give one with data")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.device.type == "cuda":
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    elif tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16), name
    try:
        return tensor.numpy(), name
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{argument} has dtype {name}, which numpy cannot hold: convert it first") from error
