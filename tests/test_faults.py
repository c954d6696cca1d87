"""Faults and strangers' files: what is said, and what is still on the disk."""
import gzip
import io
import json
import os
import random
import signal
import time
import zipfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import codessm
import data
import tasks
from conftest import TINY, Forked, cli, wait_for, write_lines
from data import Problem
from tasks import MLM


@pytest.fixture
def task(tokenizer):
    torch.manual_seed(0)
    return MLM(codessm.Encoder(tokenizer.vocab, d=32, layers=2, N=8), tokenizer)


# ---- killed, cut, changed ---------------------------------------------------------------------------

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("phase, left", [("opened", 1), ("half", 1), ("written", 1), ("renamed", 2)])
def test_killed_while_saving(tmp_path, monkeypatch, phase, left):
    """SIGKILL before the write, in its midst, between write and rename, after it: one of the states is there, whole.

    That a run goes on from it to the same weights is in test_training.py and test_processes.py.
    """
    contents = [{"format": tasks.FORMAT, "step": step, "weights": torch.full((1000,), step)} for step in (1, 2)]
    path = tmp_path / "m.pt.state"
    tasks.write(path, contents[0])
    save, replace = torch.save, os.replace

    def half(content, file):
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        kill()

    with monkeypatch.context() as patch:
        if phase == "renamed":
            patch.setattr(os, "replace", lambda *names: (replace(*names), kill()))
        else:
            patch.setattr(*{"opened": (torch, "save", kill), "half": (torch, "save", half),
                            "written": (os, "replace", kill)}[phase])
        if not (child := os.fork()):
            tasks.write(path, contents[1])
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    state = tasks.read(path)
    assert state["step"] == left and torch.equal(state["weights"], contents[left - 1]["weights"])
    assert (tmp_path / "m.pt.state.tmp").exists() == (phase != "renamed")
    tasks.write(path, contents[1])
    assert tasks.read(path)["step"] == 2 and os.listdir(tmp_path) == ["m.pt.state"]


def test_a_corpus_that_changes_under_a_run(small):
    """Written again with the same number of bytes: the run stops, its state is kept and not gone on from.

    One that shrinks is in test_processes.py.
    """
    run = Forked("pretrain", small, *TINY, "--steps", 5000)
    wait_for(lambda: os.path.exists("model.pt.state"), run)
    os.utime(small, (1, 1))
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1 and f"Error: {small} changed while it was being read: its time is another" in said
    assert codessm.load("model.pt.state") and not os.path.exists("model.pt")
    code, said = cli("pretrain", small, *TINY, "--steps", 5000)
    assert code == 2 and f"model.pt.state is of a run with corpus {small} " in said and "--restart" in said


def test_a_truncated_checkpoint_and_the_older_one(small):
    """The model of an earlier run is still there, and its state says what is wrong with it."""
    assert cli("pretrain", small, *TINY, "--steps", 2)[0] == 0
    content = open("model.pt", "rb").read()
    for cut in (0, 100, len(content) // 2, len(content) - 1):
        open("cut.pt", "wb").write(content[:cut])
        open("model.pt.state", "wb").write(content[:cut])
        for path, command in (("cut.pt", ["evaluate", "mlm", "--ckpt", "cut.pt", "--data", small]),
                              ("cut.pt", ["finetune", "classify", "--ckpt", "cut.pt", "--data", small]),
                              ("model.pt.state", ["pretrain", small, *TINY, "--steps", 2])):
            code, said = cli(*command)
            assert (code, said.splitlines()[-1]) == \
                (2, f"Error: {path} is not a codessm checkpoint, or not a whole one"), said
    assert open("model.pt", "rb").read() == content and codessm.load("model.pt")


def test_steps_without_a_number_change_nothing_and_twenty_in_a_row_end_the_run(small, monkeypatch):
    """In steps 11 to 15 and from 31 on a gradient is not finite; the weights saved are those of step 30."""
    take, steps = tasks.Stepper.step, []

    def step(stepper, pieces):
        steps.append(len(steps) + 1)
        bad = 10 < steps[-1] <= 15 or steps[-1] > 30
        before = [p.detach().clone() for p in stepper.task.parameters()]
        hook = stepper.task.bias.register_hook(lambda gradient: gradient * (float("inf") if bad else 1))
        sums = take(stepper, pieces)
        hook.remove()
        assert bad == all(map(torch.equal, before, stepper.task.parameters())) == bool(sums.isnan().all())
        return sums

    monkeypatch.setattr(tasks.Stepper, "step", step)
    monkeypatch.setattr(tasks, "LOG_STEPS", 5)
    monkeypatch.setitem(codessm.SIZES, "tiny", dict(d=64, layers=1))
    code, said = cli("pretrain", small, *TINY, "--steps", 100)
    assert code == 1 and "Error: the loss was no number in 20 steps in a row, up to step 50: try a lower --lr" in said
    assert "up to step 15, 5 steps were skipped" in said and "Traceback" not in said
    log = [json.loads(line) for line in open("model.pt.jsonl")]
    trained = {line["step"]: line for line in log if "lr" in line}
    assert {step: line.get("skipped", 0) for step, line in trained.items()} == \
        {5: 0, 10: 0, 15: 5, 20: 5, 25: 5, 30: 5, 35: 10, 40: 15, 45: 20, 50: 25}
    assert [step for step, line in trained.items() if "loss" not in line] == [15, 35, 40, 45, 50]
    state = tasks.read("model.pt.state")
    assert state["step"] == 50 and all(weight.isfinite().all() for weight in state["weights"].values())
    assert max(float(moments["step"]) for moments in state["optimizer"]["state"].values()) == 25
    assert codessm.load("model.pt.state") and not os.path.exists("model.pt")
    monkeypatch.setattr(tasks.Stepper, "step", take)
    code, said = cli("pretrain", small, *TINY, "--steps", 100)
    assert code == 0 and "going on from step 50" in said  # and for a sound cause it comes to its end


def test_a_tokenizer_that_does_not_fit(task, tokenizer, corpus, tmp_path):
    tasks.save(tmp_path / "m.pt", task)
    content = tasks.read(tmp_path / "m.pt")
    other = data.train_tokenizer(corpus, 700)
    torch.save(content | {"tokenizer": other.text}, tmp_path / "m.pt")
    with pytest.raises(Problem, match="m.pt: its tokenizer has 700 entries and its model 600: they do not belong"):
        codessm.load(tmp_path / "m.pt")


# ---- strangers' files -------------------------------------------------------------------------------

def test_checkpoints_that_spell_more_than_they_hold(task, tmp_path):
    """Refused at once and in little memory: huge sizes, stretched, shared, sparse and compressed tensors."""
    path = tmp_path / "m.pt"
    tasks.save(path, task)
    content = tasks.read(path)
    weights, one = content["weights"], torch.zeros(1)
    stretched = {name: one.expand(weight.shape) for name, weight in weights.items()}
    half = {name: one.half().expand(weight.shape) for name, weight in weights.items()}
    bad = [{"config": content["config"] | {name: size}} for name in ("vocab", "d", "layers", "N")
           for size in (10**12, 10**30, -1, 0, 2.5, None, "x", True)]
    bad += [{"config": config} for config in (None, [], {}, content["config"] | {"model": "evil"})]
    bad += [{"weights": changed} for changed in (
        stretched, half, None, [], {name: weight.to_sparse() for name, weight in weights.items()},
        {name: weight.long() for name, weight in weights.items()}, {**weights, "more": one},
        {name: 1 for name in weights})]
    # its tensors are as large as its configuration says, and all of them one and the same byte
    bad += [{"config": content["config"] | {"vocab": 10**9}, "weights": weights | {
        "encoder.embedding.weight": one.expand(10**9, 32), "bias": one.expand(10**9)}}]
    started = time.monotonic()
    for change in bad:
        torch.save(content | change, path)
        with pytest.raises(Problem, match=r"m\.pt"):
            codessm.load(path)
    torch.save(content, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    with pytest.raises(Problem, match="bomb.pt is not a codessm checkpoint"):
        codessm.load(tmp_path / "bomb.pt")
    assert time.monotonic() - started < 20


def test_states_whose_optimizer_does_not_fit(small):
    """Its tensors go to kernels that trust their shapes."""
    command = ["pretrain", small, *TINY, "--steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        def stop(*_):
            raise tasks.Interrupt
        patch.setattr(tasks.Output, "finish", stop)
        patch.setattr(tasks.Signals, "check", lambda self: setattr(self, "number", 15))
        assert cli(*command)[0] == 143
    state = tasks.read("model.pt.state")
    for name, bad in (("exp_avg", torch.zeros(1)), ("exp_avg_sq", torch.zeros(1).expand(400, 128)), ("step", None)):
        moments = state["optimizer"]["state"]
        number = next(n for n, m in moments.items() if m["exp_avg"].shape == (400, 128))
        changed = moments | {number: moments[number] | {name: bad}}
        torch.save(state | {"optimizer": state["optimizer"] | {"state": changed}}, "model.pt.state")
        code, said = cli(*command)
        assert code == 2 and "model.pt.state does not fit this run: --restart discards it" in said
    torch.save(state, "model.pt.state")
    assert cli(*command)[0] == 0


def test_long_lines_and_bombs(small, functions):
    """One line of 3 MB, with --max-line 2; a gzip file that unpacks to a thousand times its size."""
    write_lines("long.jsonl", [*functions[:20], {"code": "x" * 3_000_000}, *functions[20:40]])
    code, said = cli("pretrain", "long.jsonl", *TINY, "--steps", 1, "--max-line", 2)
    assert code == 2 and "Error: long.jsonl:21: a line of more than 2.0 MB (--max-line takes longer ones)" in said
    options = dict(longest=2_000_000)
    corpus = data.Corpus(data.find_sources(["long.jsonl"], **options), skip_bad=True)
    assert corpus.bad == 1 and [corpus[i][1] for i in (19, 20, 39)] == \
        [data.Corpus(data.find_sources([write_lines("f.jsonl", functions[:40])]))[i][1] for i in (19, 20, 39)]
    assert len(data.Corpus(data.find_sources(["long.jsonl"]))) == 41
    with gzip.open("bomb.jsonl.gz", "wb") as file:
        for _ in range(100):
            file.write(b"\n" * 10**6)
    code, said = cli("pretrain", "bomb.jsonl.gz", *TINY, "--steps", 1)
    assert code == 2 and "Error: bomb.jsonl.gz: its first" in said and "more than 100 times as much" in said
    assert sum(os.path.getsize(os.path.join(data.spool_folder(), name)) for name in os.listdir(data.spool_folder())
               if name.endswith(".jsonl")) < 50_000_000


def test_paths_in_data_are_not_opened(small, functions, tmp_path):
    """A pipe, which would be waited for, is what every field names that might be taken for a file."""
    os.mkfifo("pipe")
    path = str(tmp_path / "pipe")
    names = ("path", "file", "filename", "url", "repo", "idx", "docstring", "text", "include")
    write_lines("c.jsonl", [{"code": f"open({path!r})\n{f['code']}"} | dict.fromkeys(names, path)
                            for f in functions[:65]] + [{"code": code} for code in (path, f"file://{path}", f"@{path}")])
    code, said = cli("pretrain", "c.jsonl", *TINY, "--steps", 1)
    assert code == 0, said


def broken(content, rng):
    """The bytes with a few changes: bits, blocks cut out, doubled or moved, and pieces that parsers dislike."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        a, b = sorted((rng.randrange(len(content) + 1), min(len(content), rng.randrange(len(content) + 1))))
        b = min(b, a + rng.choice((1, 4, 60)))
        kind = rng.randrange(5)
        if kind == 0 and content:
            content[min(a, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[a:b]
        elif kind == 2:
            content[a:a] = content[a:b] * rng.choice((1, 3, 50))
        elif kind == 3:
            content[a:b] = rng.choice(PIECES)
        else:
            content = content[:a]
    return bytes(content)


PIECES = [b"[" * 5000, b'{"a":' * 5000, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"1e999", b"-", b'"', b"\\ud800",
          b"\r", b"\n", b"\t", b"9" * 5000, b"null", b"[]", b"{}", b"true", b"\x1f\x8b\x08\x00", b",", b'\\u0000"',
          "\u2028\U0010ffff".encode(), b"<s>", b"1" * 20, b"-1", b" "]


def test_mutated_files_are_read_or_refused(functions, tokenizer, task, tmp_path):
    """Some thousands of mutated lines and files for all readers: a result or one clear error, in 8 seconds."""
    rng = random.Random(0)
    parsers = [(data.Corpus.parse, SimpleNamespace(code_fields=data.CODE_FIELDS, text_fields=data.TEXT_FIELDS, texts=0,
                                                   plain_text=True), json.dumps(f)) for f in functions[:5]]
    parsers = [(partial(parse, corpus), line.encode()) for parse, corpus, line in parsers]
    parsers += [(partial(data.parse_example, task_), task_.line.encode()) for task_ in data.TASKS.values()]
    tasks.save(tmp_path / "m.pt", task)
    lines = "".join(json.dumps(f | {"label": str(i % 2), "text": "t", "idx": i}) + "\n"
                    for i, f in enumerate(functions[:30]))
    (tmp_path / "clone").mkdir()
    files = {"c.jsonl": lines.encode(), "c.jsonl.gz": gzip.compress(lines.encode()),
             "t.json": tokenizer.text.encode(), "m.pt": (tmp_path / "m.pt").read_bytes(),
             "clone/data.jsonl": lines.encode(),
             "clone/train.txt": b"".join(b"%d\t%d\t1\n" % (i, i + 1) for i in range(9)),
             "function.json": json.dumps([{"func": f["code"], "target": 1} for f in functions[:30]]).encode()}
    (tmp_path / "clone" / "data.jsonl").write_bytes(lines.encode())

    def read(name):
        path = str(tmp_path / name)
        if name.startswith("c.jsonl"):
            corpus = data.Corpus(data.find_sources([path]), skip_bad=rng.random() < 0.5)
            return [corpus[i] for i in range(len(corpus))]
        if name == "t.json":
            return data.load_tokenizer(path).encode("def f(x): return x")
        if name == "m.pt":
            return codessm.load(path)
        return data.Reader("clone" if "clone" in name else "devign", os.path.dirname(path), ["train"], ["train"])

    (tmp_path / "train.txt").write_text("0\n3\n")
    deadline, counts = time.monotonic() + 8, [0, 0]
    while time.monotonic() < deadline and sum(counts) < 5000:
        parse, line = rng.choice(parsers)
        name = rng.choice(list(files))
        try:
            if rng.random() < 0.8:
                parse(broken(line, rng).split(b"\n")[0])
            else:
                (tmp_path / name).write_bytes(broken(files[name], rng))
                read(name)
            counts[0] += 1
        except (Problem, data.BadLine) as error:
            assert str(error) and "\n" not in str(error).strip()
            counts[1] += 1
        (tmp_path / name).write_bytes(files[name])
    assert min(counts) > 300 and sum(counts) > 1000, counts
