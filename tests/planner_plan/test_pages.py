"""The table, the picture and the page; the page in a real browser."""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import orchestrator
from orchestrator.errors import ConfigError
from orchestrator.planner.plan import Plan
from orchestrator.report import plan_page, plan_picture, plans
from orchestrator.report.arguments import choices
from orchestrator.report.progress import progress

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

DRIVE = """<script>
const heads = [...document.querySelectorAll('th')];
const first = () => document.querySelector('tbody tr td').dataset.value;
heads.find(head => head.textContent === 'GiB').click();
document.body.dataset.up = first();
heads.find(head => head.textContent === 'GiB').click();
document.body.dataset.down = first();
document.querySelector('tbody tr').dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: 50, clientY: 50}));
document.body.dataset.tip = document.getElementById('tip').innerText.replaceAll('\\n', ' ');
</script>"""


@pytest.fixture(scope="module")
def some() -> list[Plan]:
    return orchestrator.compare(["model=llama3_8b", "cluster=4xa10", "tuning=lora,full", "data.seq_len=2048"], basis="layout")


def text_of(what) -> str:
    file = io.StringIO()
    plans.show(what, Console(file=file))
    return file.getvalue()


def test_the_table_has_a_line_for_each_plan(some):
    text = text_of(plans.many(some))
    assert len(text.splitlines()) == len(some) + 3
    fitting = f"{sum(plan.fits for plan in some)} of {len(some)} fit the card of 22.49 GiB"
    assert text.splitlines()[-1].startswith(f"llama3_8b, bf16, on 4xa10, 2048 tokens, micro-batch 1: {fitting}")
    assert "tuning" in text.splitlines()[0] and "cluster" not in text.splitlines()[0]
    assert "fits" in text and "GiB short" in text


@pytest.mark.parametrize(("width", "kept"), [(80, "step"), (106, "host GiB"), (122, "at rest")])
def test_a_narrow_terminal_shows_what_tells_most(some, width, kept):
    file = io.StringIO()
    Console(file=file, width=width).print(plans.many([plan for plan in some if plan.tuning == "full"], width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in file.getvalue()
    assert kept in lines[0] and "card GiB" in lines[0] and "verdict" in lines[0]


def test_rows_say_what_they_rest_on_where_they_differ(some):
    mixed = [replace(some[0], basis="rehearsal"), some[1]]
    text = text_of(plans.many(mixed))
    assert "basis" in text.splitlines()[0] and "1 nearest to the limit by rehearsal" in text
    assert "basis" not in text_of(plans.many(some)).splitlines()[0]


def test_one_plan_is_shown_by_phase_and_line(some):
    short = next(plan for plan in some if not plan.fits)
    text = text_of(plans.one(short))
    for words in ("GiB on a card", "backward", "activations", "used on the card", "step  ", "does not fit: short", "note:"):
        assert words in text
    barely = replace(short, memory=replace(short.memory, limit=short.memory.used * 51 // 50))
    assert barely.verdict == "tight" and "fits, but by less than" in plans.said(barely)
    assert max(len(line) for line in text.splitlines()) < 170


def test_bars_add_up_to_what_the_driver_shows(some):
    for plan in some:
        assert sum(plan_picture.bars(plan).values()) == plan.memory.used


def test_the_picture_is_written(some, tmp_path):
    path = plan_picture.draw(some, "every strategy", tmp_path / "out" / "compare.png")
    with Image.open(path) as image:
        width, height = image.size
        assert width > 1000 and height > 1000
        assert len(set(image.convert("RGB").resize((200, 200)).getdata())) > 50
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        plan_picture.draw(some[:2], "no", tmp_path / "file" / "compare.png")


def test_the_page_needs_nothing_else(some, tmp_path):
    path = plan_page.write(some, "a <title> & more", tmp_path / "compare.html")
    text = path.read_text()
    assert "http" not in text and "src=" not in text and "a &lt;title&gt; &amp; more" in text
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        plan_page.write(some, "no", tmp_path / "file" / "compare.html")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_page_sorts_and_shows_lines_under_the_pointer(some, tmp_path):
    page = tmp_path / "compare.html"
    page.write_text(plan_page.page(some, "sorted").replace("</body>", DRIVE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    said = {name: done.stdout.partition(f'data-{name}="')[2].partition('"')[0] for name in ("up", "down", "tip")}
    sizes = {plan.words: plan.memory.used for plan in some}
    assert sizes[said["up"]] == min(sizes.values()) and sizes[said["down"]] == max(sizes.values())
    assert said["down"] in said["tip"] and "GiB" in said["tip"] and "peak in" in said["tip"]


def test_options_of_a_script_are_told_from_overrides():
    options = {"format": ("text", "json"), "out": ()}
    values, rest = choices(["format=json", "model=tiny", "+out=x"], options, {"format": "text", "out": "plans"})
    assert values == {"format": "json", "out": "plans"} and rest == ["model=tiny", "+out=x"]
    with pytest.raises(ConfigError, match="2 faults") as refused:
        choices(["format=xml", "out="], options, {"format": "text", "out": "plans"})
    assert "valid: text, json" in str(refused.value) and "write out=plans" in str(refused.value)


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere():
    file = io.StringIO()
    with progress("plan", Console(file=file, force_terminal=True, width=100)) as advance:
        advance(1, 2, "zero=stage1")
    assert "1/2" in file.getvalue() and "zero=stage1" in file.getvalue()
    quiet = io.StringIO()
    with progress("plan", Console(file=quiet)) as advance:
        advance(1, 2, "zero=stage1")
    assert quiet.getvalue() == ""
    slow = io.StringIO()
    with progress("plan", Console(file=slow), between=0.0) as advance:
        advance(1, 2, "zero=stage1")
    assert slow.getvalue().startswith("plan     1 of 2 after ")


def test_nothing_is_left_in_the_working_folder(some, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan_page.page(some, "no file")
    assert list(Path().iterdir()) == []
