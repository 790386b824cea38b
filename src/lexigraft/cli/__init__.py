"""The command line: parse, call one function, print.

Each verb imports its function when it is run, so that `lexigraft --help` needs no torch.
Exit status: 0 done, 1 a check failed, 2 the user must change something, 130 interrupted, 143 told
to stop (SIGTERM).
"""

from lexigraft.cli.application import app, main

# Each adds its verbs to `app`, in the order in which the help lists them.
from lexigraft.cli import making, parting, looking, whole  # noqa: F401 # isort: skip

__all__ = ["app", "main"]
