"""Several gloo processes against one, killed workers, signals and bad data."""
import json
import math
import os
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import codessm
import data
import tasks
from conftest import ROOT, TINY, Forked, cli, command, forkserver, wait_for, write_lines
from tasks import MLM


def launch(count, function, *args):
    """So many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [forkserver.Process(target=run, args=(rank, count, port, function, *args)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def run(rank, world, port, function, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*args)


def ended(processes):
    """The exit codes."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# ---- the same results -------------------------------------------------------------------------------

def several(path, tokenizer):
    tasks.join()
    found = work(data.Tokenizer(tokenizer))
    if data.rank() == 0:
        torch.save(found, path)
    data.gather(None)
    tasks.leave(0)


def steps(task, batches, accumulate):
    optimizer, count = torch.optim.SGD(task.parameters(), lr=0.5), 3
    if task.name == "mlm" and accumulate == 1:
        optimizer, count = tasks.adamw(task, 1e-3), 20
    stepper = tasks.Stepper(task, optimizer, accumulate)
    sums = [stepper(batch) for batch in batches.stream(stop=count)]
    return torch.stack(sums), torch.cat([p.detach().flatten() for p in task.parameters()])


def work(tokenizer):
    """What `alone` is compared with."""
    found = {}
    texts = [f"def f{i}(x): return x + {i * i}" + "; y = x" * (i % 7) for i in range(61)]

    # batches: of 6 rows, which two processes share evenly and four do not, over an epoch and a half
    items = data.Items(texts.__getitem__, tokenizer, 40)
    batches = data.Batches(items, np.arange(61), 6, [16, 24, 32, 40], tokenizer.pad, seed=3)
    batches.POOL = 3
    rows = [[(int(r), ids[:n].tolist()) for r, ids, n in zip(b.records, b.ids, b.lengths) if n]
            for b in batches.stream(7, 16)]
    shapes = [(b.ids.shape, b.tokens) for b in batches.stream(7, 16)]
    found["rows"] = [sorted(sum(parts, [])) for parts in zip(*data.gather(rows))]
    found["shapes"] = [(sum(shape[0] for shape, _ in parts), {shape[1] for shape, _ in parts}, {t for _, t in parts})
                       for parts in zip(*data.gather(shapes))]

    n = np.arange(60)
    words = [(text.split(), [str(len(w) % 4) if j % 2 else None for j, w in enumerate(text.split())]) for text in texts]
    index = {str(i): i for i in range(4)}
    splits = {
        "classify": data.Split(texts.__getitem__, n[:, None], n % 3),
        "pair": data.Split(texts.__getitem__, np.stack([n, (n * 7 + 1) % 61], 1), n % 2),
        "retrieval": data.Split(texts.__getitem__, np.stack([n, (n * 7 + 1) % 61], 1), query=n,
                                candidates=np.arange(61), gold=(n * 7 + 1) % 61),
        "tag": data.Split(words.__getitem__, n[:, None], index=index)}
    kinds = [("mlm", 1), ("mlm", 2), *((kind, 1) for kind in splits), ("retrieval", 2)]
    for kind, accumulate in kinds:
        torch.manual_seed(0)
        encoder = codessm.Encoder(tokenizer.vocab, d=32, layers=2, N=4)
        if kind == "mlm":
            task, split, training = MLM(encoder, tokenizer), None, batches
            every = data.Batches(items, np.arange(61), 7, [24, 40], tokenizer.pad)
        else:
            split = splits[kind]
            names = ["0", "1", "2", "3"][:2 if kind == "pair" else 4]
            task = tasks.OBJECTIVES[kind](encoder, tokenizer, kind, names, 40)
            split.prepare(tokenizer, 40)
            training, every = split.training(6, [16, 24, 32, 40], 1), split.each(7, [24, 40])
        metrics, outputs = tasks.evaluate(task, every, split)
        found[kind, accumulate] = *steps(task, training, accumulate), metrics, outputs

    # what goes wrong on one rank is said by all; a step without a number changes nothing on any
    last = data.world() - 1
    try:
        with data.together():
            if data.rank() == last:
                raise data.Problem("it broke", 7)
    except data.Problem as problem:
        found["problem"] = data.gather((problem.message, problem.exit_code, problem.said or last == 0))
    found["broadcast"] = data.gather(data.broadcast({"a": [torch.arange(3) + data.rank()], "b": (data.rank(), "x")}))
    task = MLM(codessm.Encoder(tokenizer.vocab, d=32, layers=1, N=4), tokenizer)
    optimizer = tasks.adamw(task, 1e-2)
    stepper = tasks.Stepper(task, optimizer)
    good, bad = list(batches.stream(stop=2))
    stepper(good)
    before = [p.detach().clone() for p in task.parameters()] + [s["step"].clone() for s in optimizer.state.values()]
    prepare = task.prepare
    def poisoned(batch):
        tensors, count = prepare(batch)
        if data.rank() == last:
            hook.append(task.norm.weight.register_hook(lambda gradient: gradient * float("nan")))
        return tensors, count
    hook = []
    task.prepare = poisoned
    sums = stepper(bad)
    after = [p.detach() for p in task.parameters()] + [s["step"] for s in optimizer.state.values()]
    found["skipped"] = data.gather((sums.isnan().all().item(), all(map(torch.equal, before, after))))
    return found


def equal(a, b):
    """Equal to float tolerance, whatever it is made of."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    if isinstance(a, np.ndarray):
        return np.allclose(a, b, rtol=1e-5, atol=1e-6)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return math.isclose(a, b, rel_tol=1e-5) if isinstance(a, float) else a == b


@pytest.fixture(scope="module")
def alone(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "found.pt"
    assert ended(launch(1, several, path, tokenizer.text)) == [0]
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_what_one_does(alone, tokenizer, count, tmp_path):
    """Batches, steps of each objective, uneven evaluation shares, problems, broadcasts and skipped steps."""
    assert ended(launch(count, several, tmp_path / "found.pt", tokenizer.text)) == [0] * count
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found["rows"] == alone["rows"] and sum(map(len, alone["rows"])) > 45
    assert found["shapes"] == [(-(-6 // count) * count, *rest) for _, *rest in alone["shapes"]]
    for kind in [key for key in alone if isinstance(key, tuple)]:
        for name, one, together in zip(("sums", "weights", "metrics", "outputs"), alone[kind], found[kind]):
            assert equal(one, together), (kind, name)
    assert found["problem"] == [("it broke", 7, True)] * count
    assert equal(found["broadcast"], [{"a": [torch.arange(3)], "b": (0, "x")}] * count)
    assert found["skipped"] == [(True, True)] * count and alone["skipped"] == [(True, True)]


# ---- nothing lost -----------------------------------------------------------------------------------

LONG = [*TINY, "--steps", 240]


def said(count):
    return [open(f"{rank}.txt").read() for rank in range(count)]


def first_of(processes):
    """For `wait_for`."""
    return types.SimpleNamespace(poll=lambda: processes[0].exitcode, communicate=lambda: said(len(processes)))


def logged(path):
    try:
        return max(json.loads(line)["step"] for line in open(path))
    except (OSError, ValueError):
        return 0


def test_a_signal_to_one_process_stops_all_and_another_number_goes_on(small, tmp_path):
    """SIGTERM to the second: all end with 143, the state is saved, one speaks; one process goes on from it."""
    processes = launch(2, command, tmp_path, "pretrain", small, *LONG, "-o", "m.pt")
    wait_for(lambda: logged("m.pt.jsonl") >= 24, first_of(processes))
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes) == [143, 143], said(2)
    first, second = said(2)
    assert "interrupted at step" in first and "the same command goes on from it" in first and second == ""
    state = tasks.read("m.pt.state")
    assert state["step"] >= 24 and state["processes"] == 2
    run = Forked("pretrain", small, *LONG, "-o", "m.pt")
    wait_for(lambda: logged("m.pt.jsonl") > state["step"] + 24, run)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and f"going on from step {state['step']:,} of 240" in errors
    assert "by 2 processes, where now there are 1" in errors
    again = tasks.read("m.pt.state")
    assert again["step"] > state["step"] + 24 and again["processes"] == 1


def test_a_signal_is_not_lost_while_the_ranks_are_asked(monkeypatch):
    signals = tasks.Signals()

    def asked(tensor, *_):
        signals.note(signal.SIGTERM, None)
        return tensor

    with monkeypatch.context() as during:
        during.setattr(tasks, "summed", asked)
        signals.check()
    with pytest.raises(tasks.Interrupt):
        signals.check()


def test_bad_data_stops_all_processes(small, functions, tmp_path):
    """A line that is wrong from the start, one that goes wrong later, standard input; nothing hangs, one speaks."""
    write_lines("bad.jsonl", [*functions[:40], "{", *functions[40:65]])
    for corpus, message in (("bad.jsonl", "Error: bad.jsonl:41: not JSON: "),
                            ("-", "Error: standard input or a pipe cannot be read by several processes: write")):
        processes = launch(2, command, tmp_path, "pretrain", corpus, *LONG)
        assert ended(processes) == [2, 2]
        first, second = said(2)
        assert message in first and first.count("Error") == 1 and "Traceback" not in first and second == ""
        assert not os.path.exists("model.pt.state")
    processes = launch(2, command, tmp_path, "pretrain", small, *LONG)
    wait_for(lambda: logged("model.pt.jsonl") >= 24, first_of(processes))
    os.truncate(small, 100)
    assert ended(processes) == [1, 1], said(2)
    first, second = said(2)
    assert f"Error: {small} changed while it was being read" in first and first.count("Error") == 1
    assert "Traceback" not in first and second == "" and tasks.read("model.pt.state")["step"] >= 24
    code, out = cli("pretrain", small, *LONG)
    assert code == 2 and f"model.pt.state is of a run with corpus {small} " in out


def test_a_killed_worker_is_started_again_and_loses_nothing(small, tmp_path):
    """Under torchrun --max-restarts; the weights and the log are those of a run that nothing disturbed."""
    steps = ["pretrain", small, *TINY, "--steps", 20]
    script = "import os, tasks, codessm\ntasks.SAVE_SECONDS = 0\nopen(f'pid{os.environ[\"RANK\"]}', 'w')" \
             ".write(str(os.getpid()))\ncodessm.cli()"
    (tmp_path / "run.py").write_text(script)
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                            "--max-restarts", "1", "run.py", *map(str, steps), "-o", "m.pt", "--restart"], text=True,
                           stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    whole = launch(2, command, tmp_path, *steps, "-o", "whole.pt")
    wait_for(lambda: logged("m.pt.jsonl") >= 6 and os.path.exists("m.pt.state"), run)
    os.kill(int(open("pid1").read()), signal.SIGKILL)
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 0 and "going on from step" in errors, errors
    assert ended(whole) == [0, 0], said(2)
    one, other = (tasks.read(name)["weights"] for name in ("m.pt", "whole.pt"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert open("m.pt.jsonl").read() == open("whole.pt.jsonl").read()
    assert not os.path.exists("m.pt.state")
