"""Corpora, tokenizer, token store and batches."""
import bz2
import gzip
import io
import itertools
import json
import lzma
import math
import os
import random
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

import data
from conftest import cli, forkserver, peak, records_of, rows_of, says, write_lines
from data import Batches, Corpus, Problem, Sequence, Source, TokenStore, separate_docstring


def read(paths, **options):
    """(text, code) of every record, in order."""
    return list(Corpus(data.find_sources(paths), **options).texts())


# ---- what a line may be -----------------------------------------------------------------------------

@pytest.fixture
def parse(tmp_path):
    """(text, code) of one line, which is an object or as it is spelt."""
    return lambda record: read([write_lines(tmp_path / "line.jsonl", [record])])[0]


def test_lines(parse):
    for name in ("code", "content", "func_code_string", "whole_func_string", "func", "function", "src",
                 "original_string"):
        assert parse({"repo": "r", name: "x = 1"}) == ("", "x = 1")
    for name in ("docstring", "func_documentation_string", "nl", "doc", "query", "text"):
        assert parse({"code": "x = 1", name: "set x"}) == ("set x", "x = 1")
    assert parse({"src": "b", "code": "a", "text": "d", "docstring": "c"}) == ("c", "a")  # the first in this order
    assert parse({"code": None, "src": "b", "docstring": None, "nl": "n"}) == ("n", "b")
    assert parse({"text": "int x;"}) == ("", "int x;")  # text alone is code
    assert parse(b'{"code": "x = \\"\\ud800\\""}') == ("", 'x = "?"')  # a lone surrogate
    assert parse({"content": "<reponame>a/b<filename>c/d.py<gh_stars>10-100\nx = 1\n"}) == ("", "x = 1\n")  # StarCoder
    assert parse({"content": "<filename>d.py\nx = 1"}) == ("", "x = 1")
    assert parse({"content": "x = '<reponame>a'"}) == ("", "x = '<reponame>a'")


@pytest.mark.parametrize("line, message", [
    (b"nonsense", "not JSON: .* at column 1"), (b'{"code": "x"', "not JSON"), (b"[" * 100_000, "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"), (b'["code"]', "an array"), (b"3", "a number"), (b"null", "null"),
    (b'{"cod": "x", "lang": "py"}', "no field .* seen are: cod, lang"), (b"{}", "seen are: none"),
    (b'{"code": ["x"]}', '"code" is an array, not a string'), (b'{"code": 3}', '"code" is the number 3'),
    (b'{"content": null, "lang": "py"}', '"content" is null'), (b'{"code": " \\n"}', "the code is empty"),
    (b'{"code": "x", "docstring": {}}', '"docstring" is an object'),
    (b'{"code": "<filename>d.py\\n"}', "the code is empty"), (b'{"code": "\xff"}', "UTF-8 at byte 11"),
    (b'{"\\u001b[2J\\r": 1}', r"\\x1b\[2J\\r")])  # (control characters are escaped)
def test_bad_lines(parse, line, message):
    with pytest.raises(Problem, match=f"line.jsonl:1: .*{message}") as caught:
        parse(line)
    assert caught.value.exit_code == 2


DEF, RETURN = "def f():\n    ", "    return 1\n"


@pytest.mark.parametrize("text, code, expected", [
    ("Add one.", DEF + '"""Add one."""\n' + RETURN, ("Add one.", "def f():\n" + RETURN)),
    ("Add\n    one.", DEF + "'''\n    Add\n    one.\n    '''\n" + RETURN, ("Add\n    one.", "def f():\n" + RETURN)),
    ("Add.", DEF + 'r"""Add."""', ("Add.", "def f():\n    pass")),
    ("Add.", DEF + '"""Add."""  # noqa\n    # Nothing.\n', ("Add.", DEF + "pass  # noqa\n    # Nothing.\n")),
    ("Add.", DEF + '"""Add. \\""" and "more"."""\n' + RETURN, ("Add.", "def f():\n" + RETURN)),
    *((text, DEF + '"""Add \\n one."""\n' + RETURN, (text, "def f():\n" + RETURN))
      for text in ("Add \n one.", "Add \\n one.")),  # its value, and as it is spelt
    ("Add.", DEF + '"""Add."""  # noqa\n' + RETURN, ("Add.", DEF + "# noqa\n" + RETURN)),
    ("Add.", "def f():  # f\n\n    'Add.'\n    print x\n", ("Add.", "def f():  # f\n\n    print x\n")),
    ("Add.", '@foo(\n    "a",\n    "b")\ndef f():\n    """Add."""\n    print x\n',
     ("Add.", '@foo(\n    "a",\n    "b")\ndef f():\n    print x\n')),
    ("Add two.", 'class A:\n    """A class."""\n    def f():\n        """Add  two\n        ."""\n' + RETURN,
     ("Add two.", 'class A:\n    """A class."""\n    def f():\n' + RETURN)),
    ("Add one.", "x = 1", ("Add one.", "x = 1")), ("  ", "x = 1", ("", "x = 1")),
    *((text, code, ("", code)) for text, code in (
        ("Add one.", "# Add one.\nx += 1"), ("name", 'def f(d):\n    return d["name"]\n'), ("Hello", 'x = "Hello"\ny'),
        ("Add.", DEF + '"""Add.""" + """2"""\n' + RETURN), ("Add.", DEF + "'Add.' + '2'\n"),
        ("Add.", DEF + "'Add.'; print 1\n"),
        ("text", " " * 1_000_000 + "text" + " " * 1_000_000), ("text", DEF + " " * 100_000 + "text"),
        ("text", ':\n"""a""" x\n' * 50_000 + "text"), ("text", ":#" * 100_000 + "text"),
        ("text", ':\n"""' + "'''\"" * 100_000 + "text")))],
    ids=map(str, range(24)))
def test_a_text_that_the_code_repeats_appears_once(parse, text, code, expected):
    """In linear time."""
    start = time.perf_counter()
    assert separate_docstring(text, code) == parse({"code": code, "docstring": text}) == expected
    assert time.perf_counter() - start < 5


# ---- where a corpus may be --------------------------------------------------------------------------

A, B, C, D = (json.dumps({"code": f"{name} = 1"}).encode() for name in "abcd")
a, b, c, d = ([("", f"{name} = 1")] for name in "abcd")
LINES = A + b"\n\n" + B + b"\r\n  \n" + C
MANY = b"".join(b'{"code": "x = %d"}\n' % i for i in range(2000))


def archive(members):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_formats(tmp_path, monkeypatch):
    """Told by what is in a file, a pipe, or standard input, whatever it is called."""
    zipped = archive({"sub/1.jsonl": A, "sub/2.json.gz": gzip.compress(B + b"\n" + C), "notes.txt": "no", "e.json": "",
                      "__MACOSX/1.jsonl": "what macOS adds", ".hidden/1.jsonl": "x", "sub/.1.jsonl": "x"})
    os.mkfifo(tmp_path / "pipe")
    for content in (LINES, gzip.compress(LINES), gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]),
                    bz2.compress(LINES), lzma.compress(LINES), zipped):
        (tmp_path / "corpus").write_bytes(content)
        threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content], daemon=True).start()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        assert read([tmp_path / "corpus"]) == read([tmp_path / "pipe"]) == read(["-"]) == a + b + c
    assert [source.name.removeprefix(f"{tmp_path}/") for source in data.find_sources([tmp_path / "corpus"])] == [
        "corpus/sub/1.jsonl", "corpus/sub/2.json.gz", "corpus/e.json"]


def test_files_folders_globs_and_links(tmp_path):
    """Hidden files, those of macOS, empty ones and metrics logs are passed over; each file comes once."""
    root, first = tmp_path / "in", tmp_path / "in/1.jsonl"
    for name, line in {"1.jsonl": A, "2.json": B, "sub/3.jsonlines": C, "../out/d.jsonl": D, "empty.jsonl": b"",
                       "log.jsonl": b'{"step": 1, "loss": 2}', **dict.fromkeys(
                           ("notes.txt", ".hidden.jsonl", ".git/1.jsonl", "__MACOSX/1.jsonl"), b"x")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(line)
    assert read([root]) == read([first, root, f"{root}/./1.jsonl"]) == read([f"{root}/**/*.json*"]) == a + b + c
    assert read([root / "2.json", first]) == b + a and read([f"{root}/*.json*"]) == a + b
    for name, target in {"1.jsonl": first, "out": tmp_path / "out", "loop1": root, "loop2": root, "n.jsonl": "nowhere"
                         }.items():
        (root / "sub" / name).symlink_to(target)
    assert read([root]) == a + b + c + d


def damaged(content):
    return content[:200] + bytes(50) + content[250:]


@pytest.mark.parametrize("content, message", [
    (b"\x28\xb5\x2f\xfd" + MANY, "zstd -d"), (b"PAR1" + MANY, "read_parquet.*to_json"),
    (gzip.compress(MANY)[:-20], "not a whole file"), (damaged(gzip.compress(MANY)), "not a whole file"),
    (damaged(archive({"c.jsonl": MANY})), "not a whole file"),
    (bz2.compress(MANY)[:-20], "not a whole file"), (lzma.compress(MANY)[:-20], "not a whole file"),
    (archive({"notes.txt": "no corpus", ".a.jsonl": LINES}), "no file of JSON lines in this archive"),
    (gzip.compress((b" " * 99 + b"\n") * 100_000), "more than 100 times"),
    (bz2.compress(b"{" * 3_000_000) * 1000, "more than 100 times"),  # one line
], ids=["zstd", "parquet", "cut gzip", "bad gzip", "bad zip", "cut bzip2", "cut xz", "zip without", "gzip bomb",
        "bzip2 bomb"])
def test_files_that_are_refused(tmp_path, content, message):
    """In a folder too, and in a zip archive; a bomb long before all of it is unpacked."""
    (tmp_path / "c.jsonl.zst").write_bytes(content)
    (tmp_path / "c.zip").write_bytes(archive({"c.jsonl": content}))
    start = time.perf_counter()
    for name in ("c.jsonl.zst", "", "c.zip")[:2 if content.startswith(b"PK") else 3]:
        with pytest.raises(Problem, match=f"c.jsonl.*: .*{message}") as caught:
            Corpus(data.find_sources([tmp_path / name]), longest=1_000_000)
        assert caught.value.exit_code == 2 and len(caught.value.message) < 500
    assert time.perf_counter() - start < 5


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """In the middle of a pass, and before one of which the first record alone is wanted; not if it is only touched."""
    path = write_lines(tmp_path / "c.jsonl", [A, B, C])
    corpus = Corpus(data.find_sources([path]))
    texts = corpus.texts()
    assert next(texts) == next(corpus.select(np.array([0]))) == a[0]
    os.utime(path, (1, 1))
    assert len(list(corpus.texts())) == 3
    write_lines(path, [A, B, C.swapcase()])
    for texts in (texts, corpus.select(np.array([0]))):
        with pytest.raises(Problem, match="c.jsonl changed while it was being read") as caught:
            list(texts)
        assert caught.value.exit_code == 1


def test_a_byte_of_a_large_file_that_changes(tmp_path):
    """Its mark reads little of it and may be the same, but a pass over all of it finds out."""
    path = write_lines(tmp_path / "c.jsonl", [{"code": f"{i:09}" * 1000} for i in range(700)])
    corpus = Corpus(data.find_sources([path]))
    with open(path, "r+b") as file:
        file.seek(3_050_000)
        file.write(b"x")
    assert data.open_source(path).mark == corpus.sources[0].mark
    with pytest.raises(Problem, match="c.jsonl changed while it was being read"):
        list(corpus.texts())


def test_limit_fields_and_bad_lines(tmp_path):
    one = write_lines(tmp_path / "1.jsonl", [{"mine": str(i), "my_text": "t"} for i in range(5)])
    two = write_lines(tmp_path / "2.jsonl", [{"mine": str(i)} for i in range(5, 10)])
    records = read([one, two], code_field="mine", text_field="my_text", limit=2)
    assert records == [("t", "0"), ("t", "1"), ("", "5"), ("", "6")]
    path = write_lines(tmp_path / "c.jsonl", [A, "broken", {"code": "x" * 1000}, B])
    corpus = Corpus(data.find_sources([path]), skip_bad=True, longest=100)
    assert corpus.bad == 2 and [*corpus.texts()] == [*corpus.texts()] == a + b
    assert read([path], skip_bad=True, longest=100, limit=2) == a + b
    with pytest.raises(Problem, match=f"^{path}:2: not JSON"):
        Corpus(data.find_sources([path]))


def test_held_out_is_a_hash_of_the_line(tmp_path):
    records = [{"code": f"x = {i}"} for i in range(8000)]
    def held(records):
        corpus = Corpus(data.find_sources([write_lines(tmp_path / "c.jsonl", records)]))
        splits = {name: split.examples.ravel().tolist() for name, split in corpus.splits.items()}
        assert sorted(splits["train"] + splits["valid"]) == splits["test"] == list(range(len(records)))
        return {records[i]["code"] for i in splits["valid"]}
    whole = held(records)
    assert 50 < len(whole) < 110 and held(records[::-1]) == whole
    assert held(records[:4000]) | held(records[4000:]) == whole
    for count, least in ((2, 1), (20, 2), (200, 20), (1000, 32)):  # of a small corpus a tenth, at most 32
        assert len(held(records[:count])) == least
    assert held(records[:200][::-1]) == held(records[:200])


def peaks(path, text, count, code):
    """The peak memory of a process that reads, tokenises and orders `count` records, and then ten times as many."""
    data.IN_MEMORY, tokenizer, found = 0, data.Tokenizer(text), []
    for n in (count, 10 * count):
        write_lines(path, itertools.repeat(json.dumps({"code": code}), n))
        Path("/proc/self/clear_refs").write_text("5")  # forgets earlier peaks
        corpus = Corpus(data.find_sources([path]))
        store = data.tokenise(corpus, tokenizer, 32, corpus.items_read(None, 32, 0))
        Batches(store, tokenizer, 32, corpus.splits["train"].examples, 32, 0)[0]
        found.append(peak())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count, code", [(100, "x = 1\n" * 6000), (9000, "x = 1\n")], ids=["long", "many"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, count, code):
    """Ten times the records: a few numbers each, whatever the length of their texts (of long ones 32 MB in all)."""
    with forkserver.Pool(1) as process:
        few, many = process.apply(peaks, [str(tmp_path / "c.jsonl"), tokenizer.text, count, code])
    assert many - few < 100 * 9 * count + 4_000_000


# ---- the tokenizer ----------------------------------------------------------------------------------

SPECIALS = "<s>", "</s>", "<pad>", "<mask>"


def foreign(*special, words=("x", "=", "1", "?")):
    """A word-level tokenizer.json with the given special tokens, truncation and padding switched on."""
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[-1]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(special))
    model.enable_truncation(2)
    model.enable_padding(length=9)
    return model.to_str()


def test_special_tokens_by_either_name(tokenizer):
    """Where their names stand in code they are ordinary text."""
    for special, names in ((["<mask>", "</s>", "<pad>", "<s>"], ["<pad>", "<s>", "</s>", "<mask>"]),
                           (["[SEP]", "[PAD]", "[MASK]", "[CLS]", "[UNK]"], ["[PAD]", "[CLS]", "[SEP]", "[MASK]"])):
        found, x = data.Tokenizer(foreign(*special)), len(special)
        assert [special[i] for i in (found.pad, found.start, found.end, found.mask)] == names and found.vocab == x + 4
        assert [*found.special] == list(range(x)) and [*found.ordinary] == list(range(x, x + 4))
        assert found.encode("x = 1 x") == [x, x + 1, x + 2, x]  # neither cut nor padded
    string = "x = '<mask>' + '</s><pad>'"
    for copy in (tokenizer, tokenizer.__reduce__()[0](*tokenizer.__reduce__()[1])):
        ids = copy.encode(string)
        assert not set(ids) & set(copy.special.tolist()) and copy.model.decode(ids) == string


def test_a_folder_with_a_vocabulary_and_merges(tokenizer, tmp_path, functions):
    """As RoBERTa's is published, with <unk>; a tokenizer.json beside them is what is read."""
    tokenizer.model.model.save(str(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.model.get_vocab() | {"<unk>": 600}))
    found = data.load_tokenizer(str(tmp_path))
    assert found.vocab == 601 and found.special.tolist() == [*tokenizer.special, 600]
    codes = [function["code"] for function in functions] + ["x = '<mask>' + '</s>'", "é\t\n"]
    for copy in (found, data.Tokenizer(found.text)):
        assert copy.encode_many(codes) == tokenizer.encode_many(codes)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(Problem, match="merges.txt"):
        data.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(foreign(*SPECIALS))
    assert data.load_tokenizer(str(tmp_path)).vocab == 8


def test_training_is_reproducible_and_has_the_size_asked_for(corpus, tokenizer):
    assert tokenizer.vocab == 600 and data.train_tokenizer(corpus, 600).text == tokenizer.text
    part = data.train_tokenizer(corpus, 600, most=corpus.bytes // 2)
    assert part.text != tokenizer.text and part.text == data.train_tokenizer(corpus, 600, most=corpus.bytes // 2).text


def test_a_megabyte_without_a_break_takes_seconds(tmp_path):
    """In training and in use: it is cut after each 256 characters."""
    letters = "".join(random.Random(0).choices("abc", k=1_000_000))
    path = write_lines(tmp_path / "c.jsonl", [{"code": letters}, {"code": " " * 1_000_000 + "x"}, A])
    start = time.perf_counter()
    tokenizer = data.train_tokenizer(Corpus(data.find_sources([path])), 400)
    ids = tokenizer.encode(letters)
    assert time.perf_counter() - start < 20 and tokenizer.model.decode(ids) == letters
    assert ids == sum(tokenizer.encode_many(letters[i:i + 256] for i in range(0, len(letters), 256)), [])


def test_the_beginning_of_a_text_has_the_ids_of_the_whole(tokenizer):
    """A long text is cut before it is tokenised, which must not show: tried with the longest tokens."""
    longest = sorted(map(tokenizer.model.id_to_token, tokenizer.ordinary.tolist()), key=len)[-6:]
    words = [token.replace("Ġ", " ").replace("Ċ", "\n") for token in longest]
    words += ["self", " return", "é", "\n", " " * 9]
    strings = ["".join(random.Random(i).choices(words, k=i)) for i in range(400)]
    whole = tokenizer.encode_many(strings)
    for room in (1, 7, 30):
        assert [ids[:room] for ids in tokenizer.encode_many(strings, room)] == [ids[:room] for ids in whole]


# ---- the token store --------------------------------------------------------------------------------

class Texts(data.Dataset):
    """Texts in memory; `passes` counts how often they are read."""

    def __init__(self, *texts):
        self.items, self.sources, self.passes = texts, [Source("texts", "texts", "1")], 0
        self.count, self.bytes = len(texts), sum(map(len, texts))

    def texts(self):
        self.passes += 1
        return iter(self.items)


def ids_of(store):
    return [store.ids[begin:end].tolist() for begin, end in itertools.pairwise(store.starts.tolist())]


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """The path of a store of tokens, in a folder of its own; the tokens of small data sets too are then in files."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    return str(tmp_path / "model.pt.tokens")


def test_ids_are_those_of_the_whole_text(corpus, tokenizer, monkeypatch, on_disk):
    """In memory, in a file that is kept and in one that is not; the head, <s> text </s>, comes before the code."""
    wanted, records = np.arange(1, corpus.count, 3), list(corpus.texts())
    for ctx, whole in ((64, False), (64, True), (9, False)):
        expected, heads = [[] for _ in records], [0] * len(records)
        for i in wanted.tolist():
            text, code = map(tokenizer.encode, records[i])
            head = [tokenizer.start, *text[:ctx // 2 - 2], *([tokenizer.end] if text else [])]
            expected[i], heads[i] = (head + code)[:None if whole else ctx - 1], len(head)
        for path, memory in ((on_disk, 0), (on_disk, 0), (None, 0), ("no/where", 2 ** 30)):
            monkeypatch.setattr(data, "IN_MEMORY", memory)
            store = data.tokenise(corpus, tokenizer, ctx, wanted, whole, path)
            assert store.ids.dtype == np.uint16 and ids_of(store) == expected and store.heads.tolist() == heads
            assert store.lengths(wanted, ctx).tolist() == [min(ctx, len(expected[i]) + 1) for i in wanted]
            assert os.listdir(os.path.dirname(on_disk)) == ["model.pt.tokens"]


@pytest.mark.parametrize("entries, dtype", [(2 ** 16, np.uint16), (70_000, np.int32)])
def test_many_entries_and_empty_texts(on_disk, entries, dtype):
    """Ids above 65,535 need int32; of an empty text there is <s> alone."""
    words, last = [f"w{i}" for i in range(entries - 4)], entries - 1
    tokenizer = data.Tokenizer(foreign(*SPECIALS, words=words))
    texts = Texts("w0 w9", "", f"{words[-1]} w1 nonsense", "w2 " * 100)
    store = data.tokenise(texts, tokenizer, 10, np.arange(4), path=on_disk)
    assert store.ids.dtype == dtype and ids_of(store) == [[0, 4, 13], [0], [0, last, 5, last], [0] + [6] * 8]
    batch = Batches(store, tokenizer, 10, np.array([[1], [2]]), 3)[0]
    assert batch.ids[:, :5].tolist() == [[0, last, 5, last, 1], [0, 1, 2, 2, 2], [2] * 5]
    assert batch.lengths.tolist() == [5, 2, 0] and batch.ids.dtype == np.int32


def test_only_the_very_same_store_is_used_again(tokenizer, on_disk):
    """Not a damaged one, nor one of other settings or another data set."""
    texts = Texts("x = 1", "y = 2", "z = 3")
    options = dict(dataset=texts, tokenizer=tokenizer, ctx=16, wanted=np.array([0, 2]), path=on_disk)

    def built(**changes):
        before = texts.passes
        assert ids_of(data.tokenise(**options | changes))
        return texts.passes > before

    assert built() and not built()
    content = Path(on_disk).read_bytes()
    for broken in (content[:-1], content[:8], b"", bytes(100), b"[]" + (2).to_bytes(8, "little"),
                   b'["k", {}]' + (9).to_bytes(8, "little"), content + bytes(8)):
        Path(on_disk).write_bytes(broken)
        assert built() and not built() and Path(on_disk).read_bytes() == content
    for change in (dict(tokenizer=data.Tokenizer(foreign(*SPECIALS))), dict(ctx=17), dict(whole=True),
                   dict(wanted=np.array([0, 1])), dict(wanted=np.array([2]))):
        assert built(**change) and built()
    for name, value in dict(checksum=2, labels=["a"], reading={"a": 1}).items():
        setattr(texts, name, value)
        assert built() and not built()


def test_other_fields_are_another_corpus(tmp_path, tokenizer, on_disk):
    """Of as many records and characters, with the store of the one at the path of the other."""
    path = write_lines(tmp_path / "c.jsonl", [{"a": f"a{i}", "b": f"b{i}"} for i in range(9)])
    for name in "ab":
        corpus = Corpus(data.find_sources([path]), code_field=name)
        ids = ids_of(data.tokenise(corpus, tokenizer, 16, np.arange(9), path=on_disk))
        assert [tokenizer.model.decode(row[1:]) for row in ids] == [f"{name}{i}" for i in range(9)]


def same(one, two):
    return all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["mlm", "classify", "pair", "retrieval"])
def test_only_the_items_of_the_steps_are_tokenised(kind, functions, tokenizer, tmp_path, monkeypatch):
    """And the batches of these steps are those of the whole store."""
    monkeypatch.setattr(Batches, "POOL", 10)
    dataset = data.read_dataset(kind, [write_lines(tmp_path / "c.jsonl", rows_of(kind, functions))], ("train", "valid"))
    train, valid = dataset.splits["train"], set(dataset.splits["valid"].items().tolist())
    def batches(items):
        return Batches(data.tokenise(dataset, tokenizer, 64, items), tokenizer, 64, train.examples, 2, 5, train.labels)
    whole = batches(np.arange(dataset.count))
    for steps, pools in ((1, 1), (10, 1), (11, 2), (34, 4)):
        items = dataset.items_read(steps, 2, 5)
        assert valid <= set(items.tolist()) and len(items) <= len(valid) + pools * 20 * train.examples.shape[1]
        part = batches(items)
        assert all(same(part[i], whole[i]) for i in range(steps))
    for steps in (len(whole) + 1, None):
        assert set(dataset.items_read(steps, 2, 5).tolist()) == valid.union(train.examples.ravel().tolist())


# ---- batches ----------------------------------------------------------------------------------------

SPECIAL = SimpleNamespace(pad=0, start=1, end=2)
N, BATCH = 1234, 8
EPOCH = -(-N // BATCH)


def store_of(*sequences):
    """The store of (ids, length of the head) of each item."""
    TokenStore.write(file := io.BytesIO(), (Sequence(i, *parts) for i, parts in enumerate(sequences)), "", 600,
                     len(sequences))
    return TokenStore(np.frombuffer(file.getbuffer(), np.uint8))


@pytest.fixture(scope="module")
def batches():
    """Batches of 1,234 items of 3 to 64 ids, with labels, or of pairs of them."""
    lengths = np.random.default_rng(1).integers(2, 64, N).tolist()
    store = store_of(*(([1] + [i % 90 + 5] * (length - 1), 1) for i, length in enumerate(lengths)))
    examples = np.stack([np.arange(N), np.arange(N) * 7 % N], 1)
    return lambda seed=None, sides=1: Batches(store, SPECIAL, 64, examples[:, :sides], BATCH, seed,
                                              np.arange(N) % 5 if sides == 1 else None)


def real(batch):
    return batch.items[batch.lengths > 0, 0].tolist()


def test_static_lengths():
    """About four an octave, multiples of 8 but for ctx itself."""
    for ctx in (8, 9, 16, 100, 255, 256, 1000, 8192, 2 ** 20):
        lengths = data.static_lengths(ctx).tolist()
        assert lengths == sorted(set(lengths)) and lengths[-1] == ctx
        assert all(length % 8 == 0 for length in lengths[:-1]) and lengths[0] <= 24
        assert all(longer <= length * 1.25 + 8 for length, longer in itertools.pairwise(lengths))
        assert len(lengths) <= 4 * max(1, math.ceil(math.log2(ctx / 20)))


@pytest.mark.parametrize("sides", [1, 2])
def test_an_epoch_is_every_example_once(batches, sides):
    one = batches(0, sides)
    assert len(one) == EPOCH == len(list(one))
    for epoch in (0, 1):
        part = [one[epoch * EPOCH + i] for i in range(EPOCH)]
        assert sorted(itertools.chain(*map(real, part))) == list(range(N))
        for batch in part:
            filled = batch.lengths > 0
            assert batch.epoch == epoch and len(batch.ids) == BATCH
            assert sides == 2 or np.array_equal(batch.labels, np.where(filled, batch.items[:, 0] % 5, data.IGNORE))
            assert sides == 1 or np.array_equal(batch.items[filled, 1], batch.items[filled, 0] * 7 % N)
            parts = [(batch.ids, batch.lengths), (batch.ids2, batch.lengths2)][:sides]
            assert batch.tokens == sum(lengths.sum() for _, lengths in parts)
            for side, (ids, lengths) in enumerate(parts):
                assert ids.shape[1] == min(L for L in one.static if L >= lengths.max())
                for row, length, item in zip(ids, lengths, batch.items[:, side]):
                    assert not row[length:].any()
                    assert not length or row[:length].tolist() == [*one.store.sample(item, 63), SPECIAL.end]


def test_order_depends_on_seed_and_epoch(batches):
    """And so on where one starts; without a seed, as evaluations have it, it is by length."""
    one, two = ([batches(seed)[i] for i in range(2 * EPOCH + 9)] for seed in (0, 1))
    parts = one[:EPOCH], one[EPOCH:2 * EPOCH], two[:EPOCH]
    epochs = [{tuple(sorted(real(batch))) for batch in part} for part in parts]
    assert all(len(a & b) < EPOCH / 10 for a, b in itertools.combinations(epochs, 2))
    later = batches(0)
    for i in (2 * EPOCH + 8, 1, 49, 50, EPOCH - 1, EPOCH, EPOCH + 1, 0):
        assert same(later[i], one[i])
    lengths = np.concatenate([batch.lengths for batch in batches()])
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True) and np.count_nonzero(lengths) == N
    plain = batches(0, 2)  # of a pair with a label, which has no order, the longer side comes first
    pairs = Batches(plain.store, SPECIAL, 64, plain.examples, BATCH, 0, np.arange(N) % 2)
    assert np.array_equal(np.sort(pairs.examples, 1), np.sort(plain.examples, 1))
    assert all((batch.lengths >= batch.lengths2).all() for batch in pairs)


@pytest.mark.parametrize("sides, most", [(1, 0.11), (2, 0.2)])
def test_samples_of_like_length_are_batched_together(sides, most):
    """So that little of a batch is padding; of pairs sorted by the longer side alone a third would be."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 0.7, 400).astype(int) + 8, 512)
    store = store_of(*([[1] * (n - 1)] for n in lengths))
    batches = Batches(store, SPECIAL, 512, rng.integers(0, 400, (8000, sides)), 32, 0, np.arange(8000))
    tokens, places = np.sum([(b.tokens, b.ids.size + (b.ids2.size if sides > 1 else 0)) for b in batches], 0)
    assert 1 - tokens / places < most


def samples(tokenizer, text, code, ctx, seed=0):
    """The sample of a record by the epoch."""
    head = [tokenizer.start, *tokenizer.encode(text)[:ctx // 2 - 2], *([tokenizer.end] if text else [])]
    batches = Batches(store_of((head + tokenizer.encode(code), len(head))), tokenizer, ctx, np.array([[0]]), 1, seed)
    return lambda epoch=0: batches[epoch].ids[0, :batches[epoch].lengths[0]].tolist()


def test_samples_and_windows_of_long_code(tokenizer):
    """Code is read in the first epoch from its start, then from a place drawn from (seed, epoch, item)."""
    text, code, s, e = tokenizer.encode("add one"), tokenizer.encode("x += 1"), tokenizer.start, tokenizer.end
    assert samples(tokenizer, "add one", "x += 1", 64)() == [s, *text, e, *code, e]
    assert samples(tokenizer, "", "x += 1", 64)() == [s, *code, e]
    for ctx, epoch in itertools.product((8, 9, 64, 257), (0, 5)):  # a long text takes at most half
        ids = samples(tokenizer, "word " * 1000, "x = 1\n" * 1000, ctx)(epoch)
        assert len(ids) == ctx and ids[-1] == e and ctx // 2 - 1 <= ids.index(e) + 1 <= ctx / 2
    assert len(samples(tokenizer, "", (" " * 40 + "x\n") * 500, 32)(1)) == 32  # of very long tokens too
    code = "".join(f"name_{i} = {i * i}\n" for i in range(2000))
    of_epoch, starts = samples(tokenizer, "", code, 64, seed=3), set()
    assert of_epoch(0)[1:-1] == tokenizer.encode(code)[:62]
    for epoch in range(1, 60):
        ids = of_epoch(epoch)
        window = tokenizer.model.decode(ids[2:-2])  # a cut may split its first and last token
        assert len(ids) == 64 and window in code and ids == of_epoch(epoch)
        starts.add(code.index(window) * 8 // len(code))
    assert starts == set(range(8)) and samples(tokenizer, "", code, 64, seed=4)(1) != of_epoch(1)
    assert [store_of(([1, *range(10, 20)], 1)).sample(0, 5, place).tolist() for place in (0, 0.5, 1 - 1e-12)] == [
        [1, 10, 11, 12, 13], [1, 13, 14, 15, 16], [1, 16, 17, 18, 19]]


def test_draws_are_independent():
    """Of each other, for another seed, epoch, purpose, item or position."""
    items, positions = np.arange(300)[:, None], np.arange(400)[None]
    draws = data.draw(0, 0, items, positions, 1)
    for other in ((1, 0, items, positions, 1), (0, 1, items, positions, 1), (0, 0, items, positions, 2),
                  (0, 0, items + 1, positions, 1), (0, 0, items, positions + 1, 1)):
        assert abs(np.corrcoef(draws.ravel(), data.draw(*other).ravel())[0, 1]) < 0.01


# ---- corpora of source trees ------------------------------------------------------------------------

@pytest.mark.parametrize("source, line, docstring, code", [
    ('class K:\n    @property\n    def a(self):\n        """One-line."""  # why\n        return 1\n', 2, "One-line.",
     "@property\ndef a(self):\n      # why\n    return 1".replace("      #", "    #")),
    ('class K:\n    async def b(self):\n        """Ünï.\n\n        More.\n        """\n        def c(): return 2\n'
     "        return c\n", 2, "Ünï.\n\nMore.", "async def b(self):\n    def c(): return 2\n    return c"),
    ('if os:\n    def c(): "only a docstring"\n', 2, "only a docstring", "def c(): pass"),
    ('def d(): "x"; return 3\n', 1, "x", "def d(): return 3"),
    ("\ndef e(): return 4\n", 2, None, "def e(): return 4"),
    ("match os:\n    case 1:\n        def g(): return 5\n", 3, None, "def g(): return 5"),
    ("@(\n    property\n)\ndef h(): return 6\n", 1, None, "@(\n    property\n)\ndef h(): return 6")])
def test_python_functions(source, line, docstring, code):
    record, = data.python_functions(source)
    assert (record["line"], record.get("docstring"), record["code"]) == (line, docstring, code)


def test_source_trees(tmp_path, capsys):
    """Also with an escape that is a surrogate, a file name that is not UTF-8, and a pipe, which nobody waits for."""
    for name, content in {
        b"a.java": b"class A {}", b"b/c.go": b"package c", b"b/copy.java": b"class A {}", b"x.txt": b"no code",
        b"old.py": b"print 'two'\n", b"latin.py": "# -*- coding: latin-1 -*-\ndef f(): return 'é'\n".encode("latin-1"),
        b"bad.c": b"\xff", b"big.js": b"x" * (2 << 20), b"node_modules/n.js": b"n", b".git/h.py": b"def h(): pass",
        b"env/pyvenv.cfg": b"", b"env/e.py": b"def e(): pass", b"empty.rs": b" \n", b"old/bin/activate": b"",
        b"old/o.py": b"def o(): pass", b"b/vendor/v.go": b"package v", b"wide.cs": "class É {}".encode("utf-16"),
        b"wide.kts": "val x".encode("utf-16-le"), b"german.ts": b"<?xml version='1.0'?><TS/>", b"y.TXT": b"no code",
        b"\xff.py": b'def f():\n    "\\ud800"\n    return 1\n',
    }.items():
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.mkfifo(tmp_path / "pipe.py")
    assert {(r["path"], r["language"], r.get("docstring")): r["code"] for r in records_of(tmp_path)} == {
        ("a.java", "java", None): "class A {}", ("b/c.go", "go", None): "package c",
        ("old.py", "python", None): "print 'two'\n", ("wide.cs", "csharp", None): "class É {}",
        ("latin.py", "python", None): "def f(): return 'é'",
        ("?.py", "python", "?"): "def f():\n    return 1"}
    said = capsys.readouterr().err
    assert "6 records; 1 exact duplicate dropped" in said and "12 source files" in said
    for part in ("over 1.0 MB (big.js)", "not text in UTF-8 or its declared encoding (bad.c)", "empty (empty.rs)",
                 "NUL characters (wide.kts)", "XML (german.ts)"):
        assert f"1 left out: {part}" in said
    assert "not known as source: 2 .txt, " in said


def test_corpus_command(tmp_path):
    (tmp_path / "m.py").write_text("def f(): return 1\n")
    (tmp_path / "d").mkdir()
    source, target = tmp_path / "m.py", tmp_path / "c.jsonl"
    for options in ([], ["-o", target]):
        says(0, "1 record;", "corpus", source, *options)
    assert read([target]) == [("", "def f(): return 1")] and target.read_text() in cli("corpus", source)[1]
    for path, output, message in ((source, source, "m.py exists: remove it"), ("none", "c", "none: no such file"),
                                  ("d", "d", "d is a folder"), ("d", "c", "d: no source files; known are .c .h")):
        says(2, message, "corpus", tmp_path / path, "-o", tmp_path / output)
        assert not (tmp_path / "c").exists() and "def f" in source.read_text()


# ---- files and messages -----------------------------------------------------------------------------

def test_control_characters_are_escaped(capsys):
    """On standard error, as data may hold some."""
    data.info("a label: \x1b[31m")
    Problem("a\nb\x9bé").show()
    assert capsys.readouterr().err == "a label: \\x1b[31m\nError: a\\nb\\x9bé\n"
