from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from cli_runs import write_jsonl
from conftest import NUM_LAYERS, build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.cli.main import main


def save_model(folder, *, seed: int = 0, model_type: str = "llama", **changes) -> str:
    build_tiny_model(model_type, seed=seed, **changes).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "one"), save_model(folder / "two", seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny_rows(40)))


@pytest.fixture
def explore(tmp_path, capsys):
    """Run the verb; return the data of the page that it wrote, or the message of a mistake."""
    out = tmp_path / "lens.html"

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["explore", *arguments, "--out", str(out)]) == code
        if code:
            [line] = capsys.readouterr().err.splitlines()
            return line
        packed = re.search(r'id="explored">([^<]*)<', out.read_text(encoding="utf-8"))[1]
        return json.loads(gzip.decompress(base64.b64decode(packed)))

    return run


def test_prompts_are_answered_and_read_through_the_logit_lens(explore, models, capsys):
    page = explore(models[0], "--prompt", "Namba 1 ni ipi?", "--prompt", "Ni", "--max-new-tokens", "3")
    assert page["models"] == [models[0]]
    assert [item["label"] for item in page["items"]] == ["Namba 1 ni ipi?", "Ni"]
    [side] = page["items"][0]["sides"]
    assert list(side["grids"][0]) == ["logit"]
    assert len(side["grids"][0]["logit"]["entropy"]) == (NUM_LAYERS + 1) * side["positions"]
    assert "Logit lens only: no rows" in capsys.readouterr().out


def test_rows_are_shown_with_their_english_and_fit_a_lens_on_other_rows(explore, models, rows, capsys):
    page = explore(*models[:1], "--against", models[1], "--data", rows, "--rows", "2")
    assert [item["label"] for item in page["items"]] == ["Namba 0 ni ipi?", "Namba 20 ni ipi?"]
    assert [item["notes"][0] for item in page["items"]] == [f"{rows}, row 1", f"{rows}, row 21"]
    for item in page["items"]:
        assert [side["name"] for side in item["sides"]] == ["text", "English"]
        assert [list(grids) for grids in item["sides"][0]["grids"]] == [["logit", "tuned"]] * 2
        assert list(item["sides"][1]["differences"]) == ["logit", "tuned"]
    assert f"fitted on {models[1]} with 38 rows of {rows}" in capsys.readouterr().out.replace("\n", "")


def test_figures_are_written_for_every_text(explore, models, tmp_path):
    explore(models[0], "--prompt", "Ni", "--max-new-tokens", "1", "--figures", str(tmp_path / "figures"))
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"1-text-logit{suffix}" for suffix in (".png", ".svg", ".pdf")}


def test_the_templates_words_are_gone_with_template_none(explore, models):
    page = explore(models[0], "--prompt", "Ni", "--template", "none", "--max-new-tokens", "1")
    assert page["items"][0]["sides"][0]["hidden"] == 0
    assert "<|user|>" not in str(page["items"][0]["sides"][0]["columns"])


def test_a_run_is_read_in_its_own_template(explore, tmp_path):
    folder = tmp_path / "run"
    save_model(folder / "model")
    config = f"model: x\nmethod: tft\ndata: {{train: rows.jsonl, template: alpaca}}\noutput_dir: {folder}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    [item] = explore(str(folder), "--prompt", "Ni", "--max-new-tokens", "1")["items"]
    assert "### Response:" in "".join(column[0] for column in item["sides"][0]["columns"])


def test_a_page_is_not_overwritten_unless_asked(explore, models):
    arguments = models[0], "--prompt", "Ni", "--max-new-tokens", "1"
    explore(*arguments)
    assert "lens.html exists; add --overwrite" in explore(*arguments, code=2)
    explore(*arguments, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to read; give --prompt or --data"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "a", "--lens", "tunned"], "--lens: 'tunned' is not allowed; allowed: both, logit"),
        (["--prompt", "a", "--against", "{one}"], "is the model itself"),
        (["--prompt", "a", "--against", "{shallow}"], "num_hidden_layers of {shallow} is 2, and 4 of {one}"),
        (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (
            ["--prompt", "a", "--template", "nothing.jinja"],
            "nothing.jinja is not chat, alpaca or an existing Jinja file",
        ),
        (["--prompt", "a", "--port", "70000"], "--port"),
        (["--prompt", "a", "--colour", "red"], "--colour: 'red' is not allowed; allowed: probability, entropy"),
        (["--prompt", "a", "--figures", __file__], f"--figures: {__file__} is a file; name a folder"),
        (["--serve", "--figures", "a"], "--figures: goes with a page, not with --serve"),
        (["--prompt", "a", "--rows", "0"], "--rows"),
    ],
)
def test_mistakes_are_one_line_before_a_weight_is_read(explore, models, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(
        "pivotune.models.loading.load_on_device", lambda name: pytest.fail(f"read the weights of {name}")
    )
    names = {"one": models[0], "shallow": str(tmp_path / "shallow")}
    save_model(names["shallow"], num_hidden_layers=2)
    line = explore(models[0], *(word.format(**names) for word in arguments), code=2)
    assert message.format(**names) in line


def test_other_tokens_are_refused(explore, models, tmp_path):
    build_tiny_model().save_pretrained(tmp_path / "other")
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["zaidi"])
    model = build_tiny_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert "vocab_size of" in explore(models[0], "--prompt", "a", "--against", str(tmp_path / "other"), code=2)


def test_as_typed_a_served_page_answers_and_ctrl_c_ends_it(models, request):
    # A program that a script starts in the background ignores Ctrl-C, and so would the page of a test run started so.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pivotune", "explore", models[0], "--serve", "--max-new-tokens", "2"]
    source = Path(__file__).parents[2] / "src"
    environment["PYTHONPATH"] = str(source)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address = re.fullmatch(r"open http://127\.0\.0\.1:(\d+)(/\S+/)\n", process.stdout.readline())
            assert process.stdout.readline() == "Ctrl-C ends\n"
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
            connection.request("GET", address[2])
            page = connection.getresponse().read().decode()
            assert 'id="ask"' in page
            assert "connect-src &#39;self&#39;" in page
            body = json.dumps({"prompt": "Namba?", "english": "Number?", "model": 0})
            connection.request("POST", f"{address[2]}read", body, {"Content-Type": "application/json"})
            item = json.loads(connection.getresponse().read())
            assert [side["prompt"] for side in item["sides"]] == ["Namba?", "Number?"]
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, errors) == (0, "ended\n", "")
