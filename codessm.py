"""CodeSSM: a bidirectional gated state-space encoder of source code, linear in length.

    codessm pretrain corpus.jsonl --ctx 256 -o model.pt

The encoder is BiGS (Wang et al. 2023, arXiv 2212.10544) over S4D kernels (Gu et al. 2022, arXiv 2206.11893), as in
CodeSSM (Verma et al. 2025, arXiv 2505.01475). Shapes and symbols:

    B  batch                     L  length in tokens            d  model width
    c  tokens per chunk          n  chunks per sequence, n c >= L
    k  S4D kernels per direction, each for d / k channels       N  complex modes per kernel
    K  kernel, of the parameters A, C, D and the step Delta; A-bar and C-bar are A and C after discretisation
    u, y  input and output of the convolution
    T, E, O, P  the convolution as matrix products: within a chunk, into the state, out of it, across m chunks

Complex numbers are stored as pairs of reals; complex arithmetic is used only to make kernels.
"""
import os
import signal
import sys

# Ctrl-C during the imports, which are slow, ends our program (not one that imports this module) without a traceback
IS_PROGRAM = os.path.splitext(os.path.basename(sys.argv[0]))[0] == "codessm"
if IS_PROGRAM and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import gc
import importlib.util
import itertools
import json
import math
import time
import zlib
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

# a file of the same name in the user's folder would shadow one of our flat modules
for name in ("data", "tasks"):
    origin, folder = importlib.util.find_spec(name).origin, Path(__file__).resolve().parent
    if Path(origin).resolve().parent != folder:
        shadowed = f"{origin} shadows codessm's own {name}.py in {folder}: rename it, or run from another folder"
        if not IS_PROGRAM:
            raise ImportError(shadowed)
        print(f"Error: {shadowed}", file=sys.stderr)
        sys.exit(2)

# idle threads sleep instead of spinning, which beside one other busy process makes two threads five times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch 2.10 to 2.13 compile some sums over rows and columns at once to wrong gradients (pytorch issue 193061)
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import data
import tasks
from data import Problem, info
from tasks import Objective, Settings, save  # noqa: F401  save is the other half of load

__version__ = "0.2.0"

SIZES = {"base": dict(d=1024, layers=12), "small": dict(d=512, layers=6), "mini": dict(d=256, layers=6),
         "tiny": dict(d=128, layers=4)}
VOCABULARY = {"base": 32100, "small": 32100, "mini": 4096, "tiny": 4096}  # entries of a tokenizer that is trained


# ---- S4D kernel and convolution ---------------------------------------------------------------------

class S4D(nn.Module):
    """A diagonal state-space kernel (Gu et al. 2022, section 3, with B = 1), or k of them.

        A = min(A_re, -1e-4) + i A_im     Delta = exp(log_step)     A-bar = exp(Delta A)     C-bar = C (A-bar - 1) / A
        K[l] = Re sum_n C-bar_n A-bar_n^l     y = K * u + D u

    With k > 1 kernels every parameter gains a leading dimension k; each kernel serves d / k channels.
    """

    def __init__(self, N: int = 64, k: int = 1):
        super().__init__()
        modes, scalar = ((k, N), (k, 1)) if k > 1 else ((N,), (1,))
        self.A_re = nn.Parameter(torch.full(modes, -0.5))
        self.A_im = nn.Parameter((math.pi * torch.arange(N)).expand(modes).clone())
        self.C = nn.Parameter(torch.randn(*modes, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(scalar))
        self.log_step = nn.Parameter(torch.empty(scalar).uniform_(math.log(0.01), math.log(1.0)))

    @staticmethod
    def stack(ssms: list["S4D"]) -> "S4D":
        """One S4D with leading dimensions (layers, 2k) from those of several layers, forward and backward of each."""
        stacked = S4D.__new__(S4D)  # without __init__, which would draw parameters at random
        nn.Module.__init__(stacked)
        for name, _ in ssms[0].named_parameters():
            parameters = torch.stack([getattr(ssm, name) for ssm in ssms])
            shape = parameters.shape[-2:] if name == "C" else parameters.shape[-1:]
            setattr(stacked, name, parameters.reshape(len(ssms) // 2, -1, *shape))
        return stacked

    def discretise(self) -> tuple[Tensor, Tensor]:
        """z = Delta A, complex128, and C-bar, complex64, both (..., N); on the CPU if on MPS, which has no float64."""
        wide = dict(dtype=torch.float64, device="cpu" if self.C.device.type == "mps" else self.C.device)
        A = torch.complex(self.A_re.to(**wide).clamp(max=-1e-4), self.A_im.to(**wide))
        z = self.log_step.to(**wide).exp() * A
        return z, (torch.view_as_complex(self.C.to(**wide)) * (torch.expm1(z) / A)).to(self.C.dtype.to_complex())

    def powers(self, count: int, lag: int = 1) -> Tensor:
        """A-bar^l for l = 0, lag, ..., (count - 1) lag, complex64 (..., N, count).

        Computed in complex128 and rounded once: at l = 2,048 a float32 phase is wrong in its second digit.
        """
        z, C_bar = self.discretise()
        return torch.exp(z[..., None] * (lag * torch.arange(count, device=z.device))).to(C_bar.dtype)

    def kernel(self, L: int) -> Tensor:
        """K (..., L), float32, without D."""
        return (self.discretise()[1][..., None] * self.powers(L)).real.sum(-2)


class Kernels(NamedTuple):
    """A layer's convolutions as matrices: k forward ones, then k backward ones. A single chunk needs T alone."""
    TO: Tensor  # (2k, c, c + 2N): T within a chunk, O out of the state with modes as Re, Im, Re, Im ...
    E: Tensor | None = None  # (2k, 2N, c): into the state
    A: Tensor | None = None  # (2k, N, 2), float32: A-bar^c; it takes the gradient, the values come from P
    P: Tensor | None = None  # (2k N, 2, m + 1, 2, m + 1), float32: powers of A-bar^c, across up to m chunks


def make_kernels(ssms: list[S4D], c: int, n: int, m: int, dtype: torch.dtype, causal: bool = False) -> list[Kernels]:
    """The `Kernels` of each layer, from the S4D of each, forward and backward, for n chunks of c tokens in groups of m.

        T[i, j] = K[i - j] (i >= j), D on the diagonal     E[:, j] = A-bar^(c - 1 - j)
        O[i] H = Re(C-bar A-bar^(i + 1) H)                 P[i, j] = A-bar^(c (i - j)) (i >= j)

    Unless `causal`, T, E and O of the backward direction are mirrored in time.
    """
    ssm, device = S4D.stack(ssms), ssms[0].C.device

    def mirror(matrix: Tensor, *time: int) -> Tensor:
        """Flip the backward half of a matrix (layers, 2k, ...) along its dimensions of time, unless `causal`."""
        if causal:
            return matrix
        forward, backward = matrix.chunk(2, 1)
        return torch.cat([forward, backward.flip(time)], 1)

    def as_reals(Z: Tensor) -> Tensor:
        """Z (..., N, l), complex, as Re, Im, Re, Im ... (..., 2N, l)."""
        return torch.view_as_real(Z).movedim(-1, -2).flatten(-3, -2)

    K = ssm.kernel(c)
    T = mirror(toeplitz(K + pad(ssm.D.to(K.device), (0, c - 1))), -2, -1)
    if n == 1:
        return [Kernels(layer) for layer in T.to(device, dtype)]
    powers, C_bar = ssm.powers(c + 1), ssm.discretise()[1]
    E = mirror(as_reals(powers[..., :c]).flip(-1), -1)
    # (the conjugate, because Re(x H) = Re(x) Re(H) - Im(x) Im(H))
    O = mirror(as_reals((C_bar[..., None] * powers[..., 1:]).conj_physical()).mT, -2)
    with torch.no_grad():
        P = toeplitz(ssm.powers(min(n, m) + 1, c))
        # each complex number as a real matrix [[Re, -Im], [Im, Re]]
        P = torch.stack([torch.stack([P.real, -P.imag], -2), torch.stack([P.imag, P.real], -2)], -4).flatten(1, 2)
    matrices = (torch.cat([T, O], -1).to(device, dtype), E.to(device, dtype),
                torch.view_as_real(powers[..., c]).to(device), P.to(device))
    return [Kernels(*layer) for layer in zip(*matrices)]


def toeplitz(K: Tensor) -> Tensor:
    """The lower-triangular T (..., c, c) of K (..., c): T[i, j] = K[i - j] for i >= j."""
    c = K.shape[-1]
    # the windows of K[c - 1], ..., K[0], 0, ..., 0 are the rows of T, the last row first
    return pad(K.flip(-1), (0, c - 1)).unfold(-1, c, 1).flip(-2)


class Convolution(torch.autograd.Function):
    """y = K * u + D u, u and y (2k, c, n, B, d / k): forwards for u[:k], backwards (unless `causal`) for u[k:].

    A single chunk is y = T u. Several are convolved by way of H, the state before each of them:

        S = E u     H_(j + 1) = A-bar^c H_j + S_j  (`carry`)     y = [T O] [u, H]

    The gradients are the same products transposed, with the recurrence of the states running the other way:

        [T^T dy, dH] = [T O]^T dy     dS_j = conj(A-bar^c) dS_(j + 1) + dH_(j + 1)     du = T^T dy + E^T dS

    The gradient of A-bar^c is sum_j dS_j conj(H_j); P has none. There are no second derivatives.
    """

    @staticmethod
    def forward(ctx, u: Tensor, TO: Tensor, E: Tensor | None, A: Tensor | None,
                P: Tensor | None, causal: bool) -> Tensor:
        shape, (c, n) = u.shape, u.shape[1:3]
        u = u.reshape(*u.shape[:2], -1)
        if E is not None:
            # u and H share one buffer, because they are read together (compiled, writing to a slice would copy it all)
            uH = u.new_empty(len(u), c + E.shape[1], u.shape[-1])
            uH.as_strided(u.shape, uH.stride()).copy_(u)
            S = torch.bmm(E, uH[:, :c])
            H = uH.as_strided(S.shape, uH.stride(), c * S.shape[-1])
            H.copy_(carry(S, P, n, (False, not causal)))
            u = uH
        ctx.save_for_backward(u, TO, E, P)
        ctx.causal = causal
        return torch.bmm(TO, u).view(shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, TO, E, P = ctx.saved_tensors
        shape, (c, n) = dy.shape, dy.shape[1:3]
        dy = dy.reshape(*dy.shape[:2], -1)
        du, dTO = torch.bmm(TO.mT, dy), torch.bmm(dy, u.mT)
        if E is None:
            return du.view(shape), dTO, None, None, None, None
        # (transposing the real matrix of a complex number conjugates the number)
        dS = carry(du[:, c:], P.transpose(1, 3), n, (True, ctx.causal))
        wide = torch.promote_types(u.dtype, torch.float32)
        (S_re, S_im), (H_re, H_im) = (states.unflatten(1, (-1, 2)).to(wide).unbind(2) for states in (dS, u[:, c:]))
        dA = torch.stack([(S_re * H_re + S_im * H_im).sum(-1), (S_im * H_re - S_re * H_im).sum(-1)], -1)
        return ((du[:, :c] + torch.bmm(E.mT, dS)).view(shape), dTO, torch.bmm(dS, u[:, :c].mT), dA, None, None)


def carry(S: Tensor, P: Tensor, n: int, backwards: tuple[bool, bool]) -> Tensor:
    """H, the state before each of n chunks, from what each chunk adds to it, S; both (2k, 2N, n q), in S's dtype.

        H_i = sum_(j < i) A-bar^(c (i - 1 - j)) S_j     or, where a half of the kernels runs `backwards`,
        H_i = sum_(j > i) A-bar^(c (j - 1 - i)) S_j

    Up to m chunks are one product, which rounds each power of A-bar^c once, so that no error grows from chunk to chunk.
    More chunks go m at a time, with the state between the groups in float32. The cost is linear in n.
    """
    def product(powers: Tensor, rows: Tensor) -> Tensor:
        """powers (k N, 2, i, 2, j) times rows (k N, 2, j, q); powers are mirrored in a half that runs backwards."""
        powers = powers.flip(2, 4) if back else powers
        return torch.bmm(powers.flatten(3).flatten(1, 2), rows.flatten(1, 2)).unflatten(1, (2, -1))

    halves = []
    with torch.autocast(S.device.type, enabled=False):
        for half, P_half, back in zip(S.reshape(len(P), 2, n, -1).chunk(2), P.chunk(2), backwards):
            groups, H, states = half.split(P.shape[-1] - 1, 2), None, []
            for number, rows in enumerate(groups[::-1] if back else groups, 1):
                r = rows.shape[2]
                if H is None:  # nothing comes in: column 0, which is H's, is left out
                    powers = P_half[..., 1:r + 1]
                else:
                    powers, rows = P_half[..., :r + 1], torch.cat([rows, H] if back else [H, rows], 2)
                states.append(product(powers[:, :, :r].to(S.dtype), rows.to(S.dtype)))
                if number < len(groups):
                    H = product(powers[:, :, r:r + 1], rows.to(P.dtype))
            halves.append(states[0] if len(states) == 1 else torch.cat(states[::-1] if back else states, 2))
    return torch.cat(halves).view(S.shape)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact; bfloat16 compiled for a GPU takes `Gelu`, whose error is below that of rounding."""
    fast = x.is_cuda and x.dtype == torch.bfloat16 and torch.compiler.is_compiling()
    return Gelu.apply(x) if fast else nn.functional.gelu(x)


class Gelu(torch.autograd.Function):
    """x Phi(x) and its derivative with one exponential; erf would take longer than reading and writing the memory.

    Phi(x) = sigmoid(z), z = log(Phi(x) / Phi(-x)) = x q(x^2); q is a fit of degree 2 for |x| < 4.5, constant beyond.
    The errors are below 4e-5, and 2e-4 in the derivative; rounding to bfloat16 has a relative error of up to 4e-3.
    """
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        # a copy, because dynamo of torch 2.11 gets gradients wrong where a cast does nothing
        return (wide * normal_cdf(wide)[1]).to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].float()
        t, Phi = normal_cdf(x)
        dz = Q0 + t * (3 * Q1 + t * (5 * Q2))  # dz/dx = q + 2 x^2 q'
        return (grad.float() * (Phi + x * dz * (Phi - Phi * Phi))).to(grad.dtype)


Q0, Q1, Q2 = 1.5948888, 0.074158467, -0.00073317494  # q(t) = Q0 + Q1 t + Q2 t^2


def normal_cdf(x: Tensor) -> tuple[Tensor, Tensor]:
    """t = min(x^2, 4.5^2) and Phi(x) = 1 / (1 + e^-z), z = x q(t), of float32 x; 0 where e^-z overflows."""
    t = (x * x).clamp(max=4.5 ** 2)
    e = torch.exp2(-math.log2(math.e) * x * (Q0 + t * (Q1 + t * Q2)))
    return t, torch.rsqrt(1 + e).square()  # rsqrt is one instruction on a GPU, a quotient several


# ---- BiGS layer and variants ------------------------------------------------------------------------

class BiGSLayer(nn.Module):
    """One BiGS layer (Wang et al. 2023, section 3.2).

        X  = LayerNorm(Xi)
        V  = gelu(Wv X)  (3d)     F = gelu(Wf X)  (d)     B = gelu(Wb X)  (d)
        U1 = Wu1 SSM_forward(F)   U2 = Wu2 SSM_backward(B)
        U  = gelu(Wu (U1 * U2))  (3d)
        Xo = Xi + Wo (U * V)

    No flip is materialised: a linear map commutes with it, so the backward path is the same map followed by an
    anti-causal SSM. The papers' variants:

        k         S4D kernels per direction, each for d / k neighbouring channels
        causal    both SSMs run forwards
        fourier   the function `fourier` replaces the SSMs
        local     tokens of a short convolution that is added to each SSM and starts at zero; 0 for none
        dropout   the dropped share of U1 * U2 and of U * V
    """

    def __init__(self, d: int, N: int = 64, k: int = 1, causal: bool = False, fourier: bool = False,
                 local: int = 0, dropout: float = 0):
        super().__init__()
        self.k, self.causal, self.fourier = k, causal, fourier
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.v, self.fb = nn.Linear(d, 3 * d), nn.Linear(d, 2 * d)  # Wf and Wb in one product
        if not fourier:
            self.forward_ssm, self.backward_ssm = S4D(N, k), S4D(N, k)
        self.local = nn.ModuleList(ShortConvolution(d, local) for _ in range(2)) if local else None
        for convolution in self.local or ():
            nn.init.zeros_(convolution.weight)
        self.u1, self.u2 = nn.Linear(d, d), nn.Linear(d, d)
        self.u = nn.Linear(d, 3 * d)
        self.o = nn.Linear(3 * d, d)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, X: Tensor, R: Tensor, kernels: Kernels | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return Xi = X + R and the next R = Xo - Xi, all (c, n, B, d); mask (c, n, B, 1), bool, is False at padding.

        The mask keeps padding out of the SSMs, the only place where positions mix. In the order (c, n, B) one matrix
        product convolves all chunks. R is added by the next layer, whose norm reads X anyway; without gradients Xi
        overwrites X. V is computed last, so that it does not wait in memory.
        """
        c, n, B, d = X.shape
        X = X + R if torch.is_grad_enabled() else X.add_(R)
        x = self.norm(X).view(-1, d)
        FB = gelu(self.fb(x))
        if mask is not None:
            FB = FB * mask.reshape(-1, 1)
        u = FB.view(c, n, B, 2 * self.k, -1).permute(3, 0, 1, 2, 4)
        y = fourier(u) if self.fourier else Convolution.apply(u, *kernels, self.causal)
        y = y.unflatten(0, (2, -1)).movedim(1, -2).reshape(2, -1, d)
        if self.local is not None:
            forward, backward = FB.view(c, n, B, 2 * d).permute(2, 1, 0, 3).flatten(1, 2).chunk(2, -1)
            near = self.local[0](forward), self.local[1](backward, backward=not self.causal)
            y = y + torch.stack([in_chunks(side, (n, c)).view(-1, d) for side in near])
        W, b = (torch.stack([getattr(u, name) for u in (self.u1, self.u2)]) for name in ("weight", "bias"))
        U = self.u(self.drop(Gate.apply(y, W.to(y.dtype), b)))
        return X, self.o(self.drop(gelu(U) * gelu(self.v(x)))).view(X.shape)


class Gate(torch.autograd.Function):
    """U1 * U2 (tokens, d), U_i = W_i y_i + b_i, of y (2, tokens, d) and W (2, d, d) in one dtype, b (2, d) float32."""

    @staticmethod
    def forward(ctx, y: Tensor, W: Tensor, b: Tensor) -> Tensor:
        U = torch.bmm(y, W.mT)
        ctx.save_for_backward(y, W, b, U)
        return ((U[0] + b[0]) * (U[1] + b[1])).to(y.dtype, copy=True)  # a copy, as in `Gelu`

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, W, b, U = ctx.saved_tensors
        dU = (grad * (U + b[:, None])).flip(0)  # (the compiler would move a flip of U alone to the forward pass)
        db, dU = dU.sum(1), dU.to(y.dtype)
        return torch.bmm(dU, W), torch.bmm(dU.mT, y), db


def in_chunks(X: Tensor, chunks: tuple[int, int]) -> Tensor:
    """X (B, L, d) as (c, n, B, d), padded with zeros to n c tokens; `chunks` is (n, c)."""
    return pad(X, (0, 0, 0, math.prod(chunks) - X.shape[1])).unflatten(1, chunks).permute(2, 1, 0, 3).contiguous()


def from_chunks(X: Tensor) -> Tensor:
    """X (c, n, B, d) as (B, n c, d)."""
    return X.permute(2, 1, 0, 3).flatten(1, 2)


def fourier(u: Tensor) -> Tensor:
    """Re(FFT(u)) / sqrt(L) along the sequence, (2, L, 1, B, d) like u; u[1] is flipped before and after.

    The transform spans padding, so its result depends on how far a batch is padded.
    """
    with torch.autocast(u.device.type, enabled=False):
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        wide = torch.stack([wide[0], wide[1].flip(0)])
        y = torch.fft.fft(wide, dim=1, norm="ortho").real
        return torch.stack([y[0], y[1].flip(0)]).to(u.dtype)


class ShortConvolution(nn.Module):
    """A depthwise convolution over a few tokens: y[t] = sum_(j < width) w[j] u[t - j] + b, w (width, channels)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, channels)), nn.Parameter(torch.zeros(channels))
        nn.init.uniform_(self.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, u: Tensor, backward: bool = False) -> Tensor:
        """y of u, both (B, L, channels) in u's dtype; `backward`, of u[t + j] for u[t - j]. Beyond its ends u is 0."""
        L, width = u.shape[1], len(self.weight)
        u = pad(u, (0, 0, 0, width - 1) if backward else (0, 0, width - 1, 0))
        w = self.weight if backward else self.weight.flip(0)
        return (self.bias + sum(w[j] * u[:, j:j + L] for j in range(width))).to(u.dtype)


# ---- compared models --------------------------------------------------------------------------------

class TransformerLayer(nn.Module):
    """A BERT layer (Devlin et al. 2019; post-norm, as in Vaswani et al. 2017) with heads of 64 and no dropout.

        X' = LayerNorm(Xi + Wo softmax(q k^T / 8) v)     Xo = LayerNorm(X' + W2 gelu(W1 X'))

    With `rotary` it is a RoFormer layer (Su et al. 2021, arXiv 2104.09864, equation 34): q and k are rotated first.
    """
    plain = False  # keep the (L, L) attention matrices in memory, as the papers' transformers do

    def __init__(self, d: int, _N: int = 0, rotary: bool = True):
        super().__init__()
        self.rotary = rotary
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-12), nn.LayerNorm(d, eps=1e-12)

    def forward(self, X: Tensor, rotation: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Xo of X = Xi, both (B, L, d); rotation (2, L, 32), cosines and sines; mask (B, L, 1), bool."""
        X = self.norm1(X + self.attend(X, rotation, mask))
        return self.norm2(X + self.down(gelu(self.up(X))))

    def attend(self, X: Tensor, rotation: Tensor | None, mask: Tensor | None) -> Tensor:
        """Wo softmax(q k^T / 8) v, (B, L, d), of the X that q, k and v are made of."""
        q, k, v = heads(self.qkv(X), rotation)
        mask = None if mask is None else mask.mT[:, None]
        if self.plain:
            scores = q @ k.mT / 8
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            Y = scores.softmax(-1).to(v.dtype) @ v
        else:
            Y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(Y.transpose(1, 2).flatten(2))

    @staticmethod
    def side_inputs(encoder: nn.Module, X: Tensor) -> list[Tensor | None]:
        """What each layer gets beside its X: the rotation, if it is rotary."""
        return [rotation(X) if encoder.layers[0].rotary else None] * len(encoder.layers)


class AttentionLayer(TransformerLayer):
    """The attention layer of codessm-hybrid: pre-norm, without positions, as its BiGS layers say where a token is.

        X' = Xi + Wo softmax(s log(n) q k^T / 8) v  of LayerNorm(Xi)     Xo = X' + W2 gelu(W1 LayerNorm(X'))

    A token reads those at most `WINDOW` places away, so that the cost is linear in length. n is the number of tokens of
    the row, at most 2 WINDOW + 1. s is learned for each head, from 1 / log(128) on: attention stays as sharp among many
    tokens as among few (Nakanishi 2025, arXiv 2501.19399).
    """
    WINDOW = 256

    def __init__(self, d: int):
        super().__init__(d, rotary=False)
        self.scale = nn.Parameter(torch.full((d // 64, 1, 1), 1 / math.log(128)))

    def forward(self, X: Tensor, R: Tensor, _kernels: None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return X' and Xo - X', of Xi = X + R, with the shapes of `BiGSLayer.forward`."""
        c, n, B, d = X.shape
        X, mask = from_chunks(X + R), None if mask is None else from_chunks(mask)
        X = X + self.attend(self.norm1(X), None, mask)
        R = self.down(gelu(self.up(self.norm2(X))))
        return in_chunks(X, (n, c)), in_chunks(R, (n, c))

    def attend(self, X: Tensor, _rotation: None, mask: Tensor | None) -> Tensor:
        """Wo softmax(s log(n) q k^T / 8) v over the window of each token, (B, L, d), of what q, k and v are made of."""
        q, k, v = heads(self.qkv(X), None)
        W, (B, L, d), place = self.WINDOW, X.shape, torch.arange(X.shape[1], device=X.device)
        real = X.new_ones(B, L, dtype=torch.bool) if mask is None else mask[..., 0]
        n = real.sum(1).clamp(1, 2 * W + 1)[:, None, None, None].to(self.scale.dtype)
        q = (q * self.scale * n.log()).to(v.dtype)
        if L <= W + 1:  # the window is the whole row
            read = None if mask is None else real[:, None, None]
        else:
            away = place - place[:, None]
            if L > 3 * W:  # blocks of W tokens read themselves and both neighbours: (B blocks, heads, W or 3 W, 64)
                blocks = -(-L // W)
                rest = blocks * W - L
                q = pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, W)).transpose(1, 2).flatten(0, 1)
                k, v = (pad(x, (0, 0, W, W + rest)).unfold(2, 3 * W, W).permute(0, 2, 1, 4, 3).flatten(0, 1)
                        for x in (k, v))
                real = pad(real, (W, W + rest)).unfold(1, 3 * W, W).flatten(0, 1)
                away = place[:3 * W] - W - place[:W, None]
            # (each reads itself, because not every kernel takes a softmax over nothing, as at padding)
            read = ((away.abs() <= W) & real[:, None] | (away == 0))[:, None]
        Y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=read)
        return self.out(Y.unflatten(0, (B, -1)).transpose(2, 3).reshape(B, -1, d)[:, :L])


def heads(qkv: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, heads, L, 64), from qkv (B, L, 3 x heads x 64); q and k are rotated, if with a rotation."""
    q, k, v = qkv.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
    return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)


def rotation(X: Tensor) -> Tensor:
    """Cosines and sines (2, L, 32) of the angles i 10000^(-e / 32), by which the pair (x_e, x_(e + 32)) turns at i.

    RoFormer pairs neighbours, (x_2e, x_(2e + 1)): the same model with its channels in another order.
    """
    wide = dict(dtype=torch.float64, device="cpu" if X.device.type == "mps" else X.device)
    # a float32 angle has an error of 1e-3 at position 32,768
    angle = torch.arange(X.shape[1], **wide)[:, None] * 10_000 ** (-torch.arange(32, **wide) / 32)
    return torch.stack([angle.cos(), angle.sin()]).to(X.device, X.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, heads, L, 64) with each pair turned by its angle; rotation (2, L, 32), cosines and sines."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class ZambaLayer(nn.Module):
    """A causal Mamba-2 layer (Dao and Gu 2024, arXiv 2405.21060, section 7), as in Zamba2 (arXiv 2411.15242).

        X  = RMSNorm(Xi)     z, u, dt = Win X  (2d, 2d + 2N, heads)     dt = softplus(dt + bias)
        x, B, C = silu(conv4(u))  (2d, N, N)     y = SSD(x, dt, A, B, C) + D x     A = -exp(A_log), one per head
        Xo = Xi + Wout RMSNorm(y * silu(z))

    A layer with an `adapter` calls a shared block first: X = RMSNorm(Xi + W block(Xi)). It needs no mask, because
    padding is on the right and nothing looks ahead.
    """
    CHUNK = 64

    def __init__(self, d: int, N: int = 64):
        super().__init__()
        H = 2 * d // 64
        self.zudt_widths, self.xBC_widths = [2 * d, 2 * d + 2 * N, H], [2 * d, N, N]
        self.norm, self.gated_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(2 * d, eps=1e-5)
        self.into, self.out = nn.Linear(d, sum(self.zudt_widths), bias=False), nn.Linear(2 * d, d, bias=False)
        self.convolution = ShortConvolution(2 * d + 2 * N, 4)
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        step = torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.D = nn.Parameter(torch.ones(H))
        self.adapter = self.linear = None

    @staticmethod
    def share(layers: nn.ModuleList, d: int) -> nn.ModuleList:
        """Give every third layer an adapter of rank d / 8 and a linear map; return the blocks that these call."""
        for layer in layers[2::3]:
            layer.adapter = nn.Sequential(nn.Linear(d, d // 8, bias=False), nn.Linear(d // 8, 8 * d, bias=False))
            layer.linear = nn.Linear(d, d, bias=False)
        return nn.ModuleList(SharedBlock(d) for _ in range(2 if len(layers) >= 12 else 1))

    @staticmethod
    def side_inputs(encoder: nn.Module, X: Tensor) -> list[tuple | None]:
        """What each layer gets beside its X: (embedding, rotation, block) if it calls a shared block, else None."""
        angles, blocks = rotation(X), itertools.cycle(encoder.shared)
        return [None if layer.adapter is None else (X, angles, next(blocks)) for layer in encoder.layers]

    def forward(self, X: Tensor, call: tuple | None, _mask: Tensor | None = None) -> Tensor:
        """Xo of X = Xi, both (B, L, d)."""
        x = X
        if call is not None:
            embedding, rotation, block = call
            x = X + self.linear(block(X, embedding, rotation, self.adapter))
        z, u, dt = self.into(self.norm(x)).split(self.zudt_widths, -1)
        x, B, C = nn.functional.silu(self.convolution(u)).split(self.xBC_widths, -1)
        x = x.unflatten(-1, (-1, 64))  # (B, L, heads, 64)
        dt = nn.functional.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # (B, L, heads), float32
        y = ssd((x * dt[..., None]).to(x.dtype), -self.A_log.exp() * dt, B, C, self.CHUNK)
        y = (y + self.D[:, None] * x).flatten(2) * nn.functional.silu(z)
        return X + self.out(self.gated_norm(y.to(X.dtype)))


class SharedBlock(nn.Module):
    """The attention and MLP that Zamba2's layers share (arXiv 2411.15242, section II); they read X and the embedding.

        X' = RMSNorm([X, embedding])  (2d)     Y = RMSNorm(Wo softmax(q k^T / sqrt(32)) v)  (d), rotary and causal
        g, u = Wup Y + adapter(Y)  (4d, 4d)    Wdown (gelu(g) * u)  (d)
    """

    def __init__(self, d: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(2 * d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.qkv, self.out = nn.Linear(2 * d, 6 * d, bias=False), nn.Linear(2 * d, d, bias=False)
        self.up, self.down = nn.Linear(d, 8 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, X: Tensor, embedding: Tensor, rotation: Tensor, adapter: nn.Module) -> Tensor:
        """(B, L, d) of X and the embedding, both (B, L, d)."""
        q, k, v = heads(self.qkv(self.norm1(torch.cat([X, embedding], -1))), rotation)
        Y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=32 ** -0.5)
        Y = self.norm2(self.out(Y.transpose(1, 2).flatten(2)).to(X.dtype))
        gate, up = (self.up(Y) + adapter(Y)).chunk(2, -1)
        return self.down(gelu(gate) * up)


def ssd(x: Tensor, a: Tensor, B: Tensor, C: Tensor, c: int) -> Tensor:
    """y (b, L, H, P) by state-space duality (Dao and Gu 2024, section 6), as matrix products over chunks of c tokens.

        h_t = exp(a_t) h_(t - 1) + B_t x_t^T  (N, P)     y_t = h_t^T C_t     for each of H heads

    x (b, L, H, P), a (b, L, H) float32, B and C (b, L, N). Decays and sums of states stay in a's dtype. The cost is
    linear in L.
    """
    b, L, H, P = x.shape
    c = min(c, L)
    n = -(-L // c)
    x, a, B, C = (pad(t, (0, 0) * (t.ndim - 2) + (0, n * c - L)).unflatten(1, (n, c)) for t in (x, a, B, C))
    total = a.cumsum(2)  # (b, n, c, H): log decay since the start of the chunk
    within = (C @ B.mT)[:, :, None] * decays(total.movedim(-1, 2))  # (b, n, H, c, c)
    y = (within.to(x.dtype) @ x.transpose(2, 3)).transpose(2, 3)
    if n > 1:
        last = total[:, :, -1]  # (b, n, H): of the whole chunk
        S = B.mT @ (x * (last[:, :, None] - total).exp()[..., None]).to(x.dtype).flatten(3)  # (b, n, N, H P)
        before = states(S.unflatten(-1, (H, P)).to(a.dtype), last)
        y = y + (C @ before.to(C.dtype).flatten(3)).unflatten(-1, (H, P)) * total.exp()[..., None]
    return y.flatten(1, 2)[:, :L]


def decays(total: Tensor) -> Tensor:
    """exp(total_i - total_j) at row i and column j <= i, and 0 above the diagonal: (..., c, c) of total (..., c)."""
    c = total.shape[-1]
    above = torch.ones(c, c, dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(above, -math.inf).exp()


def states(S: Tensor, a: Tensor) -> Tensor:
    """H, the state before each chunk, from what each adds to it, S; both (b, n, N, H, P). a (b, n, H), log decays.

    H_(j + 1) = exp(a_j) H_j + S_j; up to `GROUP` chunks are one product, so the cost is linear in n.
    """
    H, before = torch.zeros_like(S[:, :1]), []
    with torch.autocast(S.device.type, enabled=False):
        for S_group, a_group in zip(S.split(GROUP, 1), a.split(GROUP, 1)):
            D = decays(pad(a_group, (0, 0, 1, 0)).cumsum(1).mT)  # (b, H, m + 1, m + 1)
            H = torch.einsum("bhij,bjnhp->binhp", D, torch.cat([H, S_group], 1))
            before.append(H[:, :-1])
            H = H[:, -1:]
    return torch.cat(before, 1)


# ---- the encoder ------------------------------------------------------------------------------------

class Model(NamedTuple):
    """What a name of `--model` stands for."""
    layer: type
    k: int = 0  # S4D kernels per direction without --kernels; 0 for a model that has none
    options: dict = {}  # of the layer
    positions: bool = False  # learned absolute positions
    extra_layers: int = 0  # beyond those of the size
    attention: bool = False  # the layer after the first half is an `AttentionLayer`
    lr: float = 5e-4  # the peak learning rate at a width of 1,024; at most 2e-3 at others


MODELS = {
    "codessm": Model(BiGSLayer, 1),
    "codessm-pos": Model(BiGSLayer, 1, positions=True),
    "codessm-do": Model(BiGSLayer, 1, dict(dropout=0.1)),
    "codessm-uni": Model(BiGSLayer, 1, dict(causal=True)),
    "codef": Model(BiGSLayer, 0, dict(fourier=True)),
    "codessm-8k": Model(BiGSLayer, 8),
    "codessm-hf": Model(BiGSLayer, 1, dict(local=3)),
    "codessm-hybrid": Model(BiGSLayer, 8, attention=True),
    "bertcoder": Model(TransformerLayer, options=dict(rotary=False), positions=True, lr=2e-4),
    "rocoder": Model(TransformerLayer, lr=2e-4),
    "zamba": Model(ZambaLayer, extra_layers=2, lr=3e-4),
}
CHUNK = {"cuda": 512}  # the longest c, with up to 8 kernels; 256 on other devices
GROUP = 64  # m, with up to 8 kernels


class Encoder(nn.Module):
    """Token embedding (plus positions in some models), LayerNorm, and the layers; as in BiGS, no norm after the last.

    Args:
        vocab: number of token ids.
        d, layers: width and number of layers; zamba has two layers more.
        N: complex modes per S4D kernel; in zamba the size of the state.
        model: one of `MODELS`.
        kernels: S4D kernels per direction, a divisor of d; None for the model's own number.
        ctx: length of the longest sample; required by models with learned positions, ignored by others.
    Linear maps start at N(0, 0.64 / sqrt(d)) (BiGS's 0.02 at d = 1,024), embeddings at N(0, 0.02).
    `config` holds the arguments: `Encoder(**config)` has the same shapes. Raises ValueError where they do not fit.
    """
    chunk: int | None = None  # the longest c, in place of the device's
    kernel_cache: dict | None = None  # kernels by (n, c, dtype), while the weights do not change (`Objective.frozen`)

    def __init__(self, vocab: int, d: int, layers: int, N: int = 64, model: str = "codessm",
                 kernels: int | None = None, ctx: int | None = None):
        super().__init__()
        kind = MODELS[model]
        if (kind.layer is not BiGSLayer or kind.attention) and d % (32 if kind.layer is ZambaLayer else 64):
            raise ValueError(f"{model} has heads of 64 channels, and {d} channels do not divide into them")
        if kernels and not kind.k:
            raise ValueError(f"{model} has no S4D kernels; the models that have some are "
                             f"{', '.join(name for name in MODELS if MODELS[name].k)}")
        k = kernels or kind.k
        if k and d % k:
            raise ValueError(f"{k} cannot share {d} channels equally: give a divisor of {d}")
        if kind.positions and not ctx:
            raise ValueError(f"{model} has learned positions: ctx says how many")
        if kind.attention and layers < 2:
            raise ValueError(f"{model} needs two layers or more")
        self.max_length = ctx if kind.positions else None
        self.shrink = min(1, math.sqrt(8 / (k or 1)))  # for c and m: matrices of many kernels take no more memory
        self.config = dict(vocab=vocab, d=d, layers=layers, N=N, model=model, kernels=k, ctx=self.max_length)
        self.embedding = nn.Embedding(vocab, d)
        self.positions = nn.Embedding(ctx, d) if kind.positions else None
        self.norm = nn.LayerNorm(d, eps=1e-12)
        options = kind.options | (dict(k=k) if k else {})
        self.layers = nn.ModuleList(kind.layer(d, N, **options) for _ in range(layers + kind.extra_layers))
        if kind.attention:
            self.layers[layers // 2] = AttentionLayer(d)
        self.shared = ZambaLayer.share(self.layers, d) if kind.layer is ZambaLayer else None
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                tasks.initialise(module, d)

    def forward(self, ids: Tensor, lengths: Tensor | None = None, below: list[Tensor] | None = None) -> Tensor:
        """Hidden states (B, L, d), float32, of right-padded token ids (B, L), int32 or int64.

        `lengths` (B,) counts the real tokens of each row; without it every token is real. Hidden states at padding are
        unspecified. Real positions do not depend on padding, except in codef, whose DFT spans it. The input of each
        layer, (B, L, d), is appended to `below`, if it is given. Raises `data.Problem` where L is beyond the learned
        positions.
        """
        mask, L, device = None, ids.shape[1], ids.device.type
        if self.max_length and L > self.max_length:
            raise Problem(f"{self.config['model']} has learned positions for {self.max_length} tokens, not for {L}")
        chunks = self.chunks(L)
        if lengths is None and chunks and math.prod(chunks) > L:
            lengths = ids.new_full(ids.shape[:1], L)
        if lengths is not None:  # (an empty row counts as one token, or attention would have nothing to attend to)
            mask = (torch.arange(L, device=ids.device) < lengths[:, None].clamp(min=1))[..., None]
        X = self.embed(ids, chunks)
        if not chunks:
            for layer, side_input in zip(self.layers, type(self.layers[0]).side_inputs(self, X)):
                if below is not None:
                    below.append(X)
                X = layer(X, side_input, mask)
            return X
        mask = None if mask is None else in_chunks(mask, chunks)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else X.dtype
        # (R requires a gradient even here, or the first layer would be compiled apart from the others)
        R = X.new_zeros(X.shape, dtype=dtype).requires_grad_(X.requires_grad)
        for layer, kernels in zip(self.layers, self.kernels(L, dtype)):
            if below is not None:
                below.append(self.in_tokens(X, R)[:, :L])
            X, R = layer(X, R, kernels, mask)
        return self.in_tokens(X, R)[:, :L]

    def kernels(self, L: int, dtype: torch.dtype = torch.float32) -> list[Kernels | None]:
        """The `Kernels` of each layer for L tokens, made for all layers at once; None for a layer without S4D."""
        (n, c), layers = self.chunks(L), self.layers
        if layers[0].fourier:
            return [None] * len(layers)
        kernels = (self.kernel_cache or {}).get((n, c, dtype))
        if kernels is None:
            ssms = [module for module in layers.modules() if isinstance(module, S4D)]
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.kernel_cache is None):
                made = iter(make_kernels(ssms, c, n, max(1, int(GROUP * self.shrink)), dtype, layers[0].causal))
            kernels = [next(made) if isinstance(layer, BiGSLayer) else None for layer in layers]
            if self.kernel_cache is not None:
                # (on a GPU all stay: recorded batches read them at their addresses)
                if self.embedding.weight.device.type != "cuda" and len(self.kernel_cache) == 4:
                    self.kernel_cache.clear()
                self.kernel_cache[n, c, dtype] = kernels
        return kernels

    def chunks(self, L: int) -> tuple[int, int] | None:
        """(n, c): L tokens are convolved in n chunks of c. None if the layers are not BiGS."""
        if not isinstance(self.layers[0], BiGSLayer):
            return None
        if self.layers[0].fourier:
            return 1, L
        longest = CHUNK.get(self.embedding.weight.device.type, 256) * self.shrink
        longest = self.chunk or max(8, int(longest) // 8 * 8)
        n = -(-L // longest)
        return n, -(-L // (8 * n)) * 8  # the matrix units want multiples of 8

    def embed(self, ids: Tensor, chunks: tuple[int, int] | None = None) -> Tensor:
        """The first layer's input, float32 (B, L, d), of ids (B, L); given `chunks`, (n, c), it is (c, n, B, d)."""
        X = self.embedding(ids)
        X = self.norm(X if self.positions is None else X + self.positions.weight[:ids.shape[1]])
        return in_chunks(X, chunks) if chunks else X

    def in_tokens(self, X: Tensor, R: Tensor) -> Tensor:
        """X + R as (B, n c, d), of X and R (c, n, B, d)."""
        return from_chunks(X + R)

    def compile_parts(self) -> None:
        """Compile the layers, which share one compilation per shape, and what comes before and after them.

        `make_kernels` stays eager: its gradient takes longer to compile than all the rest, and little time to run.
        """
        for layer in self.layers:
            layer.compile(dynamic=False, fullgraph=True)
        self.embed, self.in_tokens = (torch.compile(part.__get__(self), dynamic=False, fullgraph=True)
                                      for part in (Encoder.embed, Encoder.in_tokens))

    def same_layers(self, model: str) -> bool:
        """Whether a model has the same kind of layers, so that weights can be copied."""
        return MODELS[model].layer is MODELS[self.config["model"]].layer

    def linear_maps(self) -> list[nn.Linear]:
        """The linear maps of the layers, once per use by a token: those of a shared block come with each call."""
        parts = [*self.layers]
        if self.shared:
            parts += [call[-1] for call in ZambaLayer.side_inputs(self, torch.empty(1, 1, 1)) if call]
        return [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> Objective:
    """The model of a checkpoint, or of the state file of an unfinished run, in evaluation mode; raises `data.Problem`.

    It is one of the objectives of tasks.py, with `encode(texts)`: `tasks.MLM`, with `fill_mask(text)`, or that of the
    task it was fine-tuned for, with `predict(texts)` and `labels`. Each has a `tokenizer` and an `encoder`, which maps
    ids (B, L) and lengths (B,) to hidden states (B, L, d). Loading runs no code from the file.
    """
    return tasks.restore(tasks.read(path), path, Encoder).to(device).eval()


def search(query: str, paths: str | os.PathLike | Sequence[str] = ".", model: Objective | None = None, k: int = 10
           ) -> list[tasks.Hit]:
    """The best k units of the source trees below `paths` for a query, as `codessm search` finds them, by BM25 alone
    without a `model`. The index is kept for the next call (see `tasks.Index`). Raises `data.Problem`.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    with closing(tasks.Index([os.fspath(path) for path in paths], model)) as index:
        return index.search(query, k)


# ---- options ----------------------------------------------------------------------------------------

def integer(least: int = 1, most: int = 10**12, **more: object) -> dict:
    """The attributes of an option with a number."""
    return dict(type=click.IntRange(least, most), metavar="N") | more


OPTIONS = {
    "--ckpt": dict(metavar="FILE", required=True, help="The checkpoint."),
    "--data": dict(metavar="PATH", help="The folder or file of the benchmark as published, or a corpus for mlm.  "
                                        "[default: ./TASK; mlm: the standard library]"),
    "--ctx": integer(8, 2**24, help="Tokens per sample, or per function of a task, with special tokens.  [default: "
                                    "that of the model or the task; in pretraining 256]"),
    "--size": dict(type=click.Choice(list(SIZES)),
                   help="12 layers of width 1024, 6 of 512, 6 of 256, or 4 of 128.  [default: base]"),
    "--model": dict(type=click.Choice(list(MODELS)),
                    help="A variant, or a model to compare with; the README describes them.  [default: codessm]"),
    "--kernels": integer(help="S4D kernels per direction, each for an equal share of the channels.  "
                              "[default: 1; codessm-8k and -hybrid: 8]"),
    "--init": dict(metavar="FILE", help="Start from the weights of a codessm checkpoint, with its size, and its "
                                        "model and tokenizer unless others are given, or from a BiGS state dict."),
    "--tokenizer": dict(metavar="PATH", help="A Hugging Face tokenizer.json, or a folder with vocab.json and "
                                             "merges.txt.  [default: train one on the data]"),
    "--vocab": integer(1, 10_000_000, help="Entries of the tokenizer to train.  [default: 32100; mini and tiny: 4096]"),
    "--steps": integer(help="Optimizer steps, in place of --epochs."),
    "--epochs": integer(help="Passes over the training data.  [default: the task's; in pretraining 1]"),
    "--batch": integer(1, 2**20, default=32, show_default=True,
                       help="Samples at a time; the result does not depend on it (except for codef)."),
    "--accumulate": integer(default=1, show_default=True, help="Cut each batch into N pieces, to save memory."),
    "--lr": dict(type=click.FloatRange(0, min_open=True), metavar="RATE",
                 help="Peak learning rate.  [default: 5e-4 for base, 1e-3 small, 2e-3 mini and tiny; less for "
                      "bertcoder, rocoder and zamba; with --init a tenth]"),
    "--eval-every": integer(help="Steps between evaluations.  [default: an epoch's; in pretraining a tenth of all]"),
    "--obfuscate": dict(type=click.FloatRange(0, 1), metavar="SHARE",
                        help="Replace the names in this share of the training functions, drawn anew each epoch "
                             "(retrieval of Python).  [default: 0.5 for advtest, else 0]"),
    "--bag-of-words": dict(type=click.FloatRange(0), metavar="WEIGHT", default=0.5, show_default=True,
                           help="Weight of a second loss, which prepares for search: the mean of the hidden states "
                                "tells the words. 0 is masked tokens alone, as in the papers."),
    "--limit": integer(help="Read only the first N records of each file."),
    "--code-field": dict(metavar="NAME", help="The field with the code, if its name is not one that the README lists."),
    "--text-field": dict(metavar="NAME", help="The field with the text that describes it, likewise."),
    "--max-line": integer(1, 10_000, metavar="MB", default=data.MAX_LINE // 10**6, show_default=True,
                          help="A longer line is a bad line."),
    "--skip-bad": dict(is_flag=True, help="Skip and count bad lines; without it the first one is an error."),
    "--seed": integer(0, 2**63 - 1, default=0, show_default=True, help="Seed of all random choices."),
    "-o": dict(metavar="FILE", help="The checkpoint to write.  [default: TASK.pt; of pretraining model.pt]"),
    "--restart": dict(is_flag=True, help="Start over and replace what an earlier run left at -o."),
    "--device": dict(default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto: cuda if there is one."),
    "--compile/--no-compile": dict(default=None, help="Compile the layers, anew for each padded length.  [default: on "
                                                      "a GPU, in runs so long that it pays]"),
    "--json": dict(is_flag=True, help="Print the result as JSON."),
}
PARAMETERS = {"--compile/--no-compile": "compiled", "--data": "paths", "-o": "output", "--json": "as_json"}


def options(names: str, **changes: dict) -> Callable:
    """Add the named options to a command; `changes` are the attributes that differ in this one, by the option."""
    def decorate(command: Callable) -> Callable:
        for name in reversed(names.split()):
            change = changes.get(name.split("/")[0].strip("-").replace("-", "_"), {})
            command = click.option(name, *filter(None, [PARAMETERS.get(name)]), **OPTIONS[name] | change)(command)
        return command
    return decorate


class Commands(click.Group):
    """Makes every error end in one sentence and an exit code, and lets no failing stream end a run with a traceback."""

    def main(self, *args, **options):
        def interrupt(number, _frame):
            raise KeyboardInterrupt(number)

        gc.freeze()  # a collection, of which parsing makes many, need not look at what torch has imported
        # in this order each takes the number of a closed stream, which else the next file to be opened would get
        sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")
        stderr, sys.stderr = sys.stderr, data.QuietStream(sys.stderr)
        code = 0
        try:
            with tasks.handle_signals(interrupt):
                super().main(*args, **options | {"standalone_mode": False})
                data.all_gather(None)  # no rank leaves before all have finished
        except SystemExit:  # the reader of standard output is gone
            code = 1
        except BaseException as error:
            error = error.__cause__ if isinstance(error, click.Abort) else error  # click has caught a KeyboardInterrupt
            problem = error if isinstance(error, click.ClickException) else tasks.explain(error)
            if isinstance(error, KeyboardInterrupt):
                problem.message += ": nothing is lost"
            elif isinstance(error, OSError) and error.filename is None:
                problem.message = f"could not write the output: {problem.message}"
            tasks.tell_torchrun(problem.message)
            if isinstance(error, click.UsageError) and several_processes() and os.environ.get("RANK", "0") != "0":
                time.sleep(2)  # rank 0 says the same, unless torchrun ends it for our end
            else:
                problem.show()
            code = problem.exit_code
        finally:
            sys.stderr = stderr
        tasks.leave_ranks(code)
        sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
             epilog="Example: codessm pretrain --size tiny --steps 200 && codessm COMMAND --help")
@click.version_option(__version__, prog_name="codessm")
@click.pass_context
def cli(ctx):
    """CodeSSM: a bidirectional state-space encoder of source code, linear in length."""
    if several_processes():
        if ctx.invoked_subcommand not in ("pretrain", "finetune", "evaluate"):
            raise click.UsageError(f"{ctx.invoked_subcommand} runs in one process: start it without torchrun")
        tasks.join_ranks()


def several_processes() -> bool:
    """Whether torchrun, or what sets its variables, has started several processes."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def choose_device(name: str) -> torch.device:
    """The device of `--device`; auto is cuda if there is a GPU, else cpu. Several processes take a GPU each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if data.world_size() > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(1, device=torch.device(name)).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events and graphs belong to the current device
        if device.type in ("cpu", "cuda", "mps"):
            return device
    except (RuntimeError, AssertionError):
        pass
    raise Problem(f"--device {name}: there is no such device here; cpu always works"
                  + ", and of GPUs each process takes its own (--nproc-per-node)" * (data.world_size() > 1))


def choose_ctx(ctx: int | None, default: int, encoder: nn.Module | None, path: str | None) -> int:
    """--ctx, or the default as far as learned positions go; raises `Problem` for a --ctx that goes beyond them."""
    most = encoder.max_length if encoder else None
    if most is None or (ctx or default) <= most:
        return ctx or default
    model = encoder.config["model"]
    reason = f"{path} is a {model}, and {model} has learned positions for {most} tokens"
    if ctx:
        raise Problem(f"--ctx {ctx} is too much: {reason}")
    info(f"ctx {most} rather than {default}: {reason}")
    return most


# ---- commands ---------------------------------------------------------------------------------------

def check_kernels(model: str, size: str, kernels: int | None) -> None:
    """Raise UsageError if a model of this size cannot have so many kernels."""
    try:
        with torch.device("meta"):
            Encoder(1, **SIZES[size], model=model, kernels=kernels, ctx=1)
    except ValueError as error:
        raise click.UsageError(f"--kernels: {error}") from None


def check(settings: Settings) -> None:
    """Raise UsageError where options exclude each other, `Problem` where a run would overwrite what it reads."""
    if settings.ckpt is not None and any((settings.model, settings.kernels, settings.size, settings.init,
                                          settings.tokenizer, settings.vocab)):
        raise click.UsageError("--ckpt brings its own --model, --size, --tokenizer and --vocab: give it without them, "
                               "and without --kernels and --init")
    if settings.obfuscate and settings.task not in ("advtest", "nlcodesearch", "retrieval"):
        raise click.UsageError(f"--obfuscate is for advtest, nlcodesearch and retrieval, not for {settings.task}")
    if settings.steps and settings.epochs:
        raise click.UsageError("give --steps or --epochs, not both")
    if settings.vocab and settings.tokenizer:
        raise click.UsageError("give --tokenizer or --vocab, not both: a given tokenizer has its own entries")
    for name in ("lr", "bag_of_words", "obfuscate"):
        if not math.isfinite(value := getattr(settings, name) or 0):
            raise click.UsageError(f"--{name.replace('_', '-')} {value} is not a number to learn with")
    start, written = settings.ckpt or settings.init, os.path.realpath(settings.output)
    if start and os.path.realpath(start) in (written, f"{written}.state"):
        raise Problem(f"-o {settings.output} would replace what --ckpt or --init is read from: give another -o")


def prepare(settings: Settings, output: tasks.Output) -> tuple:
    """Read what a run starts from and complete its settings, on rank 0 alone, so that only one process reports errors.

    Returns what all ranks need, (settings, dataset, tokenizer), and what rank 0 needs, (model of --ckpt, --init, state)
    """
    task = data.TASKS[settings.task]
    choose_device(settings.device)
    pretrained = load(settings.ckpt) if settings.ckpt is not None else None
    init = tasks.InitialWeights.read(settings.init) if settings.init is not None else None
    if init and init.config:  # what is not given is as in the checkpoint
        if init.config.get("model") not in MODELS:
            raise Problem(f"--init {settings.init} is no model that this program has")
        if settings.model is None:
            settings.model, settings.kernels = init.config["model"], settings.kernels or init.config.get("kernels")
        shape = {name: init.config.get(name) for name in ("d", "layers")}
        settings.size = settings.size or next((size for size in SIZES if SIZES[size] == shape), None)
    if not pretrained:
        settings.model, settings.size = settings.model or "codessm", settings.size or "base"
        check_kernels(settings.model, settings.size, settings.kernels)
    settings.ctx = choose_ctx(settings.ctx, task.ctx, pretrained and pretrained.encoder, settings.ckpt)
    settings.obfuscate = task.obfuscate if settings.obfuscate is None else settings.obfuscate
    dataset = read_dataset(settings, task.splits, obfuscated=settings.obfuscate > 0)
    settings.files = {source.name: source.mark for source in dataset.sources} | {"lines": f"CRC {dataset.checksum:08x}"}
    if start := settings.ckpt or settings.init:
        settings.files[start] = data.open_source(start).mark
    if settings.tokenizer is not None:
        tokenizer = data.load_tokenizer(settings.tokenizer)
        settings.files["--tokenizer"] = str(zlib.crc32(tokenizer.text.encode()))
    else:
        tokenizer = init.tokenizer if init and not settings.vocab else pretrained and pretrained.tokenizer
    config = pretrained.encoder.config if pretrained else dict(SIZES[settings.size], model=settings.model)
    # inverse to the width, and a tenth from other weights
    settings.lr = settings.lr or min(2e-3, MODELS[config["model"]].lr * 1024 / config["d"]) / (10 if init else 1)
    settings.batch = settings.batch or task.batch
    settings.vocab = tokenizer.vocab if tokenizer else settings.vocab or VOCABULARY.get(settings.size)
    settings.epochs = None if settings.steps else settings.epochs or task.epochs
    if data.world_size() > 1 and "-" in settings.files.values():
        raise Problem("standard input or a pipe cannot be read by several processes: write it to a file first")
    state = output.resume(settings)
    if state:
        tokenizer = data.Tokenizer(state["tokenizer"], output.state_path)
    return (settings, dataset, tokenizer or data.train_tokenizer(dataset, settings.vocab)), (pretrained, init, state)


def read_dataset(settings: Settings, wanted: Iterable[str], **options) -> data.Dataset:
    """The wanted splits of a task, by the settings and the other arguments of `data.read_dataset`."""
    return data.read_dataset(settings.task, settings.paths, wanted, limit=settings.limit, skip_bad=settings.skip_bad,
                             longest=settings.max_line * 10**6, code_field=settings.code_field,
                             text_field=settings.text_field, **options)


def fit(settings: Settings) -> None:
    """Train for a task, from reading the files to printing the result: `pretrain` and `finetune`."""
    started = time.monotonic()
    check(settings)
    with tasks.Output(settings.output, settings.restart) as output:
        settings.output = output.path
        shared, (pretrained, init, state) = prepare(settings, output) if data.rank() == 0 else (None, (None,) * 3)
        settings, dataset, tokenizer = data.broadcast(shared)
        device, ctx, batch, seed = choose_device(settings.device), settings.ctx, settings.batch, settings.seed
        task, splits = data.TASKS[settings.task], dataset.splits
        epoch_steps = -(-len(splits["train"].examples) // batch)
        several_epochs = (settings.steps or 0) > epoch_steps or (settings.epochs or 0) > 1
        store = data.tokenise(dataset, tokenizer, ctx, dataset.items_read(settings.steps, batch, seed), several_epochs,
                              output.tokens_path)
        train = data.Batches(store, tokenizer, ctx, splits["train"].examples, batch, seed, splits["train"].labels,
                             settings.obfuscate)
        held_out = {name: data.Batches(store, tokenizer, ctx, split.items()[:, None], batch)
                    for name, split in splits.items() if name != "train"}
        settings.steps = settings.steps or settings.epochs * len(train)
        every = -(-settings.steps // task.evaluations) if task.evaluations else len(train)
        settings.eval_every = settings.eval_every or every

        torch.manual_seed(seed)
        if settings.ckpt is not None:
            encoder = (pretrained or load(settings.ckpt)).encoder
        else:
            encoder = Encoder(tokenizer.vocab, **SIZES[settings.size], model=settings.model, kernels=settings.kernels,
                              ctx=ctx)
        objective = tasks.OBJECTIVES[task.kind](encoder, tokenizer, settings.task, dataset.labels, ctx, seed)
        objective.bag_of_words = settings.bag_of_words
        copied = init.copy_to(objective, settings.tokenizer is None) if init and not state else ""
        del pretrained, init  # frees their memory
        objective = objective.to(device)
        tasks.compile_objective(objective, settings.compiled, train, settings.steps)
        trainer = tasks.Trainer(objective, train, held_out["valid"], splits["valid"], output, settings)
        parameters = sum(parameter.numel() for parameter in objective.parameters())
        describe(trainer, parameters, dataset, copied)
        trainer.begin(state)
        metrics = {"valid": trainer.run()}
        if "test" in splits:
            info(f"{output.path} is written; now the test split is scored (if that is interrupted: codessm evaluate "
                 f"{settings.task} --ckpt {output.path} --data {settings.paths[0]})")
            metrics["test"], _ = tasks.evaluate(objective, held_out["test"], splits["test"])
            output.record(step=settings.steps, **{f"test_{name}": value for name, value in metrics["test"].items()})
    scores = {f"{split}_{name}": value for split, found in metrics.items() for name, value in found.items()}
    result = dict(output=output.path, task=settings.task, steps=settings.steps, parameters=parameters, **scores)
    print_result(result, started, device, settings.as_json, f"{output.path}: {data.counted(settings.steps, 'step')}", *(
        f"{split:6} {data.counted(len(splits[split].examples), 'example')}: {objective.format_metrics(found)}"
        for split, found in metrics.items()))


def describe(trainer: tasks.Trainer, parameters: int, dataset: data.Dataset, copied: str) -> None:
    """Print every resolved setting, before the work begins."""
    settings, objective, device = trainer.settings, trainer.objective, trainer.stepper.device
    config, labels, ranks = objective.encoder.config, objective.labels, data.world_size()
    facts = {
        "task": settings.task + f" ({objective.kind})" * (objective.kind != settings.task)
                + f", from {settings.ckpt or settings.init or 'scratch'}",
        "data": dataset.description(),
        "init": copied,
        "labels": labels and f"{len(labels):,}: {data.listed(labels, 8)}",
        "tokenizer": f"{objective.tokenizer.vocab:,} entries",
        "samples": f"ctx {settings.ctx}; {len(trainer.valid.examples):,} distinct ones are evaluated",
        "model": f"{config['model']}, {len(objective.encoder.layers)} x {config['d']}"
                 + f", {config['kernels']} kernels per direction" * (config["kernels"] > 1)
                 + f", {parameters:,} parameters, on {device} in "
                 + ("bfloat16" if tasks.bf16(device) else "float32") + ", compiled" * objective.compiled
                 + " (slowly: a tiny model suits a CPU)" * (device.type == "cpu" and parameters > 10**8),
        "processes": f"{ranks}, which share each batch" * (ranks > 1),
        "training": f"{data.counted(settings.steps, 'step')} of {settings.batch} samples ("
                    f"{settings.steps / len(trainer.train):.1f} epochs), peak learning rate {settings.lr:g} after "
                    f"{data.counted(tasks.warmup(settings.steps), 'step')} of warm-up, seed {settings.seed}, an "
                    f"evaluation every {data.counted(settings.eval_every, 'step')}"
                    + f", in {settings.accumulate} pieces" * (settings.accumulate > 1)
                    + f", bag of words weighted {settings.bag_of_words:g}" * (settings.bag_of_words > 0)
                    + f", names replaced in {settings.obfuscate:.0%} of the functions" * (settings.obfuscate > 0),
        "output": f"{settings.output}, metrics in {settings.output}.jsonl"}
    for name, fact in facts.items():
        if fact:
            info(f"{name:10} {fact}")


def print_result(result: dict, started: float, device: torch.device, as_json: bool, sentence: str, *more: str) -> None:
    """Print a command's result with its time and peak memory: one line of JSON for a program, or lines for people."""
    seconds, memory = time.monotonic() - started, tasks.peak_memory(device)
    if data.rank() == 0:
        sentence = f"{sentence} in {seconds:.0f} s, peak memory {data.human_bytes(memory)}"
        click.echo(json.dumps(result | dict(seconds=round(seconds, 1), peak_memory=memory)) if as_json else
                   "\n".join([sentence, *more]))


TRAINING = ("--ctx --model --kernels --size --init --tokenizer --vocab --steps --epochs --batch --accumulate --lr "
            "--eval-every --limit --skip-bad --max-line --seed -o --restart --device --compile/--no-compile --json")
BATCH = dict(default=None, show_default=False, help="Samples per step.  [default: 32; of retrieval 128]")


@cli.command(epilog="Example: codessm pretrain corpus.jsonl --ctx 256 --steps 10000 -o model.pt")
@click.argument("corpus", nargs=-1)
@options("--bag-of-words " + TRAINING + " --code-field --text-field", batch=BATCH, o=dict(default="model.pt"))
def pretrain(corpus, **chosen):
    """Pretrain an encoder by masked language modelling.

    CORPUS: files of JSON lines, plain or compressed, folders, globs, or - for standard input; by default the Python
    standard library. After an interruption the same command goes on where the run was.
    """
    fit(Settings("mlm", paths=list(corpus), **chosen))


PREDICT = 4096  # records at a time
FINETUNED = [name for name, task in data.TASKS.items() if task.line]


@cli.command(epilog="Example: codessm finetune devign --ckpt model.pt --data devign/ -o devign.pt")
@click.argument("task", metavar="TASK", type=click.Choice(FINETUNED))
@options("--ckpt --data --obfuscate " + TRAINING, batch=BATCH,
         ckpt=dict(required=False, help="The pretrained checkpoint to start from; without one, from scratch."))
def finetune(task, **chosen):
    """Fine-tune an encoder on TASK and score it.

    TASK: advtest (or nlcodesearch), sqa, devign, diversevul, complexity, typeinf or clone; or, for JSONL of your own,
    retrieval (text, code), classify (code, label), tag (tokens, labels) or pair (code1, code2, label).

    The weights with the best metric on the validation split are kept; the test split, if there is one, is scored
    once, at the end. After an interruption the same command goes on where the run was.
    """
    output = f"{task}.pt" if chosen["output"] is None else chosen["output"]
    fit(Settings(task, **chosen | dict(paths=[chosen["paths"] or task], output=output)))


@cli.command(epilog="Example: codessm evaluate devign --ckpt devign.pt --split test --predictions predictions.txt")
@click.argument("task", metavar="TASK", type=click.Choice(list(data.TASKS)))
@options("--ckpt --data --ctx --batch --limit --skip-bad --max-line --code-field --text-field --device "
         "--compile/--no-compile --json")
@click.option("--split", default="test", show_default=True, type=click.Choice(data.SPLITS),
              help="The split to score; for mlm test is the whole corpus, valid the held-out part of it.")
@click.option("--predictions", metavar="FILE", help="Write the predictions as CodeXGLUE's evaluators read them.")
def evaluate(task, ckpt, split, predictions, **chosen):
    """Score a checkpoint on a split of TASK, or on a corpus.

    TASK: a task of finetune, or mlm, which predicts masked tokens of a corpus with a pretrained checkpoint.
    """
    started = time.monotonic()
    path = chosen["paths"] or (task if task in FINETUNED else None)
    settings = Settings(task, ckpt=ckpt, **chosen | dict(paths=[path] if path else []))
    if task not in FINETUNED and predictions is not None:
        raise click.UsageError(f"--predictions is not for {task}")
    if task in FINETUNED and (settings.code_field or settings.text_field):
        raise click.UsageError("--code-field and --text-field are for mlm")
    model = dataset = None
    if data.rank() == 0:
        model, ours = load(ckpt, choose_device(settings.device)), data.TASKS[task]
        if ours.kind != model.kind or ours.labels and list(ours.labels) != model.labels:
            raise Problem(f"{ckpt} is a model for {model.name} and cannot be scored on {task}"
                          + f": `codessm finetune {task} --ckpt {ckpt}` makes a model for it" * (task in FINETUNED))
        if predictions is not None:
            data.check_writable(predictions, "--predictions")
            if os.path.exists(predictions):
                raise Problem(f"{predictions} exists: give --predictions another name, or remove it")
        dataset = read_dataset(settings, [split], required=[split], labels=model.labels, whole=True)
        settings.ctx = choose_ctx(settings.ctx, model.ctx, model.encoder, ckpt)
    dataset, settings = data.broadcast((dataset, settings))
    device = choose_device(settings.device)
    model = model or load(ckpt, device)
    store = data.tokenise(dataset, model.tokenizer, settings.ctx, dataset.splits[split].items())
    examples = dataset.splits[split]  # of a tagger only now, as windows of its files
    batches = data.Batches(store, model.tokenizer, settings.ctx, examples.items()[:, None], settings.batch)
    info(f"{dataset.description()}; ctx {settings.ctx}, {len(batches.examples):,} distinct samples to encode")
    compiled = tasks.compile_objective(model, settings.compiled, batches)
    metrics, outputs = tasks.evaluate(model, batches, examples, compiled=compiled)
    if predictions is not None and data.rank() == 0:
        with data.atomic(predictions) as file:
            for line in model.format_predictions(outputs, examples):
                file.write(line.encode("utf-8", "replace") + b"\n")
    result = dict(task=task, split=split, examples=len(examples.examples), **metrics, encoded=len(batches.examples))
    print_result(result, started, device, settings.as_json, f"{ckpt}: {task}",
                 f"{split:6} {data.counted(len(examples.examples), 'example')}: {model.format_metrics(metrics)}")


@cli.command(epilog="Example: codessm predict --ckpt devign.pt functions.jsonl > predictions.jsonl")
@click.argument("files", nargs=-1)
@options("--ckpt --ctx --batch --skip-bad --max-line --device")
def predict(files, ckpt, ctx, batch, skip_bad, max_line, device):
    """Predict labels or scores for source files or JSONL.

    FILES: JSONL, source files, folders of source files, or - (the default) for JSONL on standard input.

    Prints a line of JSON for each line or source file, in order: the fields of the line, or the `path` of the file, and
    `prediction` and `probabilities`; for a pair `prediction` and `score`; for retrieval `score`, the cosine of text and
    code; for tagging `predictions`, one per token.
    """
    model = load(ckpt, choose_device(device)).frozen()
    if not hasattr(model, "results"):
        raise Problem(f"{ckpt} is a pretrained encoder, which predicts nothing yet: fine-tune it first")
    ctx = choose_ctx(ctx, model.ctx, model.encoder, ckpt)
    examples = data.examples_to_predict(files or ["-"], model.name, skip_bad=skip_bad, longest=max_line * 10**6)
    while chunk := list(itertools.islice(examples, PREDICT)):
        for example, result in zip(chunk, model.predict(chunk, batch, ctx), strict=True):
            click.echo(json.dumps(example.record | result))


@cli.command("search", epilog='Example: codessm search "parse a date" src/ --ckpt retrieval.pt')
@click.argument("query")
@click.argument("paths", nargs=-1)
@options("--ckpt --batch --device --json",
         ckpt=dict(required=False, help="A model, best one of `finetune retrieval`.  [default: BM25 alone]"))
@click.option("-k", **integer(default=10), show_default=True, help="Answers.")
def search_command(query, paths, ckpt, k, batch, device, as_json):
    """Search source code.

    QUERY: what to look for; - reads queries from standard input, one a line, and answers each with a line of JSON as
    soon as it is read. PATHS: folders and files, by default the current folder; in a git checkout its files that git
    does not ignore, elsewhere those that `codessm corpus` takes.

    Units are functions and methods, and what lies between them. BM25 of their words is added to the cosine of the
    model's vectors. The index is kept in ~/.cache/codessm and follows the files; only changed files are read again.
    """
    if not query.strip():
        raise click.UsageError("QUERY is empty")
    model = load(ckpt, choose_device(device)) if ckpt is not None else None
    if model is None:
        info("by BM25 of words alone: --ckpt adds a model (codessm corpus --task search -o retrieval, "
             "codessm finetune retrieval)")
    elif model.kind != "retrieval":
        info(f"{ckpt} was not fine-tuned for retrieval, and finds less than a model that was")
    with closing(tasks.Index(paths or ["."], model, batch)) as index:
        if query == "-":
            for line in sys.stdin:
                answers = [hit._asdict() for hit in index.search(line, k)] if line.strip() else []
                click.echo(json.dumps({"query": line.rstrip("\n"), "answers": answers}))
            return
        hits = index.search(query, k)
    for hit in hits:
        name = hit.name or hit.code.splitlines()[0].strip()[:100]
        click.echo(json.dumps(hit._asdict()) if as_json else
                   data.printable(f"{data.well_formed(hit.path)}:{hit.first}: {hit.score:.2f}  {name}"))
    if not hits:
        info("nothing found")


@cli.command(epilog="Example: codessm embed --ckpt retrieval.pt src/ -o vectors.npy")
@click.argument("paths", nargs=-1)
@options("--ckpt --batch --skip-bad --max-line --device -o --restart --json",
         o=dict(required=True, help="The .npy to write; FILE.jsonl in its place says what each row is."))
@click.option("--max-tokens", **integer(8, tasks.LONGEST), help="Tokens read of each unit.  [default: all]")
@click.option("--float16", is_flag=True, help="Write float16 rather than float32.")
def embed(paths, ckpt, batch, skip_bad, max_line, device, output, restart, as_json, max_tokens, float16):
    """Write the vectors of source code, for a vector database.

    PATHS: folders and source files, whose units are those of `codessm search`, by default the current folder; or JSONL,
    whose code, or text where there is no code, is embedded. -o gets an array (n, d) of normalised rows; the .jsonl of
    the same name has a line for each row: a unit's path, lines and name, or a record's source, line and other fields.
    After an interruption the same command goes on.
    """
    rows_path = f"{output.removesuffix('.npy')}.jsonl"
    if not output.endswith(".npy"):
        raise click.UsageError(f"-o {output}: give it a name that ends in .npy")
    if "-" in paths:
        raise click.UsageError("standard input can be read only once, and embed reads twice: give it a file")
    for path in (output, rows_path):
        data.check_writable(path)
        if os.path.realpath(path) in map(os.path.realpath, paths):
            raise Problem(f"{path} would be read and written: give another -o")
        if os.path.exists(path) and not restart:
            raise Problem(f"{path} exists: --restart replaces it")
    started, device, count = time.monotonic(), choose_device(device), 0
    model = load(ckpt, device).frozen()
    source = dict(paths=paths or ["."], skip_bad=skip_bad, longest=max_line * 10**6)
    # what an interrupted run has left goes on only with the same model, options and sources
    key = data.blake2b(json.dumps([tasks.fingerprint(model), max_tokens, float16]).encode(), digest_size=8)
    skipped: dict[str, list[str]] = {}
    with data.atomic(rows_path) as rows:
        for text, row in data.texts_to_embed(skipped=skipped, **source):
            line = json.dumps(row).encode() + b"\n"
            key.update(line + text.encode())
            rows.write(line)
            count += 1
        info(f"{data.counted(count, 'row')}{data.describe_skipped(skipped)}")
        if not count:
            raise Problem(f"{data.listed(source['paths'])}: there is nothing to embed")
        d, dtype = model.encoder.config["d"], np.dtype("float16" if float16 else "float32")
        part, size = f"{output}.{key.hexdigest()}.part", d * dtype.itemsize  # the bytes of a row
        with open(part, "ab") as file, data.progress(total=count, desc="embedding", unit=" rows") as bar:
            done = file.tell() // size
            file.truncate(done * size)
            if done:
                info(f"going on from row {done:,} of {count:,}")
            bar.update(done)
            texts = itertools.islice(data.texts_to_embed(skipped=None, **source), done, None)
            while chunk := [text for text, _ in itertools.islice(texts, tasks.Index.CHUNK)]:
                file.write(model.encode(chunk, batch, max_tokens).astype(dtype).tobytes())
                file.flush()
                bar.update(len(chunk))
        if os.path.getsize(part) != count * size:
            raise Problem("the sources changed while they were read: the same command reads them again", 1)
        with data.atomic(output) as file:
            np.save(file, np.memmap(part, dtype, "r", shape=(count, d)))
    os.remove(part)
    print_result(dict(output=output, rows=count, width=d, dtype=dtype.name), started, device, as_json,
                 f"{output}: {data.counted(count, 'row')} of {d}")


def comma_list(kind: click.ParamType) -> Callable:
    """A click callback that splits a value at its commas and converts each part; repeated parts count once."""
    return lambda context, parameter, value: list(dict.fromkeys(
        kind.convert(part.strip(), parameter, context) for part in value.split(",")))


@cli.command(epilog="Example: codessm bench --models codessm,rocoder --lengths 512,2048,8192 --train")
@click.option("--lengths", metavar="N,...", default="512,1024,2048", show_default=True,
              callback=comma_list(click.IntRange(1, 2**24)), help="Tokens per sample.")
@click.option("--models", metavar="NAME,...", default="codessm,rocoder", show_default=True,
              callback=comma_list(click.Choice(list(MODELS))),
              help=f"Any of {', '.join(MODELS)}; ratios are to the first.")
@click.option("--train", is_flag=True, help="Measure a training step (masked language modelling, AdamW) instead.")
@click.option("--batch-tokens", **integer(1, 2**31),
              help="Tokens per batch.  [default: 65536 on a GPU, 32768 with --train; 2048 on a CPU]")
@click.option("--attention", default="fused", show_default=True, type=click.Choice(["fused", "plain", "both"]),
              help="In bertcoder and rocoder: PyTorch's fused kernels, or plain, with the L x L matrices in memory.")
@click.option("--repeats", **integer(), help="Runs of which the median is taken.  [default: 10 on a GPU, 3 on a CPU]")
@options("--kernels --size --device --compile/--no-compile --json", size=dict(default="base"),
         compile=dict(help="Compile the layers.  [default: on a GPU]"))
def bench(lengths, models, train, batch_tokens, attention, repeats, kernels, size, device, compiled, as_json):
    """Measure speed and memory of the models on this machine.

    Batches are full, without padding. In inference, as in `evaluate`, kernels are made once per length and weights are
    rounded once, and neither is timed.

    memory: the peak beyond the weights. share: the speed of the linear projections, as if they took all the time,
    divided by that of one large matrix product. ratio: speed relative to the first model. first run: includes
    compiling, or loading what was compiled before.
    """
    attending = [name for name in models if MODELS[name].layer is TransformerLayer]
    if attention != "fused" and not attending:
        raise click.UsageError("--attention is bertcoder's and rocoder's: name one of them in --models")
    with_kernels = [name for name in models if MODELS[name].k]
    if kernels and not with_kernels:
        raise click.UsageError("--kernels is of models with S4D kernels: name one of them in --models")
    for name in with_kernels:
        check_kernels(name, size, kernels)
    device = choose_device(device)
    gpu = device.type == "cuda"
    batch_tokens = batch_tokens or (2048 if not gpu else 32_768 if train else 65_536)
    repeats = repeats or (10 if gpu else 3)
    forms = {"both": ["", "plain"], "fused": [""], "plain": ["plain"]}[attention]
    cases = [(L, name, form) for L in lengths for name in models for form in (forms if name in attending else [""])]
    hardware = torch.cuda.get_device_name(device) if gpu else f"{device}, {torch.get_num_threads()} threads"
    rate, rows = tasks.product_rate(device, repeats), []
    precision = "bfloat16" if tasks.bf16(device) else "float32"
    if not as_json:
        click.echo(f"{hardware}, torch {torch.__version__}, {size}, {'training' if train else 'inference'}, "
                   f"{batch_tokens:,} tokens a batch, {precision}; one large matrix product: "
                   f"{rate / 1e12:.3g} TFLOP/s\n"
                   f"{'model':15} {'length':>7} {'batch':>6} {'samples/s':>10} {'tokens/s':>10} {'memory':>8} "
                   f"{'share':>6} {'ratio':>6} {'first run':>9}")
    bar = data.progress(cases, desc="measuring", unit=" rows", unit_scale=False, leave=False, miniters=1, mininterval=0)
    for length, name, form in bar:
        batch = max(1, batch_tokens // length)
        row = dict(model=name, form=form, length=length, batch=batch)
        try:
            encoder = Encoder(VOCABULARY[size], **SIZES[size], model=name, ctx=length,
                              kernels=kernels if name in with_kernels else None)
            for layer in encoder.layers if form else ():
                layer.plain = True
            row |= tasks.measure(encoder, length, batch, train, device, compiled, repeats)
        except (MemoryError, RuntimeError) as error:
            if "out of memory" not in tasks.explain(error).message:
                raise
            row["error"] = measured = "out of memory"
        else:
            first = next((other for other in rows if other["length"] == length), row)
            row["share"] = row.pop("projections") / rate
            row["ratio"] = None if "error" in first else row["tokens_per_second"] / first["tokens_per_second"]
            memory = "?" if row["memory"] is None else data.human_bytes(row["memory"])
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            measured = (f"{row['samples_per_second']:10,.1f} {row['tokens_per_second']:10,.0f} {memory:>8} "
                        f"{row['share']:6.2f} {ratio:>6} {row['first_seconds']:7.1f} s")
        rows.append(row)
        if not as_json:
            with bar.external_write_mode():
                click.echo(f"{name + ' ' + form:15} {length:7,} {batch:6,} {measured}")
    if as_json:
        click.echo(json.dumps(dict(device=hardware, torch=torch.__version__, size=size, train=train,
                                   batch_tokens=batch_tokens, precision=precision, product_rate=rate, rows=rows)))


PLAIN_ROWS = 8  # kernels per direction that are shown one by one


def draw(values: np.ndarray) -> str:
    """Values of 0 or more as 24 blocks, each as high as the largest of its stretch."""
    parts = [part.max() for part in np.array_split(values, 24)]
    return "".join("▁▂▃▄▅▆▇█"[round(7 * part / (max(parts) or 1))] for part in parts)


def tally(counts: dict[str, int]) -> str:
    return ", ".join(name + f" x {count}" * (count > 1) for name, count in counts.items())


def show_filters(filters: dict[tuple[int, str], tasks.Filters], show: Callable[[str], None]) -> list[dict]:
    """Show a row for each kernel, or of over `PLAIN_ROWS` per direction their mean; returns each kernel for JSON."""
    kernels = []
    show("layer  direction kernel   peak centroid     width     low middle   high  memory  "
         f"{'magnitude, 0 to 1':24}  class")
    for (number, direction), found in filters.items():
        k = len(found.classes)
        table = np.column_stack([found.peak, found.centroid, found.bandwidth, found.energy, found.memory])
        for row in np.array_split(np.arange(k), k if k <= PLAIN_ROWS else 1):
            name = row[0] + 1 if k <= PLAIN_ROWS else "all"
            peak, centroid, width, low, middle, high, memory = table[row].mean(0)
            show(f"{number:5}  {direction:9} {name:>6}  {peak:5.2f} {centroid:8.3f} {width:9.3f}  "
                 f"{low:6.2f} {middle:6.2f} {high:6.2f} {memory:7.0f}  {draw(found.magnitude[row].mean(0))}  "
                 + tally(Counter(found.classes[i] for i in row)))
        names = ("peak", "centroid", "bandwidth", "memory", "impulse")
        kernels += [dict(layer=number, direction=direction, kernel=i + 1, filter=found.classes[i],
                         energy=dict(zip(tasks.THIRDS, found.energy[i].tolist())),
                         **{name: getattr(found, name)[i].tolist() for name in names}) for i in range(k)]
    return kernels


def show_shift(before: dict, after: dict, show: Callable[[str], None]) -> dict:
    """Show what moved between the kernels of two models; returns it for JSON."""
    shifts = {key: tasks.filter_shift(before[key], after[key]) for key in before}
    layers = {number: float(np.mean([shift["shift"] for (n, _), shift in shifts.items() if n == number]))
              for number, _ in shifts}
    total = float(np.mean([*layers.values()]))
    show("layer  direction  centroid      shift     low middle   high  memory  changes")
    for (number, direction), shift in shifts.items():
        low, middle, high = shift["energy"]
        show(f"{number:5}  {direction:9} {after[number, direction].centroid.mean():9.3f} {shift['shift']:+10.4f}  "
             f"{low:+6.2f} {middle:+6.2f} {high:+6.2f} {shift['memory']:+7.0f}  {tally(shift['changes'])}")
    show("spectral shift a layer: " + ", ".join(f"{n}: {shift:+.4f}" for n, shift in layers.items()))
    toward = f", toward {'short' if total > 0 else 'long'} range" * (abs(total) >= 5e-5)
    show(f"spectral shift of the model: {total:+.4f}{toward}")
    return dict(model=total, layers=layers, kernels=[
        dict(layer=number, direction=direction, **shift) for (number, direction), shift in shifts.items()])


def make_figure(path: str):
    """An empty matplotlib figure; raises `Problem` if that is not installed or `path` cannot be written."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise click.UsageError(f"--plot {path}: give a name that ends in .png, .pdf or .svg")
    data.check_writable(path, "--plot")
    try:
        import matplotlib.figure
    except ImportError:
        raise Problem("--plot needs matplotlib: pip install 'codessm[plot]'") from None
    matplotlib.rcParams["font.size"] = 8
    return matplotlib.figure.Figure(figsize=(5, 3.2), layout="constrained")


def plot_filters(figure, models: dict[str, dict[tuple[int, str], tasks.Filters]]) -> None:
    """Draw magnitude and phase of each layer and direction, and below them the classes of each layer.

    Of many kernels, the first `PLAIN_ROWS` per direction are drawn; all of them count among the classes.
    """
    layers = sorted({number for filters in models.values() for number, _ in filters})
    figure.set_size_inches(7, 1.1 * len(layers) + 2)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1 * len(layers), 2])
    axes = top.subplots(len(layers), 2, sharex=True, squeeze=False)
    for colour, (name, filters) in zip(("C0", "C1"), models.items()):
        for (number, direction), found in filters.items():
            for axis, curves in zip(axes[layers.index(number)], (found.magnitude, found.phase / np.pi)):
                lines = axis.plot(np.linspace(0, 1, curves.shape[1]), curves[:PLAIN_ROWS].T, color=colour,
                                  linestyle="-" if direction == "forward" else "--")
                lines[0].set_label(f"{direction}, {name}")
    for number, (magnitude, _) in zip(layers, axes):
        magnitude.set(ylabel=f"layer {number}", yscale="log")
    axes[0, 0].set_title("magnitude")
    axes[0, 1].set_title("phase / π")
    top.supxlabel("frequency (1 is half a cycle per token)")
    top.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    for axis, (name, filters) in zip(bottom.subplots(1, len(models), squeeze=False)[0], models.items()):
        kinds = list(dict.fromkeys(tasks.FILTERS.values()))
        numbers = [[number for (number, _), found in filters.items() for each in found.classes if each == kind]
                   for kind in kinds]  # the layer of each kernel of the kind
        axis.hist(numbers, np.arange(0.5, layers[-1] + 1), stacked=True, rwidth=0.8, label=kinds)
        axis.set(xlabel=f"layer ({name})", ylabel="kernels", xticks=layers)
    bottom.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=5)


def compare_runs(paths: Sequence[str], against: str, figure, show: Callable[[str], None]) -> dict:
    """Show and draw the validation metric of several runs against steps or tokens; returns it for JSON."""
    logs = {path: [row for _, row in data.Records([data.open_source(path)], data.parse_json)] for path in paths}
    common = set.intersection(*({name for row in log for name in row} for log in logs.values()))
    known = ("accuracy", *(task.metric for task in data.TASKS.values()))
    metric = next((name for name in known if f"valid_{name}" in common), None)
    if metric is None:
        raise Problem(f"{data.listed(paths)}: there is no metric that all of them were validated with")
    if not all(isinstance(value, (int, float)) and "step" in row for log in logs.values() for row in log
               for value in row.values()):
        raise Problem(f"{data.listed(paths)}: not all lines are those of a run's log")
    axis, width, runs = figure and figure.subplots(), max(map(len, paths)), []
    show(f"{'log':{width}} {'steps':>8} {'tokens':>13} {'last':>7} {'best':>7}  {metric} against {against}")
    for path, log in logs.items():
        steps, values = np.array([(row["step"], row[f"valid_{metric}"]) for row in log if f"valid_{metric}" in row]).T
        tokens = np.interp(steps, *zip((0, 0), *((row["step"], row["tokens"]) for row in log if "tokens" in row)))
        x = steps if against == "steps" else tokens
        show(f"{path:{width}} {steps[-1]:8,.0f} {tokens[-1]:13,.0f} {values[-1]:7.4f} {values.max():7.4f}  "
             f"{draw(np.interp(np.linspace(0, x[-1], 24), x, values))}")
        runs.append(dict(log=path, steps=steps.tolist(), tokens=tokens.tolist(), values=values.tolist()))
        if axis:
            axis.plot(x, values, marker=".", label=path)
            axis.set(xlabel=against, ylabel=f"validation {metric}")
            axis.legend()
    return {"metric": metric, "runs": runs}


@cli.command(epilog="Example: codessm interpret model.pt devign.pt --probe --plot shift.pdf")
@click.argument("paths", nargs=-1, required=True)
@click.option("--length", **integer(8, 2**20), help="Tokens of a kernel's response.  [default: the first model's ctx]")
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
              help="A third of the spectrum passes if its mean magnitude is at least this share of the strongest's.")
@click.option("--probe", is_flag=False, multiple=True, flag_value=data.STANDARD_LIBRARY, metavar="[PATH]",
              help="Probe the layers with the Python code below PATH.  [default PATH: the standard library]")
@click.option("--pairs", **integer(8, default=1000), show_default=True, help="Pairs of each label that train a probe.")
@click.option("--plot", metavar="FILE", help="Draw the filters, or the curves of logs, as .png, .pdf or .svg (pip "
                                              "install 'codessm[plot]').")
@click.option("--against", default="steps", show_default=True, type=click.Choice(["steps", "tokens"]),
              help="The x-axis of the curves of logs.")
@options("--seed --device --json")
def interpret(paths, plot, against, as_json, **chosen):
    """Show what kernels and layers have learned.

    PATHS: a checkpoint, two checkpoints (before and after fine-tuning), or metrics logs of runs (model.pt.jsonl).

    Kernels are analysed as filters, at frequencies from 0 to 1, half a cycle per token: peak, the frequency of the
    largest magnitude; centroid and width, mean and standard deviation of the frequency, weighted by power; low, middle
    and high, the shares of power in the thirds of the spectrum; memory, the lag up to which 95 % of the energy of the
    impulse response lies. The class says which thirds pass. Of two checkpoints also what moved: a positive shift of the
    centroid is toward high frequencies, that is short range.

    --probe trains a linear probe on the hidden states of each layer (0 is the embedding), for three relations between
    two tokens: distance in the syntax tree, siblings in it, and whether a definition reaches a use. In brackets is the
    accuracy of the control task, in which each pair of words has a random label.
    """
    figure = make_figure(plot) if plot else None
    show = (lambda line: None) if as_json else click.echo
    if all(os.path.isfile(path) and data.is_log(path) for path in paths):
        result = compare_runs(paths, against, figure, show)
    elif len(paths) <= 2:
        result = show_models(dict.fromkeys(paths), figure=figure, show=show, **chosen)
    else:
        raise click.UsageError("give one or two checkpoints, or metrics logs alone")
    if figure:
        with data.atomic(plot) as file:
            figure.savefig(file, format=Path(plot).suffix[1:], dpi=200)
        info(f"figure in {plot}")
    if as_json:
        click.echo(json.dumps(result))


def show_models(paths: Iterable[str], length: int | None, threshold: float, probe: list[str], pairs: int, seed: int,
                device: str, figure, show: Callable[[str], None]) -> dict:
    """Show and draw the filters of one or two models, and what their layers know; returns it for JSON."""
    models = {path: load(path, choose_device(device)) for path in paths}
    for path, model in models.items():
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise Problem(f"{path}: weights that are not finite numbers: its training went wrong", 1)
    length = length or next(iter(models.values())).ctx
    filters = {path: tasks.kernel_filters(model.encoder, length, threshold) for path, model in models.items()}
    if not any(filters.values()) and (figure or not probe):
        raise Problem(f"{data.listed(models)}: no S4D kernels to show or plot; --probe alone looks at the layers")
    result: dict = {"threshold": threshold, "models": []}
    for path, model in models.items():
        config, found = model.encoder.config, filters[path]
        show(f"{path}: {config['model']}, {len(model.encoder.layers)} x {config['d']}, {model.name}; "
             + (f"{length} tokens" if found else "no S4D kernels"))
        result["models"].append(dict(checkpoint=path, model=config["model"], task=model.name, length=length,
                                     kernels=show_filters(found, show) if found else []))
    shapes = [{key: len(found.classes) for key, found in some.items()} for some in filters.values()]
    if len(shapes) == 2 and all(shapes):
        if shapes[0] == shapes[1]:
            result["shift"] = show_shift(*filters.values(), show)
        else:
            info("the two have different kernels, so nothing is said of a shift")
    if probe:
        found = data.probe_functions(list(probe), pairs, lambda code: all(
            len(model.tokenizer.encode(code)) <= model.ctx - 2 for model in models.values()), seed)
        result["probe"] = {path: tasks.probe_layers(model, found) for path, model in models.items()}
        for path, relations in result["probe"].items():
            show(f"{path}: accuracy of linear probes (control task)")
            show("layer  " + "".join(f"{f'{name}, of {data.RELATIONS[name]}':>16}" for name in relations))
            for number, layer in enumerate(zip(*relations.values())):
                show(f"{number:5}  " + "".join(f"{row['accuracy']:9.3f} ({row['control']:.2f})" for row in layer))
    if figure:
        plot_filters(figure, {path: found for path, found in filters.items() if found})
    return result


@cli.command(epilog="Example: codessm corpus ~/projects -o corpus.jsonl")
@click.argument("paths", nargs=-1)
@click.option("--task", type=click.Choice(data.MADE), help="Make a benchmark instead.")
@click.option("-o", "output_path", metavar="FILE|DIR",
              help="The JSONL file to write, with --task the folder.  [default: standard output; with --task ./TASK]")
def corpus(paths, task, output_path):
    """Turn source trees into a JSONL corpus or a benchmark.

    PATHS: folders and files; by default the Python standard library. Each Python function is a record, its docstring
    apart from its code; a file in another language is one record. Exact duplicates are dropped; hidden, vendored and
    installed folders below PATHS are left out.

    --task advtest makes a code search benchmark of docstrings and functions, names obfuscated in valid and test;
    --task search the same with names kept, and with commented functions of other languages, which `codessm finetune
    retrieval` reads to train a search model; --task typeinf a type inference benchmark of annotations.
    """
    paths = paths or [data.STANDARD_LIBRARY]
    if task:
        data.build_benchmark(task, paths, output_path or task)
    elif output_path is None:
        data.build_corpus(paths, sys.stdout.buffer)
    else:
        data.check_writable(output_path)
        if os.path.exists(output_path):
            raise Problem(f"{output_path} exists: remove it, or give another -o")
        with data.atomic(output_path) as file:
            data.build_corpus(paths, file)


if __name__ == "__main__":
    cli()
