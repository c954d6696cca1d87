"""Kernels, layer and encoder against float64 sources: the recurrence, the closed form, the papers' equations."""
import copy
import math
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import codessm
from codessm import MODELS, S4D, BiGSLayer, Convolution, Encoder, Gelu, carry, make_kernels
from conftest import ROOT, forkserver, peak


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


# ---- what all is compared with ----------------------------------------------------------------------

def numbers(module):
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


def relative_error(ours, reference):
    return np.abs(ours.detach().double().numpy() - reference).max() / np.abs(reference).max()


def gelu_reference(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm_reference(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-12)


def affine(p, name, x, rows=slice(None)):
    return x @ p[f"{name}.weight"][rows].T + (p[f"{name}.bias"][rows] if f"{name}.bias" in p else 0)


def pair(N=64, k=1, step=None, A_re=None):
    """A forward and a backward S4D, of a certain step and decay where they are given."""
    ssms = S4D(N, k), S4D(N, k)
    for ssm in ssms if step else ():
        nn.init.constant_(ssm.log_step, math.log(step))
        nn.init.constant_(ssm.A_re, A_re)
    return ssms


def discretised(ssm):
    """A-bar (k, N), C-bar (k, N) and D (k, 1) of an S4D, or of its parameters, in float64."""
    p = ssm if isinstance(ssm, dict) else numbers(ssm)
    A = np.minimum(p["A_re"], -1e-4) + 1j * p["A_im"]
    A_bar = np.exp(np.exp(p["log_step"]) * A)
    C_bar = (p["C"][..., 0] + 1j * p["C"][..., 1]) * (A_bar - 1) / A
    return [part.reshape(p["D"].size, -1) for part in (A_bar, C_bar, p["D"])]


def recurrence(ssm, u):
    """y (L, d) of u (L, d) by the S4D recurrence, state by state; each of k kernels has its d / k channels."""
    A_bar, C_bar, D = discretised(ssm)
    u = u.reshape(len(u), len(D), -1)
    x, y = np.zeros((*A_bar.shape, u.shape[2]), complex), np.empty_like(u)
    for t, u_t in enumerate(u):
        x = A_bar[..., None] * x + u_t[:, None]
        y[t] = (C_bar[:, None] @ x)[:, 0].real + D * u_t
    return y.reshape(len(u), -1)


def closed_form(ssm, L):
    """K (k, L), K[l] = Re sum_n C-bar_n A-bar_n^l."""
    A_bar, C_bar, _ = discretised(ssm)
    return (C_bar[..., None] * A_bar[..., None] ** np.arange(L)).real.sum(1)


def both_ways(ssms, u, causal=False):
    """The recurrence of u (2, L, d): forwards of the first, backwards (unless `causal`) of the second."""
    (forward, backward), order = u.double().numpy(), slice(None, None, 1 if causal else -1)
    return np.stack([recurrence(ssms[0], forward), recurrence(ssms[1], backward[order])[order]])


def convolve(ssms, u, chunk, m=codessm.GROUP, dtype=torch.float32, causal=False):
    """The same by the program, in chunks of at most `chunk` tokens, of which m are one product."""
    (L, d), k = u.shape[1:], ssms[0].D.numel()
    n = -(-L // chunk)
    c = -(-L // n)
    u = nn.functional.pad(u, (0, 0, 0, n * c - L)).to(dtype).view(2, n, c, 1, k, d // k)
    _, kernels = make_kernels([*reversed(ssms), *ssms], c, n, m, dtype, causal)  # of the second of two layers
    y = Convolution.apply(u.permute(0, 4, 2, 1, 3, 5).flatten(0, 1), *kernels, causal)  # (2k, c, n, 1, d / k)
    return y.unflatten(0, (2, k)).permute(0, 3, 2, 4, 1, 5).reshape(2, n * c, d)[:, :L]


# ---- the kernels and the convolution ----------------------------------------------------------------

@pytest.mark.parametrize("step, A_re, k, causal", [
    *((step, A_re, 1, False) for A_re in (-0.05, -1e-4) for step in (0.01, 0.1, 1.0)),
    *((None, None, *form) for form in ((1, False), (1, True), (2, False), (2, True), (6, False)))])
def test_the_convolution_equals_the_recurrence(step, A_re, k, causal):
    """In chunks of any length, in groups or not; as initialised without a step. With 6 kernels each channel has one."""
    ssms = pair(64, k, step, A_re)
    for L in (1, 7, 64, 513, 2048 if k == 1 else 600):
        u = torch.randn(2, L, 6)
        expected = both_ways(ssms, u, causal)
        for chunk, m in ((16, 64), (16, 3), (100, 1), (128, 64), (512, 64), (2048, 64)):
            ours = convolve(ssms, u, chunk, m, causal=causal)
            assert max(map(relative_error, ours, expected)) < 1e-5, (L, chunk, m)


@pytest.mark.parametrize("k", [1, 3])
def test_the_kernel_equals_its_closed_form(k):
    """To 1e-6, which a phase in float32 would not keep: what `powers` is careful about matters."""
    ssm = pair(64, k, 1.0, -1e-4)[0]
    for L in (1, 100, 4096):
        K, expected = ssm.kernel(L), closed_form(ssm, L)
        assert K.shape == ((k, L) if k > 1 else (L,)) and K.dtype == torch.float32
        assert relative_error(K.view(k, L), expected) < 1e-6
    A_bar, C_bar = (torch.from_numpy(part)[..., None].to(torch.complex64) for part in discretised(ssm)[:2])
    assert relative_error((C_bar * torch.exp(torch.log(A_bar) * torch.arange(L))).real.sum(1), expected) > 1e-5


def as_complex(S, n):
    """States (2k, 2N, n q), which are Re, Im, Re, Im ..., as (2k, N, n, q)."""
    S = S.double().unflatten(1, (-1, 2)).unflatten(3, (n, -1)).numpy()
    return S[:, :, 0] + 1j * S[:, :, 1]


def carry_reference(S, A, backwards, rounded=lambda H: H):
    """H_(i + 1) = A H_i + S_i chunk by chunk; S (2k, N, n, q), A (2k, N), `backwards` of each half."""
    states = np.zeros_like(S)
    for half, back in zip(np.split(np.arange(len(S)), 2), backwards):
        H = np.zeros_like(S[half, :, 0])
        for i in range(S.shape[2])[::-1 if back else 1]:
            states[half, :, i] = H
            H = rounded(A[half, :, None] * H + S[half, :, i])
    return states


@pytest.mark.parametrize("backwards", [(False, True), (True, False), (False, False), (True, True)])
def test_carry_in_groups_equals_the_recurrence(backwards):
    """In bfloat16 errors do not add up: powers of A-bar^c and states are rounded once each, and from group to group
    states go in float32. Carried from chunk to chunk in bfloat16 they would drift."""
    n, ssms = 40, [ssm.double() for ssm in pair(3, 2, 0.01, -0.01)]  # they forget a sixteenth over all chunks
    A, S = np.concatenate([discretised(ssm)[0] for ssm in ssms]) ** 16, (1 + torch.rand(4, 6, n * 5)).bfloat16()
    exact, most = (carry_reference(form(as_complex(S, n)), form(A), backwards) for form in (np.asarray, np.abs))

    def error(m, dtype):
        P = make_kernels(ssms, 16, n, m, dtype)[0].P
        return np.abs(as_complex(carry(S.to(dtype), P, n, backwards), n) - exact)

    def rounded(H):
        return torch.view_as_complex(torch.view_as_real(torch.from_numpy(H)).bfloat16().double()).numpy()

    assert np.abs(exact).mean() > 5 and all(error(m, torch.float64).max() < 1e-12 for m in (1, 3, 8, 39, 40, 64))
    bound = 1.01 * 2 ** -8 * (most + np.abs(exact)) + 1e-4
    assert (error(n, torch.bfloat16) <= bound).all()
    assert (error(8, torch.bfloat16) <= bound + 2 ** -8 * most).all()  # and what comes from the group before, once
    assert (np.abs(carry_reference(as_complex(S, n), rounded(A), backwards, rounded) - exact) > bound).any()


@pytest.mark.parametrize("m, causal, k", [(1, False, 1), (2, False, 1), (2, True, 1), (2, False, 2), (2, True, 2),
                                          (64, False, 1), (64, True, 2)])
def test_gradients_of_every_parameter(m, causal, k):
    """Through three chunks, in groups of m."""
    ssms = [ssm.double() for ssm in pair(3, k, math.exp(-1), -0.5)]
    u = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)
    assert sorted(numbers(ssms[0])) == ["A_im", "A_re", "C", "D", "log_step"]
    parameters = [parameter for ssm in ssms for parameter in ssm.parameters()]
    assert torch.autograd.gradcheck(lambda u, *_: convolve(ssms, u, 4, m, torch.float64, causal), (u, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_gelu_is_the_exact_one(dtype):
    """Far out as well, where e^-z is infinite."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.linspace(-1e4, 1e4, 2001)]).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    Gelu.apply(x).sum().backward()
    reference = nn.functional.gelu(exact)
    reference.sum().backward()
    rounding = 2 ** -8 if dtype == torch.bfloat16 else 0
    for ours, theirs, bound in ((Gelu.apply(x), reference, 4e-5), (x.grad, exact.grad, 2e-4)):
        assert ours.dtype == dtype and ((ours - theirs).abs() <= theirs.abs() * rounding + bound).all()


def test_the_gate_and_its_gradients():
    y, W, b = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 3), (3, 3), (3,)))
    assert torch.allclose(codessm.Gate.apply(y, W, b), (y @ W.mT + b[:, None]).prod(0))
    assert torch.autograd.gradcheck(codessm.Gate.apply, (y, W, b))


# ---- the layer and the encoder ----------------------------------------------------------------------

def disturb(module):
    """Parameters of linear maps, norms and convolutions that no symmetry hides a mistake in."""
    for name, parameter in module.named_parameters():
        if "_ssm" not in name and "A_log" not in name:
            nn.init.uniform_(parameter, -0.4, 0.4)


def short_convolution_reference(u, p, name):
    """By its definition, of u (L, d)."""
    w = p[f"{name}.weight"]
    return np.array([sum(w[j] * u[t - j] for j in range(len(w)) if t >= j) for t in range(len(u))]) + p[f"{name}.bias"]


@pytest.mark.parametrize("options", [{}, dict(k=4), dict(k=8), dict(causal=True), dict(fourier=True), dict(local=3),
                                     dict(k=2, local=3, causal=True)], ids=str)
def test_a_layer_equals_the_papers_equations(options):
    """Section 3 of DESIGN with the flips carried out and each kernel's channels convolved by its recurrence."""
    d, L, causal, fourier = 8, 21, bool(options.get("causal")), options.get("fourier")
    layer, Xi, R = BiGSLayer(d, N=4, **options), torch.randn(1, L, d), torch.randn(1, L, d)
    disturb(layer)
    x, p = Xi[0].double().numpy(), numbers(layer)

    def mixed(name, u):
        if fourier:
            i = np.arange(L)
            return np.cos(2 * np.pi * i[:, None] * i / L) @ u / math.sqrt(L)
        local = f"local.{int(name == 'backward')}"
        return recurrence(getattr(layer, f"{name}_ssm"), u) + (
            short_convolution_reference(u, p, local) if layer.local else 0)

    flip = (lambda a: a) if causal else (lambda a: a[::-1])
    X = layer_norm_reference(x) * p["norm.weight"] + p["norm.bias"]
    F = gelu_reference(affine(p, "fb", X, slice(0, d)))
    B = gelu_reference(affine(p, "fb", flip(X), slice(d, 2 * d)))
    U = affine(p, "u1", mixed("forward", F)) * flip(affine(p, "u2", mixed("backward", B)))
    Xo = x + affine(p, "o", gelu_reference(affine(p, "u", U)) * gelu_reference(affine(p, "v", X)))
    for c, n, m in [(L, 1, 1)] if fourier else [(6, 4, 64), (6, 4, 3), (24, 1, 1)]:
        ssms = [] if fourier else [layer.forward_ssm, layer.backward_ssm]
        kernels = make_kernels(ssms, c, n, m, torch.float32, causal)[0] if ssms else None
        for training in (True, False):  # a part of Xi is what the layer before adds
            X, added, real = (codessm.in_chunks(t, (n, c)) for t in (Xi - R, R, torch.ones(1, L, 1).bool()))
            with torch.set_grad_enabled(training):
                found = sum(layer(X, added, kernels, real))
            assert relative_error(found.permute(2, 1, 0, 3).reshape(n * c, d)[:L], Xo) < 1e-5, (c, n, m, training)


def test_chunks_and_groups_shrink_so_that_many_kernels_take_no_more_memory(monkeypatch):
    """But for rounding to multiples of 8: of `--kernels 1024` T would else take half a gigabyte a layer."""
    made = []
    monkeypatch.setattr(codessm, "make_kernels", lambda _ssms, c, n, m, *_: [made.append((c, n, m))])
    for k in (1, 8, 16, 64, 256, 1024):
        with torch.device("meta"):
            encoder = Encoder(5, 1024, 1, kernels=k)
        for L in (5, 100, 256, 1000, 5000, 100_000):
            encoder.kernels(L)
            c, n, m = made[-1]
            assert n * c >= L and c % 8 == 0 and k * c * c <= 8 * 256 ** 2
            assert k * m * m <= 8 * 64 ** 2 and (k > 8 or m == 64)
        assert c > 256 * min(1, math.sqrt(8 / k)) - 8  # of the longest


def cost(L):
    """Seconds and bytes of a pass forwards and backwards, after a short one."""
    encoder = Encoder(50, d=64, layers=2)
    for length in (256, L):
        before, start = peak(), time.perf_counter()
        encoder(torch.zeros(1, length, dtype=torch.long)).sum().backward()
    return time.perf_counter() - start, peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cost_is_linear_in_length():
    """Eight times the tokens take about eight times the time and memory, forwards and backwards."""
    with forkserver.Pool(1, maxtasksperchild=1) as pool:
        times, memory = zip(*pool.map(cost, (8192, 65536), chunksize=1))
    # a cost in proportion to the square of the length would show 64
    assert times[1] / times[0] < 32 and memory[1] / memory[0] < 14 and memory[0] > 20e6


def test_initialisation():
    encoder = Encoder(2000, **codessm.SIZES["tiny"])
    assert abs(encoder.embedding.weight.std() / 0.02 - 1) < 0.02
    for layer in encoder.layers:
        ssm = layer.forward_ssm
        assert abs(layer.v.weight.std() / (0.64 / math.sqrt(128)) - 1) < 0.03 and not layer.v.bias.any()
        assert (ssm.A_re == -0.5).all() and torch.allclose(ssm.A_im, torch.pi * torch.arange(64))
        assert 0.01 <= ssm.log_step.exp() <= 1
    local = Encoder(9, 64, 1, model="codessm-hf").layers[0].local  # they begin as nothing
    assert len(local) == 2 and not any(convolution(torch.randn(1, 9, 64)).any() for convolution in local)
    assert abs(torch.cat([m.C.flatten() for m in encoder.modules() if isinstance(m, S4D)]).var() - 0.5) < 0.1


def rows_and_gradients(encoder, ids, lengths, weights, autocast=False):
    """What the layers add to each row where its weights are not 0, and all gradients of the weighted sum of it."""
    device = encoder.embedding.weight.device.type
    ids, lengths, weights = (None if t is None else t.to(device) for t in (ids, lengths, weights))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        added = encoder(ids, lengths) - encoder.embed(ids)
    (added * weights).sum().backward()
    rows, gradients = ([row[w.any(-1)] for row, w in zip(added, weights)], [p.grad for p in encoder.parameters()])
    encoder.zero_grad(set_to_none=True)
    return [[part.detach().cpu().double() for part in parts] for parts in (rows, gradients)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model, L, bound", [("codessm", 300, 1e-2), ("codessm", 1200, 1e-2),
                                             *((model, 300, 2e-2) for model in MODELS if model != "codessm")])
def test_in_bfloat16_it_is_near_float64(model, L, bound, device):
    """The branches of the layers and all gradients under autocast, compiled on a GPU, against float64 on the CPU."""
    encoder, lengths = Encoder(50, d=64, layers=2, model=model, ctx=L).eval(), torch.tensor([L, L - 77])
    encoder.chunk = 16 if L == 300 else None
    for ssm in encoder.modules():
        if isinstance(ssm, S4D):  # long memory, so that the states matter
            nn.init.constant_(ssm.log_step, -4.6)
    ids, weights = torch.randint(50, (2, L)), torch.randn(2, L, 64)
    weights[1, L - 77:] = 0
    expected, expected_gradients = rows_and_gradients(copy.deepcopy(encoder).double(), ids, lengths, weights)
    encoder.to(device)
    if device == "cuda":
        encoder.compile_parts()
    rows, gradients = rows_and_gradients(encoder, ids, lengths, weights, autocast=True)
    for ours, theirs in zip(rows, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < bound
    ours, theirs = (torch.cat([g.flatten() for g in parts]) for parts in (gradients, expected_gradients))
    assert (ours - theirs).norm() / theirs.norm() < 2 * bound


@pytest.mark.parametrize("model, backend", [("codessm", "inductor"), *(
    (model, "aot_eager") for model in ("codessm", "codessm-8k", "rocoder", "zamba"))])
def test_compiled_equals_eager(model, backend, compiler, monkeypatch):
    """Outputs and gradients, with a mask and without, as a GPU has it with the polynomials; inductor is slow here."""
    monkeypatch.setattr(codessm, "gelu", Gelu.apply)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(1)
    encoder = Encoder(50, d=64, layers=2, N=8, model=model, ctx=40)
    encoder.chunk = 16
    ids, lengths, weights = torch.randint(50, (3, 40)), torch.tensor([40, 17, 0]), torch.randn(3, 40, 64)
    weights[:, 17:], weights[2] = 0, 0
    masks = [lengths, None] if (model, backend) == ("codessm", "aot_eager") else [lengths]
    eager = [rows_and_gradients(encoder, ids, mask, weights) for mask in masks]
    encoder.compile_parts()
    for mask, expected in zip(masks, eager):
        for a, b in zip(sum(rows_and_gradients(encoder, ids, mask, weights), []), sum(expected, []), strict=True):
            assert b.numel() == 0 or (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-5


def test_a_users_module_of_the_same_name_is_reported(tmp_path):
    (tmp_path / "data.py").write_text("raise SystemExit('the wrong file ran')")
    done = subprocess.run([sys.executable, "-c", "import codessm"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and f"{tmp_path}/data.py shadows codessm's own data.py in {ROOT}" in done.stderr
