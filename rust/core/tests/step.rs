//! A step on every instruction set: the same bits whoever works on it and beside whatever rows, near float64.

use half::{bf16, f16};
use offramp_core::InstructionSet;
use offramp_core::step::{
    Attention, Before, Finish, Heads, Layer, Linear, Machine, Norm, Number, Product, Rotary, Rows,
    Seen, Team, Weight,
};
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

/// A type, and how numbers become of it.
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

fn product<T: Number, W: Weight>(
    isa: InstructionSet,
    case: &Given<T, W>,
    rows: &[T],
    team: usize,
) -> Vec<T> {
    let mut out = vec![(case.kind.narrow)(7.0); rows.len() / case.width * case.height()];
    let linear = Linear {
        weight: &case.weight,
        scales: case.scales.as_deref(),
        bias: case.bias.as_deref(),
    };
    let product = Product::new(
        isa,
        &[linear],
        Finish::Store,
        Rows {
            numbers: rows,
            width: case.width,
            norm: None,
        },
        &mut out,
        team,
    );
    together(team, || product.work());
    drop(product);
    out
}

fn together(team: usize, work: impl Fn() + Sync) {
    thread::scope(|scope| {
        for _ in 1..team {
            scope.spawn(&work);
        }
        work();
    });
}

/// A case in its type, with a weight of the same or of whole numbers.
struct Given<T: 'static, W = T> {
    kind: &'static Type<T>,
    width: usize,
    weight: Vec<W>,
    wide: fn(W) -> f64,
    scales: Option<Vec<f32>>,
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
            wide: kind.widen,
            scales: None,
            bias: case.bias.as_ref().map(narrow),
            rows: narrow(&case.rows),
        }
    }
}

impl<T: Number> Given<T, i8> {
    /// Numbers between -2 and 2 as whole ones of all sizes, and scales that differ from row to row.
    fn scaled(case: &Case, kind: &'static Type<T>) -> Self {
        let Given { bias, rows, .. } = Given::of(case, kind);
        let height = case.weight.len() / case.width;
        Self {
            kind,
            width: case.width,
            weight: case.weight.iter().map(|x| (x * 64.0) as i8).collect(),
            wide: f64::from,
            scales: Some((0..height).map(|row| 0.01 + row as f32 / 1e4).collect()),
            bias,
            rows,
        }
    }
}

impl<T: Number, W: Weight> Given<T, W> {
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
                let scale = self.scales.as_ref().map_or(1.0, |all| all[output]);
                let weight = weight.iter().map(|&w| (self.wide)(w) * f64::from(scale));
                let products = weight.zip(row).map(|(w, x)| w * exact(x));
                let bias = self.bias.as_ref().map_or(0.0, |bias| exact(&bias[output]));
                let size = products.clone().map(f64::abs).sum::<f64>() + bias.abs();
                let sum = products.sum::<f64>() + bias;
                let scaled = f64::from(u8::from(self.scales.is_some()));
                let steps = self.width.div_ceil(32) as f64 + 7.0 + scaled;
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
    Given::scaled(case, &F32).check();
    Given::scaled(case, &F16).check();
    Given::scaled(case, &BF16).check();
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1..200usize, 1..40usize, 1..19usize);
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
    let mut number = noise(1);
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
        let linear = Linear {
            weight: &weight,
            scales: None,
            bias: None,
        };
        Product::new(
            isa,
            &[linear],
            Finish::Store,
            Rows {
                numbers: &rows,
                width: 40,
                norm: None,
            },
            &mut out,
            1,
        )
        .work();
        assert_eq!(
            (out[0], out[2], out[3], out[5]),
            (40.0, 40.0, f32::INFINITY, f32::INFINITY)
        );
        assert!(out[1].is_nan() && out[4].is_nan());
    }
}

/// Numbers in [-1, 1).
fn noise(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    }
}

fn drawn<T>(kind: &Type<T>, count: usize, number: &mut impl FnMut() -> f64) -> Vec<T> {
    (0..count).map(|_| (kind.narrow)(number())).collect()
}

/// What a number is after rounding to a type.
fn rounded<T>(kind: &Type<T>, x: f64) -> f64 {
    (kind.widen)((kind.narrow)(x))
}

fn close(ours: f64, exact: f64, allowed: f64) {
    assert!((ours - exact).abs() <= allowed, "{ours} for {exact}");
}

/// Runs on every instruction set and team, which have to agree to the bit; returns what they found in float64.
fn on_all<T: Number>(kind: &Type<T>, run: impl Fn(InstructionSet, usize) -> Vec<T>) -> Vec<f64> {
    let found: Vec<Vec<f64>> = InstructionSet::available()
        .into_iter()
        .flat_map(|isa| [(isa, 1), (isa, 3)])
        .map(|(isa, team)| run(isa, team).into_iter().map(kind.widen).collect())
        .collect();
    for other in &found {
        assert_eq!(other, &found[0]);
    }
    found[0].clone()
}

fn check_whole_block<T: Number>(kind: &Type<T>, width: usize, heights: [usize; 2], count: usize) {
    let mut number = noise(width as u64);
    let rows = drawn(kind, count * width, &mut number);
    let weights = heights.map(|height| drawn(kind, height * width, &mut number));
    let bias = drawn(kind, heights[1], &mut number);
    let scale = drawn(kind, width, &mut number);
    let total = heights[0] + heights[1];
    let linears = [
        Linear {
            weight: &weights[0],
            scales: None,
            bias: None,
        },
        Linear {
            weight: &weights[1],
            scales: None,
            bias: Some(&bias),
        },
    ];
    let norm = Norm {
        weight: &scale,
        eps: 1e-5,
    };
    let residual = drawn(kind, count * total, &mut number);
    let exact = |x: &T| (kind.widen)(*x);
    let normed: Vec<Vec<f64>> = rows
        .chunks(width)
        .map(|row| {
            let mean = row.iter().map(|x| exact(x).powi(2)).sum::<f64>() / width as f64;
            let unit = row
                .iter()
                .map(|x| rounded(kind, exact(x) / (mean + 1e-5).sqrt()));
            unit.zip(&scale)
                .map(|(x, w)| rounded(kind, x * exact(w)))
                .collect()
        })
        .collect();
    let product = |row: &[f64], linear: &Linear<'_, T>, output: usize| {
        let weight = &linear.weight[output * width..][..width];
        let sum: f64 = weight.iter().zip(row).map(|(w, x)| exact(w) * x).sum();
        sum + linear.bias.map_or(0.0, |bias| exact(&bias[output]))
    };
    // A rounding of the norm may fall the other way, and every one of the way adds up.
    let allowed = 4.0 * (width as f64).sqrt() * kind.rounding + 1e-5;
    let run = |finish: Finish<'_, T>, total: usize| {
        on_all(kind, |isa, team| {
            let mut out = vec![(kind.narrow)(7.0); count * total];
            let product = Product::new(
                isa,
                &linears,
                finish,
                Rows {
                    numbers: &rows,
                    width,
                    norm: Some(norm),
                },
                &mut out,
                team,
            );
            together(team, || product.work());
            drop(product);
            out
        })
    };
    for (finish, residual) in [
        (Finish::Store, None),
        (Finish::Add(&residual, 0.5), Some(&residual)),
    ] {
        let mut found = run(finish, total).into_iter();
        for (row, normed) in normed.iter().enumerate() {
            for output in 0..total {
                let (linear, at) = match output.checked_sub(heights[0]) {
                    None => (&linears[0], output),
                    Some(at) => (&linears[1], at),
                };
                let added = residual.map_or(0.0, |rows| exact(&rows[row * total + output]));
                let ours = found.next().expect("an output for each");
                let factor = if residual.is_some() { 0.5 } else { 1.0 };
                close(ours, product(normed, linear, at) * factor + added, allowed);
            }
        }
    }
    if heights[0] == heights[1] {
        let mut found = run(Finish::Gate, heights[0]).into_iter();
        for normed in &normed {
            for output in 0..heights[0] {
                let [gate, up] = [0, 1].map(|which| product(normed, &linears[which], output));
                let ours = found.next().expect("an output for each");
                close(
                    ours,
                    gate / (1.0 + (-gate).exp()) * up,
                    allowed * (1.0 + gate.abs() + up.abs()),
                );
            }
        }
    }
}

#[test]
fn rows_are_normed_before_and_added_or_gated_after() {
    for (width, heights) in [(40, [9, 9]), (64, [300, 300]), (33, [500, 7])] {
        for count in [1, 3, 9] {
            check_whole_block(&F32, width, heights, count);
            check_whole_block(&F16, width, heights, count);
            check_whole_block(&BF16, width, heights, count);
        }
    }
}

fn check_attention<T: Number>(
    kind: &Type<T>,
    heads: Heads,
    seen: usize,
    count: usize,
    turned: bool,
) {
    let Heads {
        wide, narrow, size, ..
    } = heads;
    let mut number = noise((seen + count) as u64);
    let projected = drawn(kind, count * (wide + 2 * narrow) * size, &mut number);
    let [cosines, sines] = [0; 2].map(|_| drawn(kind, count * size, &mut number));
    let partners: Vec<i64> = (0..size as i64)
        .map(|place| (place + size as i64 / 2) % size as i64)
        .collect();
    let [old_keys, old_values] = [0; 2].map(|_| drawn(kind, seen * narrow * size, &mut number));
    let scales = [0; 2].map(|_| drawn(kind, size, &mut number));
    let norm = |weight| Norm { weight, eps: 1e-5 };
    let norms = turned.then_some([norm(&scales[0][..]), norm(&scales[1][..])]);
    let rotary = turned.then_some(Rotary {
        cosines: &cosines,
        sines: &sines,
        partners: &partners,
    });
    let all = |old: &[T]| -> Vec<T> {
        let mut all = old.to_vec();
        all.resize((seen + count) * narrow * size, (kind.narrow)(9.0));
        all
    };
    let found = on_all(kind, |isa, team| {
        let (mut keys, mut values) = (all(&old_keys), all(&old_values));
        let mut out = vec![(kind.narrow)(7.0); count * wide * size];
        let attention = Attention::begin(
            isa,
            heads,
            &projected,
            Before { norms, rotary },
            (&mut keys, &mut values),
            seen,
            &mut out,
        );
        together(team, || attention.work());
        attention.finish();
        out.extend(keys);
        out.extend(values);
        out
    });
    let exact = |x: &T| (kind.widen)(*x);
    let head = |row: usize, number: usize| -> Vec<f64> {
        let start = (row * (wide + 2 * narrow) + number) * size;
        let own: Vec<f64> = projected[start..start + size].iter().map(exact).collect();
        if !turned || number >= wide + narrow {
            return own;
        }
        let mean = own.iter().map(|x| x * x).sum::<f64>() / size as f64;
        let scale = scales[usize::from(number >= wide)].iter().map(exact);
        let own: Vec<f64> = own
            .iter()
            .map(|x| rounded(kind, x / (mean + 1e-5).sqrt()))
            .zip(scale)
            .map(|(x, w)| rounded(kind, x * w))
            .collect();
        let turn = |place: usize| {
            let straight = rounded(kind, own[place] * exact(&cosines[row * size + place]));
            let other = own[partners[place] as usize];
            straight + rounded(kind, other * exact(&sines[row * size + place]))
        };
        (0..size).map(|place| rounded(kind, turn(place))).collect()
    };
    let place = |old: &[T], at: usize, narrow_head: usize, offset: usize| -> Vec<f64> {
        match at.checked_sub(seen) {
            None => old[(at * narrow + narrow_head) * size..][..size]
                .iter()
                .map(exact)
                .collect(),
            Some(row) => head(row, offset + narrow_head),
        }
    };
    let (mixed, kept) = found.split_at(count * wide * size);
    for row in 0..count {
        for query in 0..wide {
            let own = query / (wide / narrow);
            let end = seen + row + 1;
            let start = heads.window.map_or(0, |window| end.saturating_sub(window));
            let asked = head(row, query);
            let scores: Vec<f64> = (start..end)
                .map(|at| {
                    let key = place(&old_keys, at, own, wide);
                    let score: f64 = key.iter().zip(&asked).map(|(k, q)| k * q).sum();
                    (score * f64::from(heads.scaling)).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            for at in 0..size {
                let values = (start..end)
                    .map(|position| place(&old_values, position, own, wide + narrow)[at]);
                let sum: f64 = values
                    .zip(&scores)
                    .map(|(value, score)| value * score / total)
                    .sum();
                let ours = mixed[(row * wide + query) * size + at];
                let steps = if turned { 8.0 } else { 1.0 };
                close(ours, sum, steps * kind.rounding * (1.0 + sum.abs()) + 1e-5);
            }
        }
    }
    // What is kept: what there was, then the new positions.
    let kept = kept
        .chunks(kept.len() / 2)
        .zip([(&old_keys, wide), (&old_values, wide + narrow)]);
    for (kept, (old, offset)) in kept {
        for at in 0..seen + count {
            for number in 0..narrow {
                let expected = place(old, at, number, offset);
                // What was normed and turned may have been rounded the other way, four times.
                let copied = !turned || at < seen || offset != wide;
                let allowed = if copied { 0.0 } else { 8.0 * kind.rounding };
                for (ours, exact) in kept[(at * narrow + number) * size..].iter().zip(expected) {
                    close(*ours, exact, allowed * (1.0 + exact.abs()));
                }
            }
        }
    }
}

/// In the last block, at its end and beyond it, with more rows beside than are mixed together.
#[test]
fn a_row_attends_the_same_beside_others() {
    for (seen, window) in [(125, None), (253, Some(130)), (256, Some(3)), (0, None)] {
        let heads = Heads {
            wide: 6,
            narrow: 2,
            size: 24,
            scaling: 0.2,
            window,
        };
        let (count, whole) = (5, 10 * 24);
        let mut number = noise(seen as u64);
        let projected = drawn(&BF16, count * whole, &mut number);
        let kept: Vec<Vec<bf16>> = (0..2)
            .map(|_| drawn(&BF16, (seen + count) * 48, &mut number))
            .collect();
        for isa in InstructionSet::available() {
            let attend = |seen: usize, rows: &[bf16], kept: &mut [Vec<bf16>]| {
                let [keys, values] = kept else {
                    panic!("keys and values")
                };
                let end = (seen + rows.len() / whole) * 48;
                let mut out = vec![bf16::ZERO; rows.len() / whole * 144];
                let before = Before {
                    norms: None,
                    rotary: None,
                };
                let cache = (&mut keys[..end], &mut values[..end]);
                let attention = Attention::begin(isa, heads, rows, before, cache, seen, &mut out);
                attention.work();
                attention.finish();
                out
            };
            let together = attend(seen, &projected, &mut kept.clone());
            let mut kept = kept.clone();
            for (row, own) in projected.chunks(whole).enumerate() {
                let alone = attend(seen + row, own, &mut kept);
                assert_eq!(
                    alone,
                    together[row * 144..][..144],
                    "{}, {seen}, {row}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn attention_mixes_what_each_query_sees() {
    let heads = |wide, narrow, size, window| Heads {
        wide,
        narrow,
        size,
        scaling: 0.3,
        window,
    };
    for (heads, seen, count) in [
        (heads(9, 3, 64, None), 300, 1),
        (heads(4, 2, 64, Some(100)), 280, 9),
        (heads(4, 2, 16, None), 126, 5),
        (heads(9, 3, 64, None), 5, 4),
        (heads(4, 4, 40, None), 0, 3),
        (heads(6, 1, 8, Some(4)), 9, 5),
        (heads(2, 2, 33, Some(1)), 3, 1),
        (heads(10, 1, 32, None), 40, 9),
    ] {
        for turned in [false, true] {
            check_attention(&F32, heads, seen, count, turned);
            check_attention(&F16, heads, seen, count, turned);
            check_attention(&BF16, heads, seen, count, turned);
        }
    }
}

struct Threads(usize);

impl Team for Threads {
    fn size(&self) -> usize {
        self.0
    }

    fn run(&self, _parts: usize, work: &(dyn Fn() + Sync)) {
        together(self.0, work);
    }
}

/// A layer is its parts one after another: what they are is checked above, and by the layers of torch from Python.
fn check_layer<T: Number, W: Weight>(
    kind: &Type<T>,
    whole: fn(f64) -> W,
    scales: Option<&[f32]>,
    count: usize,
) {
    const WIDTH: usize = 40;
    const INNER: usize = 70;
    let heads = Heads {
        wide: 4,
        narrow: 2,
        size: 8,
        scaling: 0.3,
        window: None,
    };
    let mut number = noise(count as u64);
    let mut weight = |height: usize, width: usize| -> Vec<W> {
        (0..height * width).map(|_| whole(number())).collect()
    };
    let (projection, output) = (weight(64, WIDTH), weight(WIDTH, 32));
    let (gate, up, down) = (
        weight(INNER, WIDTH),
        weight(INNER, WIDTH),
        weight(WIDTH, INNER),
    );
    let linear = |weight, height| Linear {
        weight,
        scales: scales.map(|scales| &scales[..height]),
        bias: None,
    };
    let [before_attention, before_block] = [0; 2].map(|_| drawn(kind, WIDTH, &mut number));
    let norm = |weight| Norm { weight, eps: 1e-5 };
    let layer = Layer {
        before_attention: norm(&before_attention[..]),
        projections: vec![linear(&projection[..], 64)],
        norms: None,
        heads,
        output: linear(&output[..], WIDTH),
        before_block: norm(&before_block[..]),
        block: [linear(&gate[..], INNER), linear(&up[..], INNER)],
        down: linear(&down[..], WIDTH),
        residual: 0.5,
    };
    let rows: Vec<T> = drawn(kind, count * WIDTH, &mut number);
    let old: Vec<T> = drawn(kind, 3 * 16, &mut number);
    let room = || {
        let mut room = old.clone();
        room.resize((3 + count) * 16, (kind.narrow)(9.0));
        room
    };
    let run = |isa, team, picked: Option<&[usize]>| {
        let (mut keys, mut values) = (room(), room());
        let seen = Seen {
            keys: &mut keys,
            values: &mut values,
            count: 3,
        };
        let team = Threads(team);
        let machine = Machine { isa, team: &team };
        let found = layer.run(machine, rows.clone(), None, seen, picked);
        [found, keys, values].concat()
    };
    let found = on_all(kind, |isa, team| run(isa, team, None));
    let (last, kept) = (count - 1, count * WIDTH);
    let alone = on_all(kind, |isa, team| run(isa, team, Some(&[last])));
    assert_eq!(alone[..WIDTH], found[last * WIDTH..kept]);
    assert_eq!(alone[WIDTH..], found[kept..]);

    let machine = Machine {
        isa: InstructionSet::available()[0],
        team: &Threads(1),
    };
    let products = |linears: &[Linear<'_, T, W>], finish, numbers: &[T], width, norm| {
        let rows = Rows {
            numbers,
            width,
            norm,
        };
        machine.multiply(linears, finish, rows)
    };
    let (store, normed) = (Finish::Store, Some(layer.before_attention));
    let projected = products(&layer.projections, store, &rows, WIDTH, normed);
    let (mut keys, mut values) = (room(), room());
    let mut mixed = vec![(kind.narrow)(0.0); count * 32];
    let (before, buffers) = (
        Before {
            norms: None,
            rotary: None,
        },
        (&mut keys[..], &mut values[..]),
    );
    let attention = Attention::begin(
        machine.isa,
        heads,
        &projected,
        before,
        buffers,
        3,
        &mut mixed,
    );
    attention.work();
    attention.finish();
    let hidden = products(&[layer.output], Finish::Add(&rows, 0.5), &mixed, 32, None);
    let normed = Some(layer.before_block);
    let fed = products(&layer.block, Finish::Gate, &hidden, WIDTH, normed);
    let hidden = products(&[layer.down], Finish::Add(&hidden, 0.5), &fed, INNER, None);
    let parts: Vec<f64> = [hidden, keys, values]
        .concat()
        .into_iter()
        .map(kind.widen)
        .collect();
    assert_eq!(found, parts);
}

#[test]
fn a_layer_is_its_parts_one_after_another() {
    let scales: Vec<f32> = (1..=70).map(|row| row as f32 / 5e3).collect();
    let whole = |x: f64| (x * 127.0) as i8;
    for count in [1, 2, 9] {
        check_layer(&F32, F32.narrow, None, count);
        check_layer(&F16, F16.narrow, None, count);
        check_layer(&BF16, BF16.narrow, None, count);
        check_layer(&F32, whole, Some(&scales), count);
        check_layer(&BF16, whole, Some(&scales), count);
    }
}
