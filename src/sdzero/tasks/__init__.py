"""Tasks: the questions and the verifier of one domain per file."""
