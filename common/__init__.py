"""Shared helpers. Until a command has imported all it needs, Ctrl-C is one line; from then on `run_command` ends it."""

import os
import signal
import sys


def stop_importing(*_):
    """What SIGINT does meanwhile: an exception could be caught, or hidden by another, in any library."""
    os.write(2, b"interrupted\n")
    os._exit(130)


HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
COMMANDS = [os.path.join(HERE, name) for name in ("train.py", "data.py", "curate.py", "evaluate.py")]
if sys.argv and os.path.realpath(sys.argv[0]) in COMMANDS:  # and not a train.py of the user's that imports amoe
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, stop_importing)
