"""What rounding does to trained heads: `python benches/rounding.py FOLDER --table rounding.csv`.

The heads in FOLDER judge the model's own greedy answers to held-out prompts, as they were trained and rounded to eight
bits, and are timed as they are asked in decoding, after all layers of the model, in turns.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import offramp
import torch
from heads import worth
from offramp import decide
from offramp.evaluation.tables import write_csv
from offramp.llm.planning import measure_costs
from offramp.llm.prompts import prompts


def use(ee, bits):
    """Have the heads of a model rounded to so many bits, or not at all."""
    heads = copy.deepcopy(ee.heads)
    for layer in ee.layers:
        head = heads.after(layer)
        head.config = replace(head.config, bits=bits)
    ee.heads = heads


def judged(ee, texts, turns):
    """Rows of what heads are worth on texts either way, coverage at thresholds that suit each, and of their time."""
    taken = {None: [], 8: []}
    for _ in range(turns):
        for bits, costs in taken.items():
            use(ee, bits)
            costs.append(measure_costs(ee.trunk, ee.heads_in_use, partial(decide, tau=0.5)).heads)
    for bits, costs in taken.items():
        use(ee, bits)
        found = ee.score(texts)
        for number, layer in enumerate(ee.layers):
            scores, correct = found.scores[number], found.correct[number]
            yield {
                "bits": bits or "as trained",
                "layer": layer,
                "tokens": len(correct),
                "megabytes": ee.heads_in_use.after(layer).cost()["bytes"] / 1e6,
                "milliseconds": 1e3 * median(heads[number][0] for heads in costs),
                **worth(scores, correct),
            }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--prompts", type=int, help="held-out prompts; default: all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    everything = []
    for dtype in asked.dtypes.split(","):
        ee = offramp.EarlyExitModel.from_pretrained(asked.folder, dtype=dtype)
        texts = ee.continue_greedily(
            prompts("held_out")[: asked.prompts], max_new_tokens=asked.max_new_tokens
        )
        everything += [{"dtype": dtype} | row for row in judged(ee, texts, asked.turns)]
        write_csv(asked.table, everything)
        for row in everything[-2 * len(ee.layers) :]:
            print(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
