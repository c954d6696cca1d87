"""CodeSSM: a bidirectional gated state-space encoder of source code, linear in length.

    codessm pretrain corpus.jsonl --ctx 256 -o model.pt
    python codessm.py pretrain corpus.jsonl

The encoder is BiGS (Wang et al. 2023, arXiv 2212.10544) over S4D kernels (Gu et al. 2022,
arXiv 2206.11893), as in CodeSSM (Verma et al. 2025, arXiv 2505.01475). Shapes and symbols:

    B  batch      L  length in tokens      d  model width
    c  length of a chunk                   n  chunks a sequence, n c >= L
    k  S4D kernels a direction             m  chunks whose states are one product, at most `GROUP`
    N  complex modes of an S4D kernel: A, C, and A-bar, C-bar after discretisation with step Delta
    T, E, O, W  the convolution as matrix products: within a chunk, into the state, out of it, across chunks

Complex numbers are parameters, states and matrices as pairs of reals; only `kernels` reckons with them as such.
"""
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import time
import zlib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

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
from torch.nn.functional import pad

import data
import tasks
from data import Problem, Tokenizer, say
from tasks import MLM, save  # noqa: F401  save is the other half of load

__version__ = "0.1.0"

SIZES = {"base": dict(d=1024, layers=12), "small": dict(d=512, layers=6), "tiny": dict(d=128, layers=4)}
HELD_OUT = 1024  # records that an evaluation during pretraining reads at most


class S4D(nn.Module):
    """The parameters of a diagonal state-space kernel, one for all channels (Gu et al. 2022, section 3).

        A-bar = exp(Delta A)     C-bar = C (A-bar - 1) / A     K[l] = Re sum_n C-bar_n A-bar_n^l
        y = K * u + D u

    Of several `kernels`, each for as many channels as the others, every parameter has a dimension of them in front.
    """

    def __init__(self, N: int = 64, kernels: int = 1):
        super().__init__()
        k = (kernels,) if kernels > 1 else ()
        self.A_re = nn.Parameter(torch.full((*k, N), -0.5))
        self.A_im = nn.Parameter((math.pi * torch.arange(N)).expand(*k, N).clone())
        self.C = nn.Parameter(torch.randn(*k, N, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(*k, 1))
        self.log_step = nn.Parameter(torch.empty(*k, 1).uniform_(math.log(0.01), math.log(1.0)))


class Kernels(NamedTuple):
    """A layer's convolutions as matrices, k of each direction: those of the forward one first, which are causal.

    Where a sequence is a single chunk there is only T, without O; where it is convolved by FFT there is only K.
    """
    TO: torch.Tensor | None = None  # (2k, c, c + 2N): T within a chunk, O out of the state, modes as Re, Im, Re, Im ...
    E: torch.Tensor | None = None  # (2k, 2N, c): into the state
    A: torch.Tensor | None = None  # (2k, N, 2), float32: A-bar^c, across one chunk
    W: torch.Tensor | None = None  # (2k N, 2, m + 1, 2, m + 1), float32: across m chunks; without gradients, A has them
    K: torch.Tensor | None = None  # (2k, L): the kernels, D included


def kernels(A_re: torch.Tensor, A_im: torch.Tensor, C: torch.Tensor, D: torch.Tensor, log_step: torch.Tensor,
            c: int, n: int, dtype: torch.dtype, fft: bool = False, causal: bool = False) -> Kernels:
    """The `Kernels` of all layers for n chunks of c tokens, with a dimension of layers in front; TO and E in `dtype`.

    The parameters are those of `S4D`, stacked to (layers, 2k, ...); `causal`, both directions are. The powers A-bar^l
    are exp(l Delta A) in complex128, rounded once: at l = 2,048 a float32 phase is wrong in its second digit.
    """
    device, narrow = C.device, C.dtype.to_complex()
    wide = dict(dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    A = torch.complex(A_re.to(**wide).clamp(max=-1e-4), A_im.to(**wide))
    z = log_step.to(**wide).exp() * A  # Delta A
    C_bar = (torch.view_as_complex(C.to(**wide)) * (torch.expm1(z) / A)).to(narrow)[..., None]

    def powers(l: torch.Tensor) -> torch.Tensor:
        """A-bar^l = exp(l z), (layers, 2k, N, len(l))."""
        return torch.exp(z[..., None] * l).to(narrow)

    def reals(Z: torch.Tensor) -> torch.Tensor:
        """(..., 2N, l): Re, Im, Re, Im ... of Z (..., N, l)."""
        return torch.view_as_real(Z).movedim(-1, -2).flatten(-3, -2)

    def both(forward: torch.Tensor, mirrored: Callable) -> torch.Tensor:
        """The same for the backward direction, mirrored in time."""
        if causal:
            return forward
        forward, backward = forward.chunk(2, 1)
        return torch.cat([forward, mirrored(backward)], 1)

    P = powers(torch.arange(c + 1, device=z.device))
    W = C_bar * P
    K = W.real[..., :c].sum(-2) + pad(D.to(z.device), (0, c - 1))
    if fft:
        return Kernels(K=K.to(device))
    T = both(Toeplitz.apply(K), lambda T: T.flip(-2, -1))
    if n == 1:
        return Kernels(T.to(device, dtype))
    # (2N, c): A-bar^(c - 1 - j)
    E = both(reals(P[..., :c]).flip(-1), lambda E: E.flip(-1))
    # (c, 2N): Re(C-bar A-bar^(i + 1) H) = O [Re H, Im H]
    O = both(reals(W[..., 1:].conj_physical()).mT, lambda O: O.flip(-2))
    with torch.no_grad():
        across = Toeplitz.apply(powers(c * torch.arange(min(n, GROUP) + 1, device=z.device)))
        re, im = across.real, across.imag
        # complex numbers as real blocks: [[Re, -Im], [Im, Re]]
        blocks = torch.stack([torch.stack([re, -im], -2), torch.stack([im, re], -2)], -4).flatten(1, 2)
    return Kernels(torch.cat([T, O], -1).to(device, dtype), E.to(device, dtype),
                   torch.view_as_real(P[..., c]).to(device), blocks.to(device))


class Toeplitz(torch.autograd.Function):
    """The lower-triangular T (..., c, c) of k (..., c), T[i, j] = k[i - j]; dk[l] = sum_i dT[i, i - l]."""

    @staticmethod
    def forward(ctx, k: torch.Tensor) -> torch.Tensor:
        c = k.shape[-1]
        # row i of a (c, 2c - 1) view of a repeated period of 2c begins i places earlier in the period
        period = torch.cat([k[..., :1], torch.zeros_like(k), k[..., 1:].flip(-1)], -1)
        rows = period[..., None, :].expand(*k.shape, 2 * c).flatten(-2)[..., :c * (2 * c - 1)]
        return rows.unflatten(-1, (c, 2 * c - 1))[..., :c]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        c = grad.shape[-1]
        # with c zeros before each row, l counts from the right in rows that begin one place later each
        rows = pad(grad, (c, 0))
        return rows.as_strided(grad.shape, (*rows.stride()[:-2], 2 * c + 1, 1), 1).sum(-2).flip(-1)


def convolve(u: torch.Tensor, kernels: Kernels, causal: bool = False) -> torch.Tensor:
    """y = K * u + D u, forwards for u[:k] and backwards (unless `causal`) for u[k:]; both (2k, c, n, B, d / k).

    In chunks by `Convolution`; by FFT, which takes the sequence as one chunk, the product with the spectrum of K.
    """
    if kernels.K is None:
        return Convolution.apply(u, kernels.TO, kernels.E, kernels.A, kernels.W, causal)
    c = u.shape[1]
    forward, backward = torch.fft.rfft(kernels.K, n=2 * c).chunk(2)
    spectrum = torch.cat([forward, backward if causal else backward.conj()])[:, None, None, None]
    y = torch.fft.rfft(u.to(kernels.K.dtype).movedim(1, -1), n=2 * c) * spectrum
    return torch.fft.irfft(y, n=2 * c)[..., :c].movedim(-1, 1).to(u.dtype)


class Convolution(torch.autograd.Function):
    """y of u, both (2k, c, n, B, d / k): T u where there is one chunk, or through the states H before each chunk:

        S = E u     H_(j + 1) = A-bar^c H_j + S_j  (`carry`)     y = [T O] [u, H]

    Its gradients are found by the same products, and the states' by the recurrence run the other way:

        [T^T dy, dH] = [T O]^T dy     dS_j = conj(A-bar^c) dS_(j + 1) + dH_(j + 1)     du = T^T dy + E^T dS

    That of A-bar^c is sum_j dS_j conj(H_j), and its powers W need none. They cannot be differentiated again.
    """

    @staticmethod
    def forward(ctx, u: torch.Tensor, TO: torch.Tensor, E: torch.Tensor | None, A: torch.Tensor | None,
                W: torch.Tensor | None, causal: bool) -> torch.Tensor:
        shape, (c, n) = u.shape, u.shape[1:3]
        u = u.reshape(*u.shape[:2], -1)
        if E is not None:
            # H is read with u and kept with it (compiled, a write to a slice would copy the whole)
            uH = u.new_empty(len(u), c + E.shape[1], u.shape[-1])
            uH.as_strided(u.shape, uH.stride()).copy_(u)
            S = torch.bmm(E, uH[:, :c])
            H = uH.as_strided(S.shape, uH.stride(), c * S.shape[-1])
            H.copy_(carry(S.view(len(W), 2, n, -1), W, (False, not causal)).view(S.shape))
            u = uH
        ctx.save_for_backward(u, TO, E, W)
        ctx.causal = causal
        return torch.bmm(TO, u).view(shape)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, TO, E, W = ctx.saved_tensors
        shape, (c, n) = dy.shape, dy.shape[1:3]
        dy = dy.reshape(*dy.shape[:2], -1)
        du, dTO = torch.bmm(TO.mT, dy), outer(dy, u)
        if E is None:
            return du.view(shape), dTO, None, None, None, None
        # (the blocks of W transposed are those of the conjugate)
        dS = carry(du[:, c:].reshape(len(W), 2, n, -1), W.transpose(1, 3), (True, ctx.causal))
        dS = dS.view(*E.shape[:2], -1)
        (S_re, S_im), (H_re, H_im) = (states.unflatten(1, (-1, 2)).to(W.dtype).unbind(2) for states in (dS, u[:, c:]))
        dA = torch.stack([(S_re * H_re + S_im * H_im).sum(-1), (S_im * H_re - S_re * H_im).sum(-1)], -1)
        return (du[:, :c] + torch.bmm(E.mT, dS)).view(shape), dTO, outer(dS, u[:, :c]), dA, None, None


def outer(dy: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """dy u^T (2k, r, q) of dy (2k, r, l) and u (2k, q, l), in their dtype; l is by far the largest.

    It is a sum over eight parts of l: one product of so few rows and columns would not fill a GPU.
    """
    parts = math.gcd(8, u.shape[-1])
    sides = ([side.unflatten(-1, (parts, -1)).transpose(0, 1) for side in pair] for pair in zip(dy, u))
    return torch.stack([torch.bmm(dy, u.mT).sum(0) for dy, u in sides])


def carry(S: torch.Tensor, W: torch.Tensor, backwards: tuple[bool, bool]) -> torch.Tensor:
    """The states before each chunk from each chunk's own contributions S, both (2k N, 2, n, ...), in S's dtype.

    H_i = sum_(j < i) A-bar^(c (i - 1 - j)) S_j, or (j > i) of j - 1 - i in the halves of the kernels that run
    `backwards`. Up to m chunks are one product, in which each power of A-bar^c is rounded once and nothing adds up from
    chunk to chunk. More chunks go m at a time, in float32, with the state before them: the cost is linear in n.
    """
    n, m, dtype, states = S.shape[2], W.shape[-1] - 1, S.dtype, []

    def in_time(M: torch.Tensor, *dims: int) -> torch.Tensor:
        return torch.cat([half.flip(dims) if back else half for half, back in zip(M.chunk(2), backwards)])

    with torch.autocast(S.device.type, enabled=False):
        if n <= m:
            W = in_time(W[:, :, :n, :, 1:n + 1], 2, 4).flatten(3).flatten(1, 2)
            return torch.bmm(W.to(dtype), S.flatten(1, 2)).view(S.shape)
        H = torch.zeros_like(S[:, :, :1], dtype=W.dtype)
        for S in in_time(S.to(W.dtype), 2).split(m, 2):
            S = torch.cat([H, S], 2)
            rows = S.shape[2]
            A = W[:, :, :rows, :, :rows].flatten(3).flatten(1, 2)
            H = torch.bmm(A, S.flatten(1, 2)).unflatten(1, (2, rows))
            states.append(H[:, :, :-1])
            H = H[:, :, -1:]
        return in_time(torch.cat(states, 2).to(dtype), 2)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x), the exact one; of bfloat16 compiled for a GPU by `Gelu`."""
    fast = x.is_cuda and x.dtype == torch.bfloat16 and torch.compiler.is_compiling()
    return Gelu.apply(x) if fast else nn.functional.gelu(x)


class Gelu(torch.autograd.Function):
    """x Phi(x) and its derivative by one exponential, where erf would take longer than memory does.

    Phi(x) = sigmoid(z), z = log(Phi(x) / Phi(-x)) = x q(x^2), q of degree 2 fitted to |x| < 4.5 and constant beyond.
    The errors are below 4e-5 and 2e-4; rounding to bfloat16 errs by up to 4e-3 of a value.
    """
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        # a copy, as dynamo of torch 2.11 gets the gradients wrong where a cast does nothing
        return (wide * sigmoid(wide)[1]).to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        x = ctx.saved_tensors[0].float()
        t, s = sigmoid(x)
        dz = Q0 + t * (3 * Q1 + t * (5 * Q2))
        return (grad.float() * (s + x * dz * (s - s * s))).to(grad.dtype)


Q0, Q1, Q2 = 1.5948888, 0.074158467, -0.00073317494  # q(t) = Q0 + Q1 t + Q2 t^2


def sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """t = min(x^2, 4.5^2) and 1 / (1 + e^-z) of z = x q(t), of float32 x; where e^-z is beyond float32, 0."""
    t = (x * x).clamp(max=4.5 ** 2)
    e = torch.exp2(-math.log2(math.e) * x * (Q0 + t * (Q1 + t * Q2)))
    return t, torch.rsqrt(1 + e).square()  # on a GPU one instruction, a quotient takes several


class Layer(nn.Module):
    """One BiGS layer (Wang et al. 2023, section 3.2).

        X  = LayerNorm(Xi)
        V  = gelu(Wv X)  (3d)     F = gelu(Wf X)  (d)     B = gelu(Wb X)  (d)
        U1 = Wu1 SSM_forward(F)   U2 = Wu2 SSM_backward(B)
        U  = gelu(Wu (U1 * U2))  (3d)
        Xo = Xi + Wo (U * V)

    No flip is carried out: a linear map commutes with it, so the backward path is the same map followed
    by an anti-causal SSM. The variants of the papers:

        kernels   so many S4D kernels a direction, each for d / kernels neighbouring channels
        causal    both SSMs run forwards
        fourier   `fourier` in place of the SSMs
        local     beside each SSM a convolution of so many tokens, added to it; 0 at the start
        dropout   the share that is dropped of U1 * U2 and of U * V
    """

    def __init__(self, d: int, N: int = 64, kernels: int = 1, causal: bool = False, fourier: bool = False,
                 local: int = 0, dropout: float = 0):
        super().__init__()
        self.kernels, self.causal, self.fourier = kernels, causal, fourier
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.v, self.fb = nn.Linear(d, 3 * d), nn.Linear(d, 2 * d)  # Wf and Wb in one product
        if not fourier:
            self.forward_ssm, self.backward_ssm = S4D(N, kernels), S4D(N, kernels)
        self.local = nn.ModuleList(ShortConvolution(d, local) for _ in range(2)) if local else None
        for convolution in self.local or ():
            nn.init.zeros_(convolution.weight)
        self.u1, self.u2 = nn.Linear(d, d), nn.Linear(d, d)
        self.u = nn.Linear(d, 3 * d)
        self.o = nn.Linear(3 * d, d)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, X: torch.Tensor, R: torch.Tensor, kernels: Kernels,
                mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Xi = X + R and Xo - Xi, all (c, n, B, d), floating; `mask` (c, n, B, 1), bool, is False at padding.

        The mask keeps padding out of the SSMs, the one place where positions meet. Tokens stand as (c, n, B), the order
        in which one matrix product convolves all chunks. What a layer adds to X is added by the next, whose norm reads
        X anyway; without gradients Xi takes X's memory. V comes last: it need not wait in memory.
        """
        c, n, B, d = X.shape
        X = X + R if torch.is_grad_enabled() else X.add_(R)
        x = self.norm(X).view(-1, d)
        FB = gelu(self.fb(x))
        if mask is not None:
            FB = FB * mask.reshape(-1, 1)
        u = FB.view(c, n, B, 2 * self.kernels, -1).permute(3, 0, 1, 2, 4)
        y = fourier(u) if self.fourier else convolve(u, kernels, self.causal)
        y = y.unflatten(0, (2, -1)).movedim(1, -2).reshape(2, -1, d)
        if self.local is not None:
            forward, backward = FB.view(c, n, B, 2 * d).permute(2, 1, 0, 3).flatten(1, 2).chunk(2, -1)
            near = self.local[0](forward), self.local[1](backward, backward=not self.causal)
            y = y + torch.stack([in_chunks(side, (n, c)).view(-1, d) for side in near])
        W, b = (torch.stack([getattr(u, name) for u in (self.u1, self.u2)]) for name in ("weight", "bias"))
        U = self.u(self.drop(Gate.apply(y, W.to(y.dtype), b)))
        return X, self.o(self.drop(gelu(U) * gelu(self.v(x)))).view(X.shape)

    @staticmethod
    def given(encoder: nn.Module, X: torch.Tensor) -> list[Kernels]:
        """The `Kernels` of each layer of an encoder for X (c, n, B, d), made for all layers at once, or `kept`."""
        (c, n), layers, kept = X.shape[:2], encoder.layers, encoder.kept
        if layers[0].fourier:
            return [Kernels()] * len(layers)
        if kept and (c, n) in kept:
            return kept[c, n]
        ssms = [ssm for layer in layers for ssm in (layer.forward_ssm, layer.backward_ssm)]
        several = layers[0].kernels > 1  # (then each parameter has a dimension of them, which joins that of directions)
        stacked = (torch.stack([getattr(ssm, name) for ssm in ssms]).unflatten(0, (-1, 2)).flatten(1, 1 + several)
                   for name in ("A_re", "A_im", "C", "D", "log_step"))
        matrices = kernels(*stacked, c, n, compute_dtype(X), encoder.fft, layers[0].causal)
        made = [Kernels(*given) for given in
                zip(*(itertools.repeat(None) if M is None else M.unbind() for M in matrices))]
        if kept is not None:
            held = sum(M.nbytes for each in (made, *kept.values()) for given in each for M in given if M is not None)
            if held <= MOST_KEPT:
                kept[c, n] = made
        return made


class Gate(torch.autograd.Function):
    """U1 * U2 (m, d) of y (2, m, d), U_i = W_i y_i + b_i; W (2, d, d) in y's dtype, b (2, d), float32."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        U = torch.bmm(y, W.mT)
        ctx.save_for_backward(y, W, b, U)
        return ((U[0] + b[0]) * (U[1] + b[1])).to(y.dtype, copy=True)  # a copy, as in `Gelu`

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, W, b, U = ctx.saved_tensors
        dU = (grad * (U + b[:, None])).flip(0)  # (a flip of U alone the compiled forward would make, and keep)
        db, dU = dU.sum(1), dU.to(y.dtype)
        return torch.bmm(dU, W), torch.bmm(dU.mT, y), db


def fourier(u: torch.Tensor) -> torch.Tensor:
    """Re(FFT(u)) / sqrt(L) along the sequence, for u[1] with a flip before and after; both (2, L, 1, B, d).

    It spans padding too, so the result does depend on how far a batch is padded.
    """
    with torch.autocast(u.device.type, enabled=False):
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        wide = torch.stack([wide[0], wide[1].flip(0)])
        y = torch.fft.fft(wide, dim=1, norm="ortho").real
        return torch.stack([y[0], y[1].flip(0)]).to(u.dtype)


class ShortConvolution(nn.Module):
    """A depthwise convolution of a few tokens: y[t] = sum_(j < width) w[j] u[t - j] + b, w (width, channels)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, channels)), nn.Parameter(torch.zeros(channels))
        nn.init.uniform_(self.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, u: torch.Tensor, backward: bool = False) -> torch.Tensor:
        """y (B, L, channels) of u, in its dtype; `backward`, of u[t + j]. What is beyond the ends counts as 0."""
        L, width = u.shape[1], len(self.weight)
        u = pad(u, (0, 0, 0, width - 1) if backward else (0, 0, width - 1, 0))
        w = self.weight if backward else self.weight.flip(0)
        return (self.bias + sum(w[j] * u[:, j:j + L] for j in range(width))).to(u.dtype)


class TransformerLayer(nn.Module):
    """A layer of BERT (Devlin et al. 2019; post-norm, as in Vaswani et al. 2017), with heads of 64.

        X' = LayerNorm(Xi + Wo softmax(q k^T / 8) v)     Xo = LayerNorm(X' + W2 gelu(W1 X'))

    `rotary`, it is one of RoFormer (Su et al. 2021, arXiv 2104.09864, equation 34): q and k are rotated first. There is
    no dropout.
    """
    plain = False  # attention with the (L, L) matrices in memory, as the papers' transformers have it

    def __init__(self, d: int, _N: int = 0, rotary: bool = True):
        super().__init__()
        self.rotary = rotary
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-12), nn.LayerNorm(d, eps=1e-12)

    def forward(self, X: torch.Tensor, rotation: torch.Tensor | None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Xo (B, L, d) of Xi (B, L, d), floating; rotation (2, L, 32) cosines and sines; mask (B, L, 1), bool."""
        q, k, v = heads(self.qkv(X), rotation)
        mask = None if mask is None else mask.mT[:, None]
        if self.plain:
            scores = q @ k.mT / 8
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            Y = scores.softmax(-1).to(v.dtype) @ v
        else:
            Y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        X = self.norm1(X + self.out(Y.transpose(1, 2).flatten(2)))
        return self.norm2(X + self.down(gelu(self.up(X))))

    @staticmethod
    def given(encoder: nn.Module, X: torch.Tensor) -> list[torch.Tensor | None]:
        """The rotation, the same for each layer."""
        return [rotation(X) if encoder.layers[0].rotary else None] * len(encoder.layers)


def heads(qkv: torch.Tensor, rotation: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v (B, heads, L, 64) of their projections (B, L, 3 x 64 heads), q and k rotated."""
    q, k, v = qkv.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
    return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)


def rotation(X: torch.Tensor) -> torch.Tensor:
    """(2, L, 32): cosines and sines of the angles i 10000^(-e / 32) of the pairs (x_e, x_(e + 32)) at position i."""
    angle = torch.arange(X.shape[1], device=X.device)[:, None] * 10_000 ** (-torch.arange(32, device=X.device) / 32)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x (B, heads, L, 64), each pair turned by its angle; rotation (2, L, 32) in cosines and sines."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class ZambaLayer(nn.Module):
    """A Mamba-2 layer (Dao and Gu 2024, arXiv 2405.21060, section 7), in Zamba2 (arXiv 2411.15242); causal.

        X  = RMSNorm(Xi)     z, u, dt = Win X  (2d, 2d + 2N, heads)     dt = softplus(dt + bias)
        x, B, C = silu(conv4(u))  (2d, N, N)     y = SSD(x, dt, A, B, C) + D x     A = -exp(A_log), a number a head
        Xo = Xi + Wout RMSNorm(y * silu(z))

    A layer with an `adapter` calls one of the shared blocks first: X = RMSNorm(Xi + W block(Xi)). As padding is on
    the right, nothing needs the mask.
    """
    CHUNK = 64

    def __init__(self, d: int, N: int = 64):
        super().__init__()
        H = 2 * d // 64
        self.widths, self.state = [2 * d, 2 * d + 2 * N, H], [2 * d, N, N]
        self.norm, self.gated_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(2 * d, eps=1e-5)
        self.into, self.out = nn.Linear(d, sum(self.widths), bias=False), nn.Linear(2 * d, d, bias=False)
        self.convolution = ShortConvolution(2 * d + 2 * N, 4)
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        step = torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.D = nn.Parameter(torch.ones(H))
        self.adapter = self.linear = None

    @staticmethod
    def share(layers: nn.ModuleList, d: int) -> nn.ModuleList:
        """Gives every third layer its own adapter, of rank d / 8, and linear map; returns the blocks they share.

        These are two, used alternately, or one where there are fewer than four such layers.
        """
        for layer in layers[2::3]:
            layer.adapter = nn.Sequential(nn.Linear(d, d // 8, bias=False), nn.Linear(d // 8, 8 * d, bias=False))
            layer.linear = nn.Linear(d, d, bias=False)
        return nn.ModuleList(SharedBlock(d) for _ in range(2 if len(layers) >= 12 else 1))

    @staticmethod
    def given(encoder: nn.Module, X: torch.Tensor) -> list[tuple | None]:
        """For a layer that calls a shared block the embedding, the rotation and that block."""
        angles, blocks = rotation(X), itertools.cycle(encoder.shared)
        return [None if layer.adapter is None else (X, angles, next(blocks)) for layer in encoder.layers]

    def forward(self, X: torch.Tensor, given: tuple | None, _mask: torch.Tensor | None = None) -> torch.Tensor:
        """Xo (B, L, d) of Xi (B, L, d), floating."""
        x = X
        if given is not None:
            embedding, rotation, block = given
            x = X + self.linear(block(X, embedding, rotation, self.adapter))
        z, u, dt = self.into(self.norm(x)).split(self.widths, -1)
        x, B, C = nn.functional.silu(self.convolution(u)).split(self.state, -1)
        x = x.unflatten(-1, (-1, 64))  # (B, L, heads, 64)
        dt = nn.functional.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # (B, L, heads), float32
        y = ssd((x * dt[..., None]).to(x.dtype), -self.A_log.exp() * dt, B, C, self.CHUNK)
        y = (y + self.D[:, None] * x).flatten(2) * nn.functional.silu(z)
        return X + self.out(self.gated_norm(y.to(X.dtype)))


class SharedBlock(nn.Module):
    """The attention and MLP that layers of Zamba2 share (arXiv 2411.15242, section II), on X beside the embedding.

        X' = RMSNorm([X, embedding])  (2d)     Y = RMSNorm(Wo softmax(q k^T / sqrt(32)) v)  (d), rotary and causal
        g, u = Wup Y + adapter(Y)  (4d, 4d)    Wdown (gelu(g) * u)  (d)
    """

    def __init__(self, d: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(2 * d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.qkv, self.out = nn.Linear(2 * d, 6 * d, bias=False), nn.Linear(2 * d, d, bias=False)
        self.up, self.down = nn.Linear(d, 8 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, X: torch.Tensor, embedding: torch.Tensor, rotation: torch.Tensor,
                adapter: nn.Module) -> torch.Tensor:
        """(B, L, d) of X and the embedding, both (B, L, d)."""
        q, k, v = heads(self.qkv(self.norm1(torch.cat([X, embedding], -1))), rotation)
        Y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=32 ** -0.5)
        Y = self.norm2(self.out(Y.transpose(1, 2).flatten(2)).to(X.dtype))
        gate, up = (self.up(Y) + adapter(Y)).chunk(2, -1)
        return self.down(gelu(gate) * up)


def ssd(x: torch.Tensor, a: torch.Tensor, B: torch.Tensor, C: torch.Tensor, c: int) -> torch.Tensor:
    """The state-space dual form (Dao and Gu 2024, section 6) of the recurrence of each head

        h_t = exp(a_t) h_(t - 1) + B_t x_t^T  (N, P)     y_t = h_t^T C_t

    as matrix products over chunks of c tokens. x and y (b, L, H, P), a (b, L, H) float32, B and C (b, L, N).
    Decays and sums of states stay in a's dtype; the cost is linear in L.
    """
    b, L, H, P = x.shape
    c = min(c, L)
    n = -(-L // c)
    x, a, B, C = (pad(t, (0, 0) * (t.ndim - 2) + (0, n * c - L)).unflatten(1, (n, c)) for t in (x, a, B, C))
    total = a.cumsum(2)  # (b, n, c, H): of the logarithms of the decays since the chunk began
    within = (C @ B.mT)[:, :, None] * decays(total.movedim(-1, 2))  # (b, n, H, c, c)
    y = (within.to(x.dtype) @ x.transpose(2, 3)).transpose(2, 3)
    if n > 1:
        last = total[:, :, -1]
        S = B.mT @ (x * (last[:, :, None] - total).exp()[..., None]).to(x.dtype).flatten(3)  # (b, n, N, H P)
        before = states(S.unflatten(-1, (H, P)).to(a.dtype), last)
        y = y + (C @ before.to(C.dtype).flatten(3)).unflatten(-1, (H, P)) * total.exp()[..., None]
    return y.flatten(1, 2)[:, :L]


def decays(total: torch.Tensor) -> torch.Tensor:
    """exp(total_i - total_j) at row i and column j <= i, 0 above: (..., c, c) of (..., c)."""
    c = total.shape[-1]
    above = torch.ones(c, c, dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(above, -math.inf).exp()


def states(S: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The states before each chunk of their own contributions S, both (b, n, N, H, P); a (b, n, H), log decays.

    H_(k + 1) = exp(a_k) H_k + S_k, for up to `GROUP` chunks one product, so the cost is linear in n.
    """
    H, found = torch.zeros_like(S[:, :1]), []
    with torch.autocast(S.device.type, enabled=False):
        for S, a in zip(S.split(GROUP, 1), a.split(GROUP, 1)):
            D = decays(pad(a, (0, 0, 1, 0)).cumsum(1).mT)  # (b, H, m + 1, m + 1)
            H = torch.einsum("bhij,bjnhp->binhp", D, torch.cat([H, S], 1))
            found.append(H[:, :-1])
            H = H[:, -1:]
    return torch.cat(found, 1)


class Model(NamedTuple):
    """A model that `--model` names."""
    layer: type
    kernels: int = 0  # S4D kernels a direction, unless others are asked for; 0, it has none
    options: dict = {}  # of the layer
    positions: bool = False  # learned, absolute
    more: int = 0  # layers than the size has


MODELS = {
    "codessm": Model(Layer, 1),
    "codessm-pos": Model(Layer, 1, positions=True),
    "codessm-do": Model(Layer, 1, dict(dropout=0.1)),
    "codessm-uni": Model(Layer, 1, dict(causal=True)),
    "codef": Model(Layer, 0, dict(fourier=True)),
    "codessm-8k": Model(Layer, 8),
    "codessm-hf": Model(Layer, 1, dict(local=3)),
    "bertcoder": Model(TransformerLayer, options=dict(rotary=False), positions=True),
    "rocoder": Model(TransformerLayer),
    "zamba": Model(ZambaLayer, more=2),
}
CHUNK = {"cuda": 512}  # the longest c there; elsewhere 256
GROUP = 64  # m, chunks
MOST_KEPT = 2 ** 28  # bytes


def compute_dtype(X: torch.Tensor) -> torch.dtype:
    """Of matrix products with X: autocast's, else that of X."""
    return torch.get_autocast_dtype(X.device.type) if torch.is_autocast_enabled(X.device.type) else X.dtype


def in_chunks(X: torch.Tensor, chunks: tuple[int, int]) -> torch.Tensor:
    """(c, n, B, d) of X (B, L, d), filled up with zeros where L < n c, chunks being (n, c)."""
    return pad(X, (0, 0, 0, math.prod(chunks) - X.shape[1])).unflatten(1, chunks).permute(2, 1, 0, 3).contiguous()


class InTokens(torch.autograd.Function):
    """X + R (B, n c, d) of X and R (c, n, B, d).

    Its gradients stand in the order of chunks: compiled layers would copy each from the order of tokens.
    """

    @staticmethod
    def forward(ctx, X: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        ctx.chunks, ctx.dtype = (X.shape[1], X.shape[0]), R.dtype
        return (X + R).permute(2, 1, 0, 3).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad = in_chunks(grad, ctx.chunks)
        return grad, grad.to(ctx.dtype, copy=True)  # a copy, as in `Gelu`


class Encoder(nn.Module):
    """Token embedding (of some models with positions), LayerNorm, and the layers; nothing after the last, as in BiGS.

    Args:
        vocab: number of token ids.
        d, layers, N: width, number of layers (zamba has two more), complex modes of a kernel (of zamba its state).
        model: one of `MODELS`.
        kernels: S4D kernels a direction, a divisor of d; None, as many as the model has.
        ctx: the longest sample, of a model with learned positions; the others have no bound.
    Linear maps start at N(0, 0.64 / sqrt(d)) (BiGS's 0.02 at d = 1,024), embeddings at N(0, 0.02).
    `config` holds the arguments; `Encoder(**config)` is the same shape again. Raises ValueError where they do not fit.
    """
    chunk: int | None = None  # the longest c, if not the device's
    fft = False  # convolve by FFT, for comparison
    kept: dict | None = None  # while weights stay as they are, the `Kernels` of all layers by (c, n)

    def __init__(self, vocab: int, d: int, layers: int, N: int = 64, model: str = "codessm",
                 kernels: int | None = None, ctx: int | None = None):
        super().__init__()
        kind = MODELS[model]
        if kind.layer is not Layer and d % (32 if kind.layer is ZambaLayer else 64):
            raise ValueError(f"{model} has heads of 64 channels, which {d} are not a multiple of")
        self.bound = ctx if kind.positions else None
        kernels = count_kernels(model, d, kernels)
        if kind.positions and not ctx:
            raise ValueError(f"{model} has learned positions: ctx says how many")
        self.config = dict(vocab=vocab, d=d, layers=layers, N=N, model=model, kernels=kernels, ctx=self.bound)
        self.embedding = nn.Embedding(vocab, d)
        self.positions = nn.Embedding(ctx, d) if kind.positions else None
        self.norm = nn.LayerNorm(d, eps=1e-12)
        options = kind.options | (dict(kernels=kernels) if kernels else {})
        self.layers = nn.ModuleList(kind.layer(d, N, **options) for _ in range(layers + kind.more))
        self.shared = ZambaLayer.share(self.layers, d) if kind.layer is ZambaLayer else None
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                tasks.initialise(module, d)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (B, L, d), float32, of token ids (B, L), int32 or int64, right-padded.

        `lengths` (B,) counts the real tokens of each row; without it every token is real. What stands
        at padding is unspecified, and no real position depends on it (but of codef, whose DFT spans it). Raises
        `data.Problem` where L is beyond learned positions.
        """
        mask, L = None, ids.shape[1]
        if self.bound and L > self.bound:
            raise Problem(f"{self.config['model']} has learned positions for {self.bound} tokens and cannot read {L}")
        chunks = self.chunks(L, ids.device)
        if lengths is None and chunks and math.prod(chunks) > L:
            lengths = ids.new_full(ids.shape[:1], L)
        if lengths is not None:  # a row without any would leave attention nothing to attend to
            mask = (torch.arange(L, device=ids.device) < lengths[:, None].clamp(min=1))[..., None]
        X = self.embed(ids, chunks)
        if not chunks:
            for layer, given in zip(self.layers, self.given(X)):
                X = layer(X, given, mask)
            return X
        mask = None if mask is None else in_chunks(mask, chunks)
        # (a layer without gradients for it would be compiled apart from the others)
        R = X.new_zeros(X.shape, dtype=compute_dtype(X)).requires_grad_(X.requires_grad)
        for layer, given in zip(self.layers, self.given(X)):
            X, R = layer(X, R, given, mask)
        return self.in_tokens(X, R)[:, :L]

    def embed(self, ids: torch.Tensor, chunks: tuple[int, int] | None = None) -> torch.Tensor:
        """The input of the first layer, float32, of ids (B, L): (B, L, d), or in `chunks` (c, n, B, d)."""
        X = self.embedding(ids)
        X = self.norm(X if self.positions is None else X + self.positions.weight[:ids.shape[1]])
        return in_chunks(X, chunks) if chunks else X

    def in_tokens(self, X: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        """X + R (B, n c, d), both (c, n, B, d)."""
        return InTokens.apply(X, R)

    def chunks(self, L: int, device: torch.device) -> tuple[int, int] | None:
        """(n, c), the chunks in which L tokens are convolved; None of layers that do not convolve so."""
        if not isinstance(self.layers[0], Layer):
            return None
        if self.fft or self.layers[0].fourier:
            return 1, L
        n = -(-L // (self.chunk or CHUNK.get(device.type, 256)))
        return n, -(-L // (8 * n)) * 8  # the matrix units want multiples of 8

    def given(self, X: torch.Tensor) -> list:
        """What each layer needs beside X, by its own account."""
        return type(self.layers[0]).given(self, X)

    def compile_parts(self) -> None:
        """Compile the layers, which share their code and so one compilation a shape, and the embedding.

        Not `kernels`: its gradient takes longer to compile than all the rest, and little time to run as it is.
        """
        for layer in self.layers:
            layer.compile(dynamic=False, fullgraph=True)
        self.embed, self.in_tokens = (torch.compile(part, dynamic=False, fullgraph=True)
                                      for part in (self.embed, self.in_tokens))


def count_kernels(model: str, d: int, kernels: int | None) -> int:
    """S4D kernels a direction of a model of width d, 0 if it has none, `kernels` being asked for; raises ValueError."""
    if kernels and not MODELS[model].kernels:
        raise ValueError(f"{model} has no S4D kernels, which are those of "
                         f"{', '.join(name for name in MODELS if MODELS[name].kernels)}")
    kernels = kernels or MODELS[model].kernels
    if kernels and d % kernels:
        raise ValueError(f"{kernels} cannot share {d} channels equally: give a divisor of {d}")
    return kernels


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a checkpoint (or of the state file of an unfinished run), in evaluation mode.

    It is one of the objectives of tasks.py: `tasks.MLM` with `logits(hidden)`, or what it was fine-tuned for, with
    `labels`. All have `encoder`, which maps ids (B, L) and lengths (B,) to hidden states (B, L, d), and
    `tokenizer`. The file runs no code. Raises `data.Problem`.
    """
    return restore(tasks.read(path), path).to(device).eval()


def restore(content: dict, path: str | os.PathLike) -> nn.Module:
    """The model of what a checkpoint holds, on the CPU; raises `Problem`."""
    try:
        tokenizer = Tokenizer(content["tokenizer"], str(path))
        config, weights = content["config"], content["weights"]
        absent = {name for name in ("kernels", "ctx") if not config.get(name)}  # of models that have none
        if not all(type(size) is int and size > 0 for name, size in config.items() if name not in {"model"} | absent) \
                or config["layers"] > len(weights):
            raise ValueError
        if tokenizer.vocab > config["vocab"]:
            raise Problem(f"{path}: its tokenizer has {tokenizer.vocab:,} entries and its model {config['vocab']:,}: "
                          "they do not belong together")
        with torch.device("meta"):  # shapes alone: the weights come from the file
            model = tasks.build(content, Encoder(**config), tokenizer)
        tasks.fits(weights, model.state_dict())
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise Problem(f"{path}: its weights do not fit its configuration, so it is no whole checkpoint") from None
    return model


BIGS = {"LayerNorm": "norm", "dv": "v", "duc_forward": "u1", "duc_backward": "u2", "dol": "u", "do": "o"}
BIGS_LAYER = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in BIGS.items() for kind in ("weight", "bias")} | {
    f"{theirs}.{name}": f"{ours}.{name.split('.')[-1]}" for theirs, ours in (("fs4", "forward_ssm"),
                                                                            ("bs4", "backward_ssm"))
    for name in ("D", "kernel.C", "kernel.log_step", "kernel.A_re", "kernel.A_im")}
BIGS_REST = {
    "bigs.embeddings.word_embeddings.weight": "encoder.embedding.weight",
    "bigs.embeddings.position_embeddings.weight": "encoder.positions.weight",
    "bigs.embeddings.LayerNorm.weight": "encoder.norm.weight", "bigs.embeddings.LayerNorm.bias": "encoder.norm.bias",
    "cls.predictions.transform.dense.weight": "dense.weight", "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias", "cls.predictions.bias": "bias"}
# heads and embeddings that ours has not; the decoder is the embedding, and its bias is named above
BIGS_OTHER = re.compile(r"bigs\.embeddings\.(token_type_embeddings\.weight|position_ids|token_type_ids)|"
                        r"bigs\.pooler\..*|cls\.predictions\.decoder\.(weight|bias)|(classifier|qa_outputs)\..*")
VOCABULARY = ("encoder.embedding.weight", "bias")  # the weights that belong to a tokenizer


class Weights:
    """The weights of a codessm checkpoint or of a BiGS PyTorch state dict, to start another model from.

    BiGS names its tensors as the reference implementation of arXiv 2212.10544 does; the dict may lie under
    "state_dict" or "model". Raises `data.Problem` where the file is neither, or holds a tensor of another name.
    """

    def __init__(self, path: str):
        if os.path.exists(path) and not os.path.isfile(path):
            raise Problem(f"--init {path} is no file: write what it is to hold to one")
        content = tasks.unpickle(path)
        self.path, self.mark = path, data.open_source(path).mark
        self.tokenizer, self.labels, self.others = None, None, []
        if isinstance(content, dict) and content.get("format") == tasks.FORMAT:
            model = restore(content, path)
            self.config, self.tokenizer = model.encoder.config, model.tokenizer
            self.labels = getattr(model, "labels", None)
            self.theirs = {name: [(name, weight)] for name, weight in model.state_dict().items()}
            return
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not any(isinstance(name, str) and ".fs4." in name for name in content) \
                or any(isinstance(tensor, torch.Tensor) and stretched(tensor) for tensor in content.values()):
            raise Problem(f"--init {path} is neither a codessm checkpoint nor a BiGS state dict, or not a whole one")
        self.config, self.theirs, unknown = None, {}, []
        for name, tensor in content.items():
            name = str(name)
            found = re.fullmatch(r"bigs\.encoder\.layer\.(\d+)\.(.+)", name)
            layer, rest = (f"encoder.layers.{found[1]}.", found[2]) if found else ("", name)
            fused = re.fullmatch(r"du_(?:forward|backward)\.(weight|bias)", rest) if found else None
            if not isinstance(tensor, torch.Tensor):
                unknown.append(name)
            elif fused:  # Wf before Wb
                parts = self.theirs.setdefault(f"{layer}fb.{fused[1]}", [])
                parts.insert(len(parts) if "backward" in rest else 0, (name, tensor))
            elif rest in (BIGS_LAYER if found else BIGS_REST):
                self.theirs[layer + (BIGS_LAYER if found else BIGS_REST)[rest]] = [(name, tensor)]
            elif BIGS_OTHER.fullmatch(name):
                self.others.append(name)
            else:
                unknown.append(name)
        if unknown:
            raise Problem(f"--init {path} has tensors that BiGS has not: {data.listed(unknown, 8)}")

    def fill(self, task: nn.Module) -> str:
        """Copies into a task what fits it; what was taken and what stayed random, for people. Raises `Problem`.

        Of a file with more layers the first are taken, embeddings if the vocabulary is the same, a fine-tuned head if
        the labels are, positions as many as both have, and one S4D kernel serves for each of several.
        """
        config, ours, theirs = task.encoder.config, task.state_dict(), self.config or dict(model="codessm")
        if MODELS[config["model"]].layer is not MODELS[theirs["model"]].layer:
            raise Problem(f"--init {self.path} is a {theirs['model'] if self.config else 'BiGS'}, whose layers are not "
                          f"those of {config['model']}")
        taken, misfits, foreign, few = [], [], False, ""
        for name in self.theirs.keys() & ours.keys():
            names, tensors = zip(*self.theirs[name])
            target = ours[name]  # the task's own memory
            if name in VOCABULARY and (self.tokenizer.text != task.tokenizer.text if self.tokenizer
                                       else tensors[0].shape[:1] != target.shape[:1]):
                foreign = True
                continue
            if name.startswith("head.") and self.labels != task.labels:
                continue
            try:
                tensor = torch.cat(tensors)
                if name == "encoder.positions.weight":
                    few = f" (of positions the first {len(tensor)})" if len(tensor) < len(target) else ""
                    tensor, target = tensor[:len(target)], target[:len(tensor)]
                if target.shape not in (tensor.shape, (target.shape[0], *tensor.shape) if "_ssm." in name else None):
                    raise ValueError
                target.copy_(tensor)
                taken.append(name)
            except (ValueError, RuntimeError):
                misfits += [f"{name} {tuple(tensor.shape)}" for name, tensor in zip(names, tensors)]
        origin = "{model}, {layers} x {d}".format(**theirs) if self.config else "BiGS"
        if misfits and self.config and theirs["kernels"] != config["kernels"]:
            raise Problem(f"--init {self.path} has {theirs['kernels']} kernels a direction, not {config['kernels']}: "
                          f"give --kernels {theirs['kernels']}")
        if misfits:
            raise Problem(f"--init {self.path} ({origin}) does not fit {config['model']}, {config['layers']} x "
                          f"{config['d']}: {data.listed(sorted(misfits), 4)}")
        left = [name for ours, parts in self.theirs.items() if ours not in taken for name, _ in parts] + self.others
        self.theirs = {}  # and their memory
        return (f"{self.path} ({origin}): taken {collapsed(taken)}{few}; "
                f"random {collapsed(ours.keys() - set(taken))}{' (another vocabulary)' * foreign}; "
                f"not taken {collapsed(left)}")


def stretched(tensor: torch.Tensor) -> bool:
    """Whether it would take more memory than the file it is from."""
    return tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def collapsed(names: Iterable[str]) -> str:
    """The names of tensors, with the layers whose names are alike drawn together."""
    layers: dict[str, list[str]] = {}
    rest, alike = [], {}
    for name in sorted(names):
        found = re.fullmatch(r"(?:bigs\.)?encoder\.layers?\.(\d+)\.(.+)", name)
        layers.setdefault(int(found[1]), []).append(found[2]) if found else rest.append(name)
    for number, parts in sorted(layers.items()):
        alike.setdefault(tuple(parts), []).append(number)
    drawn = [f"layers {numbers[0]}-{numbers[-1]}" + f" ({', '.join(parts)})" * (len(parts) <= 8)
             for parts, numbers in alike.items()]
    return ", ".join(drawn + rest) or "nothing"


# ---- the command line -------------------------------------------------------------------------------

OUT_OF_MEMORY = "out of memory: use a smaller --batch, --ctx or --size, or a larger --accumulate"


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(said in str(error) for said in ("out of memory",
                                                                                 "can't allocate memory"))


class Terminated(KeyboardInterrupt):
    """SIGTERM, where there is nothing to save yet."""


def terminate(_number, _frame):
    raise Terminated


class Commands(click.Group):
    """The one place that turns what went wrong into a sentence and an exit code."""

    def main(self, *args, **options):
        try:
            return super().main(*args, **options)
        except SystemExit as end:
            tasks.leave(end.code or 0)
            raise

    def invoke(self, ctx: click.Context):
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            result = super().invoke(ctx)
            data.gather(None)  # none leaves before all have come to their end
            return result
        except click.UsageError as error:
            if data.world() > 1:  # all have the same
                if data.rank() == 0:
                    error.show()
                error.show = lambda *_: None
                data.gather(None)
            raise
        except KeyboardInterrupt as error:
            code = 143 if isinstance(error, Terminated) else 130
            trains = ctx.invoked_subcommand in ("pretrain", "finetune")
            raise Problem(f"interrupted{' before training began' * trains}: nothing is lost", code) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise Problem(f"{where}{error.strerror or error}", 1) from None
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise Problem(OUT_OF_MEMORY, 1) from None
            if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # inductor's too
                lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
                raise Problem(f"the compiler failed ({lines[0].strip()[:200] if lines else type(error).__name__}): "
                              "--no-compile does without it", 1) from None
            if "DataLoader worker" in str(error):
                raise Problem("a process that tokenises died, perhaps for want of memory: use fewer --workers",
                              1) from None
            if tasks.lost(error):
                problem = Problem("another of the processes ended, which ends this one too", 1)
                problem.said = data.rank() > 0
                raise problem from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="codessm")
@click.pass_context
def cli(ctx):
    """CodeSSM: a bidirectional state-space encoder of source code, linear in length."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if ctx.invoked_subcommand not in ("pretrain", "finetune", "evaluate"):
            raise Problem(f"{ctx.invoked_subcommand} runs in one process: start it without torchrun")
        tasks.join()


def choose_device(name: str) -> torch.device:
    """The device of `--device`; auto is cuda where there is one, else cpu. Of several processes each takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if data.world() > 1:
        with data.together():
            return own_device(name)
    return find_device(name)


def own_device(name: str) -> torch.device:
    """Of this process among the several of its host."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name not in ("cpu", "cuda"):
        raise Problem(f"--device {name}: of several processes each has its own device: give cuda or cpu")
    if name == "cuda" and here > torch.cuda.device_count():
        raise Problem(f"{here} processes on a host with {torch.cuda.device_count()} GPUs: start as many as there are "
                      "GPUs (--nproc-per-node), or give --device cpu")
    return find_device(f"cuda:{local}" if name == "cuda" else name)


def find_device(name: str) -> torch.device:
    """The device of that name; raises `Problem`."""
    try:
        device = torch.device(name)
        found = torch.empty(1, device=device).device
        if device.type == "cuda":
            torch.cuda.set_device(found)  # events and graphs are of the current one
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
    "--model": dict(type=click.Choice(list(MODELS)), default="codessm", show_default=True,
                    help="codessm, a variant of it, or a model that it is compared with; the README tells them."),
    "--kernels": dict(type=click.IntRange(1), metavar="N",
                      help="S4D kernels a direction, each for its share of the channels.  [default: 1; codessm-8k: 8]"),
    "--init": dict(metavar="FILE", help="Start from the weights of a codessm checkpoint (with its tokenizer, unless "
                                        "another is asked for) or of a BiGS PyTorch state dict."),
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
    "--max-line": dict(default=data.MAX_LINE // 10**6, show_default=True, type=click.IntRange(1, 10_000),
                       metavar="MB", help="A longer line is a bad one."),
    "--skip-bad": dict(is_flag=True, help="Count bad lines and pass over them."),
    "--seed": dict(default=0, show_default=True, type=click.IntRange(0, 2**63 - 1),
                   help="Of weights, order, windows and masks."),
    "-o": dict(metavar="FILE"),
    "--restart": dict(is_flag=True, help="Begin anew, whatever an earlier run left at -o."),
    "--device": dict(default="auto", show_default=True, help="cpu, cuda, cuda:1, mps; auto is cuda, else cpu."),
    "--compile/--no-compile": dict(default=None, help="Compile the layers, each length when it first comes.  "
                                                      f"[default: on a GPU, from {tasks.PAYS} batches a length]"),
    "--workers": dict(type=click.IntRange(0),
                      help="Processes that tokenise ahead.  [default: half the cores, at most 4]"),
    "--json": dict(is_flag=True, help="Print the result as JSON."),
}
PARAMETERS = {"--compile/--no-compile": "compiled", "--data": "data_path", "--tokenizer": "tokenizer_path",
              "-o": "output_path", "--json": "as_json"}


def options(names: str, **changes: dict | str) -> Callable:
    """The named options, which mean the same in every command; `changes` are their attributes (or help) in this one."""
    def decorate(command: Callable) -> Callable:
        for name in reversed(names.split()):
            change = changes.get(name.split("/")[0].strip("-").replace("-", "_"), {})
            change = {"help": change} if isinstance(change, str) else change
            command = click.option(name, *filter(None, [PARAMETERS.get(name)]), **OPTIONS[name] | change)(command)
        return command
    return decorate


def check_training(steps, epochs, vocab, tokenizer_path, lr, model, size, kernels) -> None:
    """What the options of `pretrain` and `finetune` exclude."""
    try:
        count_kernels(model or "codessm", SIZES[size or "base"]["d"], kernels)
    except ValueError as error:
        raise click.UsageError(f"--kernels: {error}") from None
    if steps and epochs:
        raise click.UsageError("give --steps or --epochs, not both")
    if vocab and tokenizer_path:
        raise click.UsageError("give --tokenizer or --vocab, not both: a given tokenizer has its own entries")
    if lr and not math.isfinite(lr):
        raise click.UsageError(f"--lr {lr} is not a number to learn with")


def default_learning_rate(d: int, pretrained: bool = False) -> float:
    """The peak one; 5e-5 is the papers' for fine-tuning."""
    return 2e-3 if d <= SIZES["tiny"]["d"] else 5e-5 if pretrained else 3e-4


def check_output(output_path: str, option: str, path: str | None) -> None:
    """A run must not write over what it reads."""
    if path is not None and os.path.realpath(path) in map(os.path.realpath, (output_path, f"{output_path}.state")):
        raise Problem(f"-o {output_path} would replace what {option} {path} is read from: give another -o")


def choose_tokenizer(path: str | None, vocab: int | None, source: Weights | None) -> Tokenizer | None:
    """The one of --tokenizer, else that of --init, unless --vocab asks for another; None, it is to be trained."""
    if path is not None:
        return data.load_tokenizer(path)
    return source.tokenizer if source and not vocab else None


def bounded(ctx: int | None, default: int, encoder: nn.Module | None, path: str) -> int:
    """--ctx, else the default, that the encoder's learned positions allow; raises `Problem` where it asks for more."""
    bound = encoder.bound if encoder else None
    if bound is None or (ctx or default) <= bound:
        return ctx or default
    model = encoder.config["model"]
    if ctx:
        raise Problem(f"--ctx {ctx} is more than {path} can read: {model} has learned positions for {bound} tokens")
    say(f"ctx {bound} rather than {default}: {path} is a {model}, which has learned positions for no more")
    return bound


def default_workers(workers: int | None) -> int:
    """Of each process: half the cores, shared by the processes of a host, at most 4."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(4, max(1, (os.cpu_count() or 1) // 2 // here)) if workers is None else workers


def check_same(what: str, *counts: int) -> None:
    """Raise a `Problem` where ranks have read different things: each host reads files of its own."""
    found = data.gather(counts)
    with data.together():
        for place, theirs in enumerate(found):
            if theirs != found[0]:
                raise Problem(f"{what} of process {place} is not that of process 0 ({theirs} and {found[0]}): every "
                              "host needs the same files")


def no_pipe(paths: Iterable[str]) -> None:
    """Several processes cannot share what can be read once; raises `Problem`."""
    if data.world() > 1 and any(path == "-" or os.path.exists(path) and not os.path.isdir(path)
                                and not os.path.isfile(path) for path in paths):
        with data.together():
            raise Problem("standard input or a pipe cannot be read by several processes: write it to a file first")


def describe(**facts: str) -> None:
    """Every resolved setting, before the work begins."""
    for name, value in facts.items():
        say(f"{name:10} {value}")


def describe_training(task: nn.Module, size: str, device: torch.device, compiled: bool, output_path: str, steps: int,
                      epochs: float, decay: str, *, batch: int, lr: float, seed: int, accumulate: int,
                      eval_every: int) -> None:
    """The settings that all training has."""
    parameters = sum(p.numel() for p in task.parameters())
    several = task.encoder.config["kernels"]
    kernels = f", {several} kernels a direction" * (several > 1)
    describe(model=f"{task.encoder.config['model']} {size}{kernels}, {parameters:,} parameters, on {device} in "
                   f"{'bfloat16' if tasks.bf16(device) else 'float32'}{', compiled' * compiled}",
             **({"processes": f"{data.world()}, which share each batch"} if data.world() > 1 else {}),
             training=f"{steps:,} steps of {batch} samples ({epochs:.1f} epochs), peak learning rate {lr:g} after "
                      f"{tasks.warmup(steps):,} steps, {decay}, weight decay {tasks.WEIGHT_DECAY:g}, seed {seed}, "
                      f"accumulate {accumulate}, an evaluation every {eval_every:,} steps",
             output=f"{output_path}, metrics in {output_path}.jsonl")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss begins with that of the parent
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown(metrics: dict[str, float], first: str | None = None) -> str:
    """Metrics for a sentence, the one that counts first."""
    names = sorted(metrics, key=lambda name: name != first)
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)


@cli.command(epilog="Example: codessm pretrain corpus.jsonl --ctx 256 --steps 10000 -o model.pt")
@click.argument("corpus", nargs=-1)
@options("--ctx --model --kernels --size --init --tokenizer --vocab --steps --epochs --batch --accumulate --lr "
         "--eval-every --limit --code-field --text-field --skip-bad --max-line --seed -o --restart --device "
         "--compile/--no-compile --workers --json",
         ctx=dict(default=256, show_default=True, help="Tokens a sample, special ones included."),
         size=dict(default="base"), epochs="Passes over the corpus.  [default: 1]",
         lr="Peak learning rate.  [default: 3e-4, with --init 5e-5; tiny: 2e-3]",
         eval_every="Steps between evaluations.  [default: a tenth of all]",
         o=dict(default="model.pt", show_default=True, help="The checkpoint to write."))
def pretrain(corpus, ctx, model, kernels, size, init, tokenizer_path, vocab, steps, epochs, batch, accumulate, lr,
             eval_every, limit, code_field, text_field, skip_bad, max_line, seed, output_path, restart, device,
             compiled, workers, as_json):
    """Pretrain an encoder by masked language modelling on CORPUS.

    CORPUS: JSONL files, plain or .gz, folders, globs, or - for standard input; without any, the Python
    standard library. The same command run again goes on where an interrupted one was.
    """
    check_training(steps, epochs, vocab, tokenizer_path, lr, model, size, kernels)
    if steps is None and epochs is None:
        epochs = 1
    lr = lr or default_learning_rate(SIZES[size]["d"], init is not None)
    check_output(output_path, "--init", init)
    started, device, workers = time.monotonic(), choose_device(device), default_workers(workers)
    no_pipe(corpus)
    with tasks.Output(output_path, restart) as output:
        with data.together():
            source = Weights(init) if init is not None else None
        given = data.lead(partial(choose_tokenizer, tokenizer_path, vocab, source))
        sources = data.on_host(lambda: data.find_sources(corpus, max_line * 10**6) if corpus
                               else [data.standard_library()])
        settings = dict(
            corpus={source.name: source.mark for source in sources}, limit=limit, code_field=code_field,
            text_field=text_field, skip_bad=skip_bad, max_line=max_line, ctx=ctx, model=model, kernels=kernels,
            size=size, init=source and source.mark, tokenizer=zlib.crc32(given.text.encode()) if given else None,
            vocab=given.vocab if given else vocab or (4096 if size == "tiny" else 32100),
            steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, eval_every=eval_every, seed=seed)
        state = output.resume(settings)

        with data.together():
            records = data.Corpus(sources, code_field, text_field, limit, skip_bad)
            if len(records.train) < batch or not len(records.held_out):
                count = len(records.train)
                raise Problem(f"the corpus has {count} samples to train on and {len(records.held_out)} to evaluate on, "
                              "fewer than one batch: give more of it"
                              + (f", or --batch {count} or less" if count > 1 else ""))
        check_same("the corpus", len(records), records.bytes, len(records.held_out))
        tokenizer = Tokenizer(state["tokenizer"]) if state else given or data.lead(
            lambda: data.train_tokenizer(records, settings["vocab"]))
        samples = data.Samples(records, tokenizer, ctx, seed)
        lengths = data.lead(lambda: data.static_lengths(samples, records.train, ctx))
        batches = data.Batches(samples, records.train, batch, lengths, tokenizer.pad, seed)
        some = np.linspace(0, len(records.held_out) - 1, min(HELD_OUT, len(records.held_out))).astype(int)
        held_out = data.Batches(samples, records.held_out[some], batch, lengths, tokenizer.pad)
        steps = steps or epochs * len(batches)
        eval_every = eval_every or -(-steps // 10)

        torch.manual_seed(seed)
        task = MLM(Encoder(tokenizer.vocab, **SIZES[size], model=model, kernels=kernels, ctx=ctx), tokenizer, seed)
        with data.together():
            taken = {"init": source.fill(task)} if source and not state else {}
        del source  # and its memory
        task = task.to(device)
        compiled = tasks.compile_parts(task, compiled, tasks.pays(batches, steps))
        first = held_out.stream(stop=min(len(held_out), held_out.POOL))
        if not sum(data.gather(sum(task.prepare(batch)[1] for batch in first))):
            raise Problem(f"nothing to predict in the {len(held_out.records)} records held out: give a larger corpus")
        describe(
            corpus=f"{data.listed(s.name for s in sources)}: {len(records):,} records, {data.size(records.bytes)}, "
                   f"{len(records.held_out):,} of them held out, {len(held_out.records):,} for evaluation"
                   + (f"; {records.bad:,} bad lines passed over" if records.bad else ""),
            tokenizer=f"{tokenizer.vocab:,} entries, {'given' if given else 'trained on the corpus'}",
            samples=f"ctx {ctx}, padded to {', '.join(map(str, lengths))}; {workers} processes tokenise ahead", **taken)
        describe_training(task, size, device, compiled, output_path, steps, steps / len(batches), "cosine",
                          batch=batch, lr=lr, seed=seed, accumulate=accumulate, eval_every=eval_every)
        metrics = tasks.train(task, batches, held_out, output, state,
                              settings=settings, steps=steps, lr=lr, accumulate=accumulate, eval_every=eval_every,
                              workers=workers, graphs=compiled)
    result = dict(output=output_path, steps=steps, parameters=sum(p.numel() for p in task.parameters()),
                  held_out=len(held_out.records), seconds=round(time.monotonic() - started, 1),
                  peak_memory=peak_memory(device), **metrics)
    print_result(result, as_json, f"{output_path}: {steps:,} steps in {result['seconds']:.0f} s; "
                                  f"on {len(held_out.records):,} held-out records {mlm_sentence(metrics)}")


def print_result(result: dict, as_json: bool, *sentences: str) -> None:
    """The outcome of a command, on standard output: for a program, or for people."""
    if data.rank() == 0:
        click.echo(json.dumps(result) if as_json else "\n".join(sentences))


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
@options("--ckpt --data --ctx --model --kernels --size --init --tokenizer --vocab --steps --epochs --batch "
         "--accumulate --lr --eval-every --limit --skip-bad --max-line --seed -o --restart --device "
         "--compile/--no-compile --workers --json",
         ckpt=dict(required=False, help="The pretrained checkpoint to start from; without one, from scratch."),
         data="The folder (or file) of the benchmark as published.  [default: ./TASK]",
         ctx="Tokens a function, special ones included.  [default: the task's]",
         model=dict(default=None, show_default=False, help="As in pretrain, without --ckpt.  [default: codessm]"),
         epochs="Passes over the training split.  [default: the task's]",
         lr="Peak learning rate.  [default: 5e-5 from a checkpoint, 3e-4 from scratch; tiny: 2e-3]",
         eval_every="Steps between evaluations.  [default: an epoch]",
         o="The checkpoint to write.  [default: TASK.pt]")
def finetune(name, ckpt, data_path, ctx, model, kernels, size, init, tokenizer_path, vocab, steps, epochs, batch,
             accumulate, lr, eval_every, limit, skip_bad, max_line, seed, output_path, restart, device, compiled,
             workers, as_json):
    """Fine-tune an encoder on TASK and score it.

    TASK: advtest, sqa, devign, diversevul, complexity, typeinf or clone; or, for JSONL of your own, retrieval (text,
    code), classify (code, label), tag (tokens, labels) or pair (code1, code2, label).

    The weights with the best metric on the validation split are kept; the test split, if there is one, is scored
    once, at the end. The same command run again goes on where an interrupted one was.
    """
    if ckpt is not None and (model or kernels or size or init or tokenizer_path or vocab):
        raise click.UsageError("--ckpt brings its own --model, --size, --tokenizer and --vocab: give it without them, "
                               "and without --kernels and --init")
    check_training(steps, epochs, vocab, tokenizer_path, lr, model, size, kernels)
    benchmark, model, size = data.TASKS[name], model or "codessm", size or "base"
    output_path = output_path or f"{name}.pt"
    if steps is None and epochs is None:
        epochs = benchmark.epochs
    started, device, workers = time.monotonic(), choose_device(device), default_workers(workers)
    check_output(output_path, "--ckpt", ckpt)
    check_output(output_path, "--init", init)
    with tasks.Output(output_path, restart) as output:
        with data.together():
            pretrained = load(ckpt) if ckpt is not None else None
            source = Weights(init) if init is not None else None
            ctx = bounded(ctx, benchmark.ctx, pretrained and pretrained.encoder, ckpt)
        given = data.lead(partial(choose_tokenizer, tokenizer_path, vocab, source))
        d = pretrained.encoder.config["d"] if pretrained else SIZES[size]["d"]
        lr = lr or default_learning_rate(d, (pretrained or source) is not None)
        with data.together():
            reader = data.Reader(name, data_path or name, limit=limit, skip_bad=skip_bad, longest=max_line * 10**6)
        settings = dict(
            corpus={source.name: source.mark for source in reader.sources.values()}, task=name, limit=limit,
            skip_bad=skip_bad, max_line=max_line, ctx=ctx, ckpt=data.open_source(ckpt).mark if pretrained else None,
            model=None if pretrained else model, kernels=kernels, size=None if pretrained else size,
            init=source and source.mark,
            tokenizer=zlib.crc32(given.text.encode()) if given else None,
            vocab=None if pretrained or given else vocab or (4096 if size == "tiny" else 32100),
            steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, eval_every=eval_every, seed=seed)
        state = output.resume(settings)

        train, valid = reader.splits["train"], reader.splits["valid"]
        if state:
            tokenizer = Tokenizer(state["tokenizer"])
        elif pretrained:
            tokenizer = pretrained.tokenizer
        else:
            tokenizer = given or data.lead(lambda: data.train_tokenizer(train, settings["vocab"]))
        facts = describe_data(reader)
        with data.together():
            for part, split in reader.splits.items():
                if not len(split.prepare(tokenizer, ctx)):
                    raise Problem(f"the {part} split has no labelled token")
        check_same("the data", *(len(split) for split in reader.splits.values()),
                   *(split.bytes for split in reader.splits.values()))
        lengths = data.lead(lambda: data.static_lengths(train.items, train.distinct, ctx))
        batches, held_out = train.training(batch, lengths, seed), valid.each(batch, lengths)
        steps = steps or epochs * len(batches)
        eval_every = eval_every or len(batches)

        torch.manual_seed(seed)
        encoder = pretrained.encoder if pretrained else Encoder(tokenizer.vocab, **SIZES[size], model=model,
                                                                kernels=kernels, ctx=ctx)
        task = tasks.OBJECTIVES[benchmark.kind](encoder, tokenizer, name, reader.labels, ctx)
        with data.together():
            taken = {"init": source.fill(task)} if source and not state else {}
        del source  # and its memory
        task = task.to(device)
        compiled = tasks.compile_parts(task, compiled, tasks.pays(batches, steps))
        describe(task=f"{name}, {benchmark.kind}, from {ckpt or init or 'scratch'}", data=facts, **taken,
                 **({"labels": f"{len(reader.labels):,}: {data.listed(reader.labels, 8)}"} if reader.labels else {}),
                 tokenizer=f"{tokenizer.vocab:,} entries",
                 samples=f"ctx {ctx}, padded to {', '.join(map(str, lengths))}; {workers} processes tokenise ahead",
                 validation=describe_encoding(valid))
        describe_training(task, f"{encoder.config['layers']} x {encoder.config['d']}", device, compiled, output_path,
                          steps, steps / len(batches), "linear", batch=batch, lr=lr, seed=seed, accumulate=accumulate,
                          eval_every=eval_every)
        metrics = tasks.train(task, batches, held_out, output, state, split=valid,
                              settings=settings, steps=steps, lr=lr, decay=tasks.linearly, accumulate=accumulate,
                              eval_every=eval_every, workers=workers,
                              graphs=compiled)
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
    sentences = [f"{output_path}: {steps:,} steps in {result['seconds']:.0f} s, peak memory "
                 f"{data.size(result['peak_memory'])}", f"valid  {shown(metrics, benchmark.metric)}"]
    if "test" in reader.splits:
        sentences.append(f"test   {shown(scores, benchmark.metric)}")
    print_result(result, as_json, *sentences)


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
@options("--ckpt --data --ctx --batch --limit --skip-bad --max-line --code-field --text-field --device "
         "--compile/--no-compile --workers --json",
         data="The folder (or file) of the benchmark, of mlm a corpus.  [default: ./TASK; mlm: the standard library]",
         ctx="Tokens a function.  [default: as trained; mlm: 256]",
         batch="Samples at a time; the result does not depend on it.")
@click.option("--split", default="test", show_default=True, type=click.Choice(data.SPLITS),
              help="Of mlm, test is the whole corpus and valid its held-out 1 %.")
@click.option("--predictions", metavar="FILE", help="Write the predictions, in the form CodeXGLUE's evaluators read.")
def evaluate(name, ckpt, data_path, ctx, batch, limit, skip_bad, max_line, code_field, text_field, device, compiled,
             workers, as_json, split, predictions):
    """Score a checkpoint on a split of TASK, or on a corpus.

    TASK: one of those of finetune, or mlm, which predicts masked tokens of a corpus with a pretrained checkpoint.
    """
    if predictions is not None and name == "mlm":
        raise click.UsageError("--predictions is for the other tasks than mlm")
    if name != "mlm" and (code_field or text_field):
        raise click.UsageError("--code-field and --text-field are for mlm")
    started, device, workers = time.monotonic(), choose_device(device), default_workers(workers)
    with data.together():
        model = tasks.narrow(load_for(name, ckpt, device))
        if predictions is not None and data.rank() == 0:
            data.check_writable(predictions, "--predictions")
            if os.path.exists(predictions):
                raise Problem(f"{predictions} exists: give --predictions another name, or remove it")
    if name == "mlm":
        no_pipe([data_path or ""])
        sources = data.on_host(lambda: data.find_sources([data_path], max_line * 10**6) if data_path is not None
                               else [data.standard_library()])
        with data.together():
            corpus = data.Corpus(sources, code_field, text_field, limit, skip_bad)
            records = {"test": np.arange(len(corpus)), "valid": corpus.held_out, "train": corpus.train}[split]
            if not len(records):
                raise Problem(f"the {split} split of {data_path} is empty")
            ctx, part = bounded(ctx, 256, model.encoder, ckpt), None
        check_same("the corpus", len(corpus), corpus.bytes)
        samples = data.Samples(corpus, model.tokenizer, ctx)
        lengths = data.lead(lambda: data.static_lengths(samples, records, ctx))
        batches = data.Batches(samples, records, batch, lengths, model.tokenizer.pad)
        facts, count = f"{len(corpus):,} records" + (f"; {corpus.bad:,} bad lines passed over" if corpus.bad else ""), \
            len(records)
    else:
        with data.together():
            reader = data.Reader(name, data_path or name, wanted=[split], required=[split], labels=model.labels,
                                 limit=limit, skip_bad=skip_bad, longest=max_line * 10**6)
            ctx, part, facts = bounded(ctx, model.ctx, model.encoder, ckpt), reader.splits[split], describe_data(reader)
            count = len(part)
            if not len(part.prepare(model.tokenizer, ctx)):
                raise Problem(f"the {split} split has no labelled token")
        check_same("the data", count, part.bytes)
        lengths = data.lead(lambda: data.static_lengths(part.items, part.distinct, ctx))
        batches = part.each(batch, lengths)
        facts += f"; {describe_encoding(part)}"
    describe(data=facts, samples=f"ctx {ctx}, padded to {', '.join(map(str, lengths))}")
    compiled = tasks.compile_parts(model, compiled, tasks.pays(batches, len(batches)))
    metrics, outputs = tasks.evaluate(model, batches, part, workers, eagerly=not compiled)
    with data.together():
        if not all(map(math.isfinite, metrics.values())):
            if name == "mlm" and not outputs[-1]:
                raise Problem(f"{data_path}: nothing could be predicted: the corpus is too small")
            raise Problem(f"{ckpt}: {NOT_NUMBERS}", 1)
        if predictions is not None and data.rank() == 0:
            with data.atomic(predictions) as file:
                file.writelines(line.encode("utf-8", "replace") + b"\n" for line in model.lines(outputs, part))
    result = dict(task=name, split=split, examples=count, **metrics, encoded=len(batches.records),
                  seconds=round(time.monotonic() - started, 1), peak_memory=peak_memory(device))
    sentence = mlm_sentence(metrics) if name == "mlm" else shown(metrics, data.TASKS[name].metric)
    print_result(result, as_json, f"{name} {split}, {count:,} examples in {result['seconds']:.0f} s: {sentence}")


NOT_NUMBERS = "what the model says is no number: its training went wrong, try a lower --lr"
PREDICT = 4096  # records at a time


@cli.command(epilog="Example: codessm predict --ckpt devign.pt functions.jsonl > predictions.jsonl")
@click.argument("files", nargs=-1)
@options("--ckpt --ctx --batch --max-line --device", ctx="Tokens a function.  [default: as trained]",
         batch="Samples at a time; the result does not depend on it.")
def predict(files, ckpt, ctx, batch, max_line, device):
    """Predict for FILES: JSONL, source files, folders of source files, or - (the default), JSONL on standard input.

    A line of JSONL comes out for each that goes in, in the same order, with what else it held and `prediction` and
    `probabilities` (of a pair `prediction` and `score`, of retrieval `score`, the cosine of text and code, of tagging
    `predictions`, one a token). For a source file a line comes out with its `path`.
    """
    device = choose_device(device)
    model = tasks.narrow(load(ckpt, device))
    if model.name == "mlm":
        raise Problem(f"{ckpt} is a pretrained encoder, which predicts nothing yet: fine-tune it first")
    ctx = bounded(ctx, model.ctx, model.encoder, ckpt)
    parse = partial(data.parse_example, data.prediction_task(model.name), labelled=False)
    for path, source, hidden in data.prediction_sources(files or ["-"], model.name, max_line * 10**6):
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


# ---- speed and memory -------------------------------------------------------------------------------

def numbers(_ctx, _parameter, value: str) -> list[int]:
    """The lengths of a list with commas; raises `click.BadParameter`."""
    if not all(part.strip().isdecimal() and 0 < int(part) < 2**24 for part in value.split(",")):
        raise click.BadParameter(f"{value} is no list of lengths such as 512,1024,2048")
    return [int(part) for part in value.split(",")]


def models(_ctx, _parameter, value: str) -> list[str]:
    """The models of a list with commas, each once; raises `click.BadParameter`."""
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in MODELS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(MODELS)}")
    return list(dict.fromkeys(names))


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
    size, dtype = (8192, torch.bfloat16) if tasks.bf16(device) else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size ** 3 / median_seconds(lambda: a @ b, device, repeats)


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


def bench_one(model: str, form: str, size: str, length: int, batch: int, train: bool, device: torch.device,
              compiled: bool | None, repeats: int) -> dict:
    """What `bench` measures of one model at one length, on full batches of random tokens.

    samples_per_second, tokens_per_second; the median seconds of a run; memory in bytes beyond the weights, or None;
    projections in FLOP/s; first_seconds of the first run; whether it was compiled. Raises what torch does where memory
    is short.
    """
    vocab = 4096 if size == "tiny" else 32100
    encoder = Encoder(vocab, **SIZES[size], model=model, ctx=length)
    encoder.fft = form == "fft"
    for layer in encoder.layers if form == "plain" else ():
        layer.plain = True
    task = MLM(encoder, None).to(device)
    if not train:
        tasks.narrow(task).eval()
    compiled = tasks.compile_parts(task, compiled)
    before = memory_in_use(device)
    ids = torch.randint(vocab, (batch, length), device=device)
    if train:
        count = max(1, round(0.15 * batch * length))
        stepper = tasks.Stepper(task, tasks.adamw(task, 1e-5), graphs=compiled)
        where = torch.randperm(batch * length, device=device)[:count]
        run = partial(stepper.take, [dict(ids=ids, targets=ids.long(), where=where)], count)
    else:
        run = partial(tasks.inference(task, encoder), {"ids": ids})

    begun = time.monotonic()
    float(run().sum())  # waits for a GPU
    first = time.monotonic() - begun
    memory_in_use(device)  # the compiler's own does not count
    seconds = median_seconds(run, device, repeats)
    calls = [given[-1] for given in encoder.given(ids[..., None]) if isinstance(given, tuple)] if encoder.shared else []
    linear = (m for part in (encoder.layers, *calls) for m in part.modules() if isinstance(m, nn.Linear))
    FLOP = 2 * sum(m.weight.numel() for m in linear) * (3 if train else 1)
    return dict(samples_per_second=batch / seconds, tokens_per_second=batch * length / seconds, seconds=seconds,
                memory=None if before is None else max(0, peak_memory(device) - before),
                projections=FLOP * batch * length / seconds, first_seconds=first, compiled=compiled)


@cli.command(epilog="Example: codessm bench --models codessm,rocoder --lengths 512,2048,8192 --train")
@click.option("--lengths", default="512,1024,2048", show_default=True, callback=numbers, help="Tokens a sample.")
@click.option("--models", "names", default="codessm,rocoder", show_default=True, callback=models,
              help=f"Any of {', '.join(MODELS)}; ratios are to the first.")
@click.option("--train", is_flag=True, help="Measure a training step (masked language modelling, AdamW) instead.")
@click.option("--batch-tokens", type=click.IntRange(1, 2**31), metavar="N",
              help="Tokens a batch.  [default: 65536, in training 32768; not on a GPU 2048]")
@click.option("--attention", default="fused", show_default=True, type=click.Choice(["fused", "plain", "both"]),
              help="bertcoder's and rocoder's: PyTorch's fused kernels, or with the L x L matrices in memory.")
@click.option("--convolution", default="matrix", show_default=True, type=click.Choice(["matrix", "fft", "both"]),
              help="Of models with S4D kernels: by matrix products, or by FFT.")
@click.option("--repeats", type=click.IntRange(1), help="Medians are of so many.  [default: 10, not on a GPU 3]")
@options("--size --device --compile/--no-compile --json", size=dict(default="base"),
         compile="Compile the layers.  [default: on a GPU]")
def bench(lengths, names, train, batch_tokens, attention, convolution, repeats, size, device, compiled, as_json):
    """Measure speed and memory of the models on this machine.

    A batch is full, without padding; in inference kernels are made once a length and weights rounded once, as they are
    by `evaluate`. The memory is what is allocated at most beyond the weights, the share is that of the model's linear
    projections in the rate of one large matrix product, the first run is the one that compiles, or finds what was
    compiled before.
    """
    attend = [name for name in names if MODELS[name].layer is TransformerLayer]
    convolving = [name for name in names if MODELS[name].kernels]
    if attention != "fused" and not attend or convolution != "matrix" and not convolving:
        raise click.UsageError("--attention is bertcoder's and rocoder's, --convolution that of models with S4D "
                               "kernels: name such a model in --models")
    device = choose_device(device)
    gpu = device.type == "cuda"
    batch_tokens, repeats = batch_tokens or (65_536 >> train if gpu else 2048), repeats or (10 if gpu else 3)
    forms = {name: {"both": ["", form], form: [form]}.get(wanted, [""]) for form, wanted, able in
             (("fft", convolution, convolving), ("plain", attention, attend)) for name in able}
    cases = [(length, name, form) for length in lengths for name in names for form in forms.get(name, [""])]
    hardware = torch.cuda.get_device_name(device) if gpu else f"{device}, {torch.get_num_threads()} threads"
    rate, rows = product_rate(device, repeats), []
    precision = "bfloat16" if tasks.bf16(device) else "float32"
    if not as_json:
        click.echo(f"{hardware}, torch {torch.__version__}, {size}, {'training' if train else 'inference'}, "
                   f"{batch_tokens:,} tokens a batch, {precision}; one large matrix product: {rate / 1e12:.3g} TFLOP/s")
        click.echo(f"{'model':15} {'length':>7} {'batch':>6} {'samples/s':>10} {'tokens/s':>10} {'memory':>8} "
                   f"{'share':>6} {'ratio':>6} {'first run':>9}")
    bar = data.progress(cases, desc="measuring", unit=" rows", unit_scale=False, leave=False, miniters=1)
    for length, name, form in bar:
        batch = max(1, batch_tokens // length)
        row = dict(model=name, form=form, length=length, batch=batch)
        try:
            row |= bench_one(name, form, size, length, batch, train, device, compiled, repeats)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            row["error"] = "out of memory"
        first = next((other for other in rows if other["length"] == length), row)
        if "error" not in row:
            row["share"] = row.pop("projections") / rate
            row["ratio"] = None if "error" in first else row["tokens_per_second"] / first["tokens_per_second"]
        rows.append(row)
        if not as_json:
            memory, ratio = row.get("memory"), row.get("ratio")
            with bar.external_write_mode():
                click.echo(f"{f'{name} {form}':15} {length:7,} {batch:6,} " + (row["error"] if "error" in row else (
                    f"{row['samples_per_second']:10,.1f} {row['tokens_per_second']:10,.0f} "
                    f"{'?' if memory is None else data.size(memory):>8} {row['share']:6.2f} "
                    f"{'' if ratio is None else format(ratio, '.2f'):>6} {row['first_seconds']:7.1f} s")))
    if as_json:
        click.echo(json.dumps(dict(device=hardware, torch=torch.__version__, size=size, train=train,
                                   batch_tokens=batch_tokens, precision=precision, product_rate=rate, rows=rows)))


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
