//! Products on every instruction set: the same bits whoever works on them and beside whatever rows, near float64.

use half::{bf16, f16};
use offramp_core::InstructionSet;
use offramp_core::product::{Number, Product};
use proptest::prelude::*;
use std::thread;

/// A weight (height, width), rows of its width and perhaps a bias.
#[derive(Debug, Clone)]
struct Case {
    width: usize,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    rows: Vec<f64>,
}

/// What a product gives, as float32.
struct Type<T> {
    narrow: fn(f64) -> T,
    widen: fn(T) -> f64,
    /// The relative error of a rounding to the type, and the least difference of its numbers.
    rounding: f64,
    least: f64,
}

const F32: Type<f32> = Type {
    narrow: |x| x as f32,
    widen: f64::from,
    rounding: 6e-8,
    least: 1e-45,
};
const F16: Type<f16> = Type {
    narrow: f16::from_f64,
    widen: f16::to_f64,
    rounding: 4.9e-4,
    least: 6e-8,
};
const BF16: Type<bf16> = Type {
    narrow: bf16::from_f64,
    widen: bf16::to_f64,
    rounding: 3.91e-3,
    least: 1e-40,
};

fn product<T: Number>(isa: InstructionSet, case: &Given<T>, rows: &[T], team: usize) -> Vec<T> {
    let mut out = vec![(case.kind.narrow)(7.0); rows.len() / case.width * case.height()];
    let product = Product::new(
        isa,
        &case.weight,
        case.bias.as_deref(),
        rows,
        &mut out,
        case.width,
        team,
    );
    thread::scope(|scope| {
        for _ in 1..team {
            scope.spawn(|| product.work());
        }
        product.work();
    });
    drop(product);
    out
}

/// A case in its type.
struct Given<T: 'static> {
    kind: &'static Type<T>,
    width: usize,
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    rows: Vec<T>,
}

impl<T: Number> Given<T> {
    fn of(case: &Case, kind: &'static Type<T>) -> Self {
        let narrow = |numbers: &Vec<f64>| numbers.iter().map(|&x| (kind.narrow)(x)).collect();
        Self {
            kind,
            width: case.width,
            weight: narrow(&case.weight),
            bias: case.bias.as_ref().map(narrow),
            rows: narrow(&case.rows),
        }
    }

    fn height(&self) -> usize {
        self.weight.len() / self.width
    }

    /// Every instruction set, team and number of rows gives the same bits, and they are near the sums in float64.
    fn check(&self) {
        let bits = |numbers: &[T]| -> Vec<u64> {
            numbers
                .iter()
                .map(|&x| (self.kind.widen)(x).to_bits())
                .collect()
        };
        let [portable, others @ ..] = &InstructionSet::available()[..] else {
            panic!("portable is always there")
        };
        let found = product(*portable, self, &self.rows, 1);
        for (row, rows) in self.rows.chunks(self.width).enumerate() {
            let alone = product(*portable, self, rows, 1);
            let beside = &found[row * self.height()..][..self.height()];
            assert_eq!(bits(&alone), bits(beside), "row {row}");
        }
        for isa in others {
            for team in [1, 2, 5] {
                let ours = product(*isa, self, &self.rows, team);
                assert_eq!(bits(&ours), bits(&found), "{}, {team}", isa.name());
            }
        }
        self.check_sums(&found);
    }

    fn check_sums(&self, found: &[T]) {
        let exact = |&x: &T| (self.kind.widen)(x);
        let mut found = found.iter().map(exact);
        for row in self.rows.chunks(self.width) {
            for (output, weight) in self.weight.chunks(self.width).enumerate() {
                let products = weight.iter().zip(row).map(|(w, x)| exact(w) * exact(x));
                let bias = self.bias.as_ref().map_or(0.0, |bias| exact(&bias[output]));
                let size = products.clone().map(f64::abs).sum::<f64>() + bias.abs();
                let sum = products.sum::<f64>() + bias;
                let steps = self.width.div_ceil(32) as f64 + 7.0;
                let error = size * steps * f64::from(f32::EPSILON) / 2.0;
                let allowed = error + (sum.abs() + error) * self.kind.rounding + self.kind.least;
                let ours = found.next().expect("an output for each");
                assert!((ours - sum).abs() <= allowed, "{ours} for {sum}");
            }
        }
        assert!(found.next().is_none());
    }
}

fn check(case: &Case) {
    Given::of(case, &F32).check();
    Given::of(case, &F16).check();
    Given::of(case, &BF16).check();
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1..200usize, 1..40usize, 0..19usize);
    sizes.prop_flat_map(|(width, height, rows)| {
        let numbers = |count| prop::collection::vec(-2.0..2.0f64, count);
        let bias = prop::option::of(numbers(height));
        (numbers(height * width), bias, numbers(rows * width)).prop_map(
            move |(weight, bias, rows)| Case {
                width,
                weight,
                bias,
                rows,
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_product_is_the_same_everywhere_and_near_float64(case in cases()) {
        check(&case);
    }
}

/// Parts of a team, widths of every remainder, and no outputs at all.
#[test]
fn sizes_at_which_something_changes() {
    let mut state = 1u64;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    for (width, height) in [
        (1, 1),
        (31, 3),
        (32, 0),
        (33, 700),
        (64, 1000),
        (576, 191),
        (1537, 6),
    ] {
        for rows in [1, 2, 3, 8, 9] {
            let numbers =
                |count, number: &mut dyn FnMut() -> f64| (0..count).map(|_| number()).collect();
            check(&Case {
                width,
                weight: numbers(width * height, &mut number),
                bias: (rows % 2 == 0).then(|| numbers(height, &mut number)),
                rows: numbers(width * rows, &mut number),
            });
        }
    }
}

/// One number that is none reaches the outputs it belongs to and no other.
#[test]
fn what_is_no_number_stays_in_its_row_and_output() {
    for isa in InstructionSet::available() {
        let (mut weight, mut rows) = (vec![1.0f32; 3 * 40], vec![1.0f32; 2 * 40]);
        (weight[40 + 39], rows[40 + 7]) = (f32::NAN, f32::INFINITY);
        let mut out = [0.0; 6];
        Product::new(isa, &weight, None, &rows, &mut out, 40, 1).work();
        assert_eq!(
            (out[0], out[2], out[3], out[5]),
            (40.0, 40.0, f32::INFINITY, f32::INFINITY)
        );
        assert!(out[1].is_nan() && out[4].is_nan());
    }
}
