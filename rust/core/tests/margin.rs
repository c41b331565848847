//! The decision on every instruction set: the same bits, near the naive definition in float64.

use half::{bf16, f16};
use offramp_core::margin::{Logit, Top2, exits, exits_rows, top2_margin, top2_margin_rows};
use offramp_core::{Error, InstructionSet, Run};
use proptest::prelude::*;

/// The first of the largest logits, and p(1) - p(2) from the sorted softmax.
fn naive(logits: &[f64]) -> (usize, f64) {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let token = logits
        .iter()
        .position(|&l| l == largest)
        .expect("not empty");
    let mut exps: Vec<f64> = logits.iter().map(|l| (l - largest).exp()).collect();
    exps.sort_by(f64::total_cmp);
    let total: f64 = exps.iter().sum();
    (
        token,
        (exps.pop().unwrap_or(0.0) - exps.pop().unwrap_or(0.0)) / total,
    )
}

fn on_every_instruction_set<T: Logit>(logits: &[T]) -> Top2 {
    let [portable, others @ ..] = &InstructionSet::available()[..] else {
        panic!("portable is always there")
    };
    let expected = top2_margin(*portable, logits).expect("legal logits");
    for isa in others {
        let ours = top2_margin(*isa, logits).expect("legal logits");
        assert_eq!(ours.token, expected.token, "{}", isa.name());
        assert_eq!(
            ours.margin.to_bits(),
            expected.margin.to_bits(),
            "{}",
            isa.name()
        );
    }
    check_exits(logits, expected);
    expected
}

/// The yes or no is that of the margin, at thresholds on it, beside it and far from it.
fn check_exits<T: Logit>(logits: &[T], Top2 { token, margin }: Top2) {
    let margin = f64::from(margin);
    let beside = [margin.next_down(), margin, margin.next_up()];
    for isa in InstructionSet::available() {
        for tau in beside.into_iter().chain([0.0, 0.5, 1.0, f64::INFINITY]) {
            assert_eq!(
                exits(isa, logits, tau),
                Ok((token, margin >= tau)),
                "{}",
                isa.name()
            );
        }
    }
}

fn check<T: Logit>(logits: &[f64], narrow: fn(f64) -> T, widen: fn(T) -> f64) {
    let narrowed: Vec<T> = logits.iter().map(|&l| narrow(l)).collect();
    let exact: Vec<f64> = narrowed.iter().map(|&l| widen(l)).collect();
    let (token, margin) = naive(&exact);
    let ours = on_every_instruction_set(&narrowed);
    assert_eq!(ours.token, token);
    assert!(
        (f64::from(ours.margin) - margin).abs() <= 2e-7,
        "{} for {margin}",
        ours.margin
    );
}

fn check_all(logits: &[f64]) {
    check::<f32>(logits, |l| l as f32, f64::from);
    check::<f16>(logits, f16::from_f64, f64::from);
    check::<bf16>(logits, bf16::from_f64, f64::from);
}

fn logit() -> impl Strategy<Value = f64> {
    prop_oneof![
        6 => -30.0..30.0,
        2 => (-8i8..8).prop_map(f64::from),
        1 => Just(f64::NEG_INFINITY),
        1 => -60_000.0..60_000.0,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_row(mut logits in prop::collection::vec(logit(), 1..2500), scale in -12i32..1) {
        logits[0] = logits[0].max(-100.0);
        check_all(&logits);
        check_all(&logits.iter().map(|l| l * f64::from(2.0f32.powi(scale))).collect::<Vec<_>>());
    }

    #[test]
    fn any_float32(bits in prop::collection::vec(any::<u32>(), 1..600)) {
        let logits: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let legal = |l: f32| !l.is_nan() && l != f32::INFINITY;
        let logits: Vec<f32> = logits.iter().map(|&l| if legal(l) { l } else { 0.0 }).collect();
        if logits.iter().any(|&l| l > f32::NEG_INFINITY) {
            check(&logits.iter().copied().map(f64::from).collect::<Vec<_>>(), |l| l as f32, f64::from);
        }
    }

    #[test]
    fn a_fault_anywhere(size in 1usize..2500, at in 0usize..2500, infinite: bool) {
        let value = if infinite { f32::INFINITY } else { f32::NAN };
        let index = at % size;
        let mut logits = vec![0.5f32; size];
        logits[index] = value;
        for isa in InstructionSet::available() {
            let refused = top2_margin(isa, &logits).expect_err("not a logit").to_string();
            let name = if infinite { "inf" } else { "nan" };
            prop_assert!(refused.contains(&format!("row 0 holds {name} at index {index}:")), "{refused}");
        }
    }
}

#[test]
fn every_remainder_of_a_block() {
    for size in 1..600 {
        check_all(
            &(0..size)
                .map(|i| f64::from(i * 7919 % 61) * 0.37 - 9.0)
                .collect::<Vec<_>>(),
        );
    }
}

#[test]
fn rows_are_those_of_the_matrix_and_the_first_fault_is_named() {
    // Enough for several threads, and a last part that is shorter.
    const ROWS: usize = 997;
    let logits: Vec<f32> = (0..ROWS * 700)
        .map(|i| (i * 31 % 9973) as f32 * 0.01)
        .collect();
    for isa in InstructionSet::available() {
        for threads in [1, 2, 5] {
            let run = Run::on(threads).with_instruction_set(isa);
            let (mut tokens, mut margins) = ([0; ROWS], [0.0; ROWS]);
            top2_margin_rows(&logits, &mut tokens, &mut margins, &run).expect("legal logits");
            for (index, row) in logits.chunks(700).enumerate() {
                let (token, margin) = (tokens[index] as usize, margins[index]);
                assert_eq!(top2_margin(isa, row), Ok(Top2 { token, margin }));
            }
            // As often true as not.
            let mut sorted = margins;
            sorted.sort_by(f32::total_cmp);
            let tau = f64::from(sorted[ROWS / 2]);
            let (mut named, mut exited) = ([0; ROWS], [false; ROWS]);
            exits_rows(&logits, tau, &mut named, &mut exited, &run).expect("legal logits");
            assert_eq!(named, tokens);
            assert_eq!(exited, margins.map(|margin| f64::from(margin) >= tau));
            assert!(exited.contains(&true) && exited.contains(&false));
            let mut faulty = logits.clone();
            faulty[990 * 700] = f32::NAN;
            faulty[400 * 700..401 * 700].fill(f32::NEG_INFINITY);
            let refused = top2_margin_rows(&faulty, &mut tokens, &mut margins, &run);
            assert_eq!(refused, Err(Error::AllMasked { row: 400 }));
            let refused = exits_rows(&faulty, 0.5, &mut tokens, &mut exited, &run);
            assert_eq!(refused, Err(Error::AllMasked { row: 400 }));
        }
        let empty = Err(Error::Empty { argument: "logits" });
        assert_eq!(top2_margin::<f32>(isa, &[]), empty);
        let run = Run::on(1).with_instruction_set(isa);
        for rows in [0, 3] {
            let (mut tokens, mut margins) = (vec![0; rows], vec![0.0; rows]);
            let refused = top2_margin_rows::<f32>(&[], &mut tokens, &mut margins, &run);
            assert_eq!(refused, Err(Error::Empty { argument: "logits" }));
        }
    }
}

/// Models whose logits are far from zero or spread wide, and a maximum that is far from the first logits.
#[test]
fn wherever_the_logits_lie() {
    for size in [300, 5_000] {
        for center in [
            -2e4, -500.0, -97.0, -64.0, -33.0, 0.0, 40.0, 63.0, 97.0, 2e4,
        ] {
            for spread in [0.5, 10.0, 90.0] {
                let noise = |i: usize| (i * 7919 % 6007) as f64 / 6007.0 - 0.5;
                let mut logits: Vec<f64> = (0..size).map(|i| center + spread * noise(i)).collect();
                check_all(&logits);
                logits[size - 20] = center + 70.0;
                check_all(&logits);
                logits[..1024.min(size - 50)].fill(f64::NEG_INFINITY);
                check_all(&logits);
            }
        }
    }
}
