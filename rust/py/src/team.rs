//! The threads torch computes with, for computations of ours in between: OpenMP's, by the name its libraries share.
//!
//! After each of torch's operations they spin for milliseconds, waiting for the next.  Threads of our own would find
//! no core free beside them; these answer within a microsecond.

use offramp_core::step::Team;
use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

type Region = unsafe extern "C" fn(*mut c_void);
/// `GOMP_parallel` of GCC's OpenMP, which LLVM's and Intel's provide, too: each of so many threads, or of as many as
/// there are, the calling one among them, calls the function with the data, and then it returns.
type Parallel = unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint);

/// Whether there are such threads: once torch is loaded, where it uses OpenMP.
pub fn is_there() -> bool {
    parallel().is_some()
}

fn parallel() -> Option<Parallel> {
    static FOUND: OnceLock<Parallel> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Some(*found);
    }
    let address = address();
    if address.is_null() {
        return None;
    }
    // SAFETY: whatever has this name is a function of this type, part of GCC's ABI; it is never unloaded, as torch is
    // not.
    let found = unsafe { std::mem::transmute::<*mut c_void, Parallel>(address) };
    Some(*FOUND.get_or_init(|| found))
}

#[cfg(target_os = "linux")]
fn address() -> *mut c_void {
    use std::ffi::c_char;
    unsafe extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // SAFETY: a null handle stands for all libraries whose names are global; the name ends with a zero.
    unsafe { dlsym(std::ptr::null_mut(), c"GOMP_parallel".as_ptr()) }
}

/// Elsewhere torch's threads are started in other ways.
#[cfg(not(target_os = "linux"))]
fn address() -> *mut c_void {
    std::ptr::null_mut()
}

/// So many of torch's threads, the calling one among them.
pub struct Torch(pub u32);

impl Team for Torch {
    fn size(&self) -> usize {
        self.0 as usize
    }

    /// The whole team or nobody else: OpenMP lets threads go when a team is smaller than the last, and starts them anew.
    fn run(&self, parts: usize, work: &(dyn Fn() + Sync)) {
        run(if parts > 1 { self.0 } else { 1 }, work);
    }
}

/// Let up to `count` threads call `work` at the same time, this one among them; returns when all have.
fn run(count: u32, work: &(dyn Fn() + Sync)) {
    let parallel = parallel().filter(|_| count > 1);
    let Some(parallel) = parallel else {
        return work();
    };
    let shared = Shared {
        work,
        panic: Mutex::new(None),
    };
    // SAFETY: `member` takes a pointer to a `Shared`; this one outlives the call, at whose end no thread is left in it.
    unsafe { parallel(member, (&raw const shared).cast_mut().cast(), count, 0) };
    let panic = shared.panic.into_inner();
    if let Some(panic) = panic.unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

struct Shared<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// # Safety
/// `data` points to a `Shared`.
unsafe extern "C" fn member(data: *mut c_void) {
    // SAFETY: the caller's promise; it is only read, or written behind its lock, so that others may do the same.
    let shared = unsafe { &*data.cast_const().cast::<Shared<'_>>() };
    // No panic may leave a function that C calls.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(shared.work)) {
        let mut first = shared.panic.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(panic);
    }
}
