"""`sdzero report RUN_DIR`: what a run did, as one HTML page that asks nothing of the network."""

from sdzero.report.page import main, render

__all__ = ["main", "render"]
