"""Bytes, seconds and dtypes: the only place where a unit is converted or printed.

Inside the package bytes are `int` and times are `float` seconds; GiB (2**30) appears only in text for people.
"""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30

DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "uint8": 1}
"""Bytes of one element, by the short name that configs use."""

TORCH_NAMES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int64": "int64", "uint8": "uint8"}
"""Short dtype name to the attribute of `torch` (and to the name in a Hugging Face config.json)."""

SHORT_NAMES: dict[str, str] = {name: short for short, name in TORCH_NAMES.items()}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of the short-named `dtype` ("fp32", "bf16", ...)."""
    return DTYPE_BYTES[dtype]


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below `numerator / denominator`."""
    return -(-numerator // denominator)


def align_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is not below `value`."""
    return ceil_div(value, multiple) * multiple


def format_bytes(count: int) -> str:
    """`count` bytes for a person: "1.50 GiB", "320.0 MiB", "12.0 KiB" or "640 B"."""
    magnitude = abs(count)
    if magnitude >= GIB:
        return f"{count / GIB:.2f} GiB"
    if magnitude >= MIB:
        return f"{count / MIB:.1f} MiB"
    if magnitude >= KIB:
        return f"{count / KIB:.1f} KiB"
    return f"{count} B"


def format_count(count: int) -> str:
    """`count` things for a person: "8.03 B", "26.4 M", "512"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (size if unit != 'k' else 1000):.3g} {unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """`seconds` for a person: "1 h 03 min", "2 min 05 s", "3.2 s" or "45 ms"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms"
