"""Whole generations beside their peers, in one run: `python benches/generation.py FOLDER`.

FOLDER holds trained heads.  Every contender continues the same held-out prompts greedily at batch 1, in turns
prompt by prompt, in an order drawn for each, prefill included; ratios are medians over the prompts.  What the step
gains (exits off, over transformers) and what exits gain (over exits off) stand in columns of their own.  Exits off
and verify mode must write what transformers writes, up to close calls: on two prompts before anything is timed, and
on all of them after.  ``--planned`` leaves out exits that were not planned, ``--no-peers`` other libraries'.  With
``--output FILE`` what was chosen and every prompt's times are kept there as they come, and a run that was interrupted,
or limited by ``--at-most``, goes on.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import random
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import offramp
import torch
from lossless import TIE, gap_at_difference
from offramp import machine
from offramp.evaluation.tables import write_csv
from offramp.llm.planning import make_plan
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.sequences import TokenSequence, encode_prompts

PLAIN, OFF, VERIFY = "transformers generate", "offramp, exits off", "offramp, verify"
PLANNED_VERIFY = "offramp, planned verify"
EXACT = (OFF, VERIFY, PLANNED_VERIFY)
# Enough to tell which layer suits a peer, and to warm up.
_TRIED = 16


@dataclass
class Race:
    """What one contender did: new tokens a second of each prompt, its texts, and its tokens by layer."""

    speed: list[float] = field(default_factory=list)
    texts: list[TokenSequence] = field(default_factory=list)
    depths: dict[int, int] = field(default_factory=dict)

    def over(self, other):
        """How many times as fast as another contender, the median over the prompts."""
        return median(one / two for one, two in zip(self.speed, other.speed, strict=True))


def modes(ee, eps, *, planned_only=False):
    """Our contenders by name, as mode and thresholds: the calibration's, and those the planner chose."""
    scores = ee.calibration.measured
    found = {OFF: ("off", None)}
    plan = ee.plan(eps[0], measure=0)
    for target in eps:
        plan = make_plan(plan.costs, scores, ee.layers, ee.num_layers, ee.calibration.planned, target)
        found[f"offramp, exits at ε = {target:g}"] = ("exit", list(ee.calibration.at(target)))
        found[f"offramp, planned exits at ε = {target:g}"] = ("exit", list(plan.exit.thresholds))
    found[VERIFY] = ("verify", list(ee.calibration.at(max(eps))))
    # Which thresholds verify mode drafts with does not depend on ε: any plan has the fastest.
    found[PLANNED_VERIFY] = ("verify", list(plan.verify.thresholds))
    return {name: how for name, how in found.items() if not planned_only or name == OFF or "planned" in name}


def contenders(ee, found):
    """Functions of prompt ids (1, P) and a number of tokens to prompt and continuation (1, T)."""

    def ours(mode, thresholds):
        return lambda ids, tokens: ee.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            mode=mode,
            thresholds=thresholds,
            max_new_tokens=tokens,
            do_sample=False,
        )

    return {PLAIN: plain(ee.model)} | {name: ours(*settings) for name, settings in found.items()}


def plain(model, **more):
    """Greedy search by transformers, with its cache."""
    return lambda ids, tokens: model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **more
    )


def peers(ee):
    """By name, the settings of each peer: the same exits, untrained as they come, after each of our layers."""
    found = {
        "transformers assistant_early_exit": {
            layer: plain(ee.model, assistant_early_exit=layer) for layer in ee.layers
        }
    }
    if find_spec("economize") is None:
        print("economize is not installed and left out: pip install 'offramp[bench]'", file=sys.stderr)
        return found
    # economize 0.3.2 hands layers their cache by the name it had before transformers 5.24.
    if "past_key_values" not in inspect.signature(ee.model.forward).parameters:
        print("economize cannot run on this transformers and is left out: take 5.23", file=sys.stderr)
        return found
    from economize.techniques.dynamic_depth import CalmConfig
    from economize.techniques.early_exit import EarlyExitConfig

    found["economize early_exit"] = {
        layer: economized(ee.model, EarlyExitConfig(exit_layer=layer, head="shared")) for layer in ee.layers
    }
    found["economize calm"] = {
        layer: economized(ee.model, CalmConfig(min_layer=layer)) for layer in ee.layers
    }
    return found


def economized(model, config):
    """A technique of the package economize on a model of its own, whose weights are shared."""
    import economize

    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return plain(economize.apply(copy.deepcopy(model, weights), config))


def fastest(settings, ids, tokens=_TRIED):
    """The layer of a peer that is fastest on one prompt, after a run to warm up."""
    taken = {}
    for layer, run in settings.items():
        run(ids[None], tokens)
        start = time.perf_counter()
        run(ids[None], tokens)
        taken[layer] = time.perf_counter() - start
    return min(taken, key=taken.__getitem__)


def check(ee, runs, prompts, tokens, tie):
    """Refuse to time what does not write the model's own text."""
    for ids in prompts:
        own = runs[PLAIN](ids[None], tokens)[0]
        for name in filter(runs.__contains__, EXACT):
            gap = gap_at_difference(ee.model, runs[name](ids[None], tokens)[0], own)
            if gap is not None and gap >= tie:
                raise SystemExit(
                    f"{name} does not write what transformers writes: logits {gap} apart part them"
                )


def race(ee, runs, prompts, tokens, first=0):
    """Let every contender continue every prompt (T,), in turns; one result a prompt, by contender.

    What ran before tells in what comes next, so the order is drawn for each prompt, by its number from ``first`` on.
    """
    for run in runs.values():
        run(prompts[0][None], _TRIED)
    for number, ids in enumerate(prompts, first):
        found = {}
        for name in random.Random(number).sample(list(runs), len(runs)):
            run = runs[name]
            ee.last_stats = None
            start = time.perf_counter()
            text = run(ids[None], tokens)[0]
            seconds = time.perf_counter() - start
            found[name] = {
                "seconds": seconds,
                "text": text.tolist(),
                "prompt_length": len(ids),
                "tokens_by_exit": dict(ee.last_stats.tokens_by_exit) if ee.last_stats else {},
            }
        yield {name: found[name] for name in runs}


def rows(ee, results):
    """One row a contender, in plain values; agreement is with the full model, given the emitted text before."""
    found = {name: Race() for name in results[0]}
    for result in results:
        for name, run in found.items():
            said = result[name]
            text = TokenSequence(torch.tensor(said["text"]), said["prompt_length"])
            run.speed.append(text.generated / said["seconds"])
            run.texts.append(text)
            for layer, count in said["tokens_by_exit"].items():
                run.depths[int(layer)] = run.depths.get(int(layer), 0) + count
    for name, run in found.items():
        agreeing, total = ee.agreement(run.texts)
        gaps = partings(ee, run.texts, found[PLAIN].texts) if name in EXACT else []
        yield {
            "name": name,
            "tokens_per_second": median(run.speed),
            "over_transformers": run.over(found[PLAIN]),
            "over_exits_off": run.over(found[OFF]),
            "agreement": agreeing / total,
            "same_text": sum(
                torch.equal(mine.tokens, own.tokens)
                for mine, own in zip(run.texts, found[PLAIN].texts, strict=True)
            ),
            # Where texts that should be transformers' part from it.
            "widest_gap": max(gaps, default=math.nan),
            "tokens_by_exit": run.depths,
        }


def depths_of(row):
    """A row's tokens by layer, in words."""
    return ", ".join(f"{layer}: {count}" for layer, count in row["tokens_by_exit"].items() if count)


def table(found):
    """The rows in Markdown.  What the step gains stands in the row of exits off, what exits gain in the last ratio."""
    yield "| | tokens/s | × transformers | × exits off | agreement | same text | widest gap | tokens by layer |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found:
        yield (
            f"| {row['name']} | {row['tokens_per_second']:.1f} | {row['over_transformers']:.2f} "
            f"| {row['over_exits_off']:.2f} | {row['agreement']:.3f} | {row['same_text']} | {row['widest_gap']:.2g} "
            f"| {depths_of(row)} |"
        )


def partings(ee, texts, own):
    """How far apart the model's two largest logits are where texts part from transformers', for those that do."""
    gaps = [
        gap_at_difference(ee.model, mine.tokens, other.tokens) for mine, other in zip(texts, own, strict=True)
    ]
    return [gap for gap in gaps if gap is not None]


class Kept:
    """Lines of JSON in a file, those of one dtype told apart; in memory alone where there is no file."""

    def __init__(self, path, dtype):
        self.path, self.dtype = path, dtype
        stored = path.read_text().splitlines() if path and path.exists() else []
        lines = [line for line in map(json.loads, stored) if line["dtype"] == dtype]
        self.settings = next((line["settings"] for line in lines if "settings" in line), None)
        self.results = [line["result"] for line in lines if "result" in line]

    def add(self, **line):
        """Keep one line: settings or a result."""
        if "settings" in line:
            self.settings = line["settings"]
        else:
            self.results.append(line["result"])
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"dtype": self.dtype} | line) + "\n")


def choose(ee, arguments, prompts, tie):
    """What takes part: mode and thresholds of ours, the fastest layer of each peer."""
    ours = modes(ee, arguments.eps, planned_only=arguments.planned)
    check(ee, contenders(ee, ours), prompts[:2], arguments.tokens, tie)
    own_layer = {}
    if not arguments.no_peers:
        own_layer = {name: fastest(settings, prompts[0]) for name, settings in peers(ee).items()}
    return {"ours": ours, "peers": own_layer, "layers": ee.layers, "machine": machine.describe()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--planned", action="store_true", help="leave out exits that were not planned")
    parser.add_argument("--dtypes", nargs="+", choices=TIE, default=list(TIE))
    parser.add_argument("--output", type=Path, help="file of results, which an interrupted run continues")
    parser.add_argument("--table", type=Path, help="file the rows of all dtypes are written to, as CSV")
    parser.add_argument("--at-most", type=int, default=10**6, help="prompts to time before stopping")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    everything, wrong = [], []
    for dtype in arguments.dtypes:
        ee = offramp.EarlyExitModel.from_pretrained(arguments.folder, dtype=getattr(torch, dtype))
        texts = shipped_prompts("held_out")[: arguments.prompts]
        prompts = encode_prompts(texts, ee.tokenizer, max_positions=8192)
        kept = Kept(arguments.output, dtype)
        if kept.settings is None:
            # On answers as long as those that are timed: the longer they are, the more of them heads know.
            ee.calibrate(max_new_tokens=arguments.tokens)
            kept.add(settings=choose(ee, arguments, prompts, TIE[dtype]))
        runs = contenders(ee, kept.settings["ours"])
        settings = peers(ee) if kept.settings["peers"] else {}
        for name, layer in kept.settings["peers"].items():
            runs[f"{name}, layer {layer}"] = settings[name][layer]
        done = len(kept.results)
        due = prompts[done:][: arguments.at_most]
        for result in race(ee, runs, due, arguments.tokens, done) if due else ():
            kept.add(result=result)
            print(f"{len(kept.results)} of {len(prompts)} prompts", file=sys.stderr, flush=True)
        if len(kept.results) == len(prompts):
            print(f"\n{dtype}, {len(prompts)} prompts, at most {arguments.tokens} new tokens each\n")
            found = list(rows(ee, kept.results))
            print("\n".join(table(found)), flush=True)
            everything += [{"dtype": dtype} | row | {"tokens_by_exit": depths_of(row)} for row in found]
            wrong += [f"{dtype}: {row['name']}" for row in found if row["widest_gap"] >= TIE[dtype]]
    if arguments.table:
        write_csv(arguments.table, everything)
    print(json.dumps({"threads": torch.get_num_threads(), "machine": machine.describe()}))
    if wrong:
        raise SystemExit(f"these do not write what transformers writes: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
