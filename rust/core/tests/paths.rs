//! Every instruction set this processor has, around every size where the search changes its mind, against a sort.

use half::f16;
use offramp_core::{Calibratable, InstructionSet, Method, Rule, Run, fast_calibrate};

/// Few samples, blocks of a pass, the first guess and the first thread.
const SIZES: [usize; 12] = [
    1, 511, 512, 513, 1023, 1024, 1025, 2049, 20_000, 32_767, 32_768, 140_001,
];

/// Splitmix64.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The usual code: ascending order, counts from the top, the first candidate that passes.
fn by_sorting<S: Calibratable>(scores: &[S], correct: &[u8], eps: &[f64], rule: Rule) -> Vec<f64> {
    let mut order: Vec<(f64, u8)> = scores
        .iter()
        .zip(correct)
        .map(|(score, &flag)| (score.value() + 0.0, flag))
        .collect();
    order.sort_by(|a, b| a.0.partial_cmp(&b.0).expect("finite"));
    let mut right = correct.iter().filter(|&&flag| flag == 1).count();
    let mut found = vec![f64::INFINITY; eps.len()];
    for (rank, &(value, flag)) in order.iter().enumerate() {
        let starts = rank == 0 || order[rank - 1].0 != value;
        let accuracy = right as f64 / (order.len() - rank) as f64;
        for (found, &eps) in found.iter_mut().zip(eps) {
            if (starts || rule == Rule::Index) && accuracy >= eps && found.is_infinite() {
                *found = value;
            }
        }
        right -= usize::from(flag);
    }
    found
}

type Make = fn(&mut Noise) -> f64;
const KINDS: [(&str, Make); 5] = [
    ("uniform", Noise::unit),
    ("both signs", |noise| {
        (noise.unit() - 0.5) * (noise.unit() * 9.0).exp()
    }),
    ("few values", |noise| {
        [-0.0, 0.0, 0.25, 0.5, 0.75, 1.0][noise.bits() as usize % 6]
    }),
    ("crowded at one", |noise| 1.0 - noise.unit().powi(8) / 64.0),
    ("any size", |noise| {
        f64::from(f32::from_bits(noise.bits() as u32 & 0xbfff_ffff))
    }),
];

fn all_agree<S: Calibratable>(cast: fn(f64) -> S, sizes: &[usize], kinds: &[(&str, Make)]) {
    let mut noise = Noise(1);
    for &size in sizes {
        for &(kind, make) in kinds {
            let scores: Vec<S> = (0..size).map(|_| cast(make(&mut noise))).collect();
            let correct: Vec<u8> = scores
                .iter()
                .map(|score| u8::from(noise.unit() < 0.5 + 0.5 * score.value()))
                .collect();
            let targets = [0.9, 0.5, 0.75, 1.0];
            for rule in [Rule::Set, Rule::Index] {
                let expected = by_sorting(&scores, &correct, &targets, rule);
                let agrees = |run: Run, name: &str| {
                    for eps in [&targets[..1], &targets[2..3], &targets[..]] {
                        let found = fast_calibrate(&scores, &correct, eps, rule, &run);
                        let first = targets
                            .iter()
                            .position(|target| *target == eps[0])
                            .expect("one of them");
                        let expected = &expected[first..first + eps.len()];
                        assert_eq!(
                            found.as_deref(),
                            Ok(expected),
                            "{size} {kind} {rule:?} {name}"
                        );
                    }
                };
                for isa in InstructionSet::available() {
                    for threads in [1, 3] {
                        agrees(Run::on(threads).with_instruction_set(isa), isa.name());
                    }
                }
                agrees(Run::on(1).with_method(Method::Sort), "sort");
            }
        }
    }
}

#[test]
fn float32() {
    all_agree(|score| score as f32, &SIZES, &KINDS);
}

#[test]
fn float64() {
    all_agree(|score| score, &SIZES, &KINDS);
}

/// From here up all threads share a pass.
#[test]
fn many_float32() {
    all_agree(|score| score as f32, &[1 << 20], &KINDS[1..3]);
}

/// The table of all keys from 8192 samples up, the sort below.
#[test]
fn float16() {
    all_agree(f16::from_f64, &[1, 513, 8191, 8192, 20_000], &KINDS[..4]);
}

/// A part of the above that counts above edges, and gathers, in each way, and is done in minutes in an emulator.
#[test]
fn quickly_float32() {
    all_agree(|score| score as f32, &[1025, 32_769], &KINDS[..1]);
}

#[test]
fn quickly_float64() {
    all_agree(|score| score, &[1025, 32_769], &KINDS[..1]);
}

#[test]
fn a_sample_at_fault_is_found_by_every_instruction_set() {
    for isa in InstructionSet::available() {
        let run = Run::on(1).with_instruction_set(isa);
        for (place, fault) in [
            (0, f32::NAN),
            (700, -f32::NAN),
            (1024, f32::INFINITY),
            (139_999, f32::NEG_INFINITY),
        ] {
            for size in [place + 1, 140_000] {
                let mut scores = vec![0.5f32; size];
                scores[place] = fault;
                let found = fast_calibrate(&scores, &vec![1; size], &[0.9], Rule::Set, &run);
                assert!(
                    found.is_err(),
                    "{fault} at {place} of {size} by {}",
                    isa.name()
                );
            }
        }
        let mut flags = vec![1; 140_000];
        flags[139_000] = 2;
        let found = fast_calibrate(&vec![0.5f64; 140_000], &flags, &[0.9], Rule::Set, &run);
        assert!(found.is_err(), "{}", isa.name());
    }
}
