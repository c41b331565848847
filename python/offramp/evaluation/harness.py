"""A model with exits as a model of lm-evaluation-harness, registered as ``offramp``.

Everything but the two calls into the model (batching, truncation, stop sequences, chat templates) is the harness's own
Hugging Face model.  Needs lm_eval (``offramp[eval]``); importing this module registers the model.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging

from offramp.decision import decide
from offramp.errors import InputError
from offramp.evaluation.memory import Remembered, States
from offramp.llm.model import EarlyExitModel

LOCAL_TASKS = Path(__file__).parent / "tasks"
"""Folder of small tasks written for this project, in the formats of MMLU, HellaSwag and Winogrande."""


@register_model("offramp")
class OfframpLM(HFLM):  # type: ignore[misc]  # untyped
    """A model with exits, scored and sampled by the harness.

    Log-likelihoods honour exits: at each position the first head whose margin reaches its threshold gives the
    probabilities, otherwise the whole model.  A token outside a head's shortlist has probability 0 where that head
    answers, as it has in generation.  Generation goes through the engine.  With every exit off the numbers are those
    of the harness's model ``hf``.

    Parameters
    ----------
    pretrained : str, Path or EarlyExitModel
        A folder of trained heads, or a model in memory.
    mode : str
        ``"exit"``; ``"off"`` for the whole model at every position.
    eps : float, optional
        Use the thresholds for this ε; default: the calibration's own.
    thresholds : sequence of float, optional
        Use these thresholds instead, one a head.
    device, dtype : str, optional
        For loading the folder's base model; the CPU where there is no CUDA.
    remember : Remembered, optional
        Where to keep the hidden states at the exits of every batch that is scored, so that scoring the same requests
        at other thresholds (`use`) runs no layer again.  Costs memory: (exits + 1) x hidden size floats a token.
    **kwargs
        As for the harness's ``hf``: batch_size, max_length, truncation, add_bos_token, ...
    """

    def __init__(
        self,
        pretrained: str | Path | EarlyExitModel,
        *,
        mode: str = "exit",
        eps: float | None = None,
        thresholds: Sequence[float] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        remember: Remembered | None = None,
        **kwargs: Any,
    ) -> None:
        ee = pretrained
        # Its command asks for CUDA unless told otherwise; as its own model does, take the CPU where there is none.
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        if not isinstance(ee, EarlyExitModel):
            ee = EarlyExitModel.from_pretrained(ee, device=device, dtype=dtype)
        self.exits = ee
        self._known = remember
        self.use(mode=mode, eps=eps, thresholds=thresholds)
        # A copy, since the harness gives it a padding token.
        super().__init__(
            pretrained=ee.model, tokenizer=copy.deepcopy(ee.tokenizer), backend="causal", **kwargs
        )

    def use(
        self, *, mode: str = "exit", eps: float | None = None, thresholds: Sequence[float] | None = None
    ) -> None:
        """Choose thresholds for what comes next, as `EarlyExitModel.generate` takes them."""
        # What verify mode emits is the whole model's.
        self._taken = self.exits._exits("off" if mode == "verify" else mode, eps, thresholds)
        self._settings: dict[str, Any] = {"mode": mode, "eps": eps, "thresholds": thresholds}

    def get_model_info(self) -> dict[str, Any]:
        """Describe the model for the harness's records, without asking the Hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "exits": {item.layer: item.threshold for item in self._taken},
        }

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of whoever answers at each position of right-padded tokens (B, T)."""
        if not self._taken and self._known is None:
            logits: torch.Tensor = super()._model_call(inps)
            return logits
        exits, final = self._states(inps)
        answered = torch.zeros(inps.shape, dtype=torch.bool, device=inps.device)
        vocabulary = self.exits.trunk.vocab_size
        logits = final.new_empty(*inps.shape, vocabulary)
        batch, length = inps.shape
        places = torch.arange(batch * length, device=inps.device)
        for item in self._taken:
            # Row by row, because logits of all rows over the vocabulary are large.
            features = item.head.read(exits[item.layer], (places // length, places % length))
            for row, rows in enumerate(features.split(length)):
                said = item.head.logits(rows)
                _, _, reached = decide(said, item.threshold)
                leaving = torch.from_numpy(reached).to(inps.device) & ~answered[row]
                logits[row, leaving] = item.head.scatter(said[leaving], vocabulary).to(logits.dtype)
                answered[row] |= leaving
        logits[~answered] = self.exits.trunk.logits(final[~answered])
        return logits

    @torch.no_grad()
    def _states(self, tokens: torch.Tensor) -> States:
        """Hidden states (B, T, H) after every exit, and after the last layer."""
        key = tokens.cpu().numpy().tobytes()
        if self._known is not None and key in self._known:
            return self._known[key]
        trunk = self.exits.trunk
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden, cache = trunk.embed(tokens, positions), trunk.new_cache()
        exits = {}
        for first, last in itertools.pairwise((0, *self.exits.layers, trunk.num_layers)):
            hidden = trunk.run(hidden, first, last, cache=cache, positions=positions)
            exits[last] = hidden
        found = exits, exits.pop(trunk.num_layers)
        if self._known is not None:
            self._known[key] = found
        return found

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """As the harness's own, through the engine."""
        temperature = generation_kwargs.pop("temperature", 0.0)
        sample = generation_kwargs.pop("do_sample", None)
        if sample is None:
            sample = temperature > 0
        if sample or temperature > 0:
            generation_kwargs["temperature"] = temperature
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        written = self.exits.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=criteria,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=sample,
            **self._settings,
            **generation_kwargs,
        )
        assert isinstance(written, torch.Tensor)
        return written


class Tasks(NamedTuple):
    """Tasks of the harness, read with their data, to be scored as often as wanted."""

    loaded: list[Any]
    """Tasks, and groups of tasks, that are in no other group."""
    manager: TaskManager
    """What found them."""


def task_scores(
    model: OfframpLM, tasks: Tasks, *, limit: int | None = None
) -> Iterator[tuple[str, str, float, float]]:
    """Run tasks and give each task's metrics.

    Parameters
    ----------
    model : OfframpLM
        The model.
    tasks : Tasks
        From `find_tasks`.
    limit : int, optional
        Documents of each task at most.

    Yields
    ------
    task, metric : str
    value, standard_error : float

    Of a group of tasks that has a score of its own, such as ``mmlu``, that one alone.
    """
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks.loaded,
        limit=limit,
        task_manager=tasks.manager,
        log_samples=False,
        # Only metrics that are no means are resampled.
        bootstrap_iters=1000,
    )
    assert found is not None
    inside = _inside(found.get("groups", ()), found["group_subtasks"])
    for task, metrics in found["results"].items():
        if task in inside:
            continue
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{filter_name}")
                yield task, metric, float(value), float(error) if isinstance(error, float) else float("nan")


def _inside(groups: Iterable[str], members: Mapping[str, Sequence[str]]) -> set[str]:
    """Tasks and groups within groups, at any depth."""
    found: set[str] = set()
    waiting = list(groups)
    while waiting:
        new = set(members.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def find_tasks(tasks: Sequence[str], folders: Sequence[Path] = ()) -> Tasks:
    """Read tasks with their data: names the harness knows, or those of tasks in `LOCAL_TASKS` and ``folders``.

    Raises
    ------
    InputError
        Naming a task that does not exist, or saying why one cannot be loaded.
    """
    manager = _manager_of(tasks, folders)
    try:
        with _without_notes():
            found = manager.load(list(tasks))
    # Data come from the network, through several libraries that each have errors of their own.
    except Exception as error:
        raise InputError(f"tasks {', '.join(tasks)} cannot be loaded: {_first_line(error)}") from error
    inside = _inside(found["groups"], found["group_map"])
    return Tasks(
        [item for name, item in (found["groups"] | found["tasks"]).items() if name not in inside], manager
    )


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Leave out what the harness remarks on every task it loads; bars of downloads stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _manager_of(tasks: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    local = [str(folder) for folder in (LOCAL_TASKS, *folders)]
    # The harness's own thousands of tasks take it seconds to list, so they are listed only when asked for.
    manager = TaskManager(include_path=local, include_defaults=False)
    if all(manager.match_tasks([task]) for task in tasks):
        return manager
    manager = TaskManager(include_path=local)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise InputError(
                f"task {task!r} does not exist: choose one the harness lists (`lm_eval ls tasks`) or one of "
                + ", ".join(local_tasks())
            )
    return manager


def local_tasks() -> list[str]:
    """Names of the tasks in `LOCAL_TASKS`."""
    return sorted(path.stem for path in LOCAL_TASKS.glob("*.yaml"))


def run_command(arguments: Sequence[str]) -> None:
    """Run lm-evaluation-harness's own command line with model ``offramp`` and the local tasks known.

    Raises
    ------
    InputError
        For a task that does not exist.
    """
    # The harness reads the arguments of the process.
    kept, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        setup_logging()
        command = HarnessCLI()
        parsed = command.parse_args()
        if hasattr(parsed, "include_path") and parsed.include_path is None:
            parsed.include_path = str(LOCAL_TASKS)
        command.execute(parsed)
    except ValueError as error:
        if str(error).startswith("Tasks not found"):
            raise InputError(f"{error}: `lm_eval ls tasks` lists what there is") from error
        if str(error).startswith("Duplicate task"):
            raise InputError(f"{error}: name it once") from error
        raise
    except OSError as error:
        # What the system says of a file or a disk is told as such elsewhere; the rest is data that cannot be had.
        if error.errno is not None or error.filename is not None:
            raise
        raise InputError(f"the data of the tasks cannot be had: {_first_line(error)}") from error
    finally:
        sys.argv = kept
