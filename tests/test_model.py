"""The encoder against independent float64 sources: the state-space recurrence and the paper's equations."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import codessm
from codessm import S4D, Encoder, Layer
from conftest import PEAK, ROOT


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def recurrence(ssm, u):
    """y (L, d) of u (L, d) by the S4D recurrence, state by state, in float64 (numpy)."""
    p = {name: value.detach().double().numpy() for name, value in ssm.named_parameters()}
    A = np.minimum(p["A_re"], -1e-4) + 1j * p["A_im"]
    A_bar = np.exp(np.exp(p["log_step"]) * A)
    C_bar = (p["C"][:, 0] + 1j * p["C"][:, 1]) * (A_bar - 1) / A
    x, y = np.zeros((len(A), u.shape[1]), complex), np.empty_like(u)
    for t, u_t in enumerate(u):
        x = A_bar[:, None] * x + u_t
        y[t] = (C_bar @ x).real + p["D"] * u_t
    return y


def gelu_reference(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm_reference(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-12)


def relative_error(ours, reference):
    return np.abs(ours.detach().double().numpy() - reference).max() / np.abs(reference).max()


# (Re A, Delta); None: as initialised
SETTINGS = [(None, None)] + [(re, step) for re in (-0.05, -1e-4) for step in (0.01, 0.1, 1.0)]


@pytest.mark.parametrize("A_re, step", SETTINGS)
def test_s4d_equals_the_recurrence(A_re, step):
    ssm = S4D()
    with torch.no_grad():
        if step:
            ssm.A_re.fill_(A_re)
            ssm.log_step.fill_(math.log(step))
    for L in (1, 7, 64, 513, 2048):
        u = torch.randn(1, L, 3)
        forwards, backwards = (recurrence(ssm, x[0].double().numpy()) for x in (u, u.flip(1)))
        for chunk in (16, 128, 2048):
            ssm.chunk = chunk
            with torch.no_grad():
                assert relative_error(ssm(u)[0], forwards) < 1e-5, (L, chunk)
                assert relative_error(ssm(u, reverse=True)[0], backwards[::-1]) < 1e-5, (L, chunk)


def test_the_naive_float32_coefficients_would_fail():
    """The bound above is one that the phase in float32 does not keep: what `discretise` is careful about matters."""
    ssm = S4D()
    with torch.no_grad():
        ssm.A_re.fill_(-1e-4)
        ssm.log_step.fill_(0.0)
    u = torch.randn(2048, 3)
    A = torch.complex(ssm.A_re, ssm.A_im).detach()
    A_bar = torch.exp(A * ssm.log_step.detach().exp())
    C_bar = torch.view_as_complex(ssm.C.detach()) * (A_bar - 1) / A
    K = (C_bar[:, None] * torch.exp(torch.log(A_bar)[:, None] * torch.arange(2048))).real.sum(0)
    y = torch.stack([(K[:t + 1].flip(0)[:, None] * u[:t + 1]).sum(0) for t in range(2048)]) + ssm.D.detach() * u
    assert relative_error(y, recurrence(ssm, u.double().numpy())) > 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_every_parameter(reverse):
    ssm = S4D(N=3).double()
    ssm.chunk = 4
    with torch.no_grad():
        ssm.log_step.fill_(-1.0)
    u = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ssm.named_parameters()]
    assert sorted(names) == ["A_im", "A_re", "C", "D", "log_step"]

    def run(u, *parameters):
        return torch.func.functional_call(ssm, dict(zip(names, parameters)), (u, reverse))

    assert torch.autograd.gradcheck(run, (u, *ssm.parameters()))


def test_layer_equals_the_papers_equations():
    """Section 3 of DESIGN with the flips carried out and the SSMs as recurrences, in float64."""
    layer, d = Layer(8, N=4), 8
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1 and parameter.shape[0] >= d:
                parameter.uniform_(-0.5, 0.5)
    Xi = torch.randn(1, 21, d)
    layer.forward_ssm.chunk = layer.backward_ssm.chunk = 6
    x, p = Xi[0].double().numpy(), {n: v.detach().double().numpy() for n, v in layer.named_parameters()}

    def affine(name, x, rows=slice(None)):
        return x @ p[f"{name}.weight"][rows].T + p[f"{name}.bias"][rows]

    X = layer_norm_reference(x) * p["norm.weight"] + p["norm.bias"]
    V = gelu_reference(affine("vfb", X, slice(0, 3 * d)))
    F = gelu_reference(affine("vfb", X, slice(3 * d, 4 * d)))
    B = gelu_reference(affine("vfb", X[::-1], slice(4 * d, 5 * d)))
    U1 = affine("u1", recurrence(layer.forward_ssm, F))
    U2 = affine("u2", recurrence(layer.backward_ssm, B))[::-1]
    U = gelu_reference(affine("u", U1 * U2))
    assert relative_error(layer(Xi)[0], x + affine("o", U * V)) < 1e-5


def branches(encoder, ids, lengths):
    """Xo - Xi and Xi of every layer, each (layers, B, L, d)."""
    kept = []
    hooks = [layer.register_forward_hook(lambda _m, i, o: kept.append((o - i[0], i[0]))) for layer in encoder.layers]
    with torch.no_grad():
        encoder(ids, lengths)
    for hook in hooks:
        hook.remove()
    return [torch.stack(part) for part in zip(*kept)]


def padding_error(encoder, masked):
    """The largest difference of a branch between a sample alone, in a batch, and padded further."""
    generator, worst, share = torch.Generator().manual_seed(1), 0.0, []
    for _ in range(6):
        lengths = torch.randint(1, 60, (5,), generator=generator)
        ids = torch.randint(0, 50, (5, 60), generator=generator)
        for width in (int(lengths.max()), 60):
            together, _ = branches(encoder, ids[:, :width], lengths if masked else None)
            for i, n in enumerate(lengths.tolist()):
                alone, residual = branches(encoder, ids[i:i + 1, :n], None)
                worst = max(worst, (together[:, i, :n] - alone[:, 0]).abs().max().item())
                share.append((alone.norm() / residual.norm()).item())
    assert min(share) > 0.01, "the branch is too small for this test to see anything"
    return worst


def test_padding_changes_no_answer_and_without_the_mask_it_does():
    encoder = Encoder(50, d=32, layers=3, N=8).eval()
    with torch.no_grad():
        for layer in encoder.layers:
            layer.o.weight.mul_(10)  # at initialisation the branch is half a percent of the residual
            layer.forward_ssm.chunk = layer.backward_ssm.chunk = 16
    assert padding_error(encoder, masked=True) < 1e-5
    assert padding_error(encoder, masked=False) > 1e-3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk", [4, 64])
def test_each_direction_is_causal(reverse, chunk):
    ssm = S4D(N=8)
    ssm.chunk = chunk
    u = torch.randn(1, 30, 2)
    changed = u.clone()
    changed[:, 13] += 1
    with torch.no_grad():
        same = (ssm(u, reverse) - ssm(changed, reverse)).abs().amax((0, 2)) < 1e-6
    unreached = slice(14, None) if reverse else slice(0, 13)
    reached = slice(0, 14) if reverse else slice(13, None)
    assert same[unreached].all() and not same[reached].any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cost_is_linear_in_length():
    """Eight times the tokens take about eight times the time and memory, forwards and backwards."""
    script = PEAK + """
import sys, time, torch
from codessm import Encoder
def run(L): encoder(torch.zeros(1, L, dtype=torch.long)).sum().backward()
encoder = Encoder(50, d=64, layers=2)
run(256)
before, start = peak(), time.perf_counter()
run(int(sys.argv[1]))
print(time.perf_counter() - start, peak() - before)
"""
    times, memory = np.array([subprocess.run([sys.executable, "-c", script, str(L)], cwd=ROOT, capture_output=True,
                                             text=True, check=True).stdout.split() for L in (8192, 65536)], float).T
    # a cost in proportion to the square of the length would show 64
    assert times[1] / times[0] < 32 and memory[1] / memory[0] < 14 and memory[0] > 20e6


def test_base_has_the_papers_size():
    with torch.device("meta"):
        encoder = Encoder(32100, **codessm.SIZES["base"])
    assert 190e6 < sum(p.numel() for p in encoder.parameters()) < 200e6


def test_initialisation():
    encoder = Encoder(2000, **codessm.SIZES["tiny"])
    assert abs(encoder.embedding.weight.std().item() / 0.02 - 1) < 0.02
    for layer in encoder.layers:
        assert abs(layer.vfb.weight.std().item() / (0.64 / math.sqrt(128)) - 1) < 0.03
        assert not layer.vfb.bias.any()
        ssm = layer.forward_ssm
        assert torch.equal(ssm.A_re, torch.full((64,), -0.5))
        assert torch.allclose(ssm.A_im, torch.pi * torch.arange(64))
        assert 0.01 <= ssm.log_step.exp().item() <= 1
    C = torch.cat([m.C.detach().flatten() for m in encoder.modules() if isinstance(m, S4D)])
    assert abs(C.var().item() - 0.5) < 0.1


def test_autocast_keeps_kernels_and_states_in_float32(monkeypatch):
    """bf16 in and out under autocast, within 1e-2 of float64; what makes the matrices, and the states, are float32."""
    ssm, u = S4D(), torch.randn(1, 700, 16).bfloat16()
    seen = []
    for name in ("discretise", "carry"):
        def kept(*args, original=getattr(ssm, name)):
            result = original(*args)
            seen.extend(t.dtype for t in (result if isinstance(result, tuple) else [result]))
            return result
        monkeypatch.setattr(ssm, name, kept)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ssm(u)
    assert y.dtype == torch.bfloat16 and seen == [torch.float32] * 3
    assert relative_error(y[0], recurrence(ssm, u[0].double().numpy())) < 1e-2


def test_the_mask_does_not_widen_the_activations(monkeypatch):
    encoder, seen = Encoder(50, d=32, layers=1), []
    ssm = encoder.layers[0].forward_ssm
    ssm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder(torch.zeros(2, 9, dtype=torch.long), torch.tensor([9, 4]))
    assert seen == [torch.bfloat16]


def test_a_users_module_of_the_same_name_is_reported(tmp_path):
    (tmp_path / "data.py").write_text("raise SystemExit('the wrong file ran')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", "import codessm"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}/data.py shadows codessm's own data.py in {ROOT}" in done.stderr
