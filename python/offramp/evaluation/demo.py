"""The whole way on one small model: train, calibrate, decode held-out prompts, check, time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import offramp
from offramp import machine
from offramp.errors import ModelError, StorageError
from offramp.evaluation.decoded import Decoded, decode_prompts
from offramp.evaluation.evaluate import name_of
from offramp.evaluation.findings import Findings
from offramp.evaluation.speed import Speed, measure_speed
from offramp.llm.calibrating import Calibration
from offramp.llm.files import read_json_if_whole, sha256_of, write_json
from offramp.llm.heads import HeadConfig
from offramp.llm.model import EarlyExitModel
from offramp.llm.prompts import prompts

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_RECORD = "demo.json"


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does.

    Attributes
    ----------
    layers, head_kind, shortlist
        The exits and their heads: by the planner, the best two of seven adapters trained so long.
    training_tokens, epochs, calibration_tokens : int
        Self-generated tokens to train on, how often, and tokens to calibrate on.
    eps : float
        Target accuracy the demo calibrates at and shows text for.
    eps_checked : tuple of float
        Targets at which agreement is measured.
    prompts, max_new_tokens : int
        Held-out prompts decoded at each of them, and tokens generated for each at most.
    timed_prompts, timed_tokens : int
        The same for decoding one at a time against the clock, at `eps` only.
    seed : int
        Seed of the training.
    """

    layers: tuple[int, ...] = (10, 26)
    head_kind: str = "adapter"
    shortlist: int | None = 8192
    training_tokens: int = 25_000
    epochs: int = 4
    calibration_tokens: int = 4_000
    eps: float = 0.9
    eps_checked: tuple[float, ...] = (0.8, 0.9, 0.95)
    prompts: int = 16
    max_new_tokens: int = 48
    timed_prompts: int = 5
    timed_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    model : str
        The base model.
    calibration : Calibration
        Thresholds, and the curves they come from.
    decoded : tuple of Decoded
        Held-out text at every ε checked.
    speed : Speed
        Tokens a second.
    reused : bool
        Whether heads of an earlier run were used.
    seconds : dict of str to float
        Wall time of every part.
    machine : dict of str to str
        What it ran on.
    config : DemoConfig
        What was asked for.
    """

    model: str
    calibration: Calibration
    decoded: tuple[Decoded, ...]
    speed: Speed
    reused: bool
    seconds: dict[str, float]
    config: DemoConfig
    machine: dict[str, str] = field(default_factory=machine.describe)

    @property
    def shown(self) -> Decoded:
        """The held-out text at the demo's own ε."""
        return next(item for item in self.decoded if item.eps == self.config.eps)

    def findings(self) -> Findings:
        """Give what the report is made of."""
        config = self.config
        listed = f" over a shortlist of {config.shortlist:,} tokens" if config.shortlist else ""
        facts = {
            "decoding": f"greedy, at most {config.max_new_tokens} tokens a prompt",
            "heads": f"{config.head_kind}{listed}, trained {config.epochs} times on "
            f"{config.training_tokens:,} tokens, seed {config.seed}" + " (in an earlier run)" * self.reused,
            "time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()),
        }
        return Findings(
            self.model,
            self.calibration,
            self.decoded,
            self.shown,
            self.speed,
            facts=facts,
            machine=self.machine,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, text and curves left out."""
        calibration = self.calibration.to_dict()
        return {
            "model": self.model,
            "calibration": {name: value for name, value in calibration.items() if name != "curves"},
            "decoded": [item.summary() for item in self.decoded],
            "speed": self.speed.to_dict(),
            "reused": self.reused,
            "seconds": self.seconds,
            "machine": self.machine,
        }


def run_demo(
    model: Any,
    tokenizer: Any,
    folder: Path,
    config: DemoConfig,
    *,
    say: Say,
    progress: Progress | None = None,
) -> DemoResult:
    """Train and calibrate exits, or take those an earlier run left in `folder`, then measure them.

    Parameters
    ----------
    model, tokenizer
        From `offramp.load_model`.
    folder : Path
        Where the corpus and the heads are kept.
    config : DemoConfig
        What to do.
    say : callable
        Told in a sentence what comes next.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    DemoResult
    """
    clock = _Clock()
    ee = _reuse(model, tokenizer, folder, config, say)
    reused = ee is not None
    if ee is None:
        ee = _train(model, tokenizer, folder, config, say=say, progress=progress)
    clock.lap("loading exits" if reused else "training and calibrating")
    decoded = _decode(ee, folder, config, say, progress)
    clock.lap("decoding")
    say("Timing one prompt at a time, in alternation with plain transformers")
    speed = measure_speed(
        ee,
        prompts("held_out")[: config.timed_prompts],
        eps=(config.eps,),
        max_new_tokens=config.timed_tokens,
        progress=progress,
    )
    clock.lap("timing")
    assert ee.calibration is not None
    return DemoResult(name_of(ee.model), ee.calibration, decoded, speed, reused, clock.laps, config)


def _train(
    model: Any, tokenizer: Any, folder: Path, config: DemoConfig, *, say: Say, progress: Progress | None
) -> EarlyExitModel:
    head = HeadConfig(config.head_kind, shortlist=config.shortlist)
    ee = EarlyExitModel(model, tokenizer, layers=config.layers, head=head)
    say(
        f"Training exits after layers {', '.join(map(str, config.layers))} "
        f"on {config.training_tokens:,} tokens the model writes itself"
    )
    ee.train_heads(
        tokens=config.training_tokens, epochs=config.epochs, cache=folder, seed=config.seed, progress=progress
    )
    say(f"Calibrating at ε = {config.eps:g} on prompts of other topics")
    ee.calibrate(config.eps, tokens=config.calibration_tokens, progress=progress)
    ee.save_pretrained(folder / "heads")
    write_json(folder / _RECORD, _identity(folder, config))
    return ee


def _reuse(model: Any, tokenizer: Any, folder: Path, config: DemoConfig, say: Say) -> EarlyExitModel | None:
    """Take the heads an earlier run left, if they are whole, this model's, and made as `config` asks."""
    try:
        if read_json_if_whole(folder / _RECORD) != _identity(folder, config):
            return None
        ee = EarlyExitModel.from_pretrained(folder / "heads", model=model, tokenizer=tokenizer)
    except (StorageError, ModelError, OSError):
        return None
    say(f"Using the exits an earlier run left in {folder / 'heads'}")
    return ee


def _identity(folder: Path, config: DemoConfig) -> dict[str, Any]:
    """Describe the heads in `folder` and how they were made; a change in either makes earlier findings void."""
    made = {name: value for name, value in asdict(config).items() if not name.startswith("timed_")}
    # Through JSON and back, so that tuples compare with the lists that are read.
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return {
        "offramp": offramp.__version__,
        "heads": sha256_of(folder / "heads" / "heads.safetensors"),
        **plain,
    }


def _decode(
    ee: EarlyExitModel, folder: Path, config: DemoConfig, say: Say, progress: Progress | None
) -> tuple[Decoded, ...]:
    """Decode and check held-out prompts, or read what an earlier run found: the same heads find the same."""
    path = folder / "held-out.json"
    identity = _identity(folder, config)
    stored = read_json_if_whole(path)
    if stored is not None and stored.get("identity") == identity:
        say(f"Using the held-out text an earlier run left in {path}")
        return tuple(Decoded.from_dict(item) for item in stored["decoded"])
    held_out = prompts("held_out")[: config.prompts]
    say(f"Decoding {len(held_out)} held-out prompts and checking every token against the full model")
    decoded = []
    for number, eps in enumerate(config.eps_checked):
        decoded.append(decode_prompts(ee, held_out, eps=eps, max_new_tokens=config.max_new_tokens))
        if progress is not None:
            progress("decoding", number + 1, len(config.eps_checked))
    write_json(path, {"identity": identity, "decoded": [item.to_dict() for item in decoded]})
    return tuple(decoded)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
