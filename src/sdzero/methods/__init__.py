"""The methods: one algorithm, one file."""

from sdzero.methods.base import Method
from sdzero.methods.lr_schedule import Schedule
from sdzero.methods.self_distill import SelfDistill
from sdzero.methods.srt import SRT

__all__ = ["SRT", "Method", "Schedule", "SelfDistill"]
