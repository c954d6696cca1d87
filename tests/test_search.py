"""Units of source files, the index and its search, vectors, and the Python interface."""
import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import codessm
import data
import tasks
from conftest import before_call, cli, command, die, forkserver, says, write_lines
from data import Problem, cut_units

SOURCES = {
    "a.c": "/* Licence. */\n#include <x.h>\n\nstruct point {\n    int x;\n};\n\n/* Adds. */\nstatic int\n"
           "add(int a,\n    int b)\n{\n"
           "    if (a) {\n        return '{';\n    }\n    return a + b;\n}\n",
    "A.java": "package p;\n\n/** A. */\n@Foo(B.class)\npublic class A<T> {\n    int x = 1; // {\n\n"
              "    /** Get. */\n    public T get(int i)\n"
              "    {\n        return \"}\";\n    }\n\n    static class C {\n        int g() {\n"
              "            return 1;\n        }\n    }\n}\n",
    "a.js": "'use strict';\nfunction f(a) {\n  return `}\n  ${a}`;\n}\nconst g = async (x) => {\n  return 1;\n"
            "};\nclass K {\n  m(a) {\n"
            "    return a;\n  }\n}\nif (g) {\n  f();\n}\n",
    "a.go": "package a\n\n// Add adds.\nfunc (r *T) Add(a int) int {\n\treturn a\n}\n\ntype P struct {\n\tx int\n}\n",
    "a.rb": "require 'x'\nmodule M\n  class A < B\n    # Foo.\n    def foo(a)\n      if a\n        1\n"
            "      else\n        2\n      end\n    end\n\n"
            "    def self.bar?\n      3\n    end\n  end\nend\n",
    "a.php": "<?php\nclass B {\n    /**\n     * Doc.\n     */\n    public function foo($a)\n    {\n"
             "        return 1;\n    }\n}\n",
    "a.rs": "/// A.\n#[derive(Debug)]\npub struct A<'a> {\n    x: &'a str,\n}\nimpl<'a> Foo<'a> for A<'a> {\n"
            "    fn foo<T>(&self, x: T) -> i32 {\n"
            "        1\n    }\n}\n",
    "a.py": "import x\n# About A.\n@d(\n    1)\nclass A(B):\n    '''Doc.'''\n    # About f.\n    @p\n"
            "    def f(self):\n        def g(): pass\n"
            "        return 1\n\n    y = 2\n    class C:\n        async def h(self): pass\nif x:\n"
            "    def z(): return 1\nprint(1)\n",
}
UNITS = {  # (first line, last line, name), read off by hand
    "a.c": [(1, 2, ""), (4, 6, "point"), (8, 17, "add")],
    "A.java": [(1, 1, ""), (3, 6, "A"), (8, 12, "A.get"), (14, 14, "A.C"), (15, 19, "A.C.g")],
    "a.js": [(1, 1, ""), (2, 5, "f"), (6, 8, "g"), (9, 9, "K"), (10, 13, "K.m"), (14, 16, "")],
    "a.go": [(1, 1, ""), (3, 6, "Add"), (8, 10, "P")],
    "a.rb": [(1, 1, ""), (2, 2, "M"), (3, 3, "M.A"), (4, 11, "M.A.foo"), (13, 17, "M.A.bar?")],
    "a.php": [(1, 2, "B"), (3, 10, "B.foo")],
    "a.rs": [(1, 5, "A"), (6, 6, "A"), (7, 10, "A.foo")],
    "a.py": [(1, 1, ""), (2, 6, "A"), (7, 11, "A.f"), (13, 13, "A"), (14, 14, "A.C"), (15, 15, "A.C.h"), (16, 16, ""),
             (17, 17, "z"), (18, 18, "")],
}
DECADES = "".join(f"def number_{i}(a):\n    '''Return {word}.'''\n    return a + {i}\n\n\n" for i, word in enumerate(
    "zero one two three four five six seven eight nine".split()))


def put_together(units, source):
    """The file that its units say, each at its lines, with empty lines between them."""
    rows = [""] * len(source.split("\n"))
    for before, unit in zip([None, *units], units):
        assert before is None or before.last < unit.first
        rows[unit.first - 1:unit.last] = unit.code.removesuffix("\n").split("\n")
    return rows


@pytest.mark.parametrize("name", SOURCES)
def test_units_by_hand(name):
    units = cut_units(SOURCES[name], data.language_of(name), name)
    assert [unit[1:4] for unit in units] == UNITS[name]
    assert put_together(units, SOURCES[name]) == SOURCES[name].split("\n")


def test_no_line_is_lost():
    """Of sources that are cut anywhere, doubled, indented by tabs, closed too often, or in no order."""
    rng = random.Random(0)
    for name, source in SOURCES.items():
        language, rows = data.language_of(name), source.split("\n")
        for _ in range(60):
            odd = ["}", "{", "\t\tx", "end", '"', "/*", "*/", "'''", "\x0c", "\u2028", "é` {"]
            some = rng.choices([*rows, *odd], k=40)
            some = rng.choice([some, rows[:rng.randrange(len(rows))] + some,
                               [row.replace("    ", "\t") for row in rows]])
            source = "\n".join(some)
            found = put_together(cut_units(source, language), source)
            for row, expected in zip(found, source.split("\n"), strict=True):
                assert row == expected or not (row + expected).strip()


@pytest.mark.parametrize("source", ["{\n" * 20_000, "/*\n" * 20_000, "a(" * 200_000 + "{\nx\n}\n",
                                    "class A {\n" * 3000 + "}\n" * 3000, "'" * 99_999, ""])
def test_odd_sources_take_no_time(source):
    started = time.process_time()
    for language in ("javascript", "ruby", "python"):
        assert len(put_together(cut_units(source, language), source)) == source.count("\n") + 1
    assert time.process_time() - started < 3


def test_long_units_are_cut_into_pieces():
    source = "def f():\n" + "    x = 1\n" * 199 + "y = 2\n"
    assert [unit[1:4] for unit in cut_units(source, "python")] == [
        (1, 60, "f"), (61, 120, "f"), (121, 180, "f"), (181, 200, "f"), (201, 201, "")]
    functions = "".join(f"  function f{i}(a) {{\n    return {i};\n  }}\n" for i in range(60))
    wrapped = "(function () {\n" + functions + "})();\n"
    assert [unit.name for unit in cut_units(wrapped, "javascript")] == ["", *(f"f{i}" for i in range(60))]


# ---- the index --------------------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of small files, which is the current one; the index lies beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tree").mkdir()
    monkeypatch.chdir(tmp_path / "tree")
    for name, source in (SOURCES | {"digits.py": DECADES}).items():
        Path(name).write_text(source)
    return tmp_path / "tree"


@pytest.fixture(scope="session")
def model(tokenizer):
    """An untrained model for retrieval."""
    torch.manual_seed(0)
    return tasks.Retrieval(codessm.Encoder(tokenizer.vocab, d=32, layers=2, N=4), tokenizer, "retrieval", ctx=64).eval()


def units_here(prefix=""):
    return [unit for name in sorted(os.listdir())
            for unit in cut_units(Path(name).read_text(), data.language_of(name), prefix + name)]


def index_files():
    return [*Path("../cache/codessm").glob("*.sqlite")]


def found(query, *paths, model=None):
    """(path, first line, name) of all answers."""
    return [(hit.path, hit.first, hit.name) for hit in codessm.search(query, paths or ".", model, 99)]


def found_anew(query, model=None):
    """The same from a new index, beside the old one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=".."))
        return found(query, model=model)


def bm25(query, texts):
    """The formula as FTS5 has it: k1 1.2, b 0.75."""
    counts = [Counter(text) for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    scores = np.zeros(len(texts))
    for word in set(query):
        having = sum(word in count for count in counts)
        idf = max(1e-6, math.log((len(texts) - having + 0.5) / (having + 0.5)))
        for i, count in enumerate(counts):
            scores[i] += idf * count[word] * 2.2 / (count[word] + 1.2 * (0.25 + 0.75 * len(texts[i]) / mean))
    return scores


def test_search_agrees_with_brute_force(tree, model):
    """Words without suffixes, which the stemmer leaves alone."""
    units = units_here()
    stems = {"returns": "return", "adds": "add", "licence": "licenc", "one": "on", "three": "three"}
    texts = [[stems.get(word, word) for word in data.search_words(
        f"tree/{unit.path} {unit.name} {unit.name} {unit.name} {unit.code}")] for unit in units]
    query = "number_3 addFoo return"
    words = bm25(["number", "3", "add", "foo", "return"], texts)
    hits = codessm.search(query, k=99)
    assert len(hits) == (words > 0).sum() > 10
    by_place = {(hit.path, hit.first): hit for hit in hits}
    for unit, score in zip(units, words):
        if score:
            hit = by_place[unit.path, unit.first]
            assert hit.score == pytest.approx(score, rel=0.02) and (hit.last, hit.name, hit.code) == unit[2:]
            assert hit.word_rank == 1 + (words > score * 1.0001).sum() and hit.vector_rank is None
    vectors = model.encode([query, *(unit.code for unit in units)], ctx=64)
    cosines = vectors[1:].astype(np.float16).astype(np.float32) @ vectors[0]
    fused = sum((scores - scores.mean()) / scores.std() for scores in (cosines, words))
    hits = codessm.search(query, ".", model, k=len(units))
    assert [(hit.path, hit.first) for hit in hits[:5]] == [units[i][:2] for i in np.argsort(-fused)[:5]]
    assert len(hits) == len(units)
    for hit in hits:
        i = [unit[:2] for unit in units].index((hit.path, hit.first))
        assert hit.score == pytest.approx(fused[i], abs=0.05)
        assert hit.vector_rank == 1 + (cosines > cosines[i] + 1e-6).sum() and (hit.word_rank is None) == (words[i] == 0)


def test_a_query_is_words_and_no_syntax(tree):
    assert found('"number_3" AND (NEAR* -tree:') == found("number 3 and near tree")
    assert found("?!") == [] and found("HTTPServerError") == []
    assert data.search_words("HTTPServer2 parse_isoDate, Été_X __init__") == [
        "http", "server", "2", "parse", "iso", "date", "été", "x", "init"]


def test_the_index_follows_the_files(tree, model, monkeypatch):
    """Whatever happens to files, an index answers as a new one does, and encodes new content alone."""
    query, texts, original = "add number 3 return", [], tasks.Objective.encode
    monkeypatch.setattr(tasks.Objective, "encode", lambda self, codes, *rest, **more: (
        texts.extend(codes), original(self, codes, *rest, **more))[1])

    def encoded(action, *args):
        action(*args)
        texts.clear()
        hits = found(query, model=model)
        new = texts[:-1]  # the last is the query
        assert hits == found_anew(query, model)
        return new

    assert len(encoded(lambda: None)) == sum(map(len, UNITS.values())) + 10
    assert encoded(lambda: None) == encoded(os.utime, "a.c") == []
    assert encoded(os.rename, "a.c", "z.c") == [] and ("z.c", 8, "add") in found("add")
    assert encoded(shutil.copy, "z.c", "y.c") == []  # equal files are one
    for left in ("y.c", "z.c"):
        assert [path for path, *_ in found("licence")] == [left]
        assert encoded(os.remove, left) == []
    assert found("licence") == []
    changed = SOURCES["a.go"].replace("adds", "sums")
    assert encoded(Path("a.go").write_text, changed) == [unit.code for unit in cut_units(changed, "go")]
    for word in ("sums", "mums"):  # of the same size and time
        Path("a.go").write_text(changed.replace("sums", word))
        os.utime("a.go", (10**9, 10**9))
        assert [name for _, _, name in found(word)] == ["Add"]
    monkeypatch.setattr(tasks, "file_mark", lambda path: "the same")  # within the resolution of a file's times
    for word in ("sums", "mums"):
        Path("a.go").write_text(changed.replace("sums", word))
        assert [name for _, _, name in found(word)] == ["Add"]
    assert len(encoded(os.rename, "a.php", "php.js")) == 3 + 2  # and another language


def test_files_are_those_of_git(tree):
    """Those that it tracks or does not ignore, but no vendored ones; without git all but vendored and hidden ones."""
    def paths(*folder):
        return {path for path, *_ in found("a x return require", *folder)}

    others, everything = {"sub/h\n.go", ".ci/x.py"}, {*SOURCES, "digits.py"}
    Path("node_modules").mkdir()
    shutil.copy("a.js", "node_modules/n.js")
    assert paths() == everything
    subprocess.run(["git", "init", "-q"], check=True)
    Path(".gitignore").write_text("a.rb\n/sub/gen/\n")
    subprocess.run(["git", "add", "a.c", "-f", "a.rb", "node_modules"], check=True)
    for name in ("sub/gen/g.go", *others):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("def g(): return 5" if ".py" in name else "func g() {\n return 4\n}\n" + name)
    assert paths() == everything | others  # a.rb is tracked
    subprocess.run(["git", "rm", "-q", "--cached", "a.rb"], check=True)
    os.remove("a.c")  # git still names it
    assert paths() == everything - {"a.rb", "a.c"} | others
    assert paths("sub") == {"sub/h\n.go"} and paths("sub/gen") == {"sub/gen/g.go"}  # asked for by name
    says(0, r"sub/h\n.go:1: ", "search", "return", "sub")


def test_odd_files(tree, capfd):
    for name, content in {
            "latin.js": "function caf\xe9() {\n  return 1\n}\n".encode("latin-1"), "empty.py": b"", "nul.c": b"\0",
            "bom.c": b"\xef\xbb\xbfint caf(int a)\r\n{\r\n\treturn 1;\r\n}\r\n", "bad.py": b"def g(:\n  caf\n",
            "huge.js": b"caf;\n" * (1 << 18), os.fsdecode(b"\xff.py"): b"caf = '\\ud800'\n"}.items():
        Path(name).write_bytes(content)
    code, said = cli("search", "caf\xe9 caf", "-k", "99")
    assert code == 0 and {line.split(": ")[0] for line in said.splitlines() if ":1: " in line} == {
        "latin.js:1", "bom.c:1", "bad.py:1", "?.py:1"}
    assert "left out: NUL characters (" in said and "left out: over 1.0 MB (" in said
    assert "left out" not in cli("search", "caf")[1]


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"mine" * 999,
                                    lambda content: content[:100] + np.random.default_rng(0).bytes(9999)])
def test_a_damaged_index_is_made_anew(tree, model, capsys, damage):
    expected, (path,) = found("add number", model=model), index_files()
    path.write_bytes(damage(path.read_bytes()))
    assert found("add number", model=model) == expected
    assert "damaged or of another program" in capsys.readouterr().err
    assert found("add number", model=model) == expected and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["pooling", "encoder.norm.bias"])
def test_each_model_has_its_own_index(tree, model, name):
    """Whatever changes vectors: a weight of the encoder, or the weights of pooling alone."""
    found("add", model=model)
    changed = copy.deepcopy(model)
    changed.get_parameter(name).data[0] += 3
    found("add", model=changed)
    assert len(index_files()) == 2


def search_until(name, number, folder, cache, model):
    """In another process: a search that dies before call `number` of a function."""
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"], tasks.Index.CHUNK = cache, 8
    with before_call(tasks.Index if hasattr(tasks.Index, name) else data, name, number, die):
        codessm.search("add", ".", model)


@pytest.mark.parametrize("name, numbers", [("keep", (3, 1)), ("make_live", (1, 1)), ("search_words", (9, 9))])
def test_killed_while_indexing(tree, model, monkeypatch, name, numbers):
    """Before content is kept, before it becomes part of the index, and in the midst of that."""
    monkeypatch.setattr(tasks.Index, "CHUNK", 8)
    for number in numbers:  # without and with an index from before
        if index_files():
            found("add", model=model)
            Path("digits.py").write_text(DECADES.replace("number", "digit"))
            Path("a.c").unlink()
        process = forkserver.Process(target=search_until,
                                     args=(name, number, tree, os.environ["XDG_CACHE_HOME"], model))
        process.start()
        process.join(60)
        assert process.exitcode == -9
        query = "add number digit 3 return"
        assert found(query, model=model) == found_anew(query, model)


def test_what_was_encoded_before_the_end_is_kept(tree, model, monkeypatch):
    monkeypatch.setattr(tasks.Index, "CHUNK", 8)
    with before_call(tasks.Index, "make_live", 1, lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        codessm.search("add", ".", model)
    with before_call(tasks.Objective, "encode", 0, None) as calls:
        assert len(found("add", model=model)) > 20 and len(calls) == 1  # the query


def search_often(folder, cache, expected):
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = cache
    assert [found("number 3") for _ in range(5)] == [expected] * 5


def test_two_searches_at_once(tree):
    """Processes that make one index, of a tree that changes meanwhile."""
    arguments = tree, os.environ["XDG_CACHE_HOME"], found_anew("number 3")
    processes = [forkserver.Process(target=search_often, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        Path("other.c").write_text("int x" + str(time.time_ns()) + ";\n")
        time.sleep(0.05)
    assert [process.exitcode for process in processes] == [0] * 3


def test_without_fts5(tree, model, monkeypatch, capsys):
    monkeypatch.setattr(tasks.Index, "WORDS", "CREATE VIRTUAL TABLE words USING fts9 (text);")
    with pytest.raises(Problem, match="lacks FTS5"):
        found("add")
    hits = codessm.search("add", ".", model)
    assert "lacks FTS5" in capsys.readouterr().err
    assert [hit.vector_rank for hit in hits] == list(range(1, 11)) and {hit.word_rank for hit in hits} == {None}


def test_search_command(tree, model, tmp_path):
    tasks.save("../m.pt", model)
    code, said = cli("search", "number 3", "-k", 2)
    assert code == 0 and re.match(r"by BM25 of words alone: .*\ndigits\.py:16: \d+\.\d\d  number_3\n", said)
    code, said = cli("search", "number 3", "digits.py", "--ckpt", "../m.pt", "-k", 3, "--json")
    hits = [json.loads(line) for line in said.splitlines()]
    assert [hit["name"] for hit in hits][0] == "number_3" and hits[0]["last"] == 18 and len(hits) == 3
    assert hits[0].keys() == {"path", "first", "last", "name", "score", "word_rank", "vector_rank", "code"}
    code, said = cli("search", "-", "--ckpt", "../m.pt", "-k", 1, input="number 3\n\nnumber 4\n")
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(a["query"], [hit["name"] for hit in a["answers"]]) for a in answers] == [
        ("number 3", ["number_3"]), ("", []), ("number 4", ["number_4"])]
    objective = tasks.MLM(model.encoder, model.tokenizer)
    tasks.save("../mlm.pt", objective)
    says(0, "was not fine-tuned for retrieval", "search", "add", "--ckpt", "../mlm.pt")
    says(2, "QUERY is empty", "search", " ")
    says(2, "nowhere: no such file or folder", "search", "x", "nowhere")
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).glob("**/nowhere*"))
    Path("../docs").mkdir()
    says(2, "../docs: no source files", "search", "x", "../docs")
    says(0, "nothing found", "search", "xyzzy")


def test_queries_are_answered_as_they_come(tree):
    reader, writer = os.pipe()
    process = forkserver.Process(target=command, args=(tree, "search", "-", "-k", 1),
                                 kwargs=dict(stdin=f"/proc/{os.getpid()}/fd/{reader}"))
    process.start()
    for i in (3, 4):
        os.write(writer, f"number {i}\n".encode())
        for _ in range(1200):
            if Path("0.txt").exists() and f'"name": "number_{i}"' in Path("0.txt").read_text():
                break
            process.join(0.05)
        else:
            pytest.fail(Path("0.txt").read_text())
    os.close(writer)
    process.join(30)
    assert process.exitcode == 0


def test_an_index_that_cannot_be_written(tree, monkeypatch):
    Path("../file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree.parent / "file"))
    says(2, "XDG_CACHE_HOME chooses another place", "search", "add")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree.parent / "cache"))
    with before_call(tasks.Index, "keep", 1, lambda index, _: index.db.execute("PRAGMA query_only = 1")):
        says(1, "the index", "search", "add")


# ---- vectors and the Python interface ---------------------------------------------------------------

def test_encode_is_invariant(model, functions):
    texts = sorted((f["code"] for f in functions[:24]), key=len, reverse=True) + ["x", ""]
    vectors = model.encode(texts)
    assert vectors.shape == (26, 32) and vectors.dtype == np.float32
    for text, vector in zip(texts, vectors):
        ids = torch.tensor([[model.tokenizer.start, *model.tokenizer.encode(text), model.tokenizer.end]])
        with torch.no_grad():
            assert np.allclose(normalize(model.encoder(ids).mean(1), dim=-1)[0], vector, atol=1e-5)
    for batch in (1, 7):
        assert np.allclose(model.encode(texts[::-1], batch)[::-1], vectors, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "PIECE_TOKENS", 300)
        assert np.allclose(model.encode(texts), vectors, atol=1e-5)
    cut = model.encode(texts, ctx=16)
    assert not np.allclose(cut[0], vectors[0], atol=1e-3) and np.allclose(cut[-2:], vectors[-2:], atol=1e-5)
    assert model.encode([]).shape == (0, 32)


def test_encode_reads_little_padding(model, monkeypatch):
    """Of one text its own row alone, and a long text does not lengthen the rows of short ones."""
    shapes, to_tensors = [], tasks.to_tensors
    monkeypatch.setattr(tasks, "to_tensors", lambda arrays: shapes.append(arrays["ids"].shape) or to_tensors(arrays))
    monkeypatch.setattr(tasks, "PIECE_TOKENS", 512)
    texts = [f"x = {number}" for number in range(20)]
    model.encode(texts[:1])
    assert [rows for rows, _ in shapes] == [1]
    shapes.clear()
    model.encode([*texts, "x = 1\n" * 300])
    longest = len(model.tokenizer.encode("x = 1\n" * 300)) + 2
    assert longest <= sum(rows * length for rows, length in shapes) < longest + 20 * 16


def test_fill_mask(make_case):
    objective = make_case("mlm").objective.eval()
    tokenizer = objective.tokenizer
    best = objective.fill_mask("def add(a, b): return a <mask> b", k=tokenizer.vocab)
    ids = [tokenizer.start, *tokenizer.encode("def add(a, b): return a"), tokenizer.mask, *tokenizer.encode(" b"),
           tokenizer.end]
    with torch.no_grad():
        hidden = objective.encoder(torch.tensor([ids]))[0, ids.index(tokenizer.mask)]
        logits = objective.logits(hidden)
    logits[tokenizer.special.tolist()] = -math.inf
    order = logits.argsort(descending=True)[:len(tokenizer.ordinary)].tolist()
    assert [token for token, _ in best] == [tokenizer.model.decode([i]) for i in order]
    assert np.allclose([p for _, p in best], logits.softmax(-1)[order], atol=1e-6)
    for text in ("none", "<mask> <mask>"):
        with pytest.raises(Problem, match="one <mask>"):
            objective.fill_mask(text)
    with pytest.raises(Problem, match="a model for classify fills no masks"):
        make_case("classify").objective.fill_mask("a <mask>")
    with pytest.raises(Problem, match="fine-tune it first"):
        objective.predict(["x"])


def test_embed(tree, model, monkeypatch):
    """The vectors that `encode` gives, with what each is of; an interrupted run goes on."""
    command = ["embed", ".", "../r.jsonl", "--ckpt", "../m.pt", "-o", "../v.npy"]
    tasks.save("../m.pt", model)
    write_lines("../r.jsonl", [{"code": "def f(): return 1", "id": 7}, {"query": "the 1", "id": 8}])
    monkeypatch.setattr(tasks.Index, "CHUNK", 8)
    with before_call(tasks.Objective, "encode", 3, lambda *_: 1 / 0):
        says(1, "ZeroDivisionError", *command)
    assert not Path("../v.npy").exists() and not Path("../v.jsonl").exists()
    with before_call(tasks.Objective, "encode", 0, None) as calls:
        says(0, "going on from row 16 of", *command)
    rows, vectors, units = [json.loads(line) for line in open("../v.jsonl")], np.load("../v.npy"), units_here("./")
    assert len(calls) == -(-(len(units) + 2 - 16) // 8)
    assert rows == [{name: value for name, value in unit._asdict().items() if name != "code"} for unit in units] + [
        {"source": "../r.jsonl", "line": 1, "id": 7}, {"source": "../r.jsonl", "line": 2, "query": "the 1", "id": 8}]
    texts = [*(unit.code for unit in units), "def f(): return 1", "the 1"]
    assert vectors.dtype == np.float32 and np.allclose(vectors, model.encode(texts), atol=1e-5)
    assert not [name for name in os.listdir("..") if name.endswith(("part", "tmp"))]
    says(2, "v.npy exists: --restart", *command)
    says(0, [], *command, "--restart", "--float16", "--max-tokens", 16)
    half = np.load("../v.npy")
    assert half.dtype == np.float16 and np.allclose(half, model.encode(texts, ctx=16), atol=1e-3)
    write_lines("../bad.jsonl", [{"code": "def f(): return 1"}, "no JSON"])
    said = says(0, ["1 bad line passed over; the last is ../bad.jsonl:2: not JSON", "v.npy: 1 row of"], "embed",
                "../bad.jsonl", "--skip-bad", *command[3:], "--restart")
    assert said.count("passed over") == 1, "though it is read twice"
    for paths, output, message in ((["-"], "../w.npy", "only once"), ([], "../v", "ends in .npy"),
                                   (["../r.jsonl"], "../r.npy", "r.jsonl would be read and written")):
        says(2, message, "embed", *paths, "--ckpt", "../m.pt", "-o", output)
