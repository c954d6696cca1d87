"""Several gloo processes against one, killed workers, signals and bad data."""
import json
import os
import signal
import socket
import subprocess
import sys
import types
from functools import partial

import pytest
import torch

import data
import tasks
from conftest import (KINDS, TINY, before_call, cli, command, die, forkserver, read_case, same, send, wait_for, weights,
                      write_case, write_lines)


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

def several(path, folder, tokenizer):
    tasks.join_ranks()
    found = work(folder, data.Tokenizer(tokenizer))
    if data.rank() == 0:
        torch.save(found, path)
    data.all_gather(None)
    tasks.leave_ranks(0)


def train(objective, batches, accumulate):
    """Loss sums and parameters of a few steps."""
    optimizer, count = torch.optim.SGD(objective.parameters(), lr=0.5), 3
    if objective.name == "mlm" and accumulate == 1:
        optimizer, count = tasks.adamw(objective, 1e-3), 20
    stepper = tasks.Stepper(objective, optimizer, accumulate)
    sums = [stepper(batches[number]) for number in range(count)]
    return torch.stack(sums), torch.cat([p.detach().flatten() for p in objective.parameters()])


def work(folder, tokenizer):
    """What `alone` is compared with."""
    found = {}
    for kind, accumulate in [*((kind, 1) for kind in KINDS), ("mlm", 2), ("retrieval", 2)]:
        # batches of 6 rows, which two processes share evenly and four do not, and some evaluation batches of 7
        model = dict(model="codessm-hybrid", d=64) if (kind, accumulate) == ("mlm", 2) else {}
        case = read_case(folder / kind, kind, tokenizer, ctx=40, batch=6, seed=3, **model)
        valid = data.Batches(case.store, tokenizer, 40, case.split.items()[:, None], 7)
        metrics, outputs = tasks.evaluate(case.objective, valid, case.split)
        found[kind, accumulate] = *train(case.objective, case.train, accumulate), metrics, outputs

    # a gradient without a number on the last rank alone changes nothing on any
    case = read_case(folder / "mlm", "mlm", tokenizer)
    optimizer = tasks.adamw(case.objective, 1e-2)
    stepper = tasks.Stepper(case.objective, optimizer)
    stepper(case.train[0])
    changing = [*case.objective.parameters(), *(state["step"] for state in optimizer.state.values())]
    before = [tensor.detach().clone() for tensor in changing]
    if data.rank() == data.world_size() - 1:
        case.objective.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    sums = stepper(case.train[1])
    found["skipped"] = data.all_gather((sums.isnan().all().item(), all(map(torch.equal, before, changing))))
    return found


@pytest.fixture(scope="module")
def cases(functions, tmp_path_factory):
    """A folder of the files of each kind of task."""
    folder = tmp_path_factory.mktemp("cases")
    for kind in KINDS:
        (folder / kind).mkdir()
        write_case(folder / kind, kind, functions)
    return folder


@pytest.fixture(scope="module")
def alone(cases, tokenizer):
    return work(cases, tokenizer)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_what_one_does(alone, cases, tokenizer, count, tmp_path):
    """Steps of each objective, uneven evaluation shares and skipped steps."""
    assert ended(launch(count, several, tmp_path / "found.pt", cases, tokenizer.text)) == [0] * count
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for key in alone.keys() - {"skipped"}:
        for name, *sides in zip(("sums", "weights", "metrics", "outputs"), alone[key], found[key]):
            smallest = {"metrics": 0, "weights": 1e-5}.get(name, 1e-6)
            torch.testing.assert_close(*sides, rtol=1e-5, atol=smallest, msg=lambda text: f"{key} {name}: {text}")
    assert found["skipped"] == [(True, True)] * count and alone["skipped"] == [(True, True)]


# ---- nothing lost -----------------------------------------------------------------------------------

LONG = [*TINY, "--steps", 240, "-o", "m.pt"]


def said(count):
    return [open(f"{rank}.txt").read() for rank in range(count)]


def logged():
    """The last step in the log."""
    try:
        return max(json.loads(line)["step"] for line in open("m.pt.jsonl"))
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("rank, number", [(1, signal.SIGTERM), (0, signal.SIGHUP)])
def test_a_signal_to_one_process_stops_all_and_another_number_goes_on(small, tmp_path, rank, number):
    """All end with its exit code, the state is saved, one speaks; one process goes on from it."""
    processes = launch(2, command, tmp_path, "pretrain", small, *LONG)
    first = types.SimpleNamespace(poll=lambda: processes[0].exitcode, communicate=lambda: said(2))
    wait_for(lambda: logged() >= 24, first)
    os.kill(processes[rank].pid, number)
    assert ended(processes) == [128 + number] * 2, said(2)
    first, second = said(2)
    assert "interrupted at step" in first and "the same command goes on from it" in first and second == ""
    state = tasks.read("m.pt.state")
    assert state["step"] >= 24 and state["processes"] == 2
    with before_call(tasks.Stepper, "step", 3, send(signal.SIGINT)):
        code, out = cli("pretrain", small, *LONG)
    assert code == 130 and f"going on from step {state['step']:,} of 240" in out and "by 2 processes" in out
    again = tasks.read("m.pt.state")
    assert again["step"] == state["step"] + 3 and again["processes"] == 1


def fail(*_):
    torch.zeros(2) @ torch.zeros(3)


def fail_on(rank, way, *args):
    """A run of which this rank goes wrong in its tenth step."""
    with before_call(tasks.Stepper, "step", 10 if os.environ["RANK"] == str(rank) else 0, way):
        command(*args)


@pytest.mark.parametrize("rank, way, codes", [(0, fail, [1, 1]), (1, fail, [1, 1]), (1, die, [1, -9])])
def test_a_process_that_fails_ends_all_and_the_state_is_saved(small, tmp_path, rank, way, codes):
    """It tells its own error, and the other that it was another's."""
    assert ended(launch(2, fail_on, rank, way, tmp_path, "pretrain", small, *LONG)) == codes, said(2)
    own, other = said(2)[rank], said(2)[1 - rank]
    assert ("RuntimeError" in own) == (way is fail) and "another of the processes ended" in other
    assert "m.pt.state" in said(2)[0] and "Traceback" not in own + other and tasks.read("m.pt.state")["step"] == 9


def test_bad_data_stops_all_processes(small, functions, tmp_path):
    """A line that is wrong, standard input, a setting: nothing hangs, one says what is wrong."""
    write_lines("bad.jsonl", [*functions[:40], "{", *functions[40:65]])
    for args, message in ((["bad.jsonl"], "Error: bad.jsonl:41: not JSON"),
                          (["-"], "cannot be read by several processes"), ([small, "--epochs", 1], "not both")):
        processes = launch(2, partial(command, stdin=small), tmp_path, "pretrain", *args, *LONG)
        assert ended(processes)[0] == 2 and 0 not in ended(processes)
        first, second = said(2)
        assert message in first and first.count("Error") == 1 and "Traceback" not in first + second
        assert message not in second and not os.path.exists("m.pt.state")


def test_a_killed_worker_is_started_again_and_loses_nothing(small, tmp_path):
    """Under torchrun --max-restarts; the weights and the log are those of a run that nothing disturbed, to the bit.

    Of three processes, as the sum of two is the same in any order."""
    steps = ["pretrain", small, *TINY, "--steps", 20]
    (tmp_path / "run.py").write_text("import os, tasks, codessm\ntasks.SAVE_SECONDS = 0\n"
                                     "open(f'pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\ncodessm.cli()")
    torchrun = subprocess.Popen([sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 3".split(),
                                 "--max-restarts", "1", "run.py", *map(str, steps), "-o", "m.pt", "--restart"],
                                text=True, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    whole = launch(3, command, tmp_path, *steps, "-o", "whole.pt")
    wait_for(lambda: logged() >= 6 and os.path.exists("m.pt.state"), torchrun)
    os.kill(int(open("pid1").read()), signal.SIGKILL)
    _, errors = torchrun.communicate(timeout=100)
    assert torchrun.returncode == 0 and "going on from step" in errors, errors
    assert ended(whole) == [0, 0, 0], said(3)
    assert same(weights("m.pt"), weights("whole.pt"))
    assert open("m.pt.jsonl").read() == open("whole.pt.jsonl").read()
    assert not os.path.exists("m.pt.state") and not os.path.exists("m.pt.tokens")
