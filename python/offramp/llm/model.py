"""`EarlyExitModel`: a frozen language model with exits, from training to generation.

The face of `offramp.llm`; everything it does is done by the modules below it.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from offramp.errors import InputError
from offramp.llm.arguments import check_config, check_ids, check_request, check_share, take_stop_strings
from offramp.llm.auditing import Audit, monitor_for
from offramp.llm.calibrating import Calibration, calibrate_scores, check_eps, check_mode
from offramp.llm.data import CorpusPlan, corpus_bytes, prepare_corpus
from offramp.llm.decoding import EarlyExitOutput, Exit, GenerationStats, Rollout, decode
from offramp.llm.files import held
from offramp.llm.generating import continue_prompts
from offramp.llm.heads import ExitHeads, HeadConfig
from offramp.llm.loading import load_model
from offramp.llm.planning import Option, Plan, make_plan, measure_costs
from offramp.llm.processes import Processes
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.prompts import topics as shipped_topics
from offramp.llm.scoring import Scores, agreement, score_sequences
from offramp.llm.sequences import TokenSequence, as_sequences, check_length, encode_prompts, hash_of
from offramp.llm.staging import Stage
from offramp.llm.states import Progress
from offramp.llm.storage import HUB_OPTIONS, fetch_exits, load_exits, push_exits, save_exits
from offramp.llm.training import HeadMetrics, Trainer, TrainingConfig, Watch, best_of, build_heads
from offramp.llm.trunk import Trunk
from offramp.llm.verifying import decode_verified
from offramp.monitor import Monitor

_BATCH = 96


class EarlyExitModel:
    """A frozen causal language model with exit heads after chosen layers.

    Parameters
    ----------
    model
        A Hugging Face causal language model, for instance from `offramp.load_model`.  It is never modified.
    tokenizer
        Its tokenizer; ``None`` if only token ids are used.
    layers
        The exits: "after layer e", 1 ≤ e < L, strictly rising.
    head
        The kind of the heads: ``"mlp"``, ``"linear"``, ``"adapter"``, one of your own (`offramp.register_head`), or a
        `HeadConfig`; or, by layer, one for each exit.

    Attributes
    ----------
    model, tokenizer
        As given.
    layers : tuple of int
        The exits.
    head_configs : dict of int to HeadConfig
        The kind of head after each of them.
    heads : torch.ExitHeads or None
        The heads by layer, in float32 and as they were trained; ``None`` until they are.
    calibration : Calibration or None
        The latest calibration.
    last_stats : GenerationStats or None
        Of the latest `generate`.
    monitor : Monitor or None
        What `generate` with ``audit=`` has found; set one of your own for another level or alarm.

    Raises
    ------
    ModelError
        If the model cannot be run in segments exactly.
    InputError
        If the exits are not within the model.

    Examples
    --------
    >>> model, tokenizer = offramp.load_model("demo")  # doctest: +SKIP
    >>> ee = EarlyExitModel(model, tokenizer, layers=(18, 22, 26))  # doctest: +SKIP
    >>> metrics = ee.train_heads(tokens=20_000, cache="runs/demo")  # doctest: +SKIP
    >>> print(ee.calibrate(eps=0.9))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        layers: Sequence[int],
        head: str | HeadConfig | Mapping[int, str | HeadConfig] = "mlp",
    ) -> None:
        self._trunk = Trunk(model)
        self.layers = self._trunk.check_layers(layers)
        self.head_configs = HeadConfig.for_layers(head, self.layers)
        self._trunk.prove(self.layers)
        self.model = model
        self.tokenizer = tokenizer
        self.heads: ExitHeads | None = None
        self.calibration: Calibration | None = None
        self.last_stats: GenerationStats | None = None
        self.monitor: Monitor | None = None
        self._trained: dict[str, Any] = {}
        self._serving: tuple[ExitHeads, tuple[torch.dtype, torch.device], ExitHeads] | None = None
        self._warned_dtype = False
        self._plan: Plan | None = None
        self._plan_at: Callable[[float], Plan] | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model, L."""
        return self._trunk.num_layers

    @property
    def trunk(self) -> Trunk:
        """The model in segments; for `offramp.evaluation`, which reads more from it than `score` gives."""
        return self._trunk

    @property
    def training(self) -> dict[str, Any]:
        """How the heads were trained, in plain values; empty where that is not known."""
        return dict(self._trained)

    @property
    def heads_in_use(self) -> ExitHeads:
        """Copies of the heads in the model's dtype and rounded (`HeadConfig`), as `generate` and `score` use them.

        They are made once: who changes values of ``heads`` sets ``heads`` to a copy of them afterwards.
        """
        return self._trained_heads()

    def train_heads(
        self,
        tokens: int = 50_000,
        *,
        prompts: Iterable[str] | None = None,
        sequences: Any = None,
        cache: str | os.PathLike[str] | None = None,
        epochs: int = 2,
        batch_size: int = 256,
        learning_rate: float | None = None,
        entropy_weight: float = 0.0,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        patience: int | None = 2,
        max_new_tokens: int = 96,
        seed: int = 0,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> list[HeadMetrics]:
        """Train the heads on the model's own predictions (equation (1) of Valade 2024).

        Parameters
        ----------
        tokens
            Tokens to train on.
        prompts
            Starting prompts, which the model continues; default: the shipped training prompts.
        sequences
            The user's own text instead: texts, lists of token ids, or a (B, T) tensor.
        cache
            Folder for the corpus and, in a folder for each training, its state and metrics (``metrics.json``, and
            events for TensorBoard where it is installed).  An interrupted training goes on, a finished one is not
            done again, and other layers, kinds of head or λ use the text that is there.  ``None``: a temporary
            folder.
        epochs, batch_size, learning_rate, entropy_weight, precision, patience, seed
            See `offramp.llm.training.TrainingConfig`; ``entropy_weight`` is the paper's λ.
        max_new_tokens
            Tokens each prompt is continued by.
        progress
            Called as ``progress(stage, done, total)``.
        watch
            Called with the metrics of every head, four times an epoch.

        Returns
        -------
        list of HeadMetrics
            Loss, accuracy, entropy and coverage of every head on sequences held back, each time they were watched.

        Raises
        ------
        InputError
            For prompts or sequences that cannot be used, settings out of range, or heads that cannot be trained.
        StorageError
            If ``cache`` is damaged, belongs to something else, or is in use by another process.
        """
        processes = Processes(self._trunk.device)
        if processes.count > 1 and cache is None:
            raise InputError("cache: processes that train together share the corpus in it; give a folder")
        config = TrainingConfig(epochs, batch_size, learning_rate, entropy_weight, seed, precision, patience)
        plan = CorpusPlan(self.layers, tokens, max_new_tokens, seed)
        own, starts = self._text(prompts, sequences, "training")
        Trainer.try_heads(self._trunk, self.head_configs, config)
        if prompts is not None and starts is not None:
            # Shipped ones are mixed as they come; of others a part would otherwise be the first kinds alone.
            order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed)).tolist()
            starts = [starts[place] for place in order]
        with tempfile.TemporaryDirectory(prefix="offramp-") as scratch, ExitStack() as kept:
            folder = Path(cache if cache is not None else scratch)
            if processes.first:
                kept.enter_context(held(folder))
            # The first process makes what is missing; the others then find it.
            if not processes.first:
                processes.wait()
            corpus = prepare_corpus(
                self._trunk,
                plan,
                folder / "corpus",
                prompts=starts,
                topics=shipped_topics("training") if prompts is None else None,
                sequences=own,
                end_tokens=self._end_tokens(),
                progress=progress,
            )
            heads = build_heads(self._trunk, corpus, self.head_configs, seed)
            if processes.first:
                processes.wait()
            identity = {"corpus": (folder / "corpus" / "corpus.json").read_text("utf-8")}
            trainer = Trainer(
                self._trunk,
                heads,
                corpus,
                config,
                folder=folder if cache is not None else None,
                identity=identity,
                processes=processes,
            )
            history = trainer.run(progress, watch)
            rows = corpus.rows
        self.heads = heads.eval().requires_grad_(False)
        self.calibration = self._plan = None
        self._serving = None
        self._trained = {
            "tokens": rows,
            "text_hash": hash_of(starts if starts is not None else own or []),
            **asdict(config),
            "learning_rate": list(trainer.peaks.values()),
            "metrics": [asdict(item) for item in best_of(history)],
        }
        return history

    def cache_bytes(
        self,
        tokens: int = 50_000,
        *,
        prompts: Iterable[str] | None = None,
        sequences: Any = None,
        max_new_tokens: int = 96,
    ) -> int:
        """Bytes, nearly, that the corpus of `train_heads` with the same arguments takes in its cache."""
        own, starts = self._text(prompts, sequences, "training")
        plan = CorpusPlan(self.layers, tokens, max_new_tokens)
        return corpus_bytes(self._trunk, plan, prompts=starts, sequences=own)

    def score(self, sequences: Any, *, progress: Progress | None = None) -> Scores:
        """Confidence and correctness of every head on given sequences, by one teacher-forced pass.

        Parameters
        ----------
        sequences
            Texts, lists of token ids, `TokenSequence` (which says where the generated part begins), or a (B, T)
            tensor.  Without a `TokenSequence` every token after the first counts.

        Returns
        -------
        Scores
            ``scores`` (K, N) float32, ``correct`` (K, N) bool, ``groups`` (N,) int64, and the choices behind them.
        """
        heads = self._trained_heads()
        found = as_sequences(sequences, self.tokenizer, max_positions=self._trunk.max_positions)
        self._check_tokens(found)
        return score_sequences(self._trunk, heads, found, progress=progress)

    def calibrate(
        self,
        eps: float = 0.9,
        *,
        mode: str = "sequential",
        delta: float | None = None,
        prompts: Iterable[str] | None = None,
        sequences: Any = None,
        tokens: int = 10_000,
        max_new_tokens: int = 96,
        progress: Progress | None = None,
    ) -> Calibration:
        """Find the lowest thresholds with which heads agree with the full model at least ``eps`` of the time.

        ε speaks of this: the head's first choice equals the full model's first choice on raw logits, given the same
        prefix, at generated positions of text like the calibration text.  Nothing is promised about other text.

        Parameters
        ----------
        eps
            Target accuracy, in (0, 1).
        mode
            ``"sequential"``: every head on the tokens that reach it, so that all early tokens agree to ``eps``.
            ``"marginal"``: every head by itself on all tokens, as in the paper; deeper heads then miss ``eps`` on what
            shallower ones leave.  ``"budget"``: the fewest layers with at most 1 - eps of all tokens early and wrong.
        delta
            Certify: half of the sequences propose thresholds, the other half tests them, so that at confidence
            1 - delta every head reaches ``eps`` on new text of the kind, if its sequences are no longer than
            ``max_new_tokens``, or than the longest of the user's own.  Needs hundreds of sequences: see
            ``docs/guarantees.md``.
        prompts
            Prompts the full model continues greedily; default: the shipped calibration prompts.
        sequences
            The user's own text instead.
        tokens
            Stop continuing prompts once there are this many tokens.
        max_new_tokens
            Tokens each prompt is continued by.

        Returns
        -------
        Calibration
            Also kept as ``calibration``; printing it shows a table.  It answers any other ε as well.
        """
        eps = check_eps(eps)
        check_mode(mode, delta)
        self._trained_heads()
        own, starts = self._text(prompts, sequences, "calibration")
        longest = None
        if own is None:
            longest = max_new_tokens
            own = self.continue_greedily(
                starts or [], tokens=tokens, max_new_tokens=max_new_tokens, progress=progress
            )
        self._plan = None
        self.calibration = calibrate_scores(
            self.score(own, progress=progress),
            self.layers,
            self.num_layers,
            eps,
            mode=mode,
            delta=delta,
            dtype=str(self._trunk.dtype).removeprefix("torch."),
            text_hash=hash_of(own),
            max_group_size=longest,
        )
        return self.calibration

    @torch.no_grad()
    def plan(
        self,
        eps: float | None = None,
        *,
        scores: Scores | None = None,
        prompts: Sequence[str] | Sequence[torch.Tensor] | None = None,
        measure: int = 5,
        max_new_tokens: int = 48,
        progress: Progress | None = None,
    ) -> Plan:
        """Find which exits pay on this machine, and use only those from now on.

        Times the parts of a decoding step of one prompt at a time, replays scored text with every set of exits, and
        takes the fastest for ``mode="exit"`` at ``eps`` and for ``mode="verify"``, where thresholds change nothing but
        the time.  Exits that do not pay, by the prediction or when they are timed, are switched off until the next
        calibration.  ``generate`` with another ``eps=`` weighs the exits for that one by the same costs; with
        ``thresholds=`` it does not look at the plan.

        What is chosen of K exits is one of 2^K - 1 sets.  After ``calibrate(delta=...)`` each of them has its
        guarantee; that the one chosen for its speed keeps it holds with probability 1 - (2^K - 1) delta at least.

        Parameters
        ----------
        eps
            Target accuracy of exit mode; default: the calibration's.
        scores
            From `score`, on text the full model wrote; default: the calibration's.
        prompts
            Texts or token ids (T,) to continue for the timing; default: the first of the shipped calibration prompts.
        measure
            Prompts to time with each mode, beside the prediction; 0 for none.
        max_new_tokens
            Tokens to time each of them for.

        Returns
        -------
        Plan
            Printing it shows predicted and measured time a token.
        """
        heads = self._trained_heads()
        if self.calibration is None:
            raise InputError("calibration: plan chooses among calibrated thresholds; call calibrate first")
        if not isinstance(measure, int) or measure < 0:
            raise InputError(f"measure is {measure!r}: give how many prompts to time, 0 for none")
        self._warn_about_dtype(self.calibration)
        eps = self.calibration.eps if eps is None else check_eps(eps)
        starts = (
            self._starts(shipped_prompts("calibration") if prompts is None else prompts) if measure else []
        )
        stage = Stage.on(self._trunk.device)
        costs = measure_costs(self._trunk, heads, lambda logits: stage.exits(logits, 0.5))
        self._plan_at = cache(
            partial(
                make_plan,
                costs,
                scores or self.calibration.measured,
                self.layers,
                self.num_layers,
                self.calibration.planned,
            )
        )
        found = self._plan_at(eps)
        if measure:
            found = found.with_measured(self._time(found, starts[:measure], max_new_tokens, progress))
        self._plan = found
        return self._plan

    def _time(
        self, plan: Plan, prompts: Sequence[torch.Tensor], tokens: int, progress: Progress | None
    ) -> dict[str, list[float]]:
        """Seconds a token of every mode after the first one, in turns, for each prompt that all of them continue."""

        def timed(ids: torch.Tensor, mode: str, count: int) -> tuple[float, int]:
            start = time.perf_counter()
            self.generate(
                ids[None].to(self._trunk.device),
                attention_mask=torch.ones_like(ids)[None].to(self._trunk.device),
                mode=mode,
                thresholds=plan.best(mode).thresholds,
                max_new_tokens=count,
                do_sample=False,
            )
            return time.perf_counter() - start, self.last_stats.tokens if self.last_stats else 0

        taken: dict[str, list[float]] = {"off": [], "exit": [], "verify": []}
        for turn, ids in enumerate([prompts[0], *prompts]):
            # The whole model's: an exit would put off a part of reading the prompt.
            prefill, first = timed(ids, "off", 1)
            spent = {mode: timed(ids, mode, tokens) for mode in taken}
            # The first turn warms up.
            if turn and all(count > first for _, count in spent.values()):
                for mode, (seconds, count) in spent.items():
                    taken[mode].append((seconds - prefill) / (count - first))
            if progress is not None:
                progress("timing", turn, len(prompts))
        return taken

    def _starts(self, prompts: Sequence[str] | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Token ids (T,) of prompts that leave room to continue, given as texts or as ids."""
        rows = [row for row in prompts if isinstance(row, torch.Tensor)]
        if not rows or len(rows) != len(prompts):
            rows = encode_prompts(prompts, self.tokenizer, max_positions=self._trunk.max_positions)  # type: ignore[arg-type]  # texts here
        for index, row in enumerate(rows):
            check_ids(self._trunk, row, f"prompts[{index}]")
            check_length(len(row) + 1, self._trunk.max_positions, f"prompts[{index}]")
        return rows

    def continue_greedily(
        self,
        prompts: Sequence[str] | Sequence[torch.Tensor],
        *,
        tokens: int | None = None,
        max_new_tokens: int = 96,
        progress: Progress | None = None,
    ) -> list[TokenSequence]:
        """Let the full model continue prompts greedily, 96 at a time, until there are ``tokens`` new tokens.

        Parameters
        ----------
        prompts
            Texts, or token ids (T,) of each.

        Returns
        -------
        list of TokenSequence
            Prompt and continuation, at least one token each.
        """
        rows = self._starts(prompts)
        for name, value in (("max_new_tokens", max_new_tokens), ("tokens", tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}: give a whole number of at least 1")
        wanted = len(rows) * max_new_tokens if tokens is None else tokens
        found: list[TokenSequence] = []
        written = start = 0
        while start < len(rows) and written < wanted:
            end = start + min(_BATCH, -(-(wanted - written) // max_new_tokens))
            batch = continue_prompts(
                self._trunk, rows[start:end], max_new_tokens=max_new_tokens, end_tokens=self._end_tokens()
            )
            found += batch.sequences
            written += sum(item.generated for item in batch.sequences)
            start = end
            if progress is not None:
                progress("continuing", min(written, wanted), wanted)
        return found

    def agreement(
        self,
        sequences: Sequence[Any],
        prompt_lengths: Sequence[int] | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[int, int]:
        """Count generated tokens that are the full model's first choice given the emitted prefix.

        Parameters
        ----------
        sequences
            Token ids of each sequence, or `TokenSequence`.
        prompt_lengths
            Length of the prompt in each; not needed for `TokenSequence`.

        Returns
        -------
        agreeing, total : int
        """
        if prompt_lengths is not None:
            sequences = [
                TokenSequence(torch.as_tensor(item), length)
                for item, length in zip(sequences, prompt_lengths, strict=True)
            ]
        found = as_sequences(sequences, self.tokenizer, max_positions=self._trunk.max_positions)
        return agreement(self._trunk, found, progress=progress)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        mode: str = "exit",
        eps: float | None = None,
        thresholds: Sequence[float] | None = None,
        max_pending: int | None = None,
        audit: float | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor | EarlyExitOutput:
        """Generate with early exits; takes what transformers' ``generate`` takes.

        Parameters
        ----------
        inputs : (B, P) int64
            Prompts, left-padded; also as ``input_ids=``, with ``attention_mask=``.
        mode
            ``"exit"``: a head whose margin reaches its threshold emits its token.  ``"verify"``: its token is a draft
            which the whole model confirms or corrects, so that the output is the whole model's own (in distribution,
            when sampling; up to rounding where two logits tie).  ``"off"``: the whole model for every token.
        eps
            Use the thresholds for this ε instead of the calibration's own.
        thresholds
            Use these thresholds, one a head; inf switches a head off.
        max_pending
            Most positions that may wait for deeper layers after a step; ``None`` for no limit.
        audit
            Share of the early tokens to compare with the whole model's own, for `monitor`: drawn at random beforehand,
            compared when the last layers run anyway or at the end.  In verify mode all are that were judged (up to the
            first of a run that did not hold), at no cost but for a plan's: drafts then have the calibration's
            thresholds, whose promise is what is audited.
        streamer, **kwargs
            As in transformers: generation_config, max_new_tokens, do_sample, temperature, logits_processor,
            stopping_criteria, stop_strings, return_dict_in_generate, ...  Beam search is refused.  Processors may be
            asked for a position more than once: what they return must follow from what they are given.

        Returns
        -------
        torch.Tensor or EarlyExitOutput
            Prompts and new tokens (B, T); with ``return_dict_in_generate=True`` an output that also has
            ``exit_layers`` and ``stats``.  ``last_stats`` keeps the statistics in either case.

        Raises
        ------
        InputError
            For a mode, threshold or argument that cannot be used.
        AgreementError
            After an alarm of a `monitor` that raises.
        """
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        check_request(self._trunk, ids, kwargs)
        take_stop_strings(self.model, self.tokenizer, kwargs)
        share = check_share(audit) if mode != "verify" else float(check_share(audit) > 0)
        exits = self._exits(mode, eps, thresholds, audited=share > 0)
        monitor = self._monitor_of(mode, eps, thresholds) if share else None
        if max_pending is not None and (not isinstance(max_pending, int) or max_pending < 0):
            raise InputError(f"max_pending is {max_pending!r}: give a whole number, or None for no limit")
        result: list[EarlyExitOutput] = []
        audits: list[Audit] = []

        # The signature is transformers' own: it decides by the names what to hand over.
        def loop(
            _model: Any,
            input_ids: torch.Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            check_config(self._trunk, generation_config, mode)
            input_ids = input_ids.to(self._trunk.device)
            mask = model_kwargs.get("attention_mask")
            if mask is not None and bool(mask.all()):
                mask = None
            checks = None
            if monitor is not None:
                room = max(generation_config.max_length - input_ids.shape[1], 1)
                depths = [item.layer for item in exits]
                checks = Audit.drawn(monitor, depths, share, len(input_ids), room)
                audits.append(checks)
            rollout = Rollout(
                self._trunk,
                exits,
                input_ids,
                None if mask is None else mask.to(input_ids.device),
                None if mode == "verify" else max_pending,
                None if mode == "verify" else checks,
            )
            run: Any = decode
            if mode == "verify":
                run = partial(decode_verified, max_pending=max_pending, audit=checks)
            output = run(
                rollout,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
            )
            result.append(output)
            return output if generation_config.return_dict_in_generate else output.sequences

        model: Any = self.model  # typed in part
        generated: torch.Tensor | EarlyExitOutput = model.generate(
            ids, streamer=streamer, custom_generate=loop, **kwargs
        )
        self.last_stats = result[0].stats
        for checks in audits:
            assert monitor is not None
            checks.report(monitor)
        return generated

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write heads, thresholds and how they were obtained to a folder; the base model is not copied.

        Raises
        ------
        StorageError
            If the folder holds something else.
        """
        self._trained_heads()
        assert self.heads is not None
        save_exits(folder, self._trunk, self.heads, self.calibration, self._trained)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to a Hub repository, with a model card; made where there is none.

        Parameters
        ----------
        repo_id
            ``owner/name``.
        **kwargs
            As in transformers: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``.

        Returns
        -------
        str
            Address of the commit.

        Raises
        ------
        StorageError
            If the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
            folder = Path(scratch) / "exits"
            self.save_pretrained(folder)
            return push_exits(folder, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> EarlyExitModel:
        """Load heads written by `save_pretrained` or `push_to_hub`.

        Parameters
        ----------
        folder
            The folder, or a Hub repository as ``owner/name``.
        model, tokenizer
            The base model, if it is loaded already; else it is loaded by the name it had.
        revision
            Which version of the heads' repository.  For another version of the base model than its newest, load it
            and pass ``model=``.
        token
            With whose rights heads and base model are read from the Hub.
        **kwargs
            Passed to `offramp.load_model`: ``dtype``, ``device``, and where to look, which holds for the heads as
            well: ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises
        ------
        StorageError
            If the folder is missing or damaged.
        InputError
            If the heads are of a kind that is not registered.
        ModelError
            If the model is not the one the heads were trained on.
        """
        where = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        saved = load_exits(fetch_exits(folder, revision=revision, token=token, **where))
        if model is None:
            if not saved.base_model:
                raise InputError("model: the folder does not name its base model; load it and pass model=")
            model, tokenizer = load_model(saved.base_model, token=token, **kwargs)
        loaded = cls(model, tokenizer, layers=saved.layers, head=saved.head_configs)
        loaded.heads = saved.heads_for(loaded._trunk).eval().requires_grad_(False)
        loaded.calibration = saved.calibration
        loaded._trained = saved.config.get("training", {})
        return loaded

    def _text(
        self, prompts: Iterable[str] | None, sequences: Any, split: str
    ) -> tuple[list[TokenSequence] | None, list[torch.Tensor] | None]:
        """Sequences of the user's own, or encoded prompts to continue; one of the two is None."""
        if prompts is not None and sequences is not None:
            raise InputError("prompts and sequences are both given: give one of them")
        if sequences is not None:
            own = as_sequences(sequences, self.tokenizer, max_positions=self._trunk.max_positions)
            self._check_tokens(own)
            return own, None
        texts = shipped_prompts(split) if prompts is None else prompts  # type: ignore[arg-type]  # a split's name
        return None, encode_prompts(texts, self.tokenizer, max_positions=self._trunk.max_positions)

    def _exits(
        self, mode: str, eps: float | None, thresholds: Sequence[float] | None, *, audited: bool = False
    ) -> list[Exit]:
        """List the exits that can be taken: those whose threshold a margin can reach."""
        if mode not in ("exit", "verify", "off"):
            raise InputError(f"mode is {mode!r}: choose 'exit', 'verify' or 'off'")
        if mode == "off":
            return []
        heads = self._trained_heads()
        given, _ = self._thresholds(mode, eps, thresholds, audited)
        try:
            values = [float(value) for value in given]
        except (TypeError, ValueError):
            values = []
        if len(values) != len(self.layers) or any(math.isnan(value) for value in values):
            raise InputError(
                f"thresholds is {thresholds}: give one number for each of the {len(self.layers)} exits"
            )
        pairs = zip(self.layers, values, strict=True)
        # A margin never exceeds 1, so a higher threshold is a head switched off.
        return [Exit(layer, heads.after(layer), value) for layer, value in pairs if value <= 1]

    def _thresholds(
        self, mode: str, eps: float | None, thresholds: Sequence[float] | None, audited: bool
    ) -> tuple[Sequence[float], float | None]:
        """Thresholds asked for, and the ε they were calibrated for; None for thresholds of the user's own."""
        if self._plan is not None and thresholds is None and not (mode == "verify" and audited):
            # Verify mode's promise nothing, so there is nothing in them to audit.
            best = self._planned(mode, eps)
            return self._without_disabled(best.thresholds, best.eps)
        if thresholds is None:
            if self.calibration is None:
                raise InputError(
                    "thresholds: these heads are not calibrated; call calibrate first, or give thresholds"
                )
            self._warn_about_dtype(self.calibration)
            eps = self.calibration.eps if eps is None else check_eps(eps)
            return self._without_disabled(self.calibration.at(eps), eps)
        if eps is not None:
            raise InputError("eps and thresholds are both given: give one of them")
        return self._without_disabled(thresholds, None)

    def _planned(self, mode: str, eps: float | None) -> Option:
        """Return what the plan chose; for another ε than its own, what it would choose by the same costs."""
        assert self.calibration is not None
        assert self._plan is not None
        assert self._plan_at is not None
        wanted = self.calibration.eps if eps is None else check_eps(eps)
        plan = self._plan if mode == "verify" or wanted == self._plan.exit.eps else self._plan_at(wanted)
        return plan.best(mode)

    def _without_disabled(
        self, thresholds: Sequence[float], eps: float | None
    ) -> tuple[Sequence[float], float | None]:
        """Switch off the heads a monitor has disabled; calibrated ones are then for the heads that are left."""
        if self.monitor is None:
            return thresholds, eps
        self.monitor.require_silence()
        off = self.monitor.disabled.intersection(self.layers)
        if not off or len(thresholds) != len(self.layers):
            return thresholds, eps
        used = [
            head
            for head, (layer, tau) in enumerate(zip(self.layers, thresholds, strict=True))
            if layer not in off and tau <= 1
        ]
        if eps is not None and self.calibration is not None and used:
            return self.calibration.at(eps, used), eps
        return [tau if head in used else math.inf for head, tau in enumerate(thresholds)], eps

    def _monitor_of(self, mode: str, eps: float | None, thresholds: Sequence[float] | None) -> Monitor | None:
        """Find the monitor of what is promised, or make one."""
        if mode == "off":
            return None
        _, promised = self._thresholds(mode, eps, thresholds, audited=True)
        budget = self.calibration is not None and self.calibration.mode == "budget"
        self.monitor = monitor_for(self.monitor, self.layers, promised, "tokens" if budget else "exits")
        return self.monitor

    def _trained_heads(self) -> ExitHeads:
        """Heads in the model's dtype, rounded as their configs say."""
        if self.heads is None:
            raise InputError(
                "heads: these exits are not trained; call train_heads first, or load with from_pretrained"
            )
        wanted = self._trunk.dtype, self._trunk.device
        if self._serving is None or self._serving[0] is not self.heads or self._serving[1] != wanted:
            self._serving = (self.heads, wanted, self.heads.serving(self._trunk.dtype))
        return self._serving[2]

    def _warn_about_dtype(self, calibration: Calibration) -> None:
        dtype = str(self._trunk.dtype).removeprefix("torch.")
        if dtype != calibration.dtype and not self._warned_dtype:
            self._warned_dtype = True
            warnings.warn(
                f"the thresholds were calibrated in {calibration.dtype} and the model runs in {dtype}: "
                "calibrate again for this dtype",
                UserWarning,
                stacklevel=4,
            )

    def _end_tokens(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        if end is None:
            return []
        return [int(token) for token in end] if isinstance(end, list | tuple) else [int(end)]

    def _check_tokens(self, sequences: Sequence[TokenSequence]) -> None:
        for index, item in enumerate(sequences):
            check_ids(self._trunk, item.tokens, f"sequences[{index}]")
