"""Kinds of heads on one corpus: `python benches/heads.py CACHE --heads mlp,adapter,adapter:2 --tokens 100000`.

Each kind is trained after every layer on the same text, which CACHE keeps, and judged twice: on the prompts held back
from training, as it goes, and at the end on the demo model's greedy answers of held-out topics, whole and cut short.
``adapter:2`` has two decoder layers, ``adapter:2@16384`` besides so long a shortlist.  Writes ``heads.csv``,
``heads-held-out.csv`` and a picture of each training into ``--output``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import offramp
import torch
from offramp.evaluation.tables import write_csv
from offramp.evaluation.training import plot_training
from offramp.llm.prompts import prompts
from offramp.llm.sequences import TokenSequence
from offramp.llm.training import COVERAGE_EPS


def head_of(name):
    """Read KIND[:DEPTH][@SHORTLIST]."""
    kind, _, listed = name.partition("@")
    kind, _, depth = kind.partition(":")
    return offramp.HeadConfig(kind, depth=int(depth or 1), shortlist=int(listed or 8192))


def watched(name, history):
    """Rows of a training as it went."""
    for item in history:
        row = {"head": name, "layer": item.layer, "tokens": item.tokens, "agreement": item.accuracy}
        for eps, share in zip(item.eps, item.coverage, strict=True):
            row[f"coverage_{100 * eps:.0f}"] = share
        yield row


def shortened(texts, longest):
    """Answers as they would stand had they been cut off after ``longest`` tokens."""
    return [TokenSequence(text.tokens[: text.prompt_length + longest], text.prompt_length) for text in texts]


def worth(scores, correct):
    """How often a head agrees, and what it takes at the thresholds that suit these very tokens."""
    found = {"agreement": float(correct.mean())}
    for eps in COVERAGE_EPS:
        tau = offramp.fast_calibrate(scores, correct, eps)
        found[f"coverage_{100 * eps:.0f}"] = float((scores.astype("float64") >= tau).mean())
    return found


def judged(name, ee, texts, longest, seconds):
    """Rows of what heads are worth on answers of that length; coverage at the thresholds that suit these."""
    texts = shortened(texts, longest)
    ended = sum(text.generated < longest for text in texts) / len(texts)
    found = ee.score(texts)
    for layer, scores, correct in zip(ee.layers, found.scores, found.correct, strict=True):
        row = {"head": name, "answer_tokens": longest, "tokens": len(correct), "ended": ended, "layer": layer}
        yield row | {"core_seconds": seconds} | worth(scores, correct)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", default="mlp,adapter,adapter:2")
    parser.add_argument("--layers", default="10,14,18,22,26")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=384)
    parser.add_argument("--prompts", type=int, help="held-out prompts; default: all")
    parser.add_argument("--answer-tokens", default="96,256", help="longest held-out answers, judged each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = offramp.load_model(asked.model, dtype=asked.dtype)
    layers = [int(layer) for layer in asked.layers.split(",")]
    lengths = [int(length) for length in asked.answer_tokens.split(",")]
    texts, going, ended = None, [], []
    for name in asked.heads.split(","):
        ee = offramp.EarlyExitModel(model, tokenizer, layers=layers, head=head_of(name))
        texts = texts or ee.continue_greedily(
            prompts("held_out")[: asked.prompts], max_new_tokens=max(lengths)
        )
        began = time.process_time()
        history = ee.train_heads(
            asked.tokens,
            max_new_tokens=asked.max_new_tokens,
            epochs=asked.epochs,
            batch_size=asked.batch_size,
            patience=None,
            cache=asked.cache,
        )
        going += watched(name, history)
        seconds = time.process_time() - began
        for longest in lengths:
            ended += judged(name, ee, texts, longest, seconds)
        plot_training(history, asked.output / f"{name.replace(':', '-').replace('@', '-')}.png")
        write_csv(asked.output / "heads.csv", going)
        write_csv(asked.output / "heads-held-out.csv", ended)
        for row in ended[-len(layers) * len(lengths) :]:
            print(
                ", ".join(
                    f"{key} {value:.3f}" if isinstance(value, float) else f"{value}"
                    for key, value in row.items()
                )
            )


if __name__ == "__main__":
    main()
