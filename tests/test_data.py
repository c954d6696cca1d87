"""Corpora, tokenizer, samples and batches."""
import ast
import gzip
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import pickle
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import data
from conftest import ROOT, cli, forkserver, peak, write_lines
from data import BadLine, Batches, Corpus, Problem, Samples


def read(paths, **options):
    """(text, code) of every record, in order."""
    corpus = Corpus(data.find_sources(paths), **options)
    return [corpus[i] for i in range(len(corpus))]


# ---- what a line may be -----------------------------------------------------------------------------

@pytest.fixture
def parse():
    corpus = Corpus.__new__(Corpus)
    corpus.code_fields, corpus.text_fields, corpus.plain_text = data.CODE_FIELDS, data.TEXT_FIELDS, True
    corpus.texts = 0
    return lambda record: corpus.parse(record if isinstance(record, bytes) else json.dumps(record).encode())


@pytest.mark.parametrize("field", ["code", "content", "func_code_string", "whole_func_string", "func", "function",
                                   "src", "original_string"])
def test_code_fields(parse, field):
    assert parse({"repo": "r", field: "x = 1"}) == ("", "x = 1")


@pytest.mark.parametrize("field", ["docstring", "func_documentation_string", "nl", "doc", "query", "text"])
def test_text_fields(parse, field):
    assert parse({"code": "x = 1", field: "set x"}) == ("set x", "x = 1")


def test_the_first_name_in_the_order_wins(parse):
    assert parse({"src": "b", "code": "a", "text": "d", "docstring": "c"}) == ("c", "a")
    assert parse({"code": None, "src": "b", "docstring": None, "nl": "n"}) == ("n", "b")


def test_text_alone_is_code(parse):
    assert parse({"text": "int x;"}) == ("", "int x;")


def test_starcoder_prefix(parse):
    assert parse({"content": "<reponame>a/b<filename>c/d.py<gh_stars>10-100\nx = 1\n"}) == ("", "x = 1\n")
    assert parse({"content": "<filename>d.py\nx = 1"}) == ("", "x = 1")
    assert parse({"content": "x = '<reponame>a'"}) == ("", "x = '<reponame>a'")


@pytest.mark.parametrize("code, text, expected", [
    ('def f():\n    """Add one."""\n    return 1\n', "Add one.", ("Add one.", "def f():\n    return 1\n")),
    ("def f():\n    '''\n    Add\n    one.\n    '''\n    return 1", "Add\n    one.",
     ("Add\n    one.", "def f():\n    return 1")),
    ("# Add one.\nx += 1", "Add one.", ("", "# Add one.\nx += 1")),
    ('def f(d):\n    return d["name"]\n', "name", ("", 'def f(d):\n    return d["name"]\n')),
    ('x = "Hello"\ny = 1', "Hello", ("", 'x = "Hello"\ny = 1')),
    ('def f():\n    r"""Add."""', "Add.", ("Add.", "def f():\n")),
    ("x = 1", "Add one.", ("Add one.", "x = 1")),
    ("x = 1", "  ", ("", "x = 1")),
])
def test_a_text_that_the_code_repeats_appears_once(parse, code, text, expected):
    assert parse({"code": code, "docstring": text}) == expected


def test_looking_for_a_repeated_text_is_linear(parse):
    start = time.perf_counter()
    parse({"code": " " * 1_000_000 + "text" + " " * 1_000_000, "docstring": "text"})
    assert time.perf_counter() - start < 1


def test_a_lone_surrogate_is_replaced(parse):
    assert parse(b'{"code": "x = \\"\\ud800\\""}') == ("", 'x = "?"')


@pytest.mark.parametrize("line, message", [
    (b"nonsense", "not JSON: Expecting value at column 1"),
    (b'{"code": "x"', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'["code"]', "an array, not a JSON object"),
    (b"3", "a number, not a JSON object"),
    (b"null", "null, not a JSON object"),
    (b'{"cod": "x", "lang": "py"}', "no code field; the fields seen are: cod, lang"),
    (b"{}", "the fields seen are: none"),
    (b'{"code": ["x"]}', 'the field "code" is an array, not a string'),
    (b'{"code": 3}', 'the field "code" is a number, not a string'),
    (b'{"code": "x", "docstring": {}}', 'the field "docstring" is an object, not a string'),
    (b'{"code": " \\n"}', "the code is empty"),
    (b'{"code": "\xff"}', "invalid UTF-8 at byte 11"),
])
def test_bad_lines(parse, line, message):
    with pytest.raises(BadLine, match=None) as error:
        parse(line)
    assert message in str(error.value)


# ---- where a corpus may be --------------------------------------------------------------------------

A, B, C = ({"code": f"{name} = 1"} for name in "abc")
CODE = {name: ("", f"{name} = 1") for name in "abc"}


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    first, second = write_lines(tmp_path / "1.jsonl", [A]), write_lines(tmp_path / "2.jsonl", [b"", B, b"  "])
    with gzip.open(tmp_path / "sub" / "3.jsonl.gz", "wb") as file:
        file.write(json.dumps(C).encode())  # and no line end
    (tmp_path / "notes.txt").write_text("not a corpus")
    assert read([second, first]) == [CODE["b"], CODE["a"]]
    assert read([tmp_path]) == [CODE["a"], CODE["b"], CODE["c"]]
    assert read([f"{tmp_path}/*.jsonl"]) == [CODE["a"], CODE["b"]]
    assert read([f"{tmp_path}/**/*.jsonl*"]) == [CODE["a"], CODE["b"], CODE["c"]]
    assert read([first, tmp_path, f"{tmp_path}/./1.jsonl"]) == [CODE["a"], CODE["b"], CODE["c"]]


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=write_lines, args=(tmp_path / "pipe", [A, B])).start()
    assert read([tmp_path / "pipe"]) == [CODE["a"], CODE["b"]]


def test_spooled_corpora_are_announced_and_removed_at_exit(tmp_path):
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(json.dumps(A).encode() + b"\n")
    script = "import data, sys; print(data.find_sources(sys.argv[1:])[0].path)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c.jsonl.gz")], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    assert "18 bytes decompressed into" in done.stderr
    assert done.stdout.strip().endswith(".jsonl") and not os.path.exists(done.stdout.strip())


def test_limit_and_fields(tmp_path):
    one = write_lines(tmp_path / "1.jsonl", [{"mine": str(i), "my_text": "t"} for i in range(5)])
    two = write_lines(tmp_path / "2.jsonl", [{"mine": str(i)} for i in range(5, 10)])
    records = read([one, two], code_field="mine", text_field="my_text", limit=2)
    repeated = write_lines(tmp_path / "3.jsonl", [{"mine": "1 # t", "my_text": "t"}])
    assert read([repeated], code_field="mine", text_field="my_text") == [("", "1 # t")]
    assert records == [("t", "0"), ("t", "1"), ("", "5"), ("", "6")]


def test_bad_lines_can_be_passed_over(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [A, "broken", B])
    corpus = Corpus(data.find_sources([path]), skip_bad=True)
    assert corpus.bad == 1 and [corpus[i] for i in range(2)] == [CODE["a"], CODE["b"]]
    with pytest.raises(Problem, match=f"^{path}:2: not JSON"):
        Corpus(data.find_sources([path]))


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [A, B])
    corpus = Corpus(data.find_sources([path]))
    write_lines(path, ["broken"])
    with pytest.raises(Problem, match="changed while it was being read"):
        corpus[0]


def test_held_out_is_a_hash_of_the_line(tmp_path):
    records = [{"code": f"x = {i}"} for i in range(8000)]
    def held(records):
        corpus = Corpus(data.find_sources([write_lines(tmp_path / "c.jsonl", records)]))
        assert sorted([*corpus.train, *corpus.held_out]) == list(range(len(records)))
        return {corpus[i] for i in corpus.held_out}
    whole = held(records)
    assert 50 < len(whole) < 110
    assert held(records[::-1]) == whole
    assert held(records[:4000]) | held(records[4000:]) == whole
    for count, least in ((2, 1), (20, 2), (200, 20), (1000, 32)):  # of a small corpus a tenth, at most 32
        assert least <= len(held(records[:count])) <= least + count // 100 + 1
    assert held(records[:200][::-1]) == held(records[:200])


def growth(path):
    before = peak()
    corpus = Corpus(data.find_sources([path]))
    Batches(None, corpus.train, 32, [8], 0, seed=0).records_of(1, 0)
    return peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Ten times the lines cost no more than the 24 bytes a line that DESIGN allows."""
    path, line = tmp_path / "c.jsonl", json.dumps({"code": "x = 1\n" * 60}).encode() + b"\n"
    grown = []
    for count in (10_000, 100_000):
        with open(path, "wb") as file:
            file.write(line * count)
        with forkserver.Pool(1) as process:
            grown.append(process.apply(growth, [path]))
    assert 8 * 90_000 < grown[1] - grown[0] < 24 * 90_000 + 1_000_000 < 0.1 * 90_000 * len(line)


# ---- the tokenizer ----------------------------------------------------------------------------------

def foreign(*special):
    """A word-level tokenizer.json with the given special tokens, truncation and padding switched on."""
    vocabulary = {token: i for i, token in enumerate([*special, "x", "=", "1", "?"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(special))
    model.enable_truncation(2)
    model.enable_padding(length=9)
    return model.to_str()


def test_special_tokens_by_either_name():
    for special in (["<mask>", "</s>", "<pad>", "<s>"], ["[SEP]", "[PAD]", "[MASK]", "[CLS]", "[UNK]"]):
        tokenizer = data.Tokenizer(foreign(*special))
        found = [tokenizer.pad, tokenizer.start, tokenizer.end, tokenizer.mask]
        names = ["pad", "cls", "sep", "mask"] if "[CLS]" in special else ["pad", "s", "/s", "mask"]
        assert [special[i].strip("<>[]").lower() for i in found] == names
        assert tokenizer.vocab == len(special) + 4
        assert set(tokenizer.special) == set(range(len(special)))
        assert [*tokenizer.ordinary] == list(range(len(special), len(special) + 4))
        x = len(special)
        assert tokenizer.encode("x = 1 x") == [x, x + 1, x + 2, x]  # neither cut nor padded


def test_a_tokenizer_without_a_mask():
    with pytest.raises(Problem, match=r"^t.json has no mask token: its vocabulary needs <mask> or \[MASK\]"):
        data.Tokenizer(foreign("<s>", "</s>", "<pad>"), "t.json")


def test_special_tokens_in_code_are_ordinary_text(tokenizer):
    string = "x = '<mask>' + '</s><pad>'"
    for copy in (tokenizer, tokenizer.__reduce__()[0](*tokenizer.__reduce__()[1])):
        ids = copy.encode(string)
        assert not set(ids) & set(copy.special.tolist())
        assert copy.model.decode(ids) == string


def test_training_is_reproducible_and_has_the_size_asked_for(corpus, tokenizer):
    assert tokenizer.vocab == 600
    assert data.train_tokenizer(corpus, 600).text == tokenizer.text
    part = data.train_tokenizer(corpus, 600, most=corpus.bytes // 2)
    assert part.text != tokenizer.text and part.text == data.train_tokenizer(corpus, 600, most=corpus.bytes // 2).text


# ---- samples ----------------------------------------------------------------------------------------

class OneRecord:
    def __init__(self, text, code):
        self.record = text, code

    def __getitem__(self, _record):
        return self.record


def test_sample_layout(tokenizer):
    def sample(text, code, ctx):
        return Samples(OneRecord(text, code), tokenizer, ctx)(0)
    text, code = tokenizer.encode("add one"), tokenizer.encode("x += 1")
    assert sample("add one", "x += 1", 64) == [tokenizer.start, *text, tokenizer.end, *code, tokenizer.end]
    assert sample("", "x += 1", 64) == [tokenizer.start, *code, tokenizer.end]


@pytest.mark.parametrize("ctx", [8, 9, 64, 257])
def test_a_long_text_takes_at_most_half(tokenizer, ctx):
    ids = Samples(OneRecord("word " * 1000, "x = 1\n" * 1000), tokenizer, ctx)(0)
    assert len(ids) == ctx and ids[-1] == tokenizer.end
    assert ctx // 2 - 1 <= ids.index(tokenizer.end) + 1 <= ctx / 2


def test_windows_of_long_code(tokenizer):
    code = "".join(f"name_{i} = {i * i}\n" for i in range(2000))
    samples = Samples(OneRecord("", code), tokenizer, 64, seed=3)
    whole = tokenizer.encode(code)
    assert samples(0, 0)[1:-1] == whole[:62]
    starts = set()
    for epoch in range(1, 30):
        window = tokenizer.model.decode(samples(0, epoch)[2:-2])  # a cut may split its first and last token
        assert len(samples(0, epoch)) == 64 and window in code
        assert samples(0, epoch) == samples(0, epoch)
        starts.add(code.index(window) * 4 // len(code))
    assert starts == {0, 1, 2, 3}
    assert Samples(OneRecord("", code), tokenizer, 64, seed=4)(0, 1) != samples(0, 1)


def test_a_window_of_code_with_very_long_tokens_is_full(tokenizer):
    long = " " * 40 + "x\n"
    assert len(Samples(OneRecord("", long * 500), tokenizer, 32)(0, 1)) == 32


def test_draws_are_uniform_and_independent():
    records, positions = np.arange(300)[:, None], np.arange(400)[None]
    draws = data.draw(0, 0, records, positions, 1)
    assert draws.shape == (300, 400) and 0 <= draws.min() and draws.max() < 1
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 6000) ** 2 / 6000).sum() < 45  # chi-squared, 19 degrees of freedom, p < 0.001
    others = [data.draw(1, 0, records, positions, 1), data.draw(0, 1, records, positions, 1),
              data.draw(0, 0, records, positions, 2), data.draw(0, 0, records + 1, positions, 1),
              data.draw(0, 0, records, positions + 1, 1)]
    for other in others:
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.01


# ---- batches ----------------------------------------------------------------------------------------

def test_static_lengths_are_the_best_ones():
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(1, 65, rng.integers(1, 40))
        def cost(lengths):
            return sum(min(length for length in lengths if length >= count) for count in counts)
        best = min(cost([*some, 64]) for k in range(3) for some in itertools.combinations(range(8, 64, 8), k))
        chosen = data.choose_lengths(counts, 64, most=3)
        assert len(chosen) <= 3 and chosen[-1] == 64 and cost(chosen) == best
    assert len(data.choose_lengths(np.arange(257), 256)) == 12
    assert len(data.choose_lengths(np.arange(8193), 8192)) == 16
    assert data.choose_lengths(np.array([5]), 8) == [8]


@pytest.fixture
def batches():
    lengths = np.random.default_rng(1).integers(3, 65, 1234)
    def samples(record, epoch):
        return [1] + [record % 90 + 5] * (int(lengths[record]) - 2) + [2]
    def make(**options):
        return Batches(samples, np.arange(1234, dtype=np.uint32), 8, [16, 32, 48, 64], 0, **options)
    return make


def real(batch):
    return batch.records[batch.lengths > 0].tolist()


def test_an_epoch_is_every_line_once(batches):
    """Of several ranks tests/test_processes.py has the same."""
    stream = list(batches(seed=0).stream(0, 2 * 155))
    for epoch in (0, 1):
        part = stream[epoch * 155:(epoch + 1) * 155]
        assert sorted(itertools.chain(*map(real, part))) == list(range(1234))
        assert all(batch.epoch == epoch and len(batch.ids) == 8 for batch in part)


def test_batches_hold_what_the_samples_are(batches):
    one = batches(seed=0)
    for batch in one.stream(0, 155):
        assert batch.ids.shape[1] in (16, 32, 48, 64)
        for ids, length, record in zip(*batch[:3]):
            if length:
                assert ids[:length].tolist() == one.samples(int(record), 0)
            assert not ids[length:].any()
        longest = batch.lengths.max()
        assert longest <= batch.ids.shape[1] < longest + 16


def test_order_depends_on_seed_and_epoch(batches):
    order = [[real(b) for b in batches(seed=seed).stream(0, 310)] for seed in (0, 1)]
    assert order[0][:155] != order[0][155:] and order[0] != order[1]
    assert sum(map(len, order[0][:155])) == 1234
    assert sorted(itertools.chain(*(real(b) for b in batches().stream(0, 155)))) == list(range(1234))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_is_the_rest_of_the_whole_one(batches, workers):
    whole = list(batches(seed=0).stream(0, 400))
    for start in (1, 49, 50, 154, 155, 156, 399) if not workers else (161,):
        with closing(batches(seed=0).stream(start, None, workers)) as stream:
            for expected, batch in zip(whole[start:], stream):
                assert all(np.array_equal(a, b) for a, b in zip(expected, batch))


def test_batches_can_be_sent_to_a_process(corpus, tokenizer):
    """As they are where processes are not forked."""
    one = Batches(Samples(corpus, tokenizer, 32), corpus.train, 8, [16, 32], tokenizer.pad, seed=0)
    two = pickle.loads(pickle.dumps(one))
    assert all(np.array_equal(a, b) for x, y in zip(one[1, 0], two[1, 0]) for a, b in zip(x, y))
    assert pickle.loads(pickle.dumps(data.as_it_is)) is data.as_it_is


def test_a_problem_in_a_worker_arrives_as_it_was(batches):
    def samples(record, epoch):
        raise Problem("corpus.jsonl changed")
    with closing(Batches(samples, np.arange(9), 2, [8], 0).stream(workers=1)) as stream:
        with pytest.raises(Problem, match="^corpus.jsonl changed$"):
            next(stream)


def test_padding_share_on_the_standard_library(tmp_path):
    """At ctx 256, after rounding to the static lengths, at most 10 %; of every third of its modules and packages."""
    with open(tmp_path / "part.jsonl", "wb") as file:
        data.build_corpus([str(path) for path in sorted(Path(data.STANDARD_LIBRARY).glob("[a-z]*"))[::3]], file)
    corpus = Corpus(data.find_sources([str(tmp_path / "part.jsonl")]))
    tokenizer = data.train_tokenizer(corpus, 4096, most=2_000_000)
    samples = Samples(corpus, tokenizer, 256)
    lengths = data.static_lengths(samples, corpus.train, 256)
    assert len(lengths) <= 12
    tokens = places = 0
    batches = Batches(samples, corpus.train, 32, lengths, tokenizer.pad, seed=0)
    for batch in batches.stream(0, min(200, len(batches))):
        tokens, places = tokens + batch.lengths.sum(), places + batch.ids.size
    assert len(corpus) > 5000 and tokens > 500_000
    assert 1 - tokens / places <= 0.10


# ---- corpora of source trees ------------------------------------------------------------------------

def records_of(*paths):
    out = io.BytesIO()
    data.build_corpus([str(path) for path in paths], out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_python_functions(tmp_path):
    (tmp_path / "m.py").write_text('''"""Module."""
import os
class K:
    @property
    def a(self):
        """One-line."""  # why
        return 1

    async def b(self):
        """Ünï.

        More.
        """
        def inner(): return 2
        return inner
if os:
    def c(): "only a docstring"
def d(): "x"; return 3
def e(): return 4
@(
    property
)
def h(): return 6
match os:
    case 1:
        def g(): return 5
''')
    os.mkfifo(tmp_path / "pipe.py")  # no source file, and reading it would wait for ever
    records = {record["name"]: record for record in records_of(tmp_path)}
    assert {name: (r.get("docstring"), r["code"]) for name, r in records.items()} == {
        "a": ("One-line.", "@property\ndef a(self):\n      # why\n    return 1".replace("      #", "    #")),
        "b": ("Ünï.\n\nMore.", "async def b(self):\n    def inner(): return 2\n    return inner"),
        "c": ("only a docstring", "def c(): pass"),
        "d": ("x", "def d(): return 3"),
        "e": (None, "def e(): return 4"),
        "g": (None, "def g(): return 5"),
        "h": (None, "@(\n    property\n)\ndef h(): return 6"),
    }
    assert records["a"]["line"] == 4 and records["a"]["path"] == "m.py" and records["a"]["language"] == "python"


@pytest.mark.parametrize("name", ["argparse", "inspect", "typing", "unittest.mock", "asyncio.base_events"])
def test_functions_keep_their_tree_without_the_docstring(name):
    path = importlib.import_module(name).__file__
    tree = ast.parse(open(path, encoding="utf-8").read())
    by_line = {min([n.lineno, *(d.lineno for d in n.decorator_list)]): n for n in ast.walk(tree)
               if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    records = records_of(path)
    for record in records:
        node = by_line[record["line"]]
        if "docstring" in record:
            assert record["docstring"] == ast.get_docstring(node).strip()
            node.body = node.body[1:] or [ast.Pass()]
        if not any(isinstance(n, ast.Constant) and "\n" in str(n.value) for n in ast.walk(node)):
            assert ast.dump(ast.parse(record["code"]).body[0]) == ast.dump(node)
    assert sum("docstring" in record for record in records) > 2


def test_source_trees(tmp_path, capsys):
    for name, content in {
        "a.java": b"class A {}", "b/c.go": b"package c", "b/copy.java": b"class A {}", "x.txt": b"no code",
        "old.py": b"print 'two'\n", "latin.py": "# -*- coding: latin-1 -*-\ndef f(): return 'é'\n".encode("latin-1"),
        "bad.c": b"\xff\xfe", "big.js": b"x" * (2 << 20), "node_modules/n.js": b"n", ".git/h.py": b"def h(): pass",
        "env/pyvenv.cfg": b"", "env/e.py": b"def e(): pass", "empty.rs": b" \n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = {(r["path"], r["language"]): r["code"] for r in records_of(tmp_path)}
    assert found == {("a.java", "java"): "class A {}", ("b/c.go", "go"): "package c",
                     ("old.py", "python"): "print 'two'\n", ("latin.py", "python"): "def f(): return 'é'"}
    said = capsys.readouterr().err
    assert "4 records; 1 exact duplicates dropped" in said and "8 source files" in said
    assert "1 left out: over 1.0 MB" in said and "1 left out: not text in UTF-8" in said


def test_surrogates_in_sources(tmp_path):
    """An escape in a docstring, and a file name that is not UTF-8."""
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.py"), "w") as file:
        file.write('def f():\n    "\\ud800"\n    return 1\n')
    record, = records_of(tmp_path)
    assert (record["path"], record["docstring"], record["code"]) == ("?.py", "?", "def f():\n    return 1")


def test_corpus_command(tmp_path):
    (tmp_path / "m.py").write_text("def f(): return 1\n")
    target = tmp_path / "c.jsonl"
    code, said = cli("corpus", tmp_path / "m.py", "-o", target)
    assert code == 0 and "1 records" in said
    assert read([target]) == [("", "def f(): return 1")]
    code, printed = cli("corpus", tmp_path / "m.py")
    assert code == 0 and target.read_text() in printed
    assert cli("corpus", tmp_path / "m.py", "-o", target)[0] == 0
    code, said = cli("corpus", tmp_path / "m.py", "-o", tmp_path / "m.py")
    assert code == 2 and "exists and is no corpus" in said and "def f" in (tmp_path / "m.py").read_text()


# ---- the atomic write -------------------------------------------------------------------------------

def test_an_atomic_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with data.atomic(path) as file:
            file.write(b"new")
            raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    with data.atomic(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]
