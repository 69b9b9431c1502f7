"""Questions and verifiers, one domain a file."""

from sdzero.tasks.base import Task
from sdzero.tasks.chains import Chains
from sdzero.tasks.choice import MultipleChoice
from sdzero.tasks.code import Code
from sdzero.tasks.countdown import Countdown
from sdzero.tasks.instructions import Instructions
from sdzero.tasks.math import Math
from sdzero.tasks.reasoning_gym import ReasoningGym
from sdzero.tasks.rows import Rows
from sdzero.tasks.suite import Suite

__all__ = [
    "Chains",
    "Code",
    "Countdown",
    "Instructions",
    "Math",
    "MultipleChoice",
    "ReasoningGym",
    "Rows",
    "Suite",
    "Task",
]
