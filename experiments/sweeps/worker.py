"""The program of a worker process of a sweep: takes cells from a pipe and sends back what came, until it is closed."""

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from experiments.sweeps.asking import Asker
from experiments.sweeps.local_workers import READY


def main(handle: int) -> None:
    """Ask what comes over the pipe with this handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks, and who ends this process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    pipe, asker = Connection(handle), Asker()
    pipe.send(READY)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(asker.ask(job))


def _end_with(parent: int) -> None:
    """Nobody waits for the answer of a process whose parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
