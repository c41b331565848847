"""Verify mode against the model's own greedy text: `python benches/lossless.py FOLDER --prompts 200 --tokens 128`.

FOLDER holds calibrated heads.  Equal means token for token; where a text differs, the full model's two largest logits
at the first difference must be closer than kernels round, and every such case is counted and shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field

import offramp
import torch
from offramp import machine
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.sequences import encode_prompts, left_pad

# Gap between the two largest logits under which another number of rows in a product may turn a choice around.
TIE = {"float32": 1e-4, "bfloat16": 0.25}


@dataclass
class Comparison:
    """How many texts are the same, and the gaps of those that part."""

    prompts: int = 0
    tokens: int = 0
    identical: int = 0
    drafted: int = 0
    rejected: int = 0
    gaps: list[float] = field(default_factory=list)

    def wrong(self, tie: float) -> int:
        """Texts that part where it was no close call."""
        return sum(gap >= tie for gap in self.gaps)


@torch.no_grad()
def gap_at(model, tokens):
    """How far apart the model's two largest logits are after these tokens (T,)."""
    first, second = model(input_ids=tokens[None]).logits[0, -1].float().topk(2).values
    return float(first - second)


def compare(model, found, mine, own, start):
    """Count one text, its new tokens from ``start`` on."""
    found.prompts += 1
    found.tokens += len(own) - start
    if torch.equal(mine, own):
        found.identical += 1
        return
    shared = min(len(mine), len(own))
    at = int((mine[:shared] == own[:shared]).long().argmin())
    found.gaps.append(gap_at(model, own[:at]))


def text_of(row, prompt, end):
    """A row (T,) up to the token that ends it."""
    ends = torch.isin(row[prompt:], torch.tensor(end)).nonzero().flatten()
    return row[: prompt + int(ends[0]) + 1] if len(ends) else row


def run(ee, ids, tokens, batch, say, eps=None):
    """Compare verify mode with transformers' greedy search on prompts (T,) each."""
    found = Comparison()
    end = ee.model.generation_config.eos_token_id
    end = end if isinstance(end, list) else [end]
    for start in range(0, len(ids), batch):
        rows = ids[start : start + batch]
        prompt, mask = left_pad(rows, pad=0)
        mask = torch.ones_like(prompt) if mask is None else mask
        ask = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False}
        own = ee.model.generate(prompt, **ask)
        mine = ee.generate(prompt, mode="verify", eps=eps, **ask)
        stats = ee.last_stats
        found.rejected += stats.rejected_drafts
        found.drafted += stats.tokens - stats.tokens_by_exit[ee.num_layers]
        for row, ours, theirs in zip(rows, mine, own, strict=True):
            padding = prompt.shape[1] - len(row)
            texts = [text_of(one[padding:], len(row), end) for one in (ours, theirs)]
            compare(ee.model, found, *texts, len(row))
        say(f"{found.prompts} prompts: {found.identical} identical, gaps of the others {found.gaps}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--eps", type=float, help="thresholds for this ε instead of the calibration's own")
    parser.add_argument("--dtype", choices=TIE, default="float32")
    arguments = parser.parse_args()
    ee = offramp.EarlyExitModel.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    texts = [text for split in ("held_out", "calibration", "training") for text in shipped_prompts(split)]
    ids = encode_prompts(texts[: arguments.prompts], ee.tokenizer, max_positions=8192)

    def say(line):
        print(line, file=sys.stderr, flush=True)

    found = run(ee, ids, arguments.tokens, arguments.batch, say, arguments.eps)
    tie = TIE[arguments.dtype]
    print(
        json.dumps(
            {
                "prompts": found.prompts,
                "new_tokens": found.tokens,
                "identical_texts": found.identical,
                "kept_drafts": found.drafted,
                "rejected_drafts": found.rejected,
                "gaps_at_first_difference": found.gaps,
                "tie": tie,
                "wrong": found.wrong(tie),
                "batch": arguments.batch,
                "dtype": arguments.dtype,
                "machine": machine.describe(),
            },
            indent=2,
        )
    )
    return int(found.wrong(tie) > 0)


if __name__ == "__main__":
    sys.exit(main())
