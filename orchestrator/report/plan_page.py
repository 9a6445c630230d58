"""Plans as one HTML page that needs nothing else: sortable, with the lines of each bar under the pointer; works offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from orchestrator.errors import ConfigError, Fault
from orchestrator.planner.plan import Plan
from orchestrator.report.plan_picture import COLOURS, bars
from orchestrator.report.plans import columns_that_differ, shared
from orchestrator.units import GIB, format_bytes, format_seconds

STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #1c1c1c; background: #fff; }
h1 { font-size: 18px; margin: 0 0 4px; } p { margin: 0 0 12px; color: #555; max-width: 90em; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 5px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid #eee; }
th { position: sticky; top: 0; background: #fff; cursor: pointer; border-bottom: 2px solid #bbb; user-select: none; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 45%; min-width: 320px; }
tbody tr:hover, tbody tr:focus-within { background: #f6f8fb; }
.track { position: relative; height: 18px; background: #f1f1f1; overflow: hidden; outline-offset: 2px; }
.track span { float: left; height: 100%; }
.limit { position: absolute; top: 0; bottom: 0; width: 2px; background: #000; }
.fits { color: #1e7e34; } .tight { color: #9a6700; } .short { color: #b02a37; }
.key { display: inline-block; width: 10px; height: 10px; margin: 0 5px 0 12px; }
#tip { position: fixed; display: none; background: #fff; border: 1px solid #999; padding: 8px 12px;
  box-shadow: 0 2px 12px #0003; max-width: 30em; pointer-events: none; z-index: 9; }
#tip table { width: auto; } #tip td { border: 0; padding: 1px 8px 1px 0; }
"""

SCRIPT = """
const body = document.querySelector('tbody'), tip = document.getElementById('tip');
document.querySelectorAll('th').forEach((head, column) => {
  const sort = () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    document.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const key = row => row.cells[column].dataset.value;
    const numbers = [...body.rows].every(row => key(row) === '' || !isNaN(key(row)));
    [...body.rows].sort((a, b) => {
      if (key(a) === '' || key(b) === '') return (key(a) === '') - (key(b) === '');
      const order = numbers ? key(a) - key(b) : key(a).localeCompare(key(b));
      return up ? order : -order;
    }).forEach(row => body.append(row));
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
});
const show = (row, x, y) => {
  tip.innerHTML = row.querySelector('template').innerHTML;
  tip.style.display = 'block';
  tip.style.left = Math.max(8, Math.min(x + 16, innerWidth - tip.offsetWidth - 8)) + 'px';
  tip.style.top = Math.max(8, Math.min(y + 16, innerHeight - tip.offsetHeight - 8)) + 'px';
};
body.addEventListener('mousemove', event => {
  const row = event.target.closest('tr');
  if (row) show(row, event.clientX, event.clientY);
});
body.addEventListener('mouseleave', () => { tip.style.display = 'none'; });
body.addEventListener('focusin', event => {
  const box = event.target.getBoundingClientRect();
  show(event.target.closest('tr'), box.left, box.bottom);
});
body.addEventListener('focusout', () => { tip.style.display = 'none'; });
"""


def _tip(plan: Plan) -> str:
    """What stands under the pointer: the lines at the peak, the parts of a step, the fixes."""
    lines = "".join(
        f'<tr><td><i class="key" style="background:{COLOURS[line]}"></i>{escape(line)}</td>'
        f'<td class="number">{format_bytes(count)}</td></tr>'
        for line, count in bars(plan).items()
    )
    parts = [f"peak in {plan.peak.phase}: {plan.peak.what}", f"host {format_bytes(plan.host.need)} for each rank"]
    if plan.time is not None:
        parts += [f"{name} {format_seconds(seconds)}" for name, seconds in plan.time.parts().items() if seconds >= 0.0005]
    fixes = "".join(f"<div>&rarr; {escape(fix.sentence)}</div>" for fix in plan.fixes)
    return f"<b>{escape(plan.words)}</b><table>{lines}</table><div>{escape('; '.join(parts))}</div>{fixes}"


def _bar(plan: Plan, widest: int) -> str:
    spans = "".join(
        f'<span style="width:{100 * count / widest:.3f}%;background:{COLOURS[line]}"></span>'
        for line, count in bars(plan).items()
    )
    limit = f'<i class="limit" style="left:{100 * plan.memory.limit / widest:.3f}%"></i>'
    return f'<div class="track" tabindex="0" aria-label="{escape(plan.words)}">{spans}{limit}</div>'


def _cell(text: str, value: object, kind: str = "") -> str:
    return f'<td class="{kind}" data-value="{escape(str(value))}">{text}</td>'


def _row(plan: Plan, extra: Sequence[str], widest: int) -> str:
    seconds, rate = plan.seconds, plan.tokens_per_second
    cells = [
        _cell(escape(plan.words) + f"<template>{_tip(plan)}</template>", plan.words),
        *(_cell(escape(str(getattr(plan, field))), getattr(plan, field)) for field in extra),
        _cell(_bar(plan, widest), plan.memory.used, "bar"),
        _cell(f"{plan.memory.used / GIB:.2f}", plan.memory.used, "number"),
        _cell(f"{plan.memory.limit / GIB:.2f}", plan.memory.limit, "number"),
        _cell(f"{plan.host.need / GIB:.1f}", plan.host.need, "number"),
        _cell("-" if seconds is None else f"{seconds:.2f}", "" if seconds is None else seconds, "number"),
        _cell("-" if rate is None else f"{rate:,.0f}", "" if rate is None else rate, "number"),
        _cell(plan.basis, plan.basis),
        _cell(escape(plan.shortfall or plan.verdict), plan.memory.short + plan.host.short, plan.verdict),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _head(extra: Iterable[str]) -> str:
    names = [("strategy", ""), *((field, "") for field in extra), ("card at its peak", ""), ("GiB", "number")]
    names += [
        ("of", "number"),
        ("host GiB", "number"),
        ("step s", "number"),
        ("tokens/s", "number"),
        ("basis", ""),
        ("verdict", ""),
    ]
    return "".join(f'<th tabindex="0" class="{kind}">{escape(name)}</th>' for name, kind in names)


def page(plans: Sequence[Plan], title: str) -> str:
    """The whole page as text."""
    extra = columns_that_differ(plans)
    most = 2.5 * max((plan.memory.limit for plan in plans), default=1)
    widest = int(min(max((max(plan.memory.used, plan.memory.limit) for plan in plans), default=1), most))
    rows = "".join(_row(plan, extra, widest) for plan in plans)
    used = {line for plan in plans for line in bars(plan)}
    legend = "".join(
        f'<i class="key" style="background:{colour}"></i>{line}' for line, colour in COLOURS.items() if line in used
    )
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    hints = escape("; ".join(notes))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(shared(plans))}</p>"
        "<p>Bytes on each card at its peak; the black line is the card. "
        "Click a heading to sort, point at a row for its lines.</p>"
        f"<p>{legend}</p><table><thead><tr>{_head(extra)}</tr></thead><tbody>{rows}</tbody></table>"
        f'<p>{hints}</p><div id="tip" role="tooltip"></div><script>{SCRIPT}</script></body></html>'
    )


def write(plans: Sequence[Plan], title: str, path: Path) -> Path:
    """Write the page to `path` and return it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(plans, title), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            Fault("out", f"{path} cannot be written: {error.strerror}", "name another folder: out=plans")
        ) from None
    return path
