"""Entry point of the command line: dispatches commands and turns expected errors into one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from argparse import ArgumentError
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from sdzero.graders.errors import GraderError
from sdzero.utils.files import is_full
from sdzero.utils.process import (
    Stopped,
    enable_crash_stacks,
    exit_now,
    exit_on_signals,
    exit_status,
    exit_with_parent,
    export_parent_id,
)


class Command(NamedTuple):
    """A command, imported only when it is called.

    Args:
        entry: `module:function` below `sdzero`; the function takes the arguments that follow the command.
        arguments: placeholder in the usage message.
        summary: one line of the usage message.
        samples: samples or trains for a long time, so that signals have to end it cleanly.
    """

    entry: str
    arguments: str
    summary: str
    samples: bool = False


CONFIG = "--config FILE"
EVALUATE = "sample and score held-out questions"
COMMANDS = {
    "run": Command("cli.stage_commands:run", "RECIPE_DIR", "run all stages of a recipe; resumable"),
    "collect": Command("cli.stage_commands:collect", CONFIG, "sample and verify revisions (phase 1 data)", True),
    "fit": Command("cli.stage_commands:lightning", CONFIG, "train; any LightningCLI override may follow", True),
    "validate": Command("cli.stage_commands:lightning", CONFIG, EVALUATE, True),
    "test": Command("cli.stage_commands:lightning", CONFIG, f"{EVALUATE}, and write results.json", True),
    "predict": Command("cli.stage_commands:lightning", CONFIG, f"{EVALUATE}, and write every response", True),
    "judge": Command("cli.judge:main", "PROGRAM --language L --tests FILE", "run a program's tests in a sandbox"),
    "grade": Command("cli.grade:main", "--task NAME FILE", "verify stored responses; count the reasons"),
    "init": Command("cli.init:main", "[NAME]", "copy a shipped recipe into this folder for editing"),
    "import-gguf": Command("models.gguf:main", "FILE FOLDER", "convert a GGUF file into a model folder"),
    "compare": Command("evaluation.compare:main", "RUN RUN ...", "avg@k per benchmark, with paired differences"),
    "decontaminate": Command(
        "evaluation.decontaminate:main", "RECIPE_DIR", "find benchmark text in training questions"
    ),
    "report": Command("report:main", "RUN_DIR", "one HTML page about a run, finished or not"),
    "doctor": Command("cli.doctor:main", "", "check this machine's installation and name remedies"),
}
USAGE = "\n".join(
    [
        "usage: sdzero COMMAND ...\n",
        *(f"  {f'{name} {command.arguments}':40} {command.summary}" for name, command in COMMANDS.items()),
        "\n`sdzero COMMAND --help` explains a command.",
    ]
)


def main() -> None:
    arguments = sys.argv[1:]
    if (here := os.getcwd()) not in sys.path:  # a class_path may name a user's module; `python -m` adds it already
        sys.path.append(here)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    name = arguments[0]
    if name not in COMMANDS:
        sys.exit(f"sdzero: unknown command {name!r}\n\n{USAGE}")
    exit_with_parent()
    enable_crash_stacks()
    try:
        if COMMANDS[name].samples:
            with exit_on_signals(name), export_parent_id():
                _call(name, arguments[1:])
        else:
            _call(name, arguments[1:])
    except Stopped as stopped:
        exit_now(int(str(stopped.code)))
    except KeyboardInterrupt:
        print(f"sdzero {name}: ended by SIGINT", file=sys.stderr)
        sys.exit(exit_status(signal.SIGINT))
    except ArgumentError as error:
        print(f"sdzero {name}: error: {_one_line(str(error))}; `sdzero {name} --help` lists the keys", file=sys.stderr)
        sys.exit(2)
    except (ValueError, TypeError, OSError, ImportError, GraderError, RuntimeError) as error:
        if is_full(error):
            sys.exit(f"sdzero {name}: error: {error}. Finished work is kept: free some space and run the command again")
        own = find_own_error(error)
        if own is None or (isinstance(error, RuntimeError) and not type(error).__module__.startswith("sdzero.")):
            raise  # a plain RuntimeError that passes through our code is torch's
        sys.exit(f"sdzero {name}: error: {own}")


def _call(name: str, arguments: list[str]) -> None:
    module, _, function = COMMANDS[name].entry.partition(":")
    getattr(import_module(f"sdzero.{module}"), function)(arguments)


def find_own_error(error: BaseException) -> BaseException | None:
    """Find the last error in the chain of causes that was raised by this package; it needs no traceback.

    jsonargparse wraps the error that a constructor raised in one of its own.
    """
    package, found = Path(__file__).parents[1].resolve(), None
    link: BaseException | None = error
    while link is not None:
        frames = traceback.extract_tb(link.__traceback__)  # empty for a cause that was never raised
        if frames and package in Path(frames[-1].filename).resolve().parents:
            found = link
        link = link.__cause__
    return found


def _one_line(message: str) -> str:
    """Strip jsonargparse's list of attempted types from its message."""
    boilerplate = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(boilerplate))
