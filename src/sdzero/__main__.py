"""`python -m sdzero`: the command line of this very interpreter, as the stages of a run need it."""

from __future__ import annotations

from sdzero.cli.main import main

if __name__ == "__main__":
    main()
