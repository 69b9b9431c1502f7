"""The command line. A thin dispatcher: fit, validate, test and predict are LightningCLI's."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sdzero.graders.errors import GraderError
from sdzero.utils.disk_full import add_path_to_errors, is_full
from sdzero.utils.process import (
    Stopped,
    enable_crash_stacks,
    exit_now,
    exit_on_signals,
    exit_status,
    exit_with_parent,
    export_parent_id,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

USAGE = """usage: sdzero COMMAND ...

  run RECIPE_DIR             collect -> SRT -> SelfDistill -> evaluation, resumable
  collect --config FILE      phase 1 data
  fit --config FILE          train (SRT or SelfDistill); any LightningCLI override follows
  validate|test|predict --config FILE
                             sample and score held-out questions
  judge PROGRAM --language L --tests FILE
                             a program against its tests, in a sandbox; the verdict as JSON
  grade --task NAME FILE     stored responses through a task's verifier: a verdict per row, a summary by reason
  init [NAME]                a shipped recipe, written into this folder to be edited
  import-gguf FILE FOLDER    a model folder out of a GGUF file
  compare RUN RUN ...        avg@k per benchmark and averaged, with paired differences to the first
  decontaminate RECIPE_DIR   which benchmark questions share text with the training's
  report RUN_DIR             one HTML page about a run, finished or not
  doctor                     what is installed here, what is missing, and what to do about it

Each command says more with --help."""


def _collect_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from sdzero.data.collect import Collect

    parser = ArgumentParser(prog="sdzero collect", description=Collect.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with these keys")
    parser.add_argument("--seed_everything", type=int, default=0, help="the run's seed")
    parser.add_class_arguments(Collect, sub_configs=True)  # a value may be a YAML file beside the config
    return parser


def collect(arguments: list[str]) -> None:
    from sdzero.data.collect import Collect

    parser = _collect_parser()
    config = parser.parse_args(arguments)
    # what seed_everything would set; every draw is seeded by its name, and Lightning takes seconds to import
    os.environ["PL_GLOBAL_SEED"] = str(config.seed_everything)
    values = parser.instantiate(config).as_dict()
    collection = Collect(**{k: v for k, v in values.items() if k not in ("config", "seed_everything")})
    with add_path_to_errors(collection.out):
        collection.run()


def lightning(_: list[str]) -> None:
    from sdzero.cli.lightning import SDZeroCLI

    SDZeroCLI.main()


def run(arguments: list[str]) -> None:
    from sdzero.pipeline.run import main

    main(arguments, _check)


def report(arguments: list[str]) -> None:
    from sdzero.report import main

    main(arguments)


def compare(arguments: list[str]) -> None:
    from sdzero.evaluation.compare import main

    main(arguments)


def decontaminate(arguments: list[str]) -> None:
    from sdzero.evaluation.decontaminate import main

    main(arguments)


def doctor(arguments: list[str]) -> None:
    from sdzero.cli.doctor import main

    main(arguments)


def judge(arguments: list[str]) -> None:
    from sdzero.cli.judge import main

    main(arguments)


def grade(arguments: list[str]) -> None:
    from sdzero.cli.grade import main

    main(arguments)


def init(arguments: list[str]) -> None:
    from sdzero.cli.init import main

    main(arguments)


def import_gguf(arguments: list[str]) -> None:
    from sdzero.models.gguf import main

    main(arguments)


def _check(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parses a stage's arguments and builds nothing; returns its config with all defaults in it.

    Raises:
        ArgumentError: names the key that is wrong.
    """
    if command == "collect":
        parser = _collect_parser()
        return yaml.safe_load(parser.dump(parser.parse_args([*arguments]), skip_unset=False))
    from sdzero.cli.lightning import SDZeroCLI

    return SDZeroCLI.check([command, *arguments])


SAMPLING = ("collect", "fit", "validate", "test", "predict")
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), lightning),
    "run": run,
    "collect": collect,
    "compare": compare,
    "decontaminate": decontaminate,
    "report": report,
    "doctor": doctor,
    "judge": judge,
    "grade": grade,
    "init": init,
    "import-gguf": import_gguf,
}


def main() -> None:
    arguments = sys.argv[1:]
    if (here := os.getcwd()) not in sys.path:  # a class_path may name a module of the user's; python -m has it already
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
        if name in SAMPLING:
            with exit_on_signals(name), export_parent_id():
                COMMANDS[name](arguments[1:])
        else:
            COMMANDS[name](arguments[1:])
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
            sys.exit(f"sdzero {name}: error: {error}. What is finished is kept: make room, and go on with it")
        own = _own(error)
        if own is None or (isinstance(error, RuntimeError) and not type(error).__module__.startswith("sdzero.")):
            raise  # the plain RuntimeErrors that our code runs into are torch's
        sys.exit(f"sdzero {name}: error: {own}")


def _own(error: BaseException) -> BaseException | None:
    """What the project itself says to its user, which needs no traceback; None for a library's own error.

    jsonargparse raises an error of its own from the one that a constructor raised.
    """
    package, found = Path(__file__).parents[1].resolve(), None
    link: BaseException | None = error
    while link is not None:
        frames = traceback.extract_tb(link.__traceback__)  # a cause that was never raised has none
        if frames and package in Path(frames[-1].filename).resolve().parents:
            found = link
        link = link.__cause__
    return found


def _one_line(message: str) -> str:
    """jsonargparse's message without what it says about the types that were tried."""
    boilerplate = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(boilerplate))
