"""Become a command that does not outlive its parent: ``python child.py PARENT_PID COMMAND ...``.

Run as a file, not as a module, so that it imports nothing but the standard library. Linux tells the
process when its parent dies, also by SIGKILL; elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask to be killed with the parent, and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be watched
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


def die_with_parent(signum: int) -> None:
    """Have the kernel send ``signum`` to this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


if __name__ == "__main__":
    main()
