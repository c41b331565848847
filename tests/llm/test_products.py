"""Linear maps over few rows: every product gives what ``functional.linear`` gives."""

from __future__ import annotations

import pytest
import torch
from offramp.llm import products


def drawn(rows, dtype=torch.float32, biased=False):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(1, rows, 16), (24, 16), (24,)]
    hidden, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return hidden, weight, bias if biased else None


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_float32_by_either_product(monkeypatch, rows, biased, columns):
    hidden, weight, bias = drawn(rows, biased=biased)
    made = []
    by_columns = products._by_columns
    monkeypatch.setattr(products, "_columns_pay", lambda *_: columns)
    monkeypatch.setattr(products, "_by_columns", lambda *given: made.append(given) or by_columns(*given))
    found = products.linear(hidden, weight, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(hidden, weight, bias))
    assert rows > 1 or found.is_contiguous()
    assert bool(made) == (columns and 1 <= rows <= 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_halves_by_either_product(monkeypatch, rows, dtype, biased):
    """Widened for the product, they are summed in float32 and rounded once."""
    hidden, weight, bias = drawn(rows, dtype, biased)
    expected = torch.nn.functional.linear(hidden.double(), weight.double()).to(dtype)
    expected = expected if bias is None else expected + bias
    monkeypatch.setattr(products, "_PART", 7)
    monkeypatch.setattr(products, "_WIDE", 24)
    for widens, units in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(products, "WIDENS_HALVES", widens)
        monkeypatch.setattr(products, "MATRIX_UNITS", units)
        torch.testing.assert_close(products.linear(hidden, weight, bias), expected, rtol=1e-2, atol=1e-2)


def test_gradients_come_through(monkeypatch):
    monkeypatch.setattr(products, "_columns_pay", lambda *_: True)
    hidden, weight, _ = (item.requires_grad_() if item is not None else None for item in drawn(1))
    products.linear(hidden, weight, None).sum().backward()
    torch.testing.assert_close(hidden.grad[0, 0], weight.detach().sum(dim=0))
    torch.testing.assert_close(weight.grad, hidden.detach()[0].expand(24, 16))


def test_the_faster_product_is_found_once(monkeypatch):
    """By the clock: a product that sleeps loses."""
    products._columns_pay.cache_clear()
    clock = iter(range(1000)).__next__
    monkeypatch.setattr(products.time, "perf_counter", lambda: float(clock()))
    slow = lambda rows, weight: [clock() for _ in range(9)] and weight  # noqa: E731
    monkeypatch.setattr(products.functional, "linear", slow)
    monkeypatch.setattr(products, "_by_columns", lambda rows, weight: weight)
    assert products._columns_pay(4, 1)
    asked = clock()
    assert products._columns_pay(4, 1)
    assert clock() == asked + 1
    monkeypatch.setattr(products.functional, "linear", lambda rows, weight: weight)
    assert not products._columns_pay(1, 1)
    products._columns_pay.cache_clear()
