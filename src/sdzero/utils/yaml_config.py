"""YAML configs: reading them with the files they name, merging layers, and flat keys."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys and reads 1e-3 as a number, as LightningCLI does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


def load_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises:
        ValueError: the file is not YAML, or a mapping has a key twice; names the file and the line.
    """
    try:
        return yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def load_config(path: Path) -> Config:
    """Content of a YAML file, with the YAML files that its values name, relative to it, in their place.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    config = load_yaml(path) or {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a mapping of keys to values")
    return expand(config, path.parent)


def expand(value: Any, folder: Path) -> Any:
    """Replaces every string that names a YAML file in `folder` by the file's content, recursively."""
    if isinstance(value, str) and value.endswith(".yaml") and (folder / value).is_file():
        return expand(load_yaml(folder / value), (folder / value).parent)
    if isinstance(value, dict):
        return {key: expand(item, folder) for key, item in value.items()}
    return [expand(item, folder) for item in value] if isinstance(value, list) else value


def merge(below: Any, above: Any) -> Any:
    """Lays one config over another.

    Mappings merge key by key; any other value replaces the one below, a list as a whole. `key+: [...]` appends to the
    list `key`. Another `class_path` discards the `init_args` below it: they are another class's.
    """
    if not isinstance(above, Mapping):
        return above
    merged = dict(below) if isinstance(below, Mapping) else {}
    if {"class_path"} <= above.keys() & merged.keys() and above["class_path"] != merged["class_path"]:
        merged.pop("init_args", None)
    for key, value in above.items():
        if key.endswith("+") and isinstance(value, list):
            merged[key[:-1]] = [*(merged.get(key[:-1]) or []), *value]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def nest(key: str, value: Any) -> Config:
    """`{"a": {"b": value}}` of the key `a.b`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def get_value(config: Any, key: str) -> Any:
    """Value under a dotted key; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def flatten(config: Any, prefix: str = "") -> Config:
    """A config as `a.b.0: value` pairs."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    parts = [flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in items]
    return {key: value for part in parts for key, value in part.items()} if parts else {prefix: config}
