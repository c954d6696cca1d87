"""Faults, kills and strangers' files: what is said, and what is still on the disk."""
import base64
import gzip
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

import codessm
import data
import tasks
from conftest import (KINDS, ROOT, TINY, before_call, cli, command, die, files, forkserver, rows_of, same, says, send,
                      wait_for, weights, write_lines)
from data import Problem

# twelve steps, eight an epoch, at whose end the state is saved; evaluations before steps 0, 5, 10 and at the end
RUN = ["pretrain", "small.jsonl", *TINY, "--steps", 12, "--eval-every", 5, "--model", "codessm-do"]
FUNCTIONS = {"a step": (tasks.Stepper, "step"), "a batch": (data.Batches, "__getitem__"),
             "masks": (tasks.MLM, "prepare"), "an evaluation": (tasks, "evaluate"), "log": (tasks.Output, "record"),
             "saving": (torch, "save")}


@pytest.fixture(scope="module")
def undisturbed(functions, tmp_path_factory):
    """(weights, log, how often each of `FUNCTIONS` is called) of a `quick` run that nothing ends."""
    calls = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        patch.setitem(codessm.SIZES, "tiny", dict(d=64, layers=1))
        write_lines("small.jsonl", functions[:65])
        for name, function in FUNCTIONS.items():
            with before_call(*function, 0, None) as seen:
                assert cli(*RUN, "--restart")[0] == 0
            calls[name] = len(seen)
        return weights("model.pt"), open("model.pt.jsonl").read(), calls


def check_goes_on(undisturbed):
    """The same command ends as the undisturbed run, which leaves little; its files are removed. What it has said."""
    code, said = cli(*RUN)
    assert code == 0 and same(weights("model.pt"), undisturbed[0]) and open("model.pt.jsonl").read() == undisturbed[1]
    assert set(os.listdir()) - {"0.txt"} == {"small.jsonl", "model.pt", "model.pt.jsonl"}
    os.remove("model.pt")
    return said


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def throw(error):
    """For `before_call`."""
    def act(*_):
        raise error
    return act


# ---- every way out of training ----------------------------------------------------------------------

@pytest.mark.parametrize("function", FUNCTIONS)
def test_whatever_ends_training_the_state_is_saved_and_the_run_goes_on_from_it(function, undisturbed, small, quick):
    count = undisturbed[2][function]
    errors = [(RuntimeError("it broke"), 1), (MemoryError(), 1), (KeyboardInterrupt(), 130), (Panic("it broke"), 1)]
    for i, number in enumerate(np.linspace(1, count, max(4, min(count, 6))).astype(int)):
        error, exit_code = errors[i % 4]
        with before_call(tasks.Stepper, "step", 0, None) as steps, \
                before_call(*FUNCTIONS[function], number, throw(error)):
            code, said = cli(*RUN)
        assert code == exit_code and said.count("Error: ") == (code == 1) and "model.pt.state" in said, said
        assert tasks.read("model.pt.state")["step"] == len(steps) and codessm.load("model.pt.state")
        assert set(os.listdir()) - {"model.pt.jsonl"} == {"small.jsonl", "model.pt.state"}
        assert f"going on from step {len(steps)} of 12" in check_goes_on(undisturbed), (error, number)


def test_no_room_for_the_state(undisturbed, small, quick):
    """The state before stays."""
    for error in (OSError(28, "No space left on device"), Panic()):
        with before_call(tasks.Stepper, "step", 10, throw(error)), before_call(torch, "save", 2, throw(error)):
            code, said = cli(*RUN)
        assert code == 1 and "is of an earlier step" in said and not os.path.exists("model.pt.state.tmp")
        assert "going on from step 8" in check_goes_on(undisturbed)


def test_steps_without_a_number_change_nothing_and_twenty_in_a_row_end_the_run(small, quick, monkeypatch):
    """In steps 11 to 15 and from 31 on the gradient is not finite; the weights saved are those of step 30."""
    original, steps, command = tasks.Stepper.step, [], ["pretrain", small, *TINY, "--steps", 100]

    def step(stepper, pieces):
        steps.append(len(steps) + 1)
        bad, parameters = 10 < steps[-1] <= 15 or steps[-1] > 30, stepper.objective.parameters
        before = [p.detach().clone() for p in parameters()]
        hook = stepper.objective.bias.register_hook(lambda gradient: gradient * (float("inf") if bad else 1))
        sums = original(stepper, pieces)
        hook.remove()
        assert bad == all(map(torch.equal, before, parameters())) == bool(sums.isnan().all())
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Stepper, "step", step)
        patch.setattr(tasks, "LOG_STEPS", 5)
        says(1, ["no number in 20 steps in a row, up to step 50", "up to step 15, 5 steps were skipped"], *command)
    log = {line["step"]: line for line in map(json.loads, open("model.pt.jsonl")) if "lr" in line}
    assert [log[step].get("skipped", 0) for step in range(5, 51, 5)] == [0, 0, 5, 5, 5, 5, 10, 15, 20, 25]
    assert [step for step, line in log.items() if "loss" not in line] == [15, 35, 40, 45, 50]
    state = tasks.read("model.pt.state")
    assert state["step"] == 50 and all(weight.isfinite().all() for weight in state["weights"].values())
    says(0, "going on from step 50", *command)  # and for a sound cause it comes to its end


def test_a_corpus_that_changes_under_a_run(undisturbed, small, quick):
    """While it trains that does no harm, but no state goes on with another corpus, of whatever time it is."""
    def cut(*_):
        os.truncate(small, 9000)  # in the midst of a line

    whole = open(small, "rb").read()
    with before_call(tasks.Stepper, "step", 3, cut):
        check_goes_on(undisturbed)
    open(small, "wb").write(whole)
    with before_call(tasks.Stepper, "step", 3, throw(Panic())):
        assert cli(*RUN)[0] == 1
    os.utime(small, (1, 1))
    assert "going on from step 2" in check_goes_on(undisturbed)
    with before_call(tasks.Stepper, "step", 3, throw(Panic())):
        assert cli(*RUN)[0] == 1
    open(small, "wb").write(whole.replace(b"self", b"Self", 1))
    says(2, ["model.pt.state", "small.jsonl", "lines CRC", "--restart"], *RUN)


def test_a_restart_that_fails_before_its_first_step_leaves_what_was_there(small, quick):
    """A finished run's files, then an unfinished one's too. From the first step on it replaces them."""
    restart = [*RUN, "--seed", 1, "--restart"]
    assert cli(*RUN)[0] == 0
    for names in ({"model.pt", "model.pt.jsonl"}, {"model.pt", "model.pt.jsonl", "model.pt.state"}):
        before = {name: open(name, "rb").read() for name in names}
        for function in ((tasks, "evaluate"), (tasks.Stepper, "step")):
            with before_call(*function, 1, throw(MemoryError())):
                says(1, "what an earlier run left there is as it was", *restart)
            assert {name: open(name, "rb").read() for name in {*os.listdir()} - {"small.jsonl"}} == before
        with before_call(tasks.Stepper, "step", 2, throw(MemoryError())):
            says(1, "the state is saved", *restart)
        assert tasks.read("model.pt.state")["step"] == 1 and len(open("model.pt.jsonl").readlines()) == 2
    says(0, "going on from step 1", *restart[:-1])


def test_the_training_of_a_tokenizer_stops_at_once(small):
    def act(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with before_call(data.Corpus, "strings", 5, act) as calls:
        assert cli(*RUN)[0] == 130
    assert len(calls) < 30 and os.listdir() == ["small.jsonl"]


# ---- kills ------------------------------------------------------------------------------------------

def test_a_signal_at_any_moment(undisturbed, small, quick):
    """Before training it leaves nothing, then a state; a second signal while that is written changes nothing."""
    for number, step, owner, name, call in (
            (signal.SIGINT, None, data.Corpus, "parse", 9), (signal.SIGTERM, None, data.Tokenizer, "encode_many", 1),
            (signal.SIGHUP, None, data.Corpus, "parse", 1), (signal.SIGTERM, 0, data.Batches, "__getitem__", 1),
            (signal.SIGINT, 1, tasks.Stepper, "step", 1), (signal.SIGHUP, 5, data.Batches, "__getitem__", 7),
            (signal.SIGINT, 9, torch, "save", 1), (signal.SIGHUP, 12, data.Batches, "__getitem__", 16)):
        with before_call(torch, "save", 2 if (step or 0) > 8 else 1, send(signal.SIGTERM)), \
                before_call(owner, name, call, send(number)):
            code, said = cli(*RUN)
        assert code == 128 + number and "interrupted" in said and "Error" not in said, (name, said)
        if step is None:
            assert "nothing is lost" in said and os.listdir() == ["small.jsonl"]
        else:
            assert tasks.read("model.pt.state")["step"] == step and "the same command goes on from it" in said
            check_goes_on(undisturbed)


def test_signals_that_are_ignored_stay_so(small, quick):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with before_call(tasks.Stepper, "step", 3, send(signal.SIGHUP)), before_call(data.Corpus, "parse", 9, send(1)):
            assert cli(*RUN)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def die_half_way(content, file):
    file.write(pickled(content)[:50_000])
    file.flush()
    die()


def die_after(function):
    return lambda *args: (function(*args), die())


KILLS = {  # (owner, function, which call, what kills), the step of the state that is left
    "reading": ((data.Corpus, "parse", 9, die), None),
    "tokenising": ((os, "replace", 1, die), None),
    "before the state": ((torch, "save", 1, die), None),
    "half of the state": ((torch, "save", 1, die_half_way), None),
    "between write and rename": ((os, "replace", 2, die), None),
    "after the rename": ((os, "replace", 2, die_after(os.replace)), 8),
    "half of the checkpoint": ((torch, "save", 2, die_half_way), 8),
    "checkpoint and state": ((os, "replace", 3, die_after(os.replace)), 8)}


def run_and_die(folder, kill):
    codessm.SIZES["tiny"], data.IN_MEMORY = dict(d=64, layers=1), 0
    with before_call(*KILLS[kill][0]):
        command(folder, *RUN)


def test_a_run_killed_at_any_moment_goes_on_from_whole_files(undisturbed, functions, quick, tmp_path, monkeypatch):
    """SIGKILL in and between the writes of the tokens, the state and the checkpoint; then the same command again."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    runs = {}
    for kill in KILLS:
        (tmp_path / kill).mkdir()
        write_lines(tmp_path / kill / "small.jsonl", functions[:65])
        runs[kill] = forkserver.Process(target=run_and_die, args=(tmp_path / kill, kill))
        runs[kill].start()
    for kill, run in runs.items():
        run.join(60)
        monkeypatch.chdir(tmp_path / kill)
        assert run.exitcode == -9, (kill, open("0.txt").read())
        step = KILLS[kill][1]
        assert (tasks.read("model.pt.state")["step"] if os.path.exists("model.pt.state") else None) == step, kill
        said = check_goes_on(undisturbed)
        assert ("going on" in said) == (step is not None), (kill, said)


# ---- streams that fail ------------------------------------------------------------------------------

def test_streams_that_are_full_or_gone(small, tmp_path):
    """Standard error that is closed or full, a reader of standard output that goes, a signal, and input from a pipe."""
    (tmp_path / "temporary").mkdir()
    python, train = f"exec {sys.executable} {ROOT}/codessm.py", f"pretrain - {' '.join(TINY)} <{small} 2>/dev/full"
    gone, ended, stopped = (
        subprocess.Popen(f"{python} {rest}", shell=True, text=True, stdout=subprocess.PIPE,
                         env={**os.environ, "TMPDIR": str(tmp_path / "temporary")})
        for rest in (f"corpus {ROOT}/data.py 2>&- | head -c 10", f"{train} --steps 2", f"{train} --steps 5000 -o s.pt"))
    wait_for(lambda: os.path.exists("s.pt.state"), stopped)
    stopped.send_signal(signal.SIGTERM)
    assert gone.communicate(timeout=60)[0] == '{"code": "'
    assert "model.pt: 2 steps" in ended.communicate(timeout=60)[0] and codessm.load("model.pt")
    assert stopped.wait(60) == 143 and codessm.load("s.pt.state")
    assert ended.returncode == 0 and not [*(tmp_path / "temporary").glob("codessm*")]


# ---- damaged files ----------------------------------------------------------------------------------

def pickled(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def flipped(content, rng):
    """A zip archive with a byte of one of its members' contents another."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        member = rng.choice([member for member in file.infolist() if member.file_size])
    at, content = member.header_offset, bytearray(content)
    content[at + 30 + sum(struct.unpack("<HH", content[at + 26:at + 30])) + rng.randrange(member.file_size)] ^= \
        rng.randrange(1, 256)
    return bytes(content)


def compressed(content):
    """A zip archive whose members could unpack to more than there is memory for."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in whole.namelist():
            file.writestr(name, whole.read(name))
    return packed.getvalue()


def with_attribute(content):
    """A zip archive in whose directory a tensor is marked as a folder, which torch would not read."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        name = next(name for name in file.namelist() if name.endswith("/data/0"))
    at = content.rindex(name.encode()) - 46 + 38
    return content[:at] + b"\x10" + content[at + 1:]


class Evil:
    def __init__(self, function=os.mkdir, argument="ran"):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def damages(content):
    """{name: bytes} of files that are not what `content`, the bytes of a checkpoint or state, is."""
    rng = random.Random(0)
    return {"text": b"hello", "empty": b"", "list": pickled([1]), "no format": pickled({"weights": {}}),
            "code": pickled({"format": tasks.FORMAT, "weights": Evil()}), "bomb": compressed(content),
            "memory": pickled({"format": tasks.FORMAT, "weights": Evil(bytearray, 2**40)}),
            "appended": content + b"x", "prepended": b"x" + content, "a folder": with_attribute(content),
            **{f"cut at {cut}": content[:cut] for cut in (100, len(content) // 2, -1)},
            **{f"flip {i}": flipped(content, rng) for i in range(5)}}


@pytest.fixture
def unfinished(small, quick):
    """A command, whose state is there, and an earlier run's checkpoint, first.pt, that it started from."""
    command = [*RUN, "--init", "first.pt"]
    assert cli(*RUN, "-o", "first.pt")[0] == 0
    with before_call(tasks.Stepper, "step", 3, send(signal.SIGTERM)):
        assert cli(*command)[0] == 143
    return command


def test_damaged_checkpoints_and_states_are_refused_and_run_no_code(unfinished, small):
    """The file is named, in one sentence, and nothing is written."""
    state, ways = open("model.pt.state", "rb").read(), {
        "bad.pt": (["evaluate", "mlm", "--ckpt", "bad.pt", "--data", small], [*RUN, "-o", "x.pt", "--init", "bad.pt"]),
        "model.pt.state": (["evaluate", "mlm", "--ckpt", "model.pt.state", "--data", small], unfinished)}
    for path, commands in ways.items():
        for name, damaged in damages(state if "state" in path else open("first.pt", "rb").read()).items():
            open(path, "wb").write(damaged)
            before = set(os.listdir())
            for args in commands:
                code, said = cli(*args)
                assert code == 2 and said.count("Error: ") == 1 == len(said.splitlines()), (name, args, said)
                assert path in said and set(os.listdir()) == before, (name, args, said)
                assert ("holds more than" if name in ("code", "memory") else "whole") in said, (name, args, said)
    open("model.pt.state", "wb").write(state)
    assert cli(*unfinished)[0] == 0


def test_checkpoints_that_spell_more_than_they_hold(make_case, corpus, tmp_path):
    """Refused at once and in little memory: huge sizes, stretched and sparse tensors, strange fields."""
    path = tmp_path / "m.pt"
    tasks.save(path, make_case("classify").objective)
    content = tasks.read(path)
    config, weights, one = content["config"], content["weights"], torch.zeros(1)
    bad = [{"config": config | {name: size}} for name in ("vocab", "d", "layers", "N")
           for size in (10**12, 10**30, -1, 0, 2.5, "x")]
    bad += [{name: other} for name, others in {
        "config": (None, [], {}, {"depth": 3}, config | {"model": "evil"}, config | {"d": 64}),
        "weights": (None, [], {}, {name: one.expand(weight.shape) for name, weight in weights.items()},
                    {name: weight.to_sparse() for name, weight in weights.items()},
                    {name: weight.long() for name, weight in weights.items()}, weights | {"more": one},
                    dict.fromkeys(weights, 1)),
        "tokenizer": (None, "", "{}", content["tokenizer"][:-9], data.train_tokenizer(corpus, 700).text),  # not 600
        "task": (None, "evil", [], "pair"), "labels": (5, ["0"], ["0", "0"], [0, 1]),
        "ctx": (0, "x", 2.5)}.items() for other in others]
    # its tensors are as large as its configuration says, and all of them one and the same byte
    bad += [{"config": config | {"vocab": 10**9},
             "weights": weights | {"encoder.embedding.weight": one.expand(10**9, 32)}}]
    started = time.monotonic()
    for change in bad:
        torch.save(content | change, path)
        with pytest.raises(Problem, match=r"m\.pt"):
            codessm.load(path)
    assert time.monotonic() - started < 20
    torch.save(content, path)
    assert codessm.load(path)


def test_states_that_do_not_fit_are_refused(unfinished):
    """Other settings, absent and wrong fields, tensors that go to kernels which trust their shapes."""
    state, needed = tasks.read("model.pt.state"), (
        "weights", "optimizer", "step", "window", "settings", "tokenizer", "log", "tokens", "evaluated", "best",
        "metrics", "skipped", "failing", "processes")
    moments = state["optimizer"]["state"]
    number = next(n for n, m in moments.items() if m["exp_avg"].shape == (400, 64))
    ways = [({key: value for key, value in state.items() if key != name}, []) for name in needed]
    ways += [(state | change, []) for change in (
        {"step": -1}, {"step": 10**9}, {"best": {"a": 1}}, {"metrics": {}}, {"log": "x"},
        {"window": [torch.zeros(2)]}, {"settings": {"file small.jsonl": None}},
        *({"optimizer": state["optimizer"] | {"state": moments | {number: moments[number] | other}}} for other in (
            {"exp_avg": torch.zeros(1)}, {"exp_avg_sq": torch.zeros(1).expand(400, 64)}, {"step": None})))]
    ways += [(state, ["--lr", 0.5, "--batch", 4]), (state, ["--seed", 1])]
    for content, args in ways:
        torch.save(content, "model.pt.state")
        before = files()
        code, said = cli(*unfinished, *args)
        assert code == 2 and said.count("model.pt.state") == said.count("Error: ") == 1, said
        assert "--restart" in said and all(f"{arg[2:]} {value}" in said for arg, value in zip(args[::2], args[1::2]))
        assert files() == before


def test_a_state_of_a_gpu_goes_on_and_is_a_checkpoint_too(unfinished):
    """Its learning rate is a tensor, its optimizer may be recorded: neither is taken to another device."""
    assert codessm.load("model.pt.state").encoder.config["d"] == 64
    state = tasks.read("model.pt.state")
    for group in state["optimizer"]["param_groups"]:
        group.update(lr=torch.tensor(0.1), capturable=True)
    torch.save(state, "model.pt.state")
    with before_call(tasks.Stepper, "step", 2, send(signal.SIGINT)):
        assert cli(*unfinished)[0] == 130
    again = tasks.read("model.pt.state")
    assert again["step"] == state["step"] + 2 == 5
    assert all(type(group["lr"]) is float and not group["capturable"] for group in again["optimizer"]["param_groups"])


# ---- strangers' files -------------------------------------------------------------------------------


def broken(content, rng):
    """The bytes with a few changes: blocks cut out, repeated or replaced by what parsers dislike, the end gone."""
    pieces = [b"[" * 5000, b"\x00", b"\xff\xfe", b"NaN", b'"', b"\\ud800", b"\n", b"9" * 5000, b"null", b"{}", b"<s>"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        begin = rng.randrange(len(content) + 1)
        block = content[begin:begin + rng.choice((1, 4, 60))]
        other = rng.choice((b"", block * 4, rng.choice(pieces), bytes([rng.randrange(256)])))
        content = content[:begin] + other + content[begin + len(block):] * (rng.random() < 0.8)
    return content


def test_mutated_files_are_read_or_refused(functions, corpus, tokenizer, make_case, tmp_path):
    """Four thousand mutated lines and files for all readers: a result or one clear error.

    A pipe, which would be waited for, is what many fields name that might be taken for a file."""
    os.mkfifo(tmp_path / "pipe")
    paths = dict.fromkeys(("path", "file", "filename", "url", "repo", "include"), str(tmp_path / "pipe"))
    rng, counts = random.Random(0), [0, 0]
    parsers = {kind: corpus.parse if kind == "mlm" else partial(data.parse_example, data.TASKS[kind]) for kind in KINDS}
    lines = "".join(json.dumps(f | paths | {"idx": i}) + "\n" for i, f in enumerate(functions[:30])).encode()
    tasks.save(tmp_path / "m.pt", make_case("mlm").objective)
    write_lines(tmp_path / "train.txt", (f"{i}\t{i + 1}\t1" for i in range(9)))
    readers = {
        "c.jsonl.gz": (gzip.compress(lines), lambda path: [*data.Corpus(data.find_sources([path])).texts()]),
        "data.jsonl": (lines, lambda _: data.Benchmark("clone", tmp_path, ["train"], ["train"])),
        "t.json": (tokenizer.text.encode(), lambda path: data.load_tokenizer(path).encode("def f(x): return x")),
        "m.pt": ((tmp_path / "m.pt").read_bytes(), codessm.load)}
    for turn in range(4000):
        try:
            if turn % 5:
                kind = rng.choice(KINDS)
                line = json.dumps(rng.choice(rows_of(kind, functions[:9]))).encode()
                parsers[kind](broken(line, rng).split(b"\n")[0])
            else:
                name, (content, read) = rng.choice([*readers.items()])
                (tmp_path / name).write_bytes(broken(content, rng))
                read(str(tmp_path / name))
            counts[0] += 1
        except (Problem, data.BadLine) as error:
            assert str(error) and "\n" not in str(error).strip()
            counts[1] += 1
    assert min(counts) > 400


def test_tokenizers_that_multiply_or_give_up_are_refused(small, tokenizer, capfd):
    """Before memory is taken; a text that the regex gives up on is named."""
    def replace(pattern, content):
        return {"type": "Replace", "pattern": pattern, "content": content}

    charsmap = base64.b64encode(bytes(4) + b"b\0" + b"a" * 500 + b"\0").decode()
    thrice = {"type": "Sequence", "normalizers": [replace({"String": "e"}, "e" * 10)] * 3}
    write_lines("slow.jsonl", [*open(small), {"code": "y = 'x" + "a" * 40 + "c'"}])
    for normalizer, message in (
            (replace({"String": "e"}, "e" * 200), "make a text 201 times as long"), (thrice, "1,331 times as long"),
            (replace({"Regex": "x*"}, "e" * 100), "101 times"),
            ({"type": "Precompiled", "precompiled_charsmap": charsmap}, "500 times"),
            (replace({"Regex": "(?:(a+)+)+$|b"}, "c"), "t.json cannot encode a text that begins with \"y = 'xaaaa"),
            (replace({"String": "``" * 60}, "'" * 100), None)):
        write_lines("t.json", [json.loads(tokenizer.text) | {"normalizer": normalizer}])
        says(2 if message else 0, message or "2 steps", "pretrain", "slow.jsonl", "--tokenizer", "t.json", *TINY[:2],
             "--steps", 2, "-o", "x.pt")
        assert "panicked" not in capfd.readouterr().err


def test_a_disk_without_room_is_found_before_the_first_step(small, quick, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(tasks.shutil, "disk_usage", lambda folder: usage(folder)._replace(free=100_000))
    says(1, ["has 100.0 kB of room", "make room"], "pretrain", small, *TINY, "--steps", 2)
    assert os.listdir() == ["small.jsonl"]
