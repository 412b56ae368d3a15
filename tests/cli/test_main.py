from __future__ import annotations

import subprocess
import sys

import pytest
from cli_runs import write_config, write_jsonl
from conftest import tiny_rows

import pivotune
from pivotune.cli import main as main_module
from pivotune.cli.main import main
from pivotune.errors import UsageError

HEAVY = ("pydantic", "yaml", "torch", "transformers", "numpy", "datasets", "altair", "peft", "babel", "accelerate")
VERBS = ("demo", "data", "analyze", "init", "train", "evaluate", "compare", "sweep", "chat")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-m", "pivotune", *words], capture_output=True, text=True)


@pytest.fixture
def failing(monkeypatch):
    """A function that makes `pivotune init` raise."""

    def make(error: BaseException) -> None:
        def app(*args, **kwargs):
            raise error

        monkeypatch.setattr(main_module, "app", app)

    return make


@pytest.fixture
def failing_verb(monkeypatch):
    """A function that makes the verb `init` raise, below the command line parser."""

    def make(error: BaseException) -> None:
        def render(*args, **kwargs):
            raise error

        monkeypatch.setattr("pivotune.cli.init.render", render)

    return make


def test_help_as_a_program():
    result = run("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for word in (*VERBS, "--version", "--debug"):
        assert f" {word} " in result.stdout


def test_help_imports_nothing_heavy():
    """What takes long to import is what would keep `pivotune --help` from answering at once."""
    script = (
        "import sys; from pivotune.cli.main import main; code = main(['--help']); "
        f"print('loaded', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded [] 0"


# Starts the command in one of the two ways that it is started, and prints the environment at the first look for torch.
_UNTIL_TORCH = """
import os, runpy, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            raise SystemExit(0)

sys.meta_path.insert(0, Recorder())
way, *sys.argv[1:] = sys.argv[1:]
if way == "module":
    runpy.run_module("pivotune", run_name="__main__", alter_sys=True)
else:
    from pivotune.cli.main import main
    sys.exit(main())
"""


@pytest.mark.parametrize("way", ["module", "script"])
@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_sets_it(way, own, expected, monkeypatch):
    """libgomp reads the variable when torch is imported."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    command = [sys.executable, "-c", _UNTIL_TORCH, way, "demo"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr


@pytest.mark.parametrize("verb", [["init"], ["train"], ["analyze"], ["demo"], ["chat"], ["data"], ["data", "check"]])
def test_every_verb_has_help(verb, capsys):
    assert main([*verb, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"Usage: pivotune {' '.join(verb)}" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("verb", ["evaluate", "sweep", "data", "demo"])
@pytest.mark.parametrize("local_rank", [0, 1])
def test_only_train_works_in_several_processes(verb, local_rank, monkeypatch, capsys):
    monkeypatch.setattr("pivotune.cli.main.SEVERAL_PROCESSES", True)
    monkeypatch.setattr("pivotune.cli.main.LOCAL_RANK", local_rank)
    assert main([verb, "run.yaml"]) == 2
    told = f"pivotune: error: `pivotune {verb}` works in one process; start it without torchrun"
    err = capsys.readouterr().err
    assert err.startswith(told) if local_rank == 0 else err == ""
    assert main(["train", "--help"]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pivotune {pivotune.__version__}\n"
    assert run("--version").stdout == f"pivotune {pivotune.__version__}\n"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tain"], "No such command 'tain'"),
        (["train"], "Missing argument"),
        (["train", "run.yaml", "--sett", "a=1"], "No such option: --sett"),
        (["demo", "--rows", "0"], "Invalid value for '--rows'"),
        (["evaluate", "m", "--tasks", "xquad_vi", "--limit", "0"], "Invalid value for '--limit'"),
        (["evaluate", "m", "--tasks"], "Option '--tasks' requires an argument"),
        (["demo", "--rows", "many"], "Invalid value for '--rows'"),
        (["analyze", "--model", "m"], "Missing option '--data'"),
    ],
)
def test_words_that_are_no_command_line(words, expected, debug, capsys):
    assert main([*words, *debug]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pivotune: error: {expected}")
    assert captured.err.count("\n") == 1


def test_no_words_show_the_help(capsys):
    assert main([]) == 2
    assert "Usage: pivotune" in "".join(capsys.readouterr())


def test_a_users_mistake_is_one_line_and_code_2(failing, capsys):
    failing(UsageError("pairs.jsonl: row 3:\n  no answer"))
    assert main(["init"]) == 2
    assert capsys.readouterr() == ("", "pivotune: error: pairs.jsonl: row 3: no answer\n")


def test_anything_else_is_one_line_and_code_1(failing, capsys):
    failing(RuntimeError("out of\nmemory"))
    assert main(["init"]) == 1
    assert capsys.readouterr() == ("", "pivotune: RuntimeError: out of memory (--debug shows where)\n")


def test_diverged_training_is_one_line_and_code_1(failing, capsys):
    from pivotune.training.resilience.counters import TrainingDivergedError

    failing(TrainingDivergedError("the loss is not a finite number"))
    assert main(["init"]) == 1
    assert capsys.readouterr() == ("", "pivotune: stopped: the loss is not a finite number\n")


def test_interrupted_is_code_130(failing_verb, failing, capsys):
    failing_verb(KeyboardInterrupt())
    assert main(["init"]) == 130
    assert capsys.readouterr().err.strip() == "pivotune: stopped"
    failing(KeyboardInterrupt())
    assert main(["init"]) == 130
    assert capsys.readouterr() == ("", "pivotune: stopped\n")


@pytest.mark.parametrize("words", [["--debug", "init"], ["init", "--debug"], ["init", "--language", "vi", "--debug"]])
def test_debug_anywhere_raises(words, failing_verb):
    failing_verb(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match=r"^broken$"):
        main(words)


def test_debug_from_the_environment(failing_verb, monkeypatch):
    failing_verb(UsageError("wrong"))
    monkeypatch.setenv("PIVOTUNE_DEBUG", "1")
    with pytest.raises(UsageError, match=r"^wrong$"):
        main(["init"])


def test_codes_and_tracebacks_as_a_program(tmp_path):
    path = tmp_path / "run.yaml"
    plain, debug = run("train", str(path)), run("train", str(path), "--debug")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == f"pivotune: error: {path}: no such file\n"
    assert debug.returncode == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(f"pivotune.errors.UsageError: {path}: no such file\n")
    assert run("nonsense").returncode == 2


# Each command has one mistake, in a folder with the model and the rows that the others need.
_MISTAKES = """\
train run.yaml --set model=none/at/there
train run.yaml --set data.train=none.jsonl
train run.yaml --set data.validation=none.jsonl
train run.yaml --set output_dir=taken
train run.yaml --resume --set output_dir=new
evaluate none/at/there --tasks xquad_vi
evaluate model --tasks xquad_vn
evaluate model --tasks xquadvi
explore none/at/there --prompt a
explore model --against none/at/there --prompt a
explore model --data none.jsonl
explore model --prompt a --out taken/page.html
chat none/at/there
chat model --compare none/at/there
export none --to out
export run --to taken
push none owner/name
analyze --model none/at/there --data rows.jsonl
analyze --model model --data none.jsonl
analyze --model model --data rows.jsonl --english none.jsonl
analyze --model model --data rows.jsonl --out taken/layers.json
data check none.jsonl --lang sw --model model
data check rows.jsonl --lang sw --model none/at/there"""


def test_mistakes_are_reported_before_torch_is_imported(tmp_path):
    """Torch and Transformers take seconds to import, ten and more on a busy machine."""
    write_config(tmp_path, "model", write_jsonl(tmp_path / "rows.jsonl", tiny_rows(2)))
    for name in ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "taken/layers.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "taken/page.html").touch()
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text((tmp_path / "run.yaml").read_text())
    script = (
        "import sys; from pivotune.cli.main import main\n"
        "for line in sys.argv[1].splitlines():\n"
        "    print(line, main(line.split()), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, _MISTAKES]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.splitlines() == [f"{line} 2 False" for line in _MISTAKES.splitlines()], result.stderr
    assert len(result.stderr.splitlines()) == len(_MISTAKES.splitlines())
