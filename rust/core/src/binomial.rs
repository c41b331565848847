//! Exact binomial tails and what certificates need of them, rounded to the safe side, up to samples of 1e9 and more.
//!
//! Written here because no crate holds.  Against 40 digits of mpmath, at n = 1e8 and risks from .001 to .5: `statrs` 0.18
//! is off by up to 210% next to the mean and 2e-7 further down, `puruspe` 0.4 gives 0, `special` 0.11 is off by 4e-7
//! (3e-6 at 1e9), all of them to either side.  Here a tail is a sum of positive terms, each the one before times a
//! ratio, so nothing cancels: the first term is Loader's saddle-point form (C. Loader, Fast and accurate computation of
//! binomial probabilities, 2000), and what is left out of the sum lies below a geometric series, which bounds the tail
//! from both sides at every step.
//!
//! Error: the deviance of the first term is computed from `n p - k` with a single rounding, so its error is a few units
//! in the last place of a number below 700, or 1e-12; a sum of m terms adds at most 3 m units of 1.1e-16, and m stays
//! below nine standard deviations, 1.5e5 for n = 1e9: 5e-11.  [`SAFE`] is twenty times the sum of both.

/// Relative margin by which every p-value is enlarged and every evidence made smaller.
pub(crate) const SAFE: f64 = 1e-9;
/// No p-value is told to be smaller: below, exponentials lose digits.
const TINY: f64 = 1e-290;
/// How close the bounds of a sum come when nothing is decided sooner.
const CONVERGED: f64 = 1e-13;
/// Terms summed between two looks at what is left.
const TERMS: usize = 16;

/// The p-value of "the risk exceeds `alpha`" after `errors` among `n`: P(Bin(n, alpha) <= errors), rounded up.
pub fn p_value(errors: u64, n: u64, alpha: f64) -> f64 {
    rounded_up(bracket(errors, n, alpha, |_, _| false).1)
}

/// Whether that p-value is at most `delta`, found as soon as the sum's bounds decide it.
pub fn p_value_within(errors: u64, n: u64, alpha: f64, delta: f64) -> bool {
    let decided = |low, high| rounded_up(high) <= delta || rounded_up(low) > delta;
    rounded_up(bracket(errors, n, alpha, decided).1) <= delta
}

/// Clopper-Pearson: the lowest risk that `errors` among `n` refute at level `delta`, rounded up.
pub fn upper_bound(errors: u64, n: u64, delta: f64) -> f64 {
    if errors >= n {
        return 1.0;
    }
    let (mut low, mut high) = (errors as f64 / n as f64, 1.0f64);
    // Bisected by bits at first, so that bounds near 0 are found as fast as others.
    while high - low > CONVERGED * high {
        let middle = if low < high / 2.0 {
            f64::from_bits(low.to_bits().midpoint(high.to_bits()))
        } else {
            low.midpoint(high)
        };
        if middle <= low || middle >= high {
            break;
        }
        if p_value_within(errors, n, middle, delta) {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

/// Whether the evidence against "the risk exceeds `alpha`" reaches `1 / delta`.
///
/// The evidence is the likelihood ratio of a risk `r < alpha` against `alpha`, averaged over `r` with the density of
/// Beta(1, b) cut off at `alpha`, `b = (1 - alpha) / alpha`:
/// `W = B_alpha(1 + e, b + n - e) / B_alpha(1, b) / (alpha^e (1 - alpha)^(n - e))`.  With the series
/// `B_x(p, q) = x^p (1 - x)^q / p * sum over j of (p + q)_j / (p + 1)_j x^j` every power cancels,
/// `W = C / (e + 1) * sum over j of product over i <= j of alpha (n + b + i) / (e + 1 + i)`,
/// a sum of positive terms: broken off early it is too small, which is the safe side.
pub fn evidence_suffices(errors: u64, n: u64, alpha: f64, delta: f64) -> bool {
    let (e, n) = (errors as f64, n as f64);
    // At a risk of alpha or more, no risk below alpha is likelier.
    if n == 0.0 || alpha <= 0.0 || e >= alpha * n {
        return false;
    }
    // The average is at most the largest ratio, that of the risk observed.
    if largest_evidence(e, n, alpha) * (1.0 + SAFE) < -delta.ln() {
        return false;
    }
    let b = (1.0 - alpha) / alpha;
    let power = b * (-alpha).ln_1p();
    let constant = alpha * b * power.exp() / -power.exp_m1();
    let needed = (1.0 + SAFE) * (e + 1.0) / (constant * delta);
    if !needed.is_finite() {
        return false;
    }
    let (mut sum, mut term, mut i) = (1.0f64, 1.0f64, 0.0f64);
    loop {
        let mut ratio = 0.0;
        for _ in 0..TERMS {
            i += 1.0;
            ratio = alpha * (n + b + i) / (e + 1.0 + i);
            term *= ratio;
            sum += term;
        }
        if sum >= needed {
            return true;
        }
        // Ratios below 1 fall from here on, so a geometric series bounds the rest.
        if ratio < 1.0 && {
            let rest = term * ratio / (1.0 - ratio);
            sum + rest < needed || rest <= CONVERGED * sum
        } {
            return false;
        }
    }
}

/// The logarithm of the likelihood ratio of the risk `errors / n` against `alpha`, for 0 < alpha < 1.
fn largest_evidence(errors: f64, n: f64, alpha: f64) -> f64 {
    let lacking = n.mul_add(alpha, -errors);
    let of_errors = if errors > 0.0 {
        deviance(errors, n * alpha, -lacking)
    } else {
        lacking
    };
    of_errors + deviance(n - errors, n * (1.0 - alpha), lacking)
}

fn rounded_up(p: f64) -> f64 {
    (p * (1.0 + SAFE)).clamp(TINY, 1.0)
}

/// Bounds of P(Bin(n, p) <= k), brought closer until `decided(low, high)` or converged.
fn bracket(k: u64, n: u64, p: f64, decided: impl Fn(f64, f64) -> bool) -> (f64, f64) {
    if k >= n || p <= 0.0 {
        return (1.0, 1.0);
    }
    if p >= 1.0 {
        return (0.0, 0.0);
    }
    let odds = p / (1.0 - p);
    if (k as f64) < (n - k + 1) as f64 * odds {
        // Below the mode: from k downwards.
        let ratio = |j: f64| (k as f64 - j) / (((n - k + 1) as f64 + j) * odds);
        let first = mass(k, n, p);
        sum(first, k, ratio, decided)
    } else {
        // Above it: one minus what lies beyond, from k + 1 upwards.
        let from = k + 1;
        let ratio = |j: f64| ((n - from) as f64 - j) * odds / (from as f64 + 1.0 + j);
        let first = mass(from, n, p);
        let complement = |low: f64, high: f64| ((1.0 - high).max(0.0), (1.0 - low).max(0.0));
        let (low, high) = sum(first, n - from, ratio, |low, high| {
            let (low, high) = complement(low, high);
            decided(low, high)
        });
        complement(low, high)
    }
}

/// Bounds of `first * (1 + r(0) + r(0) r(1) + ...)` over `count` falling ratios.
fn sum(
    first: f64,
    count: u64,
    ratio: impl Fn(f64) -> f64,
    decided: impl Fn(f64, f64) -> bool,
) -> (f64, f64) {
    let (mut sum, mut term) = (1.0f64, 1.0f64);
    let (mut j, end) = (0.0f64, count as f64);
    loop {
        let next = ratio(j);
        // Just above the mode the first ratio can be 1 and bounds nothing yet.
        let rest = if next < 1.0 {
            term * next / (1.0 - next)
        } else {
            f64::INFINITY
        };
        let (low, high) = (first * sum, first * (sum + rest));
        if rest <= CONVERGED * sum || j >= end || decided(low, high) {
            return (low, high);
        }
        let stop = end.min(j + TERMS as f64);
        while j < stop {
            term *= ratio(j);
            sum += term;
            j += 1.0;
        }
    }
}

/// P(Bin(n, p) = k) for 0 < p < 1.
fn mass(k: u64, n: u64, p: f64) -> f64 {
    let (x, total) = (k as f64, n as f64);
    if k == 0 {
        return (total * (-p).ln_1p()).exp();
    }
    if k == n {
        return (total * p.ln()).exp();
    }
    // One rounding: both deviances hang on this difference.
    let lacking = total.mul_add(p, -x);
    let deviances =
        deviance(x, total * p, -lacking) + deviance(total - x, total * (1.0 - p), lacking);
    let corrections = stirling_error(n) - stirling_error(k) - stirling_error(n - k);
    let scale = 0.5 * (std::f64::consts::TAU.ln() + x.ln() + (-x / total).ln_1p());
    (corrections - deviances - scale).exp()
}

/// `x ln(x / mean) + mean - x`, given `excess = x - mean`.
fn deviance(x: f64, mean: f64, excess: f64) -> f64 {
    if excess.abs() >= 0.1 * (x + mean) {
        return x * (x / mean).ln() - excess;
    }
    let v = excess / (x + mean);
    let mut found = excess * v;
    let mut power = 2.0 * x * v;
    for j in 1.. {
        power *= v * v;
        let next = found + power / f64::from(2 * j + 1);
        if next == found {
            break;
        }
        found = next;
    }
    found
}

/// `ln n! - ((n + 1/2) ln n - n + ln(2 pi) / 2)` for n >= 1.
fn stirling_error(n: u64) -> f64 {
    const SMALL: [f64; 15] = [
        0.08106146679532726,
        0.0413406959554093,
        0.02767792568499834,
        0.020790672103765093,
        0.016644691189821193,
        0.013876128823070748,
        0.01189670994589177,
        0.010411265261972096,
        0.009255462182712733,
        0.00833056343336287,
        0.007573675487951841,
        0.00694284010720953,
        0.006408994188004207,
        0.0059513701127588475,
        0.005554733551962801,
    ];
    if let Some(&known) = (n as usize)
        .checked_sub(1)
        .and_then(|place| SMALL.get(place))
    {
        return known;
    }
    let n = n as f64;
    let square = n * n;
    let tail = 1.0 / 1188.0 / square;
    let tail = (1.0 / 1680.0 - tail) / square;
    let tail = (1.0 / 1260.0 - tail) / square;
    let tail = (1.0 / 360.0 - tail) / square;
    (1.0 / 12.0 - tail) / n
}
