//! One row of a tensor, where another library holds it.
//!
//! From DLPack 1.2 on a type of tensors may hand out a table of C functions, one of which describes a tensor without
//! allocating: a tenth of the time that a numpy view of it takes.  The only unsafe code of this crate.

use half::{bf16, f16};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi::PyObject;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::{ptr, slice};

const CPU: i32 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// DLPack's description of a tensor.
#[repr(C)]
struct Description {
    data: *const u8,
    device: i32,
    device_number: i32,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// Describe a tensor without owning it: 0, or -1 with a Python exception set.
type Describe = unsafe extern "C" fn(*mut PyObject, *mut Description) -> c_int;

/// The beginning of DLPack's table, version 1; the functions not used here are pointers like any other.
#[repr(C)]
struct Table {
    major: u32,
    minor: u32,
    unused: [*const c_void; 4],
    describe: Option<Describe>,
}

/// Logits in a type the decision works in.
pub enum Row<'a> {
    Float32(&'a [f32]),
    Float16(&'a [f16]),
    Bfloat16(&'a [bf16]),
}

/// What `decide` makes of the logits of a torch tensor on the CPU, (V,) or with two `dimensions` (1, V); None for all
/// else.
///
/// The logits are there as long as nothing else runs in Python: `decide` must not release the GIL.
pub fn with_row<R>(
    tensor: &Bound<'_, PyAny>,
    dimensions: i32,
    decide: impl FnOnce(Row<'_>) -> R,
) -> Option<R> {
    let py = tensor.py();
    let describe = describer(tensor)?;
    let mut description = MaybeUninit::uninit();
    // SAFETY: the function is the table's for tensors of exactly this type, and gets a live one and room for its
    // description.
    let failed = unsafe { describe(tensor.as_ptr(), description.as_mut_ptr()) } != 0;
    if failed {
        // A tensor without memory of its own, which the slower ways have the words for.
        drop(PyErr::take(py));
        return None;
    }
    // SAFETY: it returned 0, so the description is filled in.
    let description: Description = unsafe { description.assume_init() };
    if description.dimensions != dimensions {
        return None;
    }
    // DLPack cannot say that the values are to be read negated.
    let is_negated = tensor.call_method0(intern!(py, "is_neg")).ok()?;
    if is_negated.is_truthy().ok()? {
        return None;
    }
    // SAFETY: it describes the tensor, which lives, and the GIL is held until the slice is gone, so that no other
    // Python code can free or resize the memory.
    unsafe {
        match (description.code, description.bits) {
            (FLOAT, 32) => Some(decide(Row::Float32(description.row()?))),
            (FLOAT, 16) => Some(decide(Row::Float16(description.row()?))),
            (BFLOAT, 16) => Some(decide(Row::Bfloat16(description.row()?))),
            _ => None,
        }
    }
}

impl Description {
    /// The values of one row that lies together in memory of the host.
    ///
    /// # Safety
    /// The description is that of a live tensor of values of this type, whose memory nobody frees while the slice
    /// is in use.
    unsafe fn row<T>(&self) -> Option<&[T]> {
        if self.device != CPU || self.lanes != 1 || self.shape.is_null() {
            return None;
        }
        // SAFETY: shape and strides, where there are any, have as many entries as dimensions.
        let (length, stride) = unsafe {
            match self.dimensions {
                1 => (*self.shape, self.stride(0)),
                2 if *self.shape == 1 => (*self.shape.add(1), self.stride(1)),
                _ => return None,
            }
        };
        let length = usize::try_from(length).ok().filter(|&length| length > 0)?;
        let start = self
            .data
            .wrapping_add(usize::try_from(self.byte_offset).ok()?)
            .cast::<T>();
        if (stride != 1 && length > 1) || start.is_null() || !start.is_aligned() {
            return None;
        }
        // SAFETY: a tensor's memory holds its values one after another, as the stride says; the pointer is aligned.
        Some(unsafe { slice::from_raw_parts(start, length) })
    }

    /// The stride of a dimension; without strides the last one lies together.
    ///
    /// # Safety
    /// There are as many dimensions, and this is the last.
    unsafe fn stride(&self, dimension: usize) -> i64 {
        if self.strides.is_null() {
            return 1;
        }
        // SAFETY: as many strides as dimensions.
        unsafe { *self.strides.add(dimension) }
    }
}

/// The function that describes a tensor of this very type, if it is torch's and that has one.
fn describer(tensor: &Bound<'_, PyAny>) -> Option<Describe> {
    static TORCH: PyOnceLock<(Py<PyType>, Option<Describe>)> = PyOnceLock::new();
    let py = tensor.py();
    let kind = tensor.get_type();
    let (of, describe) = match TORCH.get(py) {
        Some(known) => known,
        None if is_torch(&kind).unwrap_or(false) => {
            let found = find_describer(&kind).unwrap_or(None);
            TORCH.get_or_init(py, || (kind.clone().unbind(), found))
        }
        None => return None,
    };
    // A class derived from it may be something else altogether.
    if kind.is(of) { *describe } else { None }
}

fn is_torch(kind: &Bound<'_, PyType>) -> PyResult<bool> {
    Ok(kind.module()? == "torch" && kind.name()? == "Tensor")
}

fn find_describer(kind: &Bound<'_, PyType>) -> PyResult<Option<Describe>> {
    let capsule = kind.getattr("__dlpack_c_exchange_api__")?;
    let capsule = capsule
        .cast::<PyCapsule>()
        .map_err(|_| PyTypeError::new_err("no capsule"))?;
    let table = capsule
        .pointer_checked(Some(c"dlpack_exchange_api"))?
        .cast::<Table>();
    // SAFETY: a capsule of this name holds DLPack's table, which stays for good; its first two fields are in every
    // version, the rest as above in version 1.
    unsafe {
        let major = ptr::addr_of!((*table.as_ptr()).major).read();
        Ok(if major == 1 {
            (*table.as_ptr()).describe
        } else {
            None
        })
    }
}
