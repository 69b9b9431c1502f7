"""Tasks: questions and their verifiers, one file per domain or data set."""

from sdzero.tasks.amo import AMOBench
from sdzero.tasks.base import Task
from sdzero.tasks.chains import Chains
from sdzero.tasks.champ import Champ
from sdzero.tasks.choice import MultipleChoice
from sdzero.tasks.code import Code
from sdzero.tasks.codeforces import Codeforces
from sdzero.tasks.countdown import Countdown
from sdzero.tasks.human_eval import HumanEval
from sdzero.tasks.instructions import Instructions
from sdzero.tasks.livecodebench import LiveCodeBench
from sdzero.tasks.math import Math
from sdzero.tasks.openr1 import OpenR1Math
from sdzero.tasks.reasoning_gym import ReasoningGym
from sdzero.tasks.rows import Rows
from sdzero.tasks.suite import Suite

__all__ = [
    "AMOBench",
    "Chains",
    "Champ",
    "Code",
    "Codeforces",
    "Countdown",
    "HumanEval",
    "Instructions",
    "LiveCodeBench",
    "Math",
    "MultipleChoice",
    "OpenR1Math",
    "ReasoningGym",
    "Rows",
    "Suite",
    "Task",
]
