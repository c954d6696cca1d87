"""Objectives, the one loop that trains them, and the files that a run writes.

An objective is a module that holds an encoder and its own head, and brings
    prepare(batch)           the tensors of a `data.Batch`, and what it counts
    sums(**tensors)          (summed loss, correct, counted), the loss to be divided by the count
    outputs(batches, split)  what the model says of each example of a `data.Split`, its items coming in batches
    metrics(outputs, split)  a dict;  score(metrics)  a number that is higher when better
and, if it is fine-tuned,
    results(batches, split)  for `predict`, a dict an example
    lines(outputs, split)    for a file of predictions
Any encoder will do that has `config` (a dict with `d` and `vocab`), `embedding`, `compile_parts()`, and maps ids
(B, L) and lengths (B,), or None where every token is real, to hidden states (B, L, d). `inference` lends it a dict,
`kept`, for what it makes of its weights alone.
"""
import atexit
import errno
import fcntl
import itertools
import json
import math
import os
import signal
import sys
import time
import uuid
import warnings
import zipfile
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.functional import cross_entropy, gelu, linear, normalize, pad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as checkpointed

import data
from data import (IGNORE, TASKS, Batch, Batches, Problem, Split, Tokenizer, gather, lead, progress, say, together,
                  world)

FORMAT = "codessm 1"
WEIGHT_DECAY = 0.01
CLIP = 1.0  # the norm of the gradient at most
SAVE_SECONDS = 300
LOG_STEPS = 50
PAYS = 100  # batches a length
FAILING = 20  # steps in a row whose loss is no number


def initialise(linear: nn.Linear, d: int) -> nn.Linear:
    """A linear map at its start: weights N(0, 0.64 / sqrt(d)), BiGS's 0.02 at d = 1,024, and biases 0."""
    nn.init.normal_(linear.weight, std=0.64 / math.sqrt(d))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


# ---- masked language modelling ----------------------------------------------------------------------

class MLM(nn.Module):
    """Masked language modelling (Devlin et al. 2019, section 3.1).

    15 % of the real, ordinary tokens are predicted; of these 80 % are read as <mask>, 10 % as a random
    ordinary token, 10 % as they are. The choice is a hash of (seed, epoch, record, position).
    The head is dense, gelu, LayerNorm, then the tied embedding and a bias, at the chosen positions only.
    """
    name, coupled, compiled = "mlm", False, False

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, seed: int = 0):
        super().__init__()
        d = encoder.config["d"]
        self.encoder, self.tokenizer, self.seed = encoder, tokenizer, seed
        self.dense, self.norm = initialise(nn.Linear(d, d), d), nn.LayerNorm(d, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(encoder.config["vocab"]))

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        """Corrupted ids and targets (B, L), int32 and int64, IGNORE where nothing is predicted; their count.

        `where` (M,), int64, are the flat positions of the targets. Compiled, M depends on B and L alone: as many as
        are chosen but in one of 10^6 batches, a place without a target filling it up.
        """
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
        where = row * L + column
        if self.compiled:
            most = 0.15 * B * L + 5 * math.sqrt(0.1275 * B * L)
            room = -(-int(most) // 8) * 8
            room *= max(1, -(-len(where) // room))
            where = np.pad(where, (0, room - len(where)), constant_values=targets.argmin())
        return to_tensors(ids=ids, lengths=batch.lengths, targets=targets, where=where), len(row)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., vocab) of hidden states (..., d), in their dtype."""
        hidden, weight, bias = self.norm(gelu(self.dense(hidden))), self.encoder.embedding.weight, self.bias
        room = -len(bias) % 8
        if room and torch.is_autocast_enabled(hidden.device.type):
            # rows of bfloat16 that are no multiple of 16 bytes keep a GPU off its fast products
            weight, bias = pad(weight, (0, 0, 0, room)), pad(bias, (0, room))
        return linear(hidden, weight, bias)[..., :len(self.bias)]

    def sums_at(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`sums` of hidden states (M, d) and their targets (M,)."""
        return classify(self.logits(hidden), targets)

    def sums(self, ids: torch.Tensor, targets: torch.Tensor, where: torch.Tensor,
             lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(summed cross-entropy in nats, correct predictions, predictions), float32 (3,)."""
        return self.sums_at(*at(where, self.encoder(ids, lengths), targets))

    def outputs(self, batches: Iterable[Batch], _split: Split | None = None) -> torch.Tensor:
        """`sums` over all the batches, float64 (3,)."""
        total, run = torch.zeros(3, dtype=torch.float64), inference(self, self.sums)
        for batch in batches:
            total += run(self.prepare(batch)[0]).cpu().double()
        return summed(total)

    def metrics(self, outputs: torch.Tensor, _split: Split | None = None) -> dict[str, float]:
        """Loss in nats a predicted token, accuracy, perplexity = exp(loss)."""
        loss, correct, count = outputs.tolist()
        count = count or math.nan
        return {"loss": loss / count, "accuracy": correct / count, "perplexity": math.exp(min(700, loss / count))}

    @staticmethod
    def score(metrics: dict[str, float]) -> float:
        """Higher is better: the weights of the evaluation with the highest are kept."""
        return -metrics["loss"]


def to_tensors(**arrays: np.ndarray | None) -> dict[str, torch.Tensor]:
    """What there is of the arrays; the lengths only of rows with padding, as attention is faster without a mask."""
    for side in ("", "2"):
        if arrays.get("lengths" + side) is not None and arrays["lengths" + side].min() == arrays["ids" + side].shape[1]:
            arrays["lengths" + side] = None
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def at(where: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (M, d) and targets (M,) at the flat positions `where` of (B, L, d) and (B, L)."""
    return hidden.flatten(0, 1).index_select(0, where), targets.flatten().index_select(0, where)


# ---- fine-tuned tasks -------------------------------------------------------------------------------

def pool(encoder: nn.Module, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of the hidden states of each row's real tokens, (B, d) float32; 0 of a row that has none."""
    hidden = encoder(ids, lengths).float()
    if lengths is None:
        return hidden.mean(1)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return torch.where(real[..., None], hidden, 0).sum(1) / lengths.clamp(min=1)[:, None]


def embed(task: nn.Module, batches: Iterable[Batch], split: Split) -> torch.Tensor:
    """`pool` of each distinct item of a split, in their order: (items, d) float32 on the CPU."""
    table = torch.zeros(len(split.distinct), task.encoder.config["d"])
    run = inference(task, partial(pool, task.encoder))
    for batch in batches:
        real = batch.lengths > 0
        rows = run(to_tensors(ids=batch.ids, lengths=batch.lengths))
        table[np.searchsorted(split.distinct, batch.records[real])] = rows[torch.from_numpy(real)].cpu()
    return summed(table)  # each row is one rank's


def head(wide: int, d: int, classes: int) -> nn.Sequential:
    """dense, tanh, linear."""
    dense, out = nn.Linear(wide, d), nn.Linear(d, classes)
    return nn.Sequential(initialise(dense, d), nn.Tanh(), initialise(out, d))


class Classification(nn.Module):
    """A label for a function, or for a pair of them.

    logits = head(x), x being the mean-pooled code (d), or of a pair [a + b, |a - b|, a * b] (3d), which is the
    same for (b, a). Args: `labels` are the names of the classes; of a pair's two, the second is "alike".
    """
    coupled = False

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str, labels: list[str], ctx: int):
        super().__init__()
        self.encoder, self.tokenizer, self.name, self.labels, self.ctx = encoder, tokenizer, name, labels, ctx
        self.pairs = TASKS[name].kind == "pair"
        d = encoder.config["d"]
        self.head = head(3 * d if self.pairs else d, d, len(labels))

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        ids2, lengths2 = batch.second or (None, None)
        tensors = to_tensors(ids=batch.ids, lengths=batch.lengths, labels=batch.labels, ids2=ids2, lengths2=lengths2)
        return tensors, int((batch.lengths > 0).sum())

    def logits(self, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        """(B, classes) of pooled functions (B, d)."""
        return self.head(a if b is None else torch.cat([a + b, (a - b).abs(), a * b], -1))

    def sums(self, ids, labels, ids2=None, lengths=None, lengths2=None) -> torch.Tensor:
        """(summed cross-entropy in nats, correct, examples), float32 (3,), of ids (B, L) and labels (B,)."""
        sides = [pool(self.encoder, ids, lengths)]
        if self.pairs:
            sides.append(pool(self.encoder, ids2, lengths2))
        return classify(self.logits(*sides), labels)

    def outputs(self, batches: Iterable[Batch], split: Split) -> np.ndarray:
        """Probabilities (n, classes), float32, of the examples; each distinct function is encoded once."""
        table, device = embed(self, batches, split), next(self.parameters()).device
        rows = torch.from_numpy(np.searchsorted(split.distinct, split.examples))
        found = []
        for part in rows.split(4096):
            with torch.autocast(device.type, enabled=False):
                found.append(self.logits(*(table[side].to(device) for side in part.T)).softmax(-1).cpu())
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

    def score(self, metrics: dict[str, float]) -> float:
        return metrics[TASKS[self.name].metric]

    def results(self, batches: Iterable[Batch], split: Split) -> Iterator[dict]:
        """The label and the probability of each, or the score of a pair, which is that of label 1."""
        numbers = all(label.isdecimal() and len(label) < 20 and str(int(label)) == label for label in self.labels)
        for row in self.outputs(batches, split).tolist():
            label = self.labels[int(np.argmax(row))]
            found = {"prediction": int(label) if numbers else label}
            yield found | ({"score": row[1]} if self.pairs else {"probabilities": dict(zip(self.labels, row))})

    def lines(self, outputs: np.ndarray, split: Split) -> Iterator[str]:
        """idx, tab, label; of a pair idx1, tab, idx2, tab, label: as CodeXGLUE's evaluators read them."""
        for example, best in enumerate(outputs.argmax(1)):
            row = split.row(example)
            names = [row["idx1"], row["idx2"]] if "idx1" in row else [row.get("idx", example)]
            yield "\t".join(" ".join(str(name).split()) for name in [*names, self.labels[best]])


def classify(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(summed cross-entropy, correct, counted) of logits (n, classes) and targets (n,), some of them IGNORE."""
    logits = logits.float()
    loss = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    correct = logits.detach().argmax(-1) == targets
    return torch.stack([loss, correct.sum().float(), (targets != IGNORE).sum().float()])


class Gather(torch.autograd.Function):
    """The rows of all ranks, (W B, ...) in the order of the ranks, of those that each has, (B, ...).

    What a rank's rows did to the losses of all ranks flows back to them.
    """

    @staticmethod
    def forward(_ctx, rows: torch.Tensor) -> torch.Tensor:
        if world() == 1:
            return rows.view_as(rows)
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx, gradient: torch.Tensor) -> torch.Tensor:
        return summed(gradient.contiguous()).chunk(world())[data.rank()]


class Retrieval(nn.Module):
    """Code for a text: a bi-encoder with in-batch negatives and a learned temperature.

        q, c = pool(text), pool(code), normalised     logits = q c^T exp(s)     s from log(1 / 0.07) to at most log 100

    The cross-entropy is that of each text over the codes of the batch, as in InfoNCE (van den Oord et al. 2018); a
    code that is the same item as a text's own, or that of an equal text, is no negative; of several ranks the codes are
    those of all. As the rows of a batch depend on each other, --accumulate cuts only the encoding into pieces and
    encodes each again for its gradients.
    """
    coupled, pieces = True, 1

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str, labels: list[str], ctx: int):
        super().__init__()
        self.encoder, self.tokenizer, self.name, self.labels, self.ctx = encoder, tokenizer, name, labels, ctx
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    prepare = Classification.prepare
    score = Classification.score

    def embed(self, ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Normalised (B, d)."""
        if self.pieces == 1:
            return normalize(pool(self.encoder, ids, lengths), dim=-1)
        pieces = zip(*(side.chunk(self.pieces) for side in (ids, lengths) if side is not None))
        return normalize(torch.cat([checkpointed(pool, self.encoder, *piece, use_reentrant=False)
                                    for piece in pieces]), dim=-1)

    def sums(self, ids, labels, ids2, lengths=None, lengths2=None) -> torch.Tensor:
        """(summed cross-entropy in nats, texts whose own code comes first, texts), float32 (3,)."""
        q, c = self.embed(ids, lengths), Gather.apply(self.embed(ids2, lengths2))
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ c.T * self.scale.clamp(max=math.log(100)).exp()
        own = torch.arange(len(q), device=q.device) + data.rank() * len(q)
        every_label, every_text = Gather.apply(labels), Gather.apply(ids)
        same = (labels[:, None] == every_label) | (ids[:, None] == every_text).all(-1) | (every_label == IGNORE)
        logits = logits.masked_fill(same & (own[:, None] != torch.arange(len(c), device=q.device)), -math.inf)
        return classify(logits, torch.where(labels == IGNORE, IGNORE, own))

    def outputs(self, batches: Iterable[Batch], split: Split) -> tuple[np.ndarray, np.ndarray]:
        """The rank from 1 of each query's first right candidate, and its best 100: (Q,) and (Q, 100) positions."""
        table = normalize(embed(self, batches, split), dim=-1).to(next(self.parameters()).device)
        _, first = np.unique(split.query, return_index=True)
        queries = table[np.searchsorted(split.distinct, split.examples[first, 0])]
        candidates = table[np.searchsorted(split.distinct, split.candidates)]
        ranks, top = rank(queries, candidates, split.query, split.gold)
        return ranks if table.isfinite().all() else ranks * np.nan, top

    def metrics(self, outputs: tuple[np.ndarray, np.ndarray], _split: Split) -> dict[str, float]:
        """MRR = mean of 1 / rank; recall@k = share of queries with rank <= k."""
        ranks = outputs[0] if np.isfinite(outputs[0]).all() else np.full(1, np.nan)
        return {"mrr": float((1 / ranks).mean())} | {f"recall@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}

    def results(self, batches: Iterable[Batch], split: Split) -> Iterator[dict]:
        """The cosine of each text and code."""
        table = normalize(embed(self, batches, split), dim=-1)
        text, code = table[np.searchsorted(split.distinct, split.examples.T)]
        for score in (text * code).sum(-1).tolist():
            yield {"score": score}

    def lines(self, outputs: tuple[np.ndarray, np.ndarray], split: Split) -> Iterator[str]:
        """{"url", "answers"}: the idx of the best 100 candidates, as CodeXGLUE's evaluator reads them."""
        _, first = np.unique(split.query, return_index=True)
        names: dict[int, object] = {}
        for example, answers in zip(first, outputs[1].tolist()):
            for i in answers:
                if i not in names:
                    names[i] = identity(split.candidate(i), i, "idx", "_id")
            yield json.dumps({"url": identity(split.row(example), int(example), "url", "idx", "_id"),
                              "answers": [names[i] for i in answers]})


def identity(row: dict, number: int, *names: str) -> object:
    """What a row calls itself: the first of the named fields, else its number."""
    return next((row[name] for name in names if name in row), number)


SCORES = 2 ** 24  # similarities that are held at a time
TIE = 1e-6  # cosines that differ by less are equal: they are sums of float32


def rank(queries: torch.Tensor, candidates: torch.Tensor, query: np.ndarray, gold: np.ndarray,
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


class Tagging(nn.Module):
    """A label for some of a file's words: a linear map of the hidden state at each word's first sub-token.

    Logits are computed at labelled words only. Label 0 is UNK: where it is predicted, that is always wrong.
    """
    coupled = False

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str, labels: list[str], ctx: int):
        super().__init__()
        self.encoder, self.tokenizer, self.name, self.labels, self.ctx = encoder, tokenizer, name, labels, ctx
        d = encoder.config["d"]
        self.head = initialise(nn.Linear(d, len(labels)), d)

    score = Classification.score

    def prepare(self, batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
        """Targets (B, L) beside the ids, IGNORE where no label is asked for."""
        targets = batch.second[0].astype(np.int64)
        targets[np.arange(targets.shape[1]) >= batch.lengths[:, None]] = IGNORE
        where = np.flatnonzero(targets != IGNORE)
        return to_tensors(ids=batch.ids, lengths=batch.lengths, targets=targets, where=where), len(where)

    def sums(self, ids, targets, where, lengths=None) -> torch.Tensor:
        """(summed cross-entropy in nats, correct, labelled words), float32 (3,)."""
        hidden, targets = at(where, self.encoder(ids, lengths), targets)
        return classify(self.head(hidden), targets)

    def outputs(self, batches: Iterable[Batch], split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
        """(gold, predicted) label numbers of the labelled words of each window, in the order of the files."""
        windows, run = [None] * len(split), inference(self, self.predict)
        for batch in batches:
            tensors, _ = self.prepare(batch)
            predicted = run(tensors).cpu().numpy()
            gold = tensors["targets"].numpy()
            ends = np.cumsum((gold != IGNORE).sum(1))[:-1]
            for window, *found in zip(batch.records, np.split(gold[gold != IGNORE], ends), np.split(predicted, ends)):
                if len(found[0]):
                    windows[window] = tuple(found)
        return [next(filter(None, found), None) for found in zip(*gather(windows))]

    def predict(self, ids, targets, where, lengths=None) -> torch.Tensor:
        """The numbers of the best labels, -1 of none; few logits at a time, as every word may be asked for."""
        hidden, _ = at(where, self.encoder(ids, lengths), targets)
        best = torch.cat([self.head(part).argmax(-1) for part in hidden.split(1024)])
        return best.masked_fill(~hidden.isfinite().all(-1), -1)

    def metrics(self, outputs: list[tuple[np.ndarray, np.ndarray]], _split: Split) -> dict[str, float]:
        """Accuracy (= micro F1), weighted F1 and F1 as published, and of typeinf the same for the top 100 types.

        A gold UNK stays in the denominator. Top-100 words are those whose gold label is in rows 2 to 101 of
        the vocabulary (0 is UNK, 1 is any).
        """
        found = {}
        for prefix, top in (("", False), *([("top100_", True)] if self.name == "typeinf" else [])):
            windows = [(gold[keep], np.where(predicted[keep] == 0, -1, predicted[keep])) for gold, predicted in outputs
                       for keep in [(gold > 1) & (gold < 102) if top else gold >= 0]]
            gold, predicted = (np.concatenate(side) for side in zip(*windows))
            if top and not len(gold):
                continue
            told = all((predicted >= 0).all() for _, predicted in outputs)
            found[prefix + "accuracy"] = float((gold == predicted).mean()) if told else math.nan
            found[prefix + "weighted_f1"] = precision_recall_f1(gold, predicted, "weighted")[2]
            names = [*self.labels, "\0\0"]  # the last, -1, is equal to no type
            found[prefix + "f1_published"] = f1_published(*([[names[i] for i in side] for side in sides]
                                                            for sides in zip(*windows)))
        return found

    def results(self, batches: Iterable[Batch], split: Split) -> Iterator[dict]:
        """The tags of a file's words; its windows follow each other."""
        outputs = self.outputs(batches, split)
        for _, windows in itertools.groupby(zip(split.items.spans[:, 0], outputs), key=lambda window: window[0]):
            yield {"predictions": [self.labels[i] if i >= 0 else math.nan for _, (_, predicted) in windows
                                   for i in predicted]}

    def lines(self, outputs: list[tuple[np.ndarray, np.ndarray]], _split: Split) -> Iterator[str]:
        """The number of the labelled word, tab, its type: as CodeXGLUE's evaluator reads them."""
        for number, label in enumerate(itertools.chain(*(predicted for _, predicted in outputs))):
            yield f"{number}\t{self.labels[label]}"


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


OBJECTIVES = {"retrieval": Retrieval, "classify": Classification, "pair": Classification, "tag": Tagging}


def build(content: dict, encoder: nn.Module, tokenizer: Tokenizer) -> nn.Module:
    """The objective that a checkpoint's content names, around an encoder; raises ValueError and the like."""
    if content["task"] == "mlm":
        return MLM(encoder, tokenizer)
    labels, ctx = content["labels"], content["ctx"]
    if type(ctx) is not int or ctx < 8 or type(labels) is not list or len(set(labels)) < len(labels) \
            or not all(isinstance(label, str) for label in labels):
        raise ValueError
    return OBJECTIVES[TASKS[content["task"]].kind](encoder, tokenizer, content["task"], labels, ctx)


def evaluate(task: nn.Module, batches: Batches, split: Split | None = None, workers: int = 0,
             watch: Callable[[Iterable], Iterable] = iter,
             eagerly: bool | None = None) -> tuple[dict[str, float], object]:
    """(metrics, outputs) of the task on a split whose items come in `batches`; `watch` may raise to stop it.

    Each rank runs its share, and all of them get the same.
    A compiled task is run `eagerly` where compiling for evaluation would not pay, unless that is given.
    """
    task.eval()
    workers = workers if len(batches) > batches.POOL else 0  # not worth starting them
    eagerly = not pays(batches, len(batches)) if eagerly is None else eagerly
    with (torch.no_grad(), torch.compiler.set_stance("force_eager" if eagerly else "default"),
          closing(batches.stream(stop=len(batches), workers=workers)) as stream):
        outputs = task.outputs(progress(watch(stream), total=len(batches), desc="evaluating", unit=" batches",
                                        unit_scale=False, leave=False), split)
    return lead(partial(task.metrics, outputs, split)), outputs


# ---- many processes ---------------------------------------------------------------------------------

def join() -> None:
    """Join the processes that `torchrun` (or whatever sets its variables) has started; raises `Problem`.

    Objects and CPU tensors travel by gloo, those of GPUs by NCCL. A rank that waits this long for another gives up.
    """
    wait = timedelta(minutes=30)
    try:
        store, number, count = next(rendezvous("env://", timeout=wait))
        with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=wait, rank=number,
                                world_size=count, store=dist.PrefixStore(meet(store, number, count, wait), store))
    except (ValueError, RuntimeError) as error:
        raise Problem(f"the {os.environ['WORLD_SIZE']} processes could not reach each other "
                      f"({str(error).splitlines()[0][:200]}): start them with torchrun", 1) from None


def meet(store: dist.Store, number: int, count: int, wait: timedelta) -> str:
    """A name for this meeting of the ranks, new to the store; raises RuntimeError.

    When torchrun starts its processes again, they find in the store what those before them have left, and would look
    for each other where these have been (pytorch/pytorch#135712). So each brings a token of its own, and rank 0, which
    may first see an old one, answers until each rank has the answer to its own.
    """
    mine, late = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()
    if number > 0:
        store.set(f"token {number}", mine)
        name = store.get(f"answer {mine}").decode()
        store.set(f"{name} {number}", "here")
        return name
    absent = set(range(1, count))
    while absent:
        for other in list(absent):
            if store.check([f"token {other}"]):
                store.set("answer " + store.get(f"token {other}").decode(), mine)
            if store.check([f"{mine} {other}"]):
                absent.remove(other)
        if time.monotonic() > late:
            raise RuntimeError(f"{len(absent)} did not come")
        time.sleep(0.01)
    return mine


def leave(code: int) -> None:
    """End this process, if it is one of several, without taking down what joined them.

    As it goes down a thread of gloo is at times still there, which aborts the process after all is done.
    """
    if world() > 1:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def lost(error: Exception) -> bool:
    """Whether it is how another rank's end shows."""
    return world() > 1 and (isinstance(error, dist.DistError) or any(
        said in str(error) for said in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")))


def summed(tensor: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """The tensor, which now is the sum over all ranks."""
    if world() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


class Sums(nn.Module):
    """`compute(task, tensors)` as the module that is run in parallel."""

    def __init__(self, task: nn.Module):
        super().__init__()
        self.task = task

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return compute(self.task, tensors)


# ---- devices ----------------------------------------------------------------------------------------

def pays(batches: Batches, steps: int) -> bool:
    """Whether so many steps of these batches gain more time than compiling for their lengths takes."""
    return steps >= PAYS * len(batches.lengths)


def compile_parts(task: nn.Module, wanted: bool | None, pays: bool = True) -> bool:
    """Compile the task if that is `wanted`, None meaning where it `pays` on a GPU. Whether it is compiled.

    Each length and mode is compiled when it first comes. Where no compiler works, a line says so.
    """
    device = next(task.parameters()).device
    if not (device.type == "cuda" and pays if wanted is None else wanted):
        return False
    try:
        torch.compile(lambda x: (x + 1).exp(), dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing: Triton, a C++ compiler, a header
        reason = str(error).strip().splitlines() or [type(error).__name__]
        say(f"no compiler works on {device}, so nothing is compiled ({reason[0][:100]})")
        return False
    # past this many compilations of the same code dynamo would go on eagerly, with only a warning
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 256)
    torch._dynamo.config.accumulated_cache_size_limit = max(torch._dynamo.config.accumulated_cache_size_limit, 4096)
    warnings.filterwarnings("ignore", message=".*(TensorFloat32|max_autotune_gemm|Online softmax)")
    task.encoder.compile_parts()
    if task.name == "mlm":
        task.compiled = True
        task.sums_at = torch.compile(task.sums_at, dynamic=False, fullgraph=True)
    return True


def bf16(device: torch.device) -> bool:
    """Whether matrix products run in bfloat16 there."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def narrow(task: nn.Module) -> nn.Module:
    """The task, to be read alone: its encoder's linear maps have the weights that `compute` rounds theirs to.

    It would do so in each batch, which of a single text on a GPU takes a third of the time.
    """
    if bf16(next(task.parameters()).device):
        for module in task.encoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.bfloat16()
    return task


def compute(task: nn.Module, tensors: dict[str, torch.Tensor], function: Callable | None = None) -> torch.Tensor:
    """`task.sums` (or another function) on the task's device, under bf16 autocast on GPUs that have bf16."""
    device = next(task.parameters()).device
    tensors = {name: to_device(tensor, device) for name, tensor in tensors.items()}
    # a cache of cast weights would outlive the recording of a CUDA graph
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16(device), cache_enabled=False):
        return (function or task.sums)(**tensors)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In pinned memory, if it is to be copied to a GPU, so that nothing waits for the copy."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return pinned(tensor, device).to(device, non_blocking=True)


class Recorder:
    """`function(tensors)` on a device; on a GPU recorded as a CUDA graph once the shapes have come `BEFORE` times.

    Of a small batch it takes longer to launch kernels one by one than to run them; of a larger one than `MOST_TOKENS`
    the memory of a graph would not be worth its time. Nor is tagging recorded, whose batches differ in the number of
    labelled words. Where a recording fails, a line says so and none is made.
    """
    BEFORE, MOST, MOST_TOKENS = 2, 64, 16_384

    def __init__(self, function: Callable[[dict[str, torch.Tensor]], torch.Tensor], task: nn.Module,
                 wanted: bool = True):
        self.function, self.device = function, next(task.parameters()).device
        self.wanted = wanted and self.device.type == "cuda" and not isinstance(task, Tagging)
        self.seen: dict[tuple, int] = {}
        self.recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]] = {}

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = sum(tensor.numel() for name, tensor in tensors.items() if name in ("ids", "ids2"))
        if not self.wanted or tokens > self.MOST_TOKENS:
            return self.function(tensors)
        shapes = tuple((name, tensor.shape) for name, tensor in tensors.items())
        self.seen[shapes] = self.seen.get(shapes, 0) + 1
        if shapes not in self.recorded:
            if self.seen[shapes] <= self.BEFORE or len(self.recorded) == self.MOST:
                return self.function(tensors)
            try:
                self.record(shapes, tensors)
            except RuntimeError as error:
                self.wanted = False
                self.recorded.clear()  # and their memory
                say(f"a batch could not be recorded as a CUDA graph ({str(error).splitlines()[0][:100]}): "
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
        pool = next((graph.pool() for graph, _, _ in self.recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool):
            result = self.function(static)
        self.recorded[shapes] = graph, static, result


def inference(task: nn.Module, function: Callable) -> Recorder:
    """`compute` of a function of the task without gradients, to be called on the tensors of many batches.

    The weights stay as they are meanwhile: what the encoder makes of them alone it need not make for each batch.
    """
    kept: dict = {}  # recordings read what is in it, so nothing leaves it before they do

    def run(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        task.encoder.kept = kept
        try:
            with torch.no_grad():
                return compute(task, tensors, function)
        finally:
            task.encoder.kept = None

    return Recorder(run, task)


class Stepper:
    """Optimizer steps: `Stepper(...)(batch)` takes one and returns the detached sums over its pieces and all ranks.

    A step whose loss or gradient is not finite changes nothing, and its summed loss is returned as NaN.

    Args:
        accumulate: cut each batch into so many pieces; the gradients are the same sums, and travel once a step.
        graphs: record steps (`Recorder`). Not of several processes, whose batches are large and whose gradients travel
            while others are being computed.
    """

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int = 1, graphs: bool = False):
        self.task, self.optimizer, self.accumulate = task, optimizer, accumulate
        self.device, self.ordered = next(task.parameters()).device, world() == 1
        self.recorder = Recorder(lambda tensors: self.step([tensors]), task, graphs and accumulate == 1 and world() == 1)
        if self.recorder.wanted:
            for group in optimizer.param_groups:
                group["capturable"] = True
        self.sums = Sums(task)
        if world() > 1:
            torch._dynamo.config.optimize_ddp = False  # it would cut the layers, which are compiled as they are
            # (100 MB a bucket, not DDP's 25: half a percent more tokens a second on two H200)
            self.sums = DistributedDataParallel(self.sums, gradient_as_bucket_view=True, bucket_cap_mb=100)

    def __call__(self, batch: Batch) -> torch.Tensor:
        coupled = self.task.coupled
        if coupled:
            self.task.pieces = self.accumulate
        pieces = [self.task.prepare(piece) for piece in ([batch] if coupled else batch.pieces(self.accumulate))]
        count = summed(torch.tensor(sum(count for _, count in pieces))).item()
        return self.take([tensors for tensors, _ in pieces], count)

    def take(self, pieces: list[dict[str, torch.Tensor]], count: int) -> torch.Tensor:
        """A step on what `task.prepare` made of the pieces, which count `count` over all ranks."""
        share = torch.tensor(world() / max(1, count))  # of the summed loss in the mean one, of which ranks take means
        pieces = [tensors | {"share": share} for tensors in pieces]
        return self.recorder(pieces[0]) if len(pieces) == 1 else self.step(pieces)

    def step(self, pieces: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Backward through each piece, then one update; the sums (3,) over all pieces and ranks."""
        self.optimizer.zero_grad(set_to_none=True)  # a recording that failed may have left some
        if not self.ordered:
            # after its first pass DDP orders its buckets anew, and with them the sums of more than two ranks:
            # done before the first step, a resumed run computes the very same
            self.ordered = True
            with torch.random.fork_rng([self.device] * (self.device.type == "cuda")):
                self.backward(pieces)
            self.optimizer.zero_grad(set_to_none=True)
        total = summed(self.backward(pieces))
        parameters = list(self.task.parameters())
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
        """Add up the gradients of all pieces and ranks; the sums (3,) over the pieces of this rank."""
        total = 0
        for i, tensors in enumerate(pieces, 1):
            with self.sums.no_sync() if world() > 1 and i < len(pieces) else nullcontext():
                sums = self.sums({name: tensor for name, tensor in tensors.items() if name != "share"})
                (sums[0] * to_device(tensors["share"], sums.device)).backward()
            total = total + sums.detach()
        return total


# ---- files ------------------------------------------------------------------------------------------

def checkpoint(task: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> dict:
    """What `save` writes: plain tensors, numbers and strings."""
    return {"format": FORMAT, "task": task.name, "config": task.encoder.config,
            "tokenizer": task.tokenizer.text, "weights": weights or task.state_dict(),
            **({} if task.name == "mlm" else {"labels": task.labels, "ctx": task.ctx})}


def save(path: str | os.PathLike, task: nn.Module) -> None:
    """Write a checkpoint (configuration, weights, tokenizer, task, labels) that `codessm.load` reads, atomically."""
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


def fits(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless these are dense float tensors of the names and shapes expected.

    They take no more memory than the file that they are from: a few bytes can spell a tensor of any size.
    """
    if tensors.keys() != expected.keys():
        raise ValueError
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.shape != expected[name].shape:
            raise ValueError
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > sum(storages.values()):
        raise ValueError


def unpickle(path: str | os.PathLike) -> object:
    """What `torch.save` wrote, on the CPU; None where that cannot be read. Runs no code of it; raises `Problem`."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:  # a small file could fill the memory; torch compresses nothing
                if sum(part.file_size for part in file.infolist()) > os.path.getsize(path):
                    raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises whatever the bytes lead it to
        return None


def read(path: str | os.PathLike) -> dict:
    """The content of a checkpoint or state file. Raises `Problem`."""
    content = unpickle(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Problem(f"{path} is not a codessm checkpoint, or not a whole one")
    return content


class Output:
    """The files of one run: the checkpoint `path`, `path`.state while it trains, the metrics `path`.jsonl.

    A context: inside it, the run holds a lock on the metrics log, which the kernel releases if the process dies.
    Nothing that was there is touched before `begin`. Raises `Problem` where the run could not write, another
    run is writing, or a file would be overwritten that is no earlier run's, or a finished one's and not `restart`.
    Of several ranks, rank 0 alone reads and writes them: they are on its host.
    """

    def __init__(self, path: str, restart: bool = False):
        self.path, self.state_path, self.log_path, self.restart = path, f"{path}.state", f"{path}.jsonl", restart
        with together():
            if data.rank() == 0:
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
        if data.rank() > 0:
            return
        if os.fstat(self.log.fileno()).st_size == 0:  # it came to nothing
            os.remove(self.log_path)
        self.log.close()

    def resume(self, settings: dict) -> dict | None:
        """The state to go on from, None to start anew; a `Problem` where it has other settings.

        Each rank gets it, but for the best weights, which are rank 0's to keep.
        """
        best: list = [None]

        def rest() -> dict | None:
            state = self.read_state(settings)
            if state:
                best[0], state["best"] = state["best"], bool(state["best"])
            return state

        state = lead(rest)
        if state and state["best"]:
            state["best"] = best[0] or {}
        return state

    def read_state(self, settings: dict) -> dict | None:
        piped = "-" in settings["corpus"].values()
        self.advice = ("it serves as a checkpoint; what was read from a pipe cannot be read again to go on from it"
                       if piped else "the same command goes on from it")
        # a run that torchrun starts again, because a process died, goes on from what it has saved itself
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not os.path.exists(self.state_path) or self.restart and not again:
            if self.restart:
                self.advice = self.advice.replace("the same command", "the same command without --restart")
            return None
        state = read(self.state_path)
        kinds = dict(settings=dict, tokenizer=str, step=int, evaluated=int, tokens=int, log=int, window=list,
                     best=(dict, type(None)), processes=int, skipped=int, failing=int)
        if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()) or "best" not in state \
                or not isinstance(state["settings"].get("corpus"), dict):
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
        if data.rank() > 0:
            return
        self.log.truncate(min(state["log"] if state else 0, os.path.getsize(self.log_path)))
        if not state and os.path.exists(self.state_path):
            os.remove(self.state_path)

    def record(self, **values) -> None:
        """A line in the metrics log; a `Problem` where it cannot be written or a value is not finite."""
        with together():
            if not all(math.isfinite(value) for value in values.values()):
                raise Problem(f"the loss is no longer a number at step {values['step']:,}: try a lower --lr", 1)
            if data.rank() == 0:
                self.write_line(values)

    def write_line(self, values: dict) -> None:
        try:
            line = json.dumps(values).encode() + b"\n"
            if self.log.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Problem(f"could not write {self.log_path}: {error.strerror}. Make room; {self.advice}", 1) from None

    def finish(self, content: dict) -> None:
        """Write the checkpoint, then let the state go."""
        if data.rank() > 0:
            return
        write(self.path, content)
        for path in (self.state_path, f"{self.state_path}.tmp"):
            if os.path.exists(path):
                os.remove(path)


# ---- training ---------------------------------------------------------------------------------------

class Interrupt(Exception):
    """A signal came, and this is a place where it is safe to stop."""


class Signals:
    """Notes SIGINT and SIGTERM inside a `with` block; `check()` raises `Interrupt` once one has come to any rank."""

    def __init__(self):
        self.number = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        if self.number is None and data.rank() == 0:
            os.write(2, b"\nstopping after this step, to save first\n")  # print is not safe in a handler
        self.number = number

    def check(self):
        # (what comes while the ranks are asked is not overwritten: it is for the next time)
        number = summed(torch.tensor(self.number or 0), dist.ReduceOp.MAX).item()
        if number:
            self.number = number
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
    device = next(task.parameters()).device
    # (a GPU's kernels read the rate when they run: it is a tensor there, so that recorded ones follow it too)
    lr = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))


def cosine(share: float) -> float:
    """The share of the peak learning rate left when `share` of the steps after warm-up are done."""
    return 0.5 * (1 + math.cos(math.pi * share))


def linearly(share: float) -> float:
    """The same, in a straight line to 0."""
    return 1 - share


def warmup(steps: int) -> int:
    return min(300, steps // 10)


def learning_rate(step: int, steps: int, peak: float, decay: Callable[[float], float] = cosine) -> float:
    """Of the step numbered from 0: linear up to `peak` during warm-up, then `decay`."""
    rising = warmup(steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * decay((step - rising) / (steps - rising))


def train(task: nn.Module, batches: Batches, held_out: Batches, output: Output, state: dict | None, *,
          split: Split | None = None, settings: dict, steps: int, lr: float, decay: Callable[[float], float] = cosine,
          accumulate: int = 1, eval_every: int, workers: int = 1, graphs: bool = False) -> dict[str, float]:
    """Train `task` on its device and write `output`; returns the best evaluation's metrics, `task` having its weights.

    Args:
        settings: what a resumed run must share; stored in the state.
        steps, lr, decay: optimizer steps in all, the peak learning rate, and its course after warm-up.
        held_out, split: evaluated before the first step, every `eval_every` steps and at the end; the weights
            with the best score are the ones that are kept.
        state: from `output.resume(settings)`: training goes on where that was saved.
        accumulate, graphs: of `Stepper`.
    Raises `Problem`: with exit code 130 or 143 for a SIGINT or SIGTERM, once the state is saved; with 1 where a
    file cannot be written, the corpus changed, or the loss is no longer finite: in an evaluation, or in `FAILING`
    steps in a row, of which none changes the weights.
    """
    device = next(task.parameters()).device
    optimizer = adamw(task, lr)
    stepper = Stepper(task, optimizer, accumulate, graphs)
    log_every = max(1, min(LOG_STEPS, steps // 10))
    step, evaluated, tokens, window, best = 0, -1, 0, [], None  # best: (metrics, weights), these on rank 0
    skipped = failing = 0  # steps without a loss in all, and in a row at the end of the last window

    def load_state() -> None:
        nonlocal step, evaluated, tokens, skipped, failing, window, best
        try:
            fits(state["weights"], task.state_dict())
            task.load_state_dict(state["weights"])
            for number, parameter in enumerate(itertools.chain(*(g["params"] for g in optimizer.param_groups))):
                moments = state["optimizer"]["state"].get(number)
                if moments:  # there are none yet of a run that has taken no step
                    fits(moments, {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter})
            for group, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
                group.update((name, value) for name, value in own.items() if name != "params")  # this device's
            optimizer.load_state_dict(state["optimizer"])
            step, evaluated, tokens, skipped, failing = (
                int(state[name]) for name in ("step", "evaluated", "tokens", "skipped", "failing"))
            window = [sums.to(device) for sums in state["window"]]
            if not 0 <= step <= steps or any(sums.shape != (3,) for sums in window):
                raise ValueError
            if state["best"] is not False:
                best = state["metrics"], state["best"]
                task.score(best[0])
                if data.rank() == 0:
                    fits(best[1], task.state_dict())
            torch.set_rng_state(state["random"])
            if device.type == "cuda" and "random_cuda" in state:
                torch.cuda.set_rng_state(state["random_cuda"], device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise Problem(f"{output.state_path} does not fit this run: --restart discards it") from None

    if state:
        with together():
            load_state()
    output.begin(state)
    if state:
        by = f", by {state['processes']} processes, where now there are {world()}" * (state["processes"] != world())
        state.clear()  # the caller's too: it is several times the size of the model
        say(f"going on from step {step:,} of {steps:,}, saved in {output.state_path}{by}")

    def save_state() -> None:
        if data.rank() > 0:
            return
        os.fsync(output.log.fileno())
        content = checkpoint(task) | {
            "settings": settings, "best": best and best[1], "metrics": best and best[0], "step": step,
            "optimizer": optimizer.state_dict(), "evaluated": evaluated, "tokens": tokens, "skipped": skipped,
            "failing": failing, "window": [sums.cpu() for sums in window], "log": os.fstat(output.log.fileno()).st_size,
            "random": torch.get_rng_state(), "processes": world()}
        if device.type == "cuda":
            content["random_cuda"] = torch.cuda.get_rng_state(device)
        write(output.state_path, content)

    @contextmanager
    def saving_state() -> Iterator[None]:
        """Around reading: a file that changed ends the run, not what it has learned."""
        try:
            yield
        except Problem:
            with together():
                save_state()
            raise

    def log() -> None:
        """Record the steps of a full window, once a batch is there to go on with: a GPU would wait for it meanwhile."""
        nonlocal skipped, failing, window
        if not window or step % log_every and step != steps:
            return
        sums = torch.stack(window).double().cpu()
        bad = ~sums[:, 0].isfinite()
        runs = list(itertools.accumulate(bad.tolist(), lambda run, is_bad: (run + 1) * is_bad, initial=failing))
        skipped, failing, window = skipped + int(bad.sum()), runs[-1], []
        loss, correct, count = sums[~bad].sum(0).tolist()
        output.record(step=step, epoch=round(step / len(batches), 4), lr=learning_rate(step - 1, steps, lr, decay),
                      tokens=tokens, **(dict(loss=loss / count, accuracy=correct / count) if count else {}),
                      **(dict(skipped=skipped) if skipped else {}))
        if bad.any():
            say(f"up to step {step:,}, {skipped:,} steps were skipped: their loss was no number")
        if max(runs) >= FAILING:
            failing = 0  # the same command tries again
            with together():
                save_state()
                raise Problem(f"the loss was no number in {max(runs)} steps in a row, up to step {step:,}: try a lower "
                              f"--lr. {output.state_path} has the weights from before, and serves as a checkpoint", 1)

    saved, saving, started, tokens_before = time.monotonic(), 0.0, time.monotonic(), tokens
    shown = 0.0
    with (closing(batches.stream(step, steps, workers)) as stream, Signals() as signals,
          progress(total=steps, initial=step, desc="training", unit="step", unit_scale=False, delay=0) as bar):
        try:
            while True:
                if (step % eval_every == 0 or step == steps) and evaluated < step:
                    log()
                    paused = time.monotonic()
                    with saving_state():
                        metrics, _ = evaluate(task, held_out, split, workers, signals.watch)
                    started += time.monotonic() - paused
                    evaluated = step
                    output.record(step=step, **{f"valid_{name}": value for name, value in metrics.items()})
                    # not what has learned nothing; of equals the one that has learned longest
                    if step and (best is None or task.score(metrics) >= task.score(best[0])):
                        weights = task.state_dict() if data.rank() == 0 else {}
                        best = metrics, {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}
                if step == steps:
                    break
                task.train()
                with saving_state():
                    batch = next(stream)
                log()
                rate = learning_rate(step, steps, lr, decay)
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
                if world() > 1:  # dropout is not the same on all ranks, and is after a restart what it was
                    own = np.random.SeedSequence([settings["seed"], data.rank(), step])
                    torch.manual_seed(int(own.generate_state(1)[0]))
                window.append(stepper(batch))
                step += 1
                tokens += sum(batch.tokens[:1] if isinstance(task, Tagging) else batch.tokens)
                bar.update()

                now = time.monotonic()
                if now - shown > 1 and not bar.disable:
                    shown = now
                    loss, correct, count = window[-1][:3].tolist()
                    bar.set_postfix_str(f"loss {loss / max(count, 1):.3f}, accuracy {correct / max(count, 1):.1%}, "
                                        f"{(tokens - tokens_before) / (now - started):,.0f} tokens/s", False)
                signals.check()
                # at the end of an epoch too, unless epochs are so short that saving would take a 20th of the time
                if now - saved > (20 * saving if step % len(batches) == 0 else max(SAVE_SECONDS, 20 * saving)):
                    save_state()
                    saved = time.monotonic()
                    saving = saved - now
            with together():
                output.finish(checkpoint(task, best[1]))
        except Interrupt:
            with together():
                save_state()
                raise Problem(f"interrupted at step {step:,} of {steps:,}: the state is saved in {output.state_path}; "
                              f"{output.advice if data.rank() == 0 else ''}", 128 + signals.number) from None
    if data.rank() == 0:
        task.load_state_dict(best[1])
    if world() > 1:
        for weight in task.state_dict().values():
            dist.broadcast(weight, 0)
    return best[0]
