"""The encoder against independent float64 sources: the state-space recurrence and the paper's equations."""
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
from codessm import MODELS, S4D, Encoder, Gelu, Kernels, Layer, TransformerLayer
from conftest import ROOT, forkserver, peak


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


def matrices(ssms, c, n, dtype=torch.float32, fft=False, causal=False):
    """The `Kernels` of one layer with these two S4D, for n chunks of c."""
    names = ("A_re", "A_im", "C", "D", "log_step")
    made = codessm.kernels(*(torch.stack([getattr(ssm, name) for ssm in ssms])[None] for name in names),
                           c, n, dtype, fft, causal)
    return Kernels(*(None if matrix is None else matrix[0] for matrix in made))


def convolve(ssms, u, chunk, dtype=torch.float32, fft=False, causal=False):
    """y of u, both (2, L, d), forwards for the first and backwards for the second, in chunks of at most `chunk`."""
    L, d = u.shape[1:]
    n = 1 if fft else -(-L // chunk)
    c = -(-L // n)
    chunks = torch.nn.functional.pad(u, (0, 0, 0, n * c - L)).to(dtype).view(2, n, c, 1, d).transpose(1, 2)
    y = codessm.convolve(chunks, matrices(ssms, c, n, dtype, fft, causal), causal)
    return y.transpose(1, 2).reshape(2, n * c, d)[:, :L]


def recurrences(ssms, u):
    """The same by `recurrence`."""
    u = u.double().numpy()
    return recurrence(ssms[0], u[0]), recurrence(ssms[1], u[1, ::-1])[::-1]


def gelu_reference(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm_reference(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-12)


def through(layer, Xi, kernels, c, n):
    """Xo (L, d) of Xi (1, L, d) by a `Layer`, in n chunks of c; a part of Xi is what the layer before adds."""
    R, real = torch.randn(Xi.shape), torch.ones(1, Xi.shape[1], 1, dtype=torch.bool)
    X, R, real = (codessm.in_chunks(part, (n, c)) for part in (Xi - R, R, real))
    X, branch = layer(X, R, kernels, real)
    return (X + branch).permute(2, 1, 0, 3).reshape(n * c, -1)[:Xi.shape[1]]


def relative_error(ours, reference):
    return np.abs(ours.detach().double().numpy() - reference).max() / np.abs(reference).max()


# (Re A, Delta); None: as initialised
SETTINGS = [(None, None)] + [(re, step) for re in (-0.05, -1e-4) for step in (0.01, 0.1, 1.0)]


@pytest.mark.parametrize("A_re, step", SETTINGS)
def test_s4d_equals_the_recurrence(A_re, step):
    ssms = S4D(), S4D()
    with torch.no_grad():
        if step:
            for ssm in ssms:
                ssm.A_re.fill_(A_re)
                ssm.log_step.fill_(math.log(step))
        for L in (1, 7, 64, 513, 2048):
            u = torch.randn(2, L, 3)
            expected = recurrences(ssms, u)
            for chunk in (16, 128, 2048):  # 2,048 in chunks of 16 are two groups
                for ours, theirs in zip(convolve(ssms, u, chunk), expected):
                    assert relative_error(ours, theirs) < 1e-5, (L, chunk)
            for ours, theirs in zip(convolve(ssms, u, L, fft=True), expected):
                assert relative_error(ours, theirs) < 1e-5, L


@pytest.mark.parametrize("chunk", [8, 48, 400])
def test_in_bfloat16_the_convolution_keeps_to_the_recurrence(chunk):
    """Within 1e-2, as many chunks as it may be: nothing adds up from chunk to chunk."""
    ssms, u = (S4D(), S4D()), torch.randn(2, 1500, 8).bfloat16()
    with torch.no_grad():
        for ssm in ssms:  # long memory, so that the state matters
            ssm.log_step.fill_(math.log(0.01))
            ssm.A_re.fill_(-0.05)
        for ours, theirs in zip(convolve(ssms, u, chunk, torch.bfloat16), recurrences(ssms, u)):
            assert ours.dtype == torch.bfloat16 and relative_error(ours, theirs) < 1e-2


def test_errors_of_bfloat16_do_not_add_up_from_chunk_to_chunk():
    """Powers of A-bar^c and states are rounded once each; states carried in bfloat16 would drift. In groups of 8 chunks
    states go on in float32 and are rounded at the end."""
    ssms = S4D(3), S4D(3)
    with torch.no_grad():
        for ssm in ssms:  # they forget a sixteenth over all chunks
            ssm.log_step.fill_(math.log(0.01))
            ssm.A_re.fill_(-0.01)
        made, unit = matrices(ssms, 16, 40), 2 ** -8
        S = (1 + torch.rand(6, 2, 40, 5)).bfloat16()
        for powers, backwards in ((made.W.transpose(1, 3), (True, False)), (made.W, (False, True))):
            exact, most = (codessm.carry(form(S.double()), form(powers.double()), backwards)
                           for form in (lambda M: M, torch.abs))
            first = (0, -1) if backwards[1] else (-1, 0)
            assert all((half[:, :, i] == 0).all() for half, i in zip(exact.chunk(2), first)) and exact.abs().mean() > 5
            bound = 1.01 * unit * (most + exact.abs()) + 1e-4
            assert ((codessm.carry(S, powers, backwards) - exact).abs() <= bound).all()
            groups = codessm.carry(S, powers[:, :, :9, :, :9], backwards)
            assert ((groups - exact).abs() <= 1.01 * unit * exact.abs() + 1e-4).all()
        A, H = torch.view_as_complex(made.A.bfloat16().double()).view(6, 1), torch.zeros(6, 5, dtype=torch.complex128)
        S = torch.view_as_complex(S.double().movedim(1, -1).contiguous())  # (6, 40, 5)
        for j in range(39):
            H = torch.view_as_complex(torch.view_as_real(A * H + S[:, j]).bfloat16().double())
        # against the last pass's, whose first half runs forwards
        drifted = (torch.view_as_real(H)[:3] - exact[:3, :, -1].movedim(1, -1)).abs().movedim(-1, 1)
        assert (drifted > bound[:3, :, -1]).any()


def test_a_toeplitz_matrix_and_its_gradient():
    """T[i, j] = k[i - j], one by one."""
    k = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    T = codessm.Toeplitz.apply(k)
    for i in range(5):
        for j in range(5):
            assert torch.equal(T[..., i, j], k[..., i - j] if i >= j else torch.zeros(2, 3))
    assert torch.autograd.gradcheck(codessm.Toeplitz.apply, k)


def test_outer_products_and_gradients_of_gates():
    """Whether the long side can be cut into eight or not."""
    for m in (16, 20, 7):
        dy, u = (torch.randn(2, rows, m, dtype=torch.float64) for rows in (3, 4))
        assert torch.allclose(codessm.outer(dy, u), torch.einsum("kim, kjm -> kij", dy, u))
    y, W, b = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 3), (3, 3), (3,)))
    F, B = y @ W.mT + b[:, None]
    assert torch.allclose(codessm.Gate.apply(y, W, b), F * B) and torch.autograd.gradcheck(codessm.Gate.apply, (y, W, b))


def test_tokens_come_back_in_order_and_so_do_gradients():
    X, R = (torch.randn(3, 2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    whole = codessm.InTokens.apply(X, R)
    for j in range(6):  # the chunks are of 3 tokens
        assert torch.equal(whole[:, j], (X + R)[j % 3, j // 3])
    assert torch.equal(codessm.in_chunks(whole, (2, 3)), X + R)
    assert torch.autograd.gradcheck(codessm.InTokens.apply, (X, R))


def test_the_naive_float32_coefficients_would_fail():
    """The bound above is one that the phase in float32 does not keep: what `kernels` is careful about matters."""
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


@pytest.mark.parametrize("group, causal", [(2, False), (2, True), (64, False), (64, True)])
def test_gradients_of_every_parameter(group, causal, monkeypatch):
    monkeypatch.setattr(codessm, "GROUP", group)
    ssms = S4D(N=3).double(), S4D(N=3).double()
    with torch.no_grad():
        for ssm in ssms:
            ssm.log_step.fill_(-1.0)
    u = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)
    assert sorted(name for name, _ in ssms[0].named_parameters()) == ["A_im", "A_re", "C", "D", "log_step"]
    parameters = [parameter for ssm in ssms for parameter in ssm.parameters()]
    assert torch.autograd.gradcheck(lambda u, *_: convolve(ssms, u, 4, torch.float64, causal=causal), (u, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_gelu_is_the_exact_one(dtype):
    """Far out as well, where e^-z is infinite."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.linspace(-1e4, 1e4, 2001)]).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    Gelu.apply(x).sum().backward()
    reference = torch.nn.functional.gelu(exact)
    reference.sum().backward()
    rounding = 2 ** -8 if dtype == torch.bfloat16 else 0
    for ours, theirs, bound in ((Gelu.apply(x), reference, 4e-5), (x.grad, exact.grad, 2e-4)):
        assert ours.dtype == dtype and ((ours - theirs).abs() <= theirs.abs() * rounding + bound).all()


def test_layer_equals_the_papers_equations():
    """Section 3 of DESIGN with the flips carried out and the SSMs as recurrences, in float64."""
    layer, d = Layer(8, N=4), 8
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1 and parameter.shape[0] >= d:
                parameter.uniform_(-0.5, 0.5)
    Xi = torch.randn(1, 21, d)
    x, p = Xi[0].double().numpy(), {n: v.detach().double().numpy() for n, v in layer.named_parameters()}

    def affine(name, x, rows=slice(None)):
        return x @ p[f"{name}.weight"][rows].T + p[f"{name}.bias"][rows]

    X = layer_norm_reference(x) * p["norm.weight"] + p["norm.bias"]
    V = gelu_reference(affine("v", X))
    F = gelu_reference(affine("fb", X, slice(0, d)))
    B = gelu_reference(affine("fb", X[::-1], slice(d, 2 * d)))
    U1 = affine("u1", recurrence(layer.forward_ssm, F))
    U2 = affine("u2", recurrence(layer.backward_ssm, B))[::-1]
    U = gelu_reference(affine("u", U1 * U2))
    Xo = x + affine("o", U * V)
    ssms = layer.forward_ssm, layer.backward_ssm
    for c, n, fft in ((6, 4, False), (24, 1, False), (21, 1, True)):
        assert relative_error(through(layer, Xi, matrices(ssms, c, n, fft=fft), c, n), Xo) < 1e-5


def test_a_roformer_layer_equals_its_equations():
    """Su et al. 2021, equations 14 and 34, and BERT's post-norm block, with the rotation as a matrix, in float64."""
    d, L, heads = 128, 19, 2
    layer = TransformerLayer(d, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.3, 0.3)
    encoder = Encoder(5, d, 1, model="rocoder")
    Xi = torch.randn(1, L, d)
    x, p = Xi[0].double().numpy(), {n: v.detach().double().numpy() for n, v in layer.named_parameters()}

    def affine(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    q, k, v = np.split(affine("qkv", x), 3, axis=1)
    mixed = []
    for h in range(heads):
        rotated = []
        for side in (q, k):
            side = side[:, h * 64:(h + 1) * 64].copy()
            for i in range(L):
                for e in range(32):
                    angle = i * 10_000 ** (-2 * e / 64)
                    R = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
                    side[i, [e, e + 32]] = R @ side[i, [e, e + 32]]
            rotated.append(side)
        scores = np.exp(rotated[0] @ rotated[1].T / 8)
        mixed.append(scores / scores.sum(1, keepdims=True) @ v[:, h * 64:(h + 1) * 64])
    x = layer_norm_reference(x + affine("out", np.concatenate(mixed, 1))) * p["norm1.weight"] + p["norm1.bias"]
    expected = layer_norm_reference(x + affine("down", gelu_reference(affine("up", x))))
    expected = expected * p["norm2.weight"] + p["norm2.bias"]
    for layer.plain in (False, True):
        assert relative_error(layer(Xi, encoder.given(Xi)[0])[0], expected) < 1e-5


def branches(encoder, ids, lengths):
    """Xo - Xi and Xi of every layer, each (layers, B, L, d)."""
    kept = []

    def keep(_module, given, out):
        X, branch = out if isinstance(out, tuple) else (given[0], out - given[0])
        kept.append([x if x.ndim == 3 else x.permute(2, 1, 0, 3).flatten(1, 2)[:, :ids.shape[1]] for x in (branch, X)])

    hooks = [layer.register_forward_hook(keep) for layer in encoder.layers]
    with torch.no_grad():
        encoder(ids, lengths)
    for hook in hooks:
        hook.remove()
    return [torch.stack(part) for part in zip(*kept)]


def padding_error(encoder, masked, batches=6):
    """The largest difference of a branch between a sample alone, in a batch, and padded further."""
    generator, worst, share = torch.Generator().manual_seed(1), 0.0, []
    for _ in range(batches):
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


@pytest.mark.parametrize("model, form", [("codessm", ""), ("codessm", "fft"), ("rocoder", ""), ("rocoder", "plain")])
def test_padding_changes_no_answer_and_without_the_mask_it_does(model, form):
    encoder = Encoder(50, d=64, layers=3, N=8, model=model).eval()
    encoder.chunk, encoder.fft = 16, form == "fft"
    with torch.no_grad():
        for layer in encoder.layers:
            layer.plain = form == "plain"
            if model == "codessm":
                layer.o.weight.mul_(10)  # at initialisation the branch is half a percent of the residual
    assert padding_error(encoder, masked=True) < 1e-5
    assert padding_error(encoder, masked=False) > 1e-3


@pytest.mark.parametrize("chunk", [4, 64])
def test_each_direction_is_causal(chunk):
    ssms, u = (S4D(N=8), S4D(N=8)), torch.randn(2, 30, 2)
    changed = u.clone()
    changed[:, 13] += 1
    with torch.no_grad():
        forwards, backwards = (convolve(ssms, u, chunk) - convolve(ssms, changed, chunk)).abs().amax(2) < 1e-6
    assert forwards[:13].all() and not forwards[13:].any()
    assert backwards[14:].all() and not backwards[:14].any()


def cost(L):
    """Seconds and bytes."""
    encoder = Encoder(50, d=64, layers=2)
    for length in (256, L):
        before, start = peak(), time.perf_counter()
        encoder(torch.zeros(1, length, dtype=torch.long)).sum().backward()
    return time.perf_counter() - start, peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cost_is_linear_in_length():
    """Eight times the tokens take about eight times the time and memory, forwards and backwards."""
    found = []
    for L in (8192, 65536):
        with forkserver.Pool(1) as process:
            found.append(process.apply(cost, [L]))
    times, memory = zip(*found)
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
        assert abs(layer.v.weight.std().item() / (0.64 / math.sqrt(128)) - 1) < 0.03
        assert not layer.v.bias.any()
        ssm = layer.forward_ssm
        assert torch.equal(ssm.A_re, torch.full((64,), -0.5))
        assert torch.allclose(ssm.A_im, torch.pi * torch.arange(64))
        assert 0.01 <= ssm.log_step.exp().item() <= 1
    C = torch.cat([m.C.detach().flatten() for m in encoder.modules() if isinstance(m, S4D)])
    assert abs(C.var().item() - 0.5) < 0.1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model, L, bound", [("codessm", 300, 1e-2), ("codessm", 1200, 1e-2),
                                             *((model, 300, 2e-2) for model in MODELS if model != "codessm")])
def test_in_bfloat16_it_is_near_float64(model, L, bound, device):
    """The branches of the layers and all gradients under autocast, compiled on a GPU, against float64 on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    encoder, lengths = Encoder(50, d=64, layers=2, model=model, ctx=L).eval(), torch.tensor([L, L - 77])
    encoder.chunk = 16 if L == 300 else None
    for ssm in encoder.modules():
        if isinstance(ssm, S4D):  # long memory, so that the states matter
            nn.init.constant_(ssm.log_step, -4.6)
    ids, weights = torch.randint(50, (2, L)), torch.randn(2, L, 64)
    weights[1, L - 77:] = 0

    def run(encoder, device="cpu", autocast=False):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            branches = encoder(ids.to(device), lengths.to(device)) - encoder.embed(ids.to(device))
        (branches * weights.to(device)).sum().backward()
        found = [branches[0], branches[1, :L - 77], torch.cat([p.grad.flatten() for p in encoder.parameters()])]
        return [part.detach().cpu().double() for part in found]

    expected = run(copy.deepcopy(encoder).double())
    encoder.to(device)
    if device == "cuda":
        encoder.compile_parts()
    for ours, theirs, bound in zip(run(encoder, device, True), expected, (bound, bound, 2 * bound)):
        assert (ours - theirs).norm() / theirs.norm() < bound


def test_autocast_keeps_kernels_in_float32_and_activations_in_bfloat16(monkeypatch):
    encoder, seen = Encoder(50, d=64, layers=1), []

    def kernels(*args, original=codessm.kernels):
        seen.extend(t.dtype for t in args if isinstance(t, torch.Tensor))
        made = original(*args)
        seen.append(made.W.dtype)
        return made

    def convolved(u, kernels, causal, original=codessm.convolve):
        assert u.dtype == kernels.TO.dtype == kernels.E.dtype == torch.bfloat16  # the mask has not widened u either
        return original(u, kernels, causal)

    monkeypatch.setattr(codessm, "kernels", kernels)
    monkeypatch.setattr(codessm, "convolve", convolved)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder(torch.zeros(2, 600, dtype=torch.long), torch.tensor([600, 4]))
    assert seen == [torch.float32] * 6


@pytest.mark.parametrize("model, backend",
                         [("codessm", "inductor"), ("codessm", "aot_eager"), ("codessm-8k", "aot_eager"),
                          ("rocoder", "aot_eager"), ("zamba", "aot_eager")])
def test_compiled_equals_eager(model, backend, compiler, monkeypatch):
    """Outputs and gradients, with a mask and without, as a GPU has it with the polynomials; inductor is slow here."""
    monkeypatch.setattr(codessm, "gelu", Gelu.apply)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(1)
    encoder = Encoder(50, d=64, layers=2, N=8, model=model, ctx=40)
    encoder.chunk = 16
    ids, lengths, weights = torch.randint(50, (3, 40)), torch.tensor([40, 17, 0]), torch.randn(2, 17, 64)

    def run(lengths):
        hidden = encoder(ids, lengths)
        (hidden[:2, :17] * weights).sum().backward()
        found = [hidden[:2, :17].detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]
        encoder.zero_grad(set_to_none=True)
        return found

    masks = [lengths, None] if (model, backend) == ("codessm", "aot_eager") else [lengths]
    eager = list(map(run, masks))
    encoder.compile_parts()
    for ours, theirs in zip(map(run, masks), eager):
        for a, b in zip(ours, theirs):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-5


def test_a_users_module_of_the_same_name_is_reported(tmp_path):
    (tmp_path / "data.py").write_text("raise SystemExit('the wrong file ran')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", "import codessm"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}/data.py shadows codessm's own data.py in {ROOT}" in done.stderr
