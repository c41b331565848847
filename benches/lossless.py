"""Verify mode against the model's own greedy text: `python benches/lossless.py FOLDER --prompts 200 --tokens 128`.

FOLDER holds calibrated heads.  Equal means token for token; where a text differs, the full model's two largest logits
at the first difference must be closer than kernels round, and every such case is counted and shown.  With
``--output FILE`` every text's result is kept there as it comes, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import offramp
import torch
from offramp import machine
from offramp.evaluation.tables import write_csv
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.sequences import encode_prompts, left_pad

# Gap between the two largest logits under which another number of rows in a product may turn a choice around.  On
# SmolLM2 in bfloat16, whose logits of 16 to 32 are 0.125 apart, such gaps moved by up to 0.625 (120 positions).
TIE = {"float32": 1e-4, "bfloat16": 0.75}
# The model's own texts are written in batches, which is several times faster.
_OWN = 20


@torch.no_grad()
def gap_at_difference(model, mine, own):
    """How far apart the model's two largest logits are where two texts (T,) part; ``None`` for equal ones."""
    if torch.equal(mine, own):
        return None
    differ = (mine[: len(own)] != own[: len(mine)]).nonzero()
    if not len(differ):
        # One goes on where the other ended, which rounding does not explain.
        return math.inf
    at = int(differ[0])
    first, second = model(input_ids=own[None, :at]).logits[0, -1].float().topk(2).values
    return float(first - second)


def written(generate, ids, tokens, end):
    """Prompts (T,) and their greedy continuations up to the token that ends them, from one left-padded batch."""
    prompt, mask = left_pad(ids, pad=0)
    mask = torch.ones_like(prompt) if mask is None else mask
    texts = generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    for row, start in zip(texts, ids, strict=True):
        text = row[prompt.shape[1] - len(start) :]
        ends = torch.isin(text[len(start) :], torch.tensor(end)).nonzero().flatten()
        yield text[: len(start) + int(ends[0]) + 1] if len(ends) else text


def compare(ee, ids, tokens, batch=1, **settings):
    """One result a prompt (T,): verify mode, ``batch`` prompts at a time, beside transformers' greedy search."""
    end = ee.model.generation_config.eos_token_id
    end = end if isinstance(end, list) else [end]

    def verified(prompt, **ask):
        return ee.generate(prompt, mode="verify", **settings, **ask)

    for start in range(0, len(ids), _OWN):
        group = ids[start : start + _OWN]
        own = list(written(ee.model.generate, group, tokens, end))
        for first in range(0, len(group), batch):
            rows = group[first : first + batch]
            mine = list(written(verified, rows, tokens, end))
            stats = ee.last_stats
            drafts = stats.tokens - stats.tokens_by_exit[ee.num_layers]
            for place, text in enumerate(mine):
                yield {
                    "new_tokens": len(text) - len(rows[place]),
                    "gap": gap_at_difference(ee.model, text, own[first + place]),
                    # Of a batch, told once.
                    "kept_drafts": 0 if place else drafts,
                    "rejected_drafts": 0 if place else stats.rejected_drafts,
                }


def summary(results, tie):
    """What the results come to; ``wrong`` counts texts that part where it was no close call."""
    gaps = [item["gap"] for item in results if item["gap"] is not None]
    sums = {
        name: sum(item[name] for item in results) for name in ("new_tokens", "kept_drafts", "rejected_drafts")
    }
    return {
        "prompts": len(results),
        **sums,
        "identical_texts": len(results) - len(gaps),
        "gaps_at_first_difference": gaps,
        "tie": tie,
        "wrong": sum(gap >= tie for gap in gaps),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--eps", type=float, help="thresholds for this ε instead of the calibration's own")
    parser.add_argument("--dtype", choices=TIE, default="float32")
    parser.add_argument("--output", type=Path, help="file of results, which an interrupted run continues")
    parser.add_argument("--table", type=Path, help="file the sums are written to, as CSV")
    arguments = parser.parse_args()
    ee = offramp.EarlyExitModel.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    texts = [text for split in ("held_out", "calibration", "training") for text in shipped_prompts(split)]
    ids = encode_prompts(texts[: arguments.prompts], ee.tokenizer, max_positions=8192)
    kept = arguments.output
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    # Batches are whole again after an interruption.
    results = results[: len(results) // arguments.batch * arguments.batch]
    for found in compare(ee, ids[len(results) :], arguments.tokens, arguments.batch, eps=arguments.eps):
        results.append(found)
        if kept:
            kept.write_text("".join(json.dumps(item) + "\n" for item in results))
        gaps = [item["gap"] for item in results if item["gap"] is not None]
        print(f"{len(results)} prompts, gaps of those that part {gaps}", file=sys.stderr, flush=True)
    told = summary(results, TIE[arguments.dtype])
    settings = {"batch": arguments.batch, "eps": arguments.eps, "dtype": arguments.dtype}
    if arguments.table:
        gaps = " ".join(f"{gap:.2g}" for gap in told["gaps_at_first_difference"])
        write_csv(arguments.table, [told | settings | {"gaps_at_first_difference": gaps}])
    print(json.dumps(told | settings | {"machine": machine.describe()}, indent=2))
    return int(told["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
