"""Tiny random Llama models, with heads trained for a moment: seconds, not minutes."""

from __future__ import annotations

import numpy as np
import offramp
import pytest
import torch
from tiny import VOCAB, make_model


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, VOCAB, (30,), generator=generator) for _ in range(60)]


@pytest.fixture(scope="session")
def trained(model, texts):
    """Exits after layers 1, 3 and 5 of 6, calibrated on the training text (it is the same random text)."""
    ee = offramp.EarlyExitModel(model, None, layers=(1, 3, 5), head=offramp.HeadConfig("mlp", shortlist=60))
    ee.train_heads(sequences=texts, epochs=4, batch_size=64, seed=3)
    ee.calibrate(0.5, sequences=texts)
    return ee


@pytest.fixture(scope="session")
def thresholds(trained, texts):
    """Thresholds at which each head takes a good share of the tokens, whatever its accuracy."""
    scores = trained.score(texts).scores
    return [float(np.quantile(row, share)) for row, share in zip(scores, (0.75, 0.6, 0.5), strict=True)]


@pytest.fixture
def prompts():
    """A ragged batch, padded on the left: ids and mask."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, VOCAB, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 5, 1)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return ids, mask
