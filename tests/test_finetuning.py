"""The fine-tuned objectives, their metrics, and `finetune`, `evaluate` and `predict` as a user has them."""
import itertools
import json
import os
import random
import re
import signal

import numpy as np
import pytest
import torch

import codessm
import data
import tasks
from codessm import Encoder
from conftest import TINY, Forked, cli, wait_for, write_lines
from data import Split

SCRATCH = ["--size", "tiny", "--vocab", "300", "--ctx", "32", "--workers", "0"]


# ---- metrics ----------------------------------------------------------------------------------------

def by_definition(gold, predicted, label):
    """(precision, recall, F1) of one class, from its counts."""
    tp = sum(g == p == label for g, p in zip(gold, predicted))
    said, are = predicted.count(label), gold.count(label)
    return tp / said if said else 0, tp / are if are else 0, 2 * tp / (said + are) if said + are else 0


def test_precision_recall_f1():
    rng = np.random.default_rng(0)
    for trial in range(200):
        n, k = rng.integers(1, 50), rng.integers(2, 6)
        gold, predicted = rng.integers(0, k, n).tolist(), rng.integers(-1, k + 2, n).tolist()
        if trial % 3 == 0:
            predicted = [int(rng.integers(0, k))] * n  # a constant, which may be absent from gold
        classes = sorted({*gold, *predicted})
        each = [by_definition(gold, predicted, c) for c in classes]
        for average, weights in (("macro", [1] * len(classes)), ("weighted", [gold.count(c) for c in classes])):
            found = tasks.precision_recall_f1(np.array(gold), np.array(predicted), average)
            expected = [sum(w * e[i] for w, e in zip(weights, each)) / sum(weights) for i in range(3)]
            assert np.allclose(found, expected, rtol=0, atol=1e-12)
        assert np.allclose(tasks.precision_recall_f1(np.array(gold), np.array(predicted), "binary"),
                           by_definition(gold, predicted, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gold, predicted, expected", [
    # values that seqeval 1.2.2 gives
    ([["string", "string", "number"]], [["string", "string", "number"]], 1.0),
    ([["string", "string", "number"]], [["string", "any", "number"]], 0.4),   # a run of equal types is one entity
    ([["Object", "number"]], [["Object", "any"]], 0.0),                        # types that begin with O are none
    ([["Element", "Element"]], [["Element", "number"]], 2 / 4),                # E ends a chunk each time
    ([["number"], ["number"]], [["number"], ["cumber"]], 1.0),                 # the first letter is no part of a type
    ([["T", "x"]], [["T", "x"]], 0.0),                                         # nor is a one-letter type closed by O
    ([["O"]], [["O"]], 0.0),
    ([["B-x", "B-x", "I-x", "K", "I-x"], ["Int", "B", "Int"]], [["B-x", "I-x", "I-x", "K", "B-x"], ["Int", "Int", "B"]],
     1 / 3),                                                                   # B and I mean what they do elsewhere
    ([["Bool", "Bool", "I", "S"]], [["Bool", "Bool", "I", "I"]], 4 / 7),
    (["S Observable -- Boolean".split(), "- Observable O Observable Observable string S Boolean".split(),
      "S S Observable Observable Observable String string Boolean - Observable Observable".split(),
      "O String String O Boolean -- S Observable".split()],
     ["string Observable -- Observable".split(), "S Observable O - Observable Observable S Boolean".split(),
      "S S string string -- String Observable Boolean String Observable -".split(),
      "Observable Observable Boolean O Boolean string - -".split()], 0.48484848484848486),
])
def test_f1_as_published(gold, predicted, expected):
    assert abs(tasks.f1_published(gold, predicted) - expected) < 1e-12


def test_ranks_are_those_of_a_full_sort(monkeypatch):
    """Brute force over float64 scores, ties and several right candidates among them; and in chunks of any size."""
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(23, 8), dim=-1)
    candidates = torch.nn.functional.normalize(torch.randn(150, 8), dim=-1)
    candidates[100:] = candidates[:50]  # ties, which count against the model
    candidates[0] = candidates[1] = queries[0]
    query = np.concatenate([np.arange(23), [3, 3, 7]])
    gold = np.concatenate([np.arange(23), [60, 100, 149]])
    scores = queries.double() @ candidates.double().T
    expected = []
    for q in range(23):
        right = set(gold[query == q].tolist())
        best = max(scores[q, i] for i in right)
        expected.append(1 + sum(int(scores[q, i] > best - tasks.TIE) for i in range(150) if i not in right))
    ranks, top = tasks.rank(queries, candidates, query, gold)
    assert ranks.tolist() == expected and expected[0] == 2 and min(expected) < max(expected)
    assert np.abs(np.take_along_axis(scores.numpy(), top, 1) + np.sort(-scores.numpy(), 1)[:, :100]).max() < 1e-6
    # a model that says the same of everything is last
    assert set(tasks.rank(torch.ones(2, 4), torch.ones(9, 4), np.arange(2), np.arange(2))[0]) == {9}
    # and so is one that says nothing
    nothing = torch.full((3, 4), torch.nan)
    assert set(tasks.rank(nothing, torch.ones(9, 4), np.arange(3), np.arange(3))[0]) == {9}
    for held in (1, 450, 1000):  # one query at a time, three, six
        monkeypatch.setattr(tasks, "SCORES", held)
        again, best = tasks.rank(queries, candidates, query, gold)
        assert again.tolist() == expected and best.shape == top.shape
        assert np.allclose(scores[range(23), best[:, 0]], scores.max(1)[0])


def tag_metrics(gold, predicted, labels, name="typeinf"):
    task = tasks.Tagging(Encoder(10, d=4, layers=1, N=2), None, name, labels, 32)
    return task.metrics([(np.array(g), np.array(p)) for g, p in zip(gold, predicted)], None)


def test_type_inference_metrics():
    labels = ["UNK", "any", *(f"t{i}" for i in range(150))]
    gold, predicted = [[0, 2, 3], [120, 1, 2]], [[0, 2, 4], [120, 1, 0]]
    found = tag_metrics(gold, predicted, labels)
    assert found["accuracy"] == 3 / 6  # UNK for UNK is wrong, and stays in the denominator
    # F1: UNK 0, any 1, t0 2/3 (one of two), t1 0, t118 1; weighted by how often each is gold
    assert abs(found["weighted_f1"] - (1 * 1 + 2 * (2 / 3) + 1) / 6) < 1e-12
    assert found["top100_accuracy"] == 1 / 3  # rows 2 to 101: t0, t1, t0
    assert abs(found["f1_published"] - 2 * 3 / 12) < 1e-12
    assert set(tag_metrics([[1]], [[1]], labels)) == {"accuracy", "weighted_f1", "f1_published"}
    assert not any("top100" in key for key in tag_metrics(gold, predicted, labels, "tag"))


# ---- objectives -------------------------------------------------------------------------------------

def encoder(tokenizer, d=16):
    torch.manual_seed(0)
    return Encoder(tokenizer.vocab, d=d, layers=2, N=4)


class Strings:
    def __init__(self, strings):
        self.strings = strings

    def __call__(self, item):
        return self.strings[item]


def functions_split(functions, tokenizer, n, k, **more):
    """A split of real functions, k of them an example."""
    rng = np.random.default_rng(0)
    split = Split(Strings([f["code"] for f in functions]), rng.integers(0, 40, (n, k)), rng.integers(0, 2, n), **more)
    return split.prepare(tokenizer, 64)


def test_pool_counts_real_tokens_only(tokenizer):
    model = encoder(tokenizer)
    ids = torch.randint(4, tokenizer.vocab, (3, 20))
    lengths = torch.tensor([20, 7, 0])
    found = tasks.pool(model, ids, lengths)
    for row, length in ((0, 20), (1, 7)):
        expected = model(ids[row:row + 1, :length])[0].mean(0)
        assert torch.allclose(found[row], expected, atol=1e-5)
    assert not found[2].any()


def test_a_pair_has_no_order(tokenizer, functions):
    split = functions_split(functions, tokenizer, 30, 2)
    task = tasks.Classification(encoder(tokenizer), tokenizer, "clone", ["0", "1"], 64).eval()
    for parameter in task.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    _, outputs = tasks.evaluate(task, split.each(8, [16, 64]), split)
    split.examples = split.examples[:, ::-1].copy()
    _, swapped = tasks.evaluate(task, split.each(8, [16, 64]), split)
    assert np.abs(outputs - swapped).max() < 1e-6 and outputs[:, 1].std() > 0.01
    # the same by hand, one pair at a time
    with torch.no_grad():
        a, b = (tasks.pool(task.encoder, *(torch.tensor(x) for x in ([ids], [len(ids)])))
                for ids in map(split.items, split.examples[0].tolist()))
        expected = task.head(torch.cat([a + b, (a - b).abs(), a * b], -1)).softmax(-1)
    assert np.abs(expected.numpy() - outputs[0]).max() < 1e-5


def test_pairs_are_batched_with_little_padding():
    """At most 20 % of what both sides are padded to; sorted by the longer side alone it is a third."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 0.7, 400).astype(int) + 8, 512)
    split = Split(None, rng.integers(0, 400, (8000, 2)), rng.integers(0, 2, 8000))
    split.items, split.pad = Filled(lengths), 0
    real = padded = 0
    for batch in split.training(32, data.choose_lengths(lengths, 512), 0).stream(0, 250):
        assert (batch.lengths >= batch.second[1]).all()
        for ids, counts in ((batch.ids, batch.lengths), batch.second):
            real, padded = real + counts.sum(), padded + ids.size
    assert 1 - real / padded < 0.2


class Filled:
    """Items of given lengths."""
    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, item, epoch=0):
        return [1] * self.lengths[item]


def test_each_distinct_function_is_encoded_once(tokenizer, functions, monkeypatch):
    split = functions_split(functions, tokenizer, 500, 2)
    task = tasks.Classification(encoder(tokenizer), tokenizer, "clone", ["0", "1"], 64)
    rows, pool = [], tasks.pool

    def counted(encoder, ids, lengths=None):
        rows.append(len(ids) if lengths is None else int((lengths > 0).sum()))
        return pool(encoder, ids, lengths)

    monkeypatch.setattr(tasks, "pool", counted)
    tasks.evaluate(task, split.each(16, [64]), split)
    assert sum(rows) == len(np.unique(split.examples)) == 40


def test_in_batch_negatives(tokenizer):
    """The cross-entropy of its definition, float64, without the same code as a negative and without empty rows."""
    task = tasks.Retrieval(encoder(tokenizer), tokenizer, "advtest", [], 32)
    torch.manual_seed(1)
    ids, ids2 = torch.randint(4, tokenizer.vocab, (2, 6, 12))
    ids[3] = ids[0]  # a query with two right answers
    lengths = torch.tensor([12, 9, 5, 12, 3, 0])
    labels = torch.tensor([5, 6, 5, 7, 8, data.IGNORE])
    with torch.no_grad():
        loss, correct, count = task.sums(ids, labels, ids2, lengths, lengths).tolist()
        q, c = (tasks.pool(task.encoder, x, lengths).double() for x in (ids, ids2))
        q, c = (x / x.norm(dim=-1, keepdim=True) for x in (q, c))
    scores = (q @ c.T).numpy() / 0.07
    expected = hits = 0
    for i in range(5):
        others = [j for j in range(5) if j == i or labels[j] != labels[i]]
        others = [j for j in others if j == i or not torch.equal(ids[i], ids[j])]
        expected += np.log(np.exp(scores[i, others]).sum()) - scores[i, i]
        hits += scores[i, i] == max(scores[i, others])
    assert abs(loss / expected - 1) < 1e-5 and count == 5 and correct == hits


def test_accumulation_of_retrieval_keeps_all_negatives(tokenizer, functions):
    """The gradients of a batch encoded in pieces are those of the whole."""
    split = Split(Strings([f["code"] for f in functions]), np.arange(24).reshape(12, 2),
                  candidates=np.arange(12) * 2 + 1)
    batch = next(split.prepare(tokenizer, 48).training(12, [48], 0).stream())
    found = []
    for accumulate in (1, 5):
        task = tasks.Retrieval(encoder(tokenizer), tokenizer, "advtest", [], 48)
        sums = tasks.Stepper(task, torch.optim.SGD(task.parameters(), lr=0.1), accumulate)(batch)
        found.append((sums, torch.cat([p.detach().flatten() for p in task.parameters()])))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5) and torch.allclose(found[0][1], found[1][1], atol=1e-6)


@pytest.mark.parametrize("batch, lengths", [(1, [64]), (7, [24, 64]), (64, [16, 32, 64])])
def test_evaluation_is_the_same_at_any_batch_size(tokenizer, functions, batch, lengths, monkeypatch):
    """And makes the kernels once a length."""
    calls, kernels = [], codessm.kernels
    monkeypatch.setattr(codessm, "kernels", lambda *args: calls.append(args) or kernels(*args))

    def files(i):
        words = functions[i]["code"].split()
        return words, [w if len(w) < 3 else None for w in words]

    n = np.arange(30)
    for kind, split in (
            ("classify", functions_split(functions, tokenizer, 50, 1)),
            ("pair", functions_split(functions, tokenizer, 50, 2)),
            ("retrieval", functions_split(functions, tokenizer, 30, 2, query=n, candidates=n + 40, gold=n)),
            ("tag", Split(files, n[:, None], index={"UNK": 0, "=": 1, "if": 2}).prepare(tokenizer, 64))):
        labels = ["UNK", "=", "if"] if kind == "tag" else ["0", "1"]
        task = tasks.OBJECTIVES[kind](encoder(tokenizer), tokenizer, kind, labels, 64)
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.mul_(3)  # predictions that differ
        calls.clear()
        one, outputs = tasks.evaluate(task, split.each(batch, lengths), split)
        assert 1 <= len(calls) <= len(lengths)
        two, again = tasks.evaluate(task, split.each(13, [40, 64]), split)
        assert one == pytest.approx(two, abs=1e-9)
        if kind == "tag":
            assert all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(outputs, again))
            assert len(outputs) == len(split) and len({b for _, p in outputs for b in p}) > 1


def test_logits_are_made_at_labelled_words_only(tokenizer):
    task = tasks.Tagging(encoder(tokenizer), tokenizer, "tag", ["UNK", "a", "b"], 32)
    rows = [[1, 50, 51, 52, 2], [1, 60, 2]]
    targets = [[data.IGNORE, 1, data.IGNORE, 0, data.IGNORE], [data.IGNORE, 2, data.IGNORE]]
    batches = data.Batches(lambda i, epoch: (rows[i], targets[i]), np.arange(2), 2, [8], tokenizer.pad)
    tensors, count = task.prepare(batches[0, 0][0])
    assert count == 3 and (tensors["targets"] != data.IGNORE).sum() == 3
    seen = []
    task.head.register_forward_hook(lambda _m, _i, logits: seen.append(logits.shape))
    loss, _, n = task.sums(**tensors).tolist()
    assert seen == [(3, 3)]
    alone = [torch.log_softmax(task.head(task.encoder(torch.tensor([row]))[0]), -1) for row in rows]
    assert n == 3 and abs(loss + (alone[0][1, 1] + alone[0][3, 0] + alone[1][1, 2]).item()) < 1e-4


# ---- the command line -------------------------------------------------------------------------------

WORDS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]


def toy(kind, rng, n, part):
    """n rows of a task that can be learnt from its tokens."""
    def mix(words, junk):
        words = [*words, *rng.choices("xyz()=+", k=junk)]
        rng.shuffle(words)
        return " ".join(words)

    if kind == "classify":
        return [{"code": mix([word], 6), "label": word} for word in rng.choices(WORDS[:3], k=n)]
    if kind == "pair":
        pairs = [(a, b) for a in WORDS[:3] for b in WORDS[:3] if a != b] + [(a, a) for a in WORDS[:3]] * 2
        return [{"code1": mix([a], 4), "code2": mix([b], 4), "label": int(a == b)} for a, b in rng.choices(pairs, k=n)]
    if kind == "retrieval":
        triples = list(itertools.combinations(WORDS, 3))
        random.Random(0).shuffle(triples)
        triples = triples[:64] if part != "train" else rng.choices(triples[64:], k=n)
        return [{"text": " ".join(rng.sample(t, 3)), "code": mix(t, 2)} for t in triples]
    rows = []
    for _ in range(n):
        tokens = ["(", *(rng.choice(["1", "22"] if rng.random() < 0.5 else WORDS) for _ in range(8))]
        rows.append({"tokens": tokens, "labels": [None, *("number" if t.isdigit() else "name" for t in tokens[1:])]})
    return rows


def write_toy(folder, kind, shuffled=False, n=320, test=64):
    os.makedirs(folder, exist_ok=True)
    rng = random.Random(0)
    for part, size in (("train", n), ("valid", 64), ("test", test)):
        rows = toy(kind, rng, size, part)
        if shuffled and kind == "tag":
            for row in rows:
                row["labels"] = [label and rng.choice(["number", "name"]) for label in row["labels"]]
        elif shuffled:
            field = {"classify": "label", "pair": "label", "retrieval": "code"}[kind]
            values = [row[field] for row in rows]
            rng.shuffle(values)
            for row, value in zip(rows, values):
                row[field] = value
        write_lines(os.path.join(folder, f"{part}.jsonl"), rows)


def result(said):
    """The JSON of a command, wherever standard error was mixed in."""
    return json.loads(re.search(r'\{"(?:output|task)": .*', said)[0])


# the metric, and what guessing gives: 1/3, the larger half, half, and MRR = (1 + 1/2 + ... + 1/64) / 64
CHANCE = {"classify": ("accuracy", 1 / 3), "pair": ("accuracy", 0.56), "tag": ("accuracy", 0.5),
          "retrieval": ("mrr", 0.074)}


@pytest.mark.parametrize("kind", CHANCE)
def test_learns_what_can_be_learnt_and_nothing_else(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(codessm.SIZES, "tiny", dict(d=64, layers=2))
    metric, chance = CHANCE[kind]
    write_toy("true", kind)
    code, said = cli("finetune", kind, "--data", "true", *SCRATCH, "--steps", 50, "-o", "m.pt", "--json")
    assert code == 0, said
    learned = result(said)
    assert learned[f"valid_{metric}"] > 0.95 and learned[f"test_{metric}"] > 0.95
    # evaluate says what finetune said, and the file of predictions holds what was scored
    code, said = cli("evaluate", kind, "--ckpt", "m.pt", "--data", "true", "--predictions", "p", "--json", "--batch", 9)
    assert code == 0, said
    again = result(said)
    assert again[metric] == pytest.approx(learned[f"test_{metric}"], abs=1e-9) and again["examples"] == 64
    rows, lines = ([*map(str.rstrip, open(name))] for name in ("true/test.jsonl", "p"))
    rows = list(map(json.loads, rows))
    if kind == "retrieval":
        found = [json.loads(line) for line in lines]
        assert [row["url"] for row in found] == list(range(64)) and all(len(set(row["answers"])) == 64 for row in found)
        score = np.mean([1 / (1 + row["answers"].index(row["url"])) for row in found])
    else:
        said = [line.split("\t") for line in lines]
        assert [int(i) for i, _ in said] == list(range(len(said)))
        gold = [g for row in rows for g in row["labels"] if g] if kind == "tag" else [str(row["label"]) for row in rows]
        score = np.mean([a == b for (_, a), b in zip(said, gold, strict=True)])
    assert score == pytest.approx(again[metric], abs=1e-9)

    write_toy("noise", kind, shuffled=True, test=200)
    code, said = cli("finetune", kind, "--data", "noise", *SCRATCH, "--steps", 12, "-o", "n.pt", "--json")
    # four standard errors of 200 guesses (of tags 1,600, of retrieval 64 ranks)
    error = {"tag": 0.0127, "retrieval": 0.02}.get(kind, 0.0354)
    assert code == 0 and result(said)[f"test_{metric}"] < chance + 4 * error
    assert kind == "retrieval" or result(said)[f"test_{metric}"] > chance - 4 * error


@pytest.mark.parametrize("name, write, first", [
    ("clone", {"data.jsonl": [{"func": f"int f{i}() {{}}", "idx": str(10 + i)} for i in range(9)],
               "*.txt": "".join(f"{10 + i % 9}\t{10 + i % 7}\t{i % 2}\n" for i in range(40))}, "10\t10\t"),
    ("devign", {"function.json": [{"func": f"int f{i}() {{}}", "target": i % 2} for i in range(40)],
                "*.txt": "".join(f"{i}\n" for i in range(39, -1, -1))}, "39\t"),
    ("complexity", {"*.jsonl": [{"src": f"f{i}", "complexity": ["np", "logn"][i % 2]} for i in range(40)]}, "0\t"),
    ("advtest", {"*.jsonl": [{"docstring_tokens": ["t", str(i)], "code_tokens": ["f", str(i)], "url": f"u{i}",
                              "idx": 100 + i} for i in range(40)]}, '{"url": "u0", "answers": [1'),
    ("sqa", {"corpus.jsonl": [{"_id": f"d{i}", "text": f"a {i}"} for i in range(40)],
             "queries.jsonl": [{"_id": f"q{i}", "text": f"b {i}"} for i in range(40)],
             "qrels/*.tsv": "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(40))},
     '{"url": "q0", "answers": ["d'),
    ("typeinf", {"*.jsonl": [{"tokens": ["f", "(", f"x{i}"], "labels": ["number", None, "Foo"]} for i in range(40)],
                 "vocab_50000.txt": "UNK\nany\nnumber\nFoo\n"}, "0\t"),
])
def test_published_formats_from_end_to_end(name, write, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs(f"{name}/qrels")
    for pattern, content in write.items():
        for split in data.SPLITS if "*" in pattern else [""]:
            path = os.path.join(name, pattern.replace("*", split))
            if isinstance(content, str) or pattern.endswith(".json"):
                with open(path, "w") as file:
                    file.write(content if isinstance(content, str) else json.dumps(content))
            else:
                write_lines(path, content)
    code, said = cli("finetune", name, *SCRATCH, "--steps", 2, "--json")
    assert code == 0, said
    trained = result(said)
    code, said = cli("evaluate", name, "--ckpt", f"{name}.pt", "--predictions", "p", "--json")
    assert code == 0 and result(said)["examples"] == 40, said
    found = {f"test_{key}": value for key, value in result(said).items()}
    for key in trained:
        assert not key.startswith("test_") or found[key] == pytest.approx(trained[key], abs=1e-9)
    lines = open("p").read().splitlines()
    assert lines[0].startswith(first) and len(lines) == {"typeinf": 80}.get(name, 40)
    if name == "clone":
        assert [line.split("\t")[:2] for line in lines] == [[f"{10 + i % 9}", f"{10 + i % 7}"] for i in range(40)]
    if name == "typeinf":
        assert "test_top100_f1_published" in trained and {line.split("\t")[1] for line in lines} <= {
            "UNK", "any", "number", "Foo"}
        log = [json.loads(line) for line in open("typeinf.pt.jsonl")]
        split = data.Reader(name, name).splits["train"].prepare(codessm.load("typeinf.pt").tokenizer, 32)
        counted = sum(int(batch.lengths.sum()) for batch in split.training(32, [32], 0).stream(0, 2))
        assert [line["tokens"] for line in log if "tokens" in line][-1] == counted  # each token once


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A model of each kind, not a good one, beside its data; in a folder of their own."""
    folder = tmp_path_factory.mktemp("toys")
    for kind in CHANCE:
        write_toy(folder / kind, kind, n=64)
        code, said = cli("finetune", kind, "--data", folder / kind, *SCRATCH, "--steps", 3, "-o", folder / f"{kind}.pt")
        assert code == 0, said
    return folder


def test_predict_keeps_order_and_fields(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(toys)
    monkeypatch.setattr(codessm, "PREDICT", 20)
    for kind in CHANCE:
        rows = [json.loads(line) | {"n": i, "caf\xe9": [1, None]} for i, line in enumerate(open(f"{kind}/test.jsonl"))]
        for row in rows[::2]:
            row.pop("label", None), row.pop("labels", None)
        path = write_lines(tmp_path / "in.jsonl", rows)
        code, said = cli("predict", "--ckpt", f"{kind}.pt", path)
        assert code == 0, said
        found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        assert [{key: row[key] for key in before} for row, before in zip(found, rows, strict=True)] == rows
        model = codessm.load(f"{kind}.pt")
        for row in found:
            if kind == "classify":
                assert list(row["probabilities"]) == model.labels and abs(sum(row["probabilities"].values()) - 1) < 1e-5
                assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
            elif kind == "pair":
                assert row["prediction"] == int(row["score"] > 0.5)
            elif kind == "tag":
                assert len(row["predictions"]) == len(row["tokens"]) and set(row["predictions"]) <= set(model.labels)
            else:
                assert -1 <= row["score"] <= 1 + 1e-6
        if kind == "classify":  # what evaluate says
            with open(path, "rb") as file:  # from standard input, at another batch size
                _, piped = cli("predict", "--ckpt", "classify.pt", "--batch", 3, input=file.read())
            piped = [json.loads(line) for line in piped.splitlines() if line.startswith("{")]
            for one, two in zip(found, piped, strict=True):
                assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)
            cli("evaluate", "classify", "--ckpt", "classify.pt", "--predictions", tmp_path / "p")
            written = [line.split("\t")[1].strip() for line in open(tmp_path / "p")]
            assert written == [row["prediction"] for row in found]


def test_predict_for_source_files(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("src")
    (tmp_path / "src" / "a.py").write_text("def f(x):  # comment\n    return x\n")
    (tmp_path / "src" / "b.c").write_text("int main() {}\n")
    code, said = cli("predict", "--ckpt", toys / "classify.pt", "src/b.c", "src")
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert code == 0 and [row["path"] for row in rows] == ["src/b.c", "src/a.py", "src/b.c"]
    assert set(rows[0]) == {"path", "prediction", "probabilities"}
    code, said = cli("predict", "--ckpt", toys / "tag.pt", "src/a.py")
    row = json.loads(said.splitlines()[-1])
    assert code == 0 and row["path"] == "src/a.py" and row["tokens"] == ["def", "f", "(", "x", ")", ":", "return", "x"]
    assert len(row["predictions"]) == 8
    code, said = cli("predict", "--ckpt", toys / "pair.pt", "src/b.c")
    assert code == 2 and "src/b.c: a model for pair needs JSONL with" in said
    code, said = cli("predict", "--ckpt", toys / "tag.pt", "src/b.c")
    assert code == 2 and "or Python files" in said
    code, said = cli("predict", "--ckpt", toys / "classify.pt", write_lines("bad.jsonl", [{"code": "x"}, "{"]))
    assert code == 2 and "bad.jsonl:2: not JSON" in said and "{" not in said.splitlines()[0][:1]


def test_what_the_commands_refuse(toys, small, corpus):
    code, said = cli("pretrain", small, *TINY, "--steps", 1)
    assert code == 0, said
    for args, message in (
            (["evaluate", "classify", "--ckpt", "model.pt", "--data", toys / "classify"],
             "model.pt is a pretrained encoder: `codessm finetune classify --ckpt model.pt` makes a model for"),
            (["evaluate", "devign", "--ckpt", toys / "classify.pt", "--data", toys / "classify"],
             "was fine-tuned for classify, which is not the same kind of task as devign"),
            (["evaluate", "mlm", "--ckpt", toys / "tag.pt", "--data", small], "no longer predicts masked tokens"),
            (["evaluate", "mlm", "--ckpt", "model.pt", "--predictions", "p"], "--predictions is for the other tasks"),
            (["evaluate", "tag", "--ckpt", toys / "tag.pt", "--code-field", "x"], "--code-field and --text-field are"),
            (["evaluate", "pair", "--ckpt", toys / "pair.pt"], "pair: no such file or folder; pair is read from"),
            (["predict", "--ckpt", "model.pt", small], "predicts nothing yet: fine-tune it first"),
            (["predict", "--ckpt", toys / "pair.pt", small], f'{small}:1: no field "code1" or "func1"'),
            (["predict", "--ckpt", small, small], f"{small} is not a codessm checkpoint"),
            (["finetune", "classify", "--ckpt", "model.pt", "--size", "tiny"], "--ckpt brings its own --model, --size"),
            (["finetune", "classify", "--ckpt", "gone.pt"], "gone.pt: No such file or directory"),
            (["finetune", "classify", "--steps", 1, "--epochs", 1], "give --steps or --epochs, not both"),
            (["finetune", "summarise"], "Invalid value for 'TASK'"),
            (["finetune", "complexity", "--data", small], f'{small}:1: no field "complexity"')):
        code, said = cli(*args)
        assert code == 2 and message in said.replace("\n  ", " ") and "Traceback" not in said, said
    assert sorted(os.listdir()) == ["model.pt", "model.pt.jsonl", "small.jsonl"]


def test_damaged_and_diverged_checkpoints(toys, tmp_path):
    """Each a sentence, none a plausible number; half-precision weights are read as what they are."""
    def changed(kind, **changes):
        content = torch.load(toys / f"{kind}.pt", weights_only=True)
        if "weights" in changes:
            changes["weights"] = {name: changes["weights"](weight) for name, weight in content["weights"].items()}
        torch.save(content | changes, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    for changes in (dict(labels=["a"]), dict(labels=[1, 2, 3]), dict(labels={"a": 1}), dict(ctx="8"), dict(ctx=0),
                    dict(task="tag"), dict(task="nothing"), dict(weights=lambda w: w[:1]), dict(tokenizer=5)):
        code, said = cli("predict", "--ckpt", changed("classify", **changes), toys / "classify" / "test.jsonl")
        assert code == 2 and "x.pt" in said and "Traceback" not in said, (changes, said)
    half = changed("classify", weights=lambda w: w.half())
    assert cli("predict", "--ckpt", half, toys / "classify" / "test.jsonl")[0] == 0
    for kind in CHANCE:
        diverged = changed(kind, weights=lambda w: w * torch.nan)
        for args in (["evaluate", kind, "--data", toys / kind], ["predict", toys / kind / "test.jsonl"]):
            code, said = cli(*args, "--ckpt", diverged)
            assert code == 1 and "what the model says is no number" in said and '{"' not in said, said
    (tmp_path / "cut.pt").write_bytes((toys / "classify.pt").read_bytes()[:20000])
    code, said = cli("predict", "--ckpt", tmp_path / "cut.pt", toys / "classify" / "test.jsonl")
    assert code == 2 and "cut.pt is not a codessm checkpoint, or not a whole one" in said


def test_nothing_is_overwritten(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(toys / "classify")
    before = {name: open(name, "rb").read() for name in os.listdir()}
    for name in ("test.jsonl", "train.jsonl", toys / "classify.pt"):
        code, said = cli("evaluate", "classify", "--ckpt", toys / "classify.pt", "--data", ".", "--predictions", name)
        assert code == 2 and f"{name} exists: give --predictions another name, or remove it" in said
    code, said = cli("finetune", "classify", "--ckpt", toys / "classify.pt", "--data", ".", "-o", toys / "classify.pt",
                     "--restart")
    assert code == 2 and "would replace what --ckpt" in said
    assert before == {name: open(name, "rb").read() for name in os.listdir()}


def test_fine_tuning_starts_from_a_checkpoint(small, toys):
    code, said = cli("pretrain", small, *TINY, "--steps", 1)
    before = codessm.load("model.pt")
    code, said = cli("finetune", "pair", "--ckpt", "model.pt", "--data", toys / "pair", "--steps", 1, "--lr", 1e-12,
                     "--workers", 0)
    assert code == 0 and "from model.pt" in said, said
    after = codessm.load("pair.pt")
    assert after.name == "pair" and after.labels == ["0", "1"] and after.tokenizer.text == before.tokenizer.text
    assert after.ctx == 512 and not after.training
    for name, weight in before.encoder.state_dict().items():
        assert torch.allclose(weight, after.encoder.state_dict()[name], atol=1e-9), name
    # and a fine-tuned model's encoder serves as well
    assert cli("finetune", "tag", "--ckpt", "pair.pt", "--data", toys / "tag", "--steps", 1, "--workers", 0)[0] == 0


def test_the_untrained_model_is_never_the_best(toys, tmp_path):
    """Constant predictions score the same before training and after; what has learned longest is kept."""
    rows = [{"func": f"int f{i}() {{}}", "target": int(i == 0)} for i in range(40)]
    for split in data.SPLITS:
        write_lines(tmp_path / f"{split}.jsonl", rows)
    args = ["finetune", "diversevul", "--data", tmp_path, *SCRATCH]
    code, said = cli(*args, "--steps", 4, "--eval-every", 1, "-o", tmp_path / "m.pt", "--json")
    assert code == 0, said
    scores = [json.loads(line)["valid_macro_f1"] for line in open(tmp_path / "m.pt.jsonl") if "valid_macro" in line]
    assert len(set(scores[1:])) == 1 and len(scores) == 5 and scores[0] > scores[1]
    assert result(said)["valid_macro_f1"] == scores[-1]
    assert cli(*args, "--steps", 4, "--eval-every", 4, "-o", tmp_path / "n.pt")[0] == 0
    one, two = (codessm.load(tmp_path / name).state_dict() for name in ("m.pt", "n.pt"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_evaluate_mlm(small):
    code, said = cli("pretrain", small, *TINY, "--steps", 2, "--json")
    trained = result(said)
    code, said = cli("evaluate", "mlm", "--ckpt", "model.pt", "--data", small, "--ctx", 32, "--split", "valid",
                     "--json")
    found = result(said)
    assert code == 0 and found["loss"] == pytest.approx(trained["loss"], rel=1e-6) and found["examples"] == 6
    code, said = cli("evaluate", "mlm", "--ckpt", "model.pt", "--data", small, "--ctx", 100)
    assert code == 0 and "mlm test, 65 examples in" in said and "perplexity" in said
    code, said = cli("evaluate", "mlm", "--ckpt", "model.pt", "--data", write_lines("mute.jsonl", [{"code": "x"}]))
    assert code == 2 and "mute.jsonl: nothing could be predicted: the corpus is too small" in said


def test_interrupted_fine_tuning_goes_on_bit_for_bit(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["finetune", "classify", "--data", toys / "classify", *SCRATCH, "--steps", 30, "--batch", 8]
    assert cli(*args, "-o", "whole.pt")[0] == 0
    process = Forked(*args, "-o", "cut.pt")
    wait_for(lambda: os.path.exists("cut.pt.jsonl") and os.path.getsize("cut.pt.jsonl") > 300, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "interrupted at step" in errors and "Traceback" not in errors
    code, said = cli(*args, "-o", "cut.pt", "--lr", 1)
    assert code == 2 and "cut.pt.state is of a run with lr 0.002, and this one has lr 1" in said
    assert cli(*args, "-o", "cut.pt")[0] == 0
    whole, cut = (codessm.load(path).state_dict() for path in ("whole.pt", "cut.pt"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert open("whole.pt.jsonl").read() == open("cut.pt.jsonl").read()
    assert json.loads(open("cut.pt.jsonl").readlines()[-1]).keys() >= {"step", "test_accuracy"}
