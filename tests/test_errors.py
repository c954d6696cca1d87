"""What a user can do wrong, through the command line: one sentence, the right exit code, nothing lost."""
import gzip
import io
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

import codessm
import data
import tasks
from conftest import ROOT, TINY, Forked, cli, program, wait_for, write_lines


def refused(*args, input=None, code=2):
    """The one sentence of a `pretrain` that ends with `code` and leaves no output."""
    before = os.listdir()
    tiny = [*TINY[:2], *TINY[4:]] if "--tokenizer" in args else TINY  # a given tokenizer and --vocab exclude each other
    exit_code, said = cli("pretrain", *args, *tiny, "--steps", 3, input=input)
    assert exit_code == code, said
    assert os.listdir() == before
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "Traceback" not in said
    return errors[0].removeprefix("Error: ")


def test_missing_file(small):
    assert refused("nowhere.jsonl") == "nowhere.jsonl: no such file"
    assert refused("*.json") == "*.json: no such file"


def test_empty_corpus(small):
    write_lines("empty.jsonl", [])
    write_lines("blank.jsonl", ["", "  "])
    assert refused("empty.jsonl", "blank.jsonl") == "empty.jsonl, blank.jsonl: no records: it is empty"
    write_lines("bad.jsonl", ["x"])
    assert "the last of 1 bad lines is bad.jsonl:1: not JSON" in refused("bad.jsonl", "--skip-bad")


@pytest.mark.parametrize("line, message", [
    ("{'code': 1}", "bad.jsonl:3: not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1]", "bad.jsonl:3: an array, not a JSON object"),
    ('{"body": "x", "lang": "c"}', "bad.jsonl:3: no code field; the fields seen are: body, lang "
                                   "(--code-field names the one to read)"),
    (b'{"code": "\xe9"}', "bad.jsonl:3: invalid UTF-8 at byte 11 of the line"),
    ('{"code": ""}', "bad.jsonl:3: the code is empty"),
])
def test_a_bad_line(small, functions, line, message):
    write_lines("bad.jsonl", [functions[0], "", line, functions[1]])
    assert refused(small, "bad.jsonl") == message
    code, said = cli("pretrain", small, "bad.jsonl", "--skip-bad", *TINY, "--steps", 1)
    assert code == 0 and "1 bad lines passed over" in said


def test_field_options(small):
    assert 'no field "body"; the fields seen are: code, name' in refused(small, "--code-field", "body")
    assert refused(small, "--text-field", "note") == \
        f'{small}: no record has the field "note" given with --text-field'


def test_fewer_samples_than_a_batch(small, functions):
    write_lines("few.jsonl", functions[:8])
    assert refused("few.jsonl") == ("the corpus has 7 samples to train on and 1 to evaluate on, fewer than one batch: "
                                    "give more of it, or --batch 7 or less")
    write_lines("one.jsonl", functions[:1])
    code, said = cli("pretrain", "one.jsonl", *TINY, "--batch", 1)
    assert code == 2 and "1 samples to train on and 0 to evaluate on, fewer than one batch: give more of it" in said
    write_lines("mute.jsonl", [{"code": chr(97 + i)} for i in range(9)])
    code, said = cli("pretrain", "mute.jsonl", *TINY, "--seed", 1)
    assert code == 2 and "nothing to predict in the 1 records held out: give a larger corpus" in said
    assert cli("pretrain", "few.jsonl", *TINY, "--batch", 7, "--steps", 1)[0] == 0


def test_folders_where_files_should_be(small):
    os.mkdir("d")
    assert refused("d").startswith("d: no .jsonl or .jsonl.gz file in this folder; `codessm corpus d -o corpus.jsonl`")
    assert refused(small, "-o", "d") == "d is a folder: give -o the name of a file"
    assert refused(small, "--tokenizer", "d") == "d: Is a directory"


def test_compressed_files_that_are_broken(small):
    whole = gzip.compress(open(small, "rb").read())
    open("cut.jsonl.gz", "wb").write(whole[:-20])
    assert refused("cut.jsonl.gz").startswith("cut.jsonl.gz: not a whole gzip file")
    open("bad.jsonl.gz", "wb").write(whole[:40] + b"\x00" * 50 + whole[90:])
    assert refused("bad.jsonl.gz").startswith("bad.jsonl.gz: not a whole gzip file")


def test_tokenizers(small):
    open("t.json", "w").write('{"model": 1}')
    assert refused(small, "--tokenizer", "t.json").startswith("t.json: not a tokenizer.json")
    assert refused(small, "--tokenizer", "none.json") == "none.json: No such file or directory"
    open("binary.json", "wb").write(b"\xff\x00")
    assert refused(small, "--tokenizer", "binary.json") == "binary.json: not text in UTF-8"
    special = ["<s>", "</s>", "<pad>"]
    import tokenizers
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(special)}, unk_token="<s>"))
    open("maskless.json", "w").write(model.to_str())
    assert refused(small, "--tokenizer", "maskless.json") == \
        "maskless.json has no mask token: its vocabulary needs <mask> or [MASK]"
    exit_code, said = cli("pretrain", small, "--size", "tiny", "--vocab", 100)
    assert exit_code == 2 and "--vocab 100 is too small: a byte-level vocabulary has at least 260 entries" in said


def test_output_that_cannot_be_written(small, monkeypatch):
    """Found before training, whatever is wrong with it."""
    monkeypatch.setattr(data, "Corpus", lambda *_: pytest.fail("the corpus was read first"))
    folder = os.path.abspath("none")
    assert refused(small, "-o", "none/model.pt") == f"cannot write none/model.pt: there is no folder {folder}"
    def denied(**_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(data.tempfile, "TemporaryFile", denied)  # root may write anywhere
    assert refused(small) == "cannot write model.pt: Permission denied"


@pytest.mark.parametrize("args, message", [
    (["--ctx", 7], "Invalid value for '--ctx': 7 is not in the range 8<=x<="),
    (["--steps", 0], "Invalid value for '--steps'"),
    (["--steps", 1, "--epochs", 1], "give --steps or --epochs, not both"),
    (["--lr", "0"], "Invalid value for '--lr'"),
    (["--lr", "nan"], "--lr nan is not a number to learn with"),
    (["--seed", 2**64], "Invalid value for '--seed'"),
    (["--vocab", 10**20], "Invalid value for '--vocab'"),
    (["--vocab", 300, "--tokenizer", "t.json"], "give --tokenizer or --vocab, not both"),
    (["-o", ""], "an empty name is a folder"),
    (["--device", "meta"], "--device meta: there is no such device here"),
    (["--size", "huge"], "Invalid value for '--size'"),
    (["--device", "cuda:77"], "--device cuda:77: there is no such device here"),
    (["--device", "abacus"], "--device abacus: there is no such device here"),
    (["--no-such-option"], "No such option"),
])
def test_options(small, args, message):
    code, said = cli("pretrain", small, *args)
    assert code == 2 and message in said and os.listdir() == ["small.jsonl"]


def test_what_runs_in_one_process(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = cli("corpus", small)
    assert code == 2 and "corpus runs in one process: start it without torchrun" in said
    code, said = cli("pretrain", small, *TINY)
    assert code == 1 and "the 2 processes could not reach each other" in said and "start them with torchrun" in said


def test_corpus_command(small):
    os.mkdir("d")
    for path, message in (("none", "none: no such file or folder"), ("d", "d: no source files; known are .c .h")):
        code, said = cli("corpus", path, "-o", "c.jsonl")
        assert code == 2 and message in said and not os.path.exists("c.jsonl")
    code, said = cli("corpus", "d", "-o", "d")
    assert code == 2 and "d is a folder" in said


def test_files_that_are_something_else_are_left_alone(small):
    """The corpus where the log or the checkpoint would be written, and a pipe."""
    os.rename(small, "c.jsonl")
    before = open("c.jsonl", "rb").read()
    for restart in ([], ["--restart"]):
        for name, message in (("c", "c.jsonl is where the metrics would go, and it is something else"),
                              ("c.jsonl", "c.jsonl exists and is no checkpoint: give another -o")):
            code, said = cli("pretrain", "c.jsonl", *TINY, "-o", name, *restart)
            assert code == 2 and message in said and os.listdir() == ["c.jsonl"]
            assert open("c.jsonl", "rb").read() == before
    os.mkfifo("pipe")
    assert refused("c.jsonl", "-o", "pipe") == "pipe is no plain file: give -o another name"


def test_the_log_of_a_run_is_no_part_of_its_corpus(small):
    command = ["pretrain", ".", *TINY, "--steps", 2]
    assert cli(*command)[0] == 0 and os.path.getsize("model.pt.jsonl")
    code, said = cli(*command, "-o", "again.pt")
    assert code == 0 and "corpus     small.jsonl: 65 records" in said


def test_restart_discards_nothing_before_it_begins(small):
    assert cli("pretrain", small, *TINY, "--steps", 2)[0] == 0
    os.rename("model.pt", "model.pt.state")
    before = open("model.pt.jsonl", "rb").read()
    assert cli("pretrain", "typo.jsonl", *TINY, "--steps", 2, "--restart")[0] == 2
    assert os.path.exists("model.pt.state") and open("model.pt.jsonl", "rb").read() == before
    code, said = cli("pretrain", small, *TINY, "--steps", 2)
    assert code == 2 and "model.pt.state is no state of a run" in said


def test_divergence_is_an_error(small):
    code, said = cli("pretrain", small, *TINY, "--steps", 40, "--lr", 1e30)
    assert code == 1 and "Error: the loss is no longer a number at step" in said and "try a lower --lr" in said
    assert not os.path.exists("model.pt") and "NaN" not in open("model.pt.jsonl").read()


@pytest.mark.parametrize("state", [True, False])
def test_a_disk_that_fills_up_while_training(small, monkeypatch, state):
    """While the state is written, and while the log is."""
    if state:
        monkeypatch.setattr(tasks, "SAVE_SECONDS", 0)
        def full(*_):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(tasks.torch, "save", full)
    else:
        class Full(io.FileIO):
            def write(self, line):
                return super().write(line[:3])
        monkeypatch.setattr(tasks, "open", lambda path, mode, **_: Full(path, mode), raising=False)
    code, said = cli("pretrain", small, *TINY, "--steps", 40)
    name = "model.pt.state" if state else "model.pt.jsonl"
    assert code == 1 and f"Error: could not write {name}: No space left on device" in said
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


@contextmanager
def largest_file(size):
    """Stands in for a disk that is full; it binds pytest's own files too, for so long."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_to_unpack(small):
    with gzip.open("c.jsonl.gz", "wb") as file:
        file.write(open(small, "rb").read())
    with largest_file(10**4):
        code, said = cli("pretrain", "c.jsonl.gz", *TINY)
    assert code == 1 and "no room to unpack c.jsonl.gz in" in said and "File too large" in said


def test_a_process_that_tokenises_dies(small, monkeypatch):
    monkeypatch.setattr(data.Samples, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(data, "sample_lengths", lambda *_: data.np.array([32]))
    stream = data.Batches.stream
    monkeypatch.setattr(data.Batches, "stream",
                        lambda self, start=0, stop=None, workers=1: stream(self, start, stop, 1))
    code, said = cli("pretrain", small, *TINY)
    assert code == 1 and "a process that tokenises died" in said


def test_a_full_disk_leaves_the_old_file_whole(small):
    """Writing the checkpoint fails in the middle."""
    command = ["pretrain", small, *TINY, "--steps", 3]
    assert cli(*command)[0] == 0
    old = open("model.pt", "rb").read()
    with largest_file(10**6):
        code, said = cli(*command, "--restart")
    assert code == 1 and "Traceback" not in said
    assert "could not write model.pt" in said and "File too large; the file of that name is as it was" in said
    assert open("model.pt", "rb").read() == old and codessm.load("model.pt")
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


def test_standard_input_cannot_be_resumed(small):
    lines = open(small, "rb").read()
    command = ["pretrain", "-", *TINY, "--steps", 5000]
    run = Forked(*command, stdin=small)
    wait_for(lambda: os.path.exists("model.pt.state"), run)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 143 and "it serves as a checkpoint; what was read from a pipe cannot be" in said
    code, said = cli(*command, input=lines)
    assert code == 2 and "a run that read standard input or a pipe, which cannot be read again: --restart" in said


def test_interrupted_before_training(small):
    ends = {signal.SIGINT: 130, signal.SIGTERM: 143}
    runs = [program("pretrain", "-", *TINY, "-o", f"{number}.pt", stdin=subprocess.PIPE) for number in ends]
    for run, (number, code) in zip(runs, ends.items()):
        wait_for(lambda: os.path.exists(f"{number}.pt.jsonl"), run)
        time.sleep(0.5)  # until it waits for its input
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
        assert run.returncode == code, said
        assert said.strip().endswith("interrupted before training began: nothing is lost")


def test_memory_that_is_not_there(small, monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(tasks.Stepper, "__call__", fail)
    code, said = cli("pretrain", small, *TINY, "--steps", 3)
    assert code == 1 and "Error: out of memory: use a smaller --batch, --ctx or --size" in said


def test_help_has_an_example():
    for command in codessm.cli.commands:
        code, said = cli(command, "--help")
        assert code == 0 and f"Example: codessm {command} " in said
    assert cli("--version") == (0, f"codessm, version {codessm.__version__}\n")


def test_a_closed_pipe_is_no_traceback(small):
    run = subprocess.run(f"{sys.executable} {ROOT}/codessm.py corpus {ROOT}/data.py | head -c 10", shell=True,
                         capture_output=True, text=True)
    assert "Traceback" not in run.stderr
    assert run.stdout.startswith('{"code": ')
