"""goodput.jsonl and the report made of it: nothing missing, nothing twice, over crashes."""

from __future__ import annotations

import errno
import html.parser
import json
import os
import re

import pytest

from spmd_train.cli.main import main
from spmd_train.observe import Goodput
from spmd_train.observe.account import account
from spmd_train.observe.goodput import read_goodput
from spmd_train.observe.html import line_chart


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def attempt(workdir, clock, *, start, steps, save_every=5, end=True, restore=2.0):
    """One attempt of 1 s steps and 0.25 s data waits; 0.5 s saves; `end=False`: killed."""
    goodput = Goodput(workdir, age=3.0, now=clock, monotonic=clock)
    with goodput.span("restore"):
        clock.sleep(restore)
    goodput.begin(start)
    goodput.become("compile")
    for step in range(start + 1, steps + 1):
        for _ in goodput.waited(slow(clock, 0.25)):
            pass
        if step == start + 1:
            clock.sleep(4)
            goodput.become("train")
        clock.sleep(1)
        goodput.stepped(step)
        if step % save_every == 0:
            with goodput.span("save"):
                clock.sleep(0.5)
                goodput.write(saved=step)
    if end:
        goodput.__exit__(None, None, None)
    else:
        os.close(goodput._handle)


def slow(clock, seconds):
    clock.sleep(seconds)
    yield 0


def test_goodput_all_time_is_accounted_once(tmp_path, clock):
    attempt(tmp_path, clock, start=0, steps=8, end=False)
    clock.sleep(20)
    attempt(tmp_path, clock, start=5, steps=10)
    told = account(read_goodput(tmp_path / "goodput.jsonl"))
    s = told.seconds
    assert told.wall_seconds == pytest.approx(clock.now - 1000 + 3)
    assert s["init"] == pytest.approx(6) and s["restore"] == pytest.approx(4)
    assert s["compile"] == pytest.approx(8)
    # 10 steps count; 3 steps of the first attempt were done again, with their waits.
    assert s["train"] == pytest.approx(10) and s["data_wait"] == pytest.approx(2.5)
    assert s["wasted"] == pytest.approx(3 * 1.25) and told.wasted_steps == 3
    assert s["save"] == pytest.approx(1.0) and list(told.saves) == pytest.approx([0.5, 0.5])
    assert s["down"] == pytest.approx(17), "20 s, of which the next attempt knows 3"
    one, two = told.attempts
    assert (one.ended, one.first_step, one.last_step) == ("killed", 0, 8)
    assert (two.ended, two.first_step, two.last_step) == ("done", 5, 10)
    assert two.first_step_seconds == pytest.approx(17 + 3 + 2 + 4 + 1.25)


def test_goodput_unwritten_last_seconds_are_down_time(tmp_path, clock):
    """Lines come seconds apart; what a killed process did not write is no time of its own."""
    goodput = Goodput(tmp_path, now=clock, monotonic=clock)
    goodput.begin(0)
    goodput.become("train")
    for step in range(1, 1001):
        clock.sleep(0.125)
        goodput.stepped(step)
    os.close(goodput._handle)
    lines = read_goodput(tmp_path / "goodput.jsonl")
    assert len(lines) < 125, "one a second at most"
    clock.sleep(5)
    attempt(tmp_path, clock, start=960, steps=961)
    told = account(read_goodput(tmp_path / "goodput.jsonl"))
    assert told.wall_seconds == pytest.approx(clock.now - 1000)
    lost = told.wasted_steps * 0.125
    assert told.seconds["wasted"] == pytest.approx(lost) and 0 < told.wasted_steps <= 40
    assert told.seconds["train"] == pytest.approx(960 * 0.125 + 1)


def test_goodput_rollbacks_and_crashes_lose_a_step_once(tmp_path, clock):
    attempt(tmp_path, clock, start=0, steps=20, end=False)
    clock.sleep(5)
    attempt(tmp_path, clock, start=15, steps=16, end=False)
    clock.sleep(5)
    attempt(tmp_path, clock, start=10, steps=12, end=False)
    goodput = Goodput(tmp_path, now=clock, monotonic=clock)
    goodput.begin(10)
    goodput.become("train")
    clock.sleep(3)
    goodput.stepped(13)
    goodput.begin(10)  # Bad numbers: back, within the attempt.
    goodput.__exit__(RuntimeError, None, None)
    told = account(read_goodput(tmp_path / "goodput.jsonl"))
    assert told.seconds["train"] == pytest.approx(10)
    assert told.wasted_steps == 10 + 1 + 2 + 3 and told.rollbacks == 1
    assert told.wall_seconds == pytest.approx(clock.now - 1000 + 3)
    assert told.attempts[-1].ended == "RuntimeError"


def test_goodput_rollback_takes_back_steps_that_no_line_told_of(tmp_path, clock):
    goodput = Goodput(tmp_path, now=clock, monotonic=clock)
    goodput.begin(0)
    goodput.become("train")
    for step in range(1, 8):
        clock.sleep(0.4)
        goodput.stepped(step)
        if step == 5:
            goodput.write(saved=5)
    goodput.begin(5)
    goodput.__exit__(RuntimeError, None, None)
    told = account(read_goodput(tmp_path / "goodput.jsonl"))
    assert told.wasted_steps == 2
    assert told.seconds["wasted"] == pytest.approx(0.8)
    assert told.seconds["train"] == pytest.approx(2.0)


def test_goodput_survives_half_a_line_and_a_full_disk(tmp_path, clock, monkeypatch, caplog):
    path = tmp_path / "goodput.jsonl"
    attempt(tmp_path, clock, start=0, steps=3, end=False)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"attempt": 1, "ti')
    real = os.write

    def full(handle, content):
        real(handle, content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    goodput = Goodput(tmp_path, now=clock, monotonic=clock)
    goodput.begin(3)
    goodput.become("train")
    clock.sleep(5)
    monkeypatch.setattr(os, "write", full)
    goodput.stepped(4)
    assert "No space left" in caplog.text
    monkeypatch.setattr(os, "write", real)
    clock.sleep(5)
    goodput.stepped(5)
    assert path.read_bytes().startswith(whole)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[-1]["spans"] == {"train": 10.0} and lines[-1]["attempt"] == 2
    os.close(goodput._handle)


def test_goodput_is_written_by_one_process_only(tmp_path, clock):
    goodput = Goodput(None, now=clock, monotonic=clock)
    goodput.begin(0)
    goodput.stepped(1)
    with goodput:
        pass
    assert not list(tmp_path.iterdir())


class Page(html.parser.HTMLParser):
    """Every tag is closed, and nothing is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & dict(attrs).keys()
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_tells_and_draws(tmp_path, clock, capsys):
    attempt(tmp_path, clock, start=0, steps=8, end=False)
    clock.sleep(20)
    attempt(tmp_path, clock, start=5, steps=10)
    lines = [
        {"step": n, "split": "train", "loss": 5 - n / 10, "tokens_per_second": 100.0 + n}
        for n in range(1, 11)
    ]
    lines[3]["loss"] = lines[9]["loss"] = "NaN"
    for line, excess in zip(lines, (0.5, 0.1, 0.7), strict=False):
        line |= {"step_seconds": 1.0, "slowest_process": 3, "slowest_seconds": excess}
    lines.append({"step": 10, "split": "eval", "loss": 4.2})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["report", f"--workdir={tmp_path}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["shares"].values()) == pytest.approx(1)
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_seconds"])
    assert told["goodput"] == pytest.approx(told["seconds"]["train"] / told["wall_seconds"])
    assert told["restarts"] == 1 and told["wasted_steps"] == 3 and told["saves"]["count"] == 2
    assert told["last"]["train"]["loss"] == "NaN"
    assert told["last"]["eval"]["loss"] == 4.2 and told["html"] == str(tmp_path / "report.html")
    assert told["slow_processes"] == {"3": {"times": 2, "mean_seconds": pytest.approx(0.6)}}
    assert told["first_step_seconds_median"] == told["attempts"][1]["first_step_seconds"]
    page = (tmp_path / "report.html").read_text()
    tags = Page(page).tags
    assert tags.count("svg") == 2 and "restart at step 5" in page
    assert not re.search(r"https?:", page)

    other = tmp_path / "other.html"
    assert main(["report", f"--workdir={tmp_path}", f"--html={other}"]) == 0
    out = capsys.readouterr().out
    assert "process 3 held the others up in 2 comparison(s), by 0.600 s a step" in out
    assert "3 steps were done again" in out and "attempt 2:" in out and other.exists()
    assert re.search(r"sum +[\d.]+ s  100.0%", out)


def test_report_without_a_run_is_the_users_mistake(tmp_path, capsys):
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert "goodput.jsonl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_chart_keeps_extremes_and_leaves_gaps():
    spike = [(n, 100.0 if n == 5000 else 1.0) for n in range(10_000)]
    svg = "".join(line_chart({"loss": spike}))
    assert len(svg) < 40_000
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", svg)]
    assert min(heights) < 10 and max(heights) > 200
    gap = "".join(line_chart({"loss": [(0, 1.0), (1, 2.0), (2, float("inf")), (3, 1.0), (4, 2.0)]}))
    assert re.search(r"d='(M[\d. ]+L[\d. ]+){2}'", gap)
    assert "<svg" not in "".join(line_chart({"loss": [(1, float("nan"))]}))
