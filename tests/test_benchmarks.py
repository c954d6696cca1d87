"""The published formats, on a handful of hand-written rows each, and benchmarks made of source trees."""
import ast
import csv
import gzip
import json
import os
import pickle
import re
import symtable
import textwrap
from itertools import zip_longest

import numpy as np
import pytest

import data
from conftest import cli, write_lines
from data import Problem, Reader

FUNCTIONS = ["int add(int a, int b) { return a + b; }", "void f() { free(p); free(p); }", "int g() { return 0; }",
             "char *h(char *s) { return strdup(s); }", "int i(int n) { while (n) n--; return n; }"]


def texts(split):
    """The strings of each example of a split."""
    return [tuple(split.texts(item) for item in items) for items in split.examples.tolist()]


def wrong(name, path="d", **options):
    with pytest.raises(Problem) as caught:
        Reader(name, path, **options)
    assert caught.value.exit_code == 2
    return caught.value.message


@pytest.fixture
def d(tmp_path, monkeypatch):
    """The folder d, in an empty one that is the current one."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("d")
    return tmp_path / "d"


def three(folder, rows, **parts):
    """{train,valid,test}.jsonl of the same rows, or of others where they are given."""
    for split in data.SPLITS:
        write_lines(folder / f"{split}.jsonl", parts.get(split, rows))


# ---- classification ---------------------------------------------------------------------------------

def test_devign_as_codexglue_publishes_it(d):
    rows = [{"project": "qemu", "commit_id": "1", "target": i % 2, "func": f} for i, f in enumerate(FUNCTIONS)]
    (d / "function.json").write_text(json.dumps(rows))
    for split, positions in (("train", [4, 0]), ("valid", [1]), ("test", [3, 2])):
        (d / f"{split}.txt").write_text("".join(f"{i}\n" for i in positions))
    reader = Reader("devign", "d")
    assert reader.labels == ["0", "1"]
    assert set(reader.sources) == {"d/function.json", *(f"d/{split}.txt" for split in data.SPLITS)}
    train, test = reader.splits["train"], reader.splits["test"]
    assert texts(train) == [(FUNCTIONS[4],), (FUNCTIONS[0],)] and train.labels.tolist() == [0, 0]
    assert [test.row(i)["idx"] for i in range(2)] == [3, 2] and test.labels.tolist() == [1, 0]

    (d / "test.txt").write_text("3\n5\n")
    assert wrong("devign") == 'd/test.txt:2: "5" is no position in d/function.json, 0 to 4'
    assert len(Reader("devign", "d", skip_bad=True).splits["test"]) == 1
    rows[3]["func"] = " "
    (d / "function.json").write_text(json.dumps(rows))
    assert wrong("devign") == "d/function.json:4: the code is empty"  # an element a line
    (d / "function.json").write_text('{"func": 1}')
    assert wrong("devign") == "d/function.json: not JSON as published: an object, not an array of functions"


def test_devign_as_jsonl(d):
    three(d, [{"func": f, "target": i % 2, "idx": 10 + i} for i, f in enumerate(FUNCTIONS)])
    test = Reader("devign", "d").splits["test"]
    assert texts(test) == [(f,) for f in FUNCTIONS] and test.labels.tolist() == [0, 1, 0, 1, 0]
    assert test.row(1)["idx"] == 11


@pytest.mark.parametrize("name, row, message", [
    ("devign", {"target": 0}, 'no field "func"; the fields seen are: target'),
    ("devign", {"func": "f"}, 'no field "target"; the fields seen are: func'),
    ("devign", {"func": "f", "target": 2}, 'the label "2" is none of those of the task, which are 0, 1'),
    ("diversevul", {"func": "f", "target": 0.5}, 'the label "target" is 0.5, not a name or a whole number'),
    ("devign", {"func": "\n", "target": 1}, "the code is empty"),
    ("devign", {"func": 5, "target": 1}, 'the field "func" is a number, not a string'),
    ("complexity", {"src": "f", "complexity": "exp"}, 'the label "exp" is none of those of the task, '
     "which are constant, logn, linear, nlogn, quadratic, cubic, np"),
    ("classify", {"code": "f", "label": "c"}, 'the label "c" is none of those trained on, which are a, b'),
    ("advtest", {"docstring": "x"}, 'no field "code_tokens" or "function_tokens" or "code" or '
     '"function"; the fields seen are: docstring'),
    ("advtest", {"docstring": "x", "code_tokens": "def f"}, None),
    ("advtest", {"docstring": "x", "code_tokens": []}, "the code is empty"),
    ("advtest", {"docstring_tokens": [1], "code": "f"}, 'the field "docstring_tokens" is no list of strings'),
    ("typeinf", {"tokens": ["a", "b"], "labels": ["x"]}, "2 tokens and 1 labels: there must be one for "
     "each, or null"),
    ("typeinf", {"tokens": "a", "labels": ["x"]}, 'the field "tokens" is no list of strings'),
    ("typeinf", {"tokens": ["a"]}, 'no field "labels"; the fields seen are: tokens'),
    ("tag", {"tokens": [], "labels": []}, "the list of tokens is empty"),
    ("pair", {"code1": "a", "label": 1}, 'no field "code2" or "func2"; the fields seen are: code1, label'),
    ("pair", {"code1": "a", "code2": "b", "label": 3}, 'the label "3" is none of those of the task, '
     "which are 0, 1"),
    ("sqa", {"question": "q"}, 'no field "answer"; the fields seen are: question'),
])
def test_broken_rows(d, name, row, message):
    good = {"devign": {"func": "f", "target": 1}, "diversevul": {"func": "f", "target": 0},
            "complexity": {"src": "f", "complexity": "np"}, "classify": {"code": "f", "label": "a"},
            "advtest": {"docstring": "x", "code": "f"}, "typeinf": {"tokens": ["a", "b"], "labels": ["x", "y"]},
            "tag": {"tokens": ["a", "b"], "labels": ["x", 1]}, "pair": {"code1": "a", "code2": "b", "label": True},
            "sqa": {"question": "q", "answer": "a"}}[name]
    other = {"classify": {"code": "g", "label": "b"}}.get(name, good)
    three(d, [good, other], valid=[good, row, good])
    if message is None:  # a string where a list of tokens is published
        assert len(Reader(name, "d").splits["valid"]) == 3
        return
    assert wrong(name) == f"d/valid.jsonl:2: {message}"
    reader = Reader(name, "d", skip_bad=True)
    assert reader.bad == 1 and len(reader.splits["valid"]) == 2


def test_labels_are_names_or_whole_numbers(d):
    three(d, [{"code": c, "label": label} for c, label in zip("abcd", [10, 9, True, "high"])])
    reader = Reader("classify", "d")
    assert reader.labels == ["1", "9", "10", "high"] and reader.splits["train"].labels.tolist() == [2, 1, 0, 3]
    three(d, [{"code": "a", "label": "x"}])
    assert wrong("classify") == ("d/train.jsonl, d/valid.jsonl, d/test.jsonl: all examples have the same label, x: "
                                 "there is nothing to tell apart")


def test_one_file_is_split_by_a_hash_of_the_code(d):
    rows = [{"func": f"int f{i}() {{}}", "target": i % 2} for i in range(2000)]
    write_lines(d / "diversevul_20230702.json", rows)
    reader = Reader("diversevul", "d")
    counts = [len(reader.splits[split]) for split in data.SPLITS]
    # four standard errors of 2,000 draws
    assert sum(counts) == 2000 and abs(counts[0] - 1600) < 72 and abs(counts[1] - 200) < 54
    names = {split: set(texts(reader.splits[split])) for split in data.SPLITS}
    write_lines("few.jsonl", [rows[0]] * 3)
    assert wrong("diversevul", "few.jsonl") == \
        "few.jsonl: none of its records falls into the valid split, a tenth of them: give more"
    write_lines("other.jsonl", rows[::-1])
    again = Reader("diversevul", "other.jsonl")
    assert {split: set(texts(again.splits[split])) for split in data.SPLITS} == names
    write_lines(d / "more.jsonl", rows)
    assert wrong("diversevul").startswith("d: no train.jsonl there, and more than one other file: "
                                          "diversevul_20230702.json, more.jsonl; diversevul is read from")
    with gzip.open(d / "train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[:7]))
    write_lines(d / "valid.jsonl", rows[7:9])
    reader = Reader("diversevul", "d")
    assert {split: len(s) for split, s in reader.splits.items()} == {"train": 7, "valid": 2}


def test_what_is_not_there_is_named(d):
    assert wrong("complexity", "nowhere") == (
        "nowhere: no such file or folder; complexity is read from train.jsonl, valid.jsonl and test.jsonl, or one "
        'file, split 80/10/10, a line of JSONL being like {"src": "int f() {...}", "complexity": "linear"}. It is '
        "published at https://huggingface.co/datasets/codeparrot/codecomplex")
    for name in data.TASKS:
        task = data.TASKS[name]
        for part in (task.files, task.line, task.published):
            assert part in wrong(name)
    write_lines(d / "train.jsonl", [{"func": "f", "target": 0}])
    assert wrong("devign").startswith("d: there is no valid split; devign is read from function.json with")
    assert wrong("devign", wanted=["test"], required=["test"]).startswith("d: there is no test split")


# ---- retrieval --------------------------------------------------------------------------------------

CODE = 'def area(r):\n    """The area of a circle."""\n    return 3.14 * r * r\n'


def test_advtest_takes_tokens_or_code_without_its_docstring(d):
    three(d, [
        {"docstring": "The area of a circle.", "docstring_tokens": ["The", "area"], "code": CODE, "function": CODE,
         "code_tokens": ["def", "area", "(", "r", ")"], "url": "u0", "idx": 7},
        {"docstring": "The area of a circle.", "function_tokens": ["def", "f"], "code": CODE, "url": "u1", "idx": 8},
        {"docstring": "The area of a circle.", "code": CODE, "url": "u2", "idx": 9},
        {"docstring_tokens": ["The", "area", "of"], "function": textwrap.indent(CODE, "    "), "url": "u3", "idx": 10},
        {"docstring": "The area of a circle.", "code": CODE.replace("return 3.14", "print r; return"), "url": "u4",
         "idx": 1},
        {"docstring": "area", "code": "def area(r): return area(r, 'area')", "url": "u5", "idx": 2}])
    split = Reader("advtest", "d").splits["test"]
    rest = "def area(r):\n    return 3.14 * r * r\n"
    assert texts(split) == [
        ("The area", "def area ( r )"), ("The area of a circle.", "def f"), ("The area of a circle.", rest),
        ("The area of", rest), ("The area of a circle.", rest.replace("return 3.14", "print r; return")),
        ("area", "def area(r): return area(r, 'area')")]
    assert split.query.tolist() == split.gold.tolist() == list(range(6)) and len(split.candidates) == 6
    assert split.examples[2, 1] == split.examples[3, 1] and split.row(0)["url"] == "u0"
    assert split.candidate(0)["idx"] == 7


def test_only_the_docstring_that_the_text_is_from_is_cut():
    """What stands around the function stays, and so does another docstring."""
    docstring = '        """Add  two\n        numbers."""\n'
    code = 'import os\nK = 3\n\nclass A:\n    """A class."""\n    def f(a, b):\n' + docstring + \
           "        return a + b + K\n\nprint('Add one number.')\n"
    cut = code.replace(docstring, "")
    assert data.without_docstring("Add two numbers .", code) == cut
    assert data.without_docstring("Add one number.", code) == code
    old = code.replace("print(", "print ").replace(")\n", "\n")  # Python 2
    with pytest.raises(SyntaxError):
        ast.parse(old)
    assert data.without_docstring("Add two numbers .", old) == old.replace(docstring, "")
    for before, after in (
            ('@foo(\n    "a",\n    "b")\ndef f():\n    """Split by newline."""\n    print x\n',
             '@foo(\n    "a",\n    "b")\ndef f():\n    print x\n'),
            ('def f(s):\n    """Split by newline."""  # noqa\n    print s\n    y = "a"\n    return y',
             'def f(s):\n    print s\n    y = "a"\n    return y'),
            ("def f(s):  # f\n\n    'Split by newline.'\n    print s\n", "def f(s):  # f\n\n    print s\n"),
            ("def f(s):\n    'Split by newline.'; print s\n", "def f(s):\n    'Split by newline.'; print s\n")):
        assert data.without_docstring("Split by newline.", before).replace("\n\n", "\n") == after.replace("\n\n", "\n")
    escaped = 'def f(s):\n    """Split by \\n newline."""\n    return s\n'
    for text in ("Split by \n newline.", "Split by \\n newline."):  # its value, and as it is spelt
        assert data.without_docstring(text, escaped) == "def f(s):\n    return s\n"
    assert data.without_docstring("Only this.", 'def f():\n    "Only this."\n') == "def f():\n    pass\n"


def test_copies_of_a_function_are_in_one_split(d):
    rows = [{"func": f"int f{i % 40}() {{}}", "target": i % 2, "commit_id": i} for i in range(400)]
    write_lines(d / "diversevul.json", rows)
    found = {split: set(texts(s)) for split, s in Reader("diversevul", "d", required=[]).splits.items()}
    assert sum(map(len, found.values())) == 40 == len(set().union(*found.values())) and len(found) == 3


def test_a_pair_and_its_swap_are_in_one_split(d):
    pairs = [(f"f{i}", f"g{i}") for i in range(100)]
    write_lines(d / "all.jsonl", [{"code1": a, "code2": b, "label": 1} for a, b in pairs + [p[::-1] for p in pairs]])
    found = {split: {frozenset(pair) for pair in texts(s)} for split, s in Reader("pair", "d").splits.items()}
    assert sum(map(len, found.values())) == 100 and len(found) == 3


def test_candidates_of_sqa_are_all_answers(d):
    for split, n in (("train", 5), ("valid", 2), ("test", 3)):
        write_lines(d / f"{split}.jsonl", [{"question": f"{split} {i}", "answer": f"a {split} {i}"} for i in range(n)])
    split = Reader("sqa", "d", wanted=["test"], required=["test"]).splits["test"]
    ranked = [split.texts(item) for item in split.candidates]
    assert len(ranked) == 10 and [ranked[i] for i in split.gold] == ["a test 0", "a test 1", "a test 2"]
    assert [split.candidate(i)["answer"] for i in range(10)] == ranked and split.row(2)["question"] == "test 2"


def test_the_same_code_twice_is_one_item_and_two_candidates(d, tokenizer):
    three(d, [{"text": t, "code": c} for t, c in (("a", "x"), ("b", "y"), ("c", "x"))])
    split = Reader("retrieval", "d").splits["valid"]
    assert texts(split) == [("a", "x"), ("b", "y"), ("c", "x")] and len(set(split.examples[:, 0])) == 3
    assert len(split.candidates) == 3 and len(split.prepare(tokenizer, 16).distinct) == 5


def beir(folder):
    write_lines(folder / "corpus.jsonl",
                [{"_id": f"d{i}", "title": "T" * (i == 0), "text": f"answer {i}"} for i in range(6)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(5)])
    os.mkdir(folder / "qrels")
    for split, pairs in (("train", ["q0\td0\t1", "q1\td1\t1", "q1\td2\t2", "q2\td3\t0"]), ("valid", ["q3\td3\t1"]),
                         ("test", ["q4\td4\t1", "q4\td4\t1"])):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *pairs]) + "\n")


def test_sqa_as_coir_publishes_it(d):
    beir(d)
    reader = Reader("sqa", "d")
    train, test = reader.splits["train"], reader.splits["test"]
    assert texts(train) == [("question 0", "T\nanswer 0"), ("question 1", "answer 1"), ("question 1", "answer 2")]
    assert train.query.tolist() == [0, 1, 1] and train.gold.tolist() == [0, 1, 2]
    assert texts(test) == [("question 4", "answer 4")] and test.gold.tolist() == [4]
    assert [test.texts(i) for i in test.candidates] == ["T\nanswer 0", *(f"answer {i}" for i in range(1, 6))]
    assert test.row(0)["_id"] == "q4" and test.candidate(4)["_id"] == "d4"
    os.remove(d / "qrels" / "valid.tsv")
    pairs = "".join(f"q{i % 5}\td{i % 6}\t1\n" for i in range(30))
    (d / "qrels" / "train.tsv").write_text(pairs)
    reader = Reader("sqa", "d", required=["train"])
    assert "a tenth of the training queries" in reader.notes
    valid = {i for i in range(5) if data.seeded_split(f"q{i}") == "valid"}
    assert set(reader.splits["train"].examples[:, 0]) == set(range(5)) - valid and len(valid) < 5
    (d / "qrels" / "test.tsv").write_text("q4\td9\t1\n")
    assert wrong("sqa", required=["train"]) == "d/qrels/test.tsv:1: no text in corpus.jsonl has the _id d9"
    (d / "qrels" / "test.tsv").write_text("q4\td1\n")
    assert wrong("sqa", required=["train"]) == "d/qrels/test.tsv:1: not query-id, tab, corpus-id, tab, score"
    write_lines(d / "queries.jsonl", [{"_id": "q0", "text": " "}])
    assert wrong("sqa") == "d/queries.jsonl:1: the question is empty"


def test_sqa_as_kaggle_publishes_it(d):
    """Latin-1, HTML, commas and line ends in quotes; of the answers the best-scored one."""
    def write(name, rows):
        with open(d / name, "w", encoding="latin-1", newline="") as file:
            csv.writer(file).writerows(rows)

    ids = range(1, 101)
    write("Questions.csv", [["Id", "OwnerUserId", "Score", "Title", "Body"]] + [
        [i, 5, 1, f"Caf\xe9 {i}?", "<p>Why is\n<code>a &lt; b</code>, &amp; not <b>c</b> &eacute;?</p>"] for i in ids])
    write("Answers.csv", [["Id", "OwnerUserId", "ParentId", "Score", "Body"]] + [
        [1000 * score + i, 5, i, score, f"<pre><code>x = {i}; s = {score}\ny</code></pre>"]
        for i in ids if i != 3 for score in (-1, 7, 2)])
    reader = Reader("sqa", "d", required=[])
    assert reader.notes == "each question with its best-scored answer" and set(reader.splits) == set(data.SPLITS)
    found = dict(pair for split in reader.splits.values() for pair in texts(split))
    assert len(found) == 99
    assert found["Caf\xe9 8?\nWhy is\na < b, & not c \xe9?"] == "x = 8; s = 7\ny"
    (d / "Answers.csv").write_text('\xef\xbb\xbfId,ParentId,Score,Body\n1,2,3,"open\n', encoding="latin-1")
    assert wrong("sqa") == "d/Answers.csv:2: unexpected end of data"
    write("Answers.csv", [["Id", "ParentId", "Score", "Body"], [1, 2, 3]])
    assert wrong("sqa") == "d/Answers.csv:2: 3 columns, where the header has 4"
    write("Answers.csv", [["Id", "ParentId", "Body"]])
    assert wrong("sqa") == "d/Answers.csv:1: no column Score; the columns are Id, ParentId, Body"
    write("Answers.csv", [["Id", "ParentId", "Score", "Body"], [1, 1, 3, "x"]])
    write("Questions.csv", [["Id", "Title", "Body"], [1, "", "<p>\n</p>"]])
    assert wrong("sqa") == "d/Questions.csv:3: the question is empty"
    os.remove(d / "Answers.csv")
    assert wrong("sqa").startswith("d/Answers.csv: no such file; sqa is read from corpus.jsonl, queries.jsonl")


def test_worker_processes_can_be_spawned(d, tokenizer):
    """Where processes are not forked, what they read goes to them pickled."""
    beir(d)
    three(d, [{"tokens": ["a", "b"], "labels": ["x", "y"]}])
    write_lines(d / "data.jsonl", [{"func": f, "idx": i} for i, f in enumerate(FUNCTIONS)])
    (d / "function.json").write_text(json.dumps([{"func": f, "target": 1} for f in FUNCTIONS]))
    for name, line in (("clone", "0\t1\t1"), ("devign", "2")):
        (d / "train.txt").write_text(f"{line}\n")
        for task in (name, "sqa", "tag"):
            split = Reader(task, "d", required=["train"]).splits["train"].prepare(tokenizer, 32)
            batches = split.training(2, [32], 0)
            one, two = (b[0, 0][0] for b in (batches, pickle.loads(pickle.dumps(batches))))
            assert (one.ids == two.ids).all() and (one.labels is None) == (task == "tag")


# ---- pairs, tags ------------------------------------------------------------------------------------

def test_clone_as_codexglue_publishes_it(d):
    write_lines(d / "data.jsonl", [{"func": f, "idx": str(100 + i)} for i, f in enumerate(FUNCTIONS)])
    for split, lines in (("train", ["100\t101\t1", "101\t104\t0"]), ("valid", ["100\t100\t1"])):
        (d / f"{split}.txt").write_text("\n".join(lines) + "\n")
    reader = Reader("clone", "d")
    train = reader.splits["train"]
    assert texts(train) == [(FUNCTIONS[0], FUNCTIONS[1]), (FUNCTIONS[1], FUNCTIONS[4])]
    assert train.labels.tolist() == [1, 0]
    assert train.row(1) == {"idx1": "101", "idx2": "104"} and "test" not in reader.splits
    for line, message in (("100\t999\t1", "no function in data.jsonl has the idx 999"),
                          ("100\t101", "2 fields, where idx1, idx2 and label are expected"),
                          ("100\t101\t2", 'the label "2" is neither 0 nor 1')):
        (d / "valid.txt").write_text(f"100\t104\t0\n{line}\n")
        assert wrong("clone") == f"d/valid.txt:2: {message}"
        assert len(Reader("clone", "d", skip_bad=True).splits["valid"]) == 1
    write_lines(d / "data.jsonl", [{"func": "f", "idx": "1"}, {"func": "g", "idx": 1}])
    assert wrong("clone") == "d/data.jsonl:2: the idx 1 is there already"
    write_lines(d / "data.jsonl", [{"func": " ", "idx": "1"}])
    assert wrong("clone") == "d/data.jsonl:1: the code is empty"


def test_types_and_their_vocabulary(d):
    rows = [{"tokens": ["f", "(", "x", ")"], "labels": ["number", None, "string", None]},
            {"tokens": ["y"], "labels": ["string"]}]
    for name in ("train0", "train1", "valid"):
        write_lines(d / f"{name}.jsonl", rows)
    reader = Reader("typeinf", "d")
    assert reader.labels == ["UNK", "any", "string", "number"] and len(reader.splits["train"]) == 4
    (d / "vocab_50000.txt").write_text("UNK\nany\nnumber\nFoo\n")
    reader = Reader("typeinf", "d")
    assert reader.labels == ["UNK", "any", "number", "Foo"]
    assert reader.splits["valid"].index == {"UNK": 0, "any": 1, "number": 2, "Foo": 3}
    (d / "vocab_50000.txt").write_text("number\n")
    assert wrong("typeinf").startswith("d/vocab_50000.txt:1: the first line of a vocabulary of types is UNK")


def test_tags_that_there_is_nothing_to_tell_of(d):
    three(d, [{"tokens": ["a", "b"], "labels": ["x", None]}])
    assert "the training split has the label x alone: there is nothing to tell apart" in wrong("tag")
    three(d, [{"tokens": ["a"], "labels": ["UNK"]}])
    assert wrong("tag") == 'd/train.jsonl:1: the label "UNK" stands for what is not known: give it another name'


def test_every_labelled_word_is_in_one_window(tokenizer):
    rng = np.random.default_rng(0)
    words = ["def", "longer_name_of_something", "(", ")", "x" * 300, "", "=", "1"]
    files = []
    for n in (1, 5, 60, 200):
        labels = [None if rng.random() < 0.7 else f"T{rng.integers(3)}" for _ in range(n)]
        files.append(([words[i] for i in rng.integers(0, len(words), n)], labels))
    files.append((["no", "label"], [None, None]))
    index = {"UNK": 0, "T1": 1, "T2": 2}
    for ctx in (16, 33, 512):
        windows = data.Windows(files.__getitem__, range(5), tokenizer, ctx, index)
        found = [[] for _ in files]
        for i, (file, first, last) in enumerate(windows.spans.tolist()):
            ids, targets = windows(i)
            assert len(ids) == len(targets) <= ctx and ids[0] == tokenizer.start and ids[-1] == tokenizer.end
            # the target stands at the word's first sub-token
            at = 1
            for word, label in zip(*(part[first:last] for part in files[file])):
                encoded = tokenizer.encode(" " + word)[:ctx - 2]
                assert ids[at:at + len(encoded)] == encoded
                assert targets[at] == (data.IGNORE if label is None else index.get(label, 0))
                assert set(targets[at + 1:at + len(encoded)]) <= {data.IGNORE}
                at += len(encoded)
            assert at == len(ids) - 1
            found[file] += [target for target in targets if target != data.IGNORE]
        assert found == [[index.get(label, 0) for label in labels if label is not None] for _, labels in files]
        # greedy: a window and the next word would not have fitted
        for (file, first, last), (after, begin, _) in zip(windows.spans.tolist(), windows.spans[1:].tolist()):
            if file == after and last == begin:
                used = sum(len(tokenizer.encode(" " + word)[:ctx - 2]) for word in files[file][0][first:last + 1])
                assert used > ctx - 2


# ---- benchmarks of source trees ---------------------------------------------------------------------

SCOPES = '''
def outer(self, first, /, second=DEFAULT, *rest, key: Type = None, **options) -> Type:
    """docstring with first and second"""
    global counter, tmp
    import os.path, json as js
    from sys import argv as arguments, path
    total = counter = first + second + undefined.total
    def inner(first, total=total, *, third):
        nonlocal_total = first
        return inner(first=first, third=lambda third: third + total)
    class Local(Base, metaclass=first):
        total = second
        field: first = total
        def method(self):
            return self.total, total, Local, field
    def change():
        nonlocal total
        total += 1
        del total
    try:
        with open(first) as handle, js.load(handle): pass
    except (ValueError, first.Error) as error:
        raise error from None
    listed = [first for first in rest if (found := first) for second in first]
    match listed:
        case [one, *others] | {"a": one, **others}: print(one, others)
        case Point(x=first) as whole: return whole
        case _: pass
    for i, (a, *b) in enumerate(options): i += a; b[i]: int = tmp
    print(f"{first} {total!r:>{second}}", found, path, arguments, os, self.first, key=key)
    async def later():
        async with first as c: await c
        return [x async for x in c]
    return outer
'''


def tables(code):
    """The symbol tables of a function and of the scopes in it, as Python's compiler makes them."""
    waiting = [symtable.symtable(code, "x", "exec")]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        yield table


def renamed(code, hidden):
    """old -> new name of each variable; the compiler must see the same scopes, and the same globals in them."""
    names = {}
    for one, two in zip_longest(ast.walk(ast.parse(code)), ast.walk(ast.parse(hidden))):
        assert type(one) is type(two)
        for (_, a), (_, b) in zip(ast.iter_fields(one), ast.iter_fields(two)):
            pairs = [(a, b)] if isinstance(a, str) else zip(a, b) if isinstance(one, ast.Nonlocal) else []
            for old, new in pairs:
                assert old == new or names.setdefault(old, new) == new
    assert len(set(names.values())) == len(names)
    own = ast.parse(code).body[0].name
    imported = {alias.asname or alias.name.split(".")[0] for node in ast.walk(ast.parse(code))
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    for one, two in zip_longest(tables(code), tables(hidden)):
        assert one.get_type() == two.get_type()
        inside = one.get_type() != "module"
        bound = {s.get_name() for s in one.get_symbols() if inside and not s.is_global()
                 and (s.is_free() or s.is_local() and one.get_type() != "class")}
        # every variable is renamed, unless an import binds it, and no attribute and no global but the function itself
        assert bound <= set(names) | imported | {".0", "__class__"}
        # (its own name is in no list: of a method it is a global's)
        expected = {names.get(name, name) if name in bound else name for name in one.get_identifiers()}
        through = set(names.values()) if one.get_type() == "class" else set()  # a variable on its way to a method
        assert not (expected ^ set(two.get_identifiers())) - through - {own, names[own]}
    return names


def test_obfuscation_follows_scopes():
    hidden = data.obfuscate(SCOPES)
    for kept in ("undefined.total", "(first=", "third=lambda", "arg0.total", "Point(x=", "global counter, tmp",
                 ", key=", "import os.path, json as", "from sys import argv as", "docstring with first and second",
                 "Base, metaclass=", "-> Type", "DEFAULT", "ValueError", "print", " counter =", " = tmp", ".Error",
                 "arg0.first"):
        assert kept in hidden, kept
    assert "        total = arg2\n        field: arg1 = total\n" in hidden  # attributes of the class
    names = renamed(SCOPES, hidden)
    assert names["outer"] == "func" and names["first"] == "arg1" and not {"counter", "tmp", "path", "os"} & set(names)
    many = "def f():\n" + "".join(f"    v{i} = {i}\n" for i in range(4000))
    assert "    var3999 = 3999\n" in data.obfuscate(many)  # in seconds, not minutes
    assert data.obfuscate("def f(a):\n    import a.b\n    return a\n") is None
    assert {"found", "one", "others", "whole", "c", "x", "js", "arguments", "handle", "error"} <= set(names)


def test_obfuscation_of_real_code(functions):
    """Every variable that a function binds is renamed, and nothing else."""
    checked = 0
    for record in functions:
        try:
            ast.parse(record["code"])
        except SyntaxError:
            continue
        hidden = data.obfuscate(record["code"], record.get("method", False))
        assert hidden.count("\n") == record["code"].count("\n")
        checked += len(renamed(record["code"], hidden)) > 2
    assert checked > 200


def test_a_new_name_does_not_take_that_of_a_global():
    assert data.obfuscate("def f(a):\n    return func(arg0, a)\n") == "def func0(arg1):\n    return func(arg0, arg1)\n"
    assert data.obfuscate("def f(arg1, arg0):\n    return arg0, arg1\n") == \
        "def func(arg0, arg1):\n    return arg1, arg0\n"
    # a method's own name in its body is a global's
    assert data.obfuscate("def open(self):\n    return open(self)\n", method=True) == \
        "def func(arg0):\n    return open(arg0)\n"
    assert data.obfuscate("@width.setter\ndef width(self): self.x = width\n", method=True) == \
        "@func.setter\ndef func(arg0): arg0.x = width\n"
    assert data.obfuscate("def open(p):\n    return open(p)\n") == "def func(arg0):\n    return func(arg0)\n"


def test_types_leave_the_tokens():
    source = '''
import typing
x: int = 3  # a comment
class C:
    y: "Caf\xe9" = 1; self.z: (list[int]) = []
    def m(self, a: int, *b: dict[str, (int)], c: (int) = 5, d=(1)) -> typing.Optional[int]:
        """a docstring"""
        (q): int = 1; a[0]: int = 1; é: str; k: Callable[[int], str] = lambda q: (q)
async def f() -> None: return (x for x in {1: 2})
'''
    tokens, labels, functions = data.typed_tokens(source)
    assert [tokens[begin:begin + 3][-2:] for begin, _ in functions] == [["m", "("], ["def", "f"]]
    typed = {(token, label) for token, label in zip(tokens, labels) if label}
    assert typed == {("x", "int"), ("y", "'Caf\xe9'"), ("z", "list[int]"), ("a", "int"), ("b", "dict[str, int]"),
                     ("c", "int"), ("m", "typing.Optional[int]"), ("\xe9", "str"), ("k", "Callable[[int], str]"),
                     ("f", "None"), ("q", "int")}
    assert " ".join(tokens) == (
        "import typing x = 3 class C : y = 1 ; self . z = [ ] def m ( self , a , * b , c = 5 , d = ( 1 ) ) : "
        '"""a docstring""" ( q ) = 1 ; a [ 0 ] = 1 ; \xe9 ; k = lambda q : ( q ) '
        "async def f ( ) : return ( x for x in { 1 : 2 } )")


@pytest.fixture
def tree(d, functions):
    """Twelve files of real functions with their docstrings put back, and the first of them twice."""
    documented = [f for f in functions
                  if f["code"].startswith("def ") and not set('"\\') & set(f.get("docstring", '"'))]
    for i in range(12):
        body = "\n\n".join(re.sub(r":\n", f':\n    """{f["docstring"]}"""\n', f["code"], count=1)
                           for f in documented[5 * i:5 * i + 5] if re.match(r"def \w+\(.*\):\n", f["code"]))
        (d / f"m{i}.py").write_text(f"version: int = {i}\n\n{body}\n\ndef typed{i}(a: int) -> str:\n    return a\n")
    (d / "z0.py").write_text((d / "m0.py").read_text())
    (d / "broken.py").write_text("def f(:\n")
    return d


def test_advtest_of_a_source_tree(tree):
    code, said = cli("corpus", "d", "--task", "advtest", "-o", "out")
    assert code == 0, said
    rows = {split: [json.loads(line) for line in open(f"out/{split}.jsonl")] for split in data.SPLITS}
    assert all(rows.values()) and set(rows["test"][0]) == {"docstring", "code", "url", "idx"}
    files = {split: {row["url"].split("#")[0] for row in rows[split]} for split in rows}
    assert sum(map(len, files.values())) == len(set().union(*files.values()))
    for split in rows:
        for i, row in enumerate(rows[split]):
            function = ast.parse(row["code"]).body[0]
            assert row["idx"] == i and ast.get_docstring(function) is None and row["docstring"] not in row["code"]
            assert (function.name[:4] == "func") == (split != "train")
    everything = [row["code"] for split in rows.values() for row in split]
    assert len(set(everything)) == len(everything)
    # the raw text of what is ranked is in no training file either
    raw = {data.obfuscate(row["code"]) for row in rows["train"]}
    assert not raw & {row["code"] for split in ("valid", "test") for row in rows[split]}
    reader = Reader("advtest", "out")
    assert [len(reader.splits[split]) for split in rows] == list(map(len, rows.values()))
    assert cli("corpus", "d", "--task", "advtest", "-o", "again")[0] == 0
    for split in rows:
        assert open(f"out/{split}.jsonl").read() == open(f"again/{split}.jsonl").read()


def test_typeinf_of_a_source_tree(tree):
    code, said = cli("corpus", "d", "--task", "typeinf", "-o", "out")
    assert code == 0, said
    rows = {split: [json.loads(line) for line in open(f"out/{split}.jsonl")] for split in data.SPLITS}
    assert [len(rows[split]) for split in data.SPLITS] == [10, 1, 1]  # the copy is not there
    for split in rows.values():
        for row in split:
            i = row["path"][1:-3]
            assert row["labels"][row["tokens"].index(f"typed{i}")] == "str" and "->" not in row["tokens"]
    assert open("out/vocab_50000.txt").read().split() == ["UNK", "Any", "int", "str"]
    assert Reader("typeinf", "out").labels == ["UNK", "Any", "int", "str"]


def test_typeinf_has_no_function_on_two_sides(d):
    """The same typed function in every file is left in one split alone, and cut out of the files of the others."""
    for i in range(30):
        (d / f"m{i}.py").write_text(f"n{i}: int = {i}\n\ndef area(radius: float) -> float:\n    return radius\n\n"
                                    f"class A:\n    def f{i}(self) -> str:\n        return self\n")
    assert cli("corpus", "d", "--task", "typeinf", "-o", "out")[0] == 0
    having = set()
    for split in data.SPLITS:
        for line in open(f"out/{split}.jsonl"):
            row = json.loads(line)
            assert len(row["tokens"]) == len(row["labels"]) and set(row) == {"tokens", "labels", "path"}
            i = row["path"][1:-3]
            assert dict(zip(row["tokens"], row["labels"]))[f"n{i}"] == "int"
            assert dict(zip(row["tokens"], row["labels"]))[f"f{i}"] == "str"
            having |= {split} if "area" in row["tokens"] else set()
    assert having == {"train"}


def test_what_no_benchmark_can_be_made_of(tree):
    (tree / "valid.jsonl").write_text("mine\n")
    code, said = cli("corpus", "d", "--task", "typeinf", "-o", "d")
    assert code == 2 and "d/valid.jsonl exists: remove it, or give another -o" in said
    assert (tree / "valid.jsonl").read_text() == "mine\n"
    code, said = cli("corpus", "d/m1.py", "--task", "typeinf", "-o", "out")
    assert code == 2 and "only 1 files with something to learn (annotations): three splits need more" in said
    code, said = cli("corpus", "d/valid.jsonl", "--task", "advtest", "-o", "out")
    assert code == 2 and "no source files; known are .py .pyw" in said
    code, said = cli("corpus", "d", "--task", "advtest", "-o", "d/m1.py")
    assert code == 2 and "d/m1.py is no folder: give -o the name of one" in said
