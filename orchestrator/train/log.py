"""One log for a run: `train.log` in its folder, written by every rank."""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s rank %(rank)s  %(name)s: %(message)s"


class _Rank(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        return True


def open_log(path: Path, rank: int) -> None:
    """Send all logging and Python warnings of this process to `path`: INFO and above of rank 0, WARNING of the others.

    The file is opened O_APPEND by every rank, so whole lines interleave and none is lost.
    """
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(_Rank(rank))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root = logging.getLogger()
    for former in root.handlers:
        former.close()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk would show a traceback for each line; the metrics say it once
    logging.captureWarnings(True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Take the screen away from the loggers of libraries: what they say goes to the log alone.

    Call it again after a library was imported late: DeepSpeed and transformers attach their stream handlers on import.
    """
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        streams = [
            h for h in logger.handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)
        ]
        for stream in streams:
            logger.removeHandler(stream)
            logger.propagate = True
