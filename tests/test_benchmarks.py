"""The published formats, on a handful of hand-written rows each, and benchmarks made of source trees."""
import argparse
import ast
import csv
import gzip
import json
import os
import pickle
import re
import shutil
import symtable
import textwrap
import warnings
import zipfile
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pytest

import data
from conftest import says, write_lines
from data import Benchmark, Problem, obfuscate

FUNCTIONS = [f"int f(int a) {{ return a + {i % 38}; }}" for i in range(40)]  # the first two come again
PUBLISHED = {
    "devign": {"function.json": [{"commit_id": "1", "target": i % 2, "func": f} for i, f in enumerate(FUNCTIONS)],
               "*.txt": [str(i) for i in range(39, -1, -1)]},
    "clone": {"data.jsonl": [{"func": f, "idx": str(10 + i)} for i, f in enumerate(FUNCTIONS)],
              "*.txt": [f"{10 + i}\t{10 + i * 7 % 40}\t{i % 2}" for i in range(40)]},
    "complexity": {"*.jsonl": [{"src": f, "complexity": ["np", "logn"][i % 2]} for i, f in enumerate(FUNCTIONS)]},
    "advtest": {"*.jsonl": [{"docstring_tokens": ["t", str(i)], "code_tokens": ["f", str(i)], "url": f"u{i}",
                             "idx": 100 + i} for i in range(40)]},
    "sqa": {"corpus.jsonl": [{"_id": f"d{i}", "title": "T" * (i == 0), "text": f"answer {i}"} for i in range(40)],
            "queries.jsonl": [{"_id": f"q{i}", "text": f"question {i}"} for i in range(40)],
            "qrels/*.tsv": ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(40))]},
    "typeinf": {"*.jsonl": [{"tokens": ["f", "(", f"x{i}"], "labels": ["number", None, "Foo"]} for i in range(40)],
                "vocab_50000.txt": ["UNK", "any", "number", "Foo"]}}
PUBLISHED["stacksample"] = {  # latin-1, HTML, commas and line ends in quotes
    "Questions.csv": "Id,OwnerUserId,Score,Title,Body\n" + "".join(
        f'{i},5,1,Caf\xe9 {i}?,"<p>Why is\n<code>a &lt; b</code>, &amp; no <b>c</b> &eacute;"\n' for i in range(99)),
    "Answers.csv": "Id,OwnerUserId,ParentId,Score,Body\n" + "".join(
        f'{1000 * score + i},5,{i},{score},"<pre><code>x = {i}; s = {score}\ny</code></pre>"\n'
        for i in range(99) if i != 3 for score in (-1, 7, 2))}


def write(files, folder="d"):
    """Files by name, * standing for each split: text, an array of JSON, or lines, of JSON or text."""
    for pattern, content in files.items():
        for split in data.SPLITS if "*" in pattern else [""]:
            path = Path(folder, pattern.replace("*", split))
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str) or path.suffix == ".json":
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
            else:
                write_lines(path, content)


def texts(dataset, split):
    """The strings of each example of a split, of the data set as another rank gets it."""
    items = list(pickle.loads(pickle.dumps(dataset)).texts())
    return [tuple(items[item] for item in example) for example in dataset.splits[split].examples.tolist()]


def wrong(name, path="d", **options):
    """The message with which a benchmark is refused."""
    with pytest.raises(Problem) as caught:
        Benchmark(name, path, **options)
    assert caught.value.exit_code == 2
    return caught.value.message


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


GOOD = {"devign": {"func": "f", "target": 1}, "diversevul": {"func": "f", "target": 0},
        "classify": {"code": "f", "label": "a"}, "pair": {"code1": "a", "code2": "b", "label": True},
        "advtest": {"docstring": "x", "code": "f"}, "typeinf": {"tokens": ["a", "b"], "labels": ["x", "y"]},
        "tag": {"tokens": ["a", "b"], "labels": ["x", 1]}}


@pytest.mark.parametrize("name, file, content, said", [
    *((name, "valid.jsonl", [GOOD[name], row], [":2: ", *said]) for name, row, *said in [
        ("devign", {"target": 0}, 'no field "func"', "seen are: target"),
        ("devign", {"func": "f", "target": 2}, 'label "2"', "0, 1"),
        ("devign", {"func": "\n", "target": 1}, "empty"), ("devign", {"func": 5, "target": 1}, "number 5", "a string"),
        ("diversevul", {"func": "f", "target": 0.5}, '"target" is the number 0.5', "whole number"),
        ("classify", {"code": "f", "label": "c"}, 'label "c"', "trained on, which are a, b"),
        ("advtest", {"docstring": "x"}, '"code_tokens" or "function_tokens" or "code" or "function"'),
        ("advtest", {"docstring_tokens": [1], "code": "f"}, '"docstring_tokens"', "list of strings"),
        ("typeinf", {"tokens": ["a", "b"], "labels": ["x"]}, "2 tokens and 1 labels"),
        ("typeinf", {"tokens": "a", "labels": ["x"]}, '"tokens" is a string', "list of strings"),
        ("tag", {"tokens": [], "labels": []}, "empty"), ("tag", {"tokens": ["a"], "labels": ["UNK"]}, 'label "UNK"'),
        ("pair", {"code1": "a", "label": 1}, 'no field "code2" or "func2"')]),
    ("devign", "test.txt", ["3", "40"], [':2: "40"']),
    ("devign", "function.json", [{"func": "f", "target": 0}, {"func": " ", "target": 0}], [":2: the text"]),
    ("devign", "function.json", {"func": 1}, [": not JSON as published: no array"]),
    ("clone", "valid.txt", ["10\t14\t0", "10\t99\t1"], [":2: no function in data.jsonl has the idx 99"]),
    ("clone", "valid.txt", ["10\t14\t0", "10\t11"], [":2: 2 fields"]),
    ("clone", "valid.txt", ["10\t14\t0", "10\t11\t2"], [':2: the label "2"']),
    ("clone", "data.jsonl", [{"func": "f", "idx": "1"}, {"func": "g", "idx": 1}], [":2: the idx 1 "]),
    ("sqa", "qrels/test.tsv", ["q4\td1\t1", "q4\td99\t1"], [":2: no text in corpus.jsonl has the _id d99"]),
    ("sqa", "qrels/test.tsv", ["q4\td1\t1", "q4\td1\tnan"], [":2: not query-id, tab"]),
    ("typeinf", "vocab_50000.txt", ["number"], [":1: the first line of a vocabulary of types is UNK"]),
    ("typeinf", "vocab_50000.txt", ["UNK", "any", "T", "T"], [": 'T'"]),
    ("stacksample", "Answers.csv", 'Id,ParentId,Score,Body\n1,2,3,"open\n', [":2: unexpected end"]),
    ("stacksample", "Answers.csv", "Id,ParentId,Score,Body\n1,2,3\n", [":2: 3 columns"]),
    ("stacksample", "Answers.csv", "Id,ParentId,Body\n", [":1: no column Score"]),
    ("stacksample", "Answers.csv", "Id,ParentId,Score,Body\n1,2,x,y\n", [':2: the score "x"']),
    ("stacksample", "Questions.csv", 'Id,Title,Body\n1,,\"<p>\n</p>\"\n', [":3: the text"]),
    ("classify", "*.jsonl", [{"code": "a", "label": "x"}], ["same label, x: there is nothing to tell apart"]),
    ("tag", "*.jsonl", [{"tokens": ["a"], "labels": ["x"]}], ["label x alone: there is nothing to tell apart"]),
])
def test_broken_files(name, file, content, said):
    written = {"*.jsonl": [GOOD[name], {"code": "g", "label": "b"}] if name == "classify" else [GOOD[name]] * 2} \
        if file == "valid.jsonl" else PUBLISHED.get(name, {})
    write(written | {file: content})
    name = "sqa" if name == "stacksample" else name
    message = wrong(name)
    assert message.startswith(f"d/{file}{said[0]}" if said[0][0] == ":" else "d/") and all(s in message for s in said)
    if said[0].startswith(":2: ") and file.endswith(("valid.jsonl", "txt", "tsv")):
        dataset = Benchmark(name, "d", skip_bad=True)
        assert dataset.bad == 1 and len(dataset.splits[Path(file).stem].examples) == 1


def test_what_is_not_there_is_named():
    for name, task in data.TASKS.items():
        if name != "mlm":
            message = wrong(name, "nowhere")
            assert all(part in message for part in ("nowhere: no such", task.files, task.line, task.published))
    write({"train.jsonl": [{"func": "f", "target": 0}], "Questions.csv": "Id,Title,Body\n"})
    assert "no valid split" in wrong("devign") and "function.json with" in wrong("devign")
    assert "no test split" in wrong("devign", wanted=["test"], required=["test"])
    assert "d/Answers.csv: no such file" in wrong("sqa") and "corpus.jsonl" in wrong("sqa")
    for name, line in (
            ("sqa/data/corpus-00000-of-00001-1a.parquet", "to_json('corpus.jsonl', orient='records', lines=True)"),
            ("sqa-qrels/data/test-00000-of-00001.parquet", r"to_csv('qrels/test.tsv', sep='\t', index=False)")):
        (file := Path("coir", name)).parent.mkdir(parents=True)
        file.write_bytes(b"PAR1")
        assert f"pandas.read_parquet('{file}').{line}" in wrong("sqa", file.parts[0] + "/" + file.parts[1])
        with pytest.raises(Problem, match=f"{file} is Parquet"):
            data.find_sources([file.parent])


def test_labels_and_vocabularies(tokenizer):
    """Labels are names or whole numbers; types are those of the training split, the most frequent first."""
    write({"*.jsonl": [{"code": c, "label": label, "idx": 2 * c} for c, label in zip("abcd", [10, 9, True, "high"])]})
    dataset = Benchmark("classify", "d")
    assert dataset.labels == ["1", "9", "10", "high"] and texts(dataset, "test") == [("a",), ("b",), ("c",), ("d",)]
    assert [*dataset.splits["test"].labels] == [2, 1, 0, 3] and dataset.splits["test"].names == ["aa", "bb", "cc", "dd"]
    rows = [{"tokens": ["f", "(", "x"], "labels": ["T", None, "U"]}, {"tokens": ["y"], "labels": ["U"]}]
    write({"train0.jsonl": rows, "train1.jsonl": rows, "valid.jsonl": [{"tokens": ["y"], "labels": [None]}]}, "types")
    dataset = Benchmark("typeinf", "types")
    assert dataset.labels == ["UNK", "any", "U", "T"] and len(dataset.splits["train"].examples) == 4
    with pytest.raises(Problem, match="valid split has no labelled"):
        data.tokenise(dataset, tokenizer, 16, np.arange(dataset.count))
    write({"vocab_50000.txt": ["UNK", "any", "T", "Foo"]}, "types")
    assert Benchmark("typeinf", "types").labels == ["UNK", "any", "T", "Foo"]


def split_sets(*args, **options):
    """The examples of each split, each as a set of its texts."""
    dataset = Benchmark(*args, **options)
    return {split: set(map(frozenset, texts(dataset, split))) for split in dataset.splits}


def test_one_file_is_split_by_a_hash_of_the_code():
    rows = [{"func": f"int f{i}() {{}}", "target": i % 2} for i in range(2000)]
    pairs = [{"code1": f"f{i}", "code2": f"g{i}", "label": 1} for i in range(100)]
    swaps = [{"code1": pair["code2"], "code2": pair["code1"], "label": 1} for pair in pairs]
    write({"few.jsonl": rows[:1] * 3, "all.jsonl": rows[::-1], "copies.jsonl": rows[:40] * 10,
           "pairs.jsonl": pairs + swaps, "d/diversevul_20230702.json": "\n".join(map(json.dumps, rows))}, ".")
    found = split_sets("diversevul", "d")
    # four standard errors of 2,000 draws
    assert abs(len(found["train"]) - 1600) < 72 and abs(len(found["valid"]) - 200) < 54
    assert sum(map(len, found.values())) == 2000 and split_sets("diversevul", "all.jsonl") == found
    for name, path, count in (("diversevul", "copies.jsonl", 40), ("pair", "pairs.jsonl", 100)):
        sets = list(split_sets(name, path, required=[]).values())  # a copy, and a pair's swap, is in the same split
        assert sum(map(len, sets)) == count == len(set().union(*sets)) and len(sets) == 3
    assert "valid split" in wrong("diversevul", "few.jsonl")
    write({"more.jsonl": rows})
    assert "diversevul_20230702.json, more.jsonl" in wrong("diversevul")
    with gzip.open("d/train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:7])
    write({"valid.jsonl": rows[7:9]})
    assert {split: len(found) for split, found in split_sets("diversevul", "d").items()} == {"train": 7, "valid": 2}


@pytest.mark.parametrize("name, names, labels, equal", [
    ("devign", [*range(39, -1, -1)], [1, 0], 2), ("complexity", [*range(40)], [6, 1], 82),
    ("clone", [(f"{10 + i}", f"{10 + i * 7 % 40}") for i in range(40)], [0, 1], 2)])
def test_labelled_functions_as_published(name, names, labels, equal, tokenizer):
    """Equal ones are one item, which is tokenised and read once, and their number is said."""
    write(PUBLISHED[name])
    dataset = Benchmark(name, "d")
    split, tokens = dataset.splits["train"], []
    assert list(split.names) == names and split.labels.tolist() == labels * 20
    assert texts(dataset, "train") == [tuple(FUNCTIONS[int(i) - 10] for i in n) if name == "clone" else (FUNCTIONS[n],)
                                       for n in names]
    assert {source.name for source in dataset.sources} == {f"d/{file}" for file in os.listdir("d")}
    assert len(split.items()) == 38 and f"{equal} duplicate text" in dataset.description()
    store = data.tokenise(dataset, tokenizer, 64, split.items())
    for batch in data.Batches(store, tokenizer, 64, split.items()[:, None], 7):
        tokens += [ids[1:n - 1].tolist() for ids, n in zip(batch.ids, batch.lengths) if n]
    assert sorted(tokens) == sorted(map(tokenizer.encode, FUNCTIONS[:38]))


def test_advtest_takes_tokens_or_code_without_its_docstring():
    text, code, rest = "An area.", 'def area(r):\n    """An area."""\n    return r\n', "def area(r):\n    return r\n"
    rows = [  # a record, and what its text and its code are
        ({"docstring": text, "docstring_tokens": ["An", "area"], "code": code, "function": code,
          "code_tokens": ["def", "area", "(", "r", ")"]}, ("An area", "def area ( r )")),
        ({"docstring": text, "function_tokens": ["def", "f"], "code": code}, (text, "def f")),
        ({"docstring": text, "code": code}, (text, rest)), ({"docstring": "area", "code": rest}, ("area", rest)),
        ({"docstring_tokens": ["An", "area"], "function": textwrap.indent(code, " ")},
         ("An area", textwrap.indent(rest, " "))),
        ({"docstring": text, "code": code.replace("r\n", "`r`\n")}, (text, rest.replace("r\n", "`r`\n"))),  # Python 2
        ({"docstring": "x", "code_tokens": "def f"}, ("x", "def f"))]  # a string where a list is published
    write({"*.jsonl": [record | {"url": f"u{i}", "idx": 10 - i} for i, (record, _) in enumerate(rows)]})
    dataset = Benchmark("advtest", "d")
    split = dataset.splits["test"]
    assert sorted(texts(dataset, "test")) == sorted(expected for _, expected in rows)
    assert split.query_names == [f"u{i}" for i in range(7)] and split.candidate_names == [10, 9, 8, 6, 5]


def pairs_of(dataset, split):
    """Of a retrieval split: name of a query -> the texts that are right for it."""
    split, items, right = dataset.splits[split], list(dataset.texts()), {}
    for query, candidate in split.right.tolist():
        right.setdefault(split.query_names[query], []).append(items[split.candidates[candidate]])
    return right


def test_sqa_as_coir_and_as_kaggle_publishes_it():
    """Scores are numbers, and what is above 0 is right; what is said twice is so once. Candidates are all answers."""
    write(PUBLISHED["sqa"] | {
        "qrels/train.tsv": ["q0\td0\t1", "q1\td1\t1.0", "q1\td2\t2", "q2\td3\t0", "q2\td4\t0.0"], "qrels/dev.tsv": [
            "query-id\tcorpus-id\tscore", "q3\td3\t0.5"], "qrels/test.tsv": ["q4\td4\t1", "q4\td4\t1"]})
    os.remove("d/qrels/valid.tsv")
    dataset = Benchmark("sqa", "d")
    test = dataset.splits["test"]
    assert texts(dataset, "train") == [("question 0", "T\nanswer 0"), *(("question 1", f"answer {i}") for i in (1, 2))]
    assert pairs_of(dataset, "train") == {"q0": ["T\nanswer 0"], "q1": ["answer 1", "answer 2"]}
    assert pairs_of(dataset, "valid") == {"q3": ["answer 3"]} and pairs_of(dataset, "test") == {"q4": ["answer 4"]}
    assert len(test.queries) == len(test.right) == 1 and test.candidate_names == [f"d{i}" for i in range(40)]
    os.remove("d/qrels/dev.tsv")
    write({"qrels/train.tsv": [*PUBLISHED["sqa"]["qrels/*.tsv"], "bad"]})
    dataset = Benchmark("sqa", "d", skip_bad=True)
    names = {split: dataset.splits[split].query_names for split in ("train", "valid")}
    assert names["valid"] == [f"q{i}" for i in range(40) if data.seeded_split(f"q{i}") == "valid"] != []
    assert sorted(names["train"] + names["valid"]) == sorted(f"q{i}" for i in range(40))
    assert "a tenth of the training queries" in dataset.description() and dataset.bad == 1 and len(dataset.sources) == 4
    write(PUBLISHED["stacksample"], "csv")
    dataset = Benchmark("sqa", "csv", required=[])
    found = dict(pair for split in dataset.splits for pair in texts(dataset, split))
    assert len(found) == 98 and found["Caf\xe9 8?\nWhy is\na < b, & no c \xe9"] == "x = 8; s = 7\ny"  # the best one


@pytest.mark.parametrize("form", ["jsonl", "beir"])
def test_equal_questions_and_answers_are_one_item(form):
    """The same pairs in both formats: a is asked twice, and answered by x and by y, which both lie there twice.

    Candidates are all answers, whatever their split."""
    questions, answers, pairs = "abcaz", "xyxywxv", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (0, 0)]
    lines = [{"question": questions[q], "answer": answers[a]} for q, a in pairs]
    write({"train.jsonl": lines, "test.jsonl": [{"question": "q", "answer": "v"}]} if form == "jsonl" else {
        "queries.jsonl": [{"_id": i, "text": text} for i, text in enumerate(questions)],
        "corpus.jsonl": [{"_id": i, "text": text} for i, text in enumerate(answers)],
        "qrels/train.tsv": [f"{q}\t{a}\t1" for q, a in pairs], "qrels/valid.tsv": ["4\t4\t1"]})
    dataset = Benchmark("sqa", "d", wanted=["train"], required=["train"])
    split, items = dataset.splits["train"], list(dataset.texts())
    assert sorted(texts(dataset, "train")) == [("a", "x"), ("a", "y"), ("b", "y"), ("c", "x"), ("z", "w")]
    assert [items[i] for i in split.candidates] == ["x", "y", "w", "v"] and list(dataset.splits) == ["train"]
    assert list(map(int, split.candidate_names)) == [0, 1, 4, 6] and len(np.unique(split.examples)) == 7
    assert f"{len(items) - len(set(items))} duplicate text" in dataset.description()
    right = {0: ["x", "y"], 1: ["y"], 2: ["x"], 3: ["x", "y"], 4: ["w"]}
    right |= {5: ["x", "y"]} if form == "jsonl" else {}  # where each line is a query
    assert {int(name): answers for name, answers in pairs_of(dataset, "train").items()} == right


@pytest.mark.parametrize("ctx", [16, 33, 512])
def test_every_labelled_word_is_in_one_window(tokenizer, ctx):
    """Windows are cut greedily between words, which the brute force here does by definition."""
    rng, index = np.random.default_rng(0), {"UNK": 0, "T1": 1, "T2": 2}  # T0 is not known
    words = ["def", "longer_name_of_something", "(", ")", "x" * 300, "", "=", "1"]
    files = [([words[i] for i in rng.integers(0, len(words), n)],
              [f"T{rng.integers(3)}" if rng.random() < share else None for _ in range(n)])
             for n, share in ((1, 1), (5, 0.3), (2, 0), (60, 0.3), (200, 0.3))]
    write({"test.jsonl": [{"tokens": words, "labels": labels} for words, labels in files]})
    dataset = Benchmark("tag", "d", wanted=["test"], required=["test"], labels=list(index))
    expected = []
    for number, (words, labels) in enumerate(files):
        encoded, first = [tokenizer.encode(f" {word}")[:ctx - 2] for word in words], 0
        while first < len(words):
            last = first + 1
            while last < len(words) and sum(map(len, encoded[first:last + 1])) <= ctx - 2:
                last += 1
            tags = [[1 + sum(map(len, encoded[first:i])), index.get(labels[i], 0)]
                    for i in range(first, last) if labels[i]]
            expected += [(number, [tokenizer.start, *chain(*encoded[first:last])], tags)] * bool(tags)
            first = last
    assert sum(len(tags) for *_, tags in expected) == sum(label is not None for _, labels in files for label in labels)

    store, n = data.tokenise(dataset, tokenizer, ctx, dataset.splits["test"].items()), len(expected)
    assert [(store.files[i], store.ids[store.starts[i]:store.starts[i + 1]].tolist(),
             store.tags[store.tag_starts[i]:store.tag_starts[i + 1]].tolist()) for i in range(n)] == expected
    split, seen = dataset.splits["test"], {}  # of windows now
    assert split.examples.tolist() == [[i] for i in range(n)] and split.names == [number for number, _, _ in expected]
    for batch in data.Batches(store, tokenizer, ctx, split.examples, 3, seed=0):
        rows, columns = np.divmod(batch.places, batch.ids.shape[1])
        for row in np.flatnonzero(batch.lengths).tolist():
            window, ids, own = batch.items[row, 0], batch.ids[row, :batch.lengths[row]].tolist(), rows == row
            assert len(ids) <= ctx and ids.pop() == tokenizer.end
            seen[window] = split.names[window], ids, np.stack([columns[own], batch.targets[own]], 1).tolist()
    assert seen == dict(enumerate(expected))


# ---- obfuscation ------------------------------------------------------------------------------------

SCOPES = '''
def outer(self, first, /, second=DEFAULT, *rest, key: Type = None, **options) -> Type:
    """docstring with first and second"""
    global counter, tmp
    import os.path, json as js
    from sys import argv as arguments, path
    total = counter = first + second + undefined.total
    def inner(first, total=total, *, third):
        nonlocal_total = first; return inner(first=first, third=lambda third: third + total)
    class Local(Base, metaclass=first):
        size = second
        field: first = total
        def method(self): return self.total, total, Local, field
    def change():
        nonlocal total; total += 1; del total
    try:
        with open(first) as handle, js.load(handle): pass
    except (ValueError, first.Error) as error: raise error from None
    listed = [first for first in rest if (found := first) for second in first]
    match listed:
        case [one, *others] | {"a": one, **others}: print(one, others)
        case Point(x=first) as whole: return whole
    for i, (a, *b) in enumerate(options): i += a; b[i]: int = tmp
    print(f"{first} {total!r:>{second}}", found, path, arguments, os, self.first, key=key)
    async def later():
        async with first as c: return [x async for x in await c]
    return outer
'''


def tables(table):
    """A symbol table, as Python's compiler makes them, and those of the scopes inside it."""
    return [table, *chain(*map(tables, table.get_children()))]


def renamed(code, hidden):
    """old -> new name of each variable; the compiler must see the same scopes, and the same globals in them."""
    names, trees = {}, [ast.parse(code), ast.parse(hidden)]
    own, func = (tree.body[0].name for tree in trees)
    for one, two in zip_longest(*map(ast.walk, trees)):
        assert type(one) is type(two)
        for (_, a), (_, b) in zip(ast.iter_fields(one), ast.iter_fields(two)):
            pairs = [(a, b)] if isinstance(a, str) else zip(a, b) if isinstance(one, ast.Nonlocal) else []
            for old, new in pairs if one is not trees[0].body[0] else []:
                assert old == new or names.setdefault(old, new) == new
    assert len(set(names.values())) == len(names)
    imported = {alias.asname or alias.name.split(".")[0] for node in ast.walk(trees[0])
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    for one, two in zip_longest(*(tables(symtable.symtable(source, "x", "exec")) for source in (code, hidden))):
        assert one.get_type() == two.get_type()
        bound = {s.get_name() for s in one.get_symbols() if one.get_type() != "module" and not s.is_global()
                 and (s.is_free() or s.is_local() and one.get_type() != "class")}
        # every variable is renamed, unless an import binds it, and no attribute and no global but the function itself
        assert bound <= set(names) | imported | {".0", "__class__"}
        # (its own name is in no list: of a method it is a global's)
        expected = {names.get(name, name) if name in bound else name for name in one.get_identifiers()}
        through = set(names.values()) if one.get_type() == "class" else set()  # a variable on its way to a method
        assert not (expected ^ set(two.get_identifiers())) - through - {own, func}
    return names | {own: func}


def test_obfuscation_follows_scopes():
    hidden = obfuscate(SCOPES)
    for kept in ("undefined.total", "(first=", "third=lambda", "arg0.total", "Point(x=", "global counter, tmp",
                 ", key=", "import os.path, json as", "from sys import argv as", "docstring with first and second",
                 "Base, metaclass=", "-> Type", " counter =", " = tmp", ".Error", "arg0.first", ", field\n",
                 "        size = arg2\n        field: arg1 = arg6\n"):  # the last are attributes of the class
        assert kept in hidden, kept
    names = renamed(SCOPES, hidden)
    assert names["outer"] == "func" and names["first"] == "arg1" and not {"counter", "tmp", "path", "os"} & set(names)
    many = "def f():\n" + "".join(f"    v{i} = {i}\n" for i in range(4000))
    assert "    var3999 = 3999\n" in obfuscate(many)  # in seconds, not minutes


@pytest.mark.parametrize("code, hidden", [
    *((code, None) for code in [
        SCOPES.replace("size = second", "total = second"), "def f(a):\n    class A:\n        a = 1\n    return a\n",
        "def f(a):\n    def g():\n        global a\n    return a\n", "@a\ndef f(a): return a\n",
        "def f(a):\n    import a.b\n    return a\n",
        # the function's own name, which is a global's
        "def f(f=f): return f\n", "def f():\n    global f\n    f = 3\n",
        "def f(a):\n    class A: f = a\n    return A\n",
        "def f(a):\n    def h(f): return f\n    return lambda: f(a)\n"]),
    # a new name does not take that of a global
    ("def f(a):\n    return func(arg0, a)\n", "def func0(arg1):\n    return func(arg0, arg1)\n"),
    ("def f(arg1, arg0):\n    return arg0, arg1\n", "def func(arg0, arg1):\n    return arg1, arg0\n"),
    # a method's own name in its body is a global's
    ("def open(self):\n    return open(self)\n", "def func(arg0):\n    return open(arg0)\n"),
    ("def open(p):\n    return open(p)\n", "def func(arg0):\n    return func(arg0)\n"),
    ("@width.setter\ndef width(self): self.x = width\n", "@func.setter\ndef func(arg0): arg0.x = width\n"),
    ("def x(self, b):\n    x = b\n    return x\n", "def func(arg0, arg1):\n    var0 = arg1\n    return var0\n"),
    # what the compiler binds, and an escape that is none
    ("def f(a):\n    class A:\n        def g(b): return __class__\n",
     "def func(arg0):\n    class var0:\n        def g(arg1): return __class__\n"),
    ("def f(a):\n    return a, '\\d'\n", "def func(arg0):\n    return arg0, '\\d'\n"),
])
def test_obfuscation_to_the_letter(code, hidden):
    """None where a name is a variable in one scope and in another an attribute, a global or a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert obfuscate(code, bool(re.match(r"(@.*\n)?def \w+\(self", code))) == hidden


def test_obfuscation_of_real_code(functions):
    """Every variable that a function binds is renamed, and nothing else; of at most 1 % it cannot be."""
    found = []
    for record in functions:
        with suppress(SyntaxError):
            found.append((record["code"], obfuscate(record["code"], record.get("method", False))))
    for code, hidden in found:
        assert hidden is None or renamed(code, hidden) and hidden.count("\n") == code.count("\n")
    assert len(found) > 400 and sum(hidden is None for _, hidden in found) <= len(found) / 100


# ---- benchmarks of source trees ---------------------------------------------------------------------

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


def build(task, folder="out"):
    """The rows of each split of a benchmark that the command makes of d."""
    says(0, [], "corpus", "d", "--task", task, "-o", folder)
    return {split: [json.loads(line) for line in open(f"{folder}/{split}.jsonl")] for split in data.SPLITS}


def test_advtest_of_a_source_tree():
    function = "def f(a):\n    'An odd one first.'\n    {}\n    return b.odd\n\n\n"  # the second cannot be compiled
    write({"broken.py": "def f(:\n", "odd.py": "".join(map(function.format, ("b = a", "nonlocal __class__", "b = 1")))})
    for module in (argparse, ast, csv, gzip, json.decoder, pickle, shutil, symtable, textwrap, warnings, zipfile):
        shutil.copy(module.__file__, "d")
    shutil.copy(csv.__file__, "d/z.py")
    rows = build("advtest")
    assert all(rows.values()) and set(rows["test"][0]) == {"docstring", "code", "url", "idx"}
    files = {split: {row["url"].split("#")[0] for row in rows[split]} for split in rows}
    assert sum(map(len, files.values())) == len(set().union(*files.values()))
    for split in rows:
        for i, row in enumerate(rows[split]):
            function = ast.parse(row["code"]).body[0]
            assert row["idx"] == i and ast.get_docstring(function) is None and row["docstring"] not in row["code"]
            assert split == "train" or re.fullmatch(r"func\d*", function.name)
    codes = [row["code"] for split in rows.values() for row in split]
    assert len(set(codes)) == len(codes) > 100 and sum(".odd" in code for code in codes) == 2
    # the raw text of what is ranked is in no training file either
    raw = {obfuscate(row["code"], method) for row in rows["train"] for method in (False, True)}
    assert not raw & {row["code"] for split in ("valid", "test") for row in rows[split]}
    assert [len(s.queries) for s in Benchmark("advtest", "out").splits.values()] == [*map(len, rows.values())]
    assert build("advtest", "again") == rows


def test_typeinf_of_a_source_tree():
    """The same typed function in every file is left in one split alone, and cut out of the files of the others."""
    write({"broken.py": "def f(:\n"} | {f"m{i}.py": (
        f"n{i}: int = {i}\n\ndef area(radius: float) -> float:\n    return radius\n\n"
        f"class A:\n    def f{i}(self) -> str:\n        return self\n") for i in range(30)})
    shutil.copy("d/m0.py", "d/z0.py")
    rows, having = build("typeinf"), set()
    assert [len(rows[split]) for split in data.SPLITS] == [24, 3, 3]  # the copy is not there
    for split in rows:
        for row in rows[split]:
            assert set(row) == {"tokens", "labels", "path"} and "->" not in row["tokens"]
            i, types = row["path"][1:-3], dict(zip(row["tokens"], row["labels"], strict=True))
            assert types[f"n{i}"] == "int" and types[f"f{i}"] == "str"
            having |= {split} if "area" in row["tokens"] else set()
    assert having == {"train"}
    assert open("out/vocab_50000.txt").read().split() == ["UNK", "Any", "float", "int", "str"]
    assert Benchmark("typeinf", "out").labels == ["UNK", "Any", "float", "int", "str"]


def test_what_no_benchmark_can_be_made_of():
    write({"valid.jsonl": "mine\n", "m1.py": "x: int = 1\n"})
    for path, task, folder, message in (
            ("d", "typeinf", "d", "d/valid.jsonl exists"), ("d/m1.py", "typeinf", "out", "only 1"),
            ("d/valid.jsonl", "advtest", "out", "known are .py"), ("d", "advtest", "d/m1.py", "d/m1.py is no folder")):
        says(2, message, "corpus", path, "--task", task, "-o", folder)
    assert open("d/valid.jsonl").read() == "mine\n" and not os.path.exists("out")


def test_search_of_a_source_tree():
    """Docstring and function with its names; of other languages the comment directly above a function."""
    body = "(int a) {\n    a += 1;\n    return a;\n}\n"
    write({"broken.py": "def f(:\n",
           "a.c": f"// Adds one to\n// a number.\nint add{body}\n/* Not above. */\n\nint none{body}\n/**\n * Also adds "
                  f"one, fast.\n *\n * More.\n * @param a what\n */\nint also{body}\n#include <one.h>\nint g{body}",
           "b.go": "// Add adds a number.\n//\n// Twice.\nfunc (r *T) Add(a int) int {\n\ta++\n\treturn a\n}\n",
           "c.rb": "class C\n  # Says hello to all.\n  def hello(a)\n    puts a\n  end\nend\n"}
          | {f"m{i}.py": f"def f{i}(a):\n    '''Return a and {i}.\n\n    More.'''\n    b = a\n    return b, {i}\n"
             for i in range(9)})
    rows = [row for split in build("search").values() for row in split]
    found = {row["text"]: (row["code"], row["url"]) for row in rows}
    assert len(found) == len(rows) == 13 and all(row.keys() == {"text", "code", "url"} for row in rows)
    assert found["Adds one to a number."] == ("int add" + body, "a.c#L1")
    assert found["Also adds one, fast."] == ("int also" + body, "a.c#L15")
    assert found["Add adds a number."] == ("func (r *T) Add(a int) int {\n\ta++\n\treturn a\n}\n", "b.go#L1")
    assert found["Says hello to all."] == ("  def hello(a)\n    puts a\n  end\nend\n", "c.rb#L2")
    assert found["Return a and 3."] == ("def f3(a):\n    b = a\n    return b, 3", "m3.py#L1")
    splits = Benchmark("retrieval", "out").splits
    assert sum(len(split.queries) for split in splits.values()) == 13 and all(len(s.queries) for s in splits.values())
