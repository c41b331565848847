"""``offramp lm-eval``: lm-evaluation-harness with the model ``offramp``."""

from __future__ import annotations

import click


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness.

    Takes the arguments of the harness's own command, which knows the model "offramp" here:

    offramp lm-eval --model offramp --model_args pretrained=my-exits,eps=0.9 --tasks hellaswag
    """
    from offramp.evaluation.harness import run_command  # noqa: PLC0415 - loads torch

    run_command(arguments)
