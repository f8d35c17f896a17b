"""The command line: flags, exit codes, and answers without JAX."""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import spmd_train.cli.inspect_config
import spmd_train.cluster
from spmd_train import training
from spmd_train.cli.main import main
from spmd_train.cli.verbs import VERBS
from spmd_train.config import ConfigError, ExperimentConfig, parse, to_json
from spmd_train.config.keys import paths_of

ROOT = pathlib.Path(__file__).parent.parent
TINY = f"--config={ROOT / 'configs' / 'lm_tiny.py'}"


@pytest.fixture
def run_verb(monkeypatch):
    """Runs a command line whose verb has this body and starts nothing of JAX's."""
    monkeypatch.setattr(spmd_train.cluster, "start", lambda *, simulate_devices: None)

    def run_verb(argv, body=lambda args: 0):
        for verb in VERBS:
            monkeypatch.setitem(sys.modules, verb.module, argparse.Namespace(run=body))
        return main(argv)

    return run_verb


def refusal(argv, capsys) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("spmd-train: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb.words))
def test_cli_main_every_verb_teaches(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*verb.words, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert verb.example in out
    assert "exit codes:" in out and ("--config.a.b=VALUE" in out) == verb.takes_config
    for flag in verb.flags:
        assert (flag.metavar if flag.positional else f"--{flag.name}") in out and flag.help
        assert not flag.config_key or flag.config_key in set(paths_of(ExperimentConfig))
    assert not verb.uses_devices or "simulate_devices" in {flag.name for flag in verb.flags}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb.words))
def test_cli_main_every_verb_has_its_module(verb):
    assert importlib.util.find_spec(verb.module), verb.module


@pytest.mark.parametrize(
    "argv", [["--help"], ["generate", "--help"], ["--version"], ["inspect", "config"]]
)
def test_cli_main_answers_without_jax_in_under_a_second(argv):
    code = (
        "import sys, time\n"
        "from spmd_train.cli.main import main\n"
        "try:\n"
        f"    main({argv!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules], file=sys.stderr)\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, seconds = done.stderr.splitlines()
    assert imported == "[]"
    assert float(seconds) < 1.0
    assert done.stdout


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "required: VERB"),
        ("trian", "invalid choice: 'trian'"),
        ("inspect", "required: WHAT"),
        ("train --wrkdir=x", "no such flag: --wrkdir=x; the nearest is --workdir"),
        ("train --num_steps=3", "the nearest is --config.train.num_steps"),
        ("generate --max-new-tokens=3", "the nearest is --max_new_tokens"),
        ("train --json --workdir=x", "no such flag: --json"),
        ("train", "--workdir must be given"),
        ("train --workdir=", "must name a folder, but is empty"),
        ("generate", "--workdir and --prompt must be given"),
        ("generate --workdir=/nonexistent --prompt=x", "holds no run"),
        ("inspect config extra", "unexpected argument 'extra'"),
        ("inspect config --simulate_devices=0", "'0' must be a whole number, at least 1"),
        ("inspect config --simulate_devices=two", "'two' must be a whole number, at least 1"),
        ("inspect config --config.train.num_steps", "write --config.train.num_steps=VALUE"),
        ("inspect config --config.train.num_steps 3", "write --config.train.num_steps=VALUE"),
        ("inspect config --config=nope.py", "--config=nope.py: there is no such file"),
        ("inspect config --conf=nope.py", "no such flag: --conf=nope.py; the nearest is --config"),
    ],
)
def test_cli_main_refuses_wrong_words(words, told, capsys):
    assert told in refusal(words.split(), capsys)


def test_cli_main_refuses_a_wrong_config(capsys):
    err = refusal(["inspect", "config", TINY, "--config.train.num_stps=3"], capsys)
    assert "train.num_stps = '3': there is no such key; the nearest is train.num_steps" in err


def test_cli_main_hands_the_verb_its_flags(run_verb, tmp_path):
    (tmp_path / "config.json").write_text(to_json(parse({"sample": {"top_k": 5}})))
    seen = []
    argv = [
        *("generate", f"--workdir={tmp_path}", "--prompt=a", "--prompt", "b c", "--top_p=0.5"),
        *("--config.train.num_steps=7", "--step=3", "--json"),
    ]
    assert run_verb(argv, lambda args: seen.append(args) or 0) == 0
    (args,) = seen
    assert isinstance(args.config, ExperimentConfig)
    assert args.config.train.num_steps == 7
    assert (args.workdir, args.prompt, args.step, args.json) == (tmp_path, ["a", "b c"], 3, True)
    sample = args.config.sample
    assert (sample.top_k, sample.top_p, sample.temperature, args.seed) == (5, 0.5, 0.8, 0)


def test_cli_main_sampling_flags_have_the_configs_limits(capsys, tmp_path):
    (tmp_path / "config.json").write_text(to_json(ExperimentConfig()))
    argv = ["generate", f"--workdir={tmp_path}", "--prompt=a", "--temperature=-1"]
    assert "sample.temperature = -1.0: must be a number, at least 0" in refusal(argv, capsys)


def test_cli_main_exit_codes_of_a_verb(run_verb, capsys):
    def wrong(args):
        raise ConfigError("data.path = 'x': matches no file")

    def interrupted(args):
        raise KeyboardInterrupt

    def faulty(args):
        raise RuntimeError("a fault")

    argv = ["inspect", "shardings", TINY]
    assert run_verb(argv, lambda args: 75) == 75
    assert run_verb(argv, wrong) == 2
    assert capsys.readouterr().err == "spmd-train: data.path = 'x': matches no file\n"
    assert run_verb(argv, interrupted) == 130
    with pytest.raises(RuntimeError, match="a fault"):
        run_verb(argv, faulty)


def test_cli_main_starts_the_devices_asked_for(run_verb, monkeypatch):
    started = []
    monkeypatch.setattr(
        spmd_train.cluster, "start", lambda *, simulate_devices: started.append(simulate_devices)
    )
    assert run_verb(["inspect", "shardings", TINY, "--simulate_devices=8"]) == 0
    assert run_verb(["inspect", "shardings", TINY]) == 0
    assert run_verb(["inspect", "config", TINY, "--simulate_devices=8"]) == 0
    assert started == [8, None]


def test_cli_main_inspect_config_prints_every_key(capsys):
    assert main(["inspect", "config", TINY, "--config.model.num_layers=9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "model.num_layers" in line]
    assert line.startswith("* model.num_layers")
    assert "transformer blocks" in line and "default 4" in line
    for path in ("mesh.dcn.data", "sharding.rules", "optimizer.schedule.name", "sample.prompt"):
        assert any(path in line for line in lines)
    columns = {line.index("[") > 0 for line in lines if line.startswith("  ")}
    assert columns == {True}


def test_cli_main_inspect_config_wraps_to_the_terminal():
    rows = spmd_train.cli.inspect_config.describe(ExperimentConfig())
    narrow = list(spmd_train.cli.inspect_config.format_table(rows, width=100))
    whole = list(spmd_train.cli.inspect_config.format_table(rows, width=None))
    assert len(narrow) > len(whole)
    table = [line for line in narrow if line[:2] in ("  ", "* ")]
    assert max(map(len, table)) <= 100 + len("norm|bias|embedding|positions")
    assert "".join("".join(narrow).split()) == "".join("".join(whole).split())


def test_cli_main_inspect_config_json_is_one_document(capsys, tmp_path):
    assert main(["inspect", "config", TINY, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (key,) = [key for key in answer["keys"] if key["path"] == "train.num_steps"]
    assert key["value"] == answer["config"]["train"]["num_steps"]
    assert key["meaning"] == "optimizer steps"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(answer["config"]))
    assert main(["inspect", "config", f"--config={path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer


def spmd_train_process(*argv, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "spmd_train", *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        **kwargs,
    )


def test_cli_main_process_exits_with_2():
    with spmd_train_process("inspect", "config", "--config.model.num_layers=0") as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert b"model.num_layers = 0: must be a whole number, at least 1" in err
    assert b"Traceback" not in err


def test_cli_main_process_survives_a_reader_that_leaves():
    with spmd_train_process("inspect", "config", stdout=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == b""


def test_cli_main_told_to_stop_outside_the_steps(monkeypatch, tmp_path):
    """While data is opened, say, or after the last step: nothing is to be saved."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training, "train", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as caught:
            main(["train", TINY, f"--workdir={tmp_path}"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 75


@pytest.mark.parametrize("workdir", ["file", "file/below", "s3://bucket/run"])
def test_cli_main_workdir_that_cannot_be_written(workdir, capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    path = workdir if "://" in workdir else f"{tmp_path}/{workdir}"
    words = ["--config.model.num_layers=1", "--config.train.eval_every=0"]
    assert path in refusal(["train", TINY, f"--workdir={path}", *words], capsys)
    assert (tmp_path / "file").read_text() == "kept"


def test_cli_main_workdir_in_the_home_folder(run_verb, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    for workdir in ("~/run", "~nobody_at_all/run"):
        run_verb(["report", f"--workdir={workdir}"], lambda args: seen.append(args.workdir) or 0)
    assert seen == [tmp_path / "run", pathlib.Path("~nobody_at_all/run")]
