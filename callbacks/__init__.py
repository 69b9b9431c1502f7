"""Optional parts of a training, as Lightning callbacks. None depends on another."""

from sdzero.callbacks.copy_tracker import CopyTracker
from sdzero.callbacks.export_model import ExportModel
from sdzero.callbacks.generate_then_revise import GenerateThenRevise
from sdzero.callbacks.keyword_tracker import KeywordTracker
from sdzero.callbacks.length_tracker import LengthTracker
from sdzero.callbacks.preemption import Preemption
from sdzero.callbacks.sample_writer import SampleWriter
from sdzero.callbacks.teacher_sync import TeacherSync
from sdzero.callbacks.token_kl_recorder import TokenKLRecorder

__all__ = [
    "CopyTracker",
    "ExportModel",
    "GenerateThenRevise",
    "KeywordTracker",
    "LengthTracker",
    "Preemption",
    "SampleWriter",
    "TeacherSync",
    "TokenKLRecorder",
]
