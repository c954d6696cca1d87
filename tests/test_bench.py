"""`codessm bench`: its figures agree with each other and with what they are measures of."""
import functools
import json
import re
import subprocess
import sys

import pytest
import torch

import codessm
import tasks
from conftest import ROOT, cli, says

TINY = ["bench", "--size", "tiny", "--batch-tokens", "256", "--repeats", "2", "--device", "cpu"]
RATE = functools.cache(tasks.product_rate)  # of products that take a second or two
InductorError = type("InductorError", (type("TorchDynamoException", (RuntimeError,), {}),), {})


@pytest.fixture(autouse=True)
def without_warming_up(monkeypatch):
    monkeypatch.setattr(tasks.median_seconds, "__defaults__", (0.0,))
    monkeypatch.setattr(tasks, "product_rate", RATE)


def result_of(*args):
    code, said = cli(*TINY, *args, "--json")
    assert code == 0, said
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("train", [[], ["--train"]])
def test_the_json_has_every_figure(train, quick):
    result = result_of("--lengths", "32,128", "--attention", "both", *train)
    assert result["size"] == "tiny" and result["train"] == bool(train) and result["precision"] == "float32"
    assert result["device"].startswith("cpu") and result["torch"] == torch.__version__ and result["batch_tokens"] == 256
    forms, rows = [("codessm", ""), ("rocoder", ""), ("rocoder", "plain")], result["rows"]
    assert [(row["length"], row["model"], row["form"]) for row in rows] == [(L, *f) for L in (32, 128) for f in forms]
    for i, row in enumerate(rows):
        assert row["batch"] * row["length"] == 256 and not row["compiled"] and row["first_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds"])
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / rows[i // 3 * 3]["tokens_per_second"])
        # the one layer of codessm has 13 d^2 weights in linear maps, one of rocoder 12 d^2
        FLOP = 2 * (13 if row["model"] == "codessm" else 12) * 64 ** 2 * (3 if train else 1)
        assert row["share"] == pytest.approx(FLOP * row["tokens_per_second"] / result["product_rate"])


def test_every_model_can_be_measured_with_the_kernels_that_are_asked_for(monkeypatch):
    def measure(encoder, *args, original=tasks.measure):
        kernels.append(encoder.config["kernels"])
        return original(encoder, *args)
    kernels = []
    monkeypatch.setattr(tasks, "measure", measure)
    result = result_of("--models", ",".join(codessm.MODELS), "--lengths", 32, "--repeats", 1, "--kernels", 4)
    assert [row["model"] for row in result["rows"]] == list(codessm.MODELS)
    assert kernels == [4 if model.k else 0 for model in codessm.MODELS.values()]
    # of zamba's six layers the third and the sixth call the shared block, whose products count each time
    d, zamba = 128, next(row for row in result["rows"] if row["model"] == "zamba")
    layer, call = (4 * d + 2 * 64 + 4) * d + 2 * d * d, (12 + 2 + 8 + 4 + 1) * d * d + d * 16 + 16 * 8 * d
    assert zamba["share"] == pytest.approx(
        2 * (6 * layer + 2 * call) * zamba["tokens_per_second"] / result["product_rate"])


def test_the_table_has_a_row_for_each_model_and_length_and_says_what_does_not_fit(monkeypatch, quick):
    def measure(encoder, length, *rest, original=tasks.measure):
        if encoder.config["model"] == "rocoder" and length > 32:
            raise MemoryError if length == 128 else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 G")
        return original(encoder, length, *rest)
    monkeypatch.setattr(tasks, "measure", measure)
    options = ["--models", "rocoder,codessm", "--lengths", "32,64,128"]
    rows = result_of(*options)["rows"]
    assert [row.get("error") for row in rows] == [None, None, "out of memory", None, "out of memory", None]
    assert rows[3]["ratio"] is None and rows[1]["ratio"] > 0
    code, said = cli(*TINY, *options)
    table = [line.split() for line in re.findall("(?:codessm|rocoder)  .*", said)]  # a bar may be before it in the line
    assert code == 0 and "TFLOP/s" in said and [row[:3] for row in table] == [
        [name, str(L), str(256 // L)] for L in (32, 64, 128) for name in ("rocoder", "codessm")]
    assert table[0][-3] == "1.00" and table[2][3:] == ["out", "of", "memory"]


@pytest.mark.parametrize("error, sentence", [
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "illegal memory access"),
    (InductorError("backend='inductor' raised:\nCompileError: no header\n"), "no header): --no-compile")])
def test_an_error_that_is_not_for_want_of_memory_ends_it(error, sentence, monkeypatch):
    def measure(*_):
        raise error
    monkeypatch.setattr(tasks, "measure", measure)
    says(1, sentence, *TINY, "--lengths", "32")


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_that_of_the_row_alone():
    """Plain attention holds at least the scores of two heads, 1,024 x 1,024 floats each; a large parent counts not."""
    parent = "import subprocess, sys; ballast = b'x' * 800_000_000; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    command = [f"{ROOT}/codessm.py", *TINY, "--batch-tokens", "1024", "--lengths", "1024", "--models", "rocoder"]
    done = subprocess.run([sys.executable, "-c", parent, sys.executable, *command, "--attention", "both", "--json"],
                          capture_output=True, text=True, check=True)
    fused, plain = (row["memory"] for row in json.loads(done.stdout)["rows"])
    assert 2 * 1024 ** 2 * 4 < plain < 5e8 and 0 < fused < plain


@pytest.mark.parametrize("arguments, message", [
    (["--models", "codessm", "--attention", "plain"], "--attention is bertcoder's"),
    (["--models", "rocoder,codef", "--kernels", 2], "--kernels is of models with S4D kernels"),
    (["--models", "codessm,bert"], "'bert' is not one of"), (["--lengths", "512,x"], "'x' is not a valid integer")])
def test_wrong_arguments(arguments, message):
    code, said = cli(*TINY, *arguments)
    assert code == 2 and message in " ".join(said.split())
