"""What a command does before it imports torch, and once everything is imported.

in   nothing: imported before torch, first of all
out  OMP_WAIT_POLICY in the environment; a garbage collector that leaves alone what was imported
"""

import gc
import os

# Read when torch loads. Waiting threads sleep, not spin: half the time on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Imports make many objects that stay. To look through them for garbage again and again took 0.6 of
# the demo's 5.2 s (one thread of an AMD EPYC).
WAS_ENABLED = gc.isenabled()
gc.disable()


def imported(is_command: bool):
    """All is imported. is_command: nothing of it will ever be garbage; a library cannot know."""
    if is_command:
        gc.freeze()
    if WAS_ENABLED:
        gc.enable()
