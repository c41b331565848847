"""The compiled decision against the specification, bit for bit, and the specification against float64."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from offramp import _core, decide, reference, top2_margin

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": np.finfo(np.float32).max}


def normal(rng, size):
    return rng.standard_normal(size) * rng.choice([0.01, 0.3, 1.0, 3.0, 10.0]) + rng.choice([0, -5, 20, 500])


def like_a_model(rng, size):
    logits = rng.standard_normal(size) * 2.5 - 2
    logits[rng.integers(0, size, 1 + size // 2000)] += rng.uniform(0, 25, 1 + size // 2000)
    return logits


def ties(rng, size):
    return rng.integers(-3, 4, size) * rng.choice([0.5, 1.0, 7.0])


def tied_maximum(rng, size):
    logits = rng.standard_normal(size)
    logits[rng.integers(0, size, 3)] = logits.max() + rng.choice([0.0, 1.0])
    return logits


def equal(rng, size):
    return np.full(size, rng.choice([0.0, -0.0, 1.5, -80.0, 1e4]))


def masked(rng, size):
    logits = like_a_model(rng, size)
    logits[rng.random(size) < rng.choice([0.1, 0.9, 0.999])] = -np.inf
    logits[rng.integers(0, size)] = rng.standard_normal()
    return logits


def one_allowed(rng, size):
    logits = np.full(size, -np.inf)
    logits[rng.integers(0, size)] = rng.standard_normal() * 50
    return logits


def around_the_floor(rng, size):
    """Whole ranges below what counts, above it, and on both sides."""
    top = rng.choice([0.0, 12.5, -31.9, -33.0, 63.0, 64.0, 96.5, 300.0, -1000.0])
    floor = (0 if -32 <= top < 64 else 64 * np.rint(top / 64)) - 64
    logits = floor + rng.integers(-3, 4, size) * 2.0 ** rng.integers(-18, 2, size)
    side = rng.choice([-1, 0, 1], 1 + size // 1024).repeat(1024)[:size]
    logits = np.where(side, floor + side * abs(logits - floor), logits)
    logits[rng.integers(0, size)] = top
    return logits


def around_the_windows(rng, size):
    """A maximum at the edges of what is shifted alike, anywhere in the row."""
    edge = rng.choice([-96.0, -32.0, 64.0, 96.0]) * (1 + rng.integers(-2, 3) * 2.0**-23)
    spread = rng.choice([0.1, 5.0, 20.0, 60.0])
    return np.minimum(edge, edge - rng.exponential(spread, size) * (rng.random(size) < 0.9))


def rising(rng, size):
    """The first logits tell nothing about the maximum."""
    return np.linspace(rng.uniform(-300, 0), rng.uniform(0, 300), size) + rng.standard_normal(size)


def flat(rng, size):
    """One logit above equal ones that weigh as much as it does: the worst case for rounding."""
    logits = np.full(size, rng.uniform(-3, 3))
    logits[rng.integers(0, size)] += np.log(max(size - 1, 2)) + rng.uniform(-0.5, 0.5)
    return logits


def huge(rng, size):
    return rng.choice([-1.0, 1.0], size) * 10.0 ** rng.uniform(20, 38, size)


def tiny(rng, size):
    return rng.integers(-4, 5, size) * rng.choice([2.0**-149, 2.0**-133, 2.0**-24, 2.0**-126])


def any_bits(rng, size):
    return rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)


KINDS = {
    kind.__name__: kind
    for kind in (
        normal,
        like_a_model,
        ties,
        tied_maximum,
        equal,
        masked,
        one_allowed,
        around_the_floor,
        around_the_windows,
        rising,
        flat,
        huge,
        tiny,
        any_bits,
    )
}


def row(rng, kind, size, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        logits = np.asarray(KINDS[kind](rng, size))
        logits = np.where(np.isnan(logits), 0.0, np.minimum(logits, LARGEST[dtype]))
        return np.maximum(logits, -LARGEST[dtype], where=logits != -np.inf, out=logits).astype(DTYPES[dtype])


def exact(logits):
    """The margin in float64 (its own error is 1e-15 or so)."""
    descending = np.sort(logits.astype(np.float64))[::-1]
    gaps = descending - descending[0]
    return -np.expm1(gaps[1]) / np.exp(gaps[::-1]).sum() if len(gaps) > 1 else 1.0


def assert_within_stated_error(logits, margin):
    expected = exact(logits)
    assert abs(margin - expected) <= 2e-7
    assert abs(margin - expected) <= 6e-7 * expected + np.finfo(np.float32).smallest_subnormal


def yes_or_no(rows, dtype, tau):
    """The engine's form of the decision, on rows (B, V), with a threshold for all or for each."""
    bits = rows.view(np.uint16) if rows.itemsize == 2 else rows
    tokens, exits = np.full(len(rows), -1), np.empty(len(rows), bool)
    if np.ndim(tau) == 0:
        _core.exits_rows(bits, dtype, tau, tokens, exits)
    else:
        for row, own in enumerate(tau):
            one = slice(row, row + 1)
            _core.exits_rows(bits[one], dtype, own, tokens[one], exits[one])
    return tokens, exits


def around(margin):
    """A margin as a threshold, and the float64 numbers next to it."""
    margin = np.asarray(margin, np.float64)
    return np.nextafter(margin, -np.inf), margin, np.nextafter(margin, np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bulk(dtype, kind):
    rng = np.random.default_rng([ord(letter) for letter in dtype + kind])
    for size in (*range(1, 70), *rng.integers(70, 600, 60), *rng.integers(600, 6000, 8)):
        rows = np.stack([row(rng, kind, int(size), dtype) for _ in range(24 if size < 70 else 4)])
        token, margin = top2_margin(rows)
        expected_token, expected_margin = reference.top2_margin(rows)
        np.testing.assert_array_equal(token, expected_token)
        assert margin.tobytes() == expected_margin.tobytes()
        for logits, one in zip(rows, margin, strict=True):
            assert_within_stated_error(logits, float(one))
        assert top2_margin(rows[0]) == (token[0], margin[0])
        for tau in (*around(margin), float(np.median(margin))):
            named, exits = yes_or_no(rows, dtype, tau)
            np.testing.assert_array_equal(named, token)
            np.testing.assert_array_equal(exits, margin >= tau)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [4096, 32_000, 51_200, 128_256, 262_144, 300_000 - 15])
def test_vocabulary_sizes(dtype, base):
    """Every remainder of sixteen, blocks and ranges cut everywhere."""
    rng = np.random.default_rng(base)
    kinds = list(KINDS)
    for extra in range(16):
        logits = row(rng, kinds[extra % len(kinds)], base + extra, dtype)
        ours = token, margin = top2_margin(logits)
        assert ours == reference.top2_margin(logits)
        assert_within_stated_error(logits, margin)
        # Close below, what the two largest logits alone cannot reject; far above, what they can.
        for tau in (*map(float, around(margin)), 0.0, margin * 0.999, margin * 1.001, 0.5, 0.9999, 1.0):
            named, exits = yes_or_no(logits[None], dtype, tau)
            assert (named.tolist(), exits.tolist()) == ([token], [margin >= tau]), (logits.size, tau)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [151_936, 300_000 - 1])
def test_ties_for_the_maximum_anywhere_in_a_long_row(size, dtype):
    """At every place of blocks and ranges, for two and for three: the lowest wins, with margin 0."""
    rng = np.random.default_rng(size)
    logits = np.minimum(like_a_model(rng, size), 17.5).astype(DTYPES[dtype])
    edges = [edge + side for edge in (0, 16, 256, 1024, size // 2, size - size % 256) for side in (-1, 0, 1)]
    places = sorted({place % size for place in [*edges, size - 2, *rng.integers(0, size, 6).tolist()]})
    for at, first in enumerate(places):
        for second in places[at + 1 :]:
            tied = [first, second, int(rng.integers(second, size))][: 2 + (first + second) % 2]
            before = logits[tied]
            logits[tied] = 18.25
            assert top2_margin(logits) == (first, 0.0), tied
            for tau in (0.0, 5e-324):
                named, exits = yes_or_no(logits[None], dtype, tau)
                assert (named.tolist(), exits.tolist()) == ([first], [tau == 0.0]), tied
            logits[tied] = before
    logits[[size // 3, size - 1]] = 18.25
    assert reference.top2_margin(logits) == top2_margin(logits) == (size // 3, 0.0)


@st.composite
def rows_of_bits(draw):
    dtype = np.dtype(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    size = draw(st.integers(1, 600))
    few = hnp.arrays(np.int8, size, elements=st.integers(-40, 40)).map(lambda a: a.astype(dtype))
    bits = hnp.arrays(f"u{dtype.itemsize}", size, elements=st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    logits = draw(st.one_of(few, bits.map(lambda a: a.view(dtype))))
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        usable = ~(np.isnan(logits) | (logits == np.inf))
    logits = np.where(usable, logits, np.zeros((), dtype))
    if (logits == -np.inf).all():
        logits[draw(st.integers(0, size - 1))] = 1
    return logits


@given(rows_of_bits(), st.floats(0, 1))
@settings(max_examples=1000)
def test_any_row(logits, tau):
    assert decide(logits, tau) == reference.decide(logits, tau)


@pytest.mark.parametrize("depth", np.linspace(7.9, 13.4, 56))
def test_stated_error_where_rounding_is_worst(depth):
    """Equal logits `depth` below the maximum, together as likely as it: every term errs the same way."""
    size = 1 + round(np.exp(depth))
    for shift in np.linspace(-30, 30, 13):
        logits = np.full(size, shift, dtype=np.float32)
        logits[size // 3] = shift + depth
        ours = top2_margin(logits)
        assert ours == reference.top2_margin(logits)
        assert_within_stated_error(logits, ours[1])


def test_exp_is_as_exact_as_stated():
    """One term against float64: two logits, so the margin gives the term back."""
    gaps = np.concatenate([np.linspace(0, 31.9, 20_001), np.logspace(-7, 0, 2_000)]).astype(np.float32)
    rows = np.stack([np.zeros_like(gaps), -gaps], axis=1)
    _, margin = top2_margin(rows)
    exp = np.exp(-gaps.astype(np.float64))
    np.testing.assert_allclose(margin, -np.expm1(-gaps.astype(np.float64)) / (1 + exp), rtol=1.5e-7, atol=0)
