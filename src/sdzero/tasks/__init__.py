"""Questions and verifiers, one domain a file."""

from sdzero.tasks.base import Task
from sdzero.tasks.chains import Chains
from sdzero.tasks.countdown import Countdown
from sdzero.tasks.reasoning_gym import ReasoningGym
from sdzero.tasks.rows import Rows

__all__ = ["Chains", "Countdown", "ReasoningGym", "Rows", "Task"]
