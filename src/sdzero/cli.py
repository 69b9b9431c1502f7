"""The command line. A thin dispatcher: fit, validate, test and predict are LightningCLI's."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

USAGE = """usage: sdzero COMMAND ...

  run RECIPE_DIR             collect -> SRT -> SelfDistill -> evaluation, resumable
  collect --config FILE      phase 1 data
  fit --config FILE          train (SRT or SelfDistill); any LightningCLI override follows
  validate|test|predict --config FILE
                             sample and score held-out questions

Each command says more with --help."""


def collect(arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser
    from lightning import seed_everything

    from sdzero.collect import Collect

    parser = ArgumentParser(prog="sdzero collect", description=Collect.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with these keys")
    parser.add_argument("--seed_everything", type=int, default=0, help="the run's seed")
    parser.add_class_arguments(Collect)
    config = parser.parse_args(arguments)
    seed_everything(config.seed_everything, verbose=False)
    values = vars(parser.instantiate_classes(config))
    Collect(**{k: v for k, v in values.items() if k not in ("config", "seed_everything")}).run()


def run(arguments: list[str]) -> None:
    from sdzero.pipeline import main

    main(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"run": run, "collect": collect}


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    name = arguments[0]
    try:
        if name in ("fit", "validate", "test", "predict"):
            from sdzero.lightning_cli import SDZeroCLI

            SDZeroCLI.main()
        elif name in COMMANDS:
            COMMANDS[name](arguments[1:])
        else:
            sys.exit(f"sdzero: unknown command {name!r}\n\n{USAGE}")
    except (ValueError, TypeError, OSError, ImportError) as error:
        # what the project itself says to its user needs no traceback; a library's error does
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(__file__).parent.resolve() not in Path(innermost).resolve().parents:
            raise
        sys.exit(f"sdzero {name}: error: {error}")
