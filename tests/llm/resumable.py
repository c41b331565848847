"""A whole training, corpus included, that may be killed at any moment; run alone or as one of several processes.

``python resumable.py FOLDER`` prints a line a step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from offramp.llm.data import CorpusPlan, prepare_corpus
from offramp.llm.heads import HeadConfig
from offramp.llm.processes import Processes
from offramp.llm.training import Trainer, TrainingConfig, build_heads
from offramp.llm.trunk import Trunk
from tiny import make_model


class Measured(Trainer):
    """Notes how large the first step's gradient was."""

    first_gradient: float | None = None

    def train_step(self, numbers):
        super().train_step(numbers)
        if self.first_gradient is None:
            self.first_gradient = float(torch.cat([p.grad.flatten() for p in self.parameters]).norm())


def train(folder: Path, progress=None, processes=None) -> Measured:
    trunk = Trunk(make_model())
    trunk.prove((2, 4))
    generator = torch.Generator().manual_seed(5)
    starts = [torch.randint(6, 89, (3 + row % 5,), generator=generator) for row in range(150)]
    processes = processes or Processes()
    if not processes.first:
        processes.wait()
    corpus = prepare_corpus(
        trunk, CorpusPlan((2, 4), 2000, 8, 9), folder / "corpus", prompts=starts, progress=progress
    )
    heads = build_heads(trunk, corpus, HeadConfig.for_layers(HeadConfig("adapter", shortlist=50), (2, 4)), 4)
    if "DISAGREE" in os.environ:
        # As a head might that is drawn without a seed.
        torch.nn.init.ones_(heads.after(2).linear.bias)
    if processes.first:
        processes.wait()
    config = TrainingConfig(epochs=2, batch_size=64, seed=4, precision="float32")
    trainer = Measured(trunk, heads, corpus, config, folder=folder, checkpoint_seconds=0, processes=processes)
    trainer.run(progress)
    return trainer


def disagree(trainer):
    """Metrics of a process in which every head agrees more from time to time."""
    return [replace(item, accuracy=trainer.step / 1e6) for item in WATCH(trainer)]


WATCH = Trainer.watch

if __name__ == "__main__":
    torch.set_num_threads(1)
    mine = Processes()
    if "DISAGREE" in os.environ:
        Trainer.watch = disagree
    done = train(Path(sys.argv[1]), lambda stage, at, _total: print(stage, at, flush=True), mine)
    heads = b"".join(tensor.numpy().tobytes() for tensor in done.heads.own_state().values())
    print("heads", hashlib.sha256(heads).hexdigest(), flush=True)
    print("gradient", done.first_gradient, flush=True)
    if mine.first:
        print("history", json.dumps([asdict(item) for item in done.history]), flush=True)
