"""Put a wheel into a folder with the libraries of one version of CUDA alone: bitsandbytes brings those of fifteen.

python benchmarks/gpu/one_cuda.py bitsandbytes==0.50.2 build/gpu-wheels
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

KEPT = ("_cuda130", "_cpu")
"""Ends of the names of the libraries that stay: the GPU image has CUDA 13.0 (or later, which loads them too)."""


def stays(name: str) -> bool:
    """Whether the file `name` of the wheel is kept."""
    path = PurePosixPath(name)
    return path.suffix != ".so" or path.stem.endswith(KEPT)


def thin(wheel: Path, folder: Path) -> Path:
    """The wheel in `folder`, with what stays, and listed so."""
    made = folder / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if not stays(entry.filename):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if stays(line.split(",")[0])).encode()
            target.writestr(entry, content)
    return made


def main() -> int:
    requirement, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fetched:
        command = ["pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", fetched, requirement]
        subprocess.run([sys.executable, "-m", *command], check=True)
        for wheel in Path(fetched).glob("*.whl"):
            made = thin(wheel, folder)
            print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB of {wheel.stat().st_size / 2**20:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
