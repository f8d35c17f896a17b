"""Progress on a terminal and in a log, and the clock behind its numbers."""

import io
import re

import pytest

from spmd_train.observe import Progress, StepClock

VALUES = {
    "loss": 2.34567,
    "bits_per_byte": 3.384,
    "grad_norm": 0.8123,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.12345,
    "mfu": 0.4123,
    "data_wait_seconds": 0.0004,
    "device_memory_bytes": 3 * 2**30,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def log_lines(*calls, **kwargs) -> list[str]:
    stream = io.StringIO()
    with Progress(300, 0, stream=stream, **kwargs) as progress:
        for step, split, values in calls:
            progress.update(step)
            progress.log(step, split, values)
    return stream.getvalue().splitlines()


def test_observe_progress_logs_a_line_a_step():
    (line,) = log_lines((120, "train", VALUES))
    for part in (
        "train 120/300", "loss  2.3457", "bpb 3.3840", "grad  0.8123", "lr 1.00e-03",
        "tok/s 12.35k", "step  0.123s", "mfu 41.2%", "wait  0.000s", "mem  3.00GiB",
    ):  # fmt: skip
        assert part in line


def test_observe_progress_lines_align():
    small = {k: v / 7 for k, v in VALUES.items()}
    lines = log_lines((1, "train", VALUES), (300, "train", small), (9, "train", VALUES))
    assert len({len(line) for line in lines}) == 1
    labels = [[m.start() for m in re.finditer(r"[a-z/]+ ", line)] for line in lines]
    assert labels[0] == labels[1] == labels[2]


def test_observe_progress_shows_other_metrics_and_no_missing_ones():
    (line,) = log_lines((5, "eval", {"loss": float("nan"), "mfu": None, "accuracy": 0.5}))
    assert line.startswith("eval    5/300")
    assert "nan" in line and "accuracy 0.5" in line and "mfu" not in line


def test_observe_progress_draws_no_bar_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (line,) = log_lines((5, "train", VALUES))
    assert "\x1b" not in line


def test_observe_progress_goes_to_standard_error(capsys):
    with Progress(10, 0) as progress:
        progress.log(1, "train", {"loss": 1.0})
    out, err = capsys.readouterr()
    assert out == "" and "loss" in err


def test_observe_progress_quiet_prints_nothing():
    assert log_lines((5, "train", VALUES), quiet=True) == []
    stream = Terminal()
    with Progress(300, 0, quiet=True, stream=stream) as progress:
        progress.update(1)
        progress.log(1, "eval", VALUES)
    assert stream.getvalue() == ""


def test_observe_progress_draws_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress(300, 100, stream=stream) as progress:
        progress.update(120)
        progress.log(120, "train", VALUES)
        progress.log(120, "eval", {"loss": 1.5, "bits_per_byte": 2.25})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "120/300" in text and "loss 2.3457" in text and "tok/s 12.35k" in text and "eta" in text
    assert "eval  120/300  loss  1.5000  bpb 2.2500" in re.split(r"\s*[\r\n]+", text)
    assert "grad" not in text  # train metrics are in the bar, not above it


def test_observe_progress_on_a_dumb_terminal_logs_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(300, 0, stream=stream) as progress:
        progress.log(1, "train", VALUES)
    assert stream.getvalue().count("\n") == 1


class FakeTime:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_observe_clock_separates_compilation_waiting_and_pauses():
    time = FakeTime()
    clock = StepClock(tokens_per_step=1000, now=time)

    def step(wait: float, work: float) -> None:
        with clock.waiting():
            time.seconds += wait
        time.seconds += work
        clock.step_done()

    step(wait=2.0, work=30.0)
    time.seconds += 0.5  # the first step runs on after its dispatch
    for _ in range(3):
        step(wait=0.1, work=0.4)
    values = clock.read()
    assert values == pytest.approx(
        {
            "compile_seconds": 30.0,
            "step_seconds": 0.5,
            "tokens_per_second": 2000.0,
            "data_wait_seconds": 0.3 / 4,
        }
    )
    with clock.paused():
        time.seconds += 60.0
    for _ in range(5):
        step(wait=0.0, work=0.25)
    values = clock.read()
    assert values == pytest.approx(
        {"step_seconds": 0.25, "tokens_per_second": 4000.0, "data_wait_seconds": 0.0}
    )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_observe_clock_is_exact_when_metrics_lag_a_step_and_a_pause_catches_up(asynchronous):
    time, start = FakeTime(), 7
    clock = StepClock(tokens_per_step=10, start_step=start, now=time)
    device_free = 0.0

    def wait_for(finish: float) -> None:
        time.seconds = max(time.seconds, finish)

    finishes, read_at = {}, {}
    for step in range(start + 1, 31):
        if step == start + 1:
            time.seconds += 20.0  # compiles
        device_free = finishes[step] = max(time.seconds, device_free) + 2.0
        if not asynchronous:
            wait_for(device_free)
        clock.step_done()
        for done in [step - 1] + [step] * (step % 10 == 0):  # every tenth step a pause
            if done > start:
                wait_for(finishes[done])
            if done == start + 1 or (done % 5 == 0 and done > start and done not in read_at):
                read_at[done] = clock.read(done)
        if step % 10 == 0:
            with clock.paused():
                time.seconds += 33.0
    assert read_at[8]["step_seconds"] is None and read_at[8]["compile_seconds"] >= 20.0
    assert list(read_at) == [8, 10, 15, 20, 25, 30]
    for done in (10, 15, 20, 25, 30):
        slack = 0 if asynchronous else 2.0 / (done - max(8, done - 5))  # one step, at most
        assert read_at[done]["step_seconds"] == pytest.approx(2.0, abs=slack + 1e-9)


def test_observe_clock_after_the_first_step_knows_only_its_compilation():
    time = FakeTime()
    clock = StepClock(tokens_per_step=10, now=time)
    time.seconds += 5.0
    clock.step_done()
    time.seconds += 1.0
    values = clock.read()
    assert values.pop("compile_seconds") == pytest.approx(5.0)
    assert values == dict.fromkeys(("step_seconds", "tokens_per_second", "data_wait_seconds"))
    time.seconds += 2.0
    clock.step_done()
    assert clock.read()["step_seconds"] == pytest.approx(2.0)
    assert "compile_seconds" not in clock.read()


def test_observe_clock_closes_its_spans_on_errors():
    time = FakeTime()
    clock = StepClock(tokens_per_step=10, now=time)
    clock.step_done()
    with pytest.raises(StopIteration), clock.waiting():
        time.seconds += 3.0
        raise StopIteration
    time.seconds += 1.0
    clock.step_done()
    assert clock.read()["data_wait_seconds"] == pytest.approx(1.5)
