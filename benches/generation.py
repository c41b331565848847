"""Whole generations beside their peers, in one run: `python benches/generation.py FOLDER`.

FOLDER holds calibrated heads.  Every contender continues the same held-out prompts greedily at batch 1, in turns
prompt by prompt, prefill included; ratios are medians over the prompts.  What the step gains (exits off, over
transformers) and what exits gain (over exits off) stand in columns of their own.  Nothing is timed before exits off and
verify mode have written what transformers writes, up to close calls.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median

import offramp
import torch
from lossless import TIE, gap_at_difference
from offramp import machine
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.sequences import TokenSequence, encode_prompts

PLAIN, OFF, VERIFY = "transformers generate", "offramp, exits off", "offramp, verify"


@dataclass
class Race:
    """What one contender did: new tokens a second of each prompt, its texts, and its tokens by layer."""

    speed: list[float] = field(default_factory=list)
    texts: list[TokenSequence] = field(default_factory=list)
    depths: dict[int, int] = field(default_factory=dict)

    def over(self, other):
        """How many times as fast as another contender, the median over the prompts."""
        return median(one / two for one, two in zip(self.speed, other.speed, strict=True))


def contenders(ee, tokens, eps):
    """Functions from prompt ids (1, P) to prompt and continuation (1, T): transformers, and ours in every mode."""

    def ours(mode, thresholds=None):
        return lambda ids: ee.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            mode=mode,
            thresholds=thresholds,
            max_new_tokens=tokens,
            do_sample=False,
        )

    found = {PLAIN: plain(ee.model, tokens), OFF: ours("off")}
    for target in eps:
        planned = ee.plan(target, measure=0)
        found[f"offramp, exits at ε = {target:g}"] = ours("exit", ee.calibration.at(target))
        found[f"offramp, planned exits at ε = {target:g}"] = ours("exit", planned.exit.thresholds)
    found[VERIFY] = ours("verify", ee.calibration.at(max(eps)))
    # Which thresholds verify mode drafts with does not depend on ε: any plan has the fastest.
    found["offramp, planned verify"] = ours("verify", planned.verify.thresholds)
    return found


def plain(model, tokens, **more):
    """Greedy search by transformers, with its cache."""
    return lambda ids: model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **more
    )


def peers(ee, tokens):
    """By name, the settings of each peer: the same exits, untrained as they come, after each of our layers."""
    found = {
        "transformers assistant_early_exit": {
            layer: plain(ee.model, tokens, assistant_early_exit=layer) for layer in ee.layers
        }
    }
    if find_spec("economize") is None:
        print("economize is not installed and left out: pip install economize", file=sys.stderr)
        return found
    from economize.techniques.dynamic_depth import CalmConfig
    from economize.techniques.early_exit import EarlyExitConfig

    found["economize early_exit"] = {
        layer: economized(ee.model, tokens, EarlyExitConfig(exit_layer=layer, head="shared"))
        for layer in ee.layers
    }
    found["economize calm"] = {
        layer: economized(ee.model, tokens, CalmConfig(min_layer=layer)) for layer in ee.layers
    }
    return found


def economized(model, tokens, config):
    """A technique of the package economize on a model of its own, whose weights are shared."""
    import economize

    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    attached = economize.apply(copy.deepcopy(model, weights), config)
    return lambda ids: attached.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )


def fastest(settings, ids):
    """The layer and function of a peer that is fastest on one prompt, after a run to warm up."""
    taken = {}
    for layer, run in settings.items():
        run(ids[None])
        start = time.perf_counter()
        run(ids[None])
        taken[layer] = time.perf_counter() - start
    best = min(taken, key=taken.__getitem__)
    return best, settings[best]


def check(ee, runs, prompts, tie):
    """Refuse to time what does not write the model's own text."""
    for ids in prompts:
        own = runs[PLAIN](ids[None])[0]
        for name in (OFF, VERIFY, "offramp, planned verify"):
            gap = gap_at_difference(ee.model, runs[name](ids[None])[0], own)
            if gap is not None and gap >= tie:
                raise SystemExit(
                    f"{name} does not write what transformers writes: logits {gap} apart part them"
                )


def race(ee, runs, prompts, say=lambda line: None):
    """Let every contender continue every prompt (T,), in turns; the first prompt once more before, to warm up."""
    found = {name: Race() for name in runs}
    for turn, ids in enumerate([prompts[0], *prompts]):
        for name, run in runs.items():
            ee.last_stats = None
            start = time.perf_counter()
            text = run(ids[None])[0]
            seconds = time.perf_counter() - start
            if turn:
                found[name].speed.append((len(text) - len(ids)) / seconds)
                found[name].texts.append(TokenSequence(text, len(ids)))
                for layer, count in (ee.last_stats.tokens_by_exit if ee.last_stats else {}).items():
                    found[name].depths[layer] = found[name].depths.get(layer, 0) + count
        say(f"{turn} of {len(prompts)} prompts")
    return found


def rows(ee, found):
    """One row a contender, in plain values; agreement is with the full model, given the emitted text before."""
    for name, run in found.items():
        agreeing, total = ee.agreement(run.texts)
        yield {
            "name": name,
            "tokens_per_second": median(run.speed),
            "over_transformers": run.over(found[PLAIN]),
            "over_exits_off": run.over(found[OFF]),
            "agreement": agreeing / total,
            "tokens_by_exit": run.depths,
        }


def table(found):
    """The rows in Markdown.  What the step gains stands in the row of exits off, what exits gain in the last ratio."""
    yield "| | tokens/s | × transformers | × exits off | agreement | tokens by layer |"
    yield "|---|---|---|---|---|---|"
    for row in found:
        depths = ", ".join(f"{layer}: {count}" for layer, count in row["tokens_by_exit"].items() if count)
        yield (
            f"| {row['name']} | {row['tokens_per_second']:.1f} | {row['over_transformers']:.2f} "
            f"| {row['over_exits_off']:.2f} | {row['agreement']:.3f} | {depths} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--dtypes", nargs="+", choices=TIE, default=list(TIE))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    def say(line):
        print(line, file=sys.stderr, flush=True)

    results = {}
    for dtype in arguments.dtypes:
        ee = offramp.EarlyExitModel.from_pretrained(arguments.folder, dtype=getattr(torch, dtype))
        texts = shipped_prompts("held_out")[: arguments.prompts]
        prompts = encode_prompts(texts, ee.tokenizer, max_positions=8192)
        runs = contenders(ee, arguments.tokens, arguments.eps)
        check(ee, runs, prompts[:2], TIE[dtype])
        if not arguments.no_peers:
            for name, settings in peers(ee, arguments.tokens).items():
                layer, run = fastest(settings, prompts[0])
                runs[f"{name}, layer {layer}"] = run
        results[dtype] = list(rows(ee, race(ee, runs, prompts, say)))
        print(f"\n{dtype}, {len(prompts)} prompts, at most {arguments.tokens} new tokens each\n")
        print("\n".join(table(results[dtype])), flush=True)
    print(json.dumps({"rows": results, "threads": torch.get_num_threads(), "machine": machine.describe()}))


if __name__ == "__main__":
    main()
