"""Graders: programs run in a sandbox; mathematics and instructions are checked in killable worker processes."""
