//! Memory of torch's tensors, known by its address: the way through numpy takes longer than a product or a decision.

use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::slice;

/// Types of which every pattern of bits is a value.
pub trait Plain {}

impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}
impl Plain for i8 {}
impl Plain for i64 {}

/// How many numbers a tensor of so many dimensions has.
pub fn size(shape: &[usize]) -> PyResult<usize> {
    let count = shape
        .iter()
        .try_fold(1usize, |count, &next| count.checked_mul(next));
    count.ok_or_else(|| PyValueError::new_err("there is no tensor of that size"))
}

/// Numbers, unless the address is 0.
pub fn maybe<'a, T: Plain>(address: usize, count: usize) -> PyResult<Option<&'a [T]>> {
    (address != 0).then(|| numbers(address, count)).transpose()
}

/// So many numbers at an address.
pub fn numbers<'a, T: Plain>(address: usize, count: usize) -> PyResult<&'a [T]> {
    check::<T>(address, count)?;
    // SAFETY: `offramp.llm.few`, `offramp.llm.stepping` and `offramp.decision`, from which alone addresses come, hand over
    // those of tensors on the CPU, of these types and sizes, one number after the other, whose memory they keep for as
    // long as the address is used: for the call, or as long as there are the `Layers`.  A user must not take the memory
    // itself away meanwhile (`share_memory_`, `untyped_storage().resize_`).
    Ok(unsafe { slice::from_raw_parts(address as *const T, count) })
}

/// The same, to be written.
pub fn numbers_mut<'a, T: Plain>(address: usize, count: usize) -> PyResult<&'a mut [T]> {
    check::<T>(address, count)?;
    // SAFETY: as above; what is written they have just made, or a cache that is no one else's.
    Ok(unsafe { slice::from_raw_parts_mut(address as *mut T, count) })
}

fn check<T>(address: usize, count: usize) -> PyResult<()> {
    let fits = size(&[count, size_of::<T>()])? <= isize::MAX as usize;
    if address == 0 || count == 0 || !fits || !address.is_multiple_of(align_of::<T>()) {
        return Err(PyValueError::new_err(
            "there is nothing at this address, or it is not aligned",
        ));
    }
    Ok(())
}
