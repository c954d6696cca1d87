"""Starting from other weights, and runs of different models that can be compared."""
import math
import os
from functools import partial

import numpy as np
import pytest
import torch

import codessm
import tasks
from conftest import TINY, cli, says, weights, write_case
from test_model import affine, gelu_reference, layer_norm_reference, recurrence


# ---- BiGS -------------------------------------------------------------------------------------------

def bigs_dict(vocab, d=16, layers=3, N=4, positions=32):
    """A PyTorch state dict as BiGSForMaskedLM has it, of random weights."""
    torch.manual_seed(1)
    norms, dense = ["bigs.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"], {
        "bigs.pooler.dense": (d, d), "cls.predictions.transform.dense": (d, d)}
    shapes = {f"bigs.embeddings.{name}_embeddings.weight": (rows, d)
              for name, rows in dict(word=vocab, position=positions, token_type=2).items()}
    for at in (f"bigs.encoder.layer.{i}." for i in range(layers)):
        norms.append(at + "LayerNorm")
        dense |= {at + name: (d, d) for name in ("du_forward", "du_backward", "duc_forward", "duc_backward")}
        dense |= {at + "dv": (3 * d, d), at + "dol": (3 * d, d), at + "do": (d, 3 * d)}
        shapes |= {f"{at}{s4}.{name}": shape for s4 in ("fs4", "bs4") for name, shape in {
            "D": (1,), "kernel.C": (N, 2), "kernel.log_step": (1,), "kernel.A_re": (N,), "kernel.A_im": (N,)}.items()}
    shapes |= {f"{name}.weight": shape for name, shape in dense.items()} | {f"{name}.weight": (d,) for name in norms}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()} | {f"{name}.bias": (d,) for name in norms}
    shapes["cls.predictions.bias"] = (vocab,)
    tensors = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if "A_im" in name:
            tensor.mul_(10)
        if "A_re" in name:
            tensor[0] = 0.3  # which is clipped
    return tensors | {"bigs.embeddings.position_ids": torch.arange(positions)[None],
                      "cls.predictions.decoder.weight": tensors["bigs.embeddings.word_embeddings.weight"],
                      "cls.predictions.decoder.bias": tensors["cls.predictions.bias"]}


def bigs_logits(p, ids, layers, positions):
    """What BiGS computes (Wang et al. 2023) of tokens of type 0, in float64: real flips, and SSMs as recurrences."""
    p = {name: tensor.double().numpy() for name, tensor in p.items()}

    dense = partial(affine, p)

    def norm(name, x):
        return layer_norm_reference(x) * p[name + ".weight"] + p[name + ".bias"]

    def s4(name, u):
        return recurrence({key.rpartition(".")[2]: p[key] for key in p if key.startswith(name + ".")}, u)

    x = p["bigs.embeddings.word_embeddings.weight"][ids] + p["bigs.embeddings.token_type_embeddings.weight"][0]
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


@pytest.fixture
def start(make_case, tmp_path):
    """`start(tensors, model)` is a small MLM that begins with them, and what was said of it."""
    def begin(content, model="codessm"):
        torch.save(content, tmp_path / "bigs.bin")
        objective = make_case("mlm", d=16, ctx=24, model=model).objective
        return objective, tasks.InitialWeights.read(str(tmp_path / "bigs.bin")).copy_to(objective)
    return begin


@pytest.mark.parametrize("model, nest, prefix, without", [
    ("codessm", None, "", ""), ("codessm-pos", "state_dict", "module.", ""), ("codessm-8k", "model", "_orig_mod.", ""),
    ("codessm-hf", "model_state_dict", "module._orig_mod.", "bigs."), ("codessm-pos", None, "", "bigs.")])
def test_from_bigs_weights_it_computes_what_bigs_does(model, nest, prefix, without, start, tokenizer):
    """The first two layers of three, and 24 positions of 32; a constant added to all logits of a token says nothing."""
    p = bigs_dict(tokenizer.vocab)
    named = {prefix + name.removeprefix(without): tensor for name, tensor in p.items()}
    objective, said = start({nest: named, "epoch": 3} if nest else named, model)
    ids = torch.randint(tokenizer.vocab, (1, 21))
    expected = bigs_logits(p, ids[0].numpy(), 2, model == "codessm-pos")
    for chunk in (8, None):
        objective.encoder.chunk = chunk
        with torch.no_grad():
            ours = objective.eval().logits(objective.encoder(ids))[0].double().numpy()
        difference = ours - expected
        assert np.abs(difference - difference.mean(-1, keepdims=True)).max() < 1e-5 * np.abs(expected).max()
    new = "layers 0-1 (local.0.bias, local.0.weight, local.1.bias, local.1.weight)" if "hf" in model else "nothing"
    assert "(BiGS): taken layers 0-1, bias, dense.bias, dense.weight, encoder.embedding.weight" in said
    assert f"; new {new}; not taken layers 2-2" in said and "pooler.dense.weight" in said
    assert ("positions.weight" in said.split("not taken")[1]) == (model != "codessm-pos")


def test_of_fewer_positions_the_others_stay_random_and_of_another_vocabulary_the_embedding(start, tokenizer, make_case):
    p = bigs_dict(tokenizer.vocab + 1, positions=9)
    objective, said = start(p, "codessm-pos")
    assert "of positions the first 9" in said and "new bias, encoder.embedding.weight (another vocabulary)" in said
    before, after = make_case("mlm", d=16, ctx=24, model="codessm-pos").objective.state_dict(), objective.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {"bias", "encoder.embedding.weight"}
    ours, old = after["encoder.positions.weight"], before["encoder.positions.weight"]
    assert torch.equal(ours[:9], p["bigs.embeddings.position_embeddings.weight"]) and torch.equal(ours[9:], old[9:])


def test_the_hybrid_takes_the_other_layers_of_codessm_8k(make_case, tmp_path):
    theirs, ours = (make_case("mlm", d=64, layers=4, model=model).objective
                    for model in ("codessm-8k", "codessm-hybrid"))
    tasks.save(tmp_path / "8k.pt", theirs)
    said = tasks.InitialWeights.read(str(tmp_path / "8k.pt")).copy_to(ours)
    attention = "encoder.layers.2."
    assert "taken layers 0-1, layers 3-3, bias" in said and "new layers 2-2; not taken layers 2-2" in said, said
    theirs = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert name.startswith(attention) if name not in theirs else torch.equal(value, theirs[name])


def test_what_cannot_be_taken_is_named(small):
    """In one sentence, with nothing written."""
    p, whole, at = bigs_dict(400, d=128, layers=1, N=64), os.listdir(), "bigs.encoder.layer.0."
    for change, args, *named in (
            ({at + "fs4.kernel.B": torch.zeros(3), "lm_head": 5, 5: torch.zeros(1)}, [], f"{at}fs4.kernel.B, lm_head"),
            ({at + "do.weight": torch.zeros(128, 256), at + "bs4.kernel.C": torch.zeros(64)}, [],
             "codessm, 4 x 128: encoder.layers.0.backward_ssm.C (64,), encoder.layers.0.o.weight (128, 256)"),
            ({at + "du_backward.weight": torch.zeros(1, 128)}, [], "encoder.layers.0.fb.weight (129, 128)"),
            ({"cls.predictions.decoder.weight": torch.zeros(400, 128)}, [], "decoder"),
            ({"bigs.embeddings.token_type_embeddings.weight": torch.zeros(2, 64)}, [], "not a whole one"),
            (None, [], "neither a codessm checkpoint nor a BiGS state dict"),
            ({}, ["--model", "bertcoder"], "bertcoder"), ({}, ["-o", "x.bin"], "would replace"),
            ({}, ["--init", "gone.bin"], "gone.bin: No such file")):
        torch.save({"layer.weight": torch.zeros(3)} if change is None else p | change, "x.bin")
        code, said = cli("pretrain", small, *TINY, "--steps", 1, "--init", "x.bin", *args)
        assert code == 2 and all(name in said for name in named) and len(said.splitlines()) == 1, (named, said)
        assert sorted(os.listdir()) == sorted([*whole, "x.bin"])


# ---- from a checkpoint ------------------------------------------------------------------------------

def test_a_run_starts_from_given_weights(small, quick, monkeypatch, functions, tmp_path):
    """With their tokenizer and size, at a tenth of the learning rate; another vocabulary leaves embeddings random."""
    monkeypatch.setitem(codessm.SIZES, "small", dict(d=160, layers=1))
    command, embedding = ["pretrain", small, *TINY[4:], "--steps", 1], "encoder.embedding.weight"
    still = ["--lr", 1e-12, "--init", "a.pt", "-o"]
    assert cli(*command, "--size", "small", "--vocab", 400, "-o", "a.pt")[0] == 0
    before = weights("a.pt")
    says(0, ["codessm-uni, 1 x 160, 8 kernels per direction", "peak learning rate 0.0002",
             "a.pt (codessm, 1 x 160): taken layers 0-0, bias", "new nothing;"],
         *command, "--init", "a.pt", "-o", "b.pt", "--model", "codessm-uni", "--kernels", 8)
    says(0, "codessm-uni, 1 x 160, 8 kernels", *command, "--init", "b.pt", "-o", "e.pt")  # what is not given is b.pt's
    says(2, "(give --kernels 8, as it has)", *command, "--init", "b.pt", "-o", "d.pt", "--kernels", 4)
    after = codessm.load("b.pt")
    assert after.tokenizer.text == codessm.load("a.pt").tokenizer.text
    assert all((value - before[name]).abs().max() < 1e-3 for name, value in after.state_dict().items())
    says(0, "new bias, encoder.embedding.weight (another vocabulary)", *command, *still, "c.pt", "--vocab", 380)
    after = weights("c.pt")
    assert torch.allclose(after["encoder.layers.0.v.weight"], before["encoder.layers.0.v.weight"], atol=1e-6)
    assert len(after["bias"]) == 380 and not torch.allclose(after[embedding], before[embedding][:380], atol=1e-3)
    torch.save(tasks.read("a.pt") | {"config": {"model": "codessm"}}, "x.pt")
    says(2, "x.pt is neither a codessm checkpoint", *command, "--init", "x.pt", "-o", "d.pt")
    for args, message in ((["--size", "tiny"], "a.pt (codessm, 1 x 160) does not fit codessm, 1 x 64: dense.bias"),
                          (["--model", "zamba"], "a.pt is a codessm, whose layers are not those of zamba")):
        says(2, message, *command, *still, "d.pt", *args)

    os.mkdir("toy")
    write_case(tmp_path / "toy", "classify", functions)
    says(0, ["classify, from a.pt", "new head.0.bias"],
         "finetune", "classify", "--data", "toy", "--steps", 1, *still, "t.pt", "--model", "codessm-uni")
    after = codessm.load("t.pt").encoder
    assert after.config["model"] == "codessm-uni"
    for name, value in after.state_dict().items():
        assert torch.allclose(value, before[f"encoder.{name}"], atol=1e-6)


# ---- every model ------------------------------------------------------------------------------------

def test_learned_positions_bound_ctx(small, quick, functions, tmp_path):
    assert cli("pretrain", small, *TINY, "--steps", 1, "--model", "bertcoder")[0] == 0
    os.mkdir("toy")
    write_case(tmp_path / "toy", "classify", functions)
    finetune = ["finetune", "classify", "--ckpt", "model.pt", "--data", "toy", "--steps", 1]
    says(0, "ctx 32 rather than 512: model.pt is a bertcoder", *finetune)
    assert codessm.load("classify.pt").ctx == 32
    for command in ([*finetune, "-o", "x.pt"], ["evaluate", "mlm", "--ckpt", "model.pt", "--data", small],
                    ["predict", "--ckpt", "classify.pt", "toy/valid.jsonl"]):
        says(2, "bertcoder has learned positions for 32 tokens", *command, "--ctx", 33)
        assert not os.path.exists("x.pt")
    assert cli(*finetune, "-o", "x.pt", "--ctx", 24)[0] == 0 and codessm.load("x.pt").ctx == 24
