"""The command line against the catalogue: every override that is misspelt or of the wrong type, before Hydra composes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.config.catalog import Key, groups, keys, sections
from orchestrator.errors import Fault

REFERENCE = "${"
"""How OmegaConf begins a value that it computes: from another key, or from the environment, where secrets are."""


def reference_fault(where: str) -> Fault:
    """The fault of a value that would be computed."""
    problem = "${…} is not replaced: it could copy a secret of the environment into the run's folder"
    return Fault(where, problem, "write the value itself, or let your shell fill it in")


def with_quoted_home(text: str) -> str:
    """An override whose value starts with ~/ in quotes: Hydra's grammar keeps a bare ~ for deletions."""
    return re.sub(r"^([^=]+)=(~/?[^'\",\[\]]*)$", r"\1='\2'", text)


def with_quoted_number(text: str, names: Iterable[str]) -> str:
    """An override of a group whose choice is a number in quotes: Hydra takes a bare one for no choice."""
    group, _, choice = text.partition("=")
    return f"{group}='{choice}'" if group.lstrip("+") in names and choice.isdigit() else text


def meant(word: str, options: Iterable[str]) -> str:
    """'; did you mean X?' with the option nearest to `word`, or nothing where none is near."""
    names = list(options)
    leaf = word.rpartition(".")[2]
    near = difflib.get_close_matches(word, names, n=1)
    near = near or [name for name in names if name.rpartition(".")[2] == leaf]
    near = near or [
        name for name in names if "." in name and difflib.get_close_matches(leaf, [name.rpartition(".")[2]], cutoff=0.75)
    ]
    near = near or [name for name in names if len(names) < 40 and word and word in name]
    return f"; did you mean {near[0]}?" if near else ""


def _options_at(path: str, known: Mapping[str, Key], names: Mapping[str, Any]) -> str:
    """The valid continuations of `path`: the keys of its section, else the groups and sections."""
    section = path.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    if section and inside:
        return f"valid in {section}: {', '.join(inside)}"
    top = sorted({*names, *(name.partition(".")[0] for name in known)} - {"cluster/card"})
    return f"valid groups and sections: {', '.join(top)}"


def unknown_key(path: str, where: str, known: Mapping[str, Key], names: Mapping[str, Any]) -> Fault:
    """The fault of a key that does not exist, with what was meant and what is valid."""
    return Fault(where, f"there is no key {path}{meant(path, [*known, *names])}", _options_at(path, known, names))


def _choice_fault(group: str, choice: Any, options: tuple[str, ...], text: str) -> list[Fault]:
    if isinstance(choice, str) and choice in options:
        return []
    word = "null" if choice is None else str(choice)
    return [Fault(text, f"{group} has no choice {word}{meant(word, options)}", f"valid: {', '.join(options)}")]


def _type_fault(override: Override, key: Key, text: str) -> list[Fault]:
    value = override.value()
    try:
        OmegaConf.update(OmegaConf.structured(key.owner), key.path.rpartition(".")[2], value)
    except OmegaConfBaseException as error:
        if key.options:
            return [
                Fault(text, f"{key.path} cannot be {value}{meant(str(value), key.options)}", f"valid: {', '.join(key.options)}")
            ]
        problem = str(error).splitlines()[0]
        return [Fault(text, problem, f"{key.path}: {key.description}{f' ({key.unit})' if key.unit else ''}")]
    return []


def _fault(override: Override, text: str, known: Mapping[str, Key], names: Mapping[str, tuple[str, ...]]) -> list[Fault]:
    path = override.key_or_group
    if re.split("[./]", path)[0] == "hydra":
        return [Fault(text, "Hydra's own settings are not changed from here", "leave it out; run.dir names the run's folder")]
    if override.is_delete() or override.package is not None:
        what = "takes a choice out of" if override.is_delete() else "moves a choice within"
        return [Fault(text, f"this {what} the composition, which the schema does not allow", "write group=choice or key=value")]
    if override.is_sweep_override():
        listed = known[path].default if path in known else None
        remedy = f"write a list: {path}=[...]" if isinstance(listed, list) else "add -m for one run each, or give one value"
        return [Fault(text, f"several values for {path}", remedy)]
    if path in names:
        return _choice_fault(path, override.value(), names[path], text)
    if path in known:
        return _type_fault(override, known[path], text)
    if path in sections():
        inside = ", ".join(name for name in known if name.startswith(f"{path}."))
        return [Fault(text, f"{path} is a section, not a key", f"valid: {inside}")]
    return [unknown_key(path, text, known, names)]


RECIPE, STRATEGY, OFFLOAD = "recipe", ("zero", "fsdp", "tensor"), "offload"


def strategy_alone(stated: Collection[str]) -> list[str]:
    """What takes a recipe's own strategy away where another one was typed beside it: half of each would be neither, and what
    plan, compare and fit say of a strategy is true as they print it."""
    if RECIPE not in stated or not set(STRATEGY) & set(stated):
        return []
    return [f"{group}=none" for group in (*STRATEGY, OFFLOAD) if group not in stated]


def check_overrides(overrides: Sequence[str], conf_dir: Path) -> tuple[list[str], frozenset[str], list[Fault]]:
    """The overrides that can be composed, the keys and groups that were typed, and a fault for each of the others."""
    parser = OverridesParser.create()
    known = keys()
    names = {group: tuple(choice.name for choice in choices) for group, choices in groups(conf_dir).items()}
    good, stated, faults = [], set(), []
    for text in overrides:
        if REFERENCE in text:
            faults.append(reference_fault(text))
            continue
        try:
            quoted = with_quoted_number(with_quoted_home(text), names)
            override = parser.parse_override(quoted)
        except (OverrideParseException, HydraException) as error:
            reason = str(error).splitlines()[0]
            remedy = "write key=value; put quotes inside quotes for special letters: 'data.path=\"a b=c.json\"'"
            faults.append(Fault(text, f"this is no override ({reason})", remedy))
            continue
        found = _fault(override, text, known, names)
        faults.extend(found)
        if not found:
            # "+" adds what Hydra does not know yet; every key and group here is known, so it is not needed.
            good.append(quoted.lstrip("+") if override.key_or_group in known or override.key_or_group in names else quoted)
            stated.add(override.key_or_group)
    return [*good, *strategy_alone(stated)], frozenset(stated), faults


def composition_fault(error: Exception, conf_dir: Path) -> Fault:
    """What Hydra found while it composed (mostly in a YAML file), in our words."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    file = re.search(r"In '([^']+)'", text)
    where = f"{conf_dir.name}/{file[1]}.yaml" if file else "conf"
    unknown = re.search(r"Key '([^']+)' (?:not in|is not in)", text)
    if unknown:
        full = re.search(r"full_key: (\S+)", text)
        names = groups(conf_dir)
        return unknown_key(full[1] if full else unknown[1], where, keys(), names)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    detail = [line for line in lines if not line.startswith("In '")] or lines
    return Fault(where, "; ".join(dict.fromkeys(detail))[:400], "python launch/train.py --help lists groups, choices and keys")
