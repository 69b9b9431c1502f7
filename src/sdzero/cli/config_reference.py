"""Reference of all configuration keys, generated from constructors and their docstrings.

`python -m sdzero.cli.config_reference > docs/config.md`. Classes are found through their base class, so the keys of a
new file appear automatically.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
import lightning as L
import torch
from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import Strategy

import sdzero
from sdzero.data.base import StepDataModule
from sdzero.data.collect import Collect
from sdzero.engines.base import RolloutEngine
from sdzero.methods import Context, Policy
from sdzero.tasks.base import Task, TraceSource

GROUPS: dict[type, tuple[str, str]] = {
    Policy: ("Methods", "`model:` of a training or an evaluation."),
    StepDataModule: ("Data modules", "`data:` of a training or an evaluation."),
    Task: ("Tasks", "Questions, and the verifier of the answers."),
    RolloutEngine: ("Engines", "Samplers of responses."),
    TraceSource: ("Trace sources", "Sources of the traces of `TraceDataModule`."),
    Context: ("Teacher contexts", "Text that the teacher reads before the response it scores."),
    L.Callback: ("Callbacks", "Items of `trainer.callbacks`."),
    Strategy: ("Strategies", "`trainer.strategy`."),
}
"""Base class -> heading of the page and the line under it."""
VALUES = "Values with keys of their own"

HEAD = """# Configuration keys

`make docs` generates this page from constructors and their docstrings; edit those instead.

A recipe is a folder of YAML files: `collect.yaml` holds the keys of [Collect](#collect) and `seed_everything`, all
others those of LightningCLI: `seed_everything`, `model`, `data`, `trainer` and `ckpt_path`. Where a key takes one of
several classes, `class_path` names the class and `init_args` holds its keys; a class of your own is named the same way.
On the command line a key is set by its path, in which `init_args` may be left out; it overrides the files:

```bash
sdzero fit --config configs/recipes/smoke/self_distill.yaml --trainer.max_steps=3 --model.divergence.kind=forward
```

Several `--config` files are merged: a later one, such as `configs/trainer/fsdp2.yaml`, changes only the keys that it
names. A list is replaced (`callbacks:`) or extended (`callbacks+:`). The name of a YAML file may take the place of a
class's keys; it is relative to the file that names it. `--print_config` prints the merged result. An unknown key is
refused by name. On the command line a `null` two levels deep needs braces: `--data.evaluation='{num_questions: null}'`.

`trainer` is Lightning's Trainer with all of its keys (`sdzero fit --help`). Ours differs in two defaults,
`num_sanity_val_steps: 0` and `log_every_n_steps: 1`. Gradients are clipped by `model.max_grad_norm`, not by
`trainer.gradient_clip_val`; a training's `trainer.precision` is `32-true`, `64-true` or `bf16-mixed`; and
`plugins: {class_path: sdzero.trainer.AtomicCheckpointIO}` makes checkpoints atomic.
"""


# --- contents --------------------------------------------------------------------------------------


def class_path(cls: type) -> str:
    """Return the shortest dotted path that imports a class."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[:n]) for n in range(1, len(parts)))
    package = next((p for p in packages if getattr(import_module(p), cls.__name__, None) is cls), cls.__module__)
    return f"{package}.{cls.__name__}"


def classes(base: type) -> list[type]:
    """Return the classes that a config can name: subclasses, and the base itself if its package exports it."""
    found, todo = set[type](), [base]
    while todo:
        found |= {*(new := todo.pop().__subclasses__())}
        todo += new
    exported = class_path(base) != f"{base.__module__}.{base.__name__}"
    ours = {cls for cls in found | ({base} if exported else set()) if cls.__module__.startswith("sdzero.")}
    return sorted((cls for cls in ours if keys(cls) or not inspect.isabstract(cls)), key=class_path)


def keys(cls: type) -> list[ParamData]:
    """Return the keys that jsonargparse accepts for a class and its base classes in sdzero, required ones first.

    The documentation `as in X` is replaced by that of the base class X.
    """
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    found = []
    for key in get_signature_parameters(cls):
        if not str(getattr(key.component, "__module__", None)).startswith("sdzero."):
            continue  # a key of Lightning's constructor
        meaning = " ".join((key.doc or "").split())
        if refers := re.fullmatch(r"as in (\w+)\.?", meaning):
            (owner,) = (base for base in cls.__mro__ if base.__name__ == refers[1])
            meaning = next(str(other.doc) for other in keys(owner) if other.name == key.name)
        found.append(dataclasses.replace(key, default=made.get(key.name, key.default), doc=meaning))
    return sorted(found, key=lambda key: key.default is not inspect.Parameter.empty)


def nested(hint: Any) -> Iterator[type]:
    """Yield the dataclasses in a type, recursively."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for key in keys(hint):
            yield from nested(key.annotation)
    for part in get_args(hint):
        yield from nested(part)


# --- rendering ------------------------------------------------------------------------------------


def type_name(hint: Any) -> str:
    """Describe a type in terms of YAML, linked to its section."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint == OptimizerCallable:
        return "an optimizer of `torch.optim`"
    if hint is type(None):
        return "`null`"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of, to = arguments
        return f"mapping from {type_name(of)} to {type_name(to)}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {type_name(arguments[0])}"
    if origin is Callable or hint is Callable:
        return "function"
    if hint in GROUPS:
        return f"one of the [{GROUPS[hint][0].lower()}](#{_anchor(GROUPS[hint][0])})"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{_anchor(hint.__name__)})"
    return {Any: "any value", Path: "path"}.get(hint) or f"`{hint.__name__}`"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def default_text(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "**required**"
    return "its defaults" if (text := _yaml(value)) == "{}" and value != {} else f"`{text}`"


def _yaml(value: Any) -> str:
    """Format a value as one line of YAML; an object shows only what differs from its class's defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        now = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _yaml({key.name: now[key.name] for key in keys(type(value)) if now[key.name] != key.default})
    if inspect.isfunction(value):  # makes an optimizer from parameters
        return _yaml_optimizer(value([torch.nn.Parameter(torch.zeros(1))]))
    if isinstance(value, dict) and {*value} == {"class_path"}:
        return value["class_path"]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(item)}" for name, item in value.items()) + "}"
    if value is None or isinstance(value, str | bool | int | float | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, Path) else class_path(type(value))


def _yaml_optimizer(optimizer: torch.optim.Optimizer) -> str:
    own = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in own and own[k].default != v}
    return f"{{class_path: {class_path(type(optimizer))}, init_args: {_yaml(options)}}}"


def section(cls: type, heading: str) -> str:
    doc = docstring_parser.parse(cls.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    parts = [f"### {heading}", *(" ".join(p.split()) for p in (doc.description or "").split("\n\n"))]
    cells = [(f"`{k.name}`", type_name(k.annotation), default_text(k.default), str(k.doc)) for k in keys(cls)]
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n\n".join([*parts, "\n".join([*head, *rows]) if rows else "No keys."])


def documented_classes() -> dict[str, list[tuple[str, type]]]:
    """Return, by heading of the page, (heading, class) of the sections under it."""
    for module in pkgutil.walk_packages(sdzero.__path__, "sdzero."):  # registers each class with its base class
        if not module.name.endswith("__main__"):
            import_module(module.name)
    groups = {title: [(f"`{class_path(cls)}`", cls) for cls in classes(base)] for base, (title, _) in GROUPS.items()}
    shown = [Collect, *(cls for group in groups.values() for _, cls in group)]
    inner = {part for cls in shown for key in keys(cls) for part in nested(key.annotation)}
    values = [(cls.__name__, cls) for cls in sorted(inner, key=lambda cls: cls.__name__)]
    return {"Collection": [("Collect", Collect)], **groups, VALUES: values}


def page() -> str:
    about = {**dict(GROUPS.values()), "Collection": "`collect.yaml`.", VALUES: "Mappings, without a class path."}
    parts = [HEAD.rstrip()]
    for title, sections in documented_classes().items():
        parts += [f"## {title}", about[title], *(section(cls, heading) for heading, cls in sections)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
