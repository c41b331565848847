//! The search beside the sort of all samples, and one read of them, on friendly and on hostile data.
//!
//! `cargo bench` times them; `cargo test` runs each once on little data, to see that all find the same.
//! `cargo bench -- 100000000 uniform` times other sizes (ten million without a number) and only the rows named.

use offramp_core::{
    InstructionSet, Method, Rule, Run, fast_calibrate, sort_by_score, threshold_curve,
};
use std::hint::black_box;
use std::time::Instant;

const EPS: f64 = 0.9;
/// Rounds that are timed.
const ROUNDS: usize = 7;

/// Splitmix64 as numbers in [0, 1).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// How a uniform number becomes a score.
type Score = fn(f64) -> f64;

/// Which samples are correct.
enum Flags {
    /// By the score.
    At(fn(f64, &mut Noise) -> bool),
    /// By the place in ascending order, and the number of places.
    Rank(fn(usize, usize) -> bool),
}

const ROWS: &[(&str, Score, Flags)] = &[
    ("uniform", |x| x, Flags::At(calibrated)),
    ("coin", |x| x, Flags::At(|_, noise| noise.next() < 0.5)),
    ("all right", |x| x, Flags::At(|_, _| true)),
    ("all wrong", |x| x, Flags::At(|_, _| false)),
    (
        "random walk around eps",
        |x| x,
        Flags::At(|_, noise| noise.next() < EPS),
    ),
    (
        "crossing at every rank",
        |x| x,
        Flags::Rank(|rank, _| rank % 10 != 9),
    ),
    (
        "two values",
        |x| x.round(),
        Flags::At(|_, noise| noise.next() < 0.89),
    ),
    (
        "twenty values",
        |x| (x * 20.0).round() / 20.0,
        Flags::At(calibrated),
    ),
    ("all equal", |_| 0.5, Flags::At(calibrated)),
    (
        "crowded at one",
        |x| 1.0 - x.powi(8) / 64.0,
        Flags::At(|score, noise| calibrated(64.0 * score - 63.0, noise)),
    ),
    ("sawtooth", |x| x, Flags::Rank(|rank, _| rank % 1000 < 900)),
    (
        "growing sawtooth",
        |x| x,
        Flags::Rank(|rank, of| (100.0 * rank as f64 / of as f64).sqrt().fract() < EPS),
    ),
    (
        "one right below a wrong half",
        |x| x,
        Flags::Rank(|rank, of| rank > of / 2 || rank == of / 3),
    ),
];

/// Scores that mean what they say, from one half up.
fn calibrated(score: f64, noise: &mut Noise) -> bool {
    noise.next() < 0.5 + 0.5 * score
}

/// Samples of a row, in random order.
fn samples(score: Score, flags: &Flags, size: usize) -> (Vec<f32>, Vec<u8>) {
    let mut noise = Noise(size as u64);
    let scores: Vec<f32> = (0..size).map(|_| score(noise.next()) as f32).collect();
    let correct = match flags {
        Flags::At(flag) => scores
            .iter()
            .map(|&score| u8::from(flag(score.into(), &mut noise)))
            .collect(),
        Flags::Rank(flag) => {
            let key = |place: usize| u64::from(scores[place].to_bits()) << 32 | place as u64;
            let mut order: Vec<u64> = (0..size).map(key).collect();
            order.sort_unstable();
            let mut correct = vec![0; size];
            for (rank, &place) in order.iter().enumerate() {
                correct[place as u32 as usize] = u8::from(flag(rank, size));
            }
            correct
        }
    };
    (scores, correct)
}

/// The floor: both inputs read once.
fn read(scores: &[f32], correct: &[u8], run: &Run) -> f64 {
    let piece = scores.len().div_ceil(run.threads());
    let pieces = scores.chunks(piece).zip(correct.chunks(piece)).collect();
    let sums = run.map(pieces, |(scores, correct): (&[f32], &[u8])| {
        let scores = scores.iter().fold(0, |sum, score| sum ^ score.to_bits());
        let correct = correct.iter().fold(0, |sum, flag| sum ^ flag);
        scores ^ u32::from(correct)
    });
    sums.map_or(f64::NAN, |sums| {
        f64::from(sums.into_iter().fold(0, |sum, part| sum ^ part))
    })
}

type Contender<'a> = (String, Box<dyn Fn() -> f64 + 'a>);

fn contenders<'a>(scores: &'a [f32], correct: &'a [u8], eps: &'a [f64]) -> Vec<Contender<'a>> {
    let mut contenders: Vec<Contender> = vec![(
        "one read".into(),
        Box::new(|| read(scores, correct, &Run::on(0))),
    )];
    let searches = InstructionSet::available()
        .into_iter()
        .flat_map(|isa| [(isa, Method::Fastest, 1), (isa, Method::Fastest, 0)])
        .chain([(InstructionSet::best(), Method::Sort, 0)]);
    for (isa, method, threads) in searches {
        let name = match method {
            Method::Sort => "sort".into(),
            Method::Fastest => format!(
                "{}{}",
                isa.name(),
                if threads == 1 { ", one thread" } else { "" }
            ),
        };
        contenders.push((
            name,
            Box::new(move || {
                let run = Run::on(threads)
                    .with_method(method)
                    .with_instruction_set(isa);
                fast_calibrate(scores, correct, eps, Rule::Set, &run).expect("valid")[0]
            }),
        ));
    }
    contenders.push((
        "sort_by_score".into(),
        Box::new(|| {
            f64::from(
                sort_by_score(scores, correct, &Run::on(0))
                    .expect("valid")
                    .0[0],
            )
        }),
    ));
    contenders.push((
        "threshold_curve".into(),
        Box::new(|| {
            threshold_curve(scores, correct, &Run::on(0))
                .expect("valid")
                .thresholds[0]
        }),
    ));
    contenders
}

/// The median and the least of the seconds of each contender, all run in turn.
fn times(contenders: &[Contender]) -> Vec<(f64, f64)> {
    let mut seconds = vec![Vec::new(); contenders.len()];
    for _ in 0..ROUNDS {
        for ((_, run), seconds) in contenders.iter().zip(&mut seconds) {
            let start = Instant::now();
            black_box(run());
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds
        .into_iter()
        .map(|mut seconds| {
            seconds.sort_by(f64::total_cmp);
            (seconds[seconds.len() / 2], seconds[0])
        })
        .collect()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let timing = arguments.iter().any(|argument| argument == "--bench");
    let number = arguments.iter().find_map(|argument| argument.parse().ok());
    let size = if timing {
        number.unwrap_or(10_000_000)
    } else {
        20_000
    };
    let named = |name: &str| arguments.iter().any(|argument| argument == name);
    let any = ROWS.iter().any(|(name, ..)| named(name));
    for (name, score, flags) in ROWS.iter().filter(|(name, ..)| !any || named(name)) {
        let (scores, correct) = samples(*score, flags, size);
        let contenders = contenders(&scores, &correct, &[EPS]);
        let found: Vec<f64> = contenders.iter().map(|(_, run)| run()).collect();
        let searches = contenders
            .iter()
            .zip(&found)
            .filter(|((name, _), _)| !name.contains("read") && !name.contains('_'));
        for ((contender, _), found_by) in searches {
            assert_eq!(*found_by, found[1], "{contender} on {name}");
        }
        if timing {
            println!("{name}, N = {size}: median and least milliseconds, the least in reads");
            let times = times(&contenders);
            for ((contender, _), (median, least)) in contenders.iter().zip(&times) {
                let reads = least / times[0].1;
                println!(
                    "  {contender:20} {:9.3} {:9.3} {reads:7.2}",
                    1e3 * median,
                    1e3 * least
                );
            }
        }
    }
}
