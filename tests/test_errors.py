"""What a user can do wrong, through the command line: one sentence, the right exit code, nothing lost."""
import os
import re
import resource
import shlex
import signal
from pathlib import Path

import click
import pytest
import tokenizers
import torch

import codessm
import data
import tasks
from conftest import TINY, before_call, cli, files, says, send, write_lines


def refused(*args, code=2):
    """The one sentence of a `pretrain` that ends with `code` and leaves all files as they were."""
    before = files()
    tiny = [*TINY[:2], *TINY[4:]] if "--tokenizer" in args else TINY  # a given tokenizer and --vocab exclude each other
    exit_code, said = cli("pretrain", *tiny, "--steps", 3, *args)
    assert exit_code == code and "Traceback" not in said and files() == before, said
    error, = [line for line in said.splitlines() if line.startswith("Error: ")]
    return error.removeprefix("Error: ")


@pytest.fixture
def odd_files(small, functions):
    """What the rows below name, beside small.jsonl."""
    for name, lines in dict(empty=[], blank=["", "  "], bad=["x"], few=functions[:8], one=functions[:1],
                            third=[functions[0], "", "{'code': 1}"], mute=[{"code": c} for c in "abcdefghi"],
                            long=[{"code": "x" * 3_000_000}]).items():
        write_lines(f"{name}.jsonl", lines)
    os.mkdir("d")
    os.mkfifo("pipe")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>"))
    for name, content in {"c.py": b"x = 1", "t.json": b'{"model": 1}', "binary.json": b"\xff\x00",
                          "log.jsonl": b"no log", "maskless.json": model.to_str().encode()}.items():
        open(name, "wb").write(content)


@pytest.mark.parametrize("args, message", [
    ("long.jsonl --max-line 2", "long.jsonl:1: a line of more than 2.0 MB (--max-line"),
    ("*.nothing", "*.nothing: no such file"), ("empty.jsonl blank.jsonl", "empty.jsonl, blank.jsonl: no records"),
    ("bad.jsonl --skip-bad", "1 bad line passed over; the last is bad.jsonl:1: not JSON"),
    ("d", "d: no file of JSON lines"), ("c.py", "c.py: no file of JSON lines"),
    ("small.jsonl --code-field body", 'small.jsonl:1: no field "body"; the fields seen are: code, name'),
    ("small.jsonl --text-field note", 'no record has the field "note"'),
    ("one.jsonl", "nothing is left for the valid split"),
    # where it would write is looked at before the corpus
    ("nowhere.jsonl -o d", "d is a folder"), ("nowhere.jsonl -o pipe", "pipe is no plain file"),
    ("nowhere.jsonl -o none/model.pt", "cannot write none/model.pt: there is no folder"),
    ("nowhere.jsonl -o /proc/model.pt", "cannot write /proc/model.pt"), ("nowhere.jsonl -o ", "an empty name"),
    (f"nowhere.jsonl -o {'x' * 246}", "x: File name too long"),
    ("nowhere.jsonl -o log", "log.jsonl is where the metrics would go"),
    ("small.jsonl -o small.jsonl --restart", "small.jsonl exists and is no checkpoint"),
    ("small.jsonl --tokenizer d", "d: no tokenizer.json"), ("small.jsonl --tokenizer none.json", "none.json: No such"),
    ("small.jsonl --tokenizer t.json", "t.json: not a tokenizer.json"),
    ("small.jsonl --tokenizer binary.json", "binary.json: not text in UTF-8"),
    ("small.jsonl --tokenizer maskless.json", "maskless.json has no mask token"),
    ("small.jsonl --vocab 100", "--vocab 100 is too small"), ("--vocab 300 --tokenizer t.json", "not both"),
    ("--epochs 1", "not both"), ("--lr nan", "--lr nan"), ("--lr 0", "'--lr'"), ("--steps 0", "'--steps'"),
    ("--kernels 3", "3 cannot share 128 channels"), ("--kernels 2 --model codef", "codef has no S4D kernels"),
    ("--size huge", "'--size'"), ("--no-such-option", "No such option"), ("--device cuda:77", "no such device")])
def test_what_is_refused(odd_files, args, message):
    assert message in refused(*args.split(" "))


def test_small_and_partly_bad_corpora(odd_files):
    for args, code, message in (("few.jsonl", 0, "valid  1 example: loss"), ("mute.jsonl --seed 1", 2, "nothing to predict"),
                                ("small.jsonl third.jsonl --skip-bad", 0, "1 bad line passed over")):
        says(code, message, "pretrain", *args.split(), *TINY, "--steps", 1, "--restart")


def test_files_of_earlier_runs(small):
    """A log is no part of the corpus beside it; nothing is discarded before a run begins."""
    assert cli("pretrain", ".", *TINY, "--steps", 2)[0] == 0 and os.path.getsize("model.pt.jsonl")
    says(0, "small.jsonl: 65 records", "pretrain", ".", *TINY, "--steps", 2, "-o", "again.pt")
    os.rename("model.pt", "model.pt.state")
    assert "typo.jsonl" in refused("typo.jsonl", "--restart")
    assert "model.pt.state is no state of a run" in refused(small)


def test_what_runs_in_one_process(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    says(2, "corpus runs in one process", "corpus", small)
    for number in ("", "2", "x"):
        monkeypatch.setenv("RANK", number)
        assert f"RANK={number} and WORLD_SIZE=2" in refused(small)
    monkeypatch.setenv("RANK", "1")
    assert "could not reach each other" in refused(small, code=1)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert cli("corpus", small) == cli("no-such-command") == (2, "")  # rank 0 says it


def test_training_that_goes_wrong(small, monkeypatch):
    says(1, ["not finite numbers", "lower --lr with --restart"], "pretrain", small, *TINY, "--steps", 40, "--lr", 1e30)
    assert not os.path.exists("model.pt") and "NaN" not in open("model.pt.jsonl").read()
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(tasks.Stepper, "__call__", fail)
    says(1, "out of memory: use a smaller --batch", "pretrain", small, *TINY, "--steps", 3, "--restart")


def with_full_disk(size, *args, **options):
    """A command that can make no file larger than this. (The limit binds pytest's own files too, for so long.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        return cli(*args, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("what, size, message", [
    ("log", 10, "could not write model.pt.jsonl: File too large"), ("input", 10**3, "no room to keep standard input"),
    ("tokens", 10**3, "could not write model.pt.tokens: File too large"),
    ("state", 10**6, "could not write model.pt.state: File too large"),
    ("checkpoint", 10**6, "could not write model.pt: File too large")])
def test_a_disk_that_fills_up(small, monkeypatch, what, size, message):
    """The checkpoint of an earlier run stays whole."""
    command, lines = ["pretrain", "-" if what == "input" else small, *TINY, "--steps", 3], open(small, "rb").read()
    assert cli(*command, input=lines)[0] == 0
    old, log = open("model.pt", "rb").read(), open("model.pt.jsonl").read()
    monkeypatch.setattr(tasks, "SAVE_SECONDS", 0 if what == "state" else 999)
    monkeypatch.setattr(data, "IN_MEMORY", 0 if what == "tokens" else 2**30)
    code, said = with_full_disk(size, *command, "--restart", input=lines)
    assert code == 1 and message in said and "Traceback" not in said
    assert open("model.pt", "rb").read() == old and codessm.load("model.pt")
    assert set(os.listdir()) <= {"model.pt", "model.pt.jsonl", "small.jsonl"}
    assert what not in ("log", "input", "tokens") or open("model.pt.jsonl").read() == log  # until the first step


def test_a_disk_that_fills_up_under_a_corpus(small):
    code, said = with_full_disk(20, "corpus", data.__file__, "-o", "c.jsonl")
    assert code == 1 and "could not write c.jsonl: File too large" in said and os.listdir() == ["small.jsonl"]


def test_standard_input_cannot_be_resumed(small):
    command, lines = ["pretrain", "-", *TINY, "--steps", 9], open(small, "rb").read()
    with before_call(tasks.Stepper, "step", 2, send(signal.SIGTERM)):
        code, said = cli(*command, input=lines)
    assert code == 143 and "cannot be read again" in said
    says(2, ["standard input or a pipe", "--restart"], *command, input=lines)


def test_help_has_an_example():
    for command in codessm.cli.commands:
        says(0, f"Example: codessm {command} ", command, "--help")
    assert cli("--version") == (0, f"codessm, version {codessm.__version__}\n")


def test_the_readmes_commands_and_python_are_of_this_program():
    text = Path(__file__).parent.with_name("README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "README.md", "exec")
    commands = re.findall(r"^    (?:codessm|torchrun .*codessm\.py) (.*)", text, re.M)
    for name, *args in (shlex.split(line.split(" > ")[0], comments=True) for line in commands):
        command = codessm.cli.commands[name]
        command.make_parser(click.Context(command)).parse_args(args)  # raises where an option is none
    assert len(commands) >= 20
