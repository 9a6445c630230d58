"""Findings about a machine as a person reads them: what fails first, each with its effect and its mend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from orchestrator.cluster.doctor import Finding, Severity

STYLES = {Severity.FAILS: "bold red", Severity.RISK: "yellow", Severity.FINE: "green"}
NAME = 14


def _lines(finding: Finding) -> Iterator[Text]:
    line = Text(f"{finding.severity.value:<6} ", style=STYLES[finding.severity])
    line.append(f"{finding.about:<{NAME}} ", style="default")
    line.append(finding.found, style="default")
    yield line
    indent = " " * 7
    if finding.effect:
        yield Text(f"{indent}{'':<{NAME}} {finding.effect}")
    if finding.mend:
        yield Text(f"{indent}{'':<{NAME}} -> {finding.mend}")


def verdict(findings: Iterable[Finding]) -> str:
    """One sentence: whether a run can start here."""
    found = list(findings)
    fails, risks = (sum(finding.severity is kind for finding in found) for kind in (Severity.FAILS, Severity.RISK))
    if fails:
        return f"{fails} of {len(found)} would fail a run: mend what is marked fails"
    if risks:
        return f"a run can start; {risks} of {len(found)} may slow it or break it later"
    return "a run can start; nothing to mend"


def screen(findings: Sequence[Finding]) -> RenderableType:
    """All `findings`, and the verdict below."""
    return Group(*(line for finding in findings for line in _lines(finding)), Text(f"\n{verdict(findings)}"))


def show(findings: Sequence[Finding]) -> None:
    Console(highlight=False, soft_wrap=True).print(screen(findings))
