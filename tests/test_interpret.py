"""`codessm interpret`: filters against closed forms, hidden states against shorter encoders, probes that must see."""
import copy
import json
import math
import os
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
    """Decay, alternating decay, a resonance; a notch; D alone."""
    found = tasks.analyse(s4d(0.8, -0.8 + 0j, 0.95j, 0.6), 400)
    assert found.classes == ["low-pass", "high-pass", "band-pass", "low-pass"] and found.peak.tolist() == [0, 1, 0.5, 0]
    assert found.centroid == pytest.approx([centroid(0.8), 1 - centroid(0.8), 0.5, centroid(0.6)], abs=1e-6)
    assert found.bandwidth[0] == pytest.approx(found.bandwidth[1]) and found.bandwidth[2] < found.bandwidth[0]
    assert found.memory.tolist() == [6, 6, 28, 2]  # a^(2 (m + 1)) <= 0.05; of the resonance every other lag is 0
    # the integral of |H|^2 from 0 to f is in proportion to atan((1 + a) / (1 - a) tan(pi f / 2))
    low, middle = (2 / math.pi * math.atan(9 * math.tan(math.pi * f / 2)) for f in (1 / 3, 2 / 3))
    assert found.energy[0] == pytest.approx([low, middle - low, 1 - middle], abs=1e-4)
    assert found.energy[1] == pytest.approx(found.energy[0][::-1], abs=1e-4)
    assert tasks.analyse(s4d(0.8, -0.8 + 0j, 0.95j, 0.6), 400, 0.01).classes == ["all-pass"] * 4
    assert abs(tasks.analyse(s4d(0.99 * np.exp(0.3j * math.pi)), 4096).peak[0] - 0.3) < 1e-3
    notch = tasks.analyse(s4d(math.sqrt(0.5) * 1j, D=-1.0, C=0.5), 400, 0.8)
    assert notch.classes == ["band-stop"] and abs(notch.magnitude[0, notch.magnitude.shape[1] // 2]) < 1e-9
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
    found, ssms = result("model.pt", "tuned.pt", "--length", 99), [
        codessm.load(path).encoder.layers[1].backward_ssm for path in ("model.pt", "tuned.pt")]
    before, after = (tasks.analyse(ssm, 99) for ssm in ssms)
    assert abs(by_hand := float(after.centroid[0] - before.centroid[0])) > 1e-3
    assert found["shift"]["layers"] == {"1": 0, "2": pytest.approx(by_hand / 2)}
    last = found["models"][1]["kernels"][-1]
    assert (last["layer"], last["direction"], last["filter"]) == (2, "backward", after.classes[0])
    assert last["impulse"] == pytest.approx(after.impulse[0]) and last["memory"] == after.memory[0]
    says(0, [f"spectral shift of the model: {by_hand / 4:+.4f}, toward {'short' if by_hand > 0 else 'long'} range",
             f"1: +0.0000, 2: {by_hand / 2:+.4f}", "; 64 tokens"], "interpret", "model.pt", "tuned.pt")
    assert len(result("uni.pt")["models"][0]["kernels"]) == 2 * 2 * 8
    for name, rows in (("uni", 32), ("many", 4)):
        said = cli("interpret", f"{name}.pt")[1]
        assert sum("ward " in line for line in said.splitlines()) == rows
    assert len(result("many.pt")["models"][0]["kernels"]) == 64 and " all " in said
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
    says(1, "nan.pt: weights that are not finite", "interpret", "model.pt", "nan.pt")
    Path("bad.jsonl").write_text('{"step": 0, "valid_accuracy": 0.1}\n{"step": 1, "val\n{"step": 2}\n')
    says(2, "bad.jsonl:2: not JSON", "interpret", "bad.jsonl")
    Path("empty.jsonl").touch()
    says(2, "no metric that all", "interpret", "empty.jsonl")
    for sentence, *args in (("No such file", "none.pt"), ("one or two checkpoints", "model.pt", "tuned.pt", "uni.pt"),
                            ("ends in .png, .pdf or .svg", "model.pt", "--plot", "a.gif"),
                            ("there is no folder", "model.pt", "--plot", "none/a.png"),
                            ("no S4D kernels to", "codef.pt"), ("no S4D kernels to", "rocoder.pt")):
        says(2, sentence, "interpret", *args)
