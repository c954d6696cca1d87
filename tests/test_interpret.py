"""`codessm interpret`: filters against closed forms, hidden states against shorter encoders, probes that must see."""
import ast
import copy
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import codessm
import data
import tasks
from codessm import S4D, Encoder
from conftest import cli, says, write_lines
from test_model import closed_form, discretised


def s4d(*poles, D=0.0, C=1.0):
    """An S4D in float64 whose kernels are K[l] = C Re a^l, one for each of these complex a."""
    ssm, z = S4D(1, len(poles)).double(), torch.log(torch.tensor(poles, dtype=torch.complex128))
    for name, value in dict(A_re=z.real, A_im=z.imag, C=torch.view_as_real(C * z / torch.expm1(z)), log_step=0 * z.real,
                            D=0 * z.real + D).items():
        getattr(ssm, name).data = value.view(getattr(ssm, name).shape).clone()
    return ssm


def centroid(a):
    """Of a^l: |H|^2 is in proportion to 1 + 2 sum_m a^m cos(pi m f), and f cos(pi m f) integrates to -2 / (pi m)^2."""
    return 0.5 - 4 / math.pi ** 2 * sum(a ** m / m ** 2 for m in range(1, 999, 2))


# ---- filters ----------------------------------------------------------------------------------------

def test_filters_of_known_kernels():
    """Decay, alternating decay, a resonance; a notch; D alone: their closed forms."""
    found = tasks.analyse(s4d(0.8, -0.8 + 0j, 0.95j), 400)
    assert found.classes == ["low-pass", "high-pass", "band-pass"] and found.peak.tolist() == [0, 1, 0.5]
    assert found.centroid == pytest.approx([centroid(0.8), 1 - centroid(0.8), 0.5], abs=1e-6)
    assert found.memory.tolist() == [6, 6, 28]  # a^(2 (m + 1)) <= 0.05; of the resonance every other lag is 0
    # the integral of |H|^2 from 0 to f is in proportion to atan((1 + a) / (1 - a) tan(pi f / 2))
    low, middle = (2 / math.pi * math.atan(9 * math.tan(math.pi * f / 2)) for f in (1 / 3, 2 / 3))
    assert found.energy[0] == pytest.approx([low, middle - low, 1 - middle], abs=1e-4)
    assert tasks.analyse(s4d(0.8, -0.8 + 0j, 0.95j), 400, 0.01).classes == ["all-pass"] * 3
    assert tasks.analyse(s4d(math.sqrt(0.5) * 1j, D=-1.0, C=0.5), 400, 0.8).classes == ["band-stop"]
    alone = tasks.analyse(s4d(0.5, D=-2.0, C=0.0), 64)
    assert alone.classes == ["all-pass"] and alone.memory[0] == 0 and np.allclose(alone.magnitude, 2)
    assert alone.centroid[0] == pytest.approx(0.5) and alone.bandwidth[0] == pytest.approx(math.sqrt(1 / 12), abs=1e-6)


@pytest.mark.parametrize("k, L", [(1, 8), (1, 300), (3, 5000)])
def test_filters_equal_a_dft_and_brute_force(k, L):
    """As initialised, with slow decay, so that the response is cut."""
    torch.manual_seed(k + L)
    ssm = S4D(16, k)
    ssm.log_step.data -= 2
    found = tasks.analyse(ssm, L)
    h = closed_form(ssm, L) + discretised(ssm)[2] * (np.arange(L) == 0)
    F = found.magnitude.shape[1] - 1
    f = np.arange(F + 1) / F
    assert np.allclose(found.impulse, h, atol=1e-9) and F >= L and ssm.C.dtype == torch.float32
    for n in (0, 1, 7, F // 3, F // 2, F - 1, F):
        H = (h * np.exp(-1j * np.pi * n / F * np.arange(L))).sum(1)
        assert np.allclose(np.exp(1j * found.phase[:, n]) * found.magnitude[:, n], H, atol=1e-8)
    assert np.abs(np.diff(found.phase)).max() <= math.pi
    for i, magnitude in enumerate(found.magnitude):
        assert found.memory[i] == next(m for m in range(L) if (h[i, :m + 1] ** 2).sum() >= 0.95 * (h[i] ** 2).sum())
        power = np.where((f == 0) | (f == 1), 0.5, 1) * magnitude ** 2
        mean = (power * f).sum() / power.sum()
        assert found.centroid[i] == pytest.approx(mean) and found.energy[i].sum() == pytest.approx(1)
        assert found.bandwidth[i] == pytest.approx(math.sqrt((power * (f - mean) ** 2).sum() / power.sum()))


def test_a_shift_is_known():
    some, others = tasks.analyse(s4d(0.8, 0.6), 400), tasks.analyse(s4d(-0.8 + 0j, 0.9), 400)
    assert tasks.filter_shift(some, some) == dict(shift=0, energy=[0, 0, 0], memory=0, changes={})
    shift = tasks.filter_shift(some, others)
    expected = 1 - 2 * centroid(0.8) + centroid(0.9) - centroid(0.6)
    assert shift["shift"] == pytest.approx(expected / 2, abs=1e-6) and shift["memory"] == (14 - 2) / 2
    assert shift["energy"][0] < 0 < shift["energy"][2] and shift["changes"] == {"low-pass > high-pass": 1}


# ---- hidden states ----------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("model", ["codessm-hybrid", "rocoder", "zamba"])
def test_hidden_states_of_layers_and_tokens(model, tokenizer):
    """Against an encoder without the layers above; of a token, the mean over the sub-tokens that hold its bytes."""
    torch.manual_seed(0)
    encoder, below = Encoder(tokenizer.vocab, 64, 2, N=8, model=model).eval(), []
    encoder.chunk, ids, lengths = 16, torch.randint(tokenizer.vocab, (2, 40)), torch.tensor([40, 23])
    for layer in encoder.layers:  # at initialisation branches are small beside the residual
        (layer.o if hasattr(layer, "o") else layer.out).weight.mul_(10)
    last, real = encoder(ids, lengths, below), torch.arange(40) < lengths[:, None]
    assert torch.equal(last, encoder(ids, lengths)) and len(below) == len(encoder.layers) == 2 + 2 * (model == "zamba")
    for number, hidden in enumerate([*below, last]):
        short = copy.deepcopy(encoder)
        short.layers = short.layers[:number]
        assert torch.allclose(hidden[real], (short(ids, lengths) if number else encoder.embed(ids))[real], atol=1e-5)
        assert number == 0 or (hidden - below[number - 1])[real].abs().max() > 1e-2
    functions = [data.relations(code) for code in (
        "def f():\n    pass\n", "def größe(β, x):\n    return '→→' + β * x  # ünï\n", "def g(x): return x\n")]
    tokens = [(n, t) for n, function in enumerate(functions) for t in range(len(function.spans))]
    objective, several = tasks.MLM(encoder, tokenizer, "mlm").frozen(), 0
    states = torch.cat([tasks.token_states(objective, function) for function in functions], 1)
    assert states.shape == (len(below) + 1, len(tokens), 64)
    for row, (n, t) in enumerate(tokens):
        begin, end = (len(functions[n].code[:place].encode()) for place in functions[n].spans[t])
        x, inputs, place, places = [tokenizer.start, *tokenizer.encode(functions[n].code), tokenizer.end], [], 0, []
        for position, token in enumerate(map(tokenizer.model.id_to_token, x[1:-1]), 1):  # a character for each byte
            place += len(token)
            places += [position] * (place > begin and place - len(token) < end)
        several += len(places) > 1
        inputs.append(encoder(torch.tensor([x]), torch.tensor([len(x)]), inputs))
        for layer, whole in enumerate(inputs):
            assert torch.allclose(states[layer, row].float(), whole[0, places].mean(0), rtol=2e-3, atol=2e-3)
    assert several > 3


# ---- relations of tokens ------------------------------------------------------------------------------

TREES = {  # a node is a list of tokens and nodes
    "x = f'a{y}'": ["x", "=", "f'a{y}'" if sys.version_info < (3, 12) else ["f'", "a", "{", "y", "}", "'"]],
    "x = y + 1": ["x", "=", ["y", "+", "1"]],
    "f(a)(b, k=2)": [[["f", "(", "a", ")"], "(", "b", ",", ["k", "=", "2"], ")"]],
    "def f(a, b: int = 'é'):\n    return not a": [
        "def", "f", "(", "a", ",", ["b", ":", "int"], "=", "'é'", ")", ":", ["return", ["not", "a"]]],
    "if a < b:\n    c.d[0] += 1\nelse:\n    pass": [
        "if", ["a", "<", "b"], ":", [[["c", ".", "d"], "[", "0", "]"], "+=", "1"], "else", ":", "pass"]}


@pytest.mark.parametrize("code", TREES)
def test_distances_and_siblings_equal_a_search_in_the_tree(code):
    near, leaves = {0: []}, []

    def grow(parent, children):
        for child in children:
            near[node := len(near)] = [parent]
            near[parent].append(node)
            leaves.append((node, child, parent)) if isinstance(child, str) else grow(node, child)
    grow(0, TREES[code])
    function = data.relations(code)
    distances, siblings = ({(i, j): label for i, j, label in function.pairs[name]} for name in ("distance", "siblings"))
    assert [code[a:b] for a, b in function.spans] == [word for _, word, _ in leaves]
    for i, (start, _, parent) in enumerate(leaves):
        far, queue = {start: 0}, [start]
        for node in queue:
            queue += [n for n in near[node] if n not in far]
            far |= {n: far[node] + 1 for n in near[node] if n not in far}
        for j, (other, _, others_parent) in enumerate(leaves[i + 1:], i + 1):
            assert distances.get((i, j)) == (far[other] - 2 if far[other] <= 6 else None)
            assert siblings[i, j] == (parent == others_parent)


FLOWS = {  # x0>2: the first token x reaches the third token x
    "a = a + 1; return a": "a0>2 a1>3",
    "a += b; b.c += a; return a": "a0>1 a1>2 a1>3 b0>1 b0>2",
    "x: a = x; return x": "a0>1 x0>2",
    "\n for i in b:\n  a += i\n return a": "b0>1 i0>1 a0>1 a0>2 a1>2",
    "\n while a:\n  b = a\n  a = g(b)\n return a": "a0>1 a0>2 a0>4 a3>1 a3>2 a3>4 b1>2",
    "\n for y in a:\n  if y: a = 1; break\n  a = 2\n else: a = y\n return a": "a0>1 a2>5 a4>5 y0>1 y0>2",
    "\n for y in a:\n  if y: a = 1; continue\n  a = 2\n return a": "a0>1 a0>4 a2>4 a3>4 y0>1",
    "\n if b: a = 1\n elif a: return a\n else: a = 2\n return a": "b0>1 a0>2 a0>3 a1>5 a4>5",
    "\n if b: a = 1\n y = a if b else b\n return a": "b0>1 b0>2 b0>3 a0>2 a1>2 a0>3 a1>3",
    "\n try: a = 2\n except E: a\n else: return a\n finally: a\n a": "a0>2 a1>2 a1>3 a0>4 a1>4 a0>5 a1>5",
    "\n try: return a\n finally: a": "a0>1 a0>2",
    "\n try: a = 2\n finally: a\n a": "a0>2 a1>2 a1>3",
    "\n try: a = g(a)\n except E as a: return a\n return a": "a0>2 a1>5",
    "return [a for a in a if a]": "a0>3 a2>1 a2>4",
    "return {a: y for a in a for y in a}": "a0>3 a2>1 a2>4 y1>0",
    "\n def g(y, z=a): return a + y\n y = 1\n return g(y)": "a0>1 a0>2 y0>1 y2>3",
    "return lambda a=a, *y: a + y": "a0>2 a1>3 y0>1",
    "\n @a\n async def g(*y: b): await y\n return g": "a0>1 b0>1 y0>1",
    "\n async for y in a: await b; b = y\n raise y from a": "a0>1 a0>2 b0>1 b2>1 y0>1 y0>2",
    "return {a, *b}, {**a, b: b}, a[b:b], f(*b, k=a)": "a0>1 a0>2 a0>3 a0>4 b0>1 b0>2 b0>3 b0>4 b0>5 b0>6",
    "\n class A(b): c = b\n return A, c": "b0>1 b0>2",
    "\n with a as b, b as a: return a": "a0>1 b1>2 a2>3",
    "c = 1; import a, b.c, w as c; from d import b; return a, b, c": "",
    "del a; return a": "",
    "\n if (y := a) and y: a = y\n return a": "a0>1 y0>1 y0>2 a0>3 a2>3",
    "\n match a:\n  case [a, *b]: a = b\n  case {1: z, **a}: a\n return a": "a0>1 a3>6 a0>6",
    "\n match a:\n  case 1: a = 2\n  case _: a = 3\n return a": "a0>1 a2>4 a3>4"}


@pytest.mark.parametrize("code", FLOWS)
def test_data_flows_of_functions_written_by_hand(code):
    function = data.relations(f"def f(a, b): {code}")
    words = [function.code[begin:end] for begin, end in function.spans]
    found = {f"{words[i]}{words[:i].count(words[i])}>{words[:j].count(words[j])}"
             for i, j, label in function.pairs["data flow"] if label}
    assert found == {*FLOWS[code].split()}


def test_all_names_that_are_read_are_uses(functions):
    """And only they, in real code."""
    for code in (function["code"] for function in functions):
        tree, flow = ast.parse(code), data.DataFlow()
        flow.visit(tree)
        names = [node.target if isinstance(node, ast.AugAssign) else node for node in ast.walk(tree)
                 if isinstance(node, ast.AugAssign) or isinstance(getattr(node, "ctx", None), ast.Load)]
        read, uses = ({(name.id, name.lineno, name.col_offset) for name in some if isinstance(name, ast.Name)}
                      for some in (names, flow.uses))
        assert read == uses


def test_pairs_are_balanced(programs):
    """So many of each label; place does not tell siblings from others, nor equality of names a data flow."""
    found = data.probe_functions([str(programs)], 100, lambda code: "[" in code, seed=1)
    assert not {f.code for f in found["train"]} & {f.code for f in found["test"]}
    for split, count in (("train", 100), ("test", 25)):
        assert all("[" in function.code for function in found[split])
        for name, labels in data.RELATIONS.items():
            pairs = [(f, *pair) for f in found[split] for pair in f.pairs[name]]
            assert np.bincount([pair[3] for pair in pairs]).tolist() == [count] * labels
            same = [f.code[slice(*f.spans[i])] == f.code[slice(*f.spans[j])] for f, i, j, label in pairs if not label]
            apart = [np.mean([j - i for _, i, j, label in pairs if label == wanted]) for wanted in (0, 1)]
            assert (name != "data flow" or np.mean(same) >= 0.5) and (name != "siblings" or abs(np.diff(apart)) < 0.5)


# ---- probes -----------------------------------------------------------------------------------------

def test_a_probe_reads_what_is_there_and_nothing_else():
    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
    pairs, labels = torch.randn(2000, 2, 16, generator=draw), rng.integers(5, size=2000)
    pairs += 3 * torch.arange(16)  # no mean is 0
    pairs[range(2000), :, labels] += 5
    for y, low, high in (labels, 1, 1), (rng.permutation(labels), 0.14, 0.26):
        assert low <= (tasks.probe(pairs[:1500].half(), y[:1500], pairs[1500:], 5) == y[1500:]).mean() <= high


def test_a_trained_encoder_beats_a_random_one(programs, tokenizer):
    """It is trained on the relations themselves, through the states and the features that probes have."""
    torch.manual_seed(0)
    functions = data.probe_functions([str(programs)], 400, lambda code: True)
    model, head = tasks.MLM(Encoder(tokenizer.vocab, 64, 2, N=8), tokenizer, "mlm"), torch.nn.Linear(128, 9)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-3)
    columns, found = dict(zip(data.RELATIONS, map(slice, (0, 5, 7), (5, 7, 9)))), [tasks.probe_layers(model, functions)]
    for start in range(0, 960, 16):
        some = [functions["train"][n % len(functions["train"])] for n in range(start, start + 16)]
        with pytest.MonkeyPatch.context() as patch:  # with gradients, and kernels that are made anew
            patch.setattr(tasks, "token_states", tasks.token_states.__wrapped__)
            patch.setattr(model, "frozen", lambda: model)
            pairs = tasks.pairs_of(model, some)
        loss = 0
        for name, (states, labels, _) in pairs.items():
            a, b = states[-1].unbind(1)
            logits = head(torch.cat([a * b, (a - b).abs()], 1))[:, columns[name]]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found.append(tasks.probe_layers(model, functions))
    (_, _, random), (low, _, trained) = (
        [np.mean([layers[n]["accuracy"] for layers in some.values()]) for n in range(3)] for some in found)
    assert trained > random + 0.1 and trained > low + 0.1  # 0.16 and more with three seeds
    assert found[1]["data flow"][0]["control"] > 0.8  # it is of words alone, and these are few


# ---- the command ------------------------------------------------------------------------------------

@pytest.fixture
def models(tmp_path, tokenizer, monkeypatch):
    """Checkpoints in the current folder: model, one with another kernel, and those of other models."""
    monkeypatch.chdir(tmp_path)
    for name, options in dict(model={}, rocoder=dict(model="rocoder"), uni=dict(model="codessm-uni", kernels=8),
                              many=dict(kernels=16), codef=dict(model="codef")).items():
        torch.manual_seed(0)
        model = tasks.MLM(Encoder(tokenizer.vocab, 64, 2, N=4, **options), tokenizer, "mlm", ctx=64)
        tasks.save(f"{name}.pt", model)
        if name == "model":
            model.encoder.layers[1].backward_ssm.log_step.data.add_(1)
            tasks.save("tuned.pt", model)
    os.link("model.pt", "copy.pt")


def result(*args):
    return json.loads(cli("interpret", *args, "--device", "cpu", "--json")[1].splitlines()[-1])


def test_filters_and_shifts_by_the_command(models):
    assert result("model.pt", "copy.pt")["shift"]["model"] == 0
    before, after = (tasks.analyse(codessm.load(path).encoder.layers[1].backward_ssm, 99)
                     for path in ("model.pt", "tuned.pt"))
    assert abs(by_hand := float(after.centroid[0] - before.centroid[0])) > 1e-3
    found = result("model.pt", "tuned.pt", "--length", 99)
    assert found["shift"]["layers"] == {"1": 0, "2": pytest.approx(by_hand / 2)}
    last = found["models"][1]["kernels"][-1]
    assert (last["layer"], last["direction"], last["filter"]) == (2, "backward", after.classes[0])
    assert last["impulse"] == pytest.approx(after.impulse[0]) and last["memory"] == after.memory[0]
    says(0, [f"model: {by_hand / 4:+.4f}, toward {'short' if by_hand > 0 else 'long'} range", f"2: {by_hand / 2:+.4f}",
             "; 64 tokens"], "interpret", "model.pt", "tuned.pt")
    for name, kernels, rows in (("uni", 32, 32), ("many", 64, 4)):  # over 8 kernels the table has their mean
        assert len(result(f"{name}.pt")["models"][0]["kernels"]) == kernels
        assert sum("ward " in line for line in cli("interpret", f"{name}.pt")[1].splitlines()) == rows
    says(0, "different kernels", "interpret", "model.pt", "many.pt")


def test_probes_by_the_command(models, programs):
    found = result("rocoder.pt", "model.pt", "--probe", programs, "--pairs", 8, "--seed", 3)["probe"]
    assert {name: len(layers) for name, layers in found["rocoder.pt"].items()} == dict.fromkeys(data.RELATIONS, 3)
    says(0, ["pt: accuracy of linear", "; no S4D"], "interpret", "rocoder.pt", "--probe", programs, "--pairs", 8)
    says(2, 'too few pairs of tokens for "', "interpret", "model.pt", "--probe", programs, "--pairs", 4000)


def test_logs_and_plots(models, programs, tmp_path):
    logs = [write_lines(tmp_path / f"{n}.pt.jsonl", [
        {"step": 0, "valid_mrr": 0.1}, {"step": 10, "tokens": 1000, "loss": 1.0},
        {"step": 5, "valid_mrr": 0.5}, {"step": 10, "valid_mrr": 0.3 + n}]) for n in (0, 1)]
    assert result(*logs) == {"metric": "mrr", "runs": [dict(
        log=log, steps=[0, 5, 10], tokens=[0, 500, 1000], values=[0.1, 0.5, 0.3 + n]) for n, log in enumerate(logs)]}
    says(0, ["mrr against steps", " 0.3000  0.5000  "], "interpret", *logs)
    says(2, "no metric that all", "interpret", *logs, write_lines("f1.jsonl", [{"step": 0, "valid_f1": 0.1}]))
    pytest.importorskip("matplotlib")
    for plot, magic, *args in (("a.png", b"\x89PNG", "copy.pt", "tuned.pt"), ("b.pdf", b"%PDF", "many.pt", "codef.pt"),
                               ("c.png", b"\x89PNG", *logs, "--against", "tokens"), ("d.svg", b"<?xml", *logs)):
        says(0, f"figure in {plot}", "interpret", *args, "--plot", plot)
        assert (tmp_path / plot).read_bytes().startswith(magic)
    says(2, "no S4D kernels to", "interpret", "rocoder.pt", "--probe", programs, "--plot", "e.png")


def test_errors(models):
    model = codessm.load("model.pt")
    model.encoder.layers[1].forward_ssm.C.data[0] = math.nan
    tasks.save("nan.pt", model)
    Path("bad.jsonl").write_text('{"step": 0, "valid_accuracy": 0.1}\n{"step": 1, "val\n{"step": 2}\n')
    Path("empty.jsonl").touch()
    for code, sentence, *args in (
            (1, "nan.pt: weights that are not finite", "model.pt", "nan.pt"), (2, "bad.jsonl:2: not JSON", "bad.jsonl"),
            (2, "no metric that all", "empty.jsonl"), (2, "No such file", "none.pt"),
            (2, "one or two checkpoints", "model.pt", "tuned.pt", "uni.pt"), (2, "no S4D kernels to", "codef.pt"),
            (2, "ends in .png, .pdf or .svg", "model.pt", "--plot", "a.gif"),
            (2, "there is no folder", "model.pt", "--plot", "none/a.png")):
        says(code, sentence, "interpret", *args)
