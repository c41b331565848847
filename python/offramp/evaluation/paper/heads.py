"""The paper's four sets of linear heads on one model, trained and calibrated once and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from offramp.evaluation.evaluate import Progress, Rows, Say
from offramp.evaluation.paper.config import PaperConfig
from offramp.evaluation.tables import read_csv, write_csv
from offramp.llm.files import read_json, write_json
from offramp.llm.fingerprint import fingerprint
from offramp.llm.heads import HeadConfig
from offramp.llm.model import EarlyExitModel
from offramp.llm.prompts import prompts
from offramp.llm.sequences import TokenSequence

VARIANTS: dict[str, tuple[Literal["copy", "scratch"], float]] = {
    "scratch λ=0.1": ("scratch", 0.1),
    "scratch λ=0.95": ("scratch", 0.95),
    "copied λ=0": ("copy", 0.0),
    "copied λ=0.95": ("copy", 0.95),
}
"""The head sets of the paper's Fig. 1: where a linear head's output rows start, and the weight of the entropy."""

EPS = 0.9
"""Target the stored heads are calibrated for; every other is answered from the same tokens."""

SETTINGS = (
    "layers",
    "shortlist",
    "tokens",
    "epochs",
    "batch_size",
    "learning_rate",
    "calibration_tokens",
    "seed",
)
"""What of the configuration decides the heads and their thresholds."""


class HeadSets(Mapping[str, EarlyExitModel]):
    """The head sets by the names of `VARIANTS`; one that the folder lacks is trained when it is asked for.

    Parameters
    ----------
    model, tokenizer
        From `offramp.load_model`.
    folder : Path
        Where training text and heads are kept.
    config : PaperConfig
        With its layers named.
    say, progress : callable
        Told in a sentence what comes next; called as ``progress(stage, done, total)``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        config: PaperConfig,
        say: Say,
        progress: Progress | None,
    ) -> None:
        self.model, self.tokenizer, self.folder, self.config = model, tokenizer, folder, config
        self.say, self.progress = say, progress
        self._open: dict[str, EarlyExitModel] = {}

    def __getitem__(self, name: str) -> EarlyExitModel:
        """Give a head set, trained and calibrated."""
        if name not in self._open:
            self._open[name] = self._load(name) or self._make(name)
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(VARIANTS)

    def __len__(self) -> int:
        return len(VARIANTS)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the heads and their thresholds, as plain values for JSON."""
        made = {name: getattr(self.config, name) for name in SETTINGS}
        return {
            **made,
            "layers": list(self.config.layers),
            "model": fingerprint(self.model).digest,
            "dtype": str(self.model.dtype),
            "eps": EPS,
        }

    def training_rows(self) -> Rows:
        """Accuracy and entropy of every head of every set during its training."""
        rows: Rows = []
        for name in self:
            self[name]
            rows += read_csv(self._home(name) / "metrics.csv")
        return rows

    @cached_property
    def calibration_text(self) -> list[TokenSequence]:
        """The full model's continuations of the calibration prompts, the same for every set."""
        return self._untrained().continue_greedily(
            prompts("calibration"), tokens=self.config.calibration_tokens, progress=self.progress
        )

    def _home(self, name: str) -> Path:
        init, entropy_weight = VARIANTS[name]
        return self.folder / "heads" / f"{init}-{entropy_weight:g}"

    def _untrained(self, init: Literal["copy", "scratch"] = "copy") -> EarlyExitModel:
        # As the paper has them, in full precision.
        head = HeadConfig("linear", shortlist=self.config.shortlist, init=init, bits=None)
        return EarlyExitModel(self.model, self.tokenizer, layers=self.config.layers, head=head)

    def _load(self, name: str) -> EarlyExitModel | None:
        """Read a set from the folder if it is there with these settings; its record is written last."""
        home = self._home(name)
        record = home / "made.json"
        if not record.exists() or read_json(record) != self.identity:
            return None
        return EarlyExitModel.from_pretrained(home / "exits", model=self.model, tokenizer=self.tokenizer)

    def _make(self, name: str) -> EarlyExitModel:
        init, entropy_weight = VARIANTS[name]
        home, config = self._home(name), self.config
        home.mkdir(parents=True, exist_ok=True)
        self.say(f"Training linear heads, {name}, on {config.tokens:,} tokens × {config.epochs}")
        ee = self._untrained(init)
        history = ee.train_heads(
            tokens=config.tokens,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            entropy_weight=entropy_weight,
            # The curves are to show the whole training, also where it no longer helps.
            patience=None,
            cache=self.folder,
            seed=config.seed,
            progress=self.progress,
        )
        ee.calibrate(EPS, sequences=self.calibration_text)
        ee.save_pretrained(home / "exits")
        columns = ("layer", "step", "tokens", "loss", "accuracy", "entropy")
        rows = [{"heads": name} | {column: getattr(item, column) for column in columns} for item in history]
        write_csv(home / "metrics.csv", rows)
        write_json(home / "made.json", self.identity)
        return ee


def describe_heads(ee: EarlyExitModel) -> str:
    """Name heads by kind, start and λ, as far as they say."""
    started = {"copy": " copied", "scratch": " scratch"}
    kinds = [
        config.kind + (started[config.init] if config.kind == "linear" else "")
        for config in ee.head_configs.values()
    ]
    weight = ee.training.get("entropy_weight")
    return " and ".join(dict.fromkeys(kinds)) + (f" λ={weight:g}" if weight is not None else "")
