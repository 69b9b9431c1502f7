"""Statistics, plots and the HTML page of a run's folder."""

from sdzero.report.page import main, render
from sdzero.report.run_folder import RunFolder

__all__ = ["RunFolder", "main", "render"]
