"""The fine-tuned objectives, their metrics, and `finetune`, `evaluate` and `predict` as a user has them."""
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import codessm
import data
import tasks
from conftest import KINDS, TINY, cli, same, says, weights, write_lines
from test_benchmarks import PUBLISHED, write

SCRATCH = ["--size", "tiny", "--vocab", "300", "--ctx", "32"]


# ---- metrics ----------------------------------------------------------------------------------------

def test_precision_recall_f1():
    def by_definition(label):
        tp = sum(g == p == label for g, p in zip(gold, predicted))
        said, are = predicted.count(label), gold.count(label)
        return tp / said if said else 0, tp / are if are else 0, 2 * tp / (said + are) if said + are else 0

    rng = np.random.default_rng(0)
    for trial in range(200):
        n, k = rng.integers(1, 50), rng.integers(2, 6)
        gold, predicted = rng.integers(0, k, n).tolist(), rng.integers(-1, k + 2, n).tolist()
        if trial % 3 == 0:
            predicted = [int(rng.integers(0, k))] * n  # a constant, which may be absent from gold
        classes = sorted({*gold, *predicted})
        each = np.array([*map(by_definition, classes)])
        for average, expected in (("macro", each.mean(0)), ("binary", by_definition(1)),
                                  ("weighted", np.average(each, 0, [gold.count(c) for c in classes]))):
            found = tasks.precision_recall_f1(np.array(gold), np.array(predicted), average)
            assert np.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gold, predicted, expected", [
    # values that seqeval 1.2.2 gives
    ([["string", "string", "number"]], [["string", "any", "number"]], 0.4),  # a run of equal types is one entity
    ([["Object", "number"]], [["Object", "any"]], 0.0),                       # types that begin with O are none
    ([["Element", "Element"]], [["Element", "number"]], 2 / 4),               # E ends a chunk each time
    ([["number"], ["number"]], [["number"], ["cumber"]], 1.0),                # the first letter is no part of a type
    ([["T", "x"]], [["T", "x"]], 0.0),                                        # nor is a one-letter type closed by O
    ([["B-x", "B-x", "I-x", "K", "I-x"], ["Int", "B", "Int"]], [["B-x", "I-x", "I-x", "K", "B-x"], ["Int", "Int", "B"]],
     1 / 3),                                                                  # B and I mean what they do elsewhere
    (["S Observable -- Boolean".split(), "- Observable O Observable Observable string S Boolean".split(),
      "S S Observable Observable Observable String string Boolean - Observable Observable".split(),
      "O String String O Boolean -- S Observable".split()],
     ["string Observable -- Observable".split(), "S Observable O - Observable Observable S Boolean".split(),
      "S S string string -- String Observable Boolean String Observable -".split(),
      "Observable Observable Boolean O Boolean string - -".split()], 0.48484848484848486)])
def test_f1_as_published(gold, predicted, expected):
    assert abs(tasks.f1_published(gold, predicted) - expected) < 1e-12


def test_ranks_are_those_of_a_full_sort(monkeypatch):
    """Brute force over float64 scores, ties and several right candidates among them; and in chunks of any size."""
    torch.manual_seed(0)
    queries, candidates = (normalize(torch.randn(n, 8), dim=-1) for n in (23, 150))
    candidates[100:] = candidates[:50]  # ties, which count against the model
    candidates[0] = candidates[1] = queries[0]
    query, gold = np.append(np.arange(23), [3, 3, 7]), np.append(np.arange(23), [60, 103, 107])
    scores, expected = queries.double() @ candidates.double().T, []
    for q in range(23):
        right = set(gold[query == q].tolist())
        best = max(scores[q, i] for i in right)
        expected.append(1 + sum(int(scores[q, i] > best - tasks.TIE) for i in range(150) if i not in right))
    assert expected[0] == 2 and min(expected) < max(expected)
    for held in (2 ** 24, 1, 450, 1000):  # all queries at a time, one, three, six
        monkeypatch.setattr(tasks, "SCORES", held)
        ranks, top = tasks.rank_candidates(queries, candidates, query, gold)
        assert ranks.tolist() == expected
        assert np.abs(np.take_along_axis(scores.numpy(), top, 1) + np.sort(-scores.numpy(), 1)[:, :100]).max() < 1e-6
    # a model that says the same of everything is last
    assert set(tasks.rank_candidates(torch.ones(3, 4), torch.ones(9, 4), np.arange(3), np.arange(3))[0]) == {9}


def test_type_inference_metrics():
    def metrics(gold, predicted, name="typeinf"):
        task = tasks.Tagging(codessm.Encoder(10, d=4, layers=1, N=2), None, name, labels, 32)
        return task.metrics([(np.array(g), np.array(p)) for g, p in zip(gold, predicted)], None)

    labels = ["UNK", "any", *(f"t{i}" for i in range(150))]
    gold, predicted = [[0, 2, 3], [120, 1, 2]], [[0, 2, 4], [120, 1, 0]]
    # F1: UNK 0, any 1, t0 2/3 (one of two), t1 0, t118 1; weighted by how often each is gold. Accuracy: UNK for UNK is
    # wrong, and stays in the denominator. The top 100 are rows 2 to 101: t0, t1, t0
    expected = dict(accuracy=3 / 6, weighted_f1=(1 + 2 * (2 / 3) + 1) / 6, f1_published=2 * 3 / 12)
    assert metrics(gold, predicted, "tag") == pytest.approx(expected, abs=1e-12)
    found = metrics(gold, predicted)
    assert found["top100_accuracy"] == 1 / 3 and expected == pytest.approx({name: found[name] for name in expected})
    assert metrics([[1]], [[1]]).keys() == expected.keys()


# ---- objectives -------------------------------------------------------------------------------------

def test_a_pair_has_no_order_and_each_function_is_encoded_once(make_case, monkeypatch):
    case, rows, pool = make_case("pair"), [], tasks.Objective.pool
    task, split = case.objective.eval(), case.split
    for parameter in task.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    monkeypatch.setattr(tasks.Objective, "pool", lambda self, ids, lengths=None: rows.append(
        len(ids) if lengths is None else int((lengths > 0).sum())) or pool(self, ids, lengths))
    _, outputs = tasks.evaluate(task, case.valid, split)
    assert sum(rows) == len(split.items()) < split.examples.size
    _, swapped = tasks.evaluate(task, case.valid, split._replace(examples=split.examples[:, ::-1]))
    assert np.abs(outputs - swapped).max() < 1e-6 and outputs[:, 1].std() > 0.01
    with torch.no_grad():  # the same by hand, one pair at a time
        a, b = (task.encoder(torch.tensor([[*case.store.sample(item, 63).tolist(), task.tokenizer.end]])).mean(1)
                for item in split.examples[0].tolist())
        expected = task.head(torch.cat([a + b, (a - b).abs(), a * b], -1)).softmax(-1)
    assert np.abs(expected.numpy() - outputs[0]).max() < 1e-5


def test_attention_pooling(make_case):
    """By its definition, a row at a time, in float64; at its start the mean; an empty row gives 0."""
    task = make_case("retrieval").objective.double()
    ids, lengths = torch.randint(4, task.tokenizer.vocab, (4, 12)), torch.tensor([12, 7, 1, 0])
    with torch.no_grad():
        states = [task.encoder(row[None, :n])[0] for row, n in zip(ids, lengths[:3])]
        assert (task.pool(ids, lengths)[:3] - torch.stack([x.mean(0) for x in states])).abs().max() < 1e-6
        w = task.pooling.normal_()
        weights = [torch.exp((x - x.mean(1, True)) / x.std(1, correction=0, keepdim=True) @ w) for x in states]
        expected = torch.stack([(p[:, None] * x).sum(0) / p.sum() for p, x in zip(weights, states)])
        found = task.pool(ids, lengths)
    assert (found[:3] - expected).abs().max() < 1e-3 * expected.abs().max() and not found[3].any()
    assert (expected[0] - states[0].mean(0)).abs().max() > 0.01


def test_in_batch_negatives(make_case):
    """The cross-entropy of its definition, float64: equal texts and codes are no negatives, empty rows nothing."""
    task = make_case("retrieval").objective
    encoder, (ids, ids2) = task.encoder, torch.randint(4, task.tokenizer.vocab, (2, 6, 12))
    lengths = torch.tensor([12, 9, 5, 12, 3, 0])
    items = torch.tensor([[0, 15], [1, 16], [2, 15], [0, 17], [4, 18], [-1, -1]])  # the first text has two right codes
    with torch.no_grad():
        loss, correct, count = task.loss(ids, ids2, items, lengths, lengths).tolist()
        q, c = (torch.cat([normalize(encoder(row[None, :n]).double().mean(1), dim=-1)
                           for row, n in zip(rows[:5], lengths)]) for rows in (ids, ids2))
    scores = (q @ c.T).numpy() / 0.07
    expected = hits = 0
    for i in range(5):
        others = [j for j in range(5) if j == i or not (items[j] == items[i]).any()]
        expected += np.log(np.exp(scores[i, others]).sum()) - scores[i, i]
        hits += scores[i, i] == max(scores[i, others])
    assert abs(loss / expected - 1) < 1e-5 and count == 5 and correct == hits


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_same_at_any_batch_size(make_case, kind):
    case, found = make_case(kind), []
    with torch.no_grad():
        for parameter in case.objective.parameters():
            parameter.mul_(3)  # predictions that differ
    for batch in (13, 1, 7, 64):
        batches = data.Batches(case.store, case.objective.tokenizer, 64, case.split.items()[:, None], batch)
        found.append(tasks.evaluate(case.objective, batches, case.split))
        assert found[-1][0] == pytest.approx(found[0][0], rel=1e-5 if kind == "mlm" else 1e-9, abs=1e-9)
    if kind == "tag":
        flat = [np.concatenate([np.concatenate(window) for window in outputs]) for _, outputs in found]
        assert all((other == flat[0]).all() for other in flat)
        assert len(found[0][1]) == len(case.split.examples) and len({p for _, said in found[0][1] for p in said}) > 1


def test_logits_are_made_at_labelled_words_only(make_case):
    case = make_case("tag")
    task, batch, shapes, expected = case.objective, case.train[0], [], 0
    tensors = task.prepare(batch)
    with task.head.register_forward_hook(lambda _m, _i, logits: shapes.append(logits.shape)):
        loss, _, n = task.loss(**tensors).tolist()
    assert shapes == [(n, 4)] and n == len(batch.targets) > 8 and batch.tokens == batch.lengths.sum()
    rows, columns = np.divmod(batch.places, batch.ids.shape[1])
    for row, length in enumerate(batch.lengths):  # each window alone
        logits = task.head(task.encoder(torch.from_numpy(batch.ids[row:row + 1, :length]))[0]).log_softmax(-1)
        expected -= logits[columns[rows == row], batch.targets[rows == row]].sum().item()
    assert abs(loss / expected - 1) < 1e-5


# ---- the command line -------------------------------------------------------------------------------

def toy(kind, rng, n, part):
    """n rows of a task that can be learnt from its tokens."""
    vocabulary = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]

    def mix(words, junk):
        words = [*words, *rng.choices("xyz()=+", k=junk)]
        rng.shuffle(words)
        return " ".join(words)

    if kind == "classify":
        return [{"code": mix([word], 6), "label": word} for word in rng.choices(vocabulary[:3], k=n)]
    if kind == "pair":
        pairs = [*itertools.permutations(vocabulary[:3], 2)] + [(a, a) for a in vocabulary[:3]] * 2
        return [{"code1": mix([a], 4), "code2": mix([b], 4), "label": int(a == b)} for a, b in rng.choices(pairs, k=n)]
    if kind == "retrieval":
        triples = list(itertools.combinations(vocabulary, 3))
        random.Random(0).shuffle(triples)
        triples = triples[:64] if part != "train" else rng.choices(triples[64:], k=n)
        return [{"text": " ".join(rng.sample(t, 3)), "code": mix(t, 2)} for t in triples]
    rows = [["(", *(rng.choice(["1", "22"] if rng.random() < 0.5 else vocabulary) for _ in range(8))] for _ in range(n)]
    return [{"tokens": tokens, "labels": [None, *("number" if t.isdigit() else "name" for t in tokens[1:])]}
            for tokens in rows]


METRIC = {"classify": "accuracy", "pair": "accuracy", "tag": "accuracy", "retrieval": "mrr"}


def printed(*args, **options):
    """The objects of JSON that a command prints, among what it says."""
    code, said = cli(*args, **options)
    assert code == 0, said
    return [json.loads(line) for line in re.findall(r'\{".*', said)]


def result(*args):
    return printed(*args, "--json")[-1]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A model of each kind beside its data and what was said of it, in a folder of their own."""
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codessm.SIZES, "tiny", dict(d=64, layers=2))
        for kind in METRIC:
            rng, parts = random.Random(0), {"train": 320, "valid": 64, "test": 64}
            write({f"{part}.jsonl": toy(kind, rng, n, part) for part, n in parts.items()}, folder / kind)
            args = ["--data", folder / kind, *SCRATCH, "--steps", 50, "-o", folder / f"{kind}.pt"]
            (folder / f"{kind}.json").write_text(json.dumps(result("finetune", kind, *args)))
    return folder


@pytest.mark.parametrize("kind", METRIC)
def test_learns_what_can_be_learnt(kind, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric, learned = METRIC[kind], json.loads((toys / f"{kind}.json").read_text())
    assert learned[f"valid_{metric}"] > 0.95 and learned[f"test_{metric}"] > 0.95
    assert f'"test_{metric}": ' in open(toys / f"{kind}.pt.jsonl").read()
    # evaluate says what finetune said, and the file of predictions holds what was scored
    again = result("evaluate", kind, "--ckpt", toys / f"{kind}.pt", "--data", toys / kind, "--predictions", "p")
    assert again[metric] == pytest.approx(learned[f"test_{metric}"], abs=1e-9) and again["examples"] == 64
    rows, lines = map(json.loads, open(toys / kind / "test.jsonl")), open("p").read().splitlines()
    if kind == "retrieval":
        found = [json.loads(line) for line in lines]
        assert [row["url"] for row in found] == list(range(64)) and all(len(set(row["answers"])) == 64 for row in found)
        score = np.mean([1 / (1 + row["answers"].index(row["url"])) for row in found])
    else:
        gold = [g for row in rows for g in row["labels"] if g] if kind == "tag" else [str(row["label"]) for row in rows]
        assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(len(gold))]
        score = np.mean([line.split("\t")[1] == label for line, label in zip(lines, gold)])
    assert score == pytest.approx(again[metric], abs=1e-9)


@pytest.mark.parametrize("name, first", [
    ("clone", "10\t10\t"), ("devign", "39\t"), ("complexity", "0\t"), ("advtest", '{"url": "u0", "answers": [1'),
    ("sqa", '{"url": "q0", "answers": ["d'), ("typeinf", "0\t")])
def test_published_formats_from_end_to_end(name, first, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    write(PUBLISHED[name], name)
    trained = result("finetune", name, *SCRATCH, "--steps", 2)
    found = result("evaluate", name, "--ckpt", f"{name}.pt", "--predictions", "p")
    assert found["examples"] == 40
    scores = {key: value for key, value in trained.items() if key.startswith("test_")}
    assert scores == pytest.approx({key: found[key.removeprefix("test_")] for key in scores}, abs=1e-9)
    lines = open("p").read().splitlines()
    assert lines[0].startswith(first) and len(lines) == {"typeinf": 80}.get(name, 40)
    if name == "clone":
        assert [line.split("\t")[:2] for line in lines] == [[f"{10 + i}", f"{10 + i * 7 % 40}"] for i in range(40)]
    assert ("test_top100_f1_published" in scores) == (name == "typeinf")


@pytest.mark.parametrize("kind", METRIC)
def test_predict_keeps_order_and_fields(kind, toys, tmp_path, monkeypatch):
    """And says what evaluate does, at any batch size, of rows with a label or without; so does `predict` in Python."""
    monkeypatch.chdir(toys)
    monkeypatch.setattr(codessm, "PREDICT", 20)
    rows = [json.loads(line) | {"n": i, "caf\xe9": [1, None]} for i, line in enumerate(open(f"{kind}/test.jsonl"))]
    for row in rows[::2]:
        row.pop("label", None), row.pop("labels", None)
    path = write_lines(tmp_path / "in.jsonl", rows)
    found, model = printed("predict", "--ckpt", f"{kind}.pt", path), codessm.load(f"{kind}.pt")
    assert [{key: row[key] for key in before} for row, before in zip(found, rows, strict=True)] == rows
    for row in found:
        if kind == "classify":
            assert list(row["probabilities"]) == model.labels and abs(sum(row["probabilities"].values()) - 1) < 1e-5
            assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
        elif kind == "tag":
            assert len(row["predictions"]) == len(row["tokens"]) and set(row["predictions"]) <= set(model.labels)
        else:
            assert -1 <= row["score"] <= 1 + 1e-6 and row.get("prediction") in (None, int(row["score"] > 0.5))
    if kind in ("classify", "pair"):
        printed("evaluate", kind, "--ckpt", f"{kind}.pt", "--predictions", tmp_path / "p")
        lines = open(tmp_path / "p").read().splitlines()
        assert [line.split("\t")[-1] for line in lines] == [str(row["prediction"]) for row in found]
    piped = printed("predict", "--ckpt", f"{kind}.pt", "--batch", 3, input=open(path, "rb").read())
    texts = [row["code"] if kind == "classify" else row["tokens"] if kind == "tag" else
             (row["code1"], row["code2"]) if kind == "pair" else (row["text"], row["code"]) for row in rows]
    in_python = [row | said for row, said in zip(rows, model.predict(texts))]
    for wrong in ("def f(): pass", *([[("a", "b", "c")]] if kind != "tag" else [])):
        with pytest.raises(data.Problem, match="texts"):
            model.predict(wrong)
    for one, *others in zip(found, piped, in_python, strict=True):
        number = one.pop("probabilities", None) or one.pop("score", 0)
        for other in others:
            assert (other.pop("probabilities", None) or other.pop("score", 0)) == pytest.approx(number, abs=1e-5)
            assert other == one


def test_predict_for_source_files(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"a.py": "def f(x):  # comment\n    return x\n", "b.c": "int main() {}\n"}, "src")
    rows = printed("predict", "--ckpt", toys / "classify.pt", "src/b.c", "src")
    assert [row["path"] for row in rows] == ["src/b.c", "src/a.py", "src/b.c"]
    assert set(rows[0]) == {"path", "prediction", "probabilities"} and rows[0]["prediction"] == rows[2]["prediction"]
    row, = printed("predict", "--ckpt", toys / "tag.pt", "src/a.py")
    assert len(row.pop("predictions")) == 8 and row == {"path": "src/a.py", "tokens": "def f ( x ) : return x".split()}


def test_a_share_of_the_training_functions_is_obfuscated_anew_each_epoch(tmp_path, tokenizer):
    """Against `data.obfuscate` of each; what does not parse stays, and so does what is evaluated."""
    codes = [f"def f{i}(size, other):\n    total = size + {i}\n    return other(total)" for i in range(400)]
    codes[::10] = [f"int f{i}(int size) {{ return size; }}" for i in range(0, 400, 10)]
    for split, some in (("train", codes), ("valid", codes[:30])):
        rows = [{"docstring": f"the text {code}"[-99:], "code": code} for code in some]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    dataset = data.read_dataset("advtest", [str(tmp_path)], ("train", "valid"), obfuscated=True)
    assert "duplicate" in dataset.description()  # the codes of valid, not the functions that stay as they are
    train, texts = dataset.splits["train"], [dataset.strings(text)[1] for text in dataset.texts()]
    store = data.tokenise(dataset, tokenizer, 64, np.arange(dataset.count))
    assert dataset.splits["valid"].examples.shape == (30, 2) and train.examples.shape == (400, 3)

    def read(epoch, share, seed=3):
        """The code that each text is read with."""
        batches = data.Batches(store, tokenizer, 64, train.examples, 16, seed, obfuscate=share)
        items = np.concatenate([batches[epoch * len(batches) + i].items for i in range(len(batches))])
        return {texts[text]: texts[code] for text, code in items.tolist() if text >= 0}

    plain, all_of_them = read(0, 0), read(0, 1)
    assert sorted(plain.values()) == sorted(codes) and len(plain) == 400
    for text, code in plain.items():
        assert all_of_them[text] == (data.obfuscate(code) if code.startswith("def") else code)
    halves = [read(epoch, 0.5) for epoch in (0, 0, 1, 2)]
    assert halves[0] == halves[1] != halves[2] != halves[3] != read(2, 0.5, seed=4)
    for half in halves:
        assert all(code in (plain[text], all_of_them[text]) for text, code in half.items())
        assert 0.4 < np.mean([half[text] != plain[text] for text in half if plain[text].startswith("def")]) < 0.6


def test_predict_and_evaluate_count_the_bad_lines_that_they_leave_out(toys, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"code": "x = 1", "n": 1}, {"code": " "}, "{", {"code": "y", "n": 2}])
    command = "predict", "--ckpt", toys / "classify.pt", path
    says(2, "in.jsonl:2: the text or code is empty", *command)
    says(0, "2 bad lines passed over; the last is", *command, "--skip-bad")
    folder = tmp_path / "benchmark"
    folder.mkdir()
    label = codessm.load(toys / "classify.pt").labels[0]
    (folder / "test.jsonl").write_text(json.dumps({"code": "x", "label": label}) + "\n{\n")
    says(0, "1 bad line passed over", "evaluate", "classify", "--ckpt", toys / "classify.pt", "--data", folder,
         "--skip-bad")
    assert [row["n"] for row in printed(*command, "--skip-bad")] == [1, 2]


def test_what_the_commands_refuse(toys, small, quick):
    """Each with a sentence; nothing is written, and nothing overwritten."""
    def files():
        return {path: path.read_bytes() for folder in (toys, Path()) for path in folder.rglob("*") if path.is_file()}

    result("pretrain", small, *TINY, "--steps", 1)
    write({"b.c": "int main() {}\n", "test.jsonl": [{"code": "x", "label": 1}]}, ".")
    before = files()
    classify, tag, pair = (toys / f"{kind}.pt" for kind in ("classify", "tag", "pair"))
    for args, message in (
            (["evaluate", "classify", "--ckpt", "model.pt", "--data", toys / "classify"],
             "`codessm finetune classify --ckpt model.pt` makes a model for it"),
            (["evaluate", "devign", "--ckpt", classify, "--data", toys / "classify"], "a model for classify"),
            (["evaluate", "mlm", "--ckpt", "model.pt", "--predictions", "p"], "--predictions"),
            (["evaluate", "tag", "--ckpt", tag, "--code-field", "x"], "--code-field"),
            (["evaluate", "pair", "--ckpt", pair], "pair: no such file or folder"),
            (["evaluate", "classify", "--ckpt", classify, "--data", ".", "--predictions", classify], "pt exists"),
            (["predict", "--ckpt", "model.pt", small], "pretrained encoder"),
            (["predict", "--ckpt", pair, small], f'{small}:1: no field "code1"'),
            (["predict", "--ckpt", pair, "b.c"], "b.c: a model for pair needs JSONL"),
            (["predict", "--ckpt", tag, "b.c"], "Python files"), (["finetune", "summarise"], "value for 'TASK'"),
            (["finetune", "classify", "--ckpt", "model.pt", "--size", "tiny"], "--ckpt brings its own"),
            (["finetune", "classify", "--ckpt", classify, "-o", classify, "--restart"], "would replace what --ckpt")):
        code, said = cli(*args)
        assert code == 2 and message in said.replace("\n  ", " ") and "Traceback" not in said, said
        assert not said.startswith("{") and files() == before


@pytest.mark.parametrize("kind", METRIC)
def test_of_a_diverged_checkpoint_comes_a_sentence_and_no_plausible_number(kind, toys, tmp_path):
    content = tasks.read(toys / f"{kind}.pt")
    content["weights"] = {name: weight * torch.nan for name, weight in content["weights"].items()}
    torch.save(content, tmp_path / "x.pt")
    for args in (["evaluate", kind, "--data", toys / kind], ["predict", toys / kind / "test.jsonl"]):
        code, said = cli(*args, "--ckpt", tmp_path / "x.pt")
        assert code == 1 and "not finite numbers" in said and '{"' not in said, said


def test_the_untrained_model_is_never_the_best(tmp_path):
    """Constant predictions score the same before training and after; what has learned longest is kept."""
    rows = [{"func": f"int f{i}() {{}}", "target": int(i == 0)} for i in range(40)]
    write({"train.jsonl": rows, "valid.jsonl": [row | {"target": i % 2} for i, row in enumerate(rows)]}, tmp_path)
    args = ["finetune", "diversevul", "--data", tmp_path, *SCRATCH, "--steps", 4]
    trained = result(*args, "--eval-every", 1, "-o", tmp_path / "m.pt")
    scores = [json.loads(line)["valid_macro_f1"] for line in open(tmp_path / "m.pt.jsonl") if "valid_macro" in line]
    assert len(scores) == 5 and {*scores[1:]} == {trained["valid_macro_f1"]} and scores[0] > scores[1]
    result(*args, "--eval-every", 4, "-o", tmp_path / "n.pt")
    assert same(*(weights(tmp_path / name) for name in ("m.pt", "n.pt")))


def test_a_pretrained_model_is_evaluated_and_fine_tuned(small, toys, quick):
    trained, args = result("pretrain", small, *TINY, "--steps", 2), ["evaluate", "mlm", "--ckpt", "model.pt", "--data"]
    found = result(*args, small, "--split", "valid")  # at the ctx that it was trained with
    assert found["loss"] == pytest.approx(trained["valid_loss"], rel=1e-6) and found["examples"] == 6
    whole = result(*args, small)
    assert whole["examples"] == 65 and whole["loss"] != result(*args, small, "--ctx", 100)["loss"]
    says(2, "nothing to predict", *args, write_lines("mute.jsonl", [{"code": "x"}]))

    before = codessm.load("model.pt")
    result("finetune", "pair", "--ckpt", "model.pt", "--data", toys / "pair", "--steps", 1, "--lr", 1e-12)
    after = codessm.load("pair.pt")
    assert after.name == "pair" and after.labels == ["0", "1"] and after.tokenizer.text == before.tokenizer.text
    assert after.ctx == 512 and not after.training
    for name, weight in before.encoder.state_dict().items():
        assert torch.allclose(weight, after.encoder.state_dict()[name], atol=1e-9), name
    # and a fine-tuned model's encoder serves as well
    result("finetune", "tag", "--ckpt", "pair.pt", "--data", toys / "tag", "--steps", 1)
