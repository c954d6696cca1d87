"""Starting from other weights, and runs of different models that can be compared."""
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

import codessm
import tasks
from codessm import MODELS, Encoder, Weights
from conftest import TINY, cli
from data import Split
from test_finetuning import functions_split, write_toy
from test_model import gelu_reference, layer_norm_reference
from test_training import one_batch, same, weights


# ---- BiGS -------------------------------------------------------------------------------------------

def bigs_dict(vocab, d=16, layers=3, N=4, positions=32):
    """A PyTorch state dict as BiGSForMaskedLM has it, of random weights."""
    torch.manual_seed(1)
    shapes = {"bigs.embeddings.word_embeddings.weight": (vocab, d), "bigs.embeddings.LayerNorm.weight": (d,),
              "bigs.embeddings.LayerNorm.bias": (d,), "bigs.embeddings.position_embeddings.weight": (positions, d),
              "bigs.embeddings.token_type_embeddings.weight": (2, d), "bigs.pooler.dense.weight": (d, d),
              "bigs.pooler.dense.bias": (d,), "cls.predictions.bias": (vocab,),
              "cls.predictions.transform.dense.weight": (d, d), "cls.predictions.transform.dense.bias": (d,),
              "cls.predictions.transform.LayerNorm.weight": (d,), "cls.predictions.transform.LayerNorm.bias": (d,)}
    for i in range(layers):
        layer = {"LayerNorm": None, "dv": (3 * d, d), "du_forward": (d, d), "du_backward": (d, d),
                 "duc_forward": (d, d), "duc_backward": (d, d), "dol": (3 * d, d), "do": (d, 3 * d)}
        for name, shape in layer.items():
            shapes[f"bigs.encoder.layer.{i}.{name}.weight"] = shape or (d,)
            shapes[f"bigs.encoder.layer.{i}.{name}.bias"] = (shape or (d,))[:1]
        for s4 in ("fs4", "bs4"):
            for name, shape in {"D": (1,), "kernel.C": (N, 2), "kernel.log_step": (1,), "kernel.A_re": (N,),
                                "kernel.A_im": (N,)}.items():
                shapes[f"bigs.encoder.layer.{i}.{s4}.{name}"] = shape
    tensors = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if "A_im" in name:
            tensor.mul_(10)
        if "A_re" in name:
            tensor[0] = 0.3  # which is clipped
    tensors["cls.predictions.decoder.weight"] = tensors["bigs.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    return tensors | {"bigs.embeddings.position_ids": torch.arange(positions)[None]}


def bigs_logits(p, ids, layers, positions):
    """What BiGS computes (Wang et al. 2023; no token types), in float64: real flips, and its SSMs as recurrences."""
    p = {name: tensor.double().numpy() for name, tensor in p.items()}

    def dense(name, x):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(name, x):
        return layer_norm_reference(x) * p[name + ".weight"] + p[name + ".bias"]

    def s4(name, u):
        A = np.minimum(p[name + ".kernel.A_re"], -1e-4) + 1j * p[name + ".kernel.A_im"]
        dt = np.exp(p[name + ".kernel.log_step"])
        C = p[name + ".kernel.C"] @ [1, 1j] * (np.exp(dt * A) - 1) / A
        h, y = np.zeros((len(A), u.shape[1]), complex), []
        for u_t in u:
            h = np.exp(dt * A)[:, None] * h + u_t
            y.append((C @ h).real + p[name + ".D"] * u_t)
        return np.array(y)

    x = p["bigs.embeddings.word_embeddings.weight"][ids]
    if positions:
        x = x + p["bigs.embeddings.position_embeddings.weight"][:len(ids)]
    x = norm("bigs.embeddings.LayerNorm", x)
    for i in range(layers):
        at = f"bigs.encoder.layer.{i}."
        h = norm(at + "LayerNorm", x)
        v, forward = gelu_reference(dense(at + "dv", h)), gelu_reference(dense(at + "du_forward", h))
        backward = gelu_reference(dense(at + "du_backward", h[::-1]))
        forward = dense(at + "duc_forward", s4(at + "fs4", forward))
        backward = dense(at + "duc_backward", s4(at + "bs4", backward))[::-1]
        x = x + dense(at + "do", gelu_reference(dense(at + "dol", forward * backward)) * v)
    x = norm("cls.predictions.transform.LayerNorm", gelu_reference(dense("cls.predictions.transform.dense", x)))
    return x @ p["bigs.embeddings.word_embeddings.weight"].T + p["cls.predictions.bias"]


def mlm(tokenizer, model="codessm", vocab=None, **more):
    torch.manual_seed(0)
    return tasks.MLM(Encoder(vocab or tokenizer.vocab, d=16, layers=2, N=4, model=model, ctx=24, **more), tokenizer)


@pytest.mark.parametrize("model, nest", [("codessm", None), ("codessm-pos", "state_dict"), ("codessm-8k", "model"),
                                         ("codessm-hf", None)])
def test_from_bigs_weights_it_computes_what_bigs_does(model, nest, tokenizer, tmp_path):
    """The first two layers of three, and 24 positions of 32."""
    p = bigs_dict(tokenizer.vocab)
    torch.save({nest: p, "epoch": 3} if nest else p, tmp_path / "bigs.bin")
    task = mlm(tokenizer, model).eval()
    said = Weights(str(tmp_path / "bigs.bin")).fill(task)
    ids = torch.randint(tokenizer.vocab, (1, 21))
    expected = bigs_logits(p, ids[0].numpy(), 2, model == "codessm-pos")
    for chunk in (8, None):
        task.encoder.chunk = chunk
        with torch.no_grad():
            ours = task.logits(task.encoder(ids))[0].double().numpy()
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    random = "layers 0-1 (local.0.bias, local.0.weight, local.1.bias, local.1.weight)" if "hf" in model else "nothing"
    assert "(BiGS): taken layers 0-1, bias, dense.bias, dense.weight, encoder.embedding.weight" in said
    assert f"; random {random}; not taken layers 2-2, " in said and "token_type_embeddings.weight" in said
    assert "bigs.pooler.dense.weight" in said
    assert ("bigs.embeddings.position_embeddings.weight" in said) == (model != "codessm-pos")


def test_of_fewer_positions_the_others_stay_random(tokenizer, tmp_path):
    p = bigs_dict(tokenizer.vocab, positions=9)
    torch.save(p, tmp_path / "bigs.bin")
    task = mlm(tokenizer, "codessm-pos")
    before = task.encoder.positions.weight.detach().clone()
    assert "encoder.positions.weight, norm.bias, norm.weight (of positions the first 9); random nothing" in Weights(
        str(tmp_path / "bigs.bin")).fill(task)
    assert torch.equal(task.encoder.positions.weight[:9], p["bigs.embeddings.position_embeddings.weight"])
    assert torch.equal(task.encoder.positions.weight[9:], before[9:])


def test_each_tensor_of_bigs_lands_where_it_should(tokenizer, tmp_path):
    p = bigs_dict(tokenizer.vocab + 1)  # another vocabulary
    torch.save(p, tmp_path / "bigs.bin")
    task = mlm(tokenizer)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    said = Weights(str(tmp_path / "bigs.bin")).fill(task)
    ours = task.state_dict()
    for name in ("encoder.embedding.weight", "bias"):
        assert torch.equal(ours.pop(name), before[name])
    assert "random bias, encoder.embedding.weight (another vocabulary)" in said
    for i in (0, 1):
        layer = f"bigs.encoder.layer.{i}."
        for kind in ("weight", "bias"):
            fb = torch.cat([p[f"{layer}du_forward.{kind}"], p[f"{layer}du_backward.{kind}"]])
            assert torch.equal(ours.pop(f"encoder.layers.{i}.fb.{kind}"), fb)
            for mine, theirs in dict(norm="LayerNorm", v="dv", u1="duc_forward", u2="duc_backward", u="dol",
                                     o="do").items():
                assert torch.equal(ours.pop(f"encoder.layers.{i}.{mine}.{kind}"), p[f"{layer}{theirs}.{kind}"])
        for mine, theirs in (("forward_ssm", "fs4"), ("backward_ssm", "bs4")):
            for name in ("D", "kernel.C", "kernel.log_step", "kernel.A_re", "kernel.A_im"):
                value = ours.pop(f"encoder.layers.{i}.{mine}.{name.removeprefix('kernel.')}")
                assert torch.equal(value, p[f"{layer}{theirs}.{name}"])
    for mine, theirs in {"encoder.norm": "bigs.embeddings.LayerNorm", "dense": "cls.predictions.transform.dense",
                         "norm": "cls.predictions.transform.LayerNorm"}.items():
        for kind in ("weight", "bias"):
            assert torch.equal(ours.pop(f"{mine}.{kind}"), p[f"{theirs}.{kind}"])
    assert not ours


def test_what_cannot_be_taken_is_named(small):
    """In one sentence, with nothing written."""
    p = bigs_dict(400, d=128, layers=1, N=64)
    whole, at = os.listdir(), "bigs.encoder.layer.0."
    for change, message in (
            ({at + "fs4.kernel.B": torch.zeros(3), "lm_head.weight": torch.zeros(1)},
             f"x.bin has tensors that BiGS has not: {at}fs4.kernel.B, lm_head.weight"),
            ({at + "dv.weight": 5}, f"x.bin has tensors that BiGS has not: {at}dv.weight"),
            ({at + "do.weight": torch.zeros(128, 256), at + "bs4.kernel.C": torch.zeros(64)},
             f"x.bin (BiGS) does not fit codessm, 4 x 128: {at}bs4.kernel.C (64,), {at}do.weight (128, 256)"),
            ({at + "du_backward.weight": torch.zeros(1, 128)}, f"{at}du_backward.weight (1, 128)"),
            ({"cls.predictions.bias": torch.tensor(0.0), at + "fs4.D": torch.tensor(0.0)}, f"{at}fs4.D ()"),
            (None, "x.bin is neither a codessm checkpoint nor a BiGS state dict")):
        torch.save(p | change if change else {"layer.weight": torch.zeros(3)}, "x.bin")
        code, said = cli("pretrain", small, *TINY, "--steps", 1, "--init", "x.bin")
        assert code == 2 and message in said and "Traceback" not in said and said.count("Error: ") == 1, said
    torch.save(p, "x.bin")
    for args, message in ((["--model", "bertcoder"], "x.bin is a BiGS, whose layers are not those of bertcoder"),
                          (["-o", "x.bin"], "-o x.bin would replace what --init x.bin is read from"),
                          (["--init", "gone.bin"], "gone.bin: No such file")):
        code, said = cli("pretrain", small, *TINY, "--steps", 1, "--init", "x.bin", *args)
        assert code == 2 and message in said and "Traceback" not in said, said
    assert sorted(os.listdir()) == sorted([*whole, "x.bin"])


# ---- from a checkpoint ------------------------------------------------------------------------------

def test_a_run_starts_from_given_weights(small, monkeypatch):
    """With their tokenizer, at the papers' learning rate; another vocabulary leaves embeddings random."""
    monkeypatch.setitem(codessm.SIZES, "small", dict(d=160, layers=1))
    small_size = ["--size", "small", *TINY[2:], "--steps", 1, "--lr", 1e-12]
    assert cli("pretrain", small, *small_size, "-o", "a.pt")[0] == 0
    before = weights("a.pt")
    code, said = cli("pretrain", small, "--size", "small", *TINY[4:], "--steps", 1, "--init", "a.pt", "-o", "b.pt",
                     "--model", "codessm-8k")
    assert code == 0 and "peak learning rate 5e-05" in said, said
    assert "init       a.pt (codessm, 1 x 160): taken layers 0-0, bias" in said and "random nothing;" in said
    after = codessm.load("b.pt")
    assert after.tokenizer.text == codessm.load("a.pt").tokenizer.text and after.encoder.config["kernels"] == 8
    for name, value in after.state_dict().items():
        assert (value - before[name]).abs().max() < 1e-3, name
    code, said = cli("pretrain", small, *small_size, "--vocab", 380, "--init", "a.pt", "-o", "c.pt", "--seed", 1)
    assert code == 0 and "random bias, encoder.embedding.weight (another vocabulary)" in said, said
    after = weights("c.pt")
    assert torch.allclose(after["encoder.layers.0.v.weight"], before["encoder.layers.0.v.weight"], atol=1e-6)
    assert len(after["bias"]) == 380 and not torch.allclose(after["encoder.embedding.weight"][:380],
                                                            before["encoder.embedding.weight"][:380], atol=1e-3)
    for args, message in ((["--size", "tiny"], "a.pt (codessm, 1 x 160) does not fit codessm, 4 x 128: dense.bias"),
                          (["--model", "zamba"], "a.pt is a codessm, whose layers are not those of zamba")):
        code, said = cli("pretrain", small, "--size", "small", *TINY[4:], "--init", "a.pt", "-o", "d.pt", *args)
        assert code == 2 and message in said, said
    # the state of a run knows what it began with
    assert tasks.read("a.pt")["config"]["kernels"] == 1


def test_fine_tuning_starts_from_given_weights(small):
    assert cli("pretrain", small, *TINY, "--steps", 1, "-o", "a.pt")[0] == 0
    write_toy("toy", "classify", n=64)
    code, said = cli("finetune", "classify", "--data", "toy", "--size", "tiny", "--model", "codessm-uni", "--init",
                     "a.pt", "--ctx", 32, "--steps", 1, "--lr", 1e-12, "--workers", 0)
    assert code == 0 and "classify, from a.pt" in said and "random head.0.bias" in said, said
    before, after = codessm.load("a.pt").encoder.state_dict(), codessm.load("classify.pt").encoder
    assert after.config["model"] == "codessm-uni"
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in after.state_dict().items())
    code, said = cli("finetune", "classify", "--ckpt", "a.pt", "--init", "a.pt")
    assert code == 2 and "--ckpt brings its own" in said


# ---- every model in every task ----------------------------------------------------------------------

@pytest.mark.parametrize("model", MODELS)
def test_a_step_of_each_task(model, tokenizer, corpus, functions):
    """Each changes every weight, and can be evaluated."""
    def files(i):
        words = functions[i]["code"].split()
        return words, [w if len(w) < 3 else None for w in words]

    n = np.arange(8)
    splits = {"classify": functions_split(functions, tokenizer, 8, 1),
              "pair": functions_split(functions, tokenizer, 8, 2),
              "retrieval": functions_split(functions, tokenizer, 8, 2, query=n, candidates=n + 40, gold=n),
              "tag": Split(files, n[:4, None], index={"UNK": 0, "=": 1, "if": 2}).prepare(tokenizer, 64), "mlm": None}
    for kind, split in splits.items():
        torch.manual_seed(0)
        encoder = Encoder(tokenizer.vocab, d=64, layers=1, N=4, model=model, ctx=64)
        task = tasks.MLM(encoder, tokenizer) if kind == "mlm" else tasks.OBJECTIVES[kind](
            encoder, tokenizer, kind, ["UNK", "=", "if"][:3 if kind == "tag" else 2], 64)
        before = {name: p.detach().clone() for name, p in task.named_parameters()}
        batch = one_batch(corpus, tokenizer, 8) if split is None else next(split.training(8, [64], 0).stream())
        sums = tasks.Stepper(task, tasks.adamw(task, 1e-2))(batch)
        assert sums.isfinite().all() and sums[2] > 0
        same = [name for name, p in task.named_parameters() if torch.equal(p, before[name])]
        assert same == [], (kind, same)
        if split is not None:
            metrics, _ = tasks.evaluate(task, split.each(8, [64]), split)
            assert all(map(math.isfinite, metrics.values()))


def test_runs_of_two_models_see_the_same(small, monkeypatch):
    """The same batches, masks, rates and evaluations at one seed, whatever random numbers a model draws."""
    seen, logs = {}, {}
    prepare = tasks.MLM.prepare

    def record(task, batch):
        tensors, count = prepare(task, batch)
        seen.setdefault(task.encoder.config["model"], []).append((task.training, tensors["ids"], tensors["targets"]))
        return tensors, count

    monkeypatch.setattr(tasks.MLM, "prepare", record)
    for model in ("codessm", "codessm-do", "bertcoder"):
        code, said = cli("pretrain", small, *TINY, "--steps", 4, "--eval-every", 4, "--model", model, "-o",
                         f"{model}.pt")
        assert code == 0, said
        lines = [json.loads(line) for line in open(f"{model}.pt.jsonl")]
        logs[model] = [{key: line[key] for key in ("step", "lr", "tokens", "epoch") if key in line} for line in lines]
    for model in ("codessm-do", "bertcoder"):
        assert logs[model] == logs["codessm"] and len(seen[model]) == len(seen["codessm"]) > 5
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
                   for a, b in zip(seen[model], seen["codessm"]))


def test_dropout_goes_on_where_it_was(small, monkeypatch):
    """An interrupted run ends with the weights of an undisturbed one."""
    command = ["pretrain", small, *TINY, "--steps", 6, "--eval-every", 6, "--model", "codessm-do"]
    step, taken = tasks.Stepper.__call__, []

    def interrupted(stepper, batch):
        taken.append(batch)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(stepper, batch)

    assert cli(*command, "-o", "whole.pt")[0] == 0
    monkeypatch.setattr(tasks.Stepper, "__call__", interrupted)
    code, said = cli(*command, "-o", "cut.pt")
    assert code == 130 and "interrupted at step 3 of 6" in said
    torch.manual_seed(7)
    assert cli(*command, "-o", "cut.pt")[0] == 0 and len(taken) == 6
    assert same(weights("cut.pt"), weights("whole.pt"))


def test_learned_positions_bound_ctx(small):
    assert cli("pretrain", small, *TINY, "--steps", 1, "--model", "bertcoder")[0] == 0
    write_toy("toy", "classify", n=64, test=8)
    args = ["finetune", "classify", "--ckpt", "model.pt", "--data", "toy", "--steps", 1, "--workers", 0]
    code, said = cli(*args)
    assert code == 0 and "ctx 32 rather than 512: model.pt is a bertcoder, which has learned positions for no" in said
    assert codessm.load("classify.pt").ctx == 32
    refused = "can read: bertcoder has learned positions for 32 tokens"
    for command in ([*args, "-o", "x.pt", "--ctx", 33],
                    ["evaluate", "classify", "--ckpt", "classify.pt", "--data", "toy", "--ctx", 64],
                    ["evaluate", "mlm", "--ckpt", "model.pt", "--data", small, "--ctx", 64],
                    ["predict", "--ckpt", "classify.pt", "toy/test.jsonl", "--ctx", 33]):
        code, said = cli(*command)
        assert code == 2 and refused in said and not os.path.exists("x.pt"), said
    code, said = cli("evaluate", "mlm", "--ckpt", "model.pt", "--data", small)
    assert code == 0 and "ctx 32 rather than 256" in said
    assert cli(*args, "-o", "x.pt", "--ctx", 24)[0] == 0 and codessm.load("x.pt").ctx == 24


@pytest.mark.parametrize("args, message", [
    (["--kernels", 3], "--kernels: 3 cannot share 128 channels equally: give a divisor of 128"),
    (["--kernels", 2, "--model", "codef"], "--kernels: codef has no S4D kernels, which are those of codessm, "),
])
def test_kernels_that_cannot_be(args, message):
    for command in (["pretrain", *TINY], ["finetune", "classify", "--size", "tiny"]):
        code, said = cli(*command, *args)
        assert code == 2 and message in said.replace("\n", " ")


def test_any_divisor_will_do_as_kernels(small):
    code, said = cli("pretrain", small, *TINY, "--steps", 1, "--kernels", 4, "-o", "k.pt")
    assert code == 0 and "codessm tiny, 4 kernels a direction, " in said
    assert codessm.load("k.pt").encoder.layers[0].forward_ssm.C.shape == (4, 64, 2)
