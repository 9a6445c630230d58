"""The text of --help: groups with what each choice costs, keys with descriptions and defaults, and examples."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.catalog import CONF_DIR, Choice, Key, groups, keys
from orchestrator.config.shapes import DIMENSIONS

EXAMPLES = (
    ("zero=stage3 offload=cpu", "ZeRO-3, weights and optimizer in host memory"),
    ("fsdp=full_shard tuning=lora", "FSDP2, low-rank adapters"),
    ("zero=stage2 tuning=lora model.path=FOLDER data.path=FILE.json", "your model, your data"),
    ("model=llama3_8b zero=stage3 cluster=8xa100_80 --cfg job", "what a run would be, without running it"),
    ("-m zero=stage1,stage2,stage3 run.steps=20", "three runs, one after the other"),
)

ORDER = (
    "recipe",
    "zero",
    "fsdp",
    "tensor",
    "pipeline",
    "offload",
    "tuning",
    "model",
    "data",
    "optimizer",
    "schedule",
    "recompute",
    "compile",
    "attention",
    "precision",
    "cluster",
    "logger",
    "slurm",
    "kubernetes",
)
"""Groups in the order in which a person thinks of them; any other follows by name."""

DECIDED_BY_MODEL = frozenset(f"model.{name}" for name in DIMENSIONS)
"""Keys whose value comes from the choice of model; by hand they describe random weights."""

HYDRA_FLAGS = "Hydra's own flags work too: --cfg job|hydra|all, --info, -m, --resolve, --package, --hydra-help, --version."


def _defaults(conf_dir: Path) -> dict[str, str]:
    """The choice that each group starts from."""
    root = yaml.safe_load((conf_dir / "config.yaml").read_text(encoding="utf-8"))
    return {group: choice for item in root["defaults"] if isinstance(item, dict) for group, choice in item.items()}


def _row(name: str, text: str, indent: int, column: int, width: int) -> str:
    head = f"{' ' * indent}{name}"
    lines = textwrap.wrap(text, max(width - column, 20)) or [""]
    # A name that reaches into the column of descriptions gets a line of its own.
    first = f"{head:<{column}}{lines[0]}" if len(head) < column else f"{head}\n{' ' * column}{lines[0]}"
    return "\n".join([first.rstrip(), *(" " * column + line for line in lines[1:])])


def _group(name: str, choices: tuple[Choice, ...], default: str | None, width: int) -> list[str]:
    rows = [f"  {name}="]
    for choice in choices:
        mark = "*" if choice.name == default else " "
        rows.append(_row(f"{mark} {choice.name}", choice.summary, 4, 22, width))
    return rows


def _value(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return f"[{','.join(map(str, default))}]"
    return str(default)


def _key(key: Key, width: int) -> str:
    options = f" ({' | '.join(key.options)})" if key.options else ""
    unit = f" [{key.unit}]" if key.unit else ""
    # What every model states for itself has no default worth showing.
    shown = key.path if key.path in DECIDED_BY_MODEL else f"{key.path}={_value(key.default)}"
    return _row(shown, f"{key.description}{unit}{options}", 2, 40, width)


def _typed_by_hand(key: Key) -> bool:
    """Whether a person sets the key itself: what a group decides, and the card's numbers, are not listed."""
    return "set by the group" not in key.description and not key.path.startswith("cluster.card.")


def help_text(program: str, conf_dir: Path = CONF_DIR, width: int | None = None) -> str:
    """All of --help for `program`, wrapped to `width` columns (None: the terminal's, at most 120)."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    found, defaults = groups(conf_dir), _defaults(conf_dir)
    listed = [*(g for g in ORDER if g in found), *(g for g in found if g not in ORDER and "/" not in g)]
    lines = [
        f"usage: {program} [group=choice] [key=value] ...",
        "",
        "GROUPS  (* is the default): what it does; what it costs",
    ]
    for group in listed:
        lines += _group(group, found[group], defaults.get(group), width)
    lines += ["", "KEYS  (with defaults; those of a model stand in its group)"]
    lines += [_key(key, width) for key in keys().values() if _typed_by_hand(key)]
    lines += ["", "EXAMPLES"]
    for arguments, meaning in EXAMPLES:
        lines += [f"  {program} {arguments}", f"      {meaning}"]
    return "\n".join([*lines, "", *textwrap.wrap(HYDRA_FLAGS, width)]) + "\n"
