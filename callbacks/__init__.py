"""Callbacks hold what is not essential. None relies on another."""

from sdzero.callbacks.export_model import ExportModel
from sdzero.callbacks.generate_then_revise import GenerateThenRevise
from sdzero.callbacks.teacher_sync import TeacherSync

__all__ = ["ExportModel", "GenerateThenRevise", "TeacherSync"]
