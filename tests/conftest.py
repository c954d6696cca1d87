import importlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

import codessm  # before torch, as it says how torch's threads wait
import data
import tasks
import torch

ROOT = Path(codessm.__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
# a shell ignores SIGINT for what runs in the background, nohup SIGHUP, and a run would ignore them too
for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    signal.signal(number, handler)
forkserver = multiprocessing.get_context("forkserver")  # imports torch, and what optimizers import, once
forkserver.set_forkserver_preload(["codessm", "pytest", "torch._dynamo"])
torch.set_num_threads(1)  # the tensors of tests are small: two threads would take twice as long
TINY = ["--size", "tiny", "--vocab", "400", "--ctx", "32", "--batch", "8"]
KINDS = ("mlm", "classify", "pair", "retrieval", "tag")


def write_lines(path, records):
    """A JSONL file of records, or of raw lines where they are strings or bytes."""
    with open(path, "wb") as file:
        for record in records:
            line = record if isinstance(record, (str, bytes)) else json.dumps(record)
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return str(path)


def cli(*args, input=None):
    """(exit code, everything printed) of a command, run in this process."""
    result = CliRunner().invoke(codessm.cli, [str(a) for a in args], input=input)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def says(code, parts, *args, input=None):
    """Checks that a command ends with this exit code and prints one part, or a list of parts, and no traceback.

    Returns all that it printed.
    """
    found, said = cli(*args, input=input)
    assert found == code and "Traceback" not in said, said
    assert all(part in said for part in ([parts] if isinstance(parts, str) else parts)), said
    return said


def command(folder, *args, stdin=os.devnull):
    """A command in a folder; what it says goes to a file there, RANK.txt."""
    os.chdir(folder)
    said = os.open(f"{os.environ.get('RANK', 0)}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdin = open(stdin)
    codessm.cli([str(arg) for arg in args])


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Ends what a test that failed has left; pytest would wait for it."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def peak():
    """The peak memory of this process, which unlike ru_maxrss does not begin with its parent's."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def wait_for(condition, process):
    """Until the condition holds, while the process lives, for a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@contextmanager
def before_call(owner, name, number, act):
    """In the block, `act(*arguments)` comes before one call of a function, numbered from 1. Gives a list of calls."""
    original, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == number:
            act(*args)
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


def send(number):
    """For `before_call`: a signal to the process itself."""
    return lambda *_: os.kill(os.getpid(), number)


def die(*_):
    """For `before_call`: an end without any last word."""
    os.kill(os.getpid(), signal.SIGKILL)


def files():
    """The size and time of what lies in the current folder."""
    return {name: (os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in os.listdir()}


def weights(path):
    return tasks.read(path)["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def compiler():
    """Skips where nothing is compiled; begins without compilations, fails when dynamo stops compiling."""
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 compiles a wrong gradient of the embedding on a CPU")
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except Exception as error:
        pytest.skip(f"no compiler works here: {type(error).__name__}")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield
    torch._dynamo.reset()


def records_of(*paths):
    """The records of source trees."""
    out = io.BytesIO()
    data.build_corpus(list(map(str, paths)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.fixture(scope="session")
def functions():
    """Real code: the records of a few modules of the standard library."""
    names = ("argparse", "ast", "csv", "json.decoder", "shutil", "tempfile", "textwrap", "zipfile")
    return records_of(*(importlib.import_module(name).__file__ for name in names))


@pytest.fixture(scope="session")
def corpus(functions, tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("corpus") / "functions.jsonl", functions)
    return data.Corpus(data.find_sources([path]))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return data.train_tokenizer(corpus, 600)


class Case(NamedTuple):
    """An objective of one of `KINDS` on real functions, with what trains and evaluates it."""
    objective: tasks.Objective
    dataset: data.Dataset
    store: data.TokenStore
    train: data.Batches
    valid: data.Batches  # the distinct items of `split`
    split: data.Split


def rows_of(kind, functions):
    """Lines of JSONL for a kind of task: the same function at times, equal texts, words of several sub-tokens."""
    codes = [f["code"] for f in functions]
    if kind == "mlm":
        return functions
    if kind == "classify":
        return [{"code": code, "label": str(i % 2)} for i, code in enumerate(codes)]
    if kind == "pair":
        return [{"code1": code, "code2": codes[i * 7 % len(codes)], "label": i % 2} for i, code in enumerate(codes)]
    if kind == "retrieval":
        return [{"text": "the " + f["name"].replace("_", " "), "code": f["code"]} for f in functions]
    return [{"tokens": words, "labels": [w if w in ("=", "if") else "other" if len(w) < 3 else None for w in words]}
            for words in (code.split() for code in codes)]


def write_case(folder, kind, functions):
    """The files of a task: 40 functions to train on, 30 to evaluate, some of them the same."""
    for split, some in {"train": functions[:40], "valid": functions[30:60]}.items():
        write_lines(folder / f"{split}.jsonl", rows_of(kind, some))


def read_case(folder, kind, tokenizer, ctx=64, batch=8, seed=0, **options):
    """The `Case` of these files; the options are the encoder's."""
    paths = [str(folder / f"{split}.jsonl") for split in ("train", "valid")] if kind == "mlm" else [str(folder)]
    dataset = data.read_dataset(kind, paths, ("train", "valid"))
    every = np.unique(np.concatenate([split.items() for split in dataset.splits.values()]))
    store = data.tokenise(dataset, tokenizer, ctx, every, whole=True)
    split = dataset.splits["valid"]
    train, valid = (data.Batches(store, tokenizer, ctx, *rest) for rest in (
        (dataset.splits["train"].examples, batch, seed, dataset.splits["train"].labels),
        (split.items()[:, None], batch)))
    torch.manual_seed(0)
    encoder = codessm.Encoder(tokenizer.vocab, **dict(d=32, layers=2, N=4, ctx=ctx) | options)
    return Case(tasks.OBJECTIVES[kind](encoder, tokenizer, kind, dataset.labels, ctx), dataset, store, train, valid,
                split)


@pytest.fixture(scope="session")
def make_case(functions, tokenizer, tmp_path_factory):
    """`make_case(kind)` is a `Case`: 40 functions to train on, 30 to evaluate; the options are those of `read_case`."""
    def make(kind, **options):
        folder = tmp_path_factory.mktemp(kind)
        write_case(folder, kind, functions)
        return read_case(folder, kind, tokenizer, **options)
    return make


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder of 40 Python files, each of 10 small functions, in which probes find enough pairs."""
    folder, rng = tmp_path_factory.mktemp("programs"), np.random.default_rng(0)
    for n in range(400):
        a, b, c = rng.permutation(list("abcde"))[:3]
        forms = f"{a} = {b} + {c}", f"{b} = g({c}, {a})", f"{c} = [{c}]", f"if {a}: {b} = {c}", f"{a} = {c}[{b}]"
        with open(folder / f"{n % 40}.py", "a") as file:
            file.write("\n    ".join([f"def f({a}, {b}, {c}):", *rng.choice(forms, 3), f"return {b}\n"]))
    return folder


@pytest.fixture
def quick(monkeypatch):
    """`--size tiny` is one layer of width 64, for what does not depend on the model; not in other processes."""
    monkeypatch.setitem(codessm.SIZES, "tiny", dict(d=64, layers=1))


@pytest.fixture
def small(tmp_path, functions, monkeypatch):
    """The path of a corpus of 65 real functions, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return write_lines(tmp_path / "small.jsonl", functions[:65])
