"""Tables of a dry run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from sdzero.pipeline.dry_run.budget import Budget
from sdzero.pipeline.dry_run.memory import GIB, Engine, MemoryPeak

PARTS = ("weights", "gradients", "optimizer", "teacher", "copies", "activations", "loss head", "engine", "other")


def print_budgets(budgets: Sequence[Budget], one_epoch: Sequence[Budget]) -> None:
    """Print the budget of each stage, of training as a whole, and as appendix C.2 counts it."""
    table = Table(title="questions, generations and tokens (≤: an upper bound)")
    for heading in ("stage", "questions", "generations", "tokens sampled", "tokens trained"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "stage" else "right")
    for row in budgets:
        table.add_row(*_budget_cells(row.stage, row))
    training, evaluation = [[b for b in budgets if b.evaluates == e] for e in (False, True)]
    table.add_section()
    for name, rows in (("training", training), ("evaluation, apart", evaluation)):
        table.add_row(*_budget_cells(name, total(rows)))
    Console(width=None if Console().is_terminal else 120).print(table)
    once = total(one_epoch)
    print(
        f"with one epoch of each training, as appendix C.2 counts: {once.generations:,} generations, "
        f"{_tokens(once.tokens_sampled, once.at_most)} tokens sampled, "
        f"{_tokens(once.tokens_trained, once.at_most)} trained"
    )


def total(rows: Iterable[Budget]) -> Budget:
    """Sum up budgets, without what is unknown. Questions are not added: stages ask the same ones."""
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
    """Format a count, in millions from one million on; a dash for none."""
    if count is None:
        return "not known"
    shown = f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count:,}"
    return "-" if not count else f"≤ {shown}" if at_most else shown


def print_peaks(peaks: Sequence[MemoryPeak], gpu_bytes: int | None) -> None:
    """Print the memory of one process at each peak, in GiB, and how many sequences an engine holds."""
    of = f", of a GPU's {gpu_bytes / GIB:.1f} (!: above it)" if gpu_bytes else ""
    table = Table(title=f"memory per process in GiB{of}", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    used = [part for part in PARTS if any(peak.parts.get(part) for peak in peaks)]
    for heading in ("stage", "peak", *used, "total"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("stage", "peak") else "right")
    decimals = 1 if max(peak.total for peak in peaks) > 10 * GIB else 3
    for peak in peaks:
        cells = [f"{peak.parts[part] / GIB:.{decimals}f}" if peak.parts.get(part) else "-" for part in used]
        is_over = gpu_bytes is not None and peak.parts["other"] and peak.total > gpu_bytes
        table.add_row(peak.stage, peak.name, *cells, f"{peak.total / GIB:.{decimals}f}{' !' if is_over else ''}")
    Console(width=max(Console().width, 124)).print(table)  # numbers would be cut if it were narrower
    for peak in peaks:
        if peak.engine:
            print(f"{peak.stage}: {_engine_line(peak.engine)}")


def _engine_line(engine: Engine) -> str:
    size = f"{engine.per_longest / GIB:.3g} GiB of keys and values"
    longest = f"a longest sequence of {engine.longest:,} tokens takes {size}"
    if engine.cache is None:
        return f"the engine's weights take {engine.weights / GIB:.1f} GiB; {longest}"
    cache = max(engine.cache, 0)
    room = f"{cache / GIB:.1f} GiB beside {engine.weights / GIB:.1f} of weights"
    what = "of mean length" if engine.per_mean else "of that length"
    return f"{longest}; {room}: {cache // (engine.per_mean or engine.per_longest):,} sequences {what} beside each other"
