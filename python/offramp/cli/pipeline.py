"""What the subcommands on language models do; loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from offramp.cli import views
from offramp.cli.session import Session, plain
from offramp.decision import decide
from offramp.errors import InputError
from offramp.evaluation import evaluate as evaluation
from offramp.evaluation.decoded import model_inputs, split_text
from offramp.evaluation.tables import write_csv
from offramp.llm.calibrating import check_eps
from offramp.llm.decoding import EarlyExitOutput
from offramp.llm.files import write_json, write_text
from offramp.llm.heads import HeadConfig
from offramp.llm.loading import load_model
from offramp.llm.model import EarlyExitModel
from offramp.llm.planning import measure_heads
from offramp.llm.processes import Processes
from offramp.llm.prompts import prompts as shipped_prompts
from offramp.llm.storage import require_free
from offramp.llm.training import HeadMetrics, best_of

_DTYPES = ("float32", "bfloat16", "float16")


def prepare(session: Session, dtype: str | None, device: str | None) -> None:
    """Seed torch, set its threads, keep transformers' notes out of our output, and check the options."""
    if dtype not in (None, "auto", *_DTYPES):
        raise InputError(f"--dtype is {dtype}: give one of {', '.join(_DTYPES)}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(
                f"--device is {device}: torch has no such device here; give cpu, or cuda"
            ) from error
    torch.manual_seed(session.seed)
    if session.threads is not None:
        torch.set_num_threads(session.threads)
    notes: Any = transformers.utils.logging
    notes.set_verbosity_error()
    if not session.draws:
        notes.disable_progress_bar()


def open_model(
    session: Session, name: str, *, dtype: str | None, device: str | None, unpacked: Path | None = None
) -> tuple[Any, Any]:
    """Load the base model and its tokenizer."""
    prepare(session, dtype, device)
    session.say(f"Loading {name}")
    return load_model(name, dtype=dtype, device=device, unpacked=unpacked)


def open_exits(
    session: Session, folder: Path, *, model: str | None, dtype: str | None, device: str | None
) -> EarlyExitModel:
    """Load heads, and the base model they belong to."""
    prepare(session, dtype, device)
    session.say(f"Loading {folder}")
    if model is None:
        return EarlyExitModel.from_pretrained(folder, dtype=dtype, device=device)
    base, tokenizer = load_model(model, dtype=dtype, device=device)
    return EarlyExitModel.from_pretrained(folder, model=base, tokenizer=tokenizer)


def open_head_sets(
    session: Session, folders: Sequence[Path], *, model: str | None, dtype: str | None, device: str | None
) -> dict[str, EarlyExitModel]:
    """Load several head sets on one base model, each under its folder's name."""
    names = [folder.name if len(folders) > 1 else str(folder) for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise InputError("FOLDER names the same heads twice: name each folder once")
    first = open_exits(session, folders[0], model=model, dtype=dtype, device=device)
    others = [
        EarlyExitModel.from_pretrained(folder, model=first.model, tokenizer=first.tokenizer)
        for folder in folders[1:]
    ]
    return dict(zip(names, [first, *others], strict=True))


def head_config(kind: str, shortlist: int | None, init: str, depth: int, bits: str | None) -> HeadConfig:
    """Read the options of a head; a shortlist of 0 is the whole vocabulary."""
    chosen = HeadConfig.of(kind)
    rounded: dict[str | None, Literal[8] | None] = {None: chosen.bits, "8": 8, "none": None}
    return HeadConfig(
        chosen.kind,
        shortlist=chosen.shortlist if shortlist is None else shortlist or None,
        init="scratch" if init == "scratch" else "copy",
        depth=depth,
        bits=rounded[bits],
    )


def train(
    session: Session,
    name: str,
    output: Path,
    *,
    layers: tuple[int, ...],
    head: HeadConfig,
    tokens: int,
    settings: dict[str, Any],
    cache: Path,
    prompts: Path | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Train heads and store them in a folder."""
    # Said before an hour of training rather than after it; storing them checks again.
    require_free(output)
    _require_outside(output, cache)
    starts = read_prompts(prompts)
    processes = Processes(device)
    # One speaks for all.
    session = session if processes.first else replace(session, quiet=True)
    model, tokenizer = open_model(session, name, dtype=dtype, device=device)
    ee = EarlyExitModel(model, tokenizer, layers=layers, head=head)
    size = ee.cache_bytes(tokens, prompts=starts, max_new_tokens=settings["max_new_tokens"])
    session.say(f"The corpus takes {size / 1e9:.2f} GB of disk in {cache}")
    with session.progress() as progress:
        history = ee.train_heads(
            tokens=tokens,
            prompts=starts,
            cache=cache,
            seed=session.seed,
            progress=progress,
            watch=lambda metrics: session.say(views.metrics_line(metrics)),
            **settings,
        )
    if not processes.first:
        return
    ee.save_pretrained(output)
    seconds = [row[0] for row in measure_heads(ee.trunk, ee.heads_in_use, partial(decide, tau=0.5))]
    rows = [
        {**asdict(item), "eps": item.eps, "seconds": taken, **ee.heads_in_use.after(item.layer).cost()}
        for item, taken in zip(best_of(history), seconds, strict=True)
    ]
    session.show(views.metrics_table(rows))
    plot = _plot(history, cache / f"{output.name}.png")
    session.show(f"Heads stored in {output}; metrics in {cache}{plot}; next: offramp calibrate {output}")
    session.result({"folder": str(output), "metrics": rows})


def _require_outside(output: Path, cache: Path) -> None:
    """Refuse a cache in the folder of the heads, which is replaced whole."""
    if cache.resolve().is_relative_to(output.resolve()):
        raise InputError(
            f"--cache is {cache}: the folder of the heads, {output}, can hold nothing else; give a folder outside it"
        )


def _plot(history: list[HeadMetrics], picture: Path) -> str:
    """Draw the training where matplotlib is there; returns what to say of it."""
    if find_spec("matplotlib") is None:
        return " (a plot of them needs `pip install offramp[plot]`)"
    from offramp.evaluation.training import plot_training  # noqa: PLC0415  # an extra

    plot_training(history, picture)
    return f", drawn in {picture}"


def calibrate(
    session: Session,
    ee: EarlyExitModel,
    folder: Path,
    *,
    eps: float,
    mode: str,
    delta: float | None,
    tokens: int,
    max_new_tokens: int,
    prompts: Path | None,
) -> None:
    """Calibrate heads and store the thresholds beside them."""
    # Said before the work rather than after it, as in `train`.
    require_free(folder)
    starts = read_prompts(prompts)
    with session.progress() as progress:
        calibration = ee.calibrate(
            eps,
            mode=mode,
            delta=delta,
            prompts=starts,
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    ee.save_pretrained(folder)
    session.show(str(calibration))
    session.show(calibration.side_by_side())
    session.result(
        {
            **calibration.to_dict(),
            "coverage": calibration.coverage,
            "accuracy": calibration.accuracy,
            "by_mode": calibration.by_mode(),
            "folder": str(folder),
        }
    )


def generate(
    session: Session,
    ee: EarlyExitModel,
    prompt: str,
    *,
    mode: str,
    eps: float | None,
    max_new_tokens: int,
    temperature: float,
    audit: float | None,
) -> None:
    """Continue a prompt, and show which exit wrote which token."""
    inputs = model_inputs(ee, [prompt])
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    out = ee.generate(
        **inputs,
        mode=mode,
        eps=None if mode == "off" else eps,
        max_new_tokens=max_new_tokens,
        audit=audit,
        return_dict_in_generate=True,
        **sampling,
    )
    assert isinstance(out, EarlyExitOutput)
    assert out.stats is not None
    assert out.exit_layers is not None
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    layers = out.exit_layers[0].tolist()
    pieces = split_text(ee.tokenizer, tokens)
    if session.out.is_terminal:
        session.show(views.coloured_text(zip(pieces, layers, strict=True), ee.layers))
        session.show(views.legend(ee.layers, out.stats.tokens_by_exit))
    else:
        session.show("".join(pieces))
    if ee.monitor is not None:
        session.show(str(ee.monitor))
    session.result(
        {
            "text": "".join(pieces),
            "tokens": tokens,
            "exit_layers": layers,
            "stats": out.stats.to_dict(),
            "monitor": None if ee.monitor is None else ee.monitor.to_dict(),
        }
    )


def evaluate(
    session: Session,
    exits: dict[str, EarlyExitModel],
    *,
    grid: tuple[float, ...],
    eps: tuple[float, ...],
    count: int,
    timed: int,
    max_new_tokens: int,
    output: Path | None,
    prompts: Path | None,
) -> None:
    """Read, decode and time prompts with head sets, and show and store what was found."""
    texts = (read_prompts(prompts) or shipped_prompts("held_out"))[:count]
    if output is not None:
        # Load matplotlib and jinja2; where one is missing, it is said before the work and not after it.
        from offramp.evaluation.drawing import EVALUATION, draw_figures  # noqa: PLC0415
        from offramp.evaluation.report import render_report  # noqa: PLC0415

        output.mkdir(parents=True, exist_ok=True)
    with session.progress() as progress:
        found = evaluation.evaluate(
            exits,
            texts,
            grid=grid,
            eps=eps,
            max_new_tokens=max_new_tokens,
            timed=timed,
            seed=session.seed,
            say=session.say,
            progress=progress,
        )
    tables = found.tables()
    of_interest = [row for row in tables["thresholds"] if row["eps"] in eps] or tables["thresholds"]
    session.show(
        *views.forced_tables(found.forced),
        views.thresholds_table(of_interest),
        views.confidence_table(tables["confidence"]),
    )
    if found.decoded:
        session.show(views.agreement_table(found.decoded))
    if found.speed is not None:
        session.show(views.speed_table(found.speed))
    result = {"model": found.model, **tables, "machine": found.machine}
    if output is not None:
        for name, rows in tables.items():
            write_csv(output / f"{name}.csv", rows)
        write_json(output / "evaluation.json", plain(result))
        draw_figures(EVALUATION, tables, output)
        facts = {
            "decoding": f"greedy, {len(texts)} prompts, at most {max_new_tokens} tokens each",
            **{f"heads in {name}": describe_training(ee) for name, ee in exits.items()},
        }
        write_text(output / "report.html", render_report(found.findings(facts)))
        session.show(f"The report, its diagrams as PNG and SVG, and every number as CSV and JSON: {output}")
    session.result(result)


def describe_training(ee: EarlyExitModel) -> str:
    """Say in a line what heads are and what they were trained on."""
    known = ee.training
    trained = f", trained {known['epochs']} times on {known['tokens']:,} tokens" if "epochs" in known else ""
    return f"{describe_kinds(ee.head_configs)}{trained}"


def describe_kinds(configs: Mapping[int, HeadConfig]) -> str:
    """Name the kind of the heads; of several kinds, name the layers each is after."""
    layers: dict[str, list[str]] = {}
    for layer, config in configs.items():
        listed = f" over a shortlist of {config.shortlist:,} tokens" if config.shortlist else ""
        deep = f" of {config.depth} layers" if config.depth > 1 else ""
        layers.setdefault(f"{config.kind}{deep}{listed}", []).append(str(layer))
    if len(layers) == 1:
        return next(iter(layers))
    return "; ".join(f"{kind} after {', '.join(at)}" for kind, at in layers.items())


def check_eps_list(eps: tuple[float, ...]) -> None:
    """Refuse a target outside (0, 1) before anything is loaded."""
    for target in eps:
        if target in (0, 1):
            raise InputError(
                f"eps is {target:g}: 0 asks nothing of the heads, and 1 that they never err, which no text can show; "
                "give targets between the two, such as 0.01,0.99"
            )
        check_eps(target)


def read_prompts(path: Path | None) -> list[str] | None:
    """Read prompts from a text file, one a line; None for no file."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: this is not a UTF-8 text file; give one prompt a line") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"{path}: there is no prompt in it; give one prompt a line")
    return found
