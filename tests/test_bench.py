"""`codessm bench`: its figures agree with each other and with what they are measures of."""
import functools
import json
import subprocess
import sys

import pytest
import torch

import codessm
from codessm import Encoder
from conftest import ROOT, cli

TINY = ["bench", "--size", "tiny", "--batch-tokens", 256, "--repeats", 2, "--device", "cpu"]
RATE = functools.cache(codessm.product_rate)  # of products that take a second or two


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(codessm.median_seconds, "__defaults__", (0.0,))
    monkeypatch.setattr(codessm, "product_rate", RATE)


@pytest.mark.parametrize("train", [[], ["--train"]])
def test_the_json_has_every_figure(train, monkeypatch):
    monkeypatch.setitem(codessm.SIZES, "tiny", dict(d=64, layers=1))
    code, said = cli(*TINY, "--lengths", "32,128", "--attention", "both", "--convolution", "both", "--json", *train)
    assert code == 0, said
    result = json.loads(said.splitlines()[-1])
    assert result["size"] == "tiny" and result["train"] == bool(train) and result["precision"] == "float32"
    assert result["device"].startswith("cpu") and result["torch"] == torch.__version__ and result["batch_tokens"] == 256
    forms = [("codessm", ""), ("codessm", "fft"), ("rocoder", ""), ("rocoder", "plain")]
    rows = result["rows"]
    assert [(row["length"], row["model"], row["form"]) for row in rows] == [(L, *f) for L in (32, 128) for f in forms]
    for i, row in enumerate(rows):
        assert row["batch"] * row["length"] == 256 and not row["compiled"] and row["first_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds"])
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / rows[i // 4 * 4]["tokens_per_second"])
        # the one layer of codessm has 13 d^2 weights in linear maps, one of rocoder 12 d^2
        FLOP = 2 * (13 if row["model"] == "codessm" else 12) * 64 ** 2 * (3 if train else 1)
        assert row["share"] == pytest.approx(FLOP * row["tokens_per_second"] / result["product_rate"])


def test_the_table_has_a_row_for_each_model_and_length():
    code, said = cli(*TINY, "--lengths", "16,32", "--models", "rocoder,codessm")
    rows = [line.split() for line in said.splitlines() if line.startswith(("codessm ", "rocoder "))]
    assert code == 0 and [row[:3] for row in rows] == [
        [name, str(L), str(256 // L)] for L in (16, 32) for name in ("rocoder", "codessm")]
    assert [row[-3] for row in rows][::2] == ["1.00"] * 2 and "TFLOP/s" in said


def test_every_model_can_be_measured():
    code, said = cli("bench", "--size", "tiny", "--models", ",".join(codessm.MODELS), "--lengths", 32,
                     "--batch-tokens", 64, "--repeats", 1, "--device", "cpu", "--json")
    result = json.loads(said.splitlines()[-1])
    assert code == 0 and [row["model"] for row in result["rows"]] == list(codessm.MODELS)
    # of zamba's six layers the third and the sixth call the shared block, whose products count each time
    d, zamba = 128, result["rows"][-1]
    layer, call = (4 * d + 2 * 64 + 4) * d + 2 * d * d, (12 + 2 + 8 + 4 + 1) * d * d + d * 16 + 16 * 8 * d
    assert zamba["share"] == pytest.approx(
        2 * (6 * layer + 2 * call) * zamba["tokens_per_second"] / result["product_rate"])


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def bench_one(name, _form, _size, length, *rest, original=codessm.bench_one):
        if name == "rocoder" and length == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if name == "rocoder" and length == 128:
            raise MemoryError
        return original(name, _form, _size, length, *rest)
    monkeypatch.setattr(codessm, "bench_one", bench_one)
    code, said = cli(*TINY, "--models", "rocoder,codessm", "--lengths", "32,64,128", "--json")
    rows = json.loads(said.splitlines()[-1])["rows"]
    errors = [None, None, "out of memory", None, "out of memory", None]
    assert code == 0 and [row.get("error") for row in rows] == errors
    assert rows[3]["ratio"] is None and rows[1]["ratio"] > 0
    code, said = cli(*TINY, "--models", "codessm,rocoder", "--lengths", "64")
    row = next(line for line in said.splitlines() if line.startswith("rocoder "))
    assert code == 0 and row.split() == ["rocoder", "64", "4", "out", "of", "memory"]


def test_an_error_that_is_not_for_want_of_memory_is_none(monkeypatch):
    def bench_one(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(codessm, "bench_one", bench_one)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli(*TINY, "--lengths", "32")


def test_a_compiler_that_fails_is_a_sentence(monkeypatch):
    class TorchDynamoException(RuntimeError):
        pass

    class InductorError(TorchDynamoException):
        pass

    def bench_one(*_):
        raise InductorError("backend='inductor' raised:\nCompileError: no header\nmore")
    monkeypatch.setattr(codessm, "bench_one", bench_one)
    code, said = cli(*TINY, "--lengths", "32")
    assert code == 1 and "Error: the compiler failed (CompileError: no header): --no-compile does without it" in said


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_that_of_the_row_alone():
    """Plain attention holds at least the scores of two heads, 1,024 x 1,024 floats each; a large parent counts not."""
    script = f"""
import subprocess, sys
ballast = bytearray(b"x") * 800_000_000
command = "bench --size tiny --models rocoder --lengths 1024 --batch-tokens 1024 --repeats 1 --attention both --device cpu --json"
sys.exit(subprocess.run([sys.executable, "{ROOT}/codessm.py", *command.split()]).returncode)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fused, plain = (row["memory"] for row in json.loads(done.stdout)["rows"])
    assert 2 * 1024 ** 2 * 4 < plain < 5e8 and 0 < fused < plain


@pytest.mark.parametrize("arguments, message", [
    (["--models", "codessm", "--attention", "plain"], "--attention is bertcoder's and rocoder's, --convolution that of"),
    (["--models", "rocoder", "--convolution", "fft"], "--attention is bertcoder's and rocoder's, --convolution that of"),
    (["--lengths", "512,x"], "512,x is no list of lengths such as 512,1024,2048"),
    (["--lengths", "0"], "0 is no list of lengths"),
    (["--models", "codessm,bert"], "'bert' is none of codessm, codessm-pos, "),
    (["--device", "cuda:99"], "--device cuda:99: there is no such device here"),
])
def test_wrong_arguments(arguments, message):
    code, said = cli(*TINY, *arguments)
    assert code == 2 and message in said.replace("\n", " ")


def test_plain_attention_and_fft_compute_the_same():
    """What is compared differs in speed and memory alone."""
    torch.manual_seed(0)
    ids, lengths = torch.randint(50, (2, 40)), torch.tensor([40, 23])
    for model in ("codessm", "rocoder"):
        encoder = Encoder(50, d=64, layers=2, model=model)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(2)
            one = encoder(ids, lengths)
            encoder.fft = True
            for layer in encoder.layers:
                layer.plain = True
            other = encoder(ids, lengths)
        assert not torch.equal(one[0], other[0])  # they are two ways
        for ours, theirs in ((one[0], other[0]), (one[1, :23], other[1, :23])):
            assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
