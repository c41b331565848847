"""Whatever holds numbers is read, in place where its memory allows."""

from __future__ import annotations

import array
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from generators import DTYPES
from offramp import fast_calibrate, sort_by_score
from offramp.arrays import as_floats, as_labels, as_targets

VALUES = [0.5, -0.25, 2.0, 0.0]
FLAGS = [1, 0, 1, 0]


def in_place(read, holder):
    return np.shares_memory(read.values, holder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_is_read_in_place(dtype):
    given = np.array(VALUES, DTYPES[dtype])
    read = as_floats(given, "scores")
    assert read.dtype == dtype
    assert in_place(read, given)
    assert read.values.view(given.dtype).tolist() == VALUES


@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_numpy_memory_is_copied_right(dtype):
    plain = np.array(VALUES, DTYPES[dtype])
    strided = np.repeat(plain, 3)[::3]
    backwards = plain[::-1].copy()[::-1]
    unaligned = np.frombuffer(b"x" + plain.tobytes(), dtype=plain.dtype, offset=1)
    stretched = np.broadcast_to(plain, (2, 4))
    transposed = np.stack([plain, plain], axis=1).T
    for given in (strided, backwards, unaligned, stretched, transposed):
        read = as_floats(given, "scores")
        assert read.dtype == dtype
        assert read.values.flags.c_contiguous
        assert read.values.flags.aligned
        assert (read.values.view(plain.dtype) == given).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_foreign_endian_memory_is_turned(dtype):
    given = np.array(VALUES, np.dtype(dtype).newbyteorder("S"))
    read = as_floats(given, "scores")
    assert read.dtype == dtype
    assert read.values.view(dtype).tolist() == VALUES
    assert fast_calibrate(given, FLAGS, 1.0) == fast_calibrate(VALUES, FLAGS, 1.0) == 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_read_in_place(dtype):
    torch = pytest.importorskip("torch")
    given = torch.tensor(VALUES, dtype=getattr(torch, dtype))
    read = as_floats(given, "scores")
    assert read.dtype == dtype
    assert read.values.ctypes.data == given.data_ptr()
    assert fast_calibrate(given, torch.tensor(FLAGS, dtype=torch.bool), 1.0) == 0.5
    assert fast_calibrate(given, torch.tensor(FLAGS), [0.5, 1.0]).tolist() == [-0.25, 0.5]


def test_torch_tensors_of_every_kind():
    torch = pytest.importorskip("torch")
    trained = torch.nn.Parameter(torch.tensor(VALUES))
    assert as_floats(trained, "scores").values.tolist() == VALUES
    assert as_floats(torch.tensor(VALUES).repeat_interleave(2)[::2], "scores").values.tolist() == VALUES
    assert (
        as_floats(torch.tensor(VALUES, dtype=torch.bfloat16).repeat_interleave(2)[::2], "s").dtype
        == "bfloat16"
    )
    assert as_floats(torch.tensor([1j * value for value in VALUES]).imag, "scores").values.tolist() == VALUES
    assert as_floats(torch.tensor([1j * value for value in VALUES]).conj().imag, "s").values[1] == 0.25
    with pytest.raises(TypeError, match=r"^scores is a sparse or quantized tensor"):
        as_floats(torch.tensor(VALUES).to_sparse(), "scores")
    with pytest.raises(TypeError, match=r"^scores is a tensor on the meta device"):
        as_floats(torch.empty(3, device="meta"), "scores")
    with pytest.raises(TypeError, match=r"^scores has dtype int64"):
        as_floats(torch.tensor([1, 2]), "scores")
    with pytest.raises(TypeError, match=r"^scores has dtype float8_e4m3fn"):
        as_floats(torch.tensor(VALUES).to(torch.float8_e4m3fn), "scores")
    with pytest.raises(TypeError, match=r"^correct has dtype bfloat16"):
        as_labels(torch.tensor(VALUES, dtype=torch.bfloat16), "correct")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_tensors_come_over(dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    given = torch.tensor(VALUES, dtype=getattr(torch, dtype), device="cuda")
    assert fast_calibrate(given, torch.tensor(FLAGS, device="cuda"), 1.0) == 0.5


def test_sorted_bfloat16_tensors_come_back_as_float32():
    torch = pytest.importorskip("torch")
    scores, _ = sort_by_score(torch.tensor(VALUES, dtype=torch.bfloat16), FLAGS)
    assert scores.dtype == np.float32
    assert scores.tolist() == sorted(VALUES)


class OnlyDLPack:
    """A holder that speaks nothing but DLPack."""

    def __init__(self, holder):
        self.holder = holder

    def __dlpack__(self, **options):
        return self.holder.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.holder.__dlpack_device__()


def test_dlpack_is_read_in_place():
    given = np.array(VALUES, np.float32)
    read = as_floats(OnlyDLPack(given), "scores")
    assert in_place(read, given)
    torch = pytest.importorskip("torch")
    for dtype in DTYPES:
        tensor = torch.tensor(VALUES, dtype=getattr(torch, dtype))
        read = as_floats(OnlyDLPack(tensor), "scores")
        assert read.dtype == dtype
        assert read.values.ctypes.data == tensor.data_ptr()


def test_dlpack_that_numpy_cannot_read_is_refused_without_torch():
    # A process without torch: numpy knows no bfloat16 over DLPack.
    program = """
from offramp.arrays import as_floats

class Broken:
    def __dlpack__(self, **options):
        raise BufferError("no such device")
    def __dlpack_device__(self):
        return (2, 0)

try:
    as_floats(Broken(), "scores")
except TypeError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("scores cannot be read through DLPack")


def test_buffers_and_lists():
    assert as_floats(array.array("d", VALUES), "scores").values.tolist() == VALUES
    assert as_floats(memoryview(np.array(VALUES)), "scores").values.tolist() == VALUES
    assert as_floats(VALUES, "scores").dtype == "float64"
    assert as_floats([1, 2], "scores").dtype == "float64"
    assert as_floats([1, 2], "scores").values.tolist() == [1.0, 2.0]
    assert as_floats([np.float32(0.5)], "scores").dtype == "float32"
    assert as_floats(0.5, "scores").values.shape == ()
    with pytest.raises(TypeError, match=r"^scores has dtype int64"):
        as_floats(memoryview(np.array([1, 2])), "scores")


class Column:
    """Holds an array the way a data frame's column does."""

    def __array__(self, dtype=None, copy=None):
        return np.array(VALUES, dtype)


def test_anything_numpy_views():
    assert as_floats(Column(), "scores").values.tolist() == VALUES
    with pytest.raises(TypeError, match=r"^scores is object, not an array of numbers"):
        as_floats(object(), "scores")


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.int64, ">i8"])
def test_flags_of_every_integer_dtype(dtype):
    given = np.array(FLAGS, dtype)
    read = as_labels(given, "correct")
    assert read.values.dtype == np.uint8
    assert read.values.tolist() == FLAGS
    assert in_place(read, given) == (np.dtype(dtype) in (np.dtype(bool), np.dtype(np.uint8)))


def test_flags_that_are_not_are_named():
    with pytest.raises(ValueError, match=r"^correct must hold only 0 and 1, but correct\[1, 0\] is -3"):
        as_labels([[0, 1], [-3, 9]], "correct")
    with pytest.raises(TypeError, match=r"^correct has dtype bfloat16"):
        as_labels(np.array(FLAGS, ml_dtypes.bfloat16), "correct")


def test_targets_keep_their_values():
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        given = np.array([0.9, 0.25], dtype)
        targets, single = as_targets(given, "eps")
        assert (targets == given.astype(np.float64)).all()
        assert not single
    torch = pytest.importorskip("torch")
    assert as_targets(torch.tensor(0.5, dtype=torch.bfloat16), "eps") == (np.array([0.5]), True)
    assert as_targets(1, "eps") == (np.array([1.0]), True)
