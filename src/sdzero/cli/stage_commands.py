"""Commands that execute the stages of a recipe, one or all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from sdzero.pipeline.stages import compose_arguments
from sdzero.utils.files import add_path_to_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def collect_parser() -> ArgumentParser:
    """Parser for `sdzero collect`."""
    from jsonargparse import ArgumentParser

    from sdzero.data.collect import Collect

    parser = ArgumentParser(prog="sdzero collect", description=Collect.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with these keys")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of the run")
    parser.add_class_arguments(Collect, sub_configs=True)  # a value may be a YAML file beside the config
    return parser


def collect(arguments: list[str]) -> None:
    from sdzero.data.collect import Collect

    parser = collect_parser()
    config = parser.parse_args(compose_arguments("collect", arguments))
    # same effect as Lightning's seed_everything, whose import takes seconds
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

    main(arguments, check_stage)


def check_stage(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse the arguments of a stage without building anything; return its config, defaults included.

    Raises:
        ArgumentError: names the invalid key.
    """
    if command == "collect":
        parser = collect_parser()
        config = parser.parse_args(compose_arguments(command, arguments))
        return yaml.safe_load(parser.dump(config, skip_unset=False))
    from sdzero.cli.lightning import SDZeroCLI

    return SDZeroCLI.check([command, *arguments])
