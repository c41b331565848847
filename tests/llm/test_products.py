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
@pytest.mark.parametrize("first", [None, 1, 2])
def test_float32_by_either_product(monkeypatch, rows, biased, first):
    hidden, weight, bias = drawn(rows, biased=biased)
    made = []
    by_columns = products._by_columns
    monkeypatch.setattr(products, "_AS_COLUMNS_FROM", first)
    monkeypatch.setattr(products, "_by_columns", lambda *given: made.append(given) or by_columns(*given))
    found = products.linear(hidden, weight, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(hidden, weight, bias))
    assert found.is_contiguous()
    assert bool(made) == (first is not None and first <= rows <= 8)


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


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_of_bfloat16_may_go_without_onednn(monkeypatch, rows, most, biased):
    hidden, weight, bias = drawn(rows, torch.bfloat16, biased)
    expected = torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    seen = watched(monkeypatch)
    monkeypatch.setattr(products, "_WITHOUT_ONEDNN", most)
    found = products.linear(hidden, weight, bias)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=1e-2, atol=1e-2)
    assert seen == [rows > most]
    assert torch.backends.mkldnn.enabled


def test_float32_keeps_onednn(monkeypatch):
    monkeypatch.setattr(products, "_WITHOUT_ONEDNN", 2)
    monkeypatch.setattr(products, "_AS_COLUMNS_FROM", None)
    seen = watched(monkeypatch)
    products.linear(*drawn(1))
    assert seen == [True]


def test_onednn_is_left_as_it_was_found(monkeypatch):
    """Turned on again when a product fails, and not at all where the user has turned it off."""
    monkeypatch.setattr(products, "_WITHOUT_ONEDNN", 2)
    hidden, weight, _ = drawn(1, torch.bfloat16)
    with pytest.raises(RuntimeError):
        products.linear(hidden, weight, torch.zeros(7, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.enabled
    with torch.backends.mkldnn.flags(enabled=False):
        products.linear(hidden, weight, None)
        assert not torch.backends.mkldnn.enabled


def watched(monkeypatch):
    """Whether oneDNN was on at each product."""
    seen, own = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda *given: seen.append(torch.backends.mkldnn.enabled) or own(*given),
    )
    return seen


def test_gradients_come_through(monkeypatch):
    monkeypatch.setattr(products, "_AS_COLUMNS_FROM", 1)
    hidden, weight, _ = (item.requires_grad_() if item is not None else None for item in drawn(1))
    products.linear(hidden, weight, None).sum().backward()
    torch.testing.assert_close(hidden.grad[0, 0], weight.detach().sum(dim=0))
    torch.testing.assert_close(weight.grad, hidden.detach()[0].expand(24, 16))
