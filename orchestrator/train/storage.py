"""A disk that refuses: what its error means, and what to mend before the run goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from orchestrator.errors import Fault, OrchestratorError
from orchestrator.units import format_bytes

REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space of your own there, or have the quota raised (quota -s shows it)",
    errno.EROFS: "have it mounted for writing again (dmesg says why it no longer is)",
    errno.EIO: "look at dmesg: the disk or its network fails; move run.dir to another",
    errno.EACCES: "give this user the right to write there",
}
"""By the error of the kernel: what a person does about it."""


class DiskError(OrchestratorError):
    """The disk takes no more of what the run writes."""

    exit_code = 4
    title = "The disk refuses what the run writes"


def remedy_for(said: str) -> str | None:
    """What to do about an error of the disk in the words of the kernel (as `os.strerror`); None for any other."""
    return next((remedy for number, remedy in REMEDIES.items() if os.strerror(number) in said), None)


def refusal(error: BaseException) -> DiskError | None:
    """The report for `error` where it is a disk that refuses; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    where = str(place) if place is not None else "a file of the run"
    folder = next((folder for folder in (place, *place.parents) if folder.is_dir()), None) if place is not None else None
    free = f"; {format_bytes(shutil.disk_usage(folder).free)} are free" if folder is not None else ""
    remedy = f"{REMEDIES[error.errno]}, then go on with resume=auto: the newest checkpoint is whole"
    return DiskError(Fault("run.dir", f"{where} cannot be written: {error.strerror}{free}", remedy))
