"""The variants and the models that CodeSSM is compared with, each against its own equations in float64."""
import math

import numpy as np
import pytest
import torch

import codessm
import data
import tasks
from codessm import MODELS, SIZES, Encoder, Kernels, Layer, TransformerLayer
from test_model import gelu_reference, layer_norm_reference, padding_error, recurrence, relative_error, through

CAUSAL = ("codessm-uni", "zamba")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def encoder(model, d=64, layers=3, ctx=64, **more):
    made = Encoder(50, d=d, layers=layers, N=8, model=model, ctx=ctx, **more).eval()
    made.chunk = 16
    return made


def numbers(module):
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


def affine(p, name, x, rows=slice(None)):
    return x @ p[f"{name}.weight"][rows].T + (p[f"{name}.bias"][rows] if f"{name}.bias" in p else 0)


def disturb(module):
    """Parameters of linear maps, norms and convolutions that no symmetry hides a mistake in."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "_ssm" not in name and "A_log" not in name:
                parameter.uniform_(-0.4, 0.4)


# ---- the variants of the layer ----------------------------------------------------------------------

def near(u, p, name):
    """The short convolution by its definition, of u (L, d)."""
    w = p[f"{name}.weight"]
    return np.array([sum(w[j] * u[t - j] for j in range(len(w)) if t >= j) for t in range(len(u))]) + p[f"{name}.bias"]


@pytest.mark.parametrize("options", [dict(kernels=4), dict(causal=True), dict(fourier=True), dict(local=3),
                                     dict(kernels=2, local=3, causal=True)], ids=str)
def test_each_variant_of_the_layer_equals_its_equations(options):
    """With the flips carried out and each group of channels convolved by its own recurrence, over several chunks."""
    d, L, k, causal = 8, 21, options.get("kernels", 1), options.get("causal")
    layer = Layer(d, N=4, **options)
    disturb(layer)
    Xi = torch.randn(1, L, d)
    x, p = Xi[0].double().numpy(), numbers(layer)

    def mixed(name, u):
        if options.get("fourier"):
            i = np.arange(L)
            return np.cos(2 * np.pi * i[:, None] * i / L) @ u / math.sqrt(L)
        groups = np.split(u, k, 1)
        y = []
        for g, part in enumerate(groups):
            ssm = codessm.S4D(4)
            for own, theirs in zip(ssm.parameters(), getattr(layer, f"{name}_ssm").parameters()):
                own.data = theirs.data[g] if k > 1 else theirs.data
            y.append(recurrence(ssm, part))
        local = near(u, p, f"local.{int(name == 'backward')}") if options.get("local") else 0
        return np.concatenate(y, 1) + local

    flip = (lambda a: a) if causal else (lambda a: a[::-1])
    X = layer_norm_reference(x) * p["norm.weight"] + p["norm.bias"]
    F = gelu_reference(affine(p, "fb", X, slice(0, d)))
    B = gelu_reference(affine(p, "fb", flip(X), slice(d, 2 * d)))
    U = affine(p, "u1", mixed("forward", F)) * flip(affine(p, "u2", mixed("backward", B)))
    Xo = x + affine(p, "o", gelu_reference(affine(p, "u", U)) * gelu_reference(affine(p, "v", X)))
    forms = [(Kernels(), L, 1)]
    if not options.get("fourier"):
        stacked = [torch.stack([getattr(ssm, name) for ssm in (layer.forward_ssm, layer.backward_ssm)])
                   for name in ("A_re", "A_im", "C", "D", "log_step")]
        stacked = [part.flatten(0, 1)[None] if k > 1 else part[None] for part in stacked]
        forms = [(Kernels(*(None if matrix is None else matrix[0] for matrix in codessm.kernels(
            *stacked, c, n, torch.float32, fft, bool(causal)))), c, n)
            for c, n, fft in ((6, 4, 0), (24, 1, 0), (21, 1, 1))]
    for form in forms:
        assert relative_error(through(layer, Xi, *form), Xo) < 1e-5


def test_eight_equal_kernels_are_one():
    ids, one, eight = torch.randint(50, (2, 40)), encoder("codessm"), encoder("codessm-8k")
    weights = one.state_dict()
    eight.load_state_dict({name: weights[name].expand(value.shape) for name, value in eight.state_dict().items()})
    with torch.no_grad():
        assert (one(ids) - eight(ids)).abs().max() < 1e-5
        eight.layers[0].forward_ssm.D[3] += 1
        different = (one(ids) - eight(ids)).abs().amax()
    assert different > 1e-4 and eight.config["kernels"] == 8 and eight.layers[0].forward_ssm.C.shape == (8, 8, 2)


def test_without_its_convolution_codessm_hf_is_codessm():
    ids, one, hf = torch.randint(50, (2, 40)), encoder("codessm"), encoder("codessm-hf")
    missing = hf.load_state_dict(one.state_dict(), strict=False)
    assert {name.split(".", 2)[2] for name in missing.missing_keys} == {
        f"local.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")} and not missing.unexpected_keys
    with torch.no_grad():
        assert torch.equal(one(ids), hf(ids))
        hf.layers[0].local[0].weight[2] = 1
        assert not torch.allclose(one(ids), hf(ids), atol=1e-4)


def test_dropout_is_of_both_products_in_training_alone():
    ids, one, do = torch.randint(50, (8, 48)), encoder("codessm"), encoder("codessm-do")
    do.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(ids), do(ids))
        seen = []
        for layer in do.layers:
            layer.drop.register_forward_hook(lambda _m, given, result: seen.append((given[0], result)))
        assert not torch.equal(one(ids), do.train()(ids))
    assert [given.shape[-1] for given, _ in seen] == [64, 192] * 3  # U1 * U2, then U * V
    for given, result in seen:
        kept = result != 0
        assert abs((~kept).float().mean() - 0.1) < 0.01 and torch.allclose(result[kept], given[kept] / 0.9)


def test_codef_depends_on_padding_and_on_nothing_at_it():
    """Its DFT spans the padded length; what stands at padding is masked all the same."""
    model, ids = encoder("codef"), torch.randint(50, (1, 30))
    with torch.no_grad():
        for layer in model.layers:
            layer.o.weight.mul_(10)
        alone = model(ids[:, :20])
        padded = model(ids, torch.tensor([20]))[:, :20]
        ids[:, 20:] = 7
        assert torch.equal(model(ids, torch.tensor([20]))[:, :20], padded) and (alone - padded).abs().max() > 1e-3


# ---- every model ------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("codef", "codessm", "rocoder")])
def test_padding_changes_no_answer(model):
    """And without the mask it does, but of models that look back alone and have padding ahead."""
    made = encoder(model)
    with torch.no_grad():
        for layer in made.layers:
            if MODELS[model].layer is Layer:
                layer.o.weight.mul_(10)
            if layer.__dict__["_modules"].get("local"):
                disturb(layer.local)
    assert padding_error(made, True, batches=1) < 1e-5
    assert model in CAUSAL or padding_error(made, False, batches=1) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_who_sees_what(model):
    """A token changes what follows it, and what precedes it unless the model is causal."""
    made = encoder(model, layers=4)  # of zamba two layers that call the shared block
    ids = torch.randint(50, (1, 40))
    changed = ids.clone()
    changed[0, 17] = (ids[0, 17] + 1) % 50
    with torch.no_grad():
        seen = (made(ids) - made(changed)).abs().amax(-1)[0]
    assert (seen[17:] > 0).all()
    assert (seen[:17] == 0).all() if model in CAUSAL else (seen[:17] > 0).all()


@pytest.mark.parametrize("model", MODELS)
def test_gradients_reach_every_parameter_and_a_file_holds_the_model(model, tokenizer, tmp_path):
    made = Encoder(tokenizer.vocab, d=64, layers=4, N=8, model=model, ctx=48)
    task = tasks.MLM(made, tokenizer)
    ids, lengths = torch.randint(4, tokenizer.vocab, (3, 40)), torch.tensor([40, 17, 0])
    hidden = made(ids, lengths)
    assert hidden.shape == (3, 40, 64) and hidden.dtype == torch.float32
    task.logits(hidden)[:2, :17].square().sum().backward()
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []
    codessm.save(tmp_path / "m.pt", task)
    again = codessm.load(tmp_path / "m.pt").encoder
    assert again.config == made.config and not again.training
    with torch.no_grad():
        assert torch.equal(again(ids, lengths)[:2, :17], made.eval()(ids, lengths)[:2, :17])


@pytest.mark.parametrize("model", MODELS)
def test_weights_rounded_once_are_those_rounded_each_time(model, monkeypatch):
    monkeypatch.setattr(tasks, "bf16", lambda device: True)
    task = tasks.MLM(encoder(model), None).eval()
    ids, lengths = torch.randint(50, (3, 40)), torch.tensor([40, 17, 33])
    before = tasks.compute(task, dict(ids=ids, lengths=lengths), task.encoder)
    tasks.narrow(task)
    assert torch.equal(before, tasks.compute(task, dict(ids=ids, lengths=lengths), task.encoder))
    linear = {f"{name}.weight" for name, part in task.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {name for name, p in task.named_parameters() if p.dtype != torch.float32} == linear - {"dense.weight"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model", ["codessm", "codessm-8k", "codessm-hf"])
def test_kernels_are_made_once_a_length_of_an_inference(model, device, monkeypatch):
    """And again for the next, whose weights may be others, or each time if they are large; a GPU records with them."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    made, calls = encoder(model), []
    task, kernels = tasks.MLM(made, None).to(device), codessm.kernels
    monkeypatch.setattr(codessm, "kernels", lambda *args: calls.append(args) or kernels(*args))
    batches = [torch.randint(50, (3, L)) for L in (40, 24, 40, 40, 24, 40)]
    for most, times in ((2 ** 20, 2), (2 ** 20, 2), (0, 5 if device == "cuda" else 6)):
        monkeypatch.setattr(codessm, "MOST_KEPT", most)
        run = tasks.inference(task, made)
        found = [run({"ids": ids}) for ids in batches]
        assert made.kept is None and not found[0].requires_grad and len(calls) == times
        assert len(run.recorded) == (device == "cuda")
        bound = 1e-2 if device == "cuda" else 0
        with torch.no_grad():
            for ids, ours in zip(batches, found):
                theirs = tasks.compute(task, {"ids": ids}, made)
                assert (ours - theirs).norm() <= bound * theirs.norm()
            disturb(made)
            for parameter in made.parameters():
                parameter.mul_(1.1)
        calls.clear()
    monkeypatch.setattr(Layer, "forward", lambda *_: {}["fails"])
    with pytest.raises(KeyError):
        tasks.inference(task, made)({"ids": batches[0]})
    assert made.kept is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("model", MODELS)
def test_its_steps_can_be_recorded(model, tokenizer):
    """On a GPU, compiled: of two lengths both are, and the loss of what is learned by heart falls."""
    rng = np.random.default_rng(0)
    batches = [data.Batch(rng.integers(4, tokenizer.vocab, (8, L)).astype(np.int32), np.full(8, L - 3, np.int32),
                          np.arange(8), 0) for L in (24, 40)]
    task = tasks.MLM(Encoder(tokenizer.vocab, d=64, layers=4, model=model, ctx=40), tokenizer).cuda()
    assert tasks.compile_parts(task, True)
    stepper = tasks.Stepper(task, tasks.adamw(task, 3e-3), graphs=True)
    losses = [float(sums[0] / sums[2]) for sums in (stepper(batches[step % 2]) for step in range(40))]
    assert len(stepper.recorder.recorded) == 2 and sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_within_five_per_cent_of_190_million(model):
    with torch.device("meta"):
        made = tasks.MLM(Encoder(32100, **SIZES["base"], model=model, ctx=256), None)
    count = sum(p.numel() for p in made.parameters())
    assert 0.95 * 190e6 < count < 1.05 * 190e6
    expected = {"codessm": (197.6e6, 197.8e6), "rocoder": (185.0e6, 185.2e6), "zamba": (184e6, 188e6)}
    low, high = expected.get(model, (0, math.inf))
    assert low < count < high


def test_a_checkpoint_from_before_the_variants(tokenizer, tmp_path):
    task = tasks.MLM(Encoder(tokenizer.vocab, d=32, layers=1, N=4), tokenizer)
    content = tasks.checkpoint(task)
    content["config"] = {name: content["config"][name] for name in ("vocab", "d", "layers", "N", "model")}
    torch.save(content, tmp_path / "old.pt")
    assert codessm.load(tmp_path / "old.pt").encoder.config["kernels"] == 1


# ---- transformers -----------------------------------------------------------------------------------

def attention_reference(q, k, v, scale, causal=False):
    """softmax(q k^T scale) v of each head of 64; q, k and v (L, 64 heads)."""
    heads = []
    for h in range(q.shape[1] // 64):
        one = slice(h * 64, h * 64 + 64)
        scores = np.exp(q[:, one] @ k[:, one].T * scale)
        scores = np.tril(scores) if causal else scores
        heads.append(scores / scores.sum(1, keepdims=True) @ v[:, one])
    return np.concatenate(heads, 1)


def test_a_bertcoder_layer_equals_berts_equations():
    """Devlin et al. 2019 and Vaswani et al. 2017, section 3, in float64; and positions are added before the norm."""
    d, L = 128, 19
    layer = TransformerLayer(d, rotary=False)
    disturb(layer)
    Xi = torch.randn(1, L, d)
    x, p = Xi[0].double().numpy(), numbers(layer)
    Y = attention_reference(*np.split(affine(p, "qkv", x), 3, 1), 1 / 8)
    x = layer_norm_reference(x + affine(p, "out", Y)) * p["norm1.weight"] + p["norm1.bias"]
    x = layer_norm_reference(x + affine(p, "down", gelu_reference(affine(p, "up", x))))
    for layer.plain in (False, True):
        assert relative_error(layer(Xi, None)[0], x * p["norm2.weight"] + p["norm2.bias"]) < 1e-5
    for model in ("bertcoder", "codessm-pos"):
        made, ids = encoder(model), torch.randint(50, (1, 9))
        p = numbers(made)
        embedded = layer_norm_reference(p["embedding.weight"][ids[0]] + p["positions.weight"][:9])
        assert relative_error(made.embed(ids)[0], embedded) < 1e-5


def test_learned_positions_bound_the_length():
    for model in MODELS:
        made, ids = encoder(model, layers=1, ctx=24), torch.zeros(1, 25, dtype=torch.long)
        with torch.no_grad():
            made(ids[:, :24])
            if made.positions is None:
                assert made(ids).shape == (1, 25, 64) and made.config["ctx"] is None
            else:
                with pytest.raises(data.Problem, match=f"{model} has learned positions for 24 tokens and cannot read"):
                    made(ids)
    with pytest.raises(ValueError, match="bertcoder has learned positions"):
        Encoder(50, d=64, layers=1, model="bertcoder")


# ---- zamba ------------------------------------------------------------------------------------------

def ssd_reference(x, a, B, C):
    """y (L, H, P) by the recurrence, a state at a time."""
    h, y = np.zeros((x.shape[1], B.shape[1], x.shape[2])), []
    for x_t, a_t, B_t, C_t in zip(x, a, B, C):
        h = np.exp(a_t)[:, None, None] * h + B_t[None, :, None] * x_t[:, None]
        y.append(np.einsum("hnp,n->hp", h, C_t))
    return np.array(y)


@pytest.mark.parametrize("L", [1, 7, 64, 300])
def test_the_chunked_form_equals_the_recurrence(L, monkeypatch):
    monkeypatch.setattr(codessm, "GROUP", 4)
    x, B, C = torch.randn(1, L, 2, 5), torch.randn(1, L, 3), torch.randn(1, L, 3)
    a = -torch.rand(1, L, 2) * torch.tensor([0.02, 1.5])  # one head forgets slowly
    expected = ssd_reference(*(t[0].double().numpy() for t in (x, a, B, C)))
    for c in (16, 64, 512):
        assert relative_error(codessm.ssd(x, a, B, C, c)[0], expected) < 1e-5, c
    low = codessm.ssd(*(t.bfloat16() if t is not a else t for t in (x, a, B, C)), 16)[0]
    assert relative_error(low, expected) < 2e-2


def test_gradients_of_the_chunked_form(monkeypatch):
    monkeypatch.setattr(codessm, "GROUP", 2)
    x, a, B, C = (torch.randn(1, 8, *rest, dtype=torch.float64) for rest in ((2, 2), (2,), (2,), (2,)))
    inputs = [t.requires_grad_() for t in (x, -a.abs(), B, C)]
    assert torch.autograd.gradcheck(lambda *t: codessm.ssd(*t, 2), inputs)


def rms_norm_reference(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * weight


def rotated_reference(x):
    """x (L, 64 heads), each pair (x_e, x_(e + 32)) of a head as a complex number that is turned."""
    L = len(x)
    x = x.reshape(L, -1, 2, 32)
    turned = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * np.arange(L)[:, None, None] * 10_000 ** (-np.arange(32) / 32))
    return np.stack([turned.real, turned.imag], 2).reshape(L, -1)


def zamba_reference(x, p, call):
    """A layer of x (L, d) step by step: Dao and Gu 2024, section 7, and Zamba2's call of a shared block."""
    def silu(x):
        return x / (1 + np.exp(-x))

    d, X = x.shape[1], x
    if call is not None:
        embedding, b = call
        both = rms_norm_reference(np.concatenate([x, embedding], 1), b["norm1.weight"])
        q, k, v = np.split(affine(b, "qkv", both), 3, 1)
        Y = attention_reference(rotated_reference(q), rotated_reference(k), v, 32 ** -0.5, causal=True)
        Y = rms_norm_reference(affine(b, "out", Y), b["norm2.weight"])
        gate, up = np.split(affine(b, "up", Y) + affine(p, "adapter.1", affine(p, "adapter.0", Y)), 2, 1)
        X = x + affine(p, "linear", affine(b, "down", gelu_reference(gate) * up))
    z, u, dt = np.split(affine(p, "into", rms_norm_reference(X, p["norm.weight"])), [2 * d, 4 * d + 16], 1)
    u = silu(near(u, p, "convolution"))
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    heads = u[:, :2 * d].reshape(len(u), -1, 64)
    y = ssd_reference(heads * dt[..., None], -np.exp(p["A_log"]) * dt, u[:, 2 * d:2 * d + 8], u[:, 2 * d + 8:])
    y = (y + p["D"][:, None] * heads).reshape(len(u), -1)
    return x + affine(p, "out", rms_norm_reference(y * silu(z), p["gated_norm.weight"]))


def test_zamba_equals_its_equations_step_by_step():
    """Fourteen layers, of which the third, sixth, ninth and twelfth call two shared blocks in turn."""
    made, ids = encoder("zamba", layers=12), torch.randint(50, (1, 90))  # two chunks
    assert len(made.layers) == 14 and len(made.shared) == 2
    p = numbers(made)
    blocks = [numbers(block) for block in made.shared]
    embedding = x = layer_norm_reference(p["embedding.weight"][ids[0]])
    for i, layer in enumerate(made.layers, 1):
        calls = {3: 0, 6: 1, 9: 0, 12: 1}.get(i)
        x = zamba_reference(x, numbers(layer), None if calls is None else (embedding, blocks[calls]))
    with torch.no_grad():
        assert relative_error(made(ids)[0] - made.embed(ids)[0], x - embedding) < 1e-4
    layer = made.layers[2]
    disturb(layer), disturb(made.shared[0])
    Xi = torch.randn(1, 70, 64)
    given = torch.randn(1, 70, 64), codessm.rotation(Xi), made.shared[0]
    call = given[0][0].double().numpy(), numbers(given[2])
    expected = zamba_reference(Xi[0].double().numpy(), numbers(layer), call)
    with torch.no_grad():
        assert relative_error(layer(Xi, given)[0], expected) < 1e-5


def test_under_autocast_decays_and_states_stay_in_float32(monkeypatch):
    made, seen = encoder("zamba"), []

    def ssd(x, a, B, C, c, original=codessm.ssd):
        seen.append((x.dtype, a.dtype, B.dtype))
        return original(x, a, B, C, c)

    monkeypatch.setattr(codessm, "ssd", ssd)
    ids = torch.randint(50, (2, 200))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            made(ids)
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)} and len(seen) == len(made.layers)
