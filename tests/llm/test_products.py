"""Linear maps over few rows: every product gives what ``functional.linear`` gives."""

from __future__ import annotations

import pytest
import torch
from offramp import _core
from offramp.llm import few, products
from tiny import steps_by_the_core

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def drawn(rows, dtype=torch.float32, biased=False, width=16):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(1, rows, width), (24, width), (24,)]
    hidden, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return hidden, weight, bias if biased else None


def exact(hidden, weight, bias):
    return torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The products of the core."""
    seen, own = [], _core.multiply_rows
    monkeypatch.setattr(_core, "multiply_rows", lambda *given: seen.append(given) or own(*given))
    return seen


@steps_by_the_core
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9, 16, 17])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [1, 16, 576])
def test_few_rows_are_multiplied_by_the_core(calls, dtype, rows, biased, width):
    given = drawn(rows, dtype, biased, width)
    found = products.linear(*given)
    ours = 0 < rows <= (16 if dtype is torch.float32 else 8)
    assert bool(calls) == ours
    assert found.is_contiguous()
    assert (found.dtype, found.shape) == (dtype, (1, rows, 24))
    # torch's own is not as near in float32.
    tolerance = {} if ours or dtype is not torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, exact(*given).to(dtype), **tolerance)


@steps_by_the_core
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_output_is_the_same_beside_whatever_rows(dtype):
    hidden, weight, bias = drawn(8, dtype, True, 100)
    together = products.linear(hidden, weight, bias)
    for row in range(8):
        alone = products.linear(hidden[:, row : row + 1], weight, bias)
        assert torch.equal(alone, together[:, row : row + 1])


@steps_by_the_core
def test_rows_and_weights_that_are_views(calls):
    hidden, weight, _ = drawn(4, width=32)
    views = hidden[..., ::2], weight[:, 16:], None
    torch.testing.assert_close(products.linear(*views), exact(*views).float())
    assert not calls, "a weight that is not in order is not read as if it were"
    rows = hidden.expand(2, 4, 32)[..., :16], weight[:, :16].contiguous(), None
    torch.testing.assert_close(products.linear(*rows), exact(*rows).float())
    assert calls


@steps_by_the_core
def test_what_the_core_cannot_read_is_left_to_torch(calls):
    hidden, weight, bias = drawn(2, biased=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(hidden, weight, bias).dtype == torch.bfloat16
    for wrong in (bias[:7], bias.repeat(2)):
        with pytest.raises(RuntimeError, match="size"):
            products.linear(hidden, weight, wrong)
    with pytest.raises(RuntimeError, match="shape"):
        products.linear(hidden[..., :9], weight, None)
    with pytest.raises(RuntimeError, match="dtype"):
        products.linear(hidden, weight.bfloat16(), None)
    assert products.linear(hidden.double(), weight.double(), None).dtype == torch.float64
    assert products.linear(hidden.to("meta"), weight.to("meta"), None).is_meta
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_halves_by_either_product_of_torch(monkeypatch, rows, dtype, biased):
    """Widened for the product, they are summed in float32 and rounded once."""
    hidden, weight, bias = drawn(rows, dtype, biased)
    monkeypatch.setattr(few, "IS_FAST", False)
    monkeypatch.setattr(products, "_PART", 7)
    for widens in (True, False):
        monkeypatch.setattr(products, "WIDENS_HALVES", widens)
        found = products.linear(hidden, weight, bias)
        torch.testing.assert_close(found, exact(hidden, weight, bias).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_gradients_come_through(wanted):
    hidden, weight, _ = drawn(1)
    {"hidden": hidden, "weight": weight}[wanted].requires_grad_()
    products.linear(hidden, weight, None).sum().backward()
    if wanted == "hidden":
        torch.testing.assert_close(hidden.grad[0, 0], weight.sum(dim=0))
    else:
        torch.testing.assert_close(weight.grad, hidden[0].expand(24, 16))


@steps_by_the_core
def test_a_weight_that_could_be_trained_is_read_where_nothing_is_learnt(calls):
    hidden, weight, _ = drawn(1)
    weight.requires_grad_()
    with torch.no_grad():
        products.linear(hidden, torch.nn.Parameter(weight), None)
    with torch.inference_mode():
        products.linear(hidden, weight, None)
    assert len(calls) == 2
