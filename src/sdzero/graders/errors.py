"""Errors of the grading machinery."""


class GraderError(RuntimeError):
    """The grading machinery failed. Never turned into a reward."""


class NoSandboxError(GraderError):
    """No sandbox is safe on this machine. The message gives the reason for each kind, with the remedy."""
