"""Options, rows, table and result file of the benchmark programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import (
    RESULTS,
    Row,
    at_least,
    at_most,
    benchmark_parser,
    memory_row,
    parse_options,
    print_table,
    report,
    run_program,
    time_row,
)
from pivotune.errors import UsageError

SECONDS = {"slow": [4.0, 9.0, 2.0], "fast": [2.0, 3.0, 2.0]}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def parse(*arguments: str):
    return parse_options(benchmark_parser("trial", "A trial."), list(arguments))


def test_ratio_is_the_median_of_the_rounds_own_ratios():
    row = time_row("slow / fast", SECONDS, "slow", "fast", at_least(1.9))
    assert (row.ratio, row.spread, row.reached) == (2.0, (1.0, 3.0), True)
    assert row.seconds == SECONDS


@pytest.mark.parametrize(
    ("goal", "reached"), [(at_most(2.0), True), (at_most(1.99), False), (at_least(2.0), True), (at_least(2.01), False)]
)
def test_goal_at_its_limit(goal, reached):
    assert Row(what="", ratio=2.0, spread=(2.0, 2.0), goal=goal).reached is reached


def test_memory_row_keeps_both_sides():
    row = memory_row("memory", {"a": 30, "b": 10, "c": 7}, "a", "b")
    assert (row.ratio, row.spread, row.goal, row.reached) == (3.0, (3.0, 3.0), None, None)
    assert row.memory == {"a": 30, "b": 10}


def test_table_has_a_line_for_each_row(capsys):
    print_table([time_row("slow / fast", SECONDS, "slow", "fast", at_most(1.5)), Row(what="b", ratio=1, spread=(1, 1))])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["ratio", "of", "median", "min", "..", "max", "goal", "reached"]
    assert first.split() == ["slow", "/", "fast", "2", "1", "..", "3", "<=", "1.5", "no"]
    assert second.split() == ["b", "1", "1", "..", "1"]


def test_result_file(tmp_path, capsys):
    options = parse("--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "new" / "r.json"), "--threads", "1")
    report(options, [time_row("slow / fast", SECONDS, "slow", "fast", at_least(3))])
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["benchmark"] == "trial"
    assert content["settings"] == {"shape": "tiny", "device": "cpu", "dtype": "float32", "rounds": 5, "threads": 1}
    assert content["rows"] == [
        {"what": "slow / fast", "ratio": 2.0, "spread": [1.0, 3.0], "goal": ">= 3", "reached": False,
         "seconds": SECONDS, "memory": {}}
    ]  # fmt: skip
    machine = content["machine"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert "VmHWM" in content["memory_method"]
    assert str(tmp_path) in capsys.readouterr().out


def test_defaults_follow_program_shape_and_device():
    options = parse("--device", "cpu")
    assert (options.shape, options.rounds, options.dtype) == ("smollm2", 5, torch.float32)
    assert options.out == RESULTS / "trial-smollm2-cpu.json"
    assert parse("--device", "cpu", "--dtype", "bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "gpt5"], ["--shape", "'gpt5'", "smollm2"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--dtype", "float64"], ["--dtype", "'float64'", "bfloat16"]),
        (["--rounds", "0"], ["--rounds", "'0'", "a number from 1"]),
        (["--threads", "many"], ["--threads", "'many'", "a number from 1"]),
        (["--round", "3"], ["--round"]),
        (["--out", "{folder}"], ["--out", "is a folder"]),
        (["--out", "{folder}/file/r.json"], ["--out", "file/r.json", "cannot be written"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as error:
        parse(*(argument.format(folder=tmp_path) for argument in arguments))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="--device: cuda found, but this machine has no usable GPU"):
        parse("--device", "cuda")


def test_checking_the_output_leaves_no_file_and_keeps_one_that_is_there(tmp_path):
    parse("--device", "cpu", "--out", str(tmp_path / "r.json"))
    assert not (tmp_path / "r.json").exists()
    (tmp_path / "r.json").write_text("before")
    parse("--device", "cpu", "--out", str(tmp_path / "r.json"))
    assert (tmp_path / "r.json").read_text() == "before"


def test_program_prints_the_line_and_leaves_with_2(capsys):
    def main(arguments):
        raise UsageError("--tokens: 'x' found; allowed: a number from 1")

    with pytest.raises(SystemExit) as leaving:
        run_program(main)
    assert leaving.value.code == 2
    assert capsys.readouterr() == ("", "error: --tokens: 'x' found; allowed: a number from 1\n")


def test_results_lie_beside_the_programs():
    assert Path(__file__).parents[2] / "benchmarks" / "results" == RESULTS
