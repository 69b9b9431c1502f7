"""The plan as it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from sdzero.pipeline.dry_run.budget import Budget
from sdzero.pipeline.dry_run.memory import GIB, Engine, Moment

PARTS = ("weights", "gradients", "optimizer", "teacher", "copies", "activations", "loss head", "engine", "other")


def print_budgets(budgets: Sequence[Budget], one_epoch: Sequence[Budget]) -> None:
    """What each stage samples and trains on, what training costs in all, and appendix C.2's count of it."""
    table = Table(title="questions, generations and tokens (≤: an upper bound)")
    for heading in ("stage", "questions", "generations", "tokens sampled", "tokens trained"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "stage" else "right")
    for row in budgets:
        table.add_row(*_budget_cells(row.stage, row))
    training, evaluation = [[b for b in budgets if b.evaluates == e] for e in (False, True)]
    table.add_section()
    table.add_row(*_budget_cells("training", total(training)))
    table.add_row(*_budget_cells("evaluation, apart", total(evaluation)))
    _console().print(table)
    once = total(one_epoch)
    print(
        f"with one epoch of each training, as appendix C.2 counts: {once.generations:,} generations, "
        f"{_tokens(once.tokens_sampled, once.at_most)} tokens sampled, "
        f"{_tokens(once.tokens_trained, once.at_most)} trained"
    )


def total(rows: Iterable[Budget]) -> Budget:
    """The sum of some budgets, without what is not known. Questions are not added up: stages ask the same again."""
    rows = list(rows)
    return Budget(
        "total",
        questions=0,
        generations=sum(row.generations or 0 for row in rows),
        tokens_sampled=sum(row.tokens_sampled or 0 for row in rows),
        tokens_trained=sum(row.tokens_trained for row in rows),
        at_most=any(row.at_most for row in rows),
        evaluates=all(row.evaluates for row in rows),
    )


def _budget_cells(name: str, row: Budget) -> list[str]:
    tokens = [_tokens(n, row.at_most) for n in (row.tokens_sampled, row.tokens_trained)]
    return [name, _tokens(row.questions, False), _tokens(row.generations, False), *tokens]


def _tokens(count: int | None, at_most: bool) -> str:
    """In millions from one million on; a dash for none."""
    if count is None:
        return "not known"
    shown = f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count:,}"
    return "-" if not count else f"≤ {shown}" if at_most else shown


def print_moments(moments: Sequence[Moment], gpu_bytes: int | None) -> None:
    """Memory of one process at each moment, in GiB, and how many sequences an engine holds."""
    of = f", of a GPU's {gpu_bytes / GIB:.1f} (!: above it)" if gpu_bytes else ""
    table = Table(title=f"memory per process in GiB{of}", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    used = [part for part in PARTS if any(moment.parts.get(part) for moment in moments)]
    for heading in ("stage", "moment", *used, "total"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("stage", "moment") else "right")
    decimals = 1 if max(moment.total for moment in moments) > 10 * GIB else 3
    for moment in moments:
        cells = [f"{moment.parts[part] / GIB:.{decimals}f}" if moment.parts.get(part) else "-" for part in used]
        is_over = gpu_bytes is not None and moment.parts["other"] and moment.total > gpu_bytes
        table.add_row(moment.stage, moment.name, *cells, f"{moment.total / GIB:.{decimals}f}{' !' if is_over else ''}")
    Console(width=max(Console().width, 124)).print(table)  # narrower, figures would be cut
    for moment in moments:
        if moment.engine:
            print(f"{moment.stage}: {_engine_line(moment.engine)}")


def _engine_line(engine: Engine) -> str:
    size = f"{engine.per_longest / GIB:.3g} GiB of keys and values"
    longest = f"a longest sequence of {engine.longest:,} tokens takes {size}"
    if engine.cache is None:
        return f"the engine's weights take {engine.weights / GIB:.1f} GiB; {longest}"
    room = f"{max(engine.cache, 0) / GIB:.1f} GiB beside {engine.weights / GIB:.1f} of weights"
    fit = max(engine.cache, 0) // engine.per_mean if engine.per_mean else max(engine.cache, 0) // engine.per_longest
    what = "of mean length" if engine.per_mean else "of that length"
    return f"{longest}; {room}: {fit:,} sequences {what} beside each other"


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 120)
