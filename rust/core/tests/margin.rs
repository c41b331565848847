//! The decision on every instruction set: the same bits, near the naive definition in float64.

use half::{bf16, f16};
use offramp_core::Error;
use offramp_core::InstructionSet;
use offramp_core::margin::{Logit, Top2, top2_margin, top2_margin_rows};
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
    expected
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
    let isa = *InstructionSet::available()
        .last()
        .expect("portable is always there");
    let mut logits: Vec<f32> = (0..5 * 700).map(|i| (i * 31 % 97) as f32 * 0.1).collect();
    let (mut tokens, mut margins) = ([0; 5], [0.0; 5]);
    top2_margin_rows(isa, &logits, &mut tokens, &mut margins).expect("legal logits");
    for (row, (token, margin)) in logits.chunks(700).zip(tokens.into_iter().zip(margins)) {
        assert_eq!(
            top2_margin(isa, row),
            Ok(Top2 {
                token: token as usize,
                margin
            })
        );
    }
    logits[4 * 700] = f32::NAN;
    logits[2 * 700..3 * 700].fill(f32::NEG_INFINITY);
    let refused = top2_margin_rows(isa, &logits, &mut tokens, &mut margins);
    assert_eq!(refused, Err(Error::AllMasked { row: 2 }));
    assert_eq!(
        top2_margin::<f32>(isa, &[]),
        Err(Error::Empty { argument: "logits" })
    );
}
