//! Calibration against naive quadratic definitions.

use half::{bf16, f16};
use offramp_core::{
    Calibratable, Rule, Run, Score, fast_calibrate, fast_calibrate_heads, sort_by_score,
    threshold_curve,
};
use proptest::prelude::*;

/// Every score is a candidate; the lowest whose accepted set is accurate enough.
fn naive_set<S: Score>(scores: &[S], correct: &[u8], eps: f64) -> f64 {
    let accepted = |v: f64| {
        scores
            .iter()
            .zip(correct)
            .filter(move |(s, _)| s.value() >= v)
    };
    let accuracy =
        |v| accepted(v).filter(|(_, c)| **c == 1).count() as f64 / accepted(v).count() as f64;
    scores
        .iter()
        .map(|s| s.value() + 0.0)
        .filter(|&v| accuracy(v) >= eps)
        .fold(f64::INFINITY, f64::min)
}

/// The score at the first index, in stable ascending order, from which on the mean reaches the target.
fn naive_index<S: Score>(scores: &[S], correct: &[u8], eps: f64) -> f64 {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| {
        scores[a]
            .value()
            .partial_cmp(&scores[b].value())
            .expect("finite")
    });
    let mean = |j: usize| {
        order[j..]
            .iter()
            .map(|&i| f64::from(correct[i]))
            .sum::<f64>()
            / (order.len() - j) as f64
    };
    (0..order.len())
        .find(|&j| mean(j) >= eps)
        .map_or(f64::INFINITY, |j| scores[order[j]].value() + 0.0)
}

/// Scores from any finite bits or from a few values, flags, and targets on or beside the quotients that occur.
fn samples<S: Score>(
    from_bits: fn(u64) -> S,
) -> impl Strategy<Value = (Vec<S>, Vec<u8>, Vec<f64>)> {
    let score = prop_oneof![
        any::<u64>(),
        0u64..4,
        any::<u64>().prop_map(|bits| bits & 0xc000_c000_c000_c000)
    ];
    let finite = score
        .prop_map(from_bits)
        .prop_filter("finite", |score| score.is_finite());
    let target = (0u32..30, 1u32..30, -1i64..2).prop_map(|(correct, accepted, beside)| {
        let quotient = (f64::from(correct) / f64::from(accepted)).min(1.0);
        f64::from_bits(quotient.to_bits().saturating_add_signed(beside)).min(1.0)
    });
    (
        prop::collection::vec((finite, 0u8..2), 1..80),
        prop::collection::vec(target, 1..5),
    )
        .prop_map(|(samples, targets)| {
            let (scores, correct) = samples.into_iter().unzip();
            (scores, correct, targets)
        })
}

fn agrees<S: Calibratable>(scores: &[S], correct: &[u8], eps: &[f64]) -> Result<(), TestCaseError> {
    let run = Run::on(2);
    let bits = |found: Vec<f64>| found.into_iter().map(f64::to_bits).collect::<Vec<_>>();
    for (rule, naive) in [
        (Rule::Set, naive_set::<S> as fn(&[S], &[u8], f64) -> f64),
        (Rule::Index, naive_index),
    ] {
        let expected: Vec<f64> = eps
            .iter()
            .map(|&target| naive(scores, correct, target))
            .collect();
        let found = fast_calibrate(scores, correct, eps, rule, &run).expect("valid");
        prop_assert_eq!(bits(found), bits(expected.clone()), "{:?}", rule);
        let heads = fast_calibrate_heads(&scores.repeat(3), &correct.repeat(3), 3, eps, rule, &run)
            .expect("valid");
        prop_assert_eq!(bits(heads), bits(expected.repeat(3)));
    }
    let curve = threshold_curve(scores, correct, &run).expect("valid");
    prop_assert!(curve.thresholds.windows(2).all(|pair| pair[0] < pair[1]));
    for ((&v, &accepted), &right) in curve
        .thresholds
        .iter()
        .zip(&curve.accepted)
        .zip(&curve.correct)
    {
        let kept: Vec<u8> = scores
            .iter()
            .zip(correct)
            .filter(|(s, _)| s.value() >= v)
            .map(|(_, c)| *c)
            .collect();
        prop_assert_eq!(
            (accepted, right),
            (kept.len() as i64, kept.iter().map(|&c| i64::from(c)).sum())
        );
    }
    prop_assert!(scores.iter().all(|s| curve.thresholds.contains(&s.value())));

    let (sorted, flags) = sort_by_score(scores, correct, &run).expect("valid");
    let mut expected: Vec<_> = scores.iter().zip(correct).collect();
    expected.sort_by(|a, b| a.0.value().partial_cmp(&b.0.value()).expect("finite"));
    for ((score, flag), (expected_score, expected_flag)) in sorted.iter().zip(&flags).zip(expected)
    {
        prop_assert_eq!(score.value().to_bits(), expected_score.value().to_bits());
        prop_assert_eq!(flag, expected_flag);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn float16((scores, correct, eps) in samples(|bits| f16::from_bits(bits as u16))) {
        agrees(&scores, &correct, &eps)?;
    }

    #[test]
    fn bfloat16((scores, correct, eps) in samples(|bits| bf16::from_bits(bits as u16))) {
        agrees(&scores, &correct, &eps)?;
    }

    #[test]
    fn float32((scores, correct, eps) in samples(|bits| f32::from_bits(bits as u32))) {
        agrees(&scores, &correct, &eps)?;
    }

    #[test]
    fn float64((scores, correct, eps) in samples(f64::from_bits)) {
        agrees(&scores, &correct, &eps)?;
    }
}

#[test]
fn refusals_name_the_first_offence() {
    let run = Run::on(1);
    let refusal = |scores: &[f32], correct: &[u8], eps: &[f64]| {
        fast_calibrate(scores, correct, eps, Rule::Set, &run)
            .expect_err("refused")
            .to_string()
    };
    assert_eq!(
        refusal(&[], &[], &[0.5]),
        "scores is empty: give at least one value"
    );
    assert_eq!(
        refusal(&[1.0], &[1], &[]),
        "eps is empty: give at least one value"
    );
    assert_eq!(
        refusal(&[1.0], &[1, 1], &[0.5]),
        "scores has length 1 but correct has length 2: make them equal"
    );
    assert_eq!(
        refusal(&[1.0, f32::NAN, f32::NAN], &[1, 1, 2], &[0.5]),
        "scores must be finite, but scores[1] is nan: repair or remove it"
    );
    assert_eq!(
        refusal(&[1.0, 2.0], &[1, 2], &[0.5]),
        "correct must hold only 0 and 1, but correct[1] is 2"
    );
    assert_eq!(
        refusal(&[1.0], &[1], &[0.5, -0.5]),
        "eps must lie in [0, 1], but eps[1] is -0.5"
    );
    let heads = fast_calibrate_heads(
        &[1.0, 2.0, f64::INFINITY, 0.0],
        &[1; 4],
        2,
        &[0.5],
        Rule::Set,
        &run,
    );
    assert_eq!(
        heads.expect_err("refused").to_string(),
        "scores must be finite, but scores[1, 0] is inf: repair or remove it"
    );
    for heads in [0, 3] {
        let uneven = fast_calibrate_heads(&[1.0, 2.0], &[1, 1], heads, &[0.5], Rule::Set, &run);
        assert!(
            uneven
                .expect_err("refused")
                .to_string()
                .starts_with("scores has length 2, which")
        );
    }
}

/// Enough samples for several buckets and threads, in an order the buckets do not know.
#[test]
fn many_samples_are_sorted_as_few() {
    let size = 300_000usize;
    let bits = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let unit = |i: usize| (bits(i) >> 11) as f64 / (1u64 << 53) as f64;
    let kinds: [&dyn Fn(usize) -> f64; 6] = [
        &unit,
        &|i| (unit(i) - 0.5) * 1e3,
        &|i| (unit(i) * 30.0).floor() - 15.0,
        &|_| 0.25,
        &|i| if i == 7 { 1e30 } else { unit(i) },
        &|i| if unit(i) < 0.9 { 0.5 } else { unit(i) },
    ];
    for kind in kinds {
        let scores: Vec<f32> = (0..size).map(|i| kind(i) as f32).collect();
        let correct: Vec<u8> = (0..size).map(|i| (bits(i) >> 20 & 1) as u8).collect();
        let mut expected: Vec<_> = scores
            .iter()
            .copied()
            .zip(correct.iter().copied())
            .collect();
        expected.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut distinct: Vec<f64> = expected.iter().map(|pair| f64::from(pair.0)).collect();
        distinct.dedup();
        for threads in [1, 3] {
            let run = Run::on(threads);
            let (sorted, flags) = sort_by_score(&scores, &correct, &run).expect("valid");
            let found: Vec<_> = sorted.into_iter().zip(flags).collect();
            assert!(found == expected);
            let curve = threshold_curve(&scores, &correct, &run).expect("valid");
            assert!(curve.thresholds == distinct);
            let mut right = correct.iter().map(|&flag| i64::from(flag)).sum();
            let mut rank = 0;
            for (place, &threshold) in distinct.iter().enumerate() {
                assert_eq!(curve.accepted[place], (size - rank) as i64);
                assert_eq!(curve.correct[place], right);
                while rank < size && f64::from(expected[rank].0) == threshold {
                    right -= i64::from(expected[rank].1);
                    rank += 1;
                }
            }
        }
    }
}
