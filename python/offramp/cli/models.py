"""The subcommands on language models: their options.  What they do is in `pipeline` and `showcase`.

Those two load torch, which takes seconds, so they are imported when a command runs and not for its --help.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from offramp.cli.options import COUNT, EPS, EPS_LIST, FOLDER, LAYERS, prompts_option, where_options
from offramp.cli.session import Session, with_session


@click.command()
@click.option(
    "--folder",
    type=FOLDER,
    default=Path("runs/demo"),
    show_default=True,
    help="Where heads and report go, and where a second run finds them.",
)
@click.option("--tokens", type=COUNT, default=25_000, show_default=True, help="Tokens to train on.")
@where_options
@with_session
def demo(session: Session, *, folder: Path, tokens: int, dtype: str | None, device: str | None) -> None:
    """Show it all on a small model.

    Trains exits on SmolLM2-135M, calibrates them, generates with them, measures agreement and speed, and
    writes a report.  The first run takes minutes; a second one uses the heads of the first.
    """
    from offramp.cli import showcase  # noqa: PLC0415 - see the module's docstring

    showcase.demo(session, folder, tokens=tokens, dtype=dtype, device=device)


@click.command()
@click.argument("model")
@click.option("--layers", type=LAYERS, required=True, help="Exits after these layers, as 18,22,26.")
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    required=True,
    help="Folder for the heads.",
)
@click.option(
    "--head",
    type=click.Choice(["mlp", "adapter", "linear"]),
    default="mlp",
    show_default=True,
    help="Kind of head: a small transform, a decoder layer of the model's class, or the paper's output matrix.",
)
@click.option(
    "--shortlist",
    type=click.IntRange(0),
    help="Tokens a head can emit; 0: all  [default: 8192; linear: all].",
)
@click.option(
    "--init",
    type=click.Choice(["copy", "scratch"]),
    default="copy",
    show_default=True,
    help="Start a linear head from the model's output rows, or from noise.",
)
@click.option("--depth", type=COUNT, default=1, show_default=True, help="Decoder layers of an adapter.")
@click.option(
    "--bits",
    type=click.Choice(["8", "none"]),
    help="Round the weights of heads in use to 8 bits, or not at all  [default: 8; linear: none].",
)
@click.option("--tokens", type=COUNT, default=50_000, show_default=True, help="Tokens to train on.")
@click.option(
    "--max-new-tokens", type=COUNT, default=96, show_default=True, help="Tokens a prompt is continued by."
)
@click.option("--epochs", type=COUNT, default=2, show_default=True, help="Passes over them.")
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Stop when no head has agreed more for so many epochs; 0: never.",
)
@click.option("--batch-size", type=COUNT, default=256, show_default=True, help="Tokens a step, about.")
@click.option("--learning-rate", type=float, help="Its peak; default: what suits each head.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of matrix products in training; auto: bfloat16 on GPUs, and on CPUs with AMX or AVX-512 BF16.",
)
@click.option(
    "--entropy-weight", type=float, default=0.0, show_default=True, help="The paper's λ, in [0, 1)."
)
@click.option(
    "--cache",
    type=FOLDER,
    help="Folder for the tokens, so that a broken-off run goes on  [default: OUTPUT-cache].",
)
@prompts_option
@where_options
@with_session
def train(
    session: Session,
    *,
    model: str,
    layers: tuple[int, ...],
    output: Path,
    head: str,
    shortlist: int | None,
    init: str,
    depth: int,
    bits: str | None,
    tokens: int,
    max_new_tokens: int,
    epochs: int,
    patience: int,
    batch_size: int,
    learning_rate: float | None,
    precision: str,
    entropy_weight: float,
    cache: Path | None,
    prompts: Path | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Train exit heads for a model.

    They learn from text that MODEL writes itself.  The cache keeps it, the state of the training, and its
    metrics: a run that was broken off goes on, and other layers or kinds of head need no new text.  Under
    `torchrun --no-python` several processes train together.

    MODEL is "demo", a Hugging Face Hub id, a local folder, or a GGUF file.
    """
    from offramp.cli import pipeline  # noqa: PLC0415 - see the module's docstring

    named = output if output.name else output.resolve()  # "." has no name of its own
    pipeline.train(
        session,
        model,
        output,
        layers=layers,
        head=pipeline.head_config(head, shortlist, init, depth, bits),
        tokens=tokens,
        settings={
            "max_new_tokens": max_new_tokens,
            "epochs": epochs,
            "patience": patience or None,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "precision": precision,
            "entropy_weight": entropy_weight,
        },
        cache=cache or named.with_name(f"{named.name}-cache"),
        prompts=prompts,
        dtype=dtype,
        device=device,
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--eps", type=EPS, default=0.9, show_default=True, help="Target accuracy, in (0, 1).")
@click.option(
    "--mode",
    type=click.Choice(["sequential", "marginal", "budget"]),
    default="sequential",
    show_default=True,
    help="Each head on what reaches it; alone, as in the paper; or fewest layers within 1 - ε errors.",
)
@click.option(
    "--delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Certify for new text at confidence 1 - δ, as 0.05; needs some 50,000 tokens.",
)
@click.option("--tokens", type=COUNT, default=10_000, show_default=True, help="Tokens to calibrate on.")
@click.option(
    "--max-new-tokens",
    type=COUNT,
    default=96,
    show_default=True,
    help="Tokens a prompt is continued by, as many as when the exits serve.",
)
@click.option("--model", help="The base model, if the folder's own name for it does not lead to it.")
@prompts_option
@where_options
@with_session
def calibrate(
    session: Session,
    *,
    folder: Path,
    eps: float,
    mode: str,
    delta: float | None,
    tokens: int,
    max_new_tokens: int,
    model: str | None,
    prompts: Path | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Find thresholds for trained heads.

    They are stored with the heads in FOLDER.
    """
    from offramp.cli import pipeline  # noqa: PLC0415 - see the module's docstring

    ee = pipeline.open_exits(session, folder, model=model, dtype=dtype, device=device)
    pipeline.calibrate(
        session,
        ee,
        folder,
        eps=eps,
        mode=mode,
        delta=delta,
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        prompts=prompts,
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--mode",
    type=click.Choice(["exit", "verify", "off"]),
    default="exit",
    show_default=True,
    help="Heads emit tokens; heads draft tokens the whole model checks; no exits.",
)
@click.option("--eps", type=EPS, help="Target accuracy, in (0, 1)  [default: the calibration's].")
@click.option("-n", "--max-new-tokens", type=COUNT, default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--audit",
    type=click.FloatRange(0, 1),
    help="Share of early tokens to compare with the whole model's own; in verify mode all are.",
)
@click.option("--model", help="The base model, if the folder's own name for it does not lead to it.")
@where_options
@with_session
def generate(
    session: Session,
    *,
    folder: Path,
    prompt: str,
    mode: str,
    eps: float | None,
    max_new_tokens: int,
    temperature: float,
    audit: float | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Generate text with exits.

    Continues PROMPT with the exits in FOLDER; "-" reads the prompt from stdin.
    """
    from offramp.cli import pipeline  # noqa: PLC0415 - see the module's docstring

    if prompt == "-":
        prompt = sys.stdin.read()
    ee = pipeline.open_exits(session, folder, model=model, dtype=dtype, device=device)
    pipeline.generate(
        session,
        ee,
        prompt,
        mode=mode,
        eps=eps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        audit=audit,
    )


@click.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FOLDER...")
@click.option(
    "--eps",
    type=EPS_LIST,
    default="0.8,0.9,0.95",
    show_default=True,
    help="Target accuracies to decode at, in (0, 1).",
)
@click.option(
    "--grid",
    type=EPS_LIST,
    default="0.5,0.55,0.6,0.65,0.7,0.75,0.8,0.85,0.9,0.925,0.95,0.97,0.98,0.99",
    help="Target accuracies for the teacher-forced pass, in (0, 1)  [default: 14 from 0.5 to 0.99].",
)
@click.option("--count", type=COUNT, default=24, show_default=True, help="Prompts to evaluate on.")
@click.option(
    "--timed", type=click.IntRange(0), default=5, show_default=True, help="How many of them to time."
)
@click.option("-n", "--max-new-tokens", type=COUNT, default=48, show_default=True)
@click.option(
    "-o", "--output", type=FOLDER, help="Folder for the report, and for every number as CSV and JSON."
)
@click.option("--model", help="The base model, if the folder's own name for it does not lead to it.")
@prompts_option
@where_options
@with_session
def evaluate(
    session: Session,
    *,
    folders: tuple[Path, ...],
    eps: tuple[float, ...],
    grid: tuple[float, ...],
    count: int,
    timed: int,
    max_new_tokens: int,
    output: Path | None,
    model: str | None,
    prompts: Path | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Measure agreement, exits, confidence and speed.

    On held-out prompts, with the heads in each FOLDER: one pass over the full model's own text shows what any ε
    would do, and how well each confidence sorts.  The heads in the first FOLDER also decode, every token is checked
    against the full model, and some prompts are timed beside plain transformers.  Intervals are bootstrapped over the
    prompts.
    """
    from offramp.cli import pipeline  # noqa: PLC0415 - see the module's docstring

    pipeline.check_eps_list((*eps, *grid))
    exits = pipeline.open_head_sets(session, folders, model=model, dtype=dtype, device=device)
    pipeline.evaluate(
        session,
        exits,
        grid=grid,
        eps=eps,
        count=count,
        timed=timed,
        max_new_tokens=max_new_tokens,
        output=output,
        prompts=prompts,
    )


@click.command()
@click.argument("model", default="demo")
@click.option("--folder", type=FOLDER, help="Where everything goes  [default: runs/figures, or ...-quick].")
@click.option("--quick", is_flag=True, help="A tenth of the work.")
@click.option("--layers", type=LAYERS, help="Exits after these layers  [default: four, evenly spaced].")
@click.option(
    "--eps",
    type=EPS_LIST,
    default="0.5,0.6,0.7,0.8,0.9,0.95",
    show_default=True,
    help="Target accuracies of Figs. 2 to 4, in (0, 1).",
)
@click.option(
    "--tasks",
    default="offramp_facts,offramp_endings,offramp_pronouns",
    show_default=True,
    help="Benchmarks of Fig. 2, as mmlu,hellaswag,winogrande for those who have the data; none: no Fig. 2.",
)
@click.option("--limit", type=COUNT, help="Documents of each benchmark at most.")
@click.option(
    "--shortlist",
    type=click.IntRange(0),
    default=8192,
    show_default=True,
    help="Tokens the linear heads can emit; 0: all, as in the paper, which is slow without a GPU.",
)
@click.option("--tokens", type=COUNT, help="Tokens to train on  [default: 20000].")
@click.option("--count", type=COUNT, help="Held-out prompts to read and decode  [default: 24].")
@click.option("--heads", type=FOLDER, help="A folder of calibrated heads for Figs. 2 to 4.")
@where_options
@with_session
def figures(
    session: Session,
    *,
    model: str,
    folder: Path | None,
    quick: bool,
    layers: tuple[int, ...] | None,
    eps: tuple[float, ...],
    tasks: str,
    limit: int | None,
    shortlist: int,
    tokens: int | None,
    count: int | None,
    heads: Path | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Make the paper's figures for a model.

    Trains linear heads in the four ways of the paper and measures accuracy and entropy during training (Fig. 1),
    benchmark score (2), speed-up (3) and exits (4) against ε, and risk against coverage (5).  Each is a PNG and an SVG
    beside its numbers as CSV.  Run again, the command goes on where it was stopped.

    MODEL is "demo", a Hugging Face Hub id, a local folder, or a GGUF file.
    """
    from offramp.cli import paper  # noqa: PLC0415 - see the module's docstring

    paper.figures(
        session,
        model,
        folder or Path("runs/figures-quick" if quick else "runs/figures"),
        quick=quick,
        layers=layers or (),
        eps=eps,
        tasks=() if tasks == "none" else tuple(tasks.split(",")),
        limit=limit,
        shortlist=shortlist or None,
        tokens=tokens,
        count=count,
        heads=heads,
        dtype=dtype,
        device=device,
    )
