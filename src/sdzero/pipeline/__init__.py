"""`sdzero run`: stages as child processes, their summary, the dry run."""
