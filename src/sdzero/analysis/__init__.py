"""What a run's files say: statistics and figures, behind the notebooks and the report."""

from sdzero.analysis.run import RunFolder

__all__ = ["RunFolder"]
