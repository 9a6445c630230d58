"""The few arguments of scripts that look at a finished run: `run=runs/demo` and free text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.errors import ConfigError, Fault


def read_arguments(argv: Sequence[str], known: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """({key: value} of the `key=value` arguments whose key is in `known`, with its defaults; everything else in order).

    Raises:
        ConfigError: `run` is not given, or an argument begins with a dash.
    """
    values, rest = dict(known), []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and key in known:
            values[key] = value
        elif argument.startswith("-"):
            raise ConfigError(Fault(argument, "there is no such flag", f"write {', '.join(f'{name}=…' for name in known)}"))
        else:
            rest.append(argument)
    if not values["run"]:
        raise ConfigError(Fault("run", "no run folder is named", "add run=runs/demo, for example"))
    return values, rest


def positive(values: Mapping[str, str], key: str) -> int:
    """The whole number above zero that `key` has.

    Raises:
        ConfigError: it is none.
    """
    text = values[key]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(Fault(key, f"{text!r} is not a whole number above zero", f"write {key}=64, for example"))
    return int(text)


def whole(values: Mapping[str, str], key: str) -> int:
    """The whole number, zero included, that `key` has.

    Raises:
        ConfigError: it is none.
    """
    if not values[key].isdecimal():
        raise ConfigError(Fault(key, f"{values[key]!r} is not a whole number", f"write {key}=10, for example"))
    return int(values[key])


def choices(
    overrides: Sequence[str], options: Mapping[str, Sequence[str]], defaults: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """(the values of the keys in `options`, which belong to a script and not to the run; the overrides of the run).

    An empty sequence of options takes any word.

    Raises:
        ConfigError: a value that is not among its options.
    """
    values, rest, faults = dict(defaults), [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in options:
            rest.append(override)
        elif (options[key] and value not in options[key]) or not value:
            valid = f"valid: {', '.join(options[key])}" if options[key] else f"write {key}={defaults[key] or '…'}"
            faults.append(Fault(override, f"{key} cannot be {value or 'empty'}", valid))
        else:
            values[key] = value
    if faults:
        raise ConfigError(faults)
    return values, rest
