"""Masked language modelling, optimizer steps, and runs: what they write and how they go on."""
import copy
import gzip
import json
import math
import os
import signal
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import codessm
import data
import tasks
from conftest import KINDS, TINY, before_call, cli, files, same, says, send, weights
from data import Batch


@pytest.fixture
def mlm(make_case):
    """An objective and batches of 32."""
    case = make_case("mlm", batch=32, N=8)
    return case.objective, case.train


def flat(objective):
    """All parameters in one row."""
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


# ---- masks and the loss -----------------------------------------------------------------------------

def test_masking_proportions(mlm, tokenizer):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 257, 2000)
    ids = np.full((2000, 256), tokenizer.pad, np.int32)
    for row, length in zip(ids, lengths):
        row[:length] = rng.integers(0, tokenizer.vocab, length)  # special tokens among them
    tensors = mlm[0].prepare(Batch(ids, lengths.astype(np.int32), np.arange(2000)[:, None], 3))
    read, places, targets = (tensors[name].numpy() for name in ("ids", "places", "targets"))
    count = len(targets)
    chosen = np.zeros(ids.shape, bool)
    chosen.flat[places] = True
    allowed = (np.arange(256) < lengths[:, None]) & ~np.isin(ids, tokenizer.special)
    assert not (chosen & ~allowed).any() and chosen.sum() == count
    assert (targets == ids.flat[places]).all() and (read[~chosen] == ids[~chosen]).all()
    # four standard errors of each share, of 250,000 tokens or 37,500 chosen ones
    assert abs(count / allowed.sum() - 0.15) < 4 * math.sqrt(0.15 * 0.85 / allowed.sum())
    masked, kept = read[chosen] == tokenizer.mask, read[chosen] == ids[chosen]
    lucky = 0.1 / len(tokenizer.ordinary)  # a random token that is the old one
    for share, expected in ((masked, 0.8), (kept, 0.1 + lucky)):
        assert abs(share.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    random = read[chosen][~masked & ~kept]
    assert not np.isin(random, tokenizer.special).any() and len(set(random)) > 0.9 * len(tokenizer.ordinary)


def test_bag_of_words(make_case):
    """The gradient of its definition, a sample at a time in float64; in training alone; of pieces of a batch too."""
    def gradients(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*objective.encoder.parameters()])])

    case = make_case("mlm", batch=6)
    objective, tokenizer = case.objective.train(), case.objective.tokenizer
    batch, embedding = case.train[0], normalize(objective.encoder.embedding.weight.double(), dim=-1)
    plain = objective.loss(**objective.prepare(batch))
    objective.bag_of_words = 0.5
    tensors = objective.prepare(batch)
    found, bag, counts = objective.loss(**tensors), 0, []
    for row, (ids, length) in enumerate(zip(batch.ids, batch.lengths)):
        hidden = objective.encoder(tensors["ids"][row:row + 1, :length]).double()[0].mean(0)
        words = sorted(set(ids[:length].tolist()) - set(tokenizer.special.tolist()))
        counts.append(int((tensors["places"] // batch.ids.shape[1] == row).sum()))
        bag -= counts[-1] * (32 * normalize(hidden, dim=0) @ embedding.T).log_softmax(-1)[words].mean()
    assert torch.equal(found, plain) and len(set(counts)) > 1  # what is shown is the loss of masked tokens
    expected, without = gradients(plain[0] + 0.5 * bag), gradients(objective.eval().loss(**objective.prepare(batch))[0])
    assert (expected - without).norm() > 0.1 * without.norm()
    objective.train()
    assert (gradients(found[0]) - expected).norm() < 1e-4 * expected.norm()
    pieces = sum(objective.loss(**objective.prepare(piece))[0] for piece in batch.pieces(3))
    assert (gradients(pieces) - expected).norm() < 1e-4 * expected.norm()
    assert objective.eval().prepare(batch).keys() == tensors.keys() - {"words", "counts"}


def test_masks_depend_on_seed_epoch_item_and_position_alone(mlm):
    def masks(batch):
        """{(item, position): (target, id that is read)}"""
        tensors, L = objective.prepare(batch), batch.ids.shape[1]
        return {(batch.items[place // L, 0], place % L): (target, int(tensors["ids"].flatten()[place]))
                for place, target in zip(tensors["places"].tolist(), tensors["targets"].tolist())}

    objective, batch = mlm[0], mlm[1][0]
    whole = masks(batch)
    rows = [9, 5, 7, 8, 6]
    part = Batch(np.pad(batch.ids[rows], ((0, 0), (0, 8))), batch.lengths[rows], batch.items[rows])
    assert masks(part) == {key: mask for key, mask in whole.items() if key[0] in part.items} and len(masks(part)) > 10
    assert masks(batch._replace(epoch=1)).keys() != whole.keys()
    objective.seed = 1
    assert masks(batch).keys() != whole.keys()


def test_loss_equals_its_definition_and_logits_are_made_where_masked_only(mlm, monkeypatch):
    objective, batch = mlm[0], mlm[1][0]
    tensors = objective.prepare(batch)
    count = len(tensors["targets"])
    seen, logits = [], objective.logits
    monkeypatch.setattr(objective, "logits", lambda hidden: seen.append(hidden.shape) or logits(hidden))
    with torch.no_grad():
        loss, correct, total = objective.loss(**tensors).tolist()
        everywhere = logits(objective.encoder(tensors["ids"], tensors["lengths"])).double().flatten(0, 1).numpy()
    assert seen == [(count, 32)] and total == count > 100
    expected, hits = 0.0, 0
    for place, target in zip(tensors["places"].tolist(), tensors["targets"].tolist()):
        x = everywhere[place]
        expected += math.log(sum(map(math.exp, x))) - x[target]
        hits += x.argmax() == target
    assert abs(loss / expected - 1) < 1e-5 and correct == hits
    metrics, _ = tasks.evaluate(objective, [batch], None, compiled=False)
    assert abs(metrics["loss"] - expected / count) < 1e-5 and abs(metrics["accuracy"] - hits / count) < 1e-9
    assert abs(metrics["perplexity"] / math.exp(expected / count) - 1) < 1e-4


# ---- steps ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_changes_memory_and_nothing_else(kind, make_case):
    """Three uneven pieces of a batch with different numbers of predictions, some empty rows, against the whole."""
    found = []
    for accumulate in (1, 3):
        case = make_case(kind, batch=32)
        stepper = tasks.Stepper(case.objective, torch.optim.SGD(case.objective.parameters(), lr=0.1), accumulate)
        sums = [stepper(case.train[number]) for number in range(3)]
        found.append((torch.stack(sums), flat(case.objective)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_learning_rate():
    rates = [tasks.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.02 and rates[99] == rates[100] == 2.0 and abs(rates[550] - 1.0) < 1e-12
    assert 0 < rates[-1] < 1e-4 and rates[100:] == sorted(rates[100:], reverse=True)
    assert tasks.learning_rate(299, 10_000, 2.0) == 2.0 > tasks.learning_rate(298, 10_000, 2.0)
    assert [tasks.learning_rate(0, steps, 2.0) for steps in (1, 9)] == [2.0, 2.0]
    linear = np.array([tasks.learning_rate(step, 1000, 2.0, "linear") for step in range(1000)])
    assert np.allclose(linear[100:], 2.0 * np.arange(900, 0, -1) / 900) and (linear[:100] == rates[:100]).all()


def test_what_decays(mlm):
    decays, free = (set(map(id, group["params"])) for group in tasks.adamw(mlm[0], 1e-3).param_groups)
    names = {name for name, p in mlm[0].named_parameters() if id(p) in decays}
    assert len(decays) + len(free) == len(list(mlm[0].parameters()))
    layer = {f"encoder.layers.{i}.{name}.weight" for i in range(2) for name in ("v", "fb", "u1", "u2", "u", "o")}
    assert names == layer | {"encoder.embedding.weight", "dense.weight"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_adamw_with_the_clipped_gradient(fused):
    """By its definition in float64; a gradient that is no number changes nothing, the moments and their count too."""
    class Given(torch.nn.Module):
        """Its gradient is `g`."""
        compiled = False

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(3, 2)

        def forward(self, tensors):
            g = tensors["g"]
            return torch.stack([(g[:, :3] * self.w.weight).sum() + (g[:, 3] * self.w.bias).sum(), *torch.ones(2)])

    objective, rng = Given(), np.random.default_rng(0)
    optimizer = tasks.adamw(objective, 0.1)
    if not fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, fused=False)
        optimizer.defaults["fused"] = False
    stepper = tasks.Stepper(objective, optimizer)

    def parameters():
        return torch.cat([objective.w.weight, objective.w.bias[:, None]], 1).detach().double().numpy()

    w, m, v, t = parameters(), 0.0, 0.0, 0
    for norm in (0.3, 7.0, math.nan, 0.8, 20.0, 0.05):
        g = rng.standard_normal((2, 4))
        g *= norm / np.linalg.norm(g)
        sums = stepper.recorded_step([{"g": torch.from_numpy(g).float()}])
        assert sums.isnan().all() if math.isnan(norm) else sums[0].isfinite()
        if not math.isnan(norm):
            t, g = t + 1, g / max(1, norm)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w * (1 - 0.1 * np.array([0.01, 0.01, 0.01, 0])) \
                - 0.1 * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
        assert np.abs(parameters() - w).max() < 2e-6


@pytest.mark.parametrize("model", ["codessm", "rocoder"])
def test_each_length_and_mode_is_compiled_once(model, make_case, compiler, monkeypatch):
    """For all layers together: batches of a length and a mode that came before compile nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    stats, counts = torch._dynamo.utils.counters["stats"], []
    for layers in (1, 2):
        torch._dynamo.reset()
        case, before = make_case("mlm", batch=6, d=64, layers=layers, model=model), stats["unique_graphs"]
        objective, batches = case.objective, [*{batch.ids.shape: batch for batch in case.train}.values()][:2]
        objective.bag_of_words = 1.0
        assert len(batches) == 2 and tasks.compile_objective(objective, True)
        assert torch._inductor.config.emulate_precision_casts  # without it models learn less
        stepper = tasks.Stepper(objective, tasks.adamw(objective, 1e-3))
        for _ in range(2):
            for batch in batches:
                stepper(batch)
                with torch.no_grad():
                    tasks.compute(objective, objective.loss, objective.prepare(batch))
            counts.append(stats["unique_graphs"] - before)
    assert len(set(counts)) == 1 and counts[0] > 0


@pytest.mark.parametrize("works", [True, False])
def test_recorded_steps_are_steps_and_where_none_can_be_recorded_the_run_goes_on(works, mlm, monkeypatch, capsys):
    """With a recording that is no CUDA graph but steps on the tensors it was given: batches, counts and masks.

    Compiled, as on a GPU, tensors have the same shape whatever number of tokens is chosen."""
    recorded, replays, found = [], [], []

    def record(recorder, shapes, tensors):
        recorded.append(dict(shapes)["ids"])
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        static, total = {name: tensor.clone() for name, tensor in tensors.items()}, torch.zeros(3)
        recorder.recorded[shapes] = types.SimpleNamespace(
            replay=lambda: (replays.append(shapes), total.copy_(recorder.function(static)))), static, total

    monkeypatch.setattr(tasks.Recorder, "record", record)
    padded, dense = mlm[1][0], Batch(np.full((32, 64), 50, np.int32), np.full(32, 64, np.int32), np.arange(32)[:, None])
    for graphs in (False, True):
        objective = copy.deepcopy(mlm[0])
        stepper = tasks.Stepper(objective, torch.optim.SGD(objective.parameters(), lr=0.1))
        objective.compiled = stepper.recorder.enabled = graphs  # as on a GPU
        sums = [stepper(batch._replace(epoch=epoch)) for epoch, batch in enumerate((padded, dense) * 4)]
        found.append(torch.cat([*sums, flat(objective)]))
    assert torch.allclose(*found, atol=1e-5)  # what came twice before is recorded, with a mask and without
    assert recorded == [(32, 64)] * (2 if works else 1) and len(replays) == (4 if works else 0)
    assert stepper.recorder.enabled == works
    assert capsys.readouterr().err.count("could not be recorded as a CUDA graph (operation not") == (not works)


def test_steps_in_pieces_are_not_recorded(mlm, monkeypatch):
    enabled = []
    monkeypatch.setattr(tasks, "Recorder",
                        lambda *args: enabled.append(args[2]) or types.SimpleNamespace(enabled=False))
    for accumulate in (1, 2):
        tasks.Stepper(mlm[0], tasks.adamw(mlm[0], 1e-3), accumulate)
    assert enabled == [True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tag"])
def test_steps_recorded_on_a_gpu_are_steps(kind, compiled, make_case):
    """Ten of two batches, replayed and not, end nearer to each other than nine and ten: AdamW enlarges rounding."""
    found = []
    for graphs in (False, True):
        case = make_case(kind, d=64)
        objective = case.objective.cuda()
        start = flat(objective)
        assert tasks.compile_objective(objective, compiled) == compiled
        stepper = tasks.Stepper(objective, tasks.adamw(objective, 1e-3))
        stepper.recorder.enabled = graphs
        for step in range(10):
            stepper(case.train[step % 2]._replace(epoch=step))
        found.append(flat(objective))
        assert bool(stepper.recorder.recorded) == graphs == stepper.recorder.enabled
    assert (found[0] - found[1]).norm() < 0.09 * (found[0] - start).norm()


def test_compiling_pays_once_it_saves_fifteen_seconds_per_length(mlm):
    batches = mlm[1]
    sizes = [batches[number].ids.shape for number in range(len(batches))]
    saved = 1.3e-10 * np.mean([B * L for B, L in sizes]) * 12 * 1024  # seconds per step
    objective = types.SimpleNamespace(encoder=types.SimpleNamespace(config={"layers": 12, "d": 1024}))
    for share in (0.9, 1.1):
        steps = share * 15 * len({L for _, L in sizes}) / saved
        assert steps > len(batches) and tasks.compiling_pays(objective, batches, round(steps)) == (share > 1)


def test_compiling_pays_for_an_evaluation_by_all_lengths_at_a_third_of_a_step(mlm, monkeypatch):
    """Its batches come sorted: the first are the longest."""
    dataset = mlm[1]
    batches = data.Batches(dataset.store, dataset.tokenizer, dataset.ctx, dataset.examples, 4)
    sizes = [batch.ids.shape for batch in batches]
    saved = 1.3e-10 * sum(B * L for B, L in sizes) / 3 * 12 * 1024  # seconds
    objective = types.SimpleNamespace(encoder=types.SimpleNamespace(config={"layers": 12, "d": 1024}))
    lengths = {L for _, L in sizes}
    assert len({L for _, L in sizes[:len(sizes) // 3]}) < len(lengths)
    for share in (0.9, 1.1):
        monkeypatch.setattr(tasks, "COMPILE_SECONDS", saved / len(lengths) / share)
        assert tasks.compiling_pays(objective, batches) == (share > 1)


def test_without_a_compiler_a_line_says_so_and_the_run_goes_on(small, quick, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("Cannot find a working triton installation.\nMore of it.")
    monkeypatch.setattr(torch, "compile", fail)
    code, said = cli("pretrain", small, *TINY, "--steps", 2, "--compile")
    assert code == 0 and "no compiler works on cpu" in said and "Cannot find a working triton" in said
    assert "More of it" not in said and os.path.exists("model.pt")


# ---- checkpoints and what a run writes --------------------------------------------------------------

def test_a_run_writes_what_it_says_and_once_finished_nothing(small, quick):
    code, printed = cli("pretrain", small, *TINY, "--epochs", 2, "--json", "-o", "m.pt")
    result = json.loads(printed[printed.index('{"output"'):].splitlines()[0])
    assert code == 0 and sorted(os.listdir()) == ["m.pt", "m.pt.jsonl", "small.jsonl"]
    log = [json.loads(line) for line in open("m.pt.jsonl")]
    trained, evaluated = ([line for line in log if key in line] for key in ("loss", "valid_loss"))
    assert result["steps"] == 16 and [line["step"] for line in trained] == list(range(1, 17))
    assert [line["step"] for line in evaluated] == [*range(0, 17, 2)]
    assert abs(trained[-1]["epoch"] - 2) < 1e-9 and trained[-1]["loss"] < trained[0]["loss"]
    best = min(evaluated[1:], key=lambda line: line["valid_loss"])
    assert {name: result[name] for name in ("valid_loss", "valid_accuracy", "valid_perplexity")} \
        | {"step": best["step"]} == best
    assert result["parameters"] == sum(p.numel() for p in codessm.load("m.pt").parameters())
    code, printed = cli("pretrain", small, *TINY)  # without --steps it is one epoch
    assert code == 0 and "8 steps of 8 samples (1.0 epochs)" in printed
    assert "model.pt: 8 steps in" in printed and "6 examples: loss" in printed
    before = files()
    says(2, ["model.pt is a finished run's", "--restart"], "pretrain", small, *TINY)
    assert files() == before
    assert cli("pretrain", small, *TINY, "--restart")[0] == 0 and files().keys() == before.keys()
    assert files()["model.pt"] != before["model.pt"]


def test_neither_pipes_nor_the_token_store_change_the_result_and_the_seed_does(small, quick, monkeypatch):
    """Tokens of a large corpus are kept beside the output until the run ends: when it goes on it makes none."""
    command = ["pretrain", *TINY, "--steps", 12]
    assert cli(*command, small, "-o", "a.pt")[0] == 0
    assert cli(*command, "-", "-o", "b.pt", input=gzip.compress(open(small, "rb").read()))[0] == 0
    assert cli(*command, small, "-o", "d.pt", "--seed", 1)[0] == 0
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    with before_call(tasks.Stepper, "step", 3, send(signal.SIGTERM)):
        assert cli(*command, small, "-o", "c.pt")[0] == 143 and os.path.getsize("c.pt.tokens")
    with before_call(data.Corpus, "sequences", 0, None) as tokenised:
        assert cli(*command, small, "-o", "c.pt")[0] == 0 and tokenised == [] and not os.path.exists("c.pt.tokens")
    assert [same(weights("a.pt"), weights(f"{other}.pt")) for other in "bcd"] == [True, True, False]


def test_one_run_an_output(small, quick):
    """By whatever name, also one that leads nowhere yet."""
    os.symlink("model.pt", "link.pt")
    os.symlink(".", "here")
    names = ("model.pt", "link.pt", "here/model.pt", "here/link.pt")
    for ours in names[:2]:
        with tasks.Output(ours):
            for other in names:
                says(2, ["another run is writing", "model.pt"], "pretrain", small, *TINY, "--steps", 1, "-o", other)
    assert cli("pretrain", small, *TINY, "--steps", 1, "-o", "link.pt")[0] == 0
    assert os.path.islink("link.pt") and sorted(os.listdir()) == ["here", "link.pt", "model.pt", "model.pt.jsonl",
                                                                  "small.jsonl"]
