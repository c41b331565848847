"""The growing cache against plain concatenation."""

from __future__ import annotations

import pytest
import torch
from offramp.llm.cache import GrowingCache, GrowingLayer
from transformers.cache_utils import DynamicLayer


def rows(count, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, count, 4, generator=generator), torch.randn(
        batch, 3, count, 4, generator=generator
    )


def test_it_holds_what_was_appended_whatever_the_pieces():
    layer = GrowingLayer()
    pieces = [rows(count, seed) for seed, count in enumerate((1, 5, 58, 1, 70, 300, 1))]
    for keys, values in pieces:
        held_keys, held_values = layer.update(keys, values)
    assert torch.equal(held_keys, torch.cat([keys for keys, _ in pieces], dim=2))
    assert torch.equal(held_values, torch.cat([values for _, values in pieces], dim=2))
    assert layer.get_seq_length() == held_keys.shape[2] == 436


def test_a_step_copies_only_its_own_rows():
    layer = GrowingLayer()
    layer.update(*rows(70, 0))
    before = layer.keys.data_ptr()
    layer.update(*rows(1, 1))
    assert layer.keys.data_ptr() == before


def test_cropping_forgets_the_newest():
    layer = GrowingLayer()
    keys, values = rows(10, 0)
    layer.update(keys, values)
    layer.crop(-3)
    more = rows(2, 1)
    held, _ = layer.update(*more)
    assert torch.equal(held, torch.cat([keys[:, :, :7], more[0]], dim=2))
    with pytest.raises(ValueError, match="negative"):
        layer.crop(4)


def test_rows_of_the_batch_can_be_kept_repeated_and_reordered():
    layer = GrowingLayer()
    keys, values = rows(4, 0, batch=3)
    layer.update(keys, values)
    layer.batch_select_indices(torch.tensor([2, 0]))
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert torch.equal(layer.values, values[[0, 2, 2, 0]])
    layer.reset()
    assert layer.get_seq_length() == 0
    held, _ = layer.update(keys, values)
    assert torch.equal(held, keys)


def test_layers_of_one_cache_have_their_own_lengths():
    cache = GrowingCache(3)
    cache.update(*rows(5, 0), 0)
    cache.update(*rows(2, 0), 2)
    assert [cache.length(layer) for layer in range(3)] == [5, 0, 2]
    assert cache.get_mask_sizes(4, 2) == (6, 0)
    cache.crop_to(0, 3, 3)
    assert [cache.length(layer) for layer in range(3)] == [3, 0, 2]


@pytest.mark.parametrize("own", [True, False])
def test_it_begins_anew_by_every_form_of_transformers_reset(monkeypatch, own):
    """That of 5.0, without a reset of `DynamicLayer`'s own, fills with zeros what an initialised layer holds."""
    if not own:
        monkeypatch.delattr(DynamicLayer, "reset", raising=False)
    layer = GrowingLayer()
    layer.update(*rows(5, 0))
    layer.reset()
    assert layer.keys is layer.values is None
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(*rows(3, 1))
    assert torch.equal(keys, rows(3, 1)[0])


def test_what_it_holds_is_seen_at_any_time_and_not_set():
    layer = GrowingLayer()
    assert layer.keys is layer.values is None
    keys, values = rows(5, 0)
    layer.update(keys, values)
    buffers = layer.reserve(2)
    for buffer, new in zip(buffers, rows(2, 1), strict=True):
        buffer[:, 5:7] = new.transpose(1, 2)
    assert torch.equal(layer.keys, keys), "what is only written is not there yet"
    layer.extend(2)
    assert torch.equal(layer.values, torch.cat([values, rows(2, 1)[1]], dim=2))
    for name in ("keys", "values"):
        with pytest.raises(ValueError, match="appended, not set"):
            setattr(layer, name, keys)
