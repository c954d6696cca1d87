"""Objectives and their metrics, the one loop that trains them, and the files that a run writes.

An `Objective` is an encoder with a head. Any encoder will do that has `config` (a dict with `d` and `vocab`),
`embedding`, `kernels`, `compile_parts()` and `same_layers()`, and maps ids (B, L) and lengths (B,), or None where every
token is real, to hidden states (B, L, d).
"""
import copy
import ctypes
import errno
import fcntl
import gc
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.functional import cross_entropy, gelu, linear, normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as checkpointed

import data
from data import (IGNORE, TASKS, Batch, Batches, Problem, Split, Tokenizer, all_gather, broadcast, info, progress, rank,
                  world_size)

FORMAT = "codessm 1"
WEIGHT_DECAY = 0.01
CLIP = 1.0  # the norm of the gradient at most
SAVE_SECONDS = 300
LOG_STEPS = 50
COMPILING_PAYS = 100  # batches a length
FAILING = 20  # steps in a row whose loss is no number


# ---- objectives -------------------------------------------------------------------------------------

def initialise(linear: nn.Linear, d: int) -> nn.Linear:
    """A linear map at its start: weights N(0, 0.64 / sqrt(d)), BiGS's 0.02 at d = 1,024, and biases 0."""
    nn.init.normal_(linear.weight, std=0.64 / math.sqrt(d))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class Objective(nn.Module):
    """An encoder with a head, for a task.

    Args:
        name: of the task, one of `data.TASKS`; labels: the names of its classes, or none.
        ctx: tokens a sample. seed: of what `prepare` draws.
    A subclass has
        loss(**tensors)                     float32 (3,): summed loss in nats, correct predictions, predictions
        outputs(batches, split)             what it says of each example of a split, whose items come in batches
        metrics(outputs, split)             a dict of numbers
        results(outputs, split)             for `predict`, a dict an example
        format_predictions(outputs, split)  lines for a file of predictions, as CodeXGLUE's evaluators read them
    """
    fields = ("ids", "lengths", "ids2", "lengths2", "labels")  # of a batch, that `loss` takes
    coupled = False  # whether the rows of a batch depend on each other, so that it cannot be cut into pieces
    fixed_shapes = True  # whether batches of one shape have tensors of one shape, so that steps can be recorded
    compiled = False

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str, labels: Iterable[str] = (), ctx: int = 256,
                 seed: int = 0):
        super().__init__()
        self.encoder, self.tokenizer, self.name, self.labels = encoder, tokenizer, name, list(labels)
        self.ctx, self.seed, self.kind = ctx, seed, TASKS[name].kind

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        """The tensors of a batch that `loss` takes, on the CPU, and how many predictions it counts."""
        return to_tensors({name: getattr(batch, name) for name in self.fields}), int((batch.lengths > 0).sum())

    def score(self, metrics: dict[str, float]) -> float:
        """Higher is better: the weights of the evaluation with the highest are kept."""
        return metrics[TASKS[self.name].metric]

    def format_metrics(self, metrics: dict[str, float]) -> str:
        """Metrics for a sentence, the one that counts first."""
        names = sorted(metrics, key=lambda name: name != TASKS[self.name].metric)
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)

    def frozen(self) -> "Objective":
        """A copy for reading only, which shares the weights: nothing that follows from them is made twice.

        Its encoder's linear maps are rounded to what autocast would round them to in each batch, and its kernels are
        made once a length. It is of use until the weights change.
        """
        device = next(self.parameters()).device
        shared = {id(value): value for value in (*self.parameters(), *self.buffers(), self.tokenizer)}
        if bf16(device):
            shared |= {id(module.weight): nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
                       for module in self.encoder.modules() if isinstance(module, nn.Linear)}
        frozen = copy.deepcopy(self, shared)
        frozen.encoder.kernel_cache = {}
        if self.compiled:
            frozen.compile_parts()
        return frozen.eval()

    def compile_parts(self) -> None:
        self.compiled = True
        self.encoder.compile_parts()


def to_tensors(arrays: dict[str, np.ndarray | None]) -> dict[str, torch.Tensor]:
    """Those that there are; lengths only of rows with padding, as attention is faster without a mask."""
    for ids, lengths in (("ids", "lengths"), ("ids2", "lengths2")):
        if arrays.get(lengths) is not None and arrays[lengths].min() == arrays[ids].shape[1]:
            arrays = arrays | {lengths: None}
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def loss_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(summed cross-entropy, correct, counted) of logits (n, classes) and targets (n,), some of them IGNORE."""
    logits = logits.float()
    loss = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    correct = logits.detach().argmax(-1) == targets
    return torch.stack([loss, correct.sum().float(), (targets != IGNORE).sum().float()])


class MLM(Objective):
    """Masked language modelling (Devlin et al. 2019, section 3.1).

    15 % of the real, ordinary tokens are predicted; of these 80 % are read as <mask>, 10 % as a random
    ordinary token, 10 % as they are. The choice is a hash of (seed, epoch, item, position).
    The head is dense, gelu, LayerNorm, then the tied embedding and a bias, at the chosen positions only.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str = "mlm", *args, **options):
        super().__init__(encoder, tokenizer, name, *args, **options)
        d = encoder.config["d"]
        self.dense, self.norm = initialise(nn.Linear(d, d), d), nn.LayerNorm(d, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(encoder.config["vocab"]))

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        """Corrupted ids (B, L), int32; targets (M,) at the flat `places` (M,), both int64; and M.

        Compiled, their length depends on B and L alone: as many as are chosen but in one of 10^6 batches, a place whose
        target is IGNORE filling it up.
        """
        B, L = batch.ids.shape
        position, item = np.arange(L)[None], batch.items[:, :1]
        ordinary = (position < batch.lengths[:, None]) & ~np.isin(batch.ids, self.tokenizer.special)
        chosen = ordinary & (data.draw(self.seed, batch.epoch, item, position, data.CHOSEN) < 0.15)
        row, column = chosen.nonzero()
        kind, which = (data.draw(self.seed, batch.epoch, batch.items[row, 0], column, use)
                       for use in (data.KIND, data.WHICH))
        random = self.tokenizer.ordinary[(which * len(self.tokenizer.ordinary)).astype(int)]
        targets, places, count = batch.ids[row, column].astype(np.int64), row * L + column, len(row)
        ids = batch.ids.copy()
        ids[row, column] = np.where(kind < 0.8, self.tokenizer.mask, np.where(kind < 0.9, random, targets))
        if self.compiled:
            most = -(-int(0.15 * B * L + 5 * math.sqrt(0.1275 * B * L)) // 8) * 8
            fill = -count % most if count else most
            places, targets = np.pad(places, (0, fill)), np.pad(targets, (0, fill), constant_values=IGNORE)
        return to_tensors(dict(ids=ids, lengths=batch.lengths, places=places, targets=targets)), count

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., vocab) of hidden states (..., d), in their dtype."""
        return linear(self.norm(gelu(self.dense(hidden))), self.encoder.embedding.weight, self.bias)

    def head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_of_logits(self.logits(hidden), targets)

    def loss(self, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor,
             lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.head_loss(self.encoder(ids, lengths).flatten(0, 1).index_select(0, places), targets)

    def compile_parts(self) -> None:
        super().compile_parts()
        self.head_loss = torch.compile(MLM.head_loss.__get__(self), dynamic=False, fullgraph=True)

    def outputs(self, batches: Iterable[Batch], _split: Split | None = None) -> torch.Tensor:
        """The sums of `loss` over all the batches, float64 (3,)."""
        run, total = Recorder(self, partial(compute, self, self.loss)), torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            total += run(self.prepare(batch)[0]).cpu().double()
        return all_reduce(total)

    def metrics(self, outputs: torch.Tensor, _split: Split | None = None) -> dict[str, float]:
        """Loss in nats a predicted token, accuracy, perplexity = exp(loss)."""
        loss, correct, count = outputs.tolist()
        if not count:
            raise Problem("there is nothing to predict in what is evaluated: give more of it")
        return {"loss": loss / count, "accuracy": correct / count, "perplexity": math.exp(min(700, loss / count))}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["loss"]

    def format_metrics(self, metrics: dict[str, float]) -> str:
        return "loss {loss:.3f}, accuracy {accuracy:.1%}, perplexity {perplexity:.1f}".format(**metrics)


def pool(encoder: nn.Module, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of the hidden states of each row's real tokens, (B, d) float32; 0 of a row that has none."""
    hidden = encoder(ids, lengths).float()
    if lengths is None:
        return hidden.mean(1)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return torch.where(real[..., None], hidden, 0).sum(1) / lengths.clamp(min=1)[:, None]


def embed(objective: Objective, batches: Iterable[Batch], items: np.ndarray) -> torch.Tensor:
    """`pool` of each of the items (n,), which are sorted: (n, d) float32, on the objective's device."""
    table = torch.zeros(len(items), objective.encoder.config["d"], device=next(objective.parameters()).device)
    run = Recorder(objective, partial(compute, objective, partial(pool, objective.encoder)))
    for batch in batches:
        real = batch.lengths > 0
        rows = run(to_tensors(dict(ids=batch.ids, lengths=batch.lengths)))
        table[np.searchsorted(items, batch.items[real, 0])] = rows[torch.from_numpy(real).to(rows.device)]
    return all_reduce(table)  # each row is one rank's


class Classification(Objective):
    """A label for a function, or for a pair of them.

    logits = head(x), x being the mean-pooled code (d), or of a pair [a + b, |a - b|, a * b] (3d), which is the
    same for (b, a). The head is dense, tanh, linear. Of a pair's two labels the second is "alike".
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        d, self.pairs = self.encoder.config["d"], self.kind == "pair"
        self.head = nn.Sequential(initialise(nn.Linear(3 * d if self.pairs else d, d), d), nn.Tanh(),
                                  initialise(nn.Linear(d, len(self.labels)), d))

    def logits(self, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        """(B, classes) of pooled functions (B, d)."""
        return self.head(a if b is None else torch.cat([a + b, (a - b).abs(), a * b], -1))

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, ids2: torch.Tensor | None = None,
             lengths: torch.Tensor | None = None, lengths2: torch.Tensor | None = None) -> torch.Tensor:
        """Of ids (B, L) and labels (B,)."""
        sides = [pool(self.encoder, ids, lengths)] + ([pool(self.encoder, ids2, lengths2)] if self.pairs else [])
        return loss_of_logits(self.logits(*sides), labels)

    def outputs(self, batches: Iterable[Batch], split: Split) -> np.ndarray:
        """Probabilities (n, classes), float32, of the examples; each distinct function is encoded once."""
        items = split.items()
        table, rows = embed(self, batches, items), torch.from_numpy(np.searchsorted(items, split.examples))
        found = [self.logits(*(table[side] for side in part.T.to(table.device))).softmax(-1).cpu()
                 for part in rows.split(4096)]
        return torch.cat(found).numpy()

    def metrics(self, outputs: np.ndarray, split: Split) -> dict[str, float]:
        """Accuracy; macro and weighted averages; of two classes also F1, precision and recall of the second."""
        gold, predicted = split.labels, outputs.argmax(1)
        metrics = {"accuracy": float((gold == predicted).mean()) if np.isfinite(outputs).all() else math.nan}
        for average in ("macro", "weighted", *(["binary"] if len(self.labels) == 2 else [])):
            prefix = "" if average == "binary" else f"{average}_"
            for name, value in zip(("precision", "recall", "f1"), precision_recall_f1(gold, predicted, average)):
                metrics[prefix + name] = value
        return metrics

    def results(self, outputs: np.ndarray, _split: Split) -> Iterator[dict]:
        """The label and the probability of each, or the score of a pair, which is that of label 1."""
        numbers = all(label.isdecimal() and len(label) < 20 and str(int(label)) == label for label in self.labels)
        for row in outputs.tolist():
            label = self.labels[int(np.argmax(row))]
            found = {"prediction": int(label) if numbers else label}
            yield found | ({"score": row[1]} if self.pairs else {"probabilities": dict(zip(self.labels, row))})

    def format_predictions(self, outputs: np.ndarray, split: Split) -> Iterator[str]:
        """idx, tab, label; of a pair idx1, tab, idx2, tab, label."""
        for name, best in zip(split.names, outputs.argmax(1)):
            names = name if isinstance(name, tuple) else [name]
            yield "\t".join(" ".join(str(name).split()) for name in [*names, self.labels[best]])


class Gather(torch.autograd.Function):
    """The rows of all ranks, (W B, ...) in the order of the ranks, of those that each has, (B, ...).

    What a rank's rows did to the losses of all ranks flows back to them.
    """

    @staticmethod
    def forward(_ctx, rows: torch.Tensor) -> torch.Tensor:
        if world_size() == 1:
            return rows.view_as(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce(gradient.contiguous()).chunk(world_size())[rank()]


class Retrieval(Objective):
    """Code for a text: a bi-encoder with in-batch negatives and a learned temperature.

        q, c = pool(text), pool(code), normalised     logits = q c^T exp(s)     s from log(1 / 0.07) to at most log 100

    The cross-entropy is that of each text over the codes of the batch, as in InfoNCE (van den Oord et al. 2018); a
    code that is the same item as a text's own, or that of an equal text, is no negative; of several ranks the codes are
    those of all. As the rows of a batch depend on each other, --accumulate cuts only the encoding into pieces and
    encodes each again for its gradients.
    """
    fields = ("ids", "lengths", "ids2", "lengths2", "items")
    coupled, pieces = True, 1

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Normalised (B, d)."""
        if self.pieces == 1:
            return normalize(pool(self.encoder, ids, lengths), dim=-1)
        pieces = zip(*(side.chunk(self.pieces) for side in (ids, lengths) if side is not None))
        return normalize(torch.cat([checkpointed(pool, self.encoder, *piece, use_reentrant=False)
                                    for piece in pieces]), dim=-1)

    def loss(self, ids: torch.Tensor, ids2: torch.Tensor, items: torch.Tensor, lengths: torch.Tensor | None = None,
             lengths2: torch.Tensor | None = None) -> torch.Tensor:
        """Of texts and codes (B, L) and the items (B, 2) that they are, -1 in rows that only fill up."""
        q, c = self.encode(ids, lengths), Gather.apply(self.encode(ids2, lengths2))
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ c.T * self.scale.clamp(max=math.log(100)).exp()
        own = torch.arange(len(q), device=q.device) + rank() * len(q)
        texts, codes = Gather.apply(items).T
        same = (items[:, :1] == texts) | (items[:, 1:] == codes) | (codes < 0)
        logits = logits.masked_fill(same & (own[:, None] != torch.arange(len(c), device=q.device)), -math.inf)
        return loss_of_logits(logits, torch.where(items[:, 0] < 0, IGNORE, own))

    def outputs(self, batches: Iterable[Batch], split: Split) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """The rank from 1 of each query's best right candidate, and its best 100: (Q,) and (Q, 100) places.

        Of a split without candidates the cosine of each text and code, (n,).
        """
        items = split.items()
        table = normalize(embed(self, batches, items), dim=-1)
        if split.candidates is None:
            text, code = table[np.searchsorted(items, split.examples.T)]
            return (text * code).sum(-1).cpu().numpy()
        queries, candidates = (table[np.searchsorted(items, some)] for some in (split.queries, split.candidates))
        ranks, top = rank_candidates(queries, candidates, *split.right.T)
        return ranks if table.isfinite().all() else ranks * np.nan, top

    def metrics(self, outputs: tuple[np.ndarray, np.ndarray], _split: Split) -> dict[str, float]:
        """MRR = mean of 1 / rank; recall@k = share of queries with rank <= k."""
        ranks = outputs[0] if np.isfinite(outputs[0]).all() else np.full(1, np.nan)
        return {"mrr": float((1 / ranks).mean())} | {f"recall@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}

    def results(self, outputs: np.ndarray, _split: Split) -> Iterator[dict]:
        """The cosine of each text and code."""
        return ({"score": score} for score in outputs.tolist())

    def format_predictions(self, outputs: tuple[np.ndarray, np.ndarray], split: Split) -> Iterator[str]:
        """{"url", "answers"}: the names of the best 100 candidates."""
        for name, best in zip(split.query_names, outputs[1].tolist()):
            yield json.dumps({"url": name, "answers": [split.candidate_names[i] for i in best]})


class Tagging(Objective):
    """A label for some of a file's words: a linear map of the hidden state at each word's first sub-token.

    Logits are computed at labelled words only. Label 0 is UNK: where it is predicted, that is always wrong.
    """
    fields = ("ids", "lengths", "places", "targets")
    fixed_shapes = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        d = self.encoder.config["d"]
        self.head = initialise(nn.Linear(d, len(self.labels)), d)

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        return super().prepare(batch)[0], len(batch.targets)

    def hidden(self, ids: torch.Tensor, places: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        return self.encoder(ids, lengths).flatten(0, 1).index_select(0, places)

    def loss(self, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor,
             lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Of ids (B, L) and the label numbers (M,) at the flat places (M,)."""
        return loss_of_logits(self.head(self.hidden(ids, places, lengths)), targets)

    def predict(self, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor,
                lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers of the best labels, -1 of none; few logits at a time, as every word may be asked for."""
        hidden = self.hidden(ids, places, lengths)
        best = torch.cat([self.head(part).argmax(-1) for part in hidden.split(1024)])
        return best.masked_fill(~hidden.isfinite().all(-1), -1)

    def outputs(self, batches: Iterable[Batch], split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
        """(gold, predicted) label numbers of the labelled words of each window, in the order of the windows."""
        windows, run = {}, Recorder(self, partial(compute, self, self.predict))
        for batch in batches:
            predicted = run(self.prepare(batch)[0]).cpu().numpy()
            ends = np.searchsorted(batch.places, np.arange(1, len(batch.ids)) * batch.ids.shape[1])
            for window, *found in zip(batch.items[:, 0].tolist(), np.split(batch.targets, ends),
                                      np.split(predicted, ends)):
                windows[window] = tuple(found)
        windows = {number: found for part in all_gather(windows) for number, found in part.items()}
        return [windows[number] for number in split.examples[:, 0].tolist()]

    def metrics(self, outputs: list[tuple[np.ndarray, np.ndarray]], _split: Split) -> dict[str, float]:
        """Accuracy (= micro F1), weighted F1 and F1 as published, and of typeinf the same for the top 100 types.

        A gold UNK stays in the denominator. Top-100 words are those whose gold label is in rows 2 to 101 of
        the vocabulary (0 is UNK, 1 is any).
        """
        found = {}
        for prefix, top in (("", False), *([("top100_", True)] if self.name == "typeinf" else [])):
            windows = [(gold[some], np.where(predicted[some] == 0, -1, predicted[some])) for gold, predicted in outputs
                       for some in [(gold > 1) & (gold < 102) if top else gold >= 0]]
            gold, predicted = (np.concatenate(side) for side in zip(*windows))
            if top and not len(gold):
                continue
            numbers = all((predicted >= 0).all() for _, predicted in outputs)
            found[prefix + "accuracy"] = float((gold == predicted).mean()) if numbers else math.nan
            found[prefix + "weighted_f1"] = precision_recall_f1(gold, predicted, "weighted")[2]
            names = [*self.labels, "\0\0"]  # the last, -1, is equal to no type
            found[prefix + "f1_published"] = f1_published(*([[names[i] for i in side] for side in sides]
                                                            for sides in zip(*windows)))
        return found

    def results(self, outputs: list[tuple[np.ndarray, np.ndarray]], split: Split) -> Iterator[dict]:
        """The tags of a file's words; its windows follow each other."""
        for _, windows in itertools.groupby(zip(split.names, outputs), key=lambda window: window[0]):
            yield {"predictions": [self.labels[i] if i >= 0 else math.nan for _, (_, predicted) in windows
                                   for i in predicted]}

    def format_predictions(self, outputs: list[tuple[np.ndarray, np.ndarray]], _split: Split) -> Iterator[str]:
        """The number of the labelled word, tab, its type."""
        for number, label in enumerate(itertools.chain(*(predicted for _, predicted in outputs))):
            yield f"{number}\t{self.labels[label]}"


OBJECTIVES = {"mlm": MLM, "retrieval": Retrieval, "classify": Classification, "pair": Classification, "tag": Tagging}


def evaluate(objective: Objective, batches: Batches, split: Split, watch: Callable[[Iterable], Iterable] = iter,
             compiled: bool | None = None) -> tuple[dict[str, float], object]:
    """(metrics, outputs) of an objective on a split whose items come in `batches`; `watch` may raise to stop it.

    Each rank runs its share, and all of them get the same. A compiled objective runs as it is where compiling for so
    few batches would not pay, unless `compiled` says otherwise.
    """
    compiled = compiling_pays(batches, len(batches)) if compiled is None else compiled
    frozen = objective.frozen()
    with torch.no_grad(), torch.compiler.set_stance("default" if compiled else "force_eager"):
        outputs = frozen.outputs(progress(watch(batches), total=len(batches), desc="evaluating", unit=" batches",
                                          unit_scale=False, leave=False), split)
    return broadcast(frozen.metrics(outputs, split) if rank() == 0 else None), outputs


# ---- metrics ----------------------------------------------------------------------------------------

def precision_recall_f1(gold: np.ndarray, predicted: np.ndarray, average: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of integer classes, 0 where a denominator is 0.

    Of a class: precision = TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN). "macro" is the mean
    over the classes that occur in gold or predicted, "weighted" the mean weighted by how often each is gold, and
    "binary" is that of class 1.
    """
    classes, numbers = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    gold, predicted = numbers[:len(gold)], numbers[len(gold):]
    n = len(classes)
    hits, are, said = (np.bincount(x, minlength=n).astype(float) for x in (gold[gold == predicted], gold, predicted))
    scores = np.array([hits / np.maximum(said, 1), hits / np.maximum(are, 1), 2 * hits / (are + said)])
    if average == "binary":
        return tuple(map(float, scores[:, classes == 1].sum(1)))
    weights = are if average == "weighted" else np.ones(n)
    return tuple(map(float, scores @ weights / weights.sum()))


def f1_published(gold: list[list[str]], predicted: list[list[str]]) -> float:
    """The F1 that type inference is published with: seqeval's, micro-averaged, on labels without a B- or I- prefix.

    seqeval takes the first letter of a label for its tag and the rest (after a hyphen, if there is one) for its
    type. So a type that begins with O is none, a run of equal types is one entity, and an entity is right if its
    type, start and end are; F1 = 2 TP / (gold entities + predicted entities). Each list is one window.
    """
    gold, predicted = entities(gold), entities(predicted)
    total = len(gold) + len(predicted)
    return 2 * len(gold & predicted) / total if total else 0.0


def entities(windows: list[list[str]]) -> set[tuple[str, int, int]]:
    """(type, first, last) of the chunks of all windows, an O after each, by conlleval's rules as seqeval has them."""
    found, begin, before, kind_before = set(), 0, "O", ""
    for i, label in enumerate([*itertools.chain(*([*window, "O"] for window in windows)), "O"]):
        tag, kind = label[:1], label[1:].split("-", 1)[-1] or "_"
        ends = before in ("E", "S") or (before in ("B", "I") and tag in ("B", "S", "O"))
        starts = tag in ("B", "S") or (tag in ("E", "I") and before in ("E", "S", "O"))
        if ends or (before not in ("O", ".") and kind != kind_before):
            found.add((kind_before, begin, i - 1))
        if starts or (tag not in ("O", ".") and kind != kind_before):
            begin = i
        before, kind_before = tag, kind
    return found


# ---- ranking ----------------------------------------------------------------------------------------

SCORES = 2 ** 24  # similarities that are held at a time
TIE = 1e-6  # cosines that differ by less are equal: they are sums of float32


def rank_candidates(queries: torch.Tensor, candidates: torch.Tensor, query: np.ndarray, gold: np.ndarray,
                    best: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """The rank, from 1, of each query's best gold candidate, ties counting against it, and the best candidates.

    Args:
        queries (Q, d), candidates (C, d): float32.
        query, gold: (n,) int64, n >= Q: candidate `gold[i]` is right for query `query[i]`.
    Returns int64 (Q,) and (Q, min(best, C)). rank = 1 + #{wrong candidates: score > its score - 1e-6}; a chunk of
    queries at a time, so that at most 2^24 of them are held.
    """
    ranks, top = [], []
    order = np.argsort(query, kind="stable")
    query, gold = query[order], gold[order]
    chunk = max(1, SCORES // len(candidates))
    for start in progress(range(0, len(queries), chunk), desc="ranking", leave=False):
        scores = queries[start:start + chunk] @ candidates.T
        own = slice(*np.searchsorted(query, [start, start + len(scores)]))
        row = torch.from_numpy(query[own] - start).to(scores.device)
        right = scores[row, torch.from_numpy(gold[own]).to(scores.device)]
        least = torch.full_like(scores[:, 0], -math.inf).scatter_reduce_(0, row, right, "amax") - TIE
        # (not <= rather than >, so that what is not a number comes last)
        ahead = (~(scores <= least[:, None])).sum(1).index_add_(0, row, (~(right <= least[row])).long(), alpha=-1)
        ranks.append(ahead.cpu() + 1)
        top.append(scores.topk(min(best, len(candidates)), sorted=True).indices.cpu())
    return torch.cat(ranks).numpy(), torch.cat(top).numpy()


# ---- devices, compiling, recording ------------------------------------------------------------------

def compiling_pays(batches: Batches, steps: int) -> bool:
    """Whether so many steps of these batches gain more time than compiling for their lengths takes."""
    return steps >= COMPILING_PAYS * len(batches.padded_lengths(steps))


def compile_objective(objective: Objective, wanted: bool | None, pays: bool = True) -> bool:
    """Compile an objective if that is `wanted`, None meaning where it `pays` on a GPU. Whether it is compiled.

    Each length and mode is compiled when it first comes. Where no compiler works, a line says so.
    """
    device = next(objective.parameters()).device
    if not (device.type == "cuda" and pays if wanted is None else wanted):
        return False
    try:
        torch.compile(lambda x: (x + 1).exp(), dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing: Triton, a C++ compiler, a header
        reason = str(error).strip().splitlines() or [type(error).__name__]
        info(f"no compiler works on {device}, so nothing is compiled ({reason[0][:100]})")
        return False
    # past this many compilations of the same code dynamo would go on eagerly, with only a warning
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 256)
    torch._dynamo.config.accumulated_cache_size_limit = max(torch._dynamo.config.accumulated_cache_size_limit, 4096)
    warnings.filterwarnings("ignore", message=".*(TensorFloat32|max_autotune_gemm|Online softmax)")
    objective.compile_parts()
    return True


def bf16(device: torch.device) -> bool:
    """Whether matrix products run in bfloat16 there."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def compute(objective: Objective, function: Callable[..., torch.Tensor],
            tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A function of tensors on the objective's device, under bf16 autocast on GPUs that have bf16."""
    device = next(objective.parameters()).device
    tensors = {name: to_device(tensor, device) for name, tensor in tensors.items()}
    # a cache of cast weights would outlive the recording of a CUDA graph
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16(device), cache_enabled=False):
        return function(**tensors)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In pinned memory, if it is to be copied to a GPU, so that nothing waits for the copy."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return pinned(tensor, device).to(device, non_blocking=True)


class Recorder:
    """`function(tensors)`; on a GPU it is recorded as a CUDA graph once tensors of its shapes have come `BEFORE` times.

    Of a small batch it takes longer to launch kernels one by one than to run them; of a larger one than `MOST_TOKENS`
    the memory of a graph would not be worth its time. Where a recording fails, a line says so and none is made.
    """
    BEFORE, MOST, MOST_TOKENS = 2, 64, 16_384

    def __init__(self, objective: Objective, function: Callable[[dict[str, torch.Tensor]], torch.Tensor],
                 enabled: bool = True):
        self.function, self.device = function, next(objective.parameters()).device
        self.enabled = enabled and self.device.type == "cuda" and objective.fixed_shapes
        self.seen: dict[tuple, int] = {}
        self.recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]] = {}

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = sum(tensor.numel() for name, tensor in tensors.items() if name in ("ids", "ids2"))
        if not self.enabled or tokens > self.MOST_TOKENS:
            return self.function(tensors)
        shapes = tuple((name, tensor.shape) for name, tensor in tensors.items())
        self.seen[shapes] = self.seen.get(shapes, 0) + 1
        if shapes not in self.recorded:
            if self.seen[shapes] <= self.BEFORE or len(self.recorded) == self.MOST:
                return self.function(tensors)
            try:
                self.record(shapes, tensors)
            except RuntimeError as error:
                self.enabled = False
                self.recorded.clear()  # and their memory
                info(f"a batch could not be recorded as a CUDA graph ({str(error).splitlines()[0][:100]}): "
                     "the run goes on without")
                return self.function(tensors)
        graph, static, result = self.recorded[shapes]
        for name, tensor in tensors.items():
            static[name].copy_(pinned(tensor, self.device), non_blocking=True)
        graph.replay()
        return result.clone()

    def record(self, shapes: tuple, tensors: dict[str, torch.Tensor]) -> None:
        """Graphs share their memory: each is done with it before another is replayed."""
        static = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}
        memory = next((graph.pool() for graph, _, _ in self.recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, memory):
            result = self.function(static)
        self.recorded[shapes] = graph, static, result


# ---- ranks ------------------------------------------------------------------------------------------

def join_ranks() -> None:
    """Join the processes that `torchrun` (or whatever sets its variables) has started; raises `Problem`.

    Objects and CPU tensors travel by gloo, those of GPUs by NCCL. The ranks that torchrun starts again after a failure
    meet under another name, as those before them have left theirs behind (pytorch/pytorch#135712).
    """
    wait = timedelta(days=1)  # a rank may tokenise for hours; one that ends is noticed at once
    try:
        store, number, count = next(rendezvous("env://", timeout=timedelta(minutes=30)))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=wait, rank=number,
                                world_size=count, store=store)
    except (ValueError, RuntimeError) as error:
        raise Problem(f"the {os.environ['WORLD_SIZE']} processes could not reach each other "
                      f"({str(error).splitlines()[0][:200]}): start them with torchrun", 1) from None


def leave_ranks(code: int) -> None:
    """End this process, if it is one of several: while it goes down, a thread of gloo would at times abort it."""
    if world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def all_reduce(tensor: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """The tensor, which now is the sum over all ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def explain(error: BaseException) -> Problem:
    """The one place that turns what went wrong into a sentence and an exit code."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    said = lines[0].strip()[:200] if lines else type(error).__name__
    if isinstance(error, Problem):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Problem("interrupted", 128 + getattr(error, "number", signal.SIGINT))
    if isinstance(error, OSError):
        return Problem(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 1)
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return Problem("out of memory: use a smaller --batch, --ctx or --size, or a larger --accumulate", 1)
    if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # inductor's too
        return Problem(f"the compiler failed ({said}): --no-compile does without it", 1)
    if world_size() > 1 and (isinstance(error, dist.DistError) or any(
            sign in str(error) for sign in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL"))):
        return Problem("another of the processes ended, which ends this one too", 1)
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {os.path.basename(frame[0].filename)}:{frame[0].lineno}" if frame else ""
    return Problem(f"{type(error).__name__}{where}: {said}", 1)


class Interrupt(KeyboardInterrupt):
    """A signal came: `number` says which."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP inside a `with` block; `check()` raises `Interrupt` if one came to any rank."""

    def __init__(self):
        self.number = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        first, self.number = not self.number, number
        if first and rank() == 0:
            with suppress(OSError):
                os.write(2, b"\nstopping after this step, to save first\n")  # print is not safe in a handler

    def check(self):
        number = int(all_reduce(torch.tensor(self.number), dist.ReduceOp.MAX))
        if number:
            raise Interrupt(number)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.check()
            yield batch


# ---- checkpoints and --init -------------------------------------------------------------------------

def checkpoint(objective: Objective, weights: dict[str, torch.Tensor] | None = None) -> dict:
    """What `save` writes: plain tensors, numbers and strings."""
    return {"format": FORMAT, "task": objective.name, "config": objective.encoder.config,
            "tokenizer": objective.tokenizer.text, "weights": weights or objective.state_dict(),
            "labels": objective.labels, "ctx": objective.ctx}


def save(path: str | os.PathLike, objective: Objective) -> None:
    """Write a checkpoint (configuration, weights, tokenizer, task, labels) that `codessm.load` reads, atomically."""
    write(path, checkpoint(objective))


def write(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint or a state; raises `Problem`, the old file then being whole."""
    try:
        with data.atomic(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
        old = "the file of that name is as it was" if os.path.exists(path) else "nothing was left there"
        raise Problem(f"could not write {path}: {reason}; {old}. Make room, then go on", 1) from None


def unpickle(path: str | os.PathLike) -> object:
    """What `torch.save` wrote, on the CPU; None where that cannot be read. Runs no code of it; raises `Problem`."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:  # a small file could fill the memory; torch compresses nothing
                if sum(part.file_size for part in file.infolist()) > os.path.getsize(path) or file.testzip():
                    return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises whatever the bytes lead it to
        return None


def read(path: str | os.PathLike) -> dict:
    """The content of a checkpoint or state file. Raises `Problem`."""
    content = unpickle(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Problem(f"{path} is not a codessm checkpoint, or not a whole one")
    return content


def check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] | None = None) -> None:
    """Raise ValueError unless these are dense float tensors, of the names and shapes expected.

    They take no more memory than the file that they are from: a few bytes can spell a tensor of any size.
    """
    if expected is not None and (tensors.keys() != expected.keys() or any(
            tensor.shape != expected[name].shape for name, tensor in tensors.items())):
        raise ValueError
    if any(tensor.layout != torch.strided or not tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > sum(storages.values()):
        raise ValueError


def restore(content: dict, path: str | os.PathLike, make_encoder: Callable[..., nn.Module]) -> Objective:
    """The objective of what a checkpoint holds, on the CPU; raises `Problem`."""
    try:
        tokenizer = Tokenizer(content["tokenizer"], str(path))
        config, weights, task = content["config"], content["weights"], TASKS[content["task"]]
        labels, ctx = content.get("labels") or [], content.get("ctx", task.ctx)
        absent = {name for name in ("kernels", "ctx") if not config.get(name)}  # of models that have none
        if not all(type(size) is int and size > 0 for name, size in config.items() if name not in {"model"} | absent) \
                or config["layers"] > len(weights) or type(ctx) is not int or ctx < 8 or type(labels) is not list \
                or len(set(labels)) < len(labels) or not all(isinstance(label, str) for label in labels):
            raise ValueError
        if tokenizer.vocab > config["vocab"]:
            raise Problem(f"{path}: its tokenizer has {tokenizer.vocab:,} entries and its model {config['vocab']:,}: "
                          "they do not belong together")
        with torch.device("meta"):  # shapes alone: the weights come from the file
            objective = OBJECTIVES[task.kind](make_encoder(**config), tokenizer, content["task"], labels, ctx)
        check_tensors(weights, objective.state_dict())
        objective.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise Problem(f"{path}: its weights do not fit its configuration, so it is no whole checkpoint") from None
    return objective


# what BiGS's reference implementation (of arXiv 2212.10544) calls our tensors: in a layer, and elsewhere
BIGS_LAYER = {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias") for theirs, ours in {
    "LayerNorm": "norm", "dv": "v", "duc_forward": "u1", "duc_backward": "u2", "dol": "u", "do": "o",
    "du_forward": "f", "du_backward": "b"}.items()} | {
    f"{theirs}.{name}": f"{ours}.{name.split('.')[-1]}"
    for theirs, ours in (("fs4", "forward_ssm"), ("bs4", "backward_ssm"))
    for name in ("D", "kernel.C", "kernel.log_step", "kernel.A_re", "kernel.A_im")}
BIGS_REST = {
    "embeddings.word_embeddings.weight": "encoder.embedding.weight",
    "embeddings.position_embeddings.weight": "encoder.positions.weight",
    "embeddings.LayerNorm.weight": "encoder.norm.weight", "embeddings.LayerNorm.bias": "encoder.norm.bias",
    "cls.predictions.transform.dense.weight": "dense.weight", "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias", "cls.predictions.bias": "bias",
    "embeddings.token_type_embeddings.weight": "types", "cls.predictions.decoder.weight": "decoder"}
# heads and buffers that ours has not; the decoder's bias is named above
BIGS_UNUSED = re.compile(r"embeddings\.(position_ids|token_type_ids)|pooler\..*|cls\.predictions\.decoder\.bias|"
                         r"(classifier|qa_outputs)\..*")
BIGS_PREFIX = re.compile(r"^((module|_orig_mod|bigs)\.)+")  # of wrappers, and of the encoder in a larger model
OF_VOCABULARY = ("encoder.embedding.weight", "bias")


class InitialWeights(NamedTuple):
    """Weights to start another model from, by our names; `unused` are the names of those that ours has not."""
    path: str
    weights: dict[str, torch.Tensor]
    unused: list[str]
    config: dict | None = None  # None, of BiGS
    tokenizer: Tokenizer | None = None
    labels: list[str] | None = None

    @staticmethod
    def read(path: str) -> "InitialWeights":
        """Those of a codessm checkpoint, or of a BiGS state dict, which may lie under "state_dict" or "model".

        Raises `data.Problem` where the file is neither.
        """
        if os.path.exists(path) and not os.path.isfile(path):
            raise Problem(f"--init {path} is no file: write what it is to hold to one")
        content = unpickle(path)
        try:
            if content.get("format") == FORMAT:
                check_tensors(content["weights"])
                return InitialWeights(path, content["weights"], [], dict(content["config"]),
                                      Tokenizer(content["tokenizer"], path), content.get("labels"))
            content = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)),
                           content)
            # the decoder shares the embedding's memory
            check_tensors({name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)
                           and tensor.is_floating_point() and ".decoder." not in str(name)})
            if any(".fs4." in name for name in map(str, content)):
                return InitialWeights(path, *from_bigs(path, content))
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            pass
        raise Problem(f"--init {path} is neither a codessm checkpoint nor a BiGS state dict, or not a whole one")

    def copy_to(self, objective: Objective) -> str:
        """Copies what fits into an objective; what was taken and what stayed random, for people. Raises `Problem`.

        Of a file with more layers the first are taken, embeddings if the vocabulary is the same, a fine-tuned head if
        the labels are, positions as many as both have, and one S4D kernel serves for each of several.
        """
        config, ours, theirs = objective.encoder.config, objective.state_dict(), self.config or dict(model="codessm")
        if not objective.encoder.same_layers(theirs["model"]):
            raise Problem(f"--init {self.path} is a {theirs['model'] if self.config else 'BiGS'}, whose layers are not "
                          f"those of {config['model']}")
        taken, misfits, notes = [], [], {"positions": "", "vocabulary": ""}
        for name in sorted(self.weights.keys() & ours.keys()):
            weight, target = self.weights[name], ours[name]  # the objective's own memory
            if name in OF_VOCABULARY and (self.tokenizer.text != objective.tokenizer.text if self.tokenizer
                                          else weight.shape[:1] != target.shape[:1]):
                notes["vocabulary"] = " (another vocabulary)"
                continue
            if name.startswith("head.") and self.labels != objective.labels:
                continue
            if name == "encoder.positions.weight":
                notes["positions"] = f" (of positions the first {len(weight)})" * (len(weight) < len(target))
                weight, target = weight[:len(target)], target[:len(weight)]
            if target.shape not in (weight.shape, (target.shape[0], *weight.shape) if "_ssm." in name else None):
                misfits.append(f"{name} {tuple(weight.shape)}")
                continue
            target.copy_(weight)
            taken.append(name)
        origin = "{model}, {layers} x {d}".format(**theirs) if self.config else "BiGS"
        if misfits and self.config and theirs["kernels"] != config["kernels"]:
            raise Problem(f"--init {self.path} has {theirs['kernels']} kernels a direction, not {config['kernels']}: "
                          f"give --kernels {theirs['kernels']}")
        if misfits:
            raise Problem(f"--init {self.path} ({origin}) does not fit {config['model']}, {config['layers']} x "
                          f"{config['d']}: {data.listed(misfits, 4)}")
        return (f"{self.path} ({origin}): taken {summary(taken)}{notes['positions']}; "
                f"random {summary(ours.keys() - set(taken))}{notes['vocabulary']}; "
                f"not taken {summary([*(self.weights.keys() - set(taken)), *self.unused])}")


def from_bigs(path: str, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(weights by our names, names of tensors that ours has not) of a BiGS state dict; raises `Problem`.

    Every token being of type 0, that type's embedding is added to the token's.
    """
    weights, unused, unknown = {}, [], []
    for name, tensor in tensors.items():
        plain = BIGS_PREFIX.sub("", str(name))
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", plain)
        ours = BIGS_LAYER.get(found[2]) if found else BIGS_REST.get(plain)
        if ours and isinstance(tensor, torch.Tensor):
            weights[f"encoder.layers.{found[1]}.{ours}" if found else ours] = tensor
        else:
            (unused if BIGS_UNUSED.fullmatch(plain) else unknown).append(str(name))
    if unknown:
        raise Problem(f"--init {path} has tensors that BiGS has not: {data.listed(unknown, 8)}")
    embedding, decoder = weights.get("encoder.embedding.weight"), weights.pop("decoder", None)
    if decoder is not None and (embedding is None or not torch.equal(decoder, embedding)):
        raise Problem(f"--init {path} has a decoder of its own, where ours is the embedding")
    weights["encoder.embedding.weight"] = embedding + weights.pop("types", torch.zeros(1))[:1]
    for name in [name for name in weights if re.search(r"\.f\.(weight|bias)$", name)]:
        forward, kind = name.rsplit(".", 1)
        weights[f"{forward}b.{kind}"] = torch.cat([weights.pop(name), weights.pop(f"{forward[:-1]}b.{kind}")])
    return weights, unused


def summary(names: Iterable[str]) -> str:
    """The names of tensors, with the layers whose names are alike drawn together."""
    layers: dict[str, list[str]] = {}
    rest, alike = [], {}
    for name in sorted(names):
        found = re.fullmatch(r"(?:[\w.]+\.)?encoder\.layers?\.(\d+)\.(.+)", name)
        layers.setdefault(int(found[1]), []).append(found[2]) if found else rest.append(name)
    for number, parts in sorted(layers.items()):
        alike.setdefault(tuple(parts), []).append(number)
    drawn = [f"layers {numbers[0]}-{numbers[-1]}" + f" ({', '.join(parts)})" * (len(parts) <= 8)
             for parts, numbers in alike.items()]
    return ", ".join(drawn + rest) or "nothing"


# ---- the trainer ------------------------------------------------------------------------------------

@dataclass
class Settings:
    """What a run was asked for. The command line fills it, the state keeps it, and a run that goes on has the same."""
    task: str
    paths: list[str] = field(default_factory=list)
    ctx: int | None = None
    ckpt: str | None = None
    init: str | None = None
    model: str | None = None
    kernels: int | None = None
    size: str | None = None
    tokenizer: str | None = None
    vocab: int | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int = 32
    accumulate: int = 1
    lr: float | None = None
    eval_every: int | None = None
    limit: int | None = None
    code_field: str | None = None
    text_field: str | None = None
    max_line: int = data.MAX_LINE // 10**6
    skip_bad: bool = False
    seed: int = 0
    # what may change when a run goes on
    output: str = "model.pt"
    restart: bool = False
    device: str = "auto"
    compiled: bool | None = None
    as_json: bool = False
    files: dict[str, str] = field(default_factory=dict)  # what was read, and the mark of each

    def fixed(self) -> dict[str, object]:
        """What must be the same when the run goes on: of files the marks."""
        changing = ("paths", "ckpt", "init", "tokenizer", "output", "restart", "device", "compiled", "as_json", "files")
        return {name: value for name, value in asdict(self).items() if name not in changing} | {
            f"file {name}": mark for name, mark in self.files.items()}


class Output:
    """The files of one run: the checkpoint `path`, its log `path`.jsonl, while it trains `path`.state, `path`.tokens.

    A context: inside it, the run holds a lock on the log, which the kernel releases if the process dies. Nothing that
    was there is touched before `begin`. Raises `Problem` where the run could not write, another run is writing, or a
    file would be overwritten that is no earlier run's, or a finished one's and not `restart`. Rank 0 alone reads and
    writes them, but for the tokens; a link stands for the file that it leads to.
    """

    def __init__(self, path: str, restart: bool = False):
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self.state_path, self.log_path = f"{self.path}.state", f"{self.path}.jsonl"
        self.tokens_path = f"{self.path}.tokens"
        self.restart, self.log, self.can_go_on = restart, None, True
        if rank() == 0:
            self.claim()

    def claim(self) -> None:
        """Check that the run may write here, and take the lock."""
        self.check_finished()
        data.check_writable(self.path)
        data.check_writable(self.log_path)
        if os.path.exists(self.log_path) and not data.is_log(self.log_path):
            raise Problem(f"{self.log_path} is where the metrics would go, and it is something else: give another -o")
        try:
            self.log = open(self.log_path, "ab", buffering=0)
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another run is writing {self.path}: wait for it, or give another -o") from None
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
        if self.log:
            if os.fstat(self.log.fileno()).st_size == 0:  # it came to nothing
                os.remove(self.log_path)
            self.log.close()

    def advice(self) -> str:
        """How to go on from the state."""
        if not self.can_go_on:
            return "it serves as a checkpoint; what was read from a pipe cannot be read again to go on from it"
        return f"the same command{' without --restart' * self.restart} goes on from it"

    def resume(self, settings: Settings) -> dict | None:
        """The state to go on from, None to start anew; a `Problem` where it has other settings. Rank 0's alone."""
        self.can_go_on, self.settings = "-" not in settings.files.values(), settings.fixed()
        # a run that torchrun starts again, because a process died, goes on from what it has saved itself
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not os.path.exists(self.state_path) or self.restart and not again:
            return None
        state, ours = read(self.state_path), self.settings
        theirs = state.get("settings")
        if not isinstance(theirs, dict) or not isinstance(state.get("tokenizer"), str):
            raise Problem(f"{self.state_path} is no state of a run: give another -o, or --restart to replace it")
        names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
        if names:
            was, now = (data.listed(f"{name} {s.get(name, 'absent')}" for name in names) for s in (theirs, ours))
            raise Problem(f"{self.state_path} is of a run with {was}, and this one has {now}: repeat that run's "
                          "settings to go on with it, or give another -o, or --restart to discard it")
        if not self.can_go_on:
            raise Problem(f"{self.state_path} is of a run that read standard input or a pipe, which cannot be read "
                          "again: --restart discards it")
        return state

    def begin(self, log_size: int | None) -> None:
        """Cut the log back to a state's, or empty it and discard what an earlier run left."""
        self.log.truncate(min(log_size or 0, os.path.getsize(self.log_path)))
        if log_size is None and os.path.exists(self.state_path):
            os.remove(self.state_path)

    def record(self, **values: float) -> None:
        """A line in the log; a `Problem` where it cannot be written or a value is not finite."""
        if not all(math.isfinite(value) for value in values.values()):
            raise Problem(f"the loss is no longer a number at step {values['step']:,}: try a lower --lr", 1)
        if rank() > 0:
            return
        try:
            line, size = json.dumps(values).encode() + b"\n", os.fstat(self.log.fileno()).st_size
            if self.log.write(line) < len(line):
                self.log.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Problem(f"could not write {self.log_path}: {error.strerror}. Make room", 1) from None

    def finish(self, content: dict) -> None:
        """Write the checkpoint, then let the state and the tokens go."""
        write(self.path, content)
        for path in (self.state_path, f"{self.state_path}.tmp", self.tokens_path):
            if os.path.exists(path):
                os.remove(path)


def adamw(objective: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear maps and embeddings, 0 on everything else."""
    decayed = {id(m.weight) for m in objective.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    groups = [{"params": [p for p in objective.parameters() if (id(p) in decayed) == decays], "weight_decay": decay}
              for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))]
    device = next(objective.parameters()).device
    # (a GPU's kernels read the rate when they run: it is a tensor there, so that recorded ones follow it too)
    lr = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))


def warmup(steps: int) -> int:
    return min(300, steps // 10)


def learning_rate(step: int, steps: int, peak: float, shape: str = "cosine") -> float:
    """Of the step numbered from 0: linear up to `peak` during warm-up, then down to 0 as a cosine or linearly."""
    if step < warmup(steps):
        return peak * (step + 1) / warmup(steps)
    share = (step - warmup(steps)) / (steps - warmup(steps))
    return peak * (0.5 * (1 + math.cos(math.pi * share)) if shape == "cosine" else 1 - share)


class Loss(nn.Module):
    """`objective.loss` as the module that is run in parallel."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return compute(self.objective, self.objective.loss, tensors)


class Stepper:
    """Optimizer steps: `Stepper(...)(batch)` takes one and returns the detached loss sums over pieces and ranks.

    A step whose loss or gradient is not finite changes nothing, and its summed loss is returned as NaN.

    Args:
        accumulate: cut each batch into so many pieces; the gradients are the same sums, and travel once a step.
        graphs: record steps (`Recorder`). Not of several processes, whose batches are large and whose gradients travel
            while others are being computed.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, accumulate: int = 1,
                 graphs: bool = False):
        self.objective, self.optimizer, self.accumulate = objective, optimizer, accumulate
        self.device, self.bucketed = next(objective.parameters()).device, world_size() == 1
        self.recorder = Recorder(objective, lambda tensors: self.step([tensors]),
                                 graphs and accumulate == 1 and world_size() == 1)
        if self.recorder.enabled:
            for group in optimizer.param_groups:
                group["capturable"] = True
        self.loss = Loss(objective)
        if world_size() > 1:
            torch._dynamo.config.optimize_ddp = False  # it would cut the layers, which are compiled as they are
            # (100 MB a bucket, not DDP's 25: half a percent more tokens a second on two H200)
            self.loss = DistributedDataParallel(self.loss, gradient_as_bucket_view=True, bucket_cap_mb=100)

    def __call__(self, batch: Batch) -> torch.Tensor:
        coupled = self.objective.coupled
        if coupled:
            self.objective.pieces = self.accumulate
        pieces = [self.objective.prepare(piece) for piece in ([batch] if coupled else batch.pieces(self.accumulate))]
        count = all_reduce(torch.tensor(sum(count for _, count in pieces))).item()
        return self.take([tensors for tensors, _ in pieces], count)

    def take(self, pieces: list[dict[str, torch.Tensor]], count: int) -> torch.Tensor:
        """A step on what `objective.prepare` made of the pieces, which count `count` over all ranks."""
        # of the summed loss in the mean one, of which ranks take means
        share = torch.tensor(world_size() / max(1, count))
        pieces = [tensors | {"share": share} for tensors in pieces]
        return self.recorder(pieces[0]) if len(pieces) == 1 else self.step(pieces)

    def step(self, pieces: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Backward through each piece, then one update; the loss sums (3,) over all pieces and ranks."""
        self.optimizer.zero_grad(set_to_none=True)  # a recording that failed may have left some
        if not self.bucketed:
            # after its first pass DDP orders its buckets anew, and with them the sums of more than two ranks:
            # done before the first step, a resumed run computes the very same
            self.bucketed = True
            self.backward(pieces)
            self.optimizer.zero_grad(set_to_none=True)
        total = all_reduce(self.backward(pieces))
        parameters = list(self.objective.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = (norm + total[0]).isfinite()
        if self.optimizer.defaults.get("fused"):  # it reads both where it runs: nothing waits, and it does the clipping
            self.optimizer.found_inf, self.optimizer.grad_scale = (~finite).float(), norm.clamp(min=CLIP) / CLIP
            self.optimizer.step()
        elif finite:
            nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.where(finite, total, math.nan)

    def backward(self, pieces: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Add up the gradients of all pieces and ranks; the loss sums (3,) over the pieces of this rank."""
        total = 0
        for i, tensors in enumerate(pieces, 1):
            with self.loss.no_sync() if world_size() > 1 and i < len(pieces) else nullcontext():
                sums = self.loss({name: tensor for name, tensor in tensors.items() if name != "share"})
                (sums[0] * to_device(tensors["share"], sums.device)).backward()
            total = total + sums.detach()
        return total


class Trainer:
    """Trains an objective on its device and keeps the files of `output`.

    Args:
        train, valid: batches of the training examples, and of the distinct items of `split`, the validation split,
            which is evaluated before the first step, every `settings.eval_every` steps and at the end.
        settings: with `steps`, `lr`, `eval_every`, `accumulate` and `seed`. graphs: of `Stepper`.
    The weights with the best score are kept. All that a run needs to go on is in `state_dict()`: whatever ends `run`,
    it is saved first.
    """

    def __init__(self, objective: Objective, train: Batches, valid: Batches, split: Split, output: Output,
                 settings: Settings, graphs: bool = False):
        self.objective, self.train, self.valid, self.split = objective, train, valid, split
        self.output, self.settings, self.steps = output, settings, settings.steps
        self.device = next(objective.parameters()).device
        self.optimizer = adamw(objective, settings.lr)
        self.stepper = Stepper(objective, self.optimizer, settings.accumulate, graphs)
        self.shape = "cosine" if objective.kind == "mlm" else "linear"
        self.log_every = max(1, min(LOG_STEPS, self.steps // 10))
        self.step = self.tokens = self.skipped = self.failing = 0  # (failing: steps without a loss in a row)
        self.evaluated = -1  # the step of the last evaluation
        self.window: list[torch.Tensor] = []  # loss sums of the steps since the last line of the log
        self.metrics: dict[str, float] | None = None  # of the best evaluation
        self.best: dict[str, torch.Tensor] | None = None  # its weights, on rank 0

    def run(self) -> dict[str, float]:
        """Train to the end and write the checkpoint; the best evaluation's metrics, the objective having its weights.

        Raises `Problem` once the state is saved: with exit code 129, 130 or 143 for a signal; with 1 where a file
        cannot be written, where the loss is not finite in an evaluation or in `FAILING` steps in a row, of which none
        changes the weights, and where anything else goes wrong.
        """
        self.saved, self.saving = time.monotonic(), 0.0  # when the state was last saved, and seconds that it took
        with Signals() as signals, progress(total=self.steps, initial=self.step, desc="training", unit="step",
                                            unit_scale=False, delay=0) as bar:
            try:
                while True:
                    self.log()
                    if (self.step % self.settings.eval_every == 0 or self.step == self.steps) \
                            and self.evaluated < self.step:
                        self.evaluate(signals)
                    if self.step == self.steps:
                        break
                    self.take_step()
                    self.show(bar)
                    signals.check()
                    self.save_when_due()
                if rank() == 0:
                    self.output.finish(checkpoint(self.objective, self.best))
            except BaseException as error:  # all that can end a run
                raise self.save_after(error) from error
        if rank() == 0:
            self.objective.load_state_dict(self.best)
        self.broadcast(self.objective.state_dict().values())
        return self.metrics

    def take_step(self) -> None:
        rate = learning_rate(self.step, self.steps, self.settings.lr, self.shape)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        # dropout is not the same on all ranks, and of a run that goes on what it would have been
        seeds = np.random.SeedSequence([self.settings.seed, rank(), self.step])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        self.objective.train()
        batch = self.train[self.step]
        self.window.append(self.stepper(batch))
        self.step += 1
        self.tokens += batch.tokens

    def evaluate(self, signals: Signals) -> None:
        """Score the weights, and keep them if they are the best; of equals those that have learned longest."""
        metrics, _ = evaluate(self.objective, self.valid, self.split, signals.watch)
        self.output.record(step=self.step, **{f"valid_{name}": value for name, value in metrics.items()})
        self.evaluated = self.step
        better = self.metrics is None or self.objective.score(metrics) >= self.objective.score(self.metrics)
        if self.step and better:  # not what has learned nothing
            self.metrics, weights = metrics, self.objective.state_dict() if rank() == 0 else {}
            self.best = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}

    def log(self) -> None:
        """Write a line for the steps since the last one, every `log_every` steps."""
        if self.step % self.log_every and self.step != self.steps or not self.window:
            return
        sums = torch.stack(self.window).double().cpu()
        bad = ~sums[:, 0].isfinite()
        runs = list(itertools.accumulate(bad.tolist(), lambda run, is_bad: (run + 1) * is_bad, initial=self.failing))
        loss, correct, count = sums[~bad].sum(0).tolist()
        skipped = self.skipped + int(bad.sum())
        self.output.record(step=self.step, epoch=round(self.step / len(self.train), 4), tokens=self.tokens,
                           lr=learning_rate(self.step - 1, self.steps, self.settings.lr, self.shape),
                           **(dict(loss=loss / count, accuracy=correct / count) if count else {}),
                           **(dict(skipped=skipped) if skipped else {}))
        self.skipped, self.failing, self.window = skipped, runs[-1], []
        if bad.any():
            info(f"up to step {self.step:,}, {skipped:,} steps were skipped: their loss was no number")
        if max(runs) >= FAILING:
            self.failing = 0  # the same command tries again
            raise Problem(f"the loss was no number in {max(runs)} steps in a row, up to step {self.step:,}: try a "
                          "lower --lr. The weights are those from before", 1)

    def show(self, bar) -> None:
        """Move the progress bar; once a second with the loss of the last step, for which a GPU is waited for."""
        bar.update()
        if time.monotonic() - getattr(bar, "shown", 0) > 1 and not bar.disable and self.window:
            bar.shown = time.monotonic()
            loss, correct, count = self.window[-1].tolist()
            bar.set_postfix_str(f"loss {loss / max(count, 1):.3f}, accuracy {correct / max(count, 1):.1%}", False)

    def save_when_due(self) -> None:
        """Every five minutes and at the ends of epochs, unless saving would take more than a 20th of the time."""
        wait = 0 if self.step % len(self.train) == 0 else SAVE_SECONDS
        if time.monotonic() - self.saved > max(wait, 20 * self.saving):
            started = time.monotonic()
            self.save()
            self.saved = time.monotonic()
            self.saving = self.saved - started

    def save(self) -> None:
        if rank() == 0:
            write(self.output.state_path, self.state_dict())

    def save_after(self, error: BaseException) -> Problem:
        """Save the state, whatever has gone wrong; the `Problem` that says what, and where the state is."""
        problem, state = explain(error), self.output.state_path
        what = f"{problem.message} at step {self.step:,} of {self.steps:,}"
        if rank() > 0:
            return Problem(what, problem.exit_code)
        try:
            self.save()
        except BaseException as failure:
            earlier = f"{state} is of an earlier step" if os.path.exists(state) else "there is no state"
            return Problem(f"{what}; {explain(failure).message}; {earlier}", problem.exit_code)
        return Problem(f"{what}: the state is saved in {state}; {self.output.advice()}", problem.exit_code)

    def state_dict(self) -> dict:
        os.fsync(self.output.log.fileno())
        return checkpoint(self.objective) | {
            "settings": self.output.settings, "optimizer": self.optimizer.state_dict(), "best": self.best,
            "metrics": self.metrics, "window": [sums.cpu() for sums in self.window], "processes": world_size(),
            "log": os.fstat(self.output.log.fileno()).st_size,
            **{name: getattr(self, name) for name in ("step", "evaluated", "tokens", "skipped", "failing")}}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state, which is emptied, as it is several times the size of the model; raises `Problem`."""
        try:
            by = f", by {state['processes']} processes, where now there are {world_size()}"
            check_tensors(state["weights"], self.objective.state_dict())
            self.objective.load_state_dict(state["weights"])
            for number, parameter in enumerate(itertools.chain(*(g["params"] for g in self.optimizer.param_groups))):
                moments = state["optimizer"]["state"].get(number)
                if moments:  # there are none yet of a run that has taken no step
                    check_tensors(moments, {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter})
            for group, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                group.update((name, value) for name, value in own.items() if name != "params")  # this device's
            self.optimizer.load_state_dict(state["optimizer"])
            for name in ("step", "evaluated", "tokens", "skipped", "failing"):
                setattr(self, name, int(state[name]))
            self.window = [sums.to(self.device) for sums in state["window"]]
            self.metrics, self.best = state["metrics"], state["best"]
            if not 0 <= self.step <= self.steps or any(sums.shape != (3,) for sums in self.window) \
                    or (self.metrics is None) != (self.best is None) or type(state["log"]) is not int:
                raise ValueError
            if self.best is not None:
                self.objective.score(self.metrics)
                check_tensors(self.best, self.objective.state_dict())
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise Problem(f"{self.output.state_path} does not fit this run: --restart discards it") from None
        self.output.begin(state["log"])
        state.clear()
        info(f"going on from step {self.step:,} of {self.steps:,}, saved in {self.output.state_path}"
             + by * (not by.startswith(f", by {world_size()} ")))

    def begin(self, state: dict | None) -> None:
        """Start anew, or from a state that rank 0 has."""
        if state:
            self.load_state_dict(state)
        elif rank() == 0:
            self.output.begin(None)
        if world_size() == 1:
            return
        names = ("step", "evaluated", "tokens", "skipped", "failing", "metrics")
        vars(self).update(broadcast({name: getattr(self, name) for name in names}))
        self.window = [sums.to(self.device) for sums in broadcast([sums.cpu() for sums in self.window])]
        self.broadcast(self.objective.state_dict().values())
        parameters = list(itertools.chain(*(group["params"] for group in self.optimizer.param_groups)))
        if self.step and rank() > 0:
            for parameter in parameters:
                self.optimizer.state[parameter] = {"step": torch.zeros((), device=self.device)} | {
                    moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        for parameter in parameters:
            self.broadcast(self.optimizer.state[parameter].values() if self.step else ())

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all ranks rank 0's values of tensors that they have."""
        for tensor in tensors if world_size() > 1 else ():
            dist.broadcast(tensor, 0)


# ---- what bench measures ----------------------------------------------------------------------------

def median_seconds(run: Callable[[], object], device: torch.device, repeats: int, settle: float = 0.5) -> float:
    """Of one run, after warming up for `settle` seconds and at least three runs: a GPU under load slows down."""
    begun, runs, times = time.monotonic(), 0, []
    while runs < 3 or time.monotonic() - begun < settle:
        run()
        runs += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return float(np.median(times))


def product_rate(device: torch.device, repeats: int) -> float:
    """FLOP/s of one large matrix product of random numbers, in the precision that the models use."""
    size, dtype = (8192, torch.bfloat16) if bf16(device) else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size ** 3 / median_seconds(lambda: a @ b, device, repeats)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss begins with that of the parent
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes now, from which on `peak_memory` begins anew; None where the system does not tell."""
    gc.collect()  # a compiled model refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier rows have freed
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, AttributeError):
        return None


def measure(encoder: nn.Module, length: int, batch: int, train: bool, device: torch.device, compiled: bool | None,
            repeats: int) -> dict:
    """Speed and memory of an encoder on full batches of random tokens of one length; in training of an MLM step.

    samples_per_second, tokens_per_second; the median seconds of a run; memory in bytes beyond the weights, or None;
    projections in FLOP/s; first_seconds of the first run; whether it was compiled. Raises what torch does where memory
    is short.
    """
    objective, vocab = MLM(encoder, None).to(device), encoder.config["vocab"]
    compiled = compile_objective(objective, compiled)
    if not train:
        objective = objective.frozen()
        del encoder
    before = memory_in_use(device)
    ids = torch.randint(vocab, (batch, length), device=device)
    if train:
        count = max(1, round(0.15 * batch * length))
        stepper = Stepper(objective, adamw(objective, 1e-5), graphs=compiled)
        places = torch.randperm(batch * length, device=device)[:count]
        run = partial(stepper.take, [dict(ids=ids, places=places, targets=ids.flatten()[places].long())], count)
    else:
        run = partial(Recorder(objective, partial(compute, objective, objective.encoder)), {"ids": ids})

    with torch.set_grad_enabled(train):
        begun = time.monotonic()
        float(run().sum())  # waits for a GPU
        first = time.monotonic() - begun
        memory_in_use(device)  # the compiler's own does not count
        seconds = median_seconds(run, device, repeats)
    FLOP = 2 * sum(linear.weight.numel() for linear in objective.encoder.linear_maps()) * (3 if train else 1)
    return dict(samples_per_second=batch / seconds, tokens_per_second=batch * length / seconds, seconds=seconds,
                memory=None if before is None else max(0, peak_memory(device) - before),
                projections=FLOP * batch * length / seconds, first_seconds=first, compiled=compiled)
