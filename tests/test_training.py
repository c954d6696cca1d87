"""Masked language modelling, the training loop, checkpoints and resume."""
import copy
import gzip
import json
import math
import os
import shutil
import signal
import time
import types
from functools import partial

import numpy as np
import pytest
import torch

import codessm
import data
import tasks
from codessm import Encoder
from conftest import TINY, Forked, cli, program, wait_for, write_lines
from data import Batch, Batches, Problem, Samples
from tasks import MLM


@pytest.fixture
def task(tokenizer):
    torch.manual_seed(0)
    return MLM(Encoder(tokenizer.vocab, d=32, layers=2, N=8), tokenizer)


def one_batch(corpus, tokenizer, size=32, ctx=64, epoch=0):
    batches = Batches(Samples(corpus, tokenizer, ctx), corpus.train[:size], size, [ctx], tokenizer.pad)
    return batches[epoch, 0][0]


# ---- masks and the loss -----------------------------------------------------------------------------

def test_masking_proportions(task, tokenizer):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 257, 2000)
    ids = np.full((2000, 256), tokenizer.pad, np.int32)
    for row, length in zip(ids, lengths):
        row[:length] = rng.integers(0, tokenizer.vocab, length)  # special tokens among them
    batch = Batch(ids, lengths.astype(np.int32), np.arange(2000), 3)
    tensors, count = task.prepare(batch)
    read, targets = tensors["ids"].numpy(), tensors["targets"].numpy()
    chosen = targets != tasks.IGNORE
    allowed = (np.arange(256) < lengths[:, None]) & ~np.isin(ids, tokenizer.special)
    assert not (chosen & ~allowed).any() and chosen.sum() == count
    assert (targets[chosen] == ids[chosen]).all() and (read[~chosen] == ids[~chosen]).all()
    # four standard errors of each share, of 250,000 tokens or 37,500 chosen ones
    assert abs(count / allowed.sum() - 0.15) < 4 * math.sqrt(0.15 * 0.85 / allowed.sum())
    masked = read[chosen] == tokenizer.mask
    kept = read[chosen] == ids[chosen]
    lucky = 0.1 / len(tokenizer.ordinary)  # a random token that is the old one
    for share, expected in ((masked, 0.8), (kept, 0.1 + lucky)):
        assert abs(share.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    random = read[chosen][~masked & ~kept]
    assert not np.isin(random, tokenizer.special).any() and len(set(random)) > 0.9 * len(tokenizer.ordinary)


def test_masks_depend_on_seed_epoch_and_record_alone(task, tokenizer, corpus):
    batch = one_batch(corpus, tokenizer)
    targets = task.prepare(batch)[0]["targets"]
    part = Batch(np.pad(batch.ids[5:9], ((0, 0), (0, 8))), batch.lengths[5:9], batch.records[5:9], 0)
    assert torch.equal(task.prepare(part)[0]["targets"][:, :64], targets[5:9])
    assert not torch.equal(task.prepare(batch._replace(epoch=1))[0]["targets"], targets)
    task.seed = 1
    assert not torch.equal(task.prepare(batch)[0]["targets"], targets)


def test_loss_equals_its_definition_and_logits_are_made_where_masked_only(task, tokenizer, corpus, monkeypatch):
    tensors, count = task.prepare(one_batch(corpus, tokenizer))
    seen = []
    logits = task.logits
    monkeypatch.setattr(task, "logits", lambda hidden: seen.append(hidden.shape) or logits(hidden))
    with torch.no_grad():
        loss, correct, total = task.sums(**tensors).tolist()
        everywhere = logits(task.encoder(tensors["ids"], tensors["lengths"])).double().numpy()
    assert seen == [(count, 32)] and total == count > 100
    expected, hits = 0.0, 0
    for row, targets in zip(everywhere, tensors["targets"].tolist()):
        for x, target in zip(row, targets):
            if target != tasks.IGNORE:
                expected += math.log(sum(map(math.exp, x))) - x[target]
                hits += x.argmax() == target
    assert abs(loss / expected - 1) < 1e-5 and correct == hits
    metrics = task.metrics(task.outputs([one_batch(corpus, tokenizer)]))
    assert abs(metrics["loss"] - expected / count) < 1e-5 and abs(metrics["accuracy"] - hits / count) < 1e-9
    assert abs(metrics["perplexity"] / math.exp(expected / count) - 1) < 1e-4


@pytest.mark.parametrize("vocab", [301, 304])
def test_logits_of_any_vocabulary_equal_the_product_in_bfloat16(tokenizer, vocab):
    """Also of one that autocast has to pad: logits and all gradients are those of the rounded tensors in float64."""
    task = MLM(Encoder(vocab, d=64, layers=1), tokenizer)
    task.bias = torch.nn.Parameter(torch.randn(vocab))
    hidden, weights = torch.randn(40, 64), torch.randn(40, vocab).bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        logits = task.logits(hidden)
        x = task.norm(torch.nn.functional.gelu(task.dense(hidden))).detach().bfloat16().double()
    (logits.double() * weights).sum().backward()
    W, b = task.encoder.embedding.weight, task.bias
    expected = x @ W.detach().bfloat16().double().T + b.detach().bfloat16().double()
    assert logits.shape == (40, vocab) and logits.dtype == torch.bfloat16
    for ours, theirs in ((logits, expected), (W.grad, weights.T @ x), (b.grad, weights.sum(0))):
        assert (ours - theirs).norm() < 5e-3 * theirs.norm()


def test_of_a_compiled_task_the_chosen_tokens_have_a_fixed_number(task, tokenizer, corpus):
    """Compiled, batches of one shape have tensors of one shape, and the same losses as before."""
    batches = [one_batch(corpus, tokenizer, epoch=epoch) for epoch in range(5)]
    with torch.no_grad():
        eager = [task.sums(**task.prepare(batch)[0]) for batch in batches]
        task.compiled = True
        prepared = [task.prepare(batch) for batch in batches]
        assert all(torch.equal(task.sums(**tensors), sums) for (tensors, _), sums in zip(prepared, eager))
    shapes = {tensors["where"].shape for tensors, _ in prepared}
    counts = {count for _, count in prepared}
    assert len(shapes) == 1 < len(counts) and max(counts) <= shapes.pop()[0] < 2 * max(counts)
    dense = Batch(np.full((4, 64), 50, np.int32), np.full(4, 64, np.int32), np.arange(4), 0)
    tensors, _ = task.prepare(dense)
    assert "lengths" not in tensors and "lengths" in prepared[0][0]  # without padding there is no mask


def test_accumulation_changes_memory_and_nothing_else(tokenizer, corpus):
    """Three uneven pieces of a batch that hold different numbers of masked tokens, against the whole."""
    weights = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        task = MLM(Encoder(tokenizer.vocab, d=32, layers=2, N=8), tokenizer)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        for epoch in range(3):
            sums = tasks.Stepper(task, optimizer, accumulate)(one_batch(corpus, tokenizer, 32, epoch=epoch))
        weights.append((sums, torch.cat([p.detach().flatten() for p in task.parameters()])))
    assert torch.allclose(weights[0][0], weights[1][0], rtol=1e-5)
    assert torch.allclose(weights[0][1], weights[1][1], atol=1e-6)


def test_learning_rate():
    rates = [tasks.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.02 and rates[99] == rates[100] == 2.0 and abs(rates[550] - 1.0) < 1e-12
    assert 0 < rates[-1] < 1e-4 and rates[100:] == sorted(rates[100:], reverse=True)
    assert tasks.learning_rate(299, 10_000, 2.0) == 2.0 > tasks.learning_rate(298, 10_000, 2.0)
    assert [tasks.learning_rate(0, steps, 2.0) for steps in (1, 9)] == [2.0, 2.0]


def test_what_decays(task):
    decays, free = (set(map(id, group["params"])) for group in tasks.adamw(task, 1e-3).param_groups)
    names = {name for name, p in task.named_parameters() if id(p) in decays}
    assert len(decays) + len(free) == len(list(task.parameters()))
    layer = {f"encoder.layers.{i}.{name}.weight" for i in range(2) for name in ("v", "fb", "u1", "u2", "u", "o")}
    assert names == layer | {"encoder.embedding.weight", "dense.weight"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_adamw_with_the_clipped_gradient(fused):
    """By its definition in float64; a gradient that is no number changes nothing, the moments and their count too."""
    class Given(torch.nn.Module):
        """Its gradient is `g`."""
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(3, 2)

        def sums(self, g):
            return torch.stack([(g[:, :3] * self.w.weight).sum() + (g[:, 3] * self.w.bias).sum(), *torch.ones(2)])

    task, rng = Given(), np.random.default_rng(0)
    optimizer = tasks.adamw(task, 0.1)
    if not fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, fused=False)
        optimizer.defaults["fused"] = False
    stepper = tasks.Stepper(task, optimizer)

    def weights():
        return np.hstack([task.w.weight.detach().numpy(), task.w.bias.detach().numpy()[:, None]]).astype(np.float64)

    w, m, v, t = weights(), 0.0, 0.0, 0
    for norm in (0.3, 7.0, math.nan, 0.8, 20.0, 0.05):
        g = rng.standard_normal((2, 4))
        g *= norm / np.linalg.norm(g)
        sums = stepper.take([{"g": torch.from_numpy(g).float()}], 1)
        assert sums.isnan().all() if math.isnan(norm) else sums[0].isfinite()
        if not math.isnan(norm):
            t, g = t + 1, g / max(1, norm)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w * (1 - 0.1 * np.array([0.01, 0.01, 0.01, 0])) \
                - 0.1 * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
        assert np.abs(weights() - w).max() < 2e-6


def test_a_tiny_model_overfits_32_samples(tokenizer, corpus):
    """More than 95 % on masks that it has never been trained on, of samples that it has."""
    STEPS = 250
    torch.manual_seed(0)
    task = MLM(Encoder(tokenizer.vocab, **codessm.SIZES["tiny"]), tokenizer)
    optimizer = tasks.adamw(task, 0)
    stepper, batch = tasks.Stepper(task, optimizer), one_batch(corpus, tokenizer, ctx=16)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = tasks.learning_rate(step, STEPS, 4e-3)
        stepper(batch._replace(epoch=step))
    with torch.no_grad():
        metrics = task.metrics(task.outputs(batch._replace(epoch=epoch) for epoch in range(STEPS, STEPS + 10)))
    assert metrics["accuracy"] > 0.95


@torch._dynamo.config.patch(cache_size_limit=2)  # (its own is 8; earlier tests leave 256)
@pytest.mark.parametrize("model", ["codessm", "rocoder"])
def test_compilations_are_as_many_as_lengths_and_modes(model, tokenizer, corpus, compiler, monkeypatch):
    """Over two epochs of mixed lengths and an evaluation; hitting dynamo's limit would fail (`compiler`)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    graphs = torch._dynamo.utils.counters["stats"]
    samples = data.Samples(corpus, tokenizer, 64)
    batches = data.Batches(samples, corpus.train[:24], 2, [32, 48, 64], tokenizer.pad, 0)
    assert len({batch.ids.shape for batch in batches.stream(stop=len(batches))}) > 2
    task = MLM(Encoder(tokenizer.vocab, d=64, layers=2, N=4, model=model), tokenizer)
    assert tasks.compile_parts(task, True)
    before = graphs["unique_graphs"]
    stepper, seen = tasks.Stepper(task, tasks.adamw(task, 1e-3)), set()
    for epoch, training in ((0, True), (0, False), (1, True)):
        for batch in batches.stream(epoch * len(batches), (epoch + 1) * len(batches)):
            tensors, _ = task.prepare(batch)
            L, masked = batch.ids.shape[1], "lengths" in tensors
            seen |= {("layer", L, masked, training), ("head", tensors["where"].shape, training),
                     *((end, L, training) for end in (("embedding", "sum") if model == "codessm" else ("embedding",)))}
            if training:
                stepper(batch)
            else:
                with torch.no_grad():
                    tasks.compute(task, tensors)
    assert graphs["unique_graphs"] - before == len(seen)


def test_where_a_step_cannot_be_recorded_the_run_goes_on_without(task, tokenizer, corpus, monkeypatch, capsys):
    """And takes the same steps; what is recorded are shapes that came twice before."""
    recorded = []

    def record(_recorder, shapes, _tensors):
        recorded.append(dict(shapes)["ids"])
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tasks.Recorder, "record", record)
    task.compiled = True
    weights = []
    for graphs in (False, True):
        other = copy.deepcopy(task)
        stepper = tasks.Stepper(other, torch.optim.SGD(other.parameters(), lr=0.1))
        stepper.recorder.wanted = graphs  # which needs a GPU
        for epoch, ctx in enumerate((64, 32, 64, 32, 64, 64)):
            stepper(one_batch(corpus, tokenizer, 16, ctx, epoch))
        weights.append(torch.cat([p.detach().flatten() for p in other.parameters()]))
    assert torch.equal(*weights) and recorded == [(16, 64)] and not stepper.recorder.wanted
    assert capsys.readouterr().err.count("could not be recorded as a CUDA graph (operation not permitted") == 1


def test_a_replayed_step_reads_its_batch(task, tokenizer, corpus, monkeypatch):
    """With a recording that is no CUDA graph but steps on the tensors it was given: batches, counts and masks."""
    replays = []

    def record(recorder, shapes, tensors):
        static, total = {name: tensor.clone() for name, tensor in tensors.items()}, torch.zeros(3)

        def replay():
            replays.append(shapes)
            total.copy_(recorder.function(static))

        recorder.recorded[shapes] = types.SimpleNamespace(replay=replay), static, total

    monkeypatch.setattr(tasks.Recorder, "record", record)
    task.compiled, found = True, []
    dense = Batch(np.full((16, 64), 50, np.int32), np.full(16, 64, np.int32), np.arange(16), 0)
    for graphs in (False, True):
        other = copy.deepcopy(task)
        stepper = tasks.Stepper(other, torch.optim.SGD(other.parameters(), lr=0.1))
        stepper.recorder.wanted = graphs
        sums = [stepper(dense._replace(epoch=epoch) if epoch % 2 else one_batch(corpus, tokenizer, 16, 64, epoch))
                for epoch in range(9)]
        found.append(torch.cat([*sums, *(p.detach().flatten() for p in other.parameters())]))
    assert torch.equal(*found) and len(replays) == 9 - 4 and len(set(replays)) == 2  # with a mask and without


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["mlm", "classify", "pair", "retrieval"])
def test_recorded_steps_are_steps(kind, tokenizer, corpus):
    """On a GPU ten steps of two lengths, replayed and not, end with the same weights."""
    rng, weights = np.random.default_rng(0), []
    ids = [rng.integers(4, tokenizer.vocab, (10, 8, L)).astype(np.int32) for L in (24, 40)]
    lengths, labels = np.full(8, 20, np.int32), rng.integers(0, 2, (10, 8))
    for graphs in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(tokenizer.vocab, d=64, layers=2)
        task = (MLM(encoder, tokenizer) if kind == "mlm" else
                tasks.OBJECTIVES[kind](encoder, tokenizer, kind, ["0", "1"], 64)).cuda()
        assert tasks.compile_parts(task, True)
        stepper = tasks.Stepper(task, tasks.adamw(task, 1e-3), graphs=graphs)
        for step in range(10):
            second = (ids[0][step], lengths) if kind in ("pair", "retrieval") else None
            stepper(Batch(ids[step % 2][step], lengths, np.arange(8) + 8 * step, 0, second, labels[step]))
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
        assert len(stepper.recorder.recorded) == (2 if graphs else 0)
    assert (weights[0] - weights[1]).abs().max() < 1e-3 and (weights[0] - weights[1]).norm() < 1e-2 * weights[0].norm()


def test_without_a_compiler_a_line_says_so_and_the_run_goes_on(small, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("Cannot find a working triton installation.\nMore of it.")
    monkeypatch.setattr(torch, "compile", fail)
    code, said = cli("pretrain", small, *TINY, "--steps", 2, "--compile")
    assert code == 0 and "no compiler works on cpu, so nothing is compiled (Cannot find a working triton" in said
    assert "More of it" not in said and os.path.exists("model.pt")


# ---- checkpoints ------------------------------------------------------------------------------------

def test_save_and_load(task, tmp_path, tokenizer, corpus):
    path = tmp_path / "m.pt"
    codessm.save(path, task)
    again = codessm.load(path)
    batch = one_batch(corpus, tokenizer)
    ids, lengths = torch.from_numpy(batch.ids), torch.from_numpy(batch.lengths)
    with torch.no_grad():
        assert torch.equal(again.logits(again.encoder(ids, lengths)), task.eval().logits(task.encoder(ids, lengths)))
    assert again.tokenizer.encode("x = 1") == tokenizer.encode("x = 1") and not again.training
    assert all(p.requires_grad for p in again.parameters())


def test_loading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"format": tasks.FORMAT, "weights": Evil()}, tmp_path / "m.pt")
    with pytest.raises(Problem, match="m.pt is not a codessm checkpoint"):
        codessm.load(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint(task, tmp_path):
    good = tmp_path / "good.pt"
    codessm.save(good, task)
    content = tasks.read(good)
    for name, bad in {"text.pt": b"hello", "empty.pt": b"", "cut.pt": good.read_bytes()[:-5000]}.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(Problem, match=f"{name} is not a codessm checkpoint, or not a whole one"):
            codessm.load(tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(Problem, match="not a codessm checkpoint"):
        codessm.load(tmp_path / "list.pt")
    for change in ({"config": content["config"] | {"d": 64}}, {"config": {"depth": 3}}, {"weights": {}}):
        torch.save(content | change, tmp_path / "misfit.pt")
        with pytest.raises(Problem, match="its weights do not fit its configuration"):
            codessm.load(tmp_path / "misfit.pt")
    for path, message in ((tmp_path / "none.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(Problem, match=message):
            codessm.load(path)


# ---- runs -------------------------------------------------------------------------------------------

def weights(path):
    return tasks.read(path)["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_writes_what_it_says(small):
    code, printed = cli("pretrain", small, *TINY, "--epochs", 2, "--json", "-o", "m.pt")
    result = json.loads(printed[printed.index('{"output"'):].splitlines()[0])
    assert code == 0 and sorted(os.listdir()) == ["m.pt", "m.pt.jsonl", "small.jsonl"]
    log = [json.loads(line) for line in open("m.pt.jsonl")]
    trained, evaluated = ([line for line in log if key in line] for key in ("loss", "valid_loss"))
    assert result["steps"] == 16 and [line["step"] for line in trained] == list(range(1, 17))
    assert [line["step"] for line in evaluated] == [*range(0, 17, 2)]
    assert abs(trained[-1]["epoch"] - 2) < 1e-9 and trained[-1]["loss"] < trained[0]["loss"]
    best = min(evaluated, key=lambda line: line["valid_loss"])
    metrics = {f"valid_{name}": result[name] for name in ("loss", "accuracy", "perplexity")}
    assert metrics | {"step": best["step"]} == best
    model = codessm.load("m.pt")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_without_steps_it_is_one_epoch(small):
    code, printed = cli("pretrain", small, *TINY)
    assert code == 0 and "8 steps of 8 samples (1.0 epochs)" in printed
    assert "model.pt: 8 steps in" in printed and "on 6 held-out records loss" in printed


def test_workers_and_files_do_not_change_the_result(small, functions):
    """Two worker processes; the corpus through a gzip file in a folder, and through standard input."""
    assert cli("pretrain", small, *TINY, "--steps", 6, "-o", "a.pt")[0] == 0
    assert cli("pretrain", small, *TINY, "--steps", 6, "-o", "b.pt", "--workers", 2)[0] == 0
    assert cli("pretrain", "-", *TINY, "--steps", 6, "-o", "c.pt", input=open(small, "rb").read())[0] == 0
    os.mkdir("folder")
    with gzip.open("folder/c.jsonl.gz", "wb") as file:
        file.write(open(small, "rb").read())
    assert cli("pretrain", "folder", *TINY, "--steps", 6, "-o", "d.pt")[0] == 0
    for other in "bcd":
        assert same(weights("a.pt"), weights(f"{other}.pt"))
    assert cli("pretrain", small, *TINY, "--steps", 6, "-o", "e.pt", "--seed", 1)[0] == 0
    assert not same(weights("a.pt"), weights("e.pt"))


def logged_steps(path):
    try:
        return max((json.loads(line)["step"] for line in open(path)), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def log_time(path):
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def test_a_killed_run_ends_as_an_undisturbed_one(small):
    """SIGKILL at a random step, then another signal at a later one; each time the same command again at once.

    With two worker processes, which must not outlive the run with its lock. States are saved at the ends of
    epochs, or (0 seconds) in the midst of them as well.
    """
    command = ["pretrain", small, *TINY, "--steps", 40, "--workers", 2]
    code, said = cli(*command, "-o", "whole.pt")
    assert code == 0, said
    rng = np.random.default_rng(int(time.time()))
    stops = [*zip(sorted(rng.integers(8, 29, 2).tolist()), (signal.SIGKILL, signal.SIGTERM),
                  rng.permutation([0, 300]).tolist())]
    for stop, number, save_seconds in stops:
        before = log_time("m.pt.jsonl")
        run = Forked(*command, "-o", "m.pt", SAVE_SECONDS=save_seconds)
        wait_for(lambda: log_time("m.pt.jsonl") > before and logged_steps("m.pt.jsonl") >= stop
                 and os.path.exists("m.pt.state"), run)
        run.send_signal(number)
        _, said = run.communicate()
        if number == signal.SIGKILL:
            assert run.returncode == -9
        else:
            assert run.returncode == 128 + number, (stops, said)
            assert "interrupted at step" in said and "the same command goes on from it" in said
            assert "Traceback" not in said
        assert not os.path.exists("m.pt")
    code, said = cli(*command, "-o", "m.pt")
    assert code == 0 and "going on from step" in said
    assert same(weights("m.pt"), weights("whole.pt")), stops
    assert open("m.pt.jsonl").read() == open("whole.pt.jsonl").read(), stops
    assert not os.path.exists("m.pt.state")


def test_streaming_leaves_the_random_state_alone(tokenizer, corpus):
    """Or a resumed run, which streams anew, would not have the state that it saved."""
    before = torch.get_rng_state()
    batches = Batches(Samples(corpus, tokenizer, 32), corpus.train, 8, [32], tokenizer.pad)
    list(batches.stream(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def folder():
    return {name: (os.stat(name).st_mtime_ns, open(name, "rb").read()) for name in os.listdir()}


def test_a_finished_run_is_not_touched(small):
    command = ["pretrain", small, *TINY, "--steps", 2]
    assert cli(*command)[0] == 0
    before = folder()
    code, said = cli(*command)
    assert code == 2 and folder() == before
    assert "model.pt is a finished run's: give another -o, or --restart to replace it" in said
    assert cli(*command, "--restart")[0] == 0 and folder().keys() == before.keys()
    assert folder()["model.pt"] != before["model.pt"]


@pytest.fixture(scope="module")
def interrupted(functions, tmp_path_factory):
    """A command, and the folder in which it left a state when it was interrupted."""
    path, command = tmp_path_factory.mktemp("interrupted"), ["pretrain", "small.jsonl", *TINY, "--steps", 5000]
    write_lines(path / "small.jsonl", functions[:65])
    run = program(*command, cwd=path)
    wait_for((path / "model.pt.state").exists, run)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60) and run.returncode == 130
    return command, path


@pytest.fixture
def unfinished(interrupted, small):
    """That command, with what it left in the current folder."""
    command, path = interrupted
    shutil.copytree(path, ".", dirs_exist_ok=True)
    return command


def test_another_runs_state_is_refused(unfinished, small, functions):
    before = folder()
    code, said = cli(*unfinished, "--lr", "0.5", "--batch", "4")
    assert code == 2 and folder() == before
    assert "is of a run with batch 8, lr 0.002, and this one has batch 4, lr 0.5: repeat" in said
    assert codessm.load("model.pt.state").encoder.config["d"] == 128  # a state file is a checkpoint too
    write_lines(small, functions[:64])  # the corpus changed
    code, said = cli(*unfinished)
    assert code == 2 and "is of a run with corpus small.jsonl " in said
    command = ["2" if word == 5000 else word for word in unfinished]
    assert cli(*command)[0] == 2
    assert cli(*command, "--restart")[0] == 0 and not os.path.exists("model.pt.state")


def test_a_damaged_state_is_refused(unfinished):
    content = open("model.pt.state", "rb").read()
    open("model.pt.state", "wb").write(content[:len(content) // 2])
    code, said = cli(*unfinished)
    assert code == 2 and "model.pt.state is not a codessm checkpoint, or not a whole one" in said


def test_a_state_with_wrong_fields_is_refused(unfinished):
    state = tasks.read("model.pt.state")
    for name, value in [(name, None) for name in ("weights", "optimizer", "step", "window", "random", "settings",
                                                  "tokenizer", "log", "tokens")] + \
            [("step", -1), ("step", 10**9), ("best", {"a": 1}), ("settings", {}), ("settings", {"corpus": None}),
             ("log", "x")]:
        torch.save(state | {name: value}, "model.pt.state")
        before = folder()
        code, said = cli(*unfinished)
        assert code == 2 and said.count("model.pt.state") == said.count("--restart") == said.count("Error: ") == 1, said
        assert folder() == before


def test_a_gpus_state_goes_on_without_one(unfinished):
    """Its learning rate is a tensor, and its optimizer may be recorded."""
    state = tasks.read("model.pt.state")
    for group in state["optimizer"]["param_groups"]:
        group.update(lr=torch.tensor(0.1), capturable=True)
    torch.save(state | {"random_cuda": torch.zeros(16, dtype=torch.uint8)}, "model.pt.state")
    run = Forked(*unfinished, LOG_STEPS=1)
    wait_for(lambda: logged_steps("model.pt.jsonl") > state["step"], run)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    again = tasks.read("model.pt.state")
    assert run.returncode == 130 and "going on from step" in said and again["step"] > state["step"]
    groups = again["optimizer"]["param_groups"]
    assert {(type(group["lr"]), group["capturable"]) for group in groups} == {(float, False)}


def test_one_run_an_output(small):
    run = Forked("pretrain", small, *TINY, "--steps", 5000)
    wait_for(lambda: os.path.exists("model.pt.jsonl") and os.path.getsize("model.pt.jsonl"), run)
    code, said = cli("pretrain", small, *TINY, "--steps", 5000)
    assert code == 2 and "another run is writing model.pt" in said
    run.kill()
    run.communicate()
