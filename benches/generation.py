"""Decoding beside its peers, in one run: `python benches/generation.py FOLDER --dtype bfloat16`.

FOLDER holds calibrated heads.  Every contender continues the same held-out prompts greedily at batch 1, in turns
prompt by prompt; ratios are medians over the prompts.  What the step gains (exits off, over transformers)
and what the exits gain (over exits off) are separate columns.  Before anything is timed, exits off and verify mode must
write what transformers writes, up to close calls.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from statistics import median

import offramp
import torch
from lossless import TIE, Comparison, compare
from offramp import machine
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.sequences import TokenSequence, encode_prompts

PLAIN, OFF = "transformers generate", "offramp, exits off"
EPS = (0.8, 0.9, 0.95)


def contenders(ee, tokens, peers):
    """Functions from prompt ids (1, P) to prompt and continuation (1, T)."""
    model, ask = ee.model, {"max_new_tokens": tokens, "do_sample": False}

    def own(ids, **more):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **ask, **more)

    def ours(mode, thresholds=None):
        return lambda ids: ee.generate(
            ids, attention_mask=torch.ones_like(ids), mode=mode, thresholds=thresholds, **ask
        )

    found = {PLAIN: own}
    if peers:
        middle = ee.layers[len(ee.layers) // 2]
        found[f"transformers assistant_early_exit={middle}"] = lambda ids: own(
            ids, assistant_early_exit=middle
        )
        found |= economize(ee, middle, tokens)
    found[OFF] = ours("off")
    for eps in EPS:
        found[f"offramp, exits at ε = {eps:g}"] = ours("exit", ee.calibration.at(eps))
        # The planner's choice among the same thresholds.
        found[f"offramp, planned exits at ε = {eps:g}"] = ours(
            "exit", ee.plan(eps, measure=0).exit.thresholds
        )
    found["offramp, verify"] = ours("verify", ee.plan(measure=0).verify.thresholds)
    found["offramp, verify, every exit"] = ours("verify", ee.calibration.thresholds)
    return found


def economize(ee, layer, tokens):
    """The two techniques of the package economize that exit early, untrained as it ships them."""
    if find_spec("economize") is None:
        print("economize is not installed and left out: pip install economize", file=sys.stderr)
        return {}
    from economize import apply
    from economize.techniques.dynamic_depth import CalmConfig
    from economize.techniques.early_exit import EarlyExitConfig

    def technique(config):
        def run(ids):
            # Attached for the call alone: the model is everyone's.
            attached = apply(ee.model, config)
            try:
                return attached.generate(ids, max_new_tokens=tokens, do_sample=False)
            finally:
                attached.detach()

        return run

    return {
        "economize early_exit": technique(EarlyExitConfig(exit_layer=layer, head="shared")),
        "economize calm": technique(CalmConfig(threshold=0.9, min_layer=layer)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--dtype", choices=TIE, default="float32")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    ee = offramp.EarlyExitModel.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    texts = shipped_prompts("held_out")[: arguments.prompts]
    prompts = encode_prompts(texts, ee.tokenizer, max_positions=8192)
    runs = contenders(ee, arguments.tokens, not arguments.no_peers)
    for name in (OFF, "offramp, verify"):
        check = Comparison()
        for ids in prompts[:2]:
            compare(ee.model, check, runs[name](ids[None])[0], runs[PLAIN](ids[None])[0], len(ids))
        assert not check.wrong(TIE[arguments.dtype]), f"{name} does not write what transformers writes"
    speed = {name: [] for name in runs}
    texts = {name: [] for name in runs}
    depths = {name: {} for name in runs}
    for turn, ids in enumerate([prompts[0], *prompts]):
        for name, run in runs.items():
            ee.last_stats = None
            start = time.perf_counter()
            text = run(ids[None])[0]
            seconds = time.perf_counter() - start
            if turn:
                speed[name].append((len(text) - len(ids)) / seconds)
                texts[name].append(TokenSequence(text.cpu(), len(ids)))
                for layer, count in (ee.last_stats.tokens_by_exit if ee.last_stats else {}).items():
                    depths[name][layer] = depths[name].get(layer, 0) + count
        print(f"{turn} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    rows = []
    for name in runs:
        agreeing, total = ee.agreement(texts[name])
        over = {
            base: median(a / b for a, b in zip(speed[name], speed[base], strict=True))
            for base in (PLAIN, OFF)
        }
        rows.append(
            {
                "name": name,
                "tokens_per_second": median(speed[name]),
                "over_transformers": over[PLAIN],
                "over_exits_off": over[OFF],
                "agreement": agreeing / total,
                "tokens_by_exit": depths[name],
            }
        )
    print(f"{'':44} tokens/s  x transformers  x exits off  agreement  tokens by layer")
    for row in rows:
        print(
            f"{row['name']:44} {row['tokens_per_second']:8.1f}  {row['over_transformers']:14.2f}"
            f"  {row['over_exits_off']:11.2f}  {row['agreement']:9.3f}  {row['tokens_by_exit'] or ''}"
        )
    print(
        json.dumps(
            {
                "rows": rows,
                "prompts": len(prompts),
                "new_tokens": arguments.tokens,
                "dtype": arguments.dtype,
                "threads": torch.get_num_threads(),
                "machine": machine.describe(),
            }
        )
    )


if __name__ == "__main__":
    main()
