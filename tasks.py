"""Objectives and their metrics, the one loop that trains them, and the files that a run writes.

An `Objective` is an encoder with a head. Any encoder will do that maps ids (B, L) and lengths (B,) to hidden states
(B, L, d), and has `config` (a dict with `d` and `vocab`), `embedding`, `kernels`, `compile_parts()` and
`same_layers()`. `lengths` is None where every token is real.
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
import pickletools
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint as recompute

import data
from data import (IGNORE, TASKS, Batch, Batches, Example, Problem, Split, Tokenizer, all_gather, broadcast, info,
                  progress, rank, world_size)

FORMAT = "codessm 1"
WEIGHT_DECAY = 0.01
CLIP = 1.0  # the largest norm of the gradient
SAVE_SECONDS = 300
LOG_STEPS = 50
COMPILE_SECONDS = 15  # per length
# seconds per token, layer and channel of a recorded training step; on an H200 8,192 tokens of codessm-hybrid take 22 ms
# in place of 34 (base), 5.3 in place of 9.3 (small)
COMPILED_SAVES = 1.3e-10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a run once it has saved
LONGEST = 2 ** 24  # tokens of a text that is read whole
PIECE_TOKENS = 2 ** 16  # that are encoded at a time, unless a single text has more
BATCH_PROGRESS = dict(unit=" batches", unit_scale=False, leave=False)
FAILING = 20  # steps in a row without a finite loss, after which a run ends


# ---- objectives -------------------------------------------------------------------------------------

def initialise(layer: nn.Linear, d: int) -> nn.Linear:
    """Draw weights from N(0, 0.64 / sqrt(d)), which is BiGS's 0.02 at d = 1,024, and set biases to 0."""
    nn.init.normal_(layer.weight, std=0.64 / math.sqrt(d))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Objective(nn.Module):
    """An encoder with a head, for one task.

    Args:
        name: a task of `data.TASKS`.
        labels: the names of its classes.
        ctx: tokens per sample.
        seed: of the random choices that `prepare` makes.
    A subclass defines
        loss(**tensors)                     float32 (3,): summed loss in nats, correct predictions, predictions
        outputs(batches, split)             predictions for the examples of a split, whose items come in `batches`
        metrics(outputs, split)             a dict of floats
        results(outputs, split)             a dict per example, for `predict`
        format_predictions(outputs, split)  the lines of a predictions file, as CodeXGLUE's evaluators read them
    """
    fields = ("ids", "lengths", "ids2", "lengths2", "labels")  # the fields of a batch that `loss` takes
    coupled = False  # the rows of a batch depend on each other, so that it cannot be cut into pieces
    schedule = "linear"  # of the learning rate after warm-up
    fixed_shapes = True  # batches of one shape become tensors of one shape, so that steps can be recorded
    compiled = False

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str, labels: Iterable[str] = (), ctx: int = 256,
                 seed: int = 0):
        super().__init__()
        self.encoder, self.tokenizer, self.name, self.labels = encoder, tokenizer, name, list(labels)
        self.ctx, self.seed, self.kind = ctx, seed, TASKS[name].kind
        self.register_parameter("pooling", None)

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The tensors of a batch that `loss` takes, on the CPU."""
        return to_tensors({name: getattr(batch, name) for name in self.fields})

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """`loss` of these tensors, computed as `compute` does."""
        return compute(self, self.loss, tensors)

    def pool(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Attention pooling of the hidden states x of ids (B, L) over each row's real tokens: (B, d) float32.

        It is sum_i p_i x_i with p = softmax_i(w . LayerNorm(x_i)), where w (d,) is `pooling`; without one, or at its
        start of 0, it is the mean. A row without a real token gives 0.
        """
        return self.pool_states(self.encoder(ids, lengths), lengths)

    def pool_states(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """`pool` of hidden states (B, L, d)."""
        hidden = hidden.float()
        scores = hidden.new_zeros(hidden.shape[:2])
        if self.pooling is not None:
            scores = (layer_norm(hidden, hidden.shape[-1:]) * self.pooling).sum(-1)
        if lengths is not None:
            real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            hidden, scores = hidden.where(real[..., None], 0), scores.where(real, torch.finfo(scores.dtype).min)
        return (hidden * scores.softmax(1)[..., None]).sum(1)

    def score(self, metrics: dict[str, float]) -> float:
        """Higher is better: a run keeps the weights of the evaluation with the highest score."""
        return metrics[TASKS[self.name].metric]

    def format_metrics(self, metrics: dict[str, float]) -> str:
        """Metrics for a sentence, the task's own first."""
        names = sorted(metrics, key=lambda name: name != TASKS[self.name].metric)
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)

    def frozen(self) -> "Objective":
        """A copy in evaluation mode that shares the weights and is valid until they change.

        It rounds the encoder's linear maps once, to what autocast would round them to in each batch, and makes kernels
        once per length. A frozen objective is its own copy.
        """
        if self.encoder.kernel_cache is not None:
            return self
        device = next(self.parameters()).device
        shared = {id(value): value for value in (*self.parameters(), *self.buffers(), self.tokenizer)}
        if bf16(device):
            shared |= {id(module.weight): nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
                       for module in self.encoder.modules() if isinstance(module, nn.Linear)}
        frozen = copy.deepcopy(self, memo=shared)
        frozen.encoder.kernel_cache = {}
        if self.compiled:
            frozen.compile_parts()
        return frozen.eval()

    def compile_parts(self) -> None:
        self.compiled = True
        self.encoder.compile_parts()

    def in_batches(self, examples: list[Example], kind: str, batch: int, ctx: int | None, desc: str
                   ) -> tuple[Iterable[Batch], Split]:
        """Batches of the distinct items of examples, each whole or as far as `ctx` tokens, with a progress bar."""
        dataset = data.Unlabelled(examples, kind)
        ctx = min(size for size in (ctx, self.encoder.max_length, LONGEST) if size)
        store = data.tokenise(dataset, self.tokenizer, ctx, dataset.splits["test"].items())
        split = dataset.splits["test"]  # of a tagger only now, as windows of its texts
        items = split.items()[:, None]
        batches = Batches(store, self.tokenizer, ctx, items, max(1, min(batch, len(items))))
        return progress(batches, desc=desc, **BATCH_PROGRESS), split

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 32, ctx: int | None = None) -> np.ndarray:
        """The pooled, normalised hidden states of texts, (n, d) float32, in their order.

        `batch` texts are read at a time, each whole or as far as `ctx` tokens; the result does not depend on `batch`
        (but for codef).
        """
        if isinstance(texts, str):
            raise Problem("encode takes a list of texts, not one text")
        if not len(texts):
            return np.empty((0, self.encoder.config["d"]), np.float32)
        model = self.frozen()
        examples = [Example((text,), None, {}) for text in texts]
        batches, split = self.in_batches(examples, "classify", batch, ctx, "encoding")
        pieces = (piece for some in batches for piece in some.pieces(-(-some.ids.size // PIECE_TOKENS), trim=True))
        return normalize(embed(model, pieces, split.items()), dim=-1).cpu().numpy()

    @torch.no_grad()
    def predict(self, texts: Sequence[str | tuple[str, str] | list[str] | Example], batch: int = 32,
                ctx: int | None = None) -> list[dict]:
        """What `codessm predict` says of each text, pair of texts or, for tagging, list of words: `results` as dicts.

        Raises `Problem` if this model was not fine-tuned.
        """
        if not hasattr(self, "results"):
            raise Problem("a pretrained encoder predicts nothing yet: fine-tune it first")
        if isinstance(texts, str):
            raise Problem("predict takes a list of texts, not one text")
        model = self.frozen()
        examples = [text if isinstance(text, Example) else
                    Example((text,) if isinstance(text, str) else text, [data.UNK] * len(text), {}) for text in texts]
        if not examples:
            return []
        texts_each = {"classify": 1, "pair": 2, "retrieval": 2}.get(self.kind)
        if texts_each and any(len(example.texts) != texts_each for example in examples):
            raise Problem(f"a model for {self.name} predicts {'pairs of texts' if texts_each == 2 else 'texts'}")
        batches, split = self.in_batches(examples, self.kind, batch, ctx or self.ctx, "predicting")
        return list(self.results(model.outputs(batches, split), split))

    def fill_mask(self, text: str, k: int = 5) -> list[tuple[str, float]]:
        """What `MLM.fill_mask` says; raises `Problem` in any other model."""
        raise Problem(f"a model for {self.name} fills no masks: load a pretrained one")


def to_tensors(arrays: dict[str, np.ndarray | None]) -> dict[str, Tensor]:
    """Tensors of the arrays that are not None, without lengths if no row is padded: attention is faster unmasked."""
    for ids, lengths in (("ids", "lengths"), ("ids2", "lengths2")):
        if arrays.get(lengths) is not None and arrays[lengths].min() == arrays[ids].shape[1]:
            arrays = arrays | {lengths: None}
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def check_finite(outputs: Tensor) -> Tensor:
    """The outputs of a model. Raises `Problem` unless they are finite: no metric or prediction would show it."""
    if not outputs.isfinite().all():
        raise Problem("the model's outputs are not finite numbers: its training went wrong (a lower --lr with "
                      "--restart may mend it)", 1)
    return outputs


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """(summed cross-entropy, correct, counted), float32, of logits (n, classes) and targets (n,); IGNORE counts not."""
    logits = logits.float()
    loss = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    correct = logits.detach().argmax(-1) == targets
    return torch.stack([loss, correct.sum().float(), (targets != IGNORE).sum().float()])


class MLM(Objective):
    """Masked language modelling (Devlin et al. 2019, section 3.1).

    15 % of the real, ordinary tokens are predicted; of these 80 % are read as <mask>, 10 % as a random
    ordinary token, 10 % as they are. The choice is a hash of (seed, epoch, item, position).
    The head is dense, gelu, LayerNorm, then the tied embedding and a bias, at the chosen positions only.

    In training a weight `bag_of_words` > 0 adds the gradient of that times the mean cross-entropy of the distinct
    ordinary tokens of a sample as it was, under softmax(32 cos(mean hidden state, embedding)) (after Ma et al. 2024,
    arXiv 2401.11248), so that the mean of the hidden states says which words there are. A sample counts as often as it
    has predictions.
    """
    schedule = "cosine"
    bag_of_words = 0.0

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, name: str = "mlm", *args, **options):
        super().__init__(encoder, tokenizer, name, *args, **options)
        d = encoder.config["d"]
        self.dense, self.norm = initialise(nn.Linear(d, d), d), nn.LayerNorm(d, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(encoder.config["vocab"]))

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Corrupted ids (B, L), int32; targets (M,) at the flat `places` (M,), both int64.

        Compiled or on a GPU, M depends on B and L alone: the target IGNORE fills up what is chosen.
        """
        B, L = batch.ids.shape
        position, item = np.arange(L)[None], batch.items[:, :1]
        ordinary = (position < batch.lengths[:, None]) & ~np.isin(batch.ids, self.tokenizer.special)
        chosen = ordinary & (data.draw(self.seed, batch.epoch, item, position, data.CHOSEN) < 0.15)
        row, column = chosen.nonzero()
        kind, which = (data.draw(self.seed, batch.epoch, batch.items[row, 0], column, use)
                       for use in (data.KIND, data.WHICH))
        random = self.tokenizer.ordinary[(which * len(self.tokenizer.ordinary)).astype(int)]
        targets, places, ids = batch.ids[row, column].astype(np.int64), row * L + column, batch.ids.copy()
        ids[row, column] = np.where(kind < 0.8, self.tokenizer.mask, np.where(kind < 0.9, random, targets))
        bag = {}
        if self.training and self.bag_of_words:
            bag = dict(words=np.where(ordinary, batch.ids, -1), counts=chosen.sum(1, dtype=np.float32))
        if self.compiled or self.bias.is_cuda:  # batches of one length are compiled, or recorded, once
            # the mean and five standard deviations are enough for all but one of 10^6 batches
            most = 8 * math.ceil((0.15 * B * L + 5 * math.sqrt(0.15 * 0.85 * B * L)) / 8)
            fill = most * max(1, math.ceil(len(row) / most)) - len(row)
            places, targets = np.pad(places, (0, fill)), np.pad(targets, (0, fill), constant_values=IGNORE)
        return to_tensors(dict(ids=ids, lengths=batch.lengths, places=places, targets=targets) | bag)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., vocab) of hidden states (..., d), in their dtype."""
        return linear(self.norm(gelu(self.dense(hidden))), self.encoder.embedding.weight, self.bias)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return loss_of_logits(self.logits(hidden), targets)

    def bag_loss(self, pooled: Tensor, words: Tensor, counts: Tensor) -> Tensor:
        """The weighted loss (1,) of pooled samples (B, d), their ordinary tokens (B, L), else -1, and counts (B,)."""
        logits = 32 * linear(normalize(pooled, dim=-1), normalize(self.encoder.embedding.weight, dim=-1)).float()
        real = (words >= 0).float()
        bag = torch.zeros_like(logits).scatter_add(1, words.clamp(min=0).long(), real).clamp(max=1)
        loss = -(logits.log_softmax(-1) * bag).sum(1) / bag.sum(1).clamp(min=1)
        return self.bag_of_words * (loss * counts).sum(0, keepdim=True)

    def loss(self, ids: Tensor, places: Tensor, targets: Tensor, lengths: Tensor | None = None,
             words: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        hidden = self.encoder(ids, lengths)
        sums = self.head_loss(hidden.flatten(0, 1).index_select(0, places), targets)
        if words is None:
            return sums
        bag = self.bag_loss(self.pool_states(hidden, lengths), words, counts)
        # its gradient, not its value: the loss that a run shows is that of masked tokens
        return torch.cat([sums[:1] + (bag - bag.detach()), sums[1:]])

    @torch.no_grad()
    def fill_mask(self, text: str, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest tokens at the one `<mask>` of a text, and their probabilities, the best first.

        A space before the mask belongs to the token. Raises `Problem` if there is not one `<mask>`.
        """
        parts = text.split("<mask>")
        if len(parts) != 2:
            raise Problem(f"there must be one <mask> in the text, and there are {len(parts) - 1}")
        left, right = self.tokenizer.encode_many([parts[0].removesuffix(" "), parts[1]])
        ids = torch.tensor([[self.tokenizer.start, *left, self.tokenizer.mask, *right, self.tokenizer.end]])
        model, ordinary = self.frozen(), self.tokenizer.ordinary
        logits = compute(model, lambda ids: model.logits(model.encoder(ids)[0, len(left) + 1]), {"ids": ids})
        best = check_finite(logits.float()).cpu()[ordinary].softmax(-1).topk(min(k, len(ordinary)))
        return [(self.tokenizer.model.decode([int(ordinary[i])]), p) for p, i in zip(*map(Tensor.tolist, best))]

    def compile_parts(self) -> None:
        super().compile_parts()
        self.head_loss, self.bag_loss = (torch.compile(part.__get__(self), dynamic=False, fullgraph=True)
                                         for part in (MLM.head_loss, MLM.bag_loss))

    def outputs(self, batches: Iterable[Batch], _split: Split | None = None) -> Tensor:
        """The sums of `loss` over all batches, float64 (3,)."""
        run, total = Recorder(self, self), torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            total += run(self.prepare(batch)).cpu().double()
        return check_finite(all_reduce(total))

    def metrics(self, outputs: Tensor, _split: Split | None = None) -> dict[str, float]:
        """Loss in nats per predicted token, accuracy, perplexity = exp(loss). Raises `Problem` if none is predicted."""
        loss, correct, count = outputs.tolist()
        if not count:
            raise Problem("there is nothing to predict in what is evaluated: give more of it")
        return {"loss": loss / count, "accuracy": correct / count, "perplexity": math.exp(min(700, loss / count))}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["loss"]

    def format_metrics(self, metrics: dict[str, float]) -> str:
        return "loss {loss:.3f}, accuracy {accuracy:.1%}, perplexity {perplexity:.1f}".format(**metrics)


def embed(objective: Objective, batches: Iterable[Batch], items: np.ndarray) -> Tensor:
    """The pooled hidden states of the sorted items (n,): (n, d) float32, on the device, the same on all ranks."""
    table = torch.zeros(len(items), objective.encoder.config["d"], device=next(objective.parameters()).device)
    run = Recorder(objective, partial(compute, objective, objective.pool))
    for batch in batches:
        real = batch.lengths > 0
        rows = run(to_tensors(dict(ids=batch.ids, lengths=batch.lengths)))
        table[np.searchsorted(items, batch.items[real, 0])] = rows[torch.from_numpy(real).to(rows.device)]
    return check_finite(all_reduce(table))  # one rank has filled each row


class Classification(Objective):
    """A label for a function, or for a pair of functions.

    logits = head(x), where x is the pooled code (d), or [a + b, |a - b|, a * b] (3d) of a pair, which is the
    same for (b, a). The head is dense, tanh, linear. The second of a pair's two labels means "alike".
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        d, self.pairs = self.encoder.config["d"], self.kind == "pair"
        self.pooling = nn.Parameter(torch.zeros(d))
        self.head = nn.Sequential(initialise(nn.Linear(3 * d if self.pairs else d, d), d), nn.Tanh(),
                                  initialise(nn.Linear(d, len(self.labels)), d))

    def logits(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """(B, classes) of pooled functions (B, d)."""
        return self.head(a if b is None else torch.cat([a + b, (a - b).abs(), a * b], -1))

    def loss(self, ids: Tensor, labels: Tensor, ids2: Tensor | None = None,
             lengths: Tensor | None = None, lengths2: Tensor | None = None) -> Tensor:
        """`loss_of_logits` of ids (B, L), for pairs also ids2 (B, L2), and labels (B,)."""
        a, b = self.pool(ids, lengths), self.pool(ids2, lengths2) if self.pairs else None
        return loss_of_logits(self.logits(a, b), labels)

    def outputs(self, batches: Iterable[Batch], split: Split) -> np.ndarray:
        """Probabilities (n, classes), float32, of the examples; each distinct function is encoded once."""
        items = split.items()
        table, rows = embed(self, batches, items), torch.from_numpy(np.searchsorted(items, split.examples))
        found = [self.logits(*(table[side] for side in part.T.to(table.device))).softmax(-1).cpu()
                 for part in rows.split(4096)]
        return check_finite(torch.cat(found)).numpy()

    def metrics(self, outputs: np.ndarray, split: Split) -> dict[str, float]:
        """Accuracy; macro and weighted averages; for two classes also F1, precision and recall of the second."""
        gold, predicted = split.labels, outputs.argmax(1)
        metrics = {"accuracy": float((gold == predicted).mean())}
        for average in ("macro", "weighted", *(["binary"] if len(self.labels) == 2 else [])):
            prefix = "" if average == "binary" else f"{average}_"
            for name, value in zip(("precision", "recall", "f1"), precision_recall_f1(gold, predicted, average)):
                metrics[prefix + name] = value
        return metrics

    def results(self, outputs: np.ndarray, _split: Split) -> Iterator[dict]:
        """The label and the probability of each label; for a pair the probability of label 1, its score."""
        numbers = all(label.isdecimal() and str(int(label)) == label for label in self.labels)
        for row in outputs.tolist():
            label = self.labels[int(np.argmax(row))]
            found = {"prediction": int(label) if numbers else label}
            yield found | ({"score": row[1]} if self.pairs else {"probabilities": dict(zip(self.labels, row))})

    def format_predictions(self, outputs: np.ndarray, split: Split) -> Iterator[str]:
        """idx, tab, label; for a pair idx1, tab, idx2, tab, label."""
        for name, best in zip(split.names, outputs.argmax(1)):
            names = name if isinstance(name, tuple) else [name]
            yield "\t".join(" ".join(str(name).split()) for name in [*names, self.labels[best]])


class Gather(torch.autograd.Function):
    """The rows (B, ...) of all ranks, in their order, (W B, ...). Gradients come from the losses of all ranks."""

    @staticmethod
    def forward(_ctx, rows: Tensor) -> Tensor:
        if world_size() == 1:
            return rows.view_as(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.contiguous()).chunk(world_size())[rank()]


class Retrieval(Objective):
    """Code for a text: a bi-encoder with in-batch negatives and a learned temperature.

        q, c = pool(text), pool(code), normalised     logits = q c^T exp(s)     s from log(1 / 0.07) to at most log 100

    The loss is the cross-entropy of each text over the codes of the batch on all ranks, as in InfoNCE (van den Oord et
    al. 2018). A code that is the same item as a text's own, or that belongs to an equal text, is no negative. As the
    rows of a batch depend on each other, only the encoding is cut into pieces, each of which is encoded again for its
    gradients: into --accumulate pieces, of at most `MOST_TOKENS` tokens.
    """
    MOST_TOKENS = 2 ** 15
    fields = ("ids", "lengths", "ids2", "lengths2", "items")
    coupled, pieces = True, 1

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pooling = nn.Parameter(torch.zeros(self.encoder.config["d"]))

    def vectors(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Normalised (B, d)."""
        B, L = ids.shape
        rows = min(-(-B // self.pieces), max(1, self.MOST_TOKENS // L))
        if rows == B:
            return normalize(self.pool(ids, lengths), dim=-1)
        pieces = zip(*(side.split(rows) for side in (ids, lengths) if side is not None))
        return normalize(torch.cat([recompute(self.pool, *piece, use_reentrant=False) for piece in pieces]), dim=-1)

    def loss(self, ids: Tensor, ids2: Tensor, items: Tensor, lengths: Tensor | None = None,
             lengths2: Tensor | None = None) -> Tensor:
        """`loss_of_logits` of texts and codes (B, L) and their items (B, 2), -1 in rows that only fill up."""
        q, c = self.vectors(ids, lengths), Gather.apply(self.vectors(ids2, lengths2))
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ c.T * self.scale.clamp(max=math.log(100)).exp()
        own = torch.arange(len(q), device=q.device) + rank() * len(q)
        texts, codes = Gather.apply(items).T
        same = (items[:, :1] == texts) | (items[:, 1:] == codes) | (codes < 0)
        logits = logits.masked_fill(same & (own[:, None] != torch.arange(len(c), device=q.device)), -math.inf)
        return loss_of_logits(logits, torch.where(items[:, 0] < 0, IGNORE, own))

    def outputs(self, batches: Iterable[Batch], split: Split) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """The rank, from 1, of each query's best right candidate (Q,), and its best 100 candidates (Q, 100).

        For a split without candidates the cosine of each text and code, (n,).
        """
        items = split.items()
        table = normalize(embed(self, batches, items), dim=-1)
        if split.candidates is None:
            text, code = table[np.searchsorted(items, split.examples.T)]
            return (text * code).sum(-1).cpu().numpy()
        queries, candidates = (table[np.searchsorted(items, some)] for some in (split.queries, split.candidates))
        return rank_candidates(queries, candidates, *split.right.T)

    def metrics(self, outputs: tuple[np.ndarray, np.ndarray], _split: Split) -> dict[str, float]:
        """MRR = mean of 1 / rank; recall@k = share of queries with rank <= k."""
        ranks = outputs[0]
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

    Logits are computed at labelled words only. Label 0 is UNK: predicting it is always wrong.
    """
    fields = ("ids", "lengths", "places", "targets")
    fixed_shapes = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        d = self.encoder.config["d"]
        self.head = initialise(nn.Linear(d, len(self.labels)), d)

    def hidden(self, ids: Tensor, places: Tensor, lengths: Tensor | None) -> Tensor:
        return self.encoder(ids, lengths).flatten(0, 1).index_select(0, places)

    def loss(self, ids: Tensor, places: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`loss_of_logits` of ids (B, L) and the label numbers (M,) at the flat places (M,)."""
        return loss_of_logits(self.head(self.hidden(ids, places, lengths)), targets)

    def best_labels(self, ids: Tensor, places: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The numbers (M,) of the best labels."""
        # logits of 1,024 words at a time: `predict` asks for every word, of up to 50,000 types
        parts = self.hidden(ids, places, lengths).split(1024)
        return torch.cat([check_finite(self.head(part)).argmax(-1) for part in parts])

    def outputs(self, batches: Iterable[Batch], split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
        """(gold, predicted) label numbers of the labelled words of each window, in the order of the windows."""
        windows = {}
        for batch in batches:
            predicted = compute(self, self.best_labels, self.prepare(batch)).cpu().numpy()
            ends = np.searchsorted(batch.places, np.arange(1, len(batch.ids)) * batch.ids.shape[1])
            sides = np.split(batch.targets, ends), np.split(predicted, ends)
            windows |= zip(batch.items[:, 0].tolist(), zip(*sides))
        windows = {number: sides for part in all_gather(windows) for number, sides in part.items()}
        return [windows[number] for number in split.examples[:, 0].tolist()]

    def metrics(self, outputs: list[tuple[np.ndarray, np.ndarray]], _split: Split) -> dict[str, float]:
        """Accuracy (= micro F1), weighted F1 and F1 as published, and for typeinf the same for the top 100 types.

        A gold UNK stays in the denominator. Top-100 words are those whose gold label is in rows 2 to 101 of
        the vocabulary (0 is UNK, 1 is any).
        """
        names, metrics = [*self.labels, "\0\0"], {}  # the last name, of label -1, equals no type
        rows = {"": (0, len(self.labels))} | ({"top100_": (2, 102)} if self.name == "typeinf" else {})
        for prefix, (first, end) in rows.items():
            windows = [(gold[own], np.where(predicted == 0, -1, predicted)[own]) for gold, predicted in outputs
                       for own in [(gold >= first) & (gold < end)]]
            gold, predicted = (np.concatenate(side) for side in zip(*windows))
            if not len(gold):
                continue
            metrics[prefix + "accuracy"] = float((gold == predicted).mean())
            metrics[prefix + "weighted_f1"] = precision_recall_f1(gold, predicted, "weighted")[2]
            metrics[prefix + "f1_published"] = f1_published(*([[names[i] for i in window] for window in side]
                                                              for side in zip(*windows)))
        return metrics

    def results(self, outputs: list[tuple[np.ndarray, np.ndarray]], split: Split) -> Iterator[dict]:
        """The tags of a file's words; the windows of a file follow each other."""
        for _, windows in itertools.groupby(zip(split.names, outputs), key=lambda window: window[0]):
            yield {"predictions": [self.labels[i] for _, (_, predicted) in windows for i in predicted]}

    def format_predictions(self, outputs: list[tuple[np.ndarray, np.ndarray]], _split: Split) -> Iterator[str]:
        """The number of the labelled word, tab, its type."""
        for number, label in enumerate(itertools.chain(*(predicted for _, predicted in outputs))):
            yield f"{number}\t{self.labels[label]}"


OBJECTIVES = {"mlm": MLM, "retrieval": Retrieval, "classify": Classification, "pair": Classification, "tag": Tagging}


def evaluate(objective: Objective, batches: Batches, split: Split, watch: Callable[[Iterable], Iterable] = iter,
             compiled: bool | None = None) -> tuple[dict[str, float], object]:
    """(metrics, outputs) of an objective on a split whose items come in `batches`: the same on all ranks.

    Each rank computes its share. `watch` wraps the batches and may raise to stop. A compiled objective runs compiled
    code if `compiled`, or where that is None if compiling pays for so few batches.
    """
    if compiled is None:
        compiled = objective.compiled and compiling_pays(objective, batches)
    frozen = objective.frozen()
    with torch.no_grad(), torch.compiler.set_stance("default" if compiled else "force_eager"):
        outputs = frozen.outputs(watch(progress(batches, desc="evaluating", **BATCH_PROGRESS)), split)
    return broadcast(frozen.metrics(outputs, split) if rank() == 0 else None), outputs


# ---- metrics ----------------------------------------------------------------------------------------

def precision_recall_f1(gold: np.ndarray, predicted: np.ndarray, average: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of integer classes, 0 where a denominator is 0.

    For a class, precision = TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN). "macro" is the mean
    over the classes that occur in gold or predicted, "weighted" the mean weighted by how often each is gold, and
    "binary" the scores of class 1.
    """
    classes, numbers = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    gold, predicted = numbers[:len(gold)], numbers[len(gold):]
    TP, golds, predictions = (np.bincount(x, minlength=len(classes)).astype(float)
                              for x in (gold[gold == predicted], gold, predicted))
    scores = np.array([TP / np.maximum(predictions, 1), TP / np.maximum(golds, 1), 2 * TP / (golds + predictions)])
    if average == "binary":
        return tuple(map(float, scores[:, classes == 1].sum(1)))
    return tuple(map(float, np.average(scores, 1, golds if average == "weighted" else None)))


def f1_published(gold: list[list[str]], predicted: list[list[str]]) -> float:
    """The F1 with which type inference is published: seqeval's micro average, of labels without a B- or I- prefix.

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


# ---- ranking and the index --------------------------------------------------------------------------

SCORES = 2 ** 24  # similarities that are in memory at a time
TIE = 1e-6  # cosines that differ by less are equal: they are sums of float32


def rank_candidates(queries: Tensor, candidates: Tensor, query: np.ndarray, gold: np.ndarray
                    ) -> tuple[np.ndarray, np.ndarray]:
    """The rank, from 1, of each query's best gold candidate, where ties count against it, and the best 100 candidates.

    Candidate `gold[i]` of `candidates` (C, d) is right for query `query[i]` of `queries` (Q, d); i counts n >= Q pairs.
    Returns int64 (Q,) and (Q, min(100, C)). rank = 1 + #{wrong candidates: score > best right score - TIE}.
    """
    ranks, top, chunk = [], [], max(1, SCORES // len(candidates))
    for start in progress(range(0, len(queries), chunk), desc="ranking", leave=False):
        scores = queries[start:start + chunk] @ candidates.T
        own = (query >= start) & (query < start + chunk)
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[query[own] - start, gold[own]] = True
        least = scores.where(right, -math.inf).amax(1, keepdim=True) - TIE
        ranks.append(((scores > least) & ~right).sum(1).cpu() + 1)
        top.append(scores.topk(min(100, len(candidates))).indices.cpu())
    return torch.cat(ranks).numpy(), torch.cat(top).numpy()


class Hit(NamedTuple):
    """An answer of a search."""
    path: str
    first: int  # its first line, from 1
    last: int
    name: str  # of the definition, or ""
    score: float
    word_rank: int | None  # by BM25 alone, from 1; None if it has no word of the query
    vector_rank: int | None  # by cosine alone; None without a model
    code: str


class Index:
    """The units of a source tree, for search: an SQLite file for each tree and model; raises `Problem`.

        files     path, mark (changes with the file), hash of its content
        contents  hash, number of the first unit, count of units, their vectors (count, d) float16, path of the first
                  file that has it; without a path it is not part of the index yet
        units     number, first and last line, name, code
        words     FTS5 table of the words of each unit's path, name and code

    An update reads the files whose marks changed, cuts and encodes those whose content is new, which is kept at once,
    and then makes all of that part of the index in one transaction. One process updates at a time, others may search.
    """
    VERSION = 2  # of this schema, and of what makes units and words
    SCHEMA = """
        CREATE TABLE files (path BLOB PRIMARY KEY, mark TEXT, hash BLOB);
        CREATE TABLE contents (hash BLOB PRIMARY KEY, first INTEGER, count INTEGER, vectors BLOB, path BLOB);
        CREATE INDEX content_of_unit ON contents (first);
        CREATE TABLE units (number INTEGER PRIMARY KEY, first INTEGER, last INTEGER, name TEXT, code TEXT);"""
    WORDS = "CREATE VIRTUAL TABLE words USING fts5 (text, tokenize='porter unicode61');"
    PRAGMAS = "PRAGMA page_size = 32768; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL"
    CHUNK = 2048  # units that are encoded, and kept, at a time

    def __init__(self, paths: Sequence[str], model: Objective | None = None, batch: int = 32):
        self.paths, self.batch = list(paths), batch
        self.model = model and model.frozen()
        self.words = self.WORDS
        try:
            sqlite3.connect(":memory:").execute(self.WORDS)
        except sqlite3.OperationalError:
            self.words = "CREATE TABLE words (text);"
            lacks = "the SQLite of this Python lacks FTS5, so words are not searched"
            if model is None:
                raise Problem(f"{lacks}: give --ckpt, or take another Python") from None
            info(f"{lacks}: the vectors alone answer")
        roots = sorted({data.well_formed(os.path.realpath(path)) for path in self.paths})
        key = data.digest(json.dumps([self.VERSION, self.words, roots, model and fingerprint(model)]))
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "codessm")
        self.top = os.path.dirname(os.path.commonpath(roots))  # words of paths are those below it
        self.path = str(folder / f"{os.path.basename(roots[0])}-{key:016x}.sqlite")
        self.db: sqlite3.Connection | None = None

    def search(self, query: str, k: int = 10, made_anew: bool = False) -> list[Hit]:
        """The best k units for a query, of the tree as it is now; equal files are one. Raises `Problem`."""
        try:
            self.update()
            return self.answer(query, k)
        except sqlite3.Error as error:
            # a lock or a full disk is no fault of the file
            if made_anew or re.search("locked|busy|full|readonly|unable to open|I/O", str(error)):
                raise Problem(f"the index {self.path}: {error}", 1) from None
            info(f"the index {self.path} is damaged or of another program ({error}): it is made anew")
        self.close()
        for ending in ("", "-wal", "-shm"):
            Path(self.path + ending).unlink(missing_ok=True)
        return self.search(query, k, made_anew=True)

    def close(self) -> None:
        if self.db:
            self.db.close()
            self.db = None

    def update(self) -> None:
        """Bring the index up to date with the files; encodes new content alone."""
        files, folder = self.source_files(), os.path.dirname(self.path)  # without source files nothing is written
        try:
            os.makedirs(folder, exist_ok=True)
            lock = open(f"{self.path}.lock", "w")
        except OSError as error:
            raise Problem(f"cannot write the index in {folder}: {error.strerror}; XDG_CACHE_HOME chooses another "
                          "place") from None
        with lock:  # closing the file releases it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                info("waiting for another search, which is updating the index")
                fcntl.flock(lock, fcntl.LOCK_EX)
                files = self.source_files()  # as they are after the wait
            if self.db is None:
                self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
                self.db.executescript(self.PRAGMAS)
                if not self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    self.db.executescript(f"BEGIN; {self.SCHEMA} {self.words} COMMIT")
            before = {path: (mark, content) for path, mark, content in self.db.execute("SELECT * FROM files")}
            now = self.read_files(files, before)
            if now != before:
                self.make_live(now)

    def source_files(self) -> list[str]:
        files = [os.path.abspath(path) for path, _ in data.source_files(self.paths, git=True)]
        if not files:
            raise Problem(f"{data.listed(self.paths)}: no source files")
        return files

    def read_files(self, files: list[str], before: dict[bytes, tuple[str, bytes]]) -> dict[bytes, tuple[str, bytes]]:
        """(mark, hash) of each file, by its path; content that is new is cut, encoded and kept."""
        known = {content for content, in self.db.execute("SELECT hash FROM contents")}
        now, skipped, chunk, started = {}, {}, [], time.time_ns()
        for path in progress(files, desc="indexing", unit=" files"):
            try:
                mark, (old, content) = file_mark(path), before.get(os.fsencode(path), ("", b""))
                if old != mark:
                    content = file_hash(path)
                    # it may change again within the resolution of its times: then the next search reads it too
                    mark = mark if os.stat(path).st_mtime_ns < started - 2 * 10**9 else ""
                    if content not in known:
                        units = data.read_units(path, skipped)
                        if file_hash(path) != content:
                            continue  # it is being written: the next search reads it
                        chunk.append((content, units))
                        known.add(content)
                        if sum(len(units) for _, units in chunk) >= self.CHUNK:
                            self.keep(chunk)
                            chunk = []
                now[os.fsencode(path)] = mark, content
            except OSError as error:
                skipped.setdefault(error.strerror, []).append(path)
        if chunk:
            self.keep(chunk)
        if skipped.keys() - {"empty"}:
            info(f"{len(files):,} source files{data.describe_skipped(skipped)}")
        return now

    def keep(self, chunk: list[tuple[bytes, list[data.Unit]]]) -> None:
        """Write content with its units and vectors, not part of the index yet."""
        units = [unit for _, some in chunk for unit in some]
        vectors = np.empty((len(units), 0), np.float16)
        if self.model:
            vectors = self.model.encode([unit.code for unit in units], self.batch, self.model.ctx).astype(np.float16)
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            first, = self.db.execute("SELECT coalesce(max(number), 0) + 1 FROM units").fetchone()
            self.db.executemany("INSERT INTO units VALUES (?, ?, ?, ?, ?)", (
                (number, *unit[1:]) for number, unit in enumerate(units, first)))
            for content, some in chunk:
                own, vectors = vectors[:len(some)], vectors[len(some):]
                row = content, first, len(some), own.tobytes()
                self.db.execute("INSERT INTO contents VALUES (?, ?, ?, ?, NULL)", row)
                first += len(some)

    def make_live(self, now: dict[bytes, tuple[str, bytes]]) -> None:
        """Let these be the files, in one transaction: what none of them has goes, the words of what is new come in."""
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.execute("DELETE FROM files")
            self.db.executemany("INSERT INTO files VALUES (?, ?, ?)", ((path, *rest) for path, rest in now.items()))
            moved = self.db.execute("""
                WITH own AS (SELECT hash, min(path) AS path FROM files GROUP BY hash)
                SELECT hash, own.path, first, first + count FROM contents LEFT JOIN own USING (hash)
                WHERE contents.path IS NOT own.path OR own.path IS NULL""").fetchall()
            for content, path, *span in progress(moved, desc="indexing words", unit=" files", leave=False):
                self.db.execute("DELETE FROM words WHERE rowid >= ? AND rowid < ?", span)
                if path is None:
                    self.db.execute("DELETE FROM units WHERE number >= ? AND number < ?", span)
                    self.db.execute("DELETE FROM contents WHERE hash = ?", (content,))
                    continue
                units = self.db.execute("SELECT number, name, code FROM units WHERE number >= ? AND number < ?", span)
                below = data.well_formed(os.path.relpath(os.fsdecode(path), self.top))
                self.db.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", [
                    (number, " ".join(data.search_words(f"{below} {name} {name} {name} {code}")))
                    for number, name, code in units])
                self.db.execute("UPDATE contents SET path = ? WHERE hash = ?", (path, content))

    def answer(self, query: str, k: int) -> list[Hit]:
        """The best k units for a query, of the files at the last update."""
        with self.db:
            self.db.execute("BEGIN")  # one state, whatever other processes write
            words = self.word_scores(query)
            units, cosines = (np.flatnonzero(words), None) if self.model is None else self.cosines(query)
            found = words[units]
            scores = found if cosines is None else standardised(cosines) + standardised(found)
            hits = []
            for i in np.argsort(-scores, kind="stable")[:k]:
                path, first, last, name, code = self.db.execute("""
                    SELECT path, units.first, last, name, code FROM units, contents
                    WHERE number = ?1 AND contents.first <= ?1 AND count ORDER BY contents.first DESC LIMIT 1""", (
                        int(units[i]),)).fetchone()
                path = os.fsdecode(path).removeprefix(os.path.join(os.getcwd(), ""))
                word_rank = int((found > found[i]).sum()) + 1 if found[i] else None
                vector_rank = None if cosines is None else int((cosines > cosines[i]).sum()) + 1
                hits.append(Hit(path, first, last, name, float(scores[i]), word_rank, vector_rank, code))
            return hits

    def word_scores(self, query: str) -> np.ndarray:
        """BM25 of each unit, by its number, float64; 0 where no word is found."""
        scores = np.zeros(*self.db.execute("SELECT coalesce(max(number), 0) + 1 FROM units").fetchone())
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys(data.search_words(query)))
        if words and self.words == self.WORDS:
            found = np.fromiter(self.db.execute("SELECT rowid, -bm25(words) FROM words WHERE words MATCH ?", (words,)),
                                np.dtype("i8, f8"))
            scores[found["f0"]] = found["f1"]
        return scores

    def cosines(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of all units, int64 (n,), and their cosines with a query, float32 (n,), in blocks."""
        q = torch.from_numpy(self.model.encode([query], ctx=self.model.ctx)[0])
        units, scores = [], [torch.empty(0)]
        rows = self.db.execute("SELECT first, count, vectors FROM contents WHERE path IS NOT NULL AND count "
                               "ORDER BY first")
        while some := rows.fetchmany(64):  # few enough to stay in the processor's cache
            firsts, counts, blobs = zip(*some)
            vectors = np.frombuffer(bytearray().join(blobs), np.float16)
            scores.append(torch.from_numpy(vectors).view(-1, len(q)).float() @ q)
            units += map(range, firsts, map(sum, zip(firsts, counts)))
        return np.fromiter(itertools.chain(*units), np.int64), torch.cat(scores).numpy()


def standardised(scores: np.ndarray) -> np.ndarray:
    """The scores less their mean, over their standard deviation; 0 if all are equal."""
    return (scores - scores.mean()) / (scores.std() or 1) if len(scores) else scores


def file_mark(path: str) -> str:
    """What changes when a file does."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def file_hash(path: str) -> bytes:
    """A hash of a file's content and its language."""
    return blake2b(Path(path).read_bytes(), digest_size=16, key=str(data.language_of(path)).encode()).digest()


def fingerprint(objective: Objective) -> str:
    """A hash of what a model makes of a text: its weights, tokenizer and ctx."""
    found = blake2b(json.dumps([objective.encoder.config, objective.tokenizer.text, objective.ctx]).encode())
    pooling = [] if objective.pooling is None else [objective.pooling]
    for weight in (*objective.encoder.state_dict().values(), *pooling):
        found.update(weight.detach().float().cpu().contiguous().numpy())
    return found.hexdigest()


# ---- kernel analysis and probes ---------------------------------------------------------------------

FREQUENCIES = 4096  # steps from 0 to half a cycle per token
THIRDS = ("low", "middle", "high")
FILTERS = {(True, False, False): "low-pass", (True, True, False): "low-pass", (False, True, False): "band-pass",
           (False, True, True): "high-pass", (False, False, True): "high-pass", (True, False, True): "band-stop",
           (True, True, True): "all-pass"}  # by the thirds of the spectrum that pass


class Filters(NamedTuple):
    """What k S4D kernels do as filters, in float64. Frequencies are shares of half a cycle per token, from 0 to 1."""
    impulse: np.ndarray    # (k, L): h[0] = K[0] + D, h[l] = K[l]
    magnitude: np.ndarray  # (k, F + 1): |H(f)|, H(f) = sum_l h[l] exp(-i pi f l), at f = 0, 1 / F, ..., 1
    phase: np.ndarray      # (k, F + 1), radians, unwrapped
    peak: np.ndarray       # (k,) the f of the largest magnitude
    centroid: np.ndarray   # (k,) the mean of f, weighted by |H(f)|^2
    bandwidth: np.ndarray  # (k,) the standard deviation of f, weighted likewise
    energy: np.ndarray     # (k, 3) shares of |H(f)|^2 in the thirds of the spectrum: low, middle, high
    memory: np.ndarray     # (k,) the lag, in tokens, up to which 95 % of the energy of h lies
    classes: list[str]     # one of `FILTERS`


@torch.no_grad()
def analyse(ssm: nn.Module, L: int, threshold: float = 0.5) -> Filters:
    """The `Filters` of an S4D module, whose response is cut after L tokens.

    A third of the spectrum passes if its mean magnitude is at least `threshold` times that of the strongest third.
    """
    ssm = copy.deepcopy(ssm).cpu().double()
    h = ssm.kernel(L).reshape(-1, L).numpy()
    h[:, 0] += ssm.D.flatten().numpy()
    F = max(FREQUENCIES, 2 ** math.ceil(math.log2(L)))
    H = np.fft.rfft(h, 2 * F)
    f, magnitude = np.linspace(0, 1, F + 1), np.abs(H)
    power = magnitude ** 2
    power[:, [0, -1]] /= 2  # trapezoidal rule
    power /= power.sum(1, keepdims=True).clip(min=np.finfo(float).tiny)
    centroid = power @ f
    third = np.minimum(np.arange(F + 1) * 3 // F, 2)
    levels = np.stack([magnitude[:, third == i].mean(1) for i in range(3)], 1)
    energy = np.cumsum(h ** 2, 1)
    return Filters(
        h, magnitude, np.unwrap(np.angle(H)), f[magnitude.argmax(1)], centroid,
        np.sqrt((power * (f - centroid[:, None]) ** 2).sum(1)),
        np.stack([power[:, third == i].sum(1) for i in range(3)], 1),
        (energy < 0.95 * energy[:, -1:]).sum(1),
        [FILTERS[tuple(passing)] for passing in (levels >= threshold * levels.max(1, keepdims=True)).tolist()])


def kernel_filters(encoder: nn.Module, L: int, threshold: float = 0.5) -> dict[tuple[int, str], Filters]:
    """The `Filters` by (layer, direction) of all layers that have S4D kernels; layers count from 1."""
    return {(number, direction): analyse(getattr(layer, f"{direction}_ssm"), L, threshold)
            for number, layer in enumerate(encoder.layers, 1) for direction in ("forward", "backward")
            if hasattr(layer, f"{direction}_ssm")}


def filter_shift(before: Filters, after: Filters) -> dict:
    """What moved between two `Filters` of as many kernels, on average over them.

    shift: of the centroid; positive is toward high frequencies, that is toward short range. energy: what the low,
    middle and high third gained. memory: tokens gained. changes: {"low-pass > band-pass": kernels} of those whose
    class changed.
    """
    changes = Counter(f"{a} > {b}" for a, b in zip(before.classes, after.classes) if a != b)
    return dict(shift=float((after.centroid - before.centroid).mean()),
                energy=(after.energy - before.energy).mean(0).tolist(),
                memory=float((after.memory - before.memory).mean()), changes=dict(changes))


class Pairs(NamedTuple):
    """Pairs of tokens, for one relation."""
    states: Tensor       # (layers + 1, n, 2, d) float32, on the CPU
    labels: np.ndarray   # (n,) int64
    control: np.ndarray  # (n,) int64, random for each pair of words (Hewitt and Liang 2019, arXiv 1909.03368)


@torch.no_grad()
def token_states(objective: Objective, function: data.Relations) -> Tensor:
    """Hidden states (layers + 1, tokens, d), float32, before, between and after the layers: means over sub-tokens."""
    tokenizer, device = objective.tokenizer, next(objective.parameters()).device
    encoding = tokenizer.model.encode(function.code, add_special_tokens=False)
    ids, below = torch.tensor([[tokenizer.start, *encoding.ids, tokenizer.end]]), []
    below.append(compute(objective, partial(objective.encoder, below=below), {"ids": ids}))
    spans, (begin, end) = np.array(function.spans), np.array([(-1, -1), *encoding.offsets, (-1, -1)]).T
    mean = torch.from_numpy((begin < spans[:, 1:]) & (end > spans[:, :1])).to(device, torch.float32)
    mean /= mean.sum(1, keepdim=True).clamp(min=1)
    return torch.stack([mean @ hidden[0].float() for hidden in below])


def pairs_of(objective: Objective, functions: list[data.Relations]) -> dict[str, Pairs]:
    """The `Pairs` of each relation that has some."""
    objective, found = objective.frozen(), {}
    for function in progress(functions, desc="encoding", unit=" functions", leave=False):
        states, words = token_states(objective, function), [function.code[begin:end] for begin, end in function.spans]
        for name, pairs in function.pairs.items():
            if pairs:
                *sides, labels = np.array(pairs).T
                control = [data.digest(f"{name}\0{words[i]}\0{words[j]}") % data.RELATIONS[name] for i, j, _ in pairs]
                found.setdefault(name, []).append((states[:, np.stack(sides, 1)].cpu(), labels, control))
    return {name: Pairs(torch.cat(states, 1), np.concatenate(labels), np.concatenate(control))
            for name, (states, labels, control) in ((name, zip(*parts)) for name, parts in found.items())}


def probe(train: Tensor, labels: np.ndarray, test: Tensor, classes: int) -> np.ndarray:
    """The labels (n,) that a linear probe predicts for pairs of hidden states `test` (n, 2, d).

    It is a multinomial logistic regression on [a, b, a * b, |a - b|] of each pair (a, b), standardised over `train`
    (m, 2, d); its loss is the mean cross-entropy plus 0.01 / 2 |W|^2, minimised by L-BFGS.
    """
    x, unseen = (torch.cat([a, b, a * b, (a - b).abs()], -1)
                 for a, b in (part.float().unbind(1) for part in (train, test)))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, unseen, y = (x - mean) / std, (unseen - mean) / std, torch.from_numpy(labels).to(x.device)
    W, b = (torch.zeros(*shape, device=x.device, requires_grad=True) for shape in ((x.shape[1], classes), (classes,)))
    optimizer = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ W + b, y) + 0.01 / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (unseen @ W + b).argmax(1).cpu().numpy()


def probe_layers(objective: Objective, functions: dict[str, list[data.Relations]]) -> dict[str, list[dict]]:
    """For each relation, {"accuracy", "control"} of each layer's hidden states on the test functions.

    Layer 0 is the embedding. Accuracies are shares of as many pairs of each label, so that chance is 1 / labels.
    """
    device, found = next(objective.parameters()).device, {name: [] for name in data.RELATIONS}
    pairs = {split: pairs_of(objective, functions[split]) for split in ("train", "test")}
    jobs = [(layer, name) for layer in range(len(objective.encoder.layers) + 1) for name in data.RELATIONS]
    for layer, name in progress(jobs, desc="probing", unit=" probes", unit_scale=False, leave=False):
        train, test = (pairs[split][name] for split in ("train", "test"))
        states = [some.states[layer].to(device) for some in (train, test)]
        found[name].append({kind: float((probe(states[0], learned, states[1], data.RELATIONS[name]) == right).mean())
                            for kind, learned, right in (("accuracy", train.labels, test.labels),
                                                         ("control", train.control, test.control))})
    return found


# ---- devices, compiling, recording ------------------------------------------------------------------

def compiling_pays(objective: Objective, batches: Batches, steps: int | None = None) -> bool:
    """Whether compiling for the lengths of the batches of so many training steps takes less time than it saves.

    Without `steps` all batches are read once; reading a batch takes a third of a step.
    """
    lengths, config = batches.padded_lengths(steps or len(batches)), objective.encoder.config
    work = (steps or len(batches) / 3) * batches.batch * lengths.sum(1).mean() * config["layers"] * config["d"]
    return work * COMPILED_SAVES > COMPILE_SECONDS * len(np.unique(lengths))


def compile_objective(objective: Objective, wanted: bool | None, batches: Batches | None = None,
                      steps: int | None = None) -> bool:
    """Compile an objective if `wanted`, or where that is None on a GPU, if with `batches` it `compiling_pays`.

    Returns whether it is compiled. Each length and mode is compiled when it first comes. If no compiler works, a line
    on standard error says so.
    """
    device = next(objective.parameters()).device
    if wanted is None:
        wanted = device.type == "cuda" and (batches is None or compiling_pays(objective, batches, steps))
    if not wanted:
        return False
    # the compiler's processes must survive a signal to the process group, or a compilation would wait for them forever
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if device.type == "cuda":
            from torch._inductor.async_compile import AsyncCompile  # slow to import
            AsyncCompile.process_pool()
        torch.compile(lambda x: (x + 1).exp(), dynamic=False)(torch.zeros(8, device=device))
        if device.type == "cpu" and torch.__version__.startswith("2.6."):
            raise RuntimeError("torch 2.6 compiles a wrong gradient of the embedding there")
    except Exception as error:  # or Triton, a C++ compiler or a header is missing
        reason = str(error).strip().splitlines() or [type(error).__name__]
        info(f"no compiler works on {device}, so nothing is compiled ({reason[0][:100]})")
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # beyond these numbers of compilations dynamo would go on uncompiled, with only a warning
    torch._dynamo.config.cache_size_limit, torch._dynamo.config.accumulated_cache_size_limit = 256, 4096
    # Up to torch 2.12 a compiled forward pass goes on with numbers that are rounded for the backward pass alone
    # (pytorch issue 151352). Models learn less for it: codessm-hybrid, small, 67.6 % of masked tokens in place of 72.1.
    torch._inductor.config.emulate_precision_casts = True
    warnings.filterwarnings("ignore", message=".*(TensorFloat32|max_autotune_gemm|Online softmax)")
    objective.compile_parts()
    return True


def bf16(device: torch.device) -> bool:
    """Whether matrix products run in bfloat16 there: on GPUs that have it in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute(objective: Objective, function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
    """`function(**tensors)` on the objective's device, under bf16 autocast where `bf16` is true."""
    device = next(objective.parameters()).device
    tensors = {name: to_device(tensor, device) for name, tensor in tensors.items()}
    # a cache of cast weights would outlive the recording of a CUDA graph
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16(device), cache_enabled=False):
        return function(**tensors)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; it goes to a GPU through pinned memory, so that nothing waits for the copy."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


class Recorder:
    """Calls `function(tensors)`. On a GPU it replays a CUDA graph once tensors of the same shapes came `BEFORE` times.

    Launching the kernels of a small batch one by one takes longer than running them. For a batch of more than
    `MOST_TOKENS` tokens, and beyond `MOST` shapes, the memory of a graph is not worth its time. If a recording fails,
    a line on standard error says so and no more are made.
    """
    BEFORE, MOST, MOST_TOKENS = 2, 64, 16_384

    def __init__(self, objective: Objective, function: Callable[[dict[str, Tensor]], Tensor], enabled: bool = True,
                 stream: torch.cuda.Stream | None = None):
        self.function, self.device, self.stream = function, next(objective.parameters()).device, stream
        self.enabled = enabled and self.device.type == "cuda" and objective.fixed_shapes
        self.seen = Counter()  # by the shapes of the tensors
        self.recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        tokens = sum(tensors[name].numel() for name in ("ids", "ids2") if name in tensors)
        if not self.enabled or tokens > self.MOST_TOKENS:
            return self.function(tensors)
        shapes = tuple((name, tensor.shape) for name, tensor in tensors.items())
        if shapes not in self.recorded:
            self.seen[shapes] += 1
            if self.seen[shapes] <= self.BEFORE or len(self.recorded) == self.MOST:
                return self.function(tensors)
            try:
                self.record(shapes, tensors)
            except RuntimeError as error:
                self.enabled = False
                self.recorded.clear()  # and the memory of the graphs
                info(f"a batch could not be recorded as a CUDA graph ({str(error).splitlines()[0][:100]}): "
                     "the run goes on without")
                return self.function(tensors)
        graph, static, result = self.recorded[shapes]
        for name, tensor in tensors.items():
            static[name].copy_(to_device(tensor, self.device))
        graph.replay()
        return result.clone()

    def record(self, shapes: tuple, tensors: dict[str, Tensor]) -> None:
        static = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}
        # graphs share their memory, as each is done with it before another is replayed
        memory = next((graph.pool() for graph, _, _ in self.recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, memory, self.stream):
            result = self.function(static)
        self.recorded[shapes] = graph, static, result


# ---- ranks ------------------------------------------------------------------------------------------

def join_ranks() -> None:
    """Join the processes that `torchrun` (or whatever sets its variables) has started; raises `Problem`."""
    number, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise Problem(f"RANK={number} and WORLD_SIZE={count} name none of several processes: start them with torchrun")
    try:
        with handle_signals(signal.SIG_DFL):  # another handler would wait for the other processes
            store, number, count = next(rendezvous("env://", timeout=timedelta(minutes=30)))
            # torchrun keeps its store when it starts ranks again, and in it the addresses of those that are gone
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", rank=number, world_size=count,
                                    store=store, timeout=timedelta(days=1))  # rank 0 may tokenise for hours
    except (ValueError, RuntimeError) as error:
        raise Problem(f"the {os.environ['WORLD_SIZE']} processes could not reach each other "
                      f"({str(error).splitlines()[0][:200]}): start them with torchrun", 1) from None


def tell_torchrun(message: str) -> None:
    """Let torchrun end its report, which is long, with this sentence."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def leave_ranks(code: int) -> None:
    """End this process, if it is one of several, without Python's shutdown: a thread of gloo at times aborts that."""
    if world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        data.temporary_folder().cleanup()  # which the shutdown would do
        os._exit(code)


def all_reduce(tensor: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """Sum the tensor over all ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def broadcast_state(state: dict | None) -> dict | None:
    """Rank 0's state, on every rank. Its tensors are not pickled, which would take several times their memory."""
    if world_size() == 1:
        return state

    def send(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous() if rank() == 0 else torch.empty_like(tensor, device="cpu")
        dist.broadcast(tensor, 0)
        return tensor

    shapes = broadcast(tree_map_only(Tensor, lambda tensor: tensor.to("meta"), state))
    return tree_map_only(Tensor, send, state if rank() == 0 else shapes)


def explain(error: BaseException) -> Problem:
    """A sentence and an exit code for whatever went wrong."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Problem("interrupted", 128 + (error.args[0] if error.args else signal.SIGINT))
    if isinstance(error, OSError):
        return Problem(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 1)
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return Problem("out of memory: use a smaller --batch, --ctx or --size, or a larger --accumulate", 1)
    lines = [line for line in text.splitlines() if line.strip() and not line.endswith("raised:")]
    said = lines[0].strip()[:200] if lines else type(error).__name__
    if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # inductor's too
        return Problem(f"the compiler failed ({said}): --no-compile does without it", 1)
    if world_size() > 1 and (isinstance(error, dist.DistError) or any(
            sign in text for sign in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL"))):
        return Problem("another of the processes ended, which ends this one too", 1)
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {os.path.basename(frame[0].filename)}:{frame[0].lineno}" if frame else ""
    return Problem(f"{type(error).__name__}{where}: {said}", 1)


@contextmanager
def handle_signals(handler: Callable | signal.Handlers) -> Iterator[None]:
    """In a `with` block `handler` handles `SIGNALS`, but for those that are ignored, as SIGHUP is by nohup."""
    before = {number: signal.signal(number, handler) for number in SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Signals:
    """Notes signals (`handle_signals(signals.note)`), so that they take effect at the next `check()`."""
    number = 0  # of the last one

    def note(self, number, _frame):
        first, self.number = not self.number, number
        if first and rank() == 0:
            with suppress(OSError):
                os.write(2, b"\nstopping after this step, to save first\n")  # print is not safe in a handler

    def check(self):
        """Raise KeyboardInterrupt with the signal's number, on all ranks, if one came to any."""
        number = int(all_reduce(torch.tensor(self.number), dist.ReduceOp.MAX))
        if number:
            raise KeyboardInterrupt(number)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.check()
            yield batch


# ---- checkpoints and --init -------------------------------------------------------------------------

def checkpoint(objective: Objective) -> dict:
    """The content of a checkpoint: plain tensors, numbers and strings."""
    return {"format": FORMAT, "task": objective.name, "config": objective.encoder.config,
            "tokenizer": objective.tokenizer.text, "weights": objective.state_dict(), "labels": objective.labels,
            "ctx": objective.ctx}


def save(path: str | os.PathLike, objective: Objective) -> None:
    """Write a checkpoint that `codessm.load` reads, as a whole or not at all. Raises `Problem`."""
    write(path, checkpoint(objective))


def write(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint or a state; raises `Problem` and leaves an old file whole if that fails."""
    with data.atomic(path) as file:
        torch.save(content, file)


# what tensors, numbers and strings are made of in a pickle; the rest of what torch allows could fill the memory
PLAIN = re.compile(r"collections OrderedDict|torch Size|torch \w+Storage|torch\.storage UntypedStorage|torch\._utils "
                   r"_rebuild_(tensor(_v2)?|parameter)|torch\.nn\.parameter Parameter")


def unpickle(path: str | os.PathLike) -> object:
    """What `torch.save` wrote, None if damaged; raises `Problem`. Takes no more memory than the file, runs no code."""
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                archive, size = zipfile.ZipFile(file), file.seek(-22, os.SEEK_END) + 22
                parts = archive.infolist()
                # torch compresses nothing, gives no attributes, begins with a part and ends with the directory of all
                if file.read(4) != b"PK\5\6" or min(part.header_offset for part in parts) or any(
                        part.external_attr for part in parts) or sum(part.file_size for part in parts) > size \
                        or archive.testzip():
                    return None
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
            else:
                pickles = [file] * 4  # a number, the format, the system, the content
                file.seek(0)
            others = {argument for part in pickles for opcode, argument, _ in pickletools.genops(part)
                      if "GLOBAL" in opcode.name and not PLAIN.fullmatch(str(argument))}
        if not others:
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or 'not a whole file'}") from None
    except Exception:  # zipfile, pickletools and torch raise whatever the bytes lead them to
        return None
    raise Problem(f"{path} holds more than tensors, numbers and strings, which alone are read: {data.listed(others)}")


def read(path: str | os.PathLike) -> dict:
    """The content of a checkpoint or state file. Raises `Problem`."""
    content = unpickle(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Problem(f"{path} is not a codessm checkpoint, or not a whole one")
    return content


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor] | None = None) -> None:
    """Raise ValueError unless these are dense float tensors, with the names and shapes of those expected, if any.

    They must not take more memory than their file: a few bytes can stand for a tensor of any size.
    """
    shapes, wanted = ({name: tensor.shape for name, tensor in some.items()} for some in (tensors, expected or tensors))
    dense = all(tensor.layout == torch.strided and tensor.is_floating_point() for tensor in tensors.values())
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    if shapes != wanted or not dense or sum(tensor.nbytes for tensor in tensors.values()) > sum(storages.values()):
        raise ValueError


def restore(content: dict, path: str | os.PathLike, make_encoder: Callable[..., nn.Module]) -> Objective:
    """The objective in the content of a checkpoint, on the CPU. Raises `Problem`.

    `make_encoder(**config)` makes its encoder; errors name the `path`.
    """
    try:
        tokenizer = Tokenizer(content["tokenizer"], str(path))
        config, weights, task = content["config"], content["weights"], TASKS[content["task"]]
        labels, ctx = content.get("labels") or [], content.get("ctx", task.ctx)
        if not 0 < config["layers"] <= len(weights) or type(ctx) is not int or ctx < 8 or type(labels) is not list \
                or len(set(labels)) < len(labels) or not all(isinstance(label, str) for label in labels):
            raise ValueError
        if tokenizer.vocab > config["vocab"]:
            raise Problem(f"{path}: its tokenizer has {tokenizer.vocab:,} entries and its model {config['vocab']:,}: "
                          "they do not belong together")
        with torch.device("meta"):  # shapes alone: the weights come from the file
            objective = OBJECTIVES[task.kind](make_encoder(**config), tokenizer, content["task"], labels, ctx)
        check_tensors(weights, objective.state_dict())
        objective.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise Problem(f"{path}: its weights do not fit its configuration: it is damaged, or of another version of this "
                      "program (pretrain --init takes what fits)") from None
    return objective


# the names of the BiGS reference implementation (arXiv 2212.10544) for our modules: those of a layer, and the others
BIGS_LAYER = {"LayerNorm": "norm", "dv": "v", "du_forward": "f", "du_backward": "b", "duc_forward": "u1",
              "duc_backward": "u2", "dol": "u", "do": "o", "fs4": "forward_ssm", "fs4.kernel": "forward_ssm",
              "bs4": "backward_ssm", "bs4.kernel": "backward_ssm"}
BIGS_OTHERS = {"embeddings.word_embeddings": "encoder.embedding.", "embeddings.LayerNorm": "encoder.norm.",
               "embeddings.position_embeddings": "encoder.positions.", "embeddings.token_type_embeddings": "types.",
               "cls.predictions.transform.dense": "dense.", "cls.predictions.transform.LayerNorm": "norm.",
               "cls.predictions": "", "cls.predictions.decoder": "decoder."}
BIGS_PARAMETERS = ("weight", "bias", "D", "C", "log_step", "A_re", "A_im")
# heads and buffers that have no counterpart; the decoder's bias is cls.predictions.bias
BIGS_UNUSED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.", "cls.predictions.decoder.bias",
               "classifier.", "qa_outputs.")
NESTS = ("state_dict", "model", "model_state_dict")
BIGS_PREFIX = re.compile(r"^((module|_orig_mod|bigs)\.)+")  # of wrappers, and of the encoder in a larger model


class InitialWeights(NamedTuple):
    """Weights, by our names, from which another model starts; `unused` names the tensors that have no counterpart."""
    path: str
    origin: str  # the model and size of a checkpoint, or BiGS
    weights: dict[str, Tensor]
    unused: list[str]
    config: dict | None = None  # None for BiGS
    tokenizer: Tokenizer | None = None
    labels: list[str] | None = None

    @staticmethod
    def read(path: str) -> "InitialWeights":
        """Read a codessm checkpoint, or a BiGS state dict, which may lie under one of `NESTS`; raises `Problem`."""
        content = unpickle(path)
        try:
            if content.get("format") == FORMAT:
                check_tensors(content["weights"])
                config, tokenizer = dict(content["config"]), Tokenizer(content["tokenizer"], path)
                return InitialWeights(path, "{model}, {layers} x {d}".format(**config), content["weights"], [], config,
                                      tokenizer, content.get("labels"))
            content = next((content[key] for key in NESTS if isinstance(content.get(key), dict)), content)
            if any(".fs4." in str(name) for name in content):
                return InitialWeights(path, "BiGS", *from_bigs(path, content))
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            pass
        raise Problem(f"--init {path} is neither a codessm checkpoint nor a BiGS state dict, or not a whole one")

    def copy_to(self, objective: Objective, tokenizer_trained: bool = False) -> str:
        """Copy what fits into an objective; returns a sentence about what was taken. Raises `Problem`.

        A file with more layers gives its first, one with other positions those that both have, and one S4D kernel
        serves for each of several. A fine-tuned head is taken if the labels are the same, embeddings if the vocabulary
        is. A BiGS file has no tokenizer: its vocabulary is the same if it is as large and not `tokenizer_trained` now.
        """
        config, ours, theirs = objective.encoder.config, objective.state_dict(), self.config or dict(model="codessm")
        if not objective.encoder.same_layers(theirs["model"]):
            raise Problem(f"--init {self.path} is a {theirs['model'] if self.config else 'BiGS'}, whose layers are not "
                          f"those of {config['model']}")
        common = self.weights.keys() & ours.keys()
        if self.labels != objective.labels:
            common = {name for name in common if not name.startswith("head.")}
        of_vocabulary = {"encoder.embedding.weight", "bias"}
        same_vocabulary = self.tokenizer.text == objective.tokenizer.text if self.tokenizer else \
            not tokenizer_trained and all(len(self.weights[name]) == len(ours[name]) for name in common & of_vocabulary)
        if not same_vocabulary:
            common -= of_vocabulary

        taken, misfits, shortened = [], [], ""
        for name in sorted(common):
            weight, target = self.weights[name], ours[name]  # the target is the objective's own memory
            if name == "encoder.positions.weight":
                shortened = f" (of positions the first {len(weight)})" if len(weight) < len(target) else ""
                weight, target = weight[:len(target)], target[:len(weight)]
            if "_ssm." in name and weight.shape == target.shape[1:]:
                weight = weight.expand_as(target)
            if weight.shape == target.shape:
                target.copy_(weight)
                taken.append(name)
            else:
                misfits.append(f"{name} {tuple(weight.shape)}")
        if misfits:
            kernels = theirs.get("kernels", config["kernels"])
            advice = f" (give --kernels {kernels}, as it has)" * (kernels != config["kernels"])
            raise Problem(f"--init {self.path} ({self.origin}) does not fit {config['model']}, {config['layers']} x "
                          f"{config['d']}: {data.listed(misfits, 4)}{advice}")
        return (f"{self.path} ({self.origin}): taken {summary(taken)}{shortened}; new "
                f"{summary(ours.keys() - set(taken))}{'' if same_vocabulary else ' (another vocabulary)'}; not taken "
                f"{summary([*(self.weights.keys() - set(taken)), *self.unused])}")


def from_bigs(path: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(weights by our names, names of the tensors without a counterpart) of a BiGS state dict; raises `Problem`."""
    weights, unused, unknown = {}, [], []
    for name, tensor in tensors.items():
        plain = BIGS_PREFIX.sub("", str(name))
        module, _, parameter = plain.rpartition(".")
        in_layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
        prefix = BIGS_OTHERS.get(module)
        if in_layer and in_layer[2] in BIGS_LAYER:
            prefix = f"encoder.layers.{in_layer[1]}.{BIGS_LAYER[in_layer[2]]}."
        if plain.startswith(BIGS_UNUSED):
            unused.append(str(name))
        elif prefix is None or parameter not in BIGS_PARAMETERS or not isinstance(tensor, Tensor):
            unknown.append(str(name))
        else:
            weights[prefix + parameter] = tensor
    if unknown:
        raise Problem(f"--init {path} has tensors that BiGS has not: {data.listed(unknown, 8)}")
    embedding, decoder = weights["encoder.embedding.weight"], weights.pop("decoder.weight", None)
    if decoder is not None and not torch.equal(decoder, embedding):
        raise Problem(f"--init {path} has a decoder of its own, where ours is the embedding")
    # every token has type 0
    weights["encoder.embedding.weight"] = embedding + weights.pop("types.weight", torch.zeros(1))[:1]
    for name in [name for name in weights if re.search(r"\.f\.(weight|bias)$", name)]:
        layer, _, parameter = name.rpartition("f.")
        weights[f"{layer}fb.{parameter}"] = torch.cat([weights.pop(name), weights.pop(f"{layer}b.{parameter}")])
    return weights, unused


def summary(names: Iterable[str]) -> str:
    """Names of tensors, where neighbouring layers with the same ones are one entry."""
    layers, others = {}, []
    for name in sorted(names):
        found = re.fullmatch(r"(?:[\w.]+\.)?encoder\.layers?\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault(int(found[1]), []).append(found[2])
        else:
            others.append(name)
    firsts, lasts = (sorted(n for n in layers if layers.get(n + step) != layers[n]) for step in (-1, 1))
    entries = [f"layers {first}-{last}" + (f" ({', '.join(layers[first])})" if len(layers[first]) <= 8 else "")
               for first, last in zip(firsts, lasts)]
    return ", ".join(entries + others) or "nothing"


# ---- the trainer ------------------------------------------------------------------------------------

@dataclass
class Settings:
    """What a run was asked for. The command line fills it, the state keeps it, and a resumed run must have the same."""
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
    batch: int | None = None
    accumulate: int = 1
    lr: float | None = None
    eval_every: int | None = None
    obfuscate: float | None = None
    bag_of_words: float = 0.0  # of pretraining
    limit: int | None = None
    code_field: str | None = None
    text_field: str | None = None
    max_line: int = data.MAX_LINE // 10**6
    skip_bad: bool = False
    seed: int = 0
    # what may change when a run resumes
    output: str = "model.pt"
    restart: bool = False
    device: str = "auto"
    compiled: bool | None = None
    as_json: bool = False
    files: dict[str, str] = field(default_factory=dict)  # the files that were read, and what changes when one does

    def fixed(self) -> dict[str, object]:
        """What must be the same when a run resumes; of each file that it reads, the name and the content."""
        changing = ("paths", "ckpt", "init", "tokenizer", "output", "restart", "device", "compiled", "as_json", "files")
        return {name: value for name, value in asdict(self).items() if name not in changing} | {
            f"file {name}": mark for name, mark in self.files.items()}


class Output(AbstractContextManager):
    """The files of one run: the checkpoint `path`, its log `path`.jsonl, while it trains `path`.state, `path`.tokens.

    In a `with` block the run holds a lock on the log. What an earlier run left stays as it was until the first step.
    Only rank 0 reads and writes these files, except for the tokens. A symbolic link stands for the file that it leads
    to. Raises `Problem` if the run could not write, if another run is writing, or if a file would be overwritten that
    is not an earlier run's, or a finished one's without `restart`.
    """

    def __init__(self, path: str, restart: bool = False):
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self.state_path, self.log_path = f"{self.path}.state", f"{self.path}.jsonl"
        self.tokens_path = f"{self.path}.tokens"
        self.restart, self.log = restart, None
        self.earlier: int | None = None  # until the first step of a new run: the size of an earlier run's log
        if rank() > 0:
            return
        if os.path.isfile(self.path):
            if not zipfile.is_zipfile(self.path):
                raise Problem(f"{self.path} exists and is no checkpoint: give another -o")
            if not restart and not os.path.exists(self.state_path):
                raise Problem(f"{self.path} is a finished run's: give another -o, or --restart to replace it")
        data.check_writable(self.path)
        if os.path.exists(self.log_path) and not data.is_log(self.log_path):
            raise Problem(f"{self.log_path} is where the metrics would go, and it is something else: give another -o")
        try:
            self.log = open(self.log_path, "ab", buffering=0)
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.earlier = os.path.getsize(self.log_path)
        except BlockingIOError:
            raise Problem(f"another run is writing {self.path}: wait for it, or give another -o") from None
        except OSError as error:
            raise Problem(f"cannot write {self.log_path}: {error.strerror}") from None

    def __exit__(self, *_):
        if self.log:
            if os.fstat(self.log.fileno()).st_size == 0:  # nothing was trained
                os.remove(self.log_path)
            self.log.close()

    def resume(self, settings: Settings) -> dict | None:
        """The state to resume from, or None to start anew. For rank 0; raises `Problem` if the settings differ."""
        self.settings = settings.fixed()
        # if a process dies, torchrun starts the same command again, which must not discard what it has saved itself
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not os.path.exists(self.state_path) or self.restart and not again:
            return None
        try:
            state, ours = read(self.state_path), self.settings
            theirs = state.get("settings")
            if not isinstance(theirs, dict) or not isinstance(state.get("tokenizer"), str):
                raise Problem(f"{self.state_path} is no state of a run")
        except Problem as problem:
            raise Problem(f"{problem.message}: give another -o, or --restart to discard it") from None
        names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
        if names:
            was, now = (data.listed(f"{name} {s.get(name, 'absent')}" for name in names) for s in (theirs, ours))
            raise Problem(f"{self.state_path} is of a run with {was}, and this one has {now}: repeat that run's "
                          "settings to go on with it, or give another -o, or --restart to discard it")
        if "-" in settings.files.values():
            raise Problem(f"{self.state_path} is of a run that read standard input or a pipe, which cannot be read "
                          "again: --restart discards it")
        return state

    def go_on(self, log_size: int) -> None:
        """Cut the log back to the size that it had when a state was saved."""
        self.log.truncate(min(log_size, self.earlier))
        self.earlier = None

    def discard_earlier(self) -> None:
        """Remove the lines of the log and the state that an earlier run left."""
        own = Path(self.log_path).read_bytes()[self.earlier:]
        self.log.truncate(0)
        self.log.write(own)
        Path(self.state_path).unlink(missing_ok=True)
        self.earlier = None

    def record(self, **values: float) -> None:
        """Write a line of the log. Raises `Problem` if that fails."""
        if rank() > 0:
            return
        try:
            line, size = json.dumps(values).encode() + b"\n", os.fstat(self.log.fileno()).st_size
            if self.log.write(line) < len(line):  # the disk is full
                self.log.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Problem(f"could not write {self.log_path}: {error.strerror}", 1) from None


def adamw(objective: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear maps and embeddings, and nothing else."""
    decayed = {id(m.weight) for m in objective.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    groups = [{"params": [p for p in objective.parameters() if (id(p) in decayed) == decays], "weight_decay": decay}
              for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))]
    device = next(objective.parameters()).device
    # recorded kernels read the rate from GPU memory when they are replayed
    lr = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))


def warmup(steps: int) -> int:
    """How many of the steps warm up."""
    return min(300, steps // 10)


def learning_rate(step: int, steps: int, peak: float, shape: str = "cosine") -> float:
    """The rate of a step, numbered from 0: linear up to `peak` in warm-up, then down to 0 as a cosine or linearly."""
    if step < warmup(steps):
        return peak * (step + 1) / warmup(steps)
    share = (step - warmup(steps)) / (steps - warmup(steps))
    return peak * (0.5 * (1 + math.cos(math.pi * share)) if shape == "cosine" else 1 - share)


class Stepper:
    """Optimizer steps: `Stepper(...)(batch)` takes one and returns the detached loss sums (3,) of all pieces and ranks.

    A step whose loss or gradient is not finite changes nothing and returns NaN. Steps of one process are recorded as
    CUDA graphs (`Recorder`). `accumulate` cuts each batch into so many pieces, to save memory; the gradients are the
    same sums.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, accumulate: int = 1):
        self.objective, self.optimizer, self.accumulate = objective, optimizer, accumulate
        self.device, self.stepped = next(objective.parameters()).device, False
        objective.pieces = accumulate  # for one that is `coupled`
        # Evaluations record on another stream: their graphs, when they go, take the workspace of all that were recorded
        # on theirs (pytorch issue 193402).
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.recorder = Recorder(objective, lambda tensors: self.step([tensors]),
                                 accumulate == 1 and world_size() == 1, stream)
        if self.recorder.enabled:
            for group in optimizer.param_groups:
                group["capturable"] = True
        self.parallel = objective
        if world_size() > 1:
            torch._dynamo.config.optimize_ddp = False  # it would cut the layers, which are compiled as they are
            # buckets of 100 MB rather than DDP's 25: half a percent more tokens a second on two H200
            self.parallel = DistributedDataParallel(objective, gradient_as_bucket_view=True, bucket_cap_mb=100)

    def __call__(self, batch: Batch) -> Tensor:
        pieces = batch.pieces(1 if self.objective.coupled else self.accumulate)
        return self.recorded_step([self.objective.prepare(piece) for piece in pieces])

    def recorded_step(self, pieces: list[dict[str, Tensor]]) -> Tensor:
        """A step on what `objective.prepare` made of the pieces of a batch."""
        return self.recorder(pieces[0]) if len(pieces) == 1 else self.step(pieces)

    def step(self, pieces: list[dict[str, Tensor]]) -> Tensor:
        """Backward through each piece, then one update."""
        self.optimizer.zero_grad(set_to_none=True)  # a failed recording may have left gradients
        if world_size() > 1 and not self.stepped:
            # After its first pass DDP orders its buckets anew, which changes the sums of more than two ranks. With a
            # pass before the first step, a resumed run computes exactly what an undisturbed one does.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.backward(pieces)
            self.optimizer.zero_grad(set_to_none=True)
        self.stepped = True
        total = all_reduce(self.backward(pieces))
        scale = total[2].clamp(min=1) / world_size()  # from the mean loss to the sum; DDP takes the ranks' mean
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / scale
        finite = (norm + total[0]).isfinite()
        scale = scale * norm.clamp(min=CLIP) / CLIP
        if self.optimizer.defaults.get("fused"):  # its kernel divides and skips, without a wait for the GPU
            self.optimizer.found_inf, self.optimizer.grad_scale = (~finite).float(), scale
            self.optimizer.step()
        elif finite:
            torch._foreach_div_(gradients, scale)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.where(finite, total, math.nan)

    def backward(self, pieces: list[dict[str, Tensor]]) -> Tensor:
        """Add up the gradients of all pieces and ranks; the loss sums (3,) of this rank's pieces."""
        total = 0
        for i, tensors in enumerate(pieces, 1):
            with self.parallel.no_sync() if world_size() > 1 and i < len(pieces) else nullcontext():
                sums = self.parallel(tensors)
                sums[0].backward()
            total = total + sums.detach()
        return total


class Trainer:
    """Trains an objective on its device and keeps the files of `output`.

    Args:
        train: batches of the training examples.
        valid, split: batches of the distinct items of the validation split, and the split. It is evaluated before the
            first step, every `settings.eval_every` steps and at the end; the weights with the best score are kept.
        settings: `steps`, `lr`, `eval_every`, `accumulate` and `seed`.
    """
    COUNTERS = ("step", "evaluated", "tokens", "skipped", "failing")

    def __init__(self, objective: Objective, train: Batches, valid: Batches, split: Split, output: Output,
                 settings: Settings):
        self.objective, self.train, self.valid, self.split = objective, train, valid, split
        self.output, self.settings, self.steps = output, settings, settings.steps
        self.optimizer = adamw(objective, settings.lr)
        self.stepper = Stepper(objective, self.optimizer, settings.accumulate)
        self.step = self.tokens = 0
        self.skipped = self.failing = 0  # steps without a finite loss: all, and those in a row up to the last log line
        self.evaluated = -1  # the step of the last evaluation
        self.window: list[Tensor] = []  # loss sums of the steps since the last log line
        self.metrics: dict[str, float] | None = None  # of the best evaluation
        self.best: dict[str, Tensor] | None = None  # its weights

    def run(self) -> dict[str, float]:
        """Train to the end and write the checkpoint; returns the metrics of the best evaluation and loads its weights.

        Whatever ends the run earlier, rank 0 saves the state first. Raises `Problem`, with exit code 129, 130 or 143
        for a signal and 1 for a failure, such as `FAILING` steps in a row without a finite loss.
        """
        log_every = max(1, min(LOG_STEPS, self.steps // 10))
        saved, saving = time.monotonic(), 0.0  # when the state was last saved, and for how many seconds
        signals = Signals()
        with handle_signals(signals.note), progress(total=self.steps, initial=self.step, desc="training", unit="step",
                                            unit_scale=False, delay=0) as bar:
            try:
                while True:
                    last = self.step == self.steps
                    if self.window and (self.step % log_every == 0 or last):
                        self.log()
                    if self.evaluated < self.step and (self.step % self.settings.eval_every == 0 or last):
                        self.evaluate(signals)
                    if last:
                        break

                    rate = learning_rate(self.step, self.steps, self.settings.lr, self.objective.schedule)
                    for group in self.optimizer.param_groups:
                        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
                    # dropout differs between ranks, and not between a resumed and an undisturbed run
                    torch.manual_seed(hash((self.settings.seed, rank(), self.step)))
                    self.objective.train()
                    batch = self.train[self.step]
                    self.window.append(self.stepper(batch))
                    self.step += 1
                    self.tokens += batch.tokens
                    if self.output.earlier is not None:
                        self.output.discard_earlier()

                    if bar.update():  # the bar was drawn: wait for the GPU only then
                        loss, correct, count = self.window[-1].tolist()
                        count = max(count, 1)
                        bar.set_postfix_str(f"loss {loss / count:.3f}, accuracy {correct / count:.1%}", refresh=False)
                    signals.check()
                    # every five minutes and at the end of an epoch, but for at most a 20th of the time
                    wait = 0 if self.step % len(self.train) == 0 else SAVE_SECONDS
                    started = time.monotonic()
                    if rank() == 0 and started - saved > max(wait, 20 * saving):
                        write(self.output.state_path, self.state_dict())
                        saved = time.monotonic()
                        saving = saved - started
                self.objective.load_state_dict(self.best)
                if rank() == 0:
                    save(self.output.path, self.objective)
                    for path in (self.output.state_path, f"{self.output.state_path}.tmp"):
                        Path(path).unlink(missing_ok=True)
                Path(self.output.tokens_path).unlink(missing_ok=True)  # each host has its own
            except BaseException as error:  # all that can end a run
                raise self.save_after(error) from error
        return self.metrics

    def evaluate(self, signals: Signals) -> None:
        """Evaluate, and keep the weights if they are the best; among equals those that have learned longest."""
        metrics, _ = evaluate(self.objective, self.valid, self.split, signals.watch)
        self.output.record(step=self.step, **{f"valid_{name}": value for name, value in metrics.items()})
        self.evaluated = self.step
        better = self.metrics is None or self.objective.score(metrics) >= self.objective.score(self.metrics)
        if self.step and better:  # never the untrained weights
            self.metrics = metrics
            self.best = {name: weight.detach().to("cpu", copy=True)
                         for name, weight in self.objective.state_dict().items()}

    def log(self) -> None:
        """Log the steps since the last line. Raises `Problem` if the last `FAILING` had no finite loss."""
        sums = torch.stack(self.window).double().cpu()
        finite = sums[:, 0].isfinite()
        loss, correct, count = sums[finite].sum(0).tolist()
        skipped, failing = self.skipped + int((~finite).sum()), self.failing
        for good in finite.tolist():
            failing = 0 if good else failing + 1
        self.output.record(step=self.step, epoch=round(self.step / len(self.train), 4), tokens=self.tokens,
                           lr=learning_rate(self.step - 1, self.steps, self.settings.lr, self.objective.schedule),
                           **(dict(loss=loss / count, accuracy=correct / count) if count else {}),
                           **(dict(skipped=skipped) if skipped else {}))
        if skipped > self.skipped:
            info(f"up to step {self.step:,}, {skipped:,} steps were skipped: their loss was no number")
        self.skipped, self.failing, self.window = skipped, failing, []
        if failing >= FAILING:
            self.failing = 0  # the same command tries again
            raise Problem(f"the loss was no number in {failing} steps in a row, up to step {self.step:,}: try a "
                          "lower --lr. The weights are those from before", 1)

    def save_after(self, error: BaseException) -> Problem:
        """Save the state on rank 0; returns a `Problem` that says what went wrong and where the state is."""
        problem, state = explain(error), self.output.state_path
        message = f"{problem.message} at step {self.step:,} of {self.steps:,}"
        if not self.step and (self.output.earlier or self.output.earlier == 0 and os.path.exists(state)):
            self.output.log.truncate(self.output.earlier)
            message += ": what an earlier run left there is as it was"
        elif rank() == 0:
            advice = f"the same command{' without --restart' if self.output.restart else ''} goes on from it"
            if "-" in self.settings.files.values():
                advice = "it serves as a checkpoint; what was read from a pipe cannot be read again to go on from it"
            try:
                write(state, self.state_dict())
                message += f": the state is saved in {state}; {advice}"
            except BaseException as failure:
                earlier = f"{state} is of an earlier step" if os.path.exists(state) else "there is no state"
                message += f"; {explain(failure).message}; {earlier}"
        return Problem(message, problem.exit_code)

    def state_dict(self) -> dict:
        """A checkpoint, and all that a run needs to go on."""
        log = self.output.log.fileno()
        os.fsync(log)
        return checkpoint(self.objective) | {
            "settings": self.output.settings, "optimizer": self.optimizer.state_dict(), "best": self.best,
            "metrics": self.metrics, "window": [sums.cpu() for sums in self.window], "processes": world_size(),
            "log": os.fstat(log).st_size, **{name: getattr(self, name) for name in self.COUNTERS}}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state. Raises `Problem` where it does not fit, as kernels trust the shapes of their tensors."""
        try:
            own = self.objective.state_dict()
            check_tensors(state["weights"], own)
            self.objective.load_state_dict(state["weights"])
            parameters = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
            for number, moments in state["optimizer"]["state"].items():
                parameter = parameters[number]
                check_tensors(moments, {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter})
            # its hyperparameters were another device's: take the moments alone
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
            vars(self).update({name: int(state[name]) for name in self.COUNTERS})
            self.window = [sums.to(self.stepper.device) for sums in state["window"]]
            self.metrics, self.best = state["metrics"], state["best"]
            if self.best is not None:
                self.objective.score(self.metrics)
                check_tensors(self.best, own)
            if not 0 <= self.step <= self.steps or any(sums.shape != (3,) for sums in self.window) \
                    or (self.metrics is None) != (self.best is None) or type(state["log"]) is not int:
                raise ValueError
            processes = state["processes"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise Problem(f"{self.output.state_path} does not fit this run: --restart discards it") from None
        info(f"going on from step {self.step:,} of {self.steps:,}, saved in {self.output.state_path}" + (
            "" if processes == world_size() else f", by {processes} processes, where now there are {world_size()}"))

    def check_room(self) -> None:
        """Raise `Problem` if the disk has no room for a state (weights, two moments, best weights) and a checkpoint."""
        folder = os.path.dirname(os.path.realpath(self.output.path))
        needed = 5 * sum(weight.nbytes for weight in self.objective.state_dict().values())
        free, paths = shutil.disk_usage(folder).free, (self.output.path, self.output.state_path)
        if free + sum(os.path.getsize(path) for path in paths if os.path.exists(path)) < needed:
            raise Problem(f"{folder} has {data.human_bytes(free)} of room, and a checkpoint and a state of this model "
                          f"take {data.human_bytes(needed)}: make room, or give another -o", 1)

    def begin(self, state: dict | None) -> None:
        """Start anew, or from a state that rank 0 has read, which is emptied to free its memory. Raises `Problem`."""
        if rank() == 0:  # first, so that a state which does not fit goes no further
            self.check_room()
            if state:
                self.load_state_dict(state)
                self.output.go_on(state["log"])
        state = broadcast_state(state)
        if state:
            if rank() > 0:
                self.load_state_dict(state)
            state.clear()


# ---- what bench measures ----------------------------------------------------------------------------

def median_seconds(run: Callable[[], object], device: torch.device, repeats: int, settle: float = 0.5) -> float:
    """The median of `repeats` runs, after three runs and `settle` seconds of warm-up: a GPU under load slows down."""
    def seconds() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    settled, runs = time.perf_counter() + settle, 0
    while runs < 3 or time.perf_counter() < settled:
        seconds()
        runs += 1
    return float(np.median([seconds() for _ in range(repeats)]))


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
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on macOS in bytes


def reset_peak_memory(device: torch.device) -> int | None:
    """Let `peak_memory` begin anew; returns the bytes in use now, None where the system does not tell."""
    gc.collect()  # a compiled model refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns what earlier rows have freed
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, AttributeError):
        return None


def measure(encoder: nn.Module, length: int, batch: int, train: bool, device: torch.device, compiled: bool | None,
            repeats: int) -> dict:
    """Speed and memory of an encoder, or if `train` of a step of MLM, on full batches of random tokens of one length.

    Returns samples_per_second; tokens_per_second; seconds, the median of a run; memory, bytes beyond the weights, or
    None; projections, FLOP/s in linear maps; first_seconds, of the first run; and whether it was compiled. Raises what
    torch does where memory is short.
    """
    objective, vocab = MLM(encoder, None).to(device), encoder.config["vocab"]
    compiled = compile_objective(objective, compiled)
    if not train:
        objective = objective.frozen()
        del encoder
    before = reset_peak_memory(device)
    ids = torch.randint(vocab, (batch, length), device=device)
    if train:
        stepper = Stepper(objective, adamw(objective, 1e-5))
        places = torch.randperm(batch * length, device=device)[:max(1, round(0.15 * batch * length))]
        run = partial(stepper.recorded_step, [dict(ids=ids, places=places, targets=ids.flatten()[places].long())])
    else:
        run = partial(Recorder(objective, partial(compute, objective, objective.encoder)), {"ids": ids})

    with torch.set_grad_enabled(train):
        begun = time.monotonic()
        float(run().sum())  # waits for a GPU
        first = time.monotonic() - begun
        reset_peak_memory(device)  # without what the compiler took
        seconds = median_seconds(run, device, repeats)
    FLOP = 2 * sum(layer.weight.numel() for layer in objective.encoder.linear_maps()) * (3 if train else 1)
    return dict(samples_per_second=batch / seconds, tokens_per_second=batch * length / seconds, seconds=seconds,
                memory=None if before is None else max(0, peak_memory(device) - before),
                projections=FLOP * batch * length / seconds, first_seconds=first, compiled=compiled)
