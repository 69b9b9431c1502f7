"""Training methods, one algorithm per file.

    method                   class                        the teacher reads             loss           recipe
    SFT, RFT                 SFT                          -                             cross-entropy  quickstart (base)
    SRT (phase 1)            SRT                          -                             equation 3     quickstart
    SelfDistill (phase 2)    SelfDistill, Revision        x, y, P_r                     equation 4     quickstart
    answer-conditioned       SelfDistill, FinalAnswer     x, the gold answer            equation 4     -
    SDFT, OPSD               SelfDistill, Demonstration   x, a worked solution          equation 4     own_data (opsd)
    SDPO                     SelfDistill, Feedback        x, the verifier's feedback    equation 4     -
    on-policy distillation   SelfDistill, Plain           x                             equation 4     -
    GRPO, Dr. GRPO, RLOO     PolicyGradient               -                             clipped ratio  -

`Policy` is the student alone, for evaluation; `Method` is the base class of what trains it. The divergence of
equation 4 is a key of SelfDistill, and `teacher:` gives it another model as teacher.
"""

from sdzero.methods.base import Method, Schedule
from sdzero.methods.contexts import Context, FinalAnswer, Plain, Revision
from sdzero.methods.policy import Policy
from sdzero.methods.policy_gradient import PolicyGradient
from sdzero.methods.sdft import Demonstration
from sdzero.methods.sdpo import Feedback
from sdzero.methods.self_distill import SelfDistill
from sdzero.methods.sft import SFT
from sdzero.methods.srt import SRT

__all__ = [
    "SFT",
    "SRT",
    "Context",
    "Demonstration",
    "Feedback",
    "FinalAnswer",
    "Method",
    "Plain",
    "Policy",
    "PolicyGradient",
    "Revision",
    "Schedule",
    "SelfDistill",
]
