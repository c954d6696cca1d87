"""Objectives, the one loop that trains them, and the files that a run writes.

An objective is a module that holds an encoder and its own head, and brings
    prepare(batch)     the tensors of a `data.Batch`, rows first, and what it counts
    sums(**tensors)    a tensor whose first element is the summed loss, to be divided by the count
    evaluate(batches)  its metrics, a dict;  score(metrics)  a number that is higher when better
Any encoder will do that has `config` (a dict with `d` and `vocab`), `embedding`, and maps ids (B, L)
and lengths (B,) to hidden states (B, L, d).
"""
import errno
import fcntl
import json
import math
import os
import signal
import time
import zipfile
from contextlib import closing
from typing import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear

import data
from data import Batch, Batches, Problem, Tokenizer, progress, say

FORMAT = "codessm 1"
IGNORE = -100  # a target that is not predicted
WEIGHT_DECAY = 0.01
SAVE_SECONDS = 300
LOG_STEPS = 50


# ---- masked language modelling ----------------------------------------------------------------------

class MLM(nn.Module):
    """Masked language modelling (Devlin et al. 2019, section 3.1).

    15 % of the real, ordinary tokens are predicted; of these 80 % are read as <mask>, 10 % as a random
    ordinary token, 10 % as they are. The choice is a hash of (seed, epoch, record, position).
    The head is dense, gelu, LayerNorm, then the tied embedding and a bias, at the chosen positions only.
    """
    name = "mlm"

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, seed: int = 0):
        super().__init__()
        d = encoder.config["d"]
        self.encoder, self.tokenizer, self.seed = encoder, tokenizer, seed
        self.dense, self.norm = nn.Linear(d, d), nn.LayerNorm(d, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(encoder.config["vocab"]))
        nn.init.normal_(self.dense.weight, std=0.64 / math.sqrt(d))
        nn.init.zeros_(self.dense.bias)

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        """Corrupted ids and targets (B, L), int32 and int64, IGNORE where nothing is predicted; their count."""
        B, L = batch.ids.shape
        position, record = np.arange(L)[None], batch.records[:, None]
        ordinary = (position < batch.lengths[:, None]) & ~np.isin(batch.ids, self.tokenizer.special)
        chosen = ordinary & (data.draw(self.seed, batch.epoch, record, position, data.CHOSEN) < 0.15)
        row, column = chosen.nonzero()
        kind, which = (data.draw(self.seed, batch.epoch, batch.records[row], column, use)
                       for use in (data.KIND, data.WHICH))
        read = batch.ids[row, column]
        targets = np.full((B, L), IGNORE, np.int64)
        targets[row, column] = read
        random = self.tokenizer.ordinary[(which * len(self.tokenizer.ordinary)).astype(int)]
        ids = batch.ids.copy()
        ids[row, column] = np.where(kind < 0.8, self.tokenizer.mask, np.where(kind < 0.9, random, read))
        tensors = dict(ids=ids, lengths=batch.lengths, targets=targets)
        return {name: torch.from_numpy(array) for name, array in tensors.items()}, len(row)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., vocab) of hidden states (..., d), in their dtype."""
        hidden = self.norm(gelu(self.dense(hidden)))
        return linear(hidden, self.encoder.embedding.weight, self.bias)

    def sums(self, ids: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(summed cross-entropy in nats, correct predictions, predictions), float32 (3,)."""
        where = targets != IGNORE
        logits = self.logits(self.encoder(ids, lengths)[where]).float()
        targets = targets[where]
        loss = cross_entropy(logits, targets, reduction="sum")
        correct = (logits.detach().argmax(-1) == targets).sum()
        return torch.stack([loss, correct.float(), torch.full_like(loss, len(targets))])

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss in nats a predicted token, accuracy, perplexity = exp(loss), over all the batches.

        To be called in evaluation mode and without gradients.
        """
        total = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            total += compute(self, self.prepare(batch)[0]).cpu().double()
        loss, correct, count = total.tolist()
        return {"loss": loss / count, "accuracy": correct / count, "perplexity": math.exp(min(loss / count, 700))}

    @staticmethod
    def score(metrics: dict[str, float]) -> float:
        """Higher is better: the weights of the evaluation with the highest are kept."""
        return -metrics["loss"]


def bf16(device: torch.device) -> bool:
    """Whether matrix products run in bfloat16 there."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def compute(task: nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`task.sums` on the task's device, under bf16 autocast on GPUs that have bf16."""
    device = next(task.parameters()).device
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16(device)):
        return task.sums(**tensors)


# ---- files ------------------------------------------------------------------------------------------

def checkpoint(task: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> dict:
    """What `save` writes: plain tensors, numbers and strings."""
    return {"format": FORMAT, "task": task.name, "config": task.encoder.config,
            "tokenizer": task.tokenizer.text, "weights": weights or task.state_dict()}


def save(path: str | os.PathLike, task: nn.Module) -> None:
    """Write a checkpoint (configuration, weights, tokenizer) that `codessm.load` reads, atomically."""
    write(path, checkpoint(task))


def write(path: str | os.PathLike, content: dict) -> None:
    """The one place that writes checkpoints and states; raises `Problem`, the old file then being whole."""
    try:
        with data.atomic(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
        old = "the file of that name is as it was" if os.path.exists(path) else "nothing was left there"
        raise Problem(f"could not write {path}: {reason}; {old}. Make room, then go on", 1) from None


def read(path: str | os.PathLike) -> dict:
    """The content of a checkpoint or state file, on the CPU; runs no code of it. Raises `Problem`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    except Exception:  # torch raises whatever the bytes lead it to
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Problem(f"{path} is not a codessm checkpoint, or not a whole one")
    return content


class Output:
    """The files of one run: the checkpoint `path`, `path`.state while it trains, the metrics `path`.jsonl.

    A context: inside it, the run holds a lock on the metrics log, which the kernel releases if the process dies.
    Nothing that was there is touched before `begin`. Raises `Problem` where the run could not write, another
    run is writing, or a file would be overwritten that is no earlier run's, or a finished one's and not `restart`.
    """

    def __init__(self, path: str, restart: bool = False):
        self.path, self.state_path, self.log_path, self.restart = path, f"{path}.state", f"{path}.jsonl", restart
        self.check_finished()
        data.check_writable(path)
        data.check_writable(self.log_path)
        if os.path.exists(self.log_path) and not data.is_log(self.log_path):
            raise Problem(f"{self.log_path} is where the metrics would go, and it is something else: give another -o")
        try:
            self.log = open(self.log_path, "ab", buffering=0)
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another run is writing {path}: wait for it, or give another -o") from None
        except OSError as error:
            raise Problem(f"cannot write {self.log_path}: {error.strerror}") from None
        self.check_finished()  # by a run that held the lock until now

    def check_finished(self) -> None:
        if not os.path.isfile(self.path):
            return
        if not zipfile.is_zipfile(self.path):
            raise Problem(f"{self.path} exists and is no checkpoint: give another -o")
        if not self.restart and not os.path.exists(self.state_path):
            raise Problem(f"{self.path} is a finished run's: give another -o, or --restart to replace it")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if os.fstat(self.log.fileno()).st_size == 0:  # it came to nothing
            os.remove(self.log_path)
        self.log.close()

    def resume(self, settings: dict) -> dict | None:
        """The state to go on from, None to start anew; a `Problem` where it has other settings."""
        piped = "-" in settings["corpus"].values()
        self.advice = ("it serves as a checkpoint; what was read from a pipe cannot be read again to go on from it"
                       if piped else "the same command goes on from it")
        if not os.path.exists(self.state_path) or self.restart:
            if self.restart:
                self.advice = self.advice.replace("the same command", "the same command without --restart")
            return None
        state = read(self.state_path)
        if "settings" not in state:
            raise Problem(f"{self.state_path} is no state of a run: give another -o, or --restart to replace it")
        theirs, ours = (s | {f"corpus {name}": mark for name, mark in s["corpus"].items()} | {"corpus": None}
                        for s in (state["settings"], settings))
        names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
        if names:
            was, now = (data.listed(f"{name} {s.get(name, 'absent')}" for name in names) for s in (theirs, ours))
            raise Problem(f"{self.state_path} is of a run with {was}, and this one has {now}: repeat that run's "
                          "settings to go on with it, or give another -o, or --restart to discard it")
        if piped:
            raise Problem(f"{self.state_path} is of a run that read standard input or a pipe, which cannot be read "
                          "again: --restart discards it")
        return state

    def begin(self, state: dict | None) -> None:
        """Cut the log back to the state, or empty it and discard what an earlier run left."""
        self.log.truncate(min(state["log"] if state else 0, os.path.getsize(self.log_path)))
        if not state and os.path.exists(self.state_path):
            os.remove(self.state_path)

    def record(self, **values) -> None:
        """A line in the metrics log; a `Problem` where it cannot be written or a value is not finite."""
        if not all(math.isfinite(value) for value in values.values()):
            raise Problem(f"the loss is no longer a number at step {values['step']:,}: try a lower --lr", 1)
        try:
            line = json.dumps(values).encode() + b"\n"
            if self.log.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Problem(f"could not write {self.log_path}: {error.strerror}. Make room; {self.advice}", 1) from None

    def finish(self, content: dict) -> None:
        """Write the checkpoint, then let the state go."""
        write(self.path, content)
        for path in (self.state_path, f"{self.state_path}.tmp"):
            if os.path.exists(path):
                os.remove(path)


# ---- training ---------------------------------------------------------------------------------------

class Interrupt(Exception):
    """A signal came, and this is a place where it is safe to stop."""


class Signals:
    """Notes SIGINT and SIGTERM inside a `with` block; `check()` raises `Interrupt` once one has come."""

    def __init__(self):
        self.number = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        if self.number is None:
            os.write(2, b"\nstopping after this step, to save first\n")  # print is not safe in a handler
        self.number = number

    def check(self):
        if self.number is not None:
            raise Interrupt

    def watch(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        for batch in batches:
            self.check()
            yield batch


def adamw(task: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear maps and embeddings, 0 on everything else."""
    decayed = {id(m.weight) for m in task.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    groups = [{"params": [p for p in task.parameters() if (id(p) in decayed) == decays], "weight_decay": decay}
              for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))]
    fused = next(task.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def cosine(share: float) -> float:
    """The share of the peak learning rate left when `share` of the steps after warm-up are done."""
    return 0.5 * (1 + math.cos(math.pi * share))


def warmup(steps: int) -> int:
    return min(300, steps // 10)


def learning_rate(step: int, steps: int, peak: float, decay: Callable[[float], float] = cosine) -> float:
    """Of the step numbered from 0: linear up to `peak` during warm-up, then `decay`."""
    rising = warmup(steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * decay((step - rising) / (steps - rising))


def train(task: nn.Module, batches: Batches, held_out: list[Batch], output: Output, state: dict | None, *,
          settings: dict, steps: int, lr: float, decay: Callable[[float], float] = cosine, accumulate: int = 1,
          eval_every: int, workers: int = 1) -> dict[str, float]:
    """Train `task` on its device and write `output`; returns the best evaluation's metrics, `task` having its weights.

    Args:
        settings: what a resumed run must share; stored in the state.
        steps, lr, decay: optimizer steps in all, the peak learning rate, and its course after warm-up.
        held_out: evaluated before the first step, every `eval_every` steps and at the end; the weights
            with the best score are the ones that are kept.
        state: from `output.resume(settings)`: training goes on where that was saved.
        accumulate: cut each batch into so many pieces, to save memory; the gradients are the same sums.
    Raises `Problem`: with exit code 130 or 143 for a SIGINT or SIGTERM, once the state is saved; with 1 where a
    file cannot be written, the corpus changed, or the loss is no longer finite.
    """
    device = next(task.parameters()).device
    optimizer = adamw(task, lr)
    log_every = max(1, min(LOG_STEPS, steps // 10))
    step, evaluated, tokens, window, best = 0, -1, 0, [], None  # best: (metrics, weights)
    if state:
        try:
            task.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            step, evaluated, tokens = (int(state[name]) for name in ("step", "evaluated", "tokens"))
            window = [sums.to(device) for sums in state["window"]]
            best = state["best"] and (state["metrics"], state["best"])
            torch.set_rng_state(state["random"])
            if device.type == "cuda" and "random_cuda" in state:
                torch.cuda.set_rng_state(state["random_cuda"], device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise Problem(f"{output.state_path} does not fit this run: --restart discards it") from None
    output.begin(state)
    if state:
        state.clear()  # the caller's too: it is several times the size of the model
        say(f"going on from step {step:,} of {steps:,}, saved in {output.state_path}")

    def save_state() -> None:
        os.fsync(output.log.fileno())
        content = checkpoint(task) | {
            "settings": settings, "best": best and best[1], "metrics": best and best[0], "step": step,
            "optimizer": optimizer.state_dict(), "evaluated": evaluated, "tokens": tokens,
            "window": [sums.cpu() for sums in window], "log": os.fstat(output.log.fileno()).st_size,
            "random": torch.get_rng_state()}
        if device.type == "cuda":
            content["random_cuda"] = torch.cuda.get_rng_state(device)
        write(output.state_path, content)

    saved, saving, started, tokens_before = time.monotonic(), 0.0, time.monotonic(), tokens
    shown = 0.0
    with (closing(batches.stream(step, steps, workers)) as stream, Signals() as signals,
          progress(total=steps, initial=step, desc="training", unit="step", unit_scale=False, delay=0) as bar):
        try:
            while True:
                if (step % eval_every == 0 or step == steps) and evaluated < step:
                    task.eval()
                    paused = time.monotonic()
                    with torch.no_grad():
                        metrics = task.evaluate(progress(signals.watch(held_out), total=len(held_out),
                                                         desc="evaluating", leave=False))
                    started += time.monotonic() - paused
                    evaluated = step
                    output.record(step=step, **{f"valid_{name}": value for name, value in metrics.items()})
                    if best is None or task.score(metrics) > task.score(best[0]):
                        weights = {name: w.detach().to("cpu", copy=True) for name, w in task.state_dict().items()}
                        best = metrics, weights
                if step == steps:
                    break
                task.train()
                try:
                    batch = next(stream)
                except Problem:
                    save_state()
                    raise
                rate = learning_rate(step, steps, lr, decay)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                window.append(one_step(task, optimizer, batch, accumulate))
                step += 1
                tokens += int(batch.lengths.sum())
                bar.update()

                now = time.monotonic()
                if now - shown > 1:
                    shown = now
                    loss, correct, count = window[-1][:3].tolist()
                    bar.set_postfix_str(f"loss {loss / max(count, 1):.3f}, accuracy {correct / max(count, 1):.1%}, "
                                        f"{(tokens - tokens_before) / (now - started):,.0f} tokens/s", False)
                if step % log_every == 0 or step == steps:
                    loss, correct, count = torch.stack(window).double().sum(0)[:3].tolist()
                    output.record(step=step, epoch=round(step / len(batches), 4), loss=loss / max(count, 1),
                                  accuracy=correct / max(count, 1), lr=rate, tokens=tokens)
                    window = []
                signals.check()
                # at the end of an epoch too, unless epochs are so short that saving would take a 20th of the time
                if now - saved > (20 * saving if step % len(batches) == 0 else max(SAVE_SECONDS, 20 * saving)):
                    save_state()
                    saved = time.monotonic()
                    saving = saved - now
            output.finish(checkpoint(task, best[1]))
        except Interrupt:
            save_state()
            raise Problem(f"interrupted at step {step:,} of {steps:,}: the state is saved in {output.state_path}; "
                          f"{output.advice}", 128 + signals.number) from None
    task.load_state_dict(best[1])
    return best[0]


def one_step(task: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, accumulate: int) -> torch.Tensor:
    """One optimizer step on a batch; the detached sums of its pieces, added up."""
    tensors, count = task.prepare(batch)
    total = 0
    for piece in zip(*(tensor.chunk(accumulate) for tensor in tensors.values())):
        sums = compute(task, dict(zip(tensors, piece)))
        (sums[0] / max(count, 1)).backward()
        total = total + sums.detach()
    nn.utils.clip_grad_norm_(task.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total
