"""The code sandbox: runs submissions in isolation and grades their output."""
