"""The command's entry: its list of subcommands, and what every failure turns into."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import click

import offramp
from offramp.cli.bench import bench
from offramp.cli.harness import lm_eval
from offramp.cli.info import info
from offramp.cli.models import calibrate, demo, evaluate, figures, generate, train
from offramp.cli.threshold import threshold
from offramp.errors import OfframpError

DONE, BUG, USER, INTERRUPTED = 0, 1, 2, 130
EXTRAS = {
    "llm": ("torch", "transformers", "safetensors", "accelerate", "filelock"),
    "cli": ("jinja2",),
    "plot": ("matplotlib",),
    "eval": ("lm_eval",),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(offramp.__version__, prog_name="offramp")
@click.pass_context
def command(context: click.Context) -> None:
    """Early exits for language models, and exact confidence thresholds for any classifier."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _subcommand in (demo, train, calibrate, generate, evaluate, lm_eval, figures, bench, threshold, info):
    command.add_command(_subcommand)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `arguments` are those of the process if not given."""
    try:
        with warnings.catch_warnings():
            # Those are for whoever maintains the code they come from, not for whoever runs a command.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = _show_warning
            outcome = command.main(args=arguments, prog_name="offramp", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return _refuse("offramp", "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing more can be said to it, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        fault = _fault_of_the_user(error)
        return _refuse(*fault) if fault else _report_bug()
    return outcome if isinstance(outcome, int) else DONE


def _fault_of_the_user(error: Exception) -> tuple[str, str] | None:
    """Say where and what, if the input is to blame; None for a bug."""
    match error:
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "offramp"
            return where, f"{error.format_message().rstrip('.')} (see `{where} --help`)"
        case click.ClickException():
            return "offramp", error.format_message()
        case OfframpError():
            return "offramp", str(error)
        case ImportError():
            missing = (error.name or "").partition(".")[0]
            extra = next((extra for extra, packages in EXTRAS.items() if missing in packages), None)
            return ("offramp", f"this needs {missing}: run `pip install offramp[{extra}]`") if extra else None
    return _fault_of_the_disk(error)


def _fault_of_the_disk(error: Exception) -> tuple[str, str] | None:
    match error:
        case FileNotFoundError() | PermissionError() | IsADirectoryError() | NotADirectoryError():
            return ("offramp", f"{error.filename}: {error.strerror}") if error.filename else None
    # safetensors puts the system's words into an error of its own.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or os.strerror(errno.ENOSPC) in str(error):
        return (
            "offramp",
            "the disk is full: free some space and run the command again; what was written is kept",
        )
    return None


def _show_warning(message: Warning | str, *_where: Any, **_from: Any) -> None:
    sys.stderr.write(f"offramp: warning: {' '.join(str(message).split())}\n")


def _refuse(where: str, sentence: str, code: int = USER) -> int:
    sys.stderr.write(f"{where}: {' '.join(sentence.split())}\n")
    return code


def _report_bug() -> int:
    traceback.print_exc()
    sys.stderr.write("offramp: this is a bug in offramp; please report it with the lines above\n")
    return BUG
