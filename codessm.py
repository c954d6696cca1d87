"""CodeSSM: a bidirectional gated state-space encoder of source code, linear in length.

    codessm pretrain corpus.jsonl --ctx 256 -o model.pt
    python codessm.py pretrain corpus.jsonl

The encoder is BiGS (Wang et al. 2023, arXiv 2212.10544) over S4D kernels (Gu et al. 2022,
arXiv 2206.11893), as in CodeSSM (Verma et al. 2025, arXiv 2505.01475). Shapes and symbols:

    B  batch      L  length in tokens      d  model width
    c  length of a chunk                   n  chunks a sequence, n c >= L
    N  complex modes of an S4D kernel: A, C, and A-bar, C-bar after discretisation with step Delta
    T, E, O  the convolution as matrix products: within a chunk, into the state, out of it

Complex numbers are kept as pairs of reals throughout.
"""
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
import zlib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Callable

# flat modules can be shadowed by files of the same name in the user's folder
for name in ("data", "tasks"):
    spec = importlib.util.find_spec(name)
    if spec and spec.origin and Path(spec.origin).resolve().parent != Path(__file__).resolve().parent:
        raise ImportError(f"{spec.origin} shadows codessm's own {name}.py in {Path(__file__).parent}: "
                          "rename it, or run from another folder")

# threads that wait should sleep: spinning, two of them beside one other busy process run five times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu, pad

import data
import tasks
from data import Problem, Tokenizer, say
from tasks import MLM, save  # noqa: F401  save is the other half of load

__version__ = "0.1.0"

SIZES = {"base": dict(d=1024, layers=12), "small": dict(d=512, layers=6), "tiny": dict(d=128, layers=4)}
HELD_OUT = 1024  # records that an evaluation during pretraining reads at most


class S4D(nn.Module):
    """A diagonal state-space kernel, one for all channels (Gu et al. 2022, section 3, zero-order hold).

        A-bar = exp(Delta A)     C-bar = C (A-bar - 1) / A     K[l] = Re sum_n C-bar_n A-bar_n^l
        y = K * u + D u

    `forward` computes the convolution over chunks of c tokens by matrix products, so its cost is
    linear in L; between chunks it carries the N complex states in float32.
    """
    chunk = 256  # the longest c

    def __init__(self, N: int = 64):
        super().__init__()
        self.A_re = nn.Parameter(torch.full((N,), -0.5))
        self.A_im = nn.Parameter(math.pi * torch.arange(N))
        self.C = nn.Parameter(torch.randn(N, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(1))
        self.log_step = nn.Parameter(torch.empty(1).uniform_(math.log(0.01), math.log(1.0)))

    def discretise(self, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """C-bar (N, 2) and the powers A-bar^l for l = 0 ... c, (N, c + 1, 2); in the parameters' dtype.

        With x + iy = Delta A, l x and l y are formed in float64 and the phase l y is reduced mod 2 pi there:
        at l = 2,048 a float32 phase is wrong in its second digit.
        """
        device, dtype = self.C.device, self.C.dtype
        wide = dict(dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
        Delta, A_re, A_im = self.log_step.to(**wide).exp(), self.A_re.to(**wide).clamp(max=-1e-4), self.A_im.to(**wide)
        C_re, C_im = self.C.to(**wide).unbind(-1)
        x, y = Delta * A_re, Delta * A_im
        # A-bar - 1, without cancellation where Delta A is small
        minus_re = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2) ** 2
        minus_im = torch.exp(x) * torch.sin(y)
        # B-bar = (A-bar - 1) / A, B being 1
        norm = A_re ** 2 + A_im ** 2
        B_re, B_im = (minus_re * A_re + minus_im * A_im) / norm, (minus_im * A_re - minus_re * A_im) / norm
        C_bar = torch.stack([C_re * B_re - C_im * B_im, C_re * B_im + C_im * B_re], -1)
        # A-bar^l = exp(l x) (cos l y + i sin l y)
        l = torch.arange(c + 1, device=x.device)
        modulus = torch.exp((x[:, None] * l).to(dtype))
        phase = torch.remainder(y[:, None] * l, 2 * math.pi).to(dtype)
        powers = torch.stack([modulus * torch.cos(phase), modulus * torch.sin(phase)], -1)
        return C_bar.to(device, dtype), powers.to(device)

    def forward(self, u: torch.Tensor, reverse: bool = False) -> torch.Tensor:
        """y (B, L, d) of u (B, L, d), L >= 1, in u's dtype; with `reverse` the SSM is anti-causal.

        The matrices and the carried states are made in the parameters' dtype, float32, whatever u's is.
        """
        B, L, d = u.shape
        n = -(-L // self.chunk)
        c = -(-L // n)
        C_bar, powers = self.discretise(c)
        C_re, C_im = C_bar[:, None].unbind(-1)
        P_re, P_im = powers.unbind(-1)
        W_re, W_im = C_re * P_re - C_im * P_im, C_re * P_im + C_im * P_re  # C-bar A-bar^l, (N, c + 1)
        # T[i, j] = K[i - j] for i >= j, and D on the diagonal; K[l] = Re sum_n C-bar_n A-bar_n^l
        K = W_re[:, :c].sum(0)
        K = torch.cat([K.new_zeros(c - 1), K[:1] + self.D, K[1:]])
        T = K.unfold(0, c, 1).flip(1)
        T = T.mT if reverse else T
        if n * c > L:
            u = pad(u, (0, 0, 0, n * c - L))
        u = u.reshape(B * n, c, d)
        y = T.to(u.dtype).expand(B * n, c, c) @ u
        if n > 1:
            E = torch.cat([P_re, P_im])[:, :c]  # (2N, c): A-bar^j, as the anti-causal SSM has it
            O = torch.cat([W_re, -W_im])[:, 1:].mT  # (c, 2N): Re(C-bar A-bar^(i + 1) H) = O [Re H, Im H]
            E, O = (E, O.flip(0)) if reverse else (E.flip(1), O)
            S = (E.to(u.dtype).expand(B * n, -1, c) @ u).view(B, n, -1, d)
            H = self.carry(S, powers[:, c], reverse).view(B * n, -1, d)
            y = torch.baddbmm(y, O.to(u.dtype).expand(B * n, c, -1), H.to(u.dtype))
        return y.reshape(B, n * c, d)[:, :L]

    @staticmethod
    def carry(S: torch.Tensor, A_c: torch.Tensor, reverse: bool) -> torch.Tensor:
        """The state H before each chunk, from each chunk's own contribution S; both (B, n, 2N, d).

        H_(k+1) = A-bar^c H_k + S_k in float32 or wider, A_c = A-bar^c being (N, 2).
        """
        B, n, N2, d = S.shape
        S = S.to(A_c.dtype).view(B, n, 2, N2 // 2, d).unbind(1)
        a_re, a_im = A_c[..., None].unbind(1)  # (N, 1)
        a_re, a_im = torch.stack([a_re, a_re]), torch.stack([-a_im, a_im])
        H, states = torch.zeros_like(S[0]), []
        for S_k in reversed(S) if reverse else S:
            states.append(H)
            H = a_re * H + a_im * H.flip(1) + S_k
        return torch.stack(states[::-1] if reverse else states, 1).view(B, n, N2, d)


class Layer(nn.Module):
    """One BiGS layer (Wang et al. 2023, section 3.2).

        X  = LayerNorm(Xi)
        V  = gelu(Wv X)  (3d)     F = gelu(Wf X)  (d)     B = gelu(Wb X)  (d)
        U1 = Wu1 SSM_forward(F)   U2 = Wu2 SSM_backward(B)
        U  = gelu(Wu (U1 * U2))  (3d)
        Xo = Xi + Wo (U * V)

    No flip is carried out: a linear map commutes with it, so the backward path is the same map followed
    by an anti-causal SSM.
    """

    def __init__(self, d: int, N: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.vfb = nn.Linear(d, 5 * d)  # Wv, Wf and Wb in one product
        self.forward_ssm, self.backward_ssm = S4D(N), S4D(N)
        self.u1, self.u2 = nn.Linear(d, d), nn.Linear(d, d)
        self.u = nn.Linear(d, 3 * d)
        self.o = nn.Linear(3 * d, d)

    def forward(self, X: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Xo (B, L, d) of Xi (B, L, d), floating; `mask` (B, L, 1), bool, is False at padding.

        The mask keeps padding out of the SSMs, the one place where positions meet.
        """
        d = X.shape[-1]
        V, F, B = gelu(self.vfb(self.norm(X))).split([3 * d, d, d], -1)
        if mask is not None:
            F, B = F * mask, B * mask
        U1, U2 = self.u1(self.forward_ssm(F)), self.u2(self.backward_ssm(B, reverse=True))
        U = gelu(self.u(U1 * U2))
        return X + self.o(U * V)


class Encoder(nn.Module):
    """Token embedding, LayerNorm, and the layers; nothing after the last one, as in BiGS.

    Args:
        vocab: number of token ids.
        d, layers, N: width, number of layers, complex modes of a kernel.
    Linear maps start at N(0, 0.64 / sqrt(d)) (BiGS's 0.02 at d = 1,024), embeddings at N(0, 0.02).
    `config` holds the arguments; `Encoder(**config)` is the same shape again.
    """

    def __init__(self, vocab: int, d: int, layers: int, N: int = 64):
        super().__init__()
        self.config = dict(vocab=vocab, d=d, layers=layers, N=N)
        self.embedding = nn.Embedding(vocab, d)
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.layers = nn.ModuleList(Layer(d, N) for _ in range(layers))
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                tasks.initialise(module, d)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (B, L, d), float32, of token ids (B, L), int32 or int64, right-padded.

        `lengths` (B,) counts the real tokens of each row; without it every token is real. What stands
        at padding is unspecified, and no real position depends on it.
        """
        X, mask = self.norm(self.embedding(ids)), None
        if lengths is not None:
            mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])[..., None]
        for layer in self.layers:
            X = layer(X, mask)
        return X


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a checkpoint (or of the state file of an unfinished run), in evaluation mode.

    It is one of the objectives of tasks.py: `tasks.MLM` with `logits(hidden)`, or what it was fine-tuned for, with
    `labels`. All have `encoder`, which maps ids (B, L) and lengths (B,) to hidden states (B, L, d), and
    `tokenizer`. The file runs no code. Raises `data.Problem`.
    """
    content = tasks.read(path)
    try:
        tokenizer = Tokenizer(content["tokenizer"], str(path))
        with torch.device("meta"):  # shapes alone: the weights come from the file
            model = tasks.build(content, Encoder(**content["config"]), tokenizer)
        weights = {name: weight.to_dense().float() for name, weight in content["weights"].items()}
        model.load_state_dict(weights, assign=True)
        if tokenizer.vocab > content["config"]["vocab"]:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise Problem(f"{path}: its weights do not fit its configuration, so it is no whole checkpoint") from None
    return model.to(device).eval()


# ---- the command line -------------------------------------------------------------------------------

OUT_OF_MEMORY = "out of memory: use a smaller --batch, --ctx or --size, or a larger --accumulate"


class Terminated(KeyboardInterrupt):
    """SIGTERM, where there is nothing to save yet."""


def terminate(_number, _frame):
    raise Terminated


class Commands(click.Group):
    """The one place that turns what went wrong into a sentence and an exit code."""

    def invoke(self, ctx: click.Context):
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            code = 143 if isinstance(error, Terminated) else 130
            trains = ctx.invoked_subcommand in ("pretrain", "finetune")
            raise Problem(f"interrupted{' before training began' * trains}: nothing is lost", code) from None
        except BrokenPipeError:
            raise
        except MemoryError:
            raise Problem(OUT_OF_MEMORY, 1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise Problem(f"{where}{error.strerror or error}", 1) from None
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise Problem("a process that tokenises died, perhaps for want of memory: use fewer --workers",
                              1) from None
            if "out of memory" in str(error) or "can't allocate memory" in str(error):
                raise Problem(OUT_OF_MEMORY, 1) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="codessm")
def cli():
    """CodeSSM: a bidirectional state-space encoder of source code, linear in length."""


def choose_device(name: str) -> torch.device:
    """The device of `--device`; auto is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type in ("cpu", "cuda", "mps"):
            return device
    except (RuntimeError, AssertionError, NotImplementedError):
        pass
    raise Problem(f"--device {name}: there is no such device here; cpu always works")


OPTIONS = {
    "--ckpt": dict(metavar="FILE", required=True, help="The checkpoint."),
    "--data": dict(metavar="PATH"),
    "--ctx": dict(type=click.IntRange(8, 2**24)),
    "--size": dict(type=click.Choice(list(SIZES)),
                   help="12 layers of width 1024, 6 of 512, 4 of 128.  [default: base]"),
    "--tokenizer": dict(metavar="FILE", help="A Hugging Face tokenizer.json.  [default: train one on the data]"),
    "--vocab": dict(type=click.IntRange(1, 10_000_000),
                    help="Entries of a trained tokenizer.  [default: 32100; tiny: 4096]"),
    "--steps": dict(type=click.IntRange(1), help="Optimizer steps; or give --epochs."),
    "--epochs": dict(type=click.IntRange(1)),
    "--batch": dict(default=32, show_default=True, type=click.IntRange(1, 2**20), help="Samples a step."),
    "--accumulate": dict(default=1, show_default=True, type=click.IntRange(1),
                         help="Cut each batch into so many pieces, to save memory."),
    "--lr": dict(type=click.FloatRange(0, min_open=True)),
    "--eval-every": dict(type=click.IntRange(1)),
    "--limit": dict(type=click.IntRange(1), help="Only the first so many records of each file."),
    "--code-field": dict(metavar="NAME", help="The field that holds the code, if its name is not a known one."),
    "--text-field": dict(metavar="NAME", help="The same for the text."),
    "--skip-bad": dict(is_flag=True, help="Count bad lines and pass over them."),
    "--seed": dict(default=0, show_default=True, type=click.IntRange(0, 2**63 - 1),
                   help="Of weights, order, windows and masks."),
    "-o": dict(metavar="FILE"),
    "--restart": dict(is_flag=True, help="Begin anew, whatever an earlier run left at -o."),
    "--device": dict(default="auto", show_default=True, help="cpu, cuda, cuda:1, mps; auto is cuda, else cpu."),
    "--workers": dict(type=click.IntRange(0),
                      help="Processes that tokenise ahead.  [default: half the cores, at most 4]"),
    "--json": dict(is_flag=True, help="Print the result as JSON."),
}
PARAMETERS = {"--data": "data_path", "--tokenizer": "tokenizer_path", "-o": "output_path", "--json": "as_json"}


def options(names: str, **changes: dict | str) -> Callable:
    """The named options, which mean the same in every command; `changes` are their attributes (or help) in this one."""
    def decorate(command: Callable) -> Callable:
        for name in reversed(names.split()):
            change = changes.get(name.strip("-").replace("-", "_"), {})
            change = {"help": change} if isinstance(change, str) else change
            command = click.option(name, *filter(None, [PARAMETERS.get(name)]), **OPTIONS[name] | change)(command)
        return command
    return decorate


def check_training(steps, epochs, vocab, tokenizer_path, lr) -> None:
    """What the options of `pretrain` and `finetune` exclude."""
    if steps and epochs:
        raise click.UsageError("give --steps or --epochs, not both")
    if vocab and tokenizer_path:
        raise click.UsageError("give --tokenizer or --vocab, not both: a given tokenizer has its own entries")
    if lr and not math.isfinite(lr):
        raise click.UsageError(f"--lr {lr} is not a number to learn with")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise Problem("this version trains in one process: start it without torchrun, or with --nproc-per-node 1")


def default_learning_rate(d: int, pretrained: bool = False) -> float:
    """The peak one; 5e-5 is the papers' for fine-tuning."""
    return 2e-3 if d <= SIZES["tiny"]["d"] else 5e-5 if pretrained else 3e-4


def default_workers(workers: int | None) -> int:
    return min(4, max(1, (os.cpu_count() or 1) // 2)) if workers is None else workers


def describe(**facts: str) -> None:
    """Every resolved setting, before the work begins."""
    for name, value in facts.items():
        say(f"{name:10} {value}")


def describe_training(task: nn.Module, size: str, device: torch.device, output_path: str, steps: int, epochs: float,
                      decay: str, *, batch: int, lr: float, seed: int, accumulate: int, eval_every: int) -> None:
    """The settings that all training has."""
    parameters = sum(p.numel() for p in task.parameters())
    describe(model=f"codessm {size}, {parameters:,} parameters, on {device} in "
                   f"{'bfloat16' if tasks.bf16(device) else 'float32'}",
             training=f"{steps:,} steps of {batch} samples ({epochs:.1f} epochs), peak learning rate {lr:g} after "
                      f"{tasks.warmup(steps):,} steps, {decay}, weight decay {tasks.WEIGHT_DECAY:g}, seed {seed}, "
                      f"accumulate {accumulate}, an evaluation every {eval_every:,} steps",
             output=f"{output_path}, metrics in {output_path}.jsonl")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown(metrics: dict[str, float], first: str | None = None) -> str:
    """Metrics for a sentence, the one that counts first."""
    names = sorted(metrics, key=lambda name: name != first)
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)


@cli.command(epilog="Example: codessm pretrain corpus.jsonl --ctx 256 --steps 10000 -o model.pt")
@click.argument("corpus", nargs=-1)
@options("--ctx --size --tokenizer --vocab --steps --epochs --batch --accumulate --lr --eval-every --limit "
         "--code-field --text-field --skip-bad --seed -o --restart --device --workers --json",
         ctx=dict(default=256, show_default=True, help="Tokens a sample, special ones included."),
         size=dict(default="base"), epochs="Passes over the corpus.  [default: 1]",
         lr="Peak learning rate.  [default: 3e-4; tiny: 2e-3]",
         eval_every="Steps between evaluations.  [default: a tenth of all]",
         o=dict(default="model.pt", show_default=True, help="The checkpoint to write."))
def pretrain(corpus, ctx, size, tokenizer_path, vocab, steps, epochs, batch, accumulate, lr, eval_every, limit,
             code_field, text_field, skip_bad, seed, output_path, restart, device, workers, as_json):
    """Pretrain an encoder by masked language modelling on CORPUS.

    CORPUS: JSONL files, plain or .gz, folders, globs, or - for standard input; without any, the Python
    standard library. The same command run again goes on where an interrupted one was.
    """
    check_training(steps, epochs, vocab, tokenizer_path, lr)
    if steps is None and epochs is None:
        epochs = 1
    lr = lr or default_learning_rate(SIZES[size]["d"])
    started, device, workers = time.monotonic(), choose_device(device), default_workers(workers)
    with tasks.Output(output_path, restart) as output:
        given = data.load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
        sources = data.find_sources(corpus) if corpus else [data.standard_library()]
        settings = dict(
            corpus={source.name: source.mark for source in sources}, limit=limit, code_field=code_field,
            text_field=text_field, skip_bad=skip_bad, ctx=ctx, size=size,
            tokenizer=zlib.crc32(given.text.encode()) if given else None,
            vocab=given.vocab if given else vocab or (4096 if size == "tiny" else 32100),
            steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, eval_every=eval_every, seed=seed)
        state = output.resume(settings)

        records = data.Corpus(sources, code_field, text_field, limit, skip_bad)
        if len(records.train) < batch or not len(records.held_out):
            count = len(records.train)
            raise Problem(f"the corpus has {count} samples to train on and {len(records.held_out)} to evaluate on, "
                          "fewer than one batch: give more of it"
                          + (f", or --batch {count} or less" if count > 1 else ""))
        if state:
            tokenizer = Tokenizer(state["tokenizer"])
        else:
            tokenizer = given or data.train_tokenizer(records, settings["vocab"])
        samples = data.Samples(records, tokenizer, ctx, seed)
        lengths = data.static_lengths(samples, records.train, ctx)
        batches = data.Batches(samples, records.train, batch, lengths, tokenizer.pad, seed)
        some = np.linspace(0, len(records.held_out) - 1, min(HELD_OUT, len(records.held_out))).astype(int)
        held_out = data.Batches(samples, records.held_out[some], batch, lengths, tokenizer.pad)
        steps = steps or epochs * len(batches)
        eval_every = eval_every or -(-steps // 10)

        torch.manual_seed(seed)
        task = MLM(Encoder(tokenizer.vocab, **SIZES[size]), tokenizer, seed).to(device)
        if not any(task.prepare(batch)[1] for batch in held_out.stream(stop=len(held_out))):
            raise Problem(f"nothing to predict in the {len(held_out.records)} records held out: give a larger corpus")
        describe(
            corpus=f"{data.listed(s.name for s in sources)}: {len(records):,} records, {data.size(records.bytes)}, "
                   f"{len(records.held_out):,} of them held out, {len(held_out.records):,} for evaluation"
                   + (f"; {records.bad:,} bad lines passed over" if records.bad else ""),
            tokenizer=f"{tokenizer.vocab:,} entries, {'given' if given else 'trained on the corpus'}",
            samples=f"ctx {ctx}, padded to {', '.join(map(str, lengths))}; {workers} processes tokenise ahead")
        describe_training(task, size, device, output_path, steps, steps / len(batches), "cosine", batch=batch, lr=lr,
                          seed=seed, accumulate=accumulate, eval_every=eval_every)
        metrics = tasks.train(task, batches, held_out, output, state,
                              settings=settings, steps=steps, lr=lr, accumulate=accumulate, eval_every=eval_every,
                              workers=workers)
    result = dict(output=output_path, steps=steps, parameters=sum(p.numel() for p in task.parameters()),
                  held_out=len(held_out.records), seconds=round(time.monotonic() - started, 1),
                  peak_memory=peak_memory(device), **metrics)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(f"{output_path}: {steps:,} steps in {result['seconds']:.0f} s; "
                   f"on {len(held_out.records):,} held-out records {mlm_sentence(metrics)}")


def mlm_sentence(metrics: dict[str, float]) -> str:
    return (f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}, "
            f"perplexity {metrics['perplexity']:.1f}")


def task_argument(*more: str) -> Callable:
    return click.argument("name", metavar="TASK", type=click.Choice([*data.TASKS, *more]))


def describe_data(reader: data.Reader) -> str:
    """What was read, for people."""
    parts = [f"{len(split):,} {name}" for name, split in reader.splits.items()]
    for name, split in reader.splits.items():
        if split.candidates is not None and name != "train":
            parts.append(f"{len(split.candidates):,} candidates for {name}")
    return ", ".join(parts) + (f"; {reader.notes}" if reader.notes else "") + (
        f"; {reader.bad:,} bad lines passed over" if reader.bad else "")


def describe_encoding(split: data.Split) -> str:
    """What it saves to encode each distinct item once."""
    sides = split.examples.size
    if split.candidates is not None:
        sides = len(np.unique(split.query)) + len(split.candidates)
    return f"{len(split.distinct):,} distinct of {sides:,} to encode, each once"


@cli.command(epilog="Example: codessm finetune devign --ckpt model.pt --data devign/ -o devign.pt")
@task_argument()
@options("--ckpt --data --ctx --size --tokenizer --vocab --steps --epochs --batch --accumulate --lr --eval-every "
         "--limit --skip-bad --seed -o --restart --device --workers --json",
         ckpt=dict(required=False, help="The pretrained checkpoint to start from; without one, from scratch."),
         data="The folder (or file) of the benchmark as published.  [default: ./TASK]",
         ctx="Tokens a function, special ones included.  [default: the task's]",
         epochs="Passes over the training split.  [default: the task's]",
         lr="Peak learning rate.  [default: 5e-5 from a checkpoint, 3e-4 from scratch; tiny: 2e-3]",
         eval_every="Steps between evaluations.  [default: an epoch]",
         o="The checkpoint to write.  [default: TASK.pt]")
def finetune(name, ckpt, data_path, ctx, size, tokenizer_path, vocab, steps, epochs, batch, accumulate, lr, eval_every,
             limit, skip_bad, seed, output_path, restart, device, workers, as_json):
    """Fine-tune an encoder on TASK and score it.

    TASK: advtest, sqa, devign, diversevul, complexity, typeinf or clone; or, for JSONL of your own, retrieval (text,
    code), classify (code, label), tag (tokens, labels) or pair (code1, code2, label).

    The weights with the best metric on the validation split are kept; the test split, if there is one, is scored
    once, at the end. The same command run again goes on where an interrupted one was.
    """
    check_training(steps, epochs, vocab, tokenizer_path, lr)
    if ckpt is not None and (size or tokenizer_path or vocab):
        raise click.UsageError("--ckpt brings its own --size, --tokenizer and --vocab: give it without them")
    benchmark, size = data.TASKS[name], size or "base"
    ctx, output_path = ctx or benchmark.ctx, output_path or f"{name}.pt"
    if steps is None and epochs is None:
        epochs = benchmark.epochs
    started, device, workers = time.monotonic(), choose_device(device), default_workers(workers)
    if ckpt is not None and os.path.realpath(ckpt) in map(os.path.realpath, (output_path, f"{output_path}.state")):
        raise Problem(f"-o {output_path} would replace what --ckpt {ckpt} is read from: give another -o")
    with tasks.Output(output_path, restart) as output:
        pretrained = load(ckpt) if ckpt is not None else None
        given = data.load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
        d = pretrained.encoder.config["d"] if pretrained else SIZES[size]["d"]
        lr = lr or default_learning_rate(d, pretrained is not None)
        reader = data.Reader(name, data_path or name, limit=limit, skip_bad=skip_bad)
        settings = dict(
            corpus={source.name: source.mark for source in reader.sources.values()}, task=name, limit=limit,
            skip_bad=skip_bad, ctx=ctx, ckpt=data.open_source(ckpt).mark if pretrained else None,
            size=None if pretrained else size, tokenizer=zlib.crc32(given.text.encode()) if given else None,
            vocab=None if pretrained or given else vocab or (4096 if size == "tiny" else 32100),
            steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, eval_every=eval_every, seed=seed)
        state = output.resume(settings)

        train, valid = reader.splits["train"], reader.splits["valid"]
        if state:
            tokenizer = Tokenizer(state["tokenizer"])
        elif pretrained:
            tokenizer = pretrained.tokenizer
        else:
            tokenizer = given or data.train_tokenizer(train, settings["vocab"])
        facts = describe_data(reader)
        for part, split in reader.splits.items():
            if not len(split.prepare(tokenizer, ctx)):
                raise Problem(f"the {part} split has no labelled token")
        lengths = data.static_lengths(train.items, train.distinct, ctx)
        batches, held_out = train.training(batch, lengths, seed), valid.each(batch, lengths)
        steps = steps or epochs * len(batches)
        eval_every = eval_every or len(batches)

        torch.manual_seed(seed)
        encoder = pretrained.encoder if pretrained else Encoder(tokenizer.vocab, **SIZES[size])
        task = tasks.OBJECTIVES[benchmark.kind](encoder, tokenizer, name, reader.labels, ctx).to(device)
        describe(task=f"{name}, {benchmark.kind}, from {ckpt if pretrained else 'scratch'}", data=facts,
                 **({"labels": f"{len(reader.labels):,}: {data.listed(reader.labels, 8)}"} if reader.labels else {}),
                 tokenizer=f"{tokenizer.vocab:,} entries",
                 samples=f"ctx {ctx}, padded to {', '.join(map(str, lengths))}; {workers} processes tokenise ahead",
                 validation=describe_encoding(valid))
        describe_training(task, f"{encoder.config['layers']} x {encoder.config['d']}", device, output_path, steps,
                          steps / len(batches), "linear", batch=batch, lr=lr, seed=seed, accumulate=accumulate,
                          eval_every=eval_every)
        metrics = tasks.train(task, batches, held_out, output, state, split=valid,
                              settings=settings, steps=steps, lr=lr, decay=tasks.linearly, accumulate=accumulate,
                              eval_every=eval_every, workers=workers)
        result = dict(output=output_path, task=name, steps=steps, parameters=sum(p.numel() for p in task.parameters()),
                      **{f"valid_{key}": value for key, value in metrics.items()})
        if "test" in reader.splits:
            test = reader.splits["test"]
            try:
                scores, _ = tasks.evaluate(task, test.each(batch, lengths), test, workers)
            except KeyboardInterrupt as interrupt:
                code = 143 if isinstance(interrupt, Terminated) else 130
                raise Problem(f"interrupted: {output_path} is written; `codessm evaluate {name} --ckpt {output_path} "
                              f"--data {reader.path}` scores the test split", code) from None
            output.record(step=steps, **{f"test_{key}": value for key, value in scores.items()})
            result |= {f"test_{key}": value for key, value in scores.items()}
    result |= dict(seconds=round(time.monotonic() - started, 1), peak_memory=peak_memory(device))
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(f"{output_path}: {steps:,} steps in {result['seconds']:.0f} s, peak memory "
                   f"{data.size(result['peak_memory'])}")
        click.echo(f"valid  {shown(metrics, benchmark.metric)}")
        if "test" in reader.splits:
            click.echo(f"test   {shown(scores, benchmark.metric)}")


def load_for(name: str, path: str, device: torch.device) -> nn.Module:
    """The model of a checkpoint, which must be one for this task; raises `Problem`."""
    model = load(path, device)
    if name == "mlm" and model.name == "mlm":
        return model
    if name == "mlm":
        raise Problem(f"{path} was fine-tuned for {model.name} and no longer predicts masked tokens: give the "
                      "pretrained checkpoint")
    if model.name == "mlm":
        raise Problem(f"{path} is a pretrained encoder: `codessm finetune {name} --ckpt {path}` makes a model for "
                      f"{name} of it")
    ours, theirs = data.TASKS[name], data.TASKS[model.name]
    if ours.kind != theirs.kind or ours.labels and list(ours.labels) != model.labels:
        raise Problem(f"{path} was fine-tuned for {model.name}, which is not the same kind of task as {name}")
    return model


@cli.command(epilog="Example: codessm evaluate devign --ckpt devign.pt --split test --predictions predictions.txt")
@task_argument("mlm")
@options("--ckpt --data --ctx --batch --limit --skip-bad --code-field --text-field --device --workers --json",
         data="The folder (or file) of the benchmark, of mlm a corpus.  [default: ./TASK; mlm: the standard library]",
         ctx="Tokens a function.  [default: as trained; mlm: 256]",
         batch="Samples at a time; the result does not depend on it.")
@click.option("--split", default="test", show_default=True, type=click.Choice(data.SPLITS),
              help="Of mlm, test is the whole corpus and valid its held-out 1 %.")
@click.option("--predictions", metavar="FILE", help="Write the predictions, in the form CodeXGLUE's evaluators read.")
def evaluate(name, ckpt, data_path, ctx, batch, limit, skip_bad, code_field, text_field, device, workers, as_json,
             split, predictions):
    """Score a checkpoint on a split of TASK, or on a corpus.

    TASK: one of those of finetune, or mlm, which predicts masked tokens of a corpus with a pretrained checkpoint.
    """
    if predictions is not None and name == "mlm":
        raise click.UsageError("--predictions is for the other tasks than mlm")
    if name != "mlm" and (code_field or text_field):
        raise click.UsageError("--code-field and --text-field are for mlm")
    started, device, workers = time.monotonic(), choose_device(device), default_workers(workers)
    model = load_for(name, ckpt, device)
    if predictions is not None:
        data.check_writable(predictions, "--predictions")
        if os.path.exists(predictions):
            raise Problem(f"{predictions} exists: give --predictions another name, or remove it")
    if name == "mlm":
        sources = data.find_sources([data_path]) if data_path is not None else [data.standard_library()]
        corpus = data.Corpus(sources, code_field, text_field, limit, skip_bad)
        records = {"test": np.arange(len(corpus)), "valid": corpus.held_out, "train": corpus.train}[split]
        if not len(records):
            raise Problem(f"the {split} split of {data_path} is empty")
        ctx, part = ctx or 256, None
        samples = data.Samples(corpus, model.tokenizer, ctx)
        lengths = data.static_lengths(samples, records, ctx)
        batches = data.Batches(samples, records, batch, lengths, model.tokenizer.pad)
        facts, count = f"{len(corpus):,} records" + (f"; {corpus.bad:,} bad lines passed over" if corpus.bad else ""), \
            len(records)
    else:
        reader = data.Reader(name, data_path or name, wanted=[split], required=[split], labels=model.labels,
                             limit=limit, skip_bad=skip_bad)
        ctx, part, facts = ctx or model.ctx, reader.splits[split], describe_data(reader)
        count = len(part)
        if not len(part.prepare(model.tokenizer, ctx)):
            raise Problem(f"the {split} split has no labelled token")
        lengths = data.static_lengths(part.items, part.distinct, ctx)
        batches = part.each(batch, lengths)
        facts += f"; {describe_encoding(part)}"
    describe(data=facts, samples=f"ctx {ctx}, padded to {', '.join(map(str, lengths))}")
    metrics, outputs = tasks.evaluate(model, batches, part, workers)
    if not all(map(math.isfinite, metrics.values())):
        if name == "mlm" and not outputs[-1]:
            raise Problem(f"{data_path}: nothing could be predicted: the corpus is too small")
        raise Problem(f"{ckpt}: {NOT_NUMBERS}", 1)
    if predictions is not None:
        with data.atomic(predictions) as file:
            file.writelines(line.encode("utf-8", "replace") + b"\n" for line in model.lines(outputs, part))
    result = dict(task=name, split=split, examples=count, **metrics, encoded=len(batches.records),
                  seconds=round(time.monotonic() - started, 1), peak_memory=peak_memory(device))
    if as_json:
        click.echo(json.dumps(result))
    else:
        sentence = mlm_sentence(metrics) if name == "mlm" else shown(metrics, data.TASKS[name].metric)
        click.echo(f"{name} {split}, {count:,} examples in {result['seconds']:.0f} s: {sentence}")


NOT_NUMBERS = "what the model says is no number: its training went wrong, try a lower --lr"
PREDICT = 4096  # records at a time


@cli.command(epilog="Example: codessm predict --ckpt devign.pt functions.jsonl > predictions.jsonl")
@click.argument("files", nargs=-1)
@options("--ckpt --ctx --batch --device", ctx="Tokens a function.  [default: as trained]",
         batch="Samples at a time; the result does not depend on it.")
def predict(files, ckpt, ctx, batch, device):
    """Predict for FILES: JSONL, source files, folders of source files, or - (the default), JSONL on standard input.

    A line of JSONL comes out for each that goes in, in the same order, with what else it held and `prediction` and
    `probabilities` (of a pair `prediction` and `score`, of retrieval `score`, the cosine of text and code, of tagging
    `predictions`, one a token). For a source file a line comes out with its `path`.
    """
    device = choose_device(device)
    model = load(ckpt, device)
    if model.name == "mlm":
        raise Problem(f"{ckpt} is a pretrained encoder, which predicts nothing yet: fine-tune it first")
    ctx = ctx or model.ctx
    parse = partial(data.parse_example, data.prediction_task(model.name), labelled=False)
    for path, source, hidden in data.prediction_sources(files or ["-"], model.name):
        if not os.path.getsize(source.path):
            continue
        records = data.Records([source], parse)
        for start in range(0, len(records), PREDICT):
            rows = np.arange(start, min(start + PREDICT, len(records)))
            split = data.unlabelled(model.name, records, rows).prepare(model.tokenizer, ctx)
            batches = split.each(batch, data.static_lengths(split.items, split.distinct, ctx, 256))
            with torch.no_grad(), closing(batches.stream(stop=len(batches))) as stream:
                bar = data.progress(stream, total=len(batches), desc=f"{path}, from record {start + 1:,}",
                                    leave=False, unit=" batches", unit_scale=False)
                for row, result in zip(rows, model.results(bar, split)):
                    kept = data.parse_json(records.line(row))
                    try:
                        json.dumps(result, allow_nan=False)
                    except ValueError:
                        raise Problem(f"{ckpt}: {NOT_NUMBERS}", 1) from None
                    click.echo(json.dumps({k: v for k, v in kept.items() if k not in hidden} | result))


@cli.command(epilog="Example: codessm corpus ~/projects -o corpus.jsonl")
@click.argument("paths", nargs=-1)
@click.option("--task", type=click.Choice(data.MADE), help="Make a benchmark of the Python files instead.")
@click.option("-o", "output_path", metavar="FILE|DIR",
              help="The JSONL file to write, with --task the folder.  [default: standard output; with --task ./TASK]")
def corpus(paths, task, output_path):
    """Turn source trees into a corpus: JSONL with a record a Python function, or a file otherwise.

    PATHS: folders and files; without any, the Python standard library. Docstrings stand apart from the
    code, exact duplicates are dropped; hidden, vendored and installed folders below PATHS are left out.

    --task advtest makes a benchmark for code search of docstrings and functions, obfuscated where they are ranked;
    --task typeinf one for type inference of the annotations. `codessm finetune` reads them.
    """
    paths = paths or [data.STANDARD_LIBRARY]
    if task:
        data.build_benchmark(task, paths, output_path or task)
        return
    if output_path is None:
        data.build_corpus(paths, sys.stdout.buffer)
        return
    data.check_writable(output_path)
    if os.path.exists(output_path) and not data.starts_with(output_path, b'{"code": '):
        raise Problem(f"{output_path} exists and is no corpus that this command wrote: give another -o")
    with data.atomic(output_path) as file:
        data.build_corpus(paths, file)


if __name__ == "__main__":
    cli()
