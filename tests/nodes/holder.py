"""The first process of a cluster on this machine: ends with the tests, whatever ends them, and all of the cluster with it.

As the first one of a process namespace, it has the kernel for that; elsewhere it ends whatever has its mark, a variable with
the name and value that it is given.
"""

import contextlib
import signal
import sys

import psutil


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans that end are gone at once
    sys.stdout.write("here\n")
    sys.stdout.flush()
    sys.stdin.read()
    for process in psutil.process_iter() if sys.argv[1:] else []:
        with contextlib.suppress(psutil.Error):
            if process.environ().get(sys.argv[1]) == sys.argv[2]:
                process.kill()


if __name__ == "__main__":
    main()
