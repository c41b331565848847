//! How much memory a call needs beside its input: what it allocates, counted, not what the system reports.

#![expect(unsafe_code, reason = "an allocator that counts is still an allocator")]

use offramp_core::margin::{exits, exits_rows, top2_margin, top2_margin_rows};
use offramp_core::{InstructionSet, Rule, Run, fast_calibrate};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// How often this thread has allocated; others, such as the one that reports on tests, may at any time.
    static OFTEN: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(held, Relaxed);
        OFTEN.set(OFTEN.get() + 1);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above; the pointer came from `alloc`, thus from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The largest amount held during a call, beyond what was held before it.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    work();
    PEAK.load(Relaxed) - before
}

/// Splitmix64 as numbers in [0, 1).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[test]
fn a_decision_allocates_nothing() {
    for size in [1, 100, 50_000, 300_000] {
        let mut state = 3;
        let logits: Vec<f32> = (0..size)
            .map(|_| uniform(&mut state) as f32 * 9.0)
            .collect();
        for isa in InstructionSet::available() {
            let before = OFTEN.get();
            top2_margin(isa, &logits).expect("legal logits");
            exits(isa, &logits, 0.0).expect("legal logits");
            exits(isa, &logits, 1.0).expect("legal logits");
            let run = Run::on(1).with_instruction_set(isa);
            let (mut token, mut margin, mut exit) = ([0], [0.0], [false]);
            top2_margin_rows(&logits, &mut token, &mut margin, &run).expect("legal logits");
            exits_rows(&logits, 0.5, &mut token, &mut exit, &run).expect("legal logits");
            assert_eq!(OFTEN.get(), before, "{size} logits with {}", isa.name());
        }
    }
}

#[test]
fn extra_memory_is_a_tenth_of_the_input_at_most() {
    const SAMPLES: usize = 10_000_000;
    let mut state = 7;
    let wide: Vec<f64> = (0..SAMPLES).map(|_| uniform(&mut state)).collect();
    let correct: Vec<u8> = wide
        .iter()
        .map(|score| u8::from(uniform(&mut state) < *score))
        .collect();
    let narrow: Vec<f32> = wide.iter().map(|&score| score as f32).collect();
    let run = Run::on(2);
    for eps in [0.0, 0.6, 0.9, 0.99, 0.9999, 1.0] {
        let calibrate = || {
            fast_calibrate(&narrow, &correct, &[eps], Rule::Set, &run).expect("valid");
        };
        let peak = peak_of(calibrate);
        assert!(peak <= 5 * SAMPLES / 10, "float32 at {eps}: {peak} bytes");
        let calibrate = || {
            fast_calibrate(&wide, &correct, &[eps], Rule::Set, &run).expect("valid");
        };
        let peak = peak_of(calibrate);
        assert!(peak <= 9 * SAMPLES / 10, "float64 at {eps}: {peak} bytes");
    }
}
