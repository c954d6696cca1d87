"""The variants and the compared models against their equations in float64; what holds of every model and task."""
import copy
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import codessm
import data
import tasks
from codessm import MODELS, SIZES, BiGSLayer, Encoder, TransformerLayer
from conftest import KINDS
from test_model import (DEVICES, affine, disturb, gelu_reference, layer_norm_reference, numbers,  # noqa: F401
                        relative_error, seed, short_convolution_reference)

CAUSAL = ("codessm-uni", "zamba")


def encoder(model, layers=3, ctx=64, **more):
    made = Encoder(50, d=64, layers=layers, N=8, model=model, ctx=ctx, **more).eval()
    made.chunk = 16
    return made


# ---- the variants and every model -------------------------------------------------------------------

def test_dropout_is_of_both_products_in_training_alone():
    ids, one, do, seen = torch.randint(50, (8, 48)), encoder("codessm"), encoder("codessm-do"), []
    do.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(ids), do(ids))
        for layer in do.layers:
            layer.drop.register_forward_hook(lambda _m, given, result: seen.append((given[0], result)))
        assert not torch.equal(one(ids), do.train()(ids))
    assert [given.shape[-1] for given, _ in seen] == [64, 192] * 3  # U1 * U2, then U * V
    for given, result in seen:
        kept = result != 0
        assert abs((~kept).float().mean() - 0.1) < 0.01 and torch.allclose(result[kept], given[kept] / 0.9)


@pytest.mark.parametrize("model, plain, more", [*((name, False, {}) for name in MODELS), ("rocoder", True, {}),
                                                ("codessm", False, dict(kernels=64))])
def test_padding_changes_no_answer(model, plain, more):
    """Alone, in a batch, or padded further. Codef's do change, as its DFT spans padding, and so do those without the
    mask, but of models that only look back. What stands at padding changes nothing at all."""
    made, worst = encoder(model, **more), {True: 0, False: 0}
    for layer in made.layers:
        layer.plain = plain
        if isinstance(layer, BiGSLayer):
            layer.o.weight.data.mul_(10)  # at initialisation the branch is half a percent of the residual
            disturb(layer.local or torch.nn.Identity())

    @torch.no_grad()
    def added(ids, lengths=None):
        return made(ids, lengths) - made.embed(ids)

    for _ in range(6 if model in ("codessm", "rocoder") else 1):
        ids, lengths = torch.randint(50, (5, 60)), torch.randint(1, 60, (5,))
        real = torch.arange(60) < lengths[:, None]
        assert torch.equal(added(ids, lengths)[real], added(ids.where(real, 7), lengths)[real])
        for width, masked in ((lengths.max(), True), (lengths.max(), False), (60, True), (60, False)):
            batch = added(ids[:, :width], lengths if masked else None)
            for row, n in enumerate(lengths):
                alone = added(ids[row:row + 1, :n])
                assert alone.norm() > 0.01 * made.embed(ids[row, :n][None]).norm(), "too small to see anything"
                worst[masked] = max(worst[masked], (batch[row, :n] - alone).abs().max().item())
    assert worst[True] > 1e-3 if model == "codef" else worst[True] < 1e-5
    assert worst[False] < 1e-5 if model in CAUSAL else worst[False] > 1e-3


@torch.no_grad()
def outputs_of(objective, case):
    """What it says of the validation split, as a list of arrays."""
    def arrays(outputs):
        return sum(map(arrays, outputs), []) if isinstance(outputs, (tuple, list)) else [np.asarray(outputs)]
    return arrays(objective.outputs(case.valid, case.split))


@pytest.mark.parametrize("model, kind", [*((model, "mlm") for model in MODELS),
                                         *((model, kind) for model in ("codessm", "codessm-hybrid")
                                           for kind in KINDS if kind != "mlm")])
def test_each_task_and_each_model_is_trained(model, kind, make_case, tmp_path):
    """A step changes every parameter; its file and its frozen copy, which shares them all, say the same to the bit."""
    case = make_case(kind, batch=12, d=64, model=model)
    objective, batch = case.objective, min(case.train, key=lambda batch: batch.lengths.min())  # it has empty rows
    tensors = objective.prepare(batch)
    count = len(tensors["targets"]) if "targets" in tensors else (batch.lengths > 0).sum()
    sums, before = objective.loss(**tensors), copy.deepcopy(objective.state_dict())
    assert sums.dtype == torch.float32 and sums.shape == (3,) and sums[2] == count > 0 and batch.lengths.min() == 0
    sums[0].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert tasks.Stepper(objective, tasks.adamw(objective, 1e-3))(batch)[2] == count
    assert [name for name, value in objective.state_dict().items() if torch.equal(value, before[name])] == []
    codessm.save(tmp_path / "m.pt", objective)
    again, frozen = codessm.load(tmp_path / "m.pt"), objective.frozen()
    assert again.encoder.config == objective.encoder.config and again.labels == objective.labels
    assert all(ours is theirs for ours, theirs in zip(objective.parameters(), frozen.parameters(), strict=True))
    assert objective.training and not frozen.training and not again.training
    said = outputs_of(frozen, case)
    for other in (objective.eval(), again):
        assert all(map(np.array_equal, outputs_of(other, case), said))
    assert math.isfinite(objective.score(tasks.evaluate(objective, case.valid, case.split)[0]))


class Devices(TorchDispatchMode):
    """Notes the operations whose results are on a CPU."""

    def __init__(self):
        super().__init__()
        self.on_cpu = set()

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        results = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in results):
            self.on_cpu.add(str(operation))
        return result


@pytest.mark.parametrize("model, kind", [*((model, "mlm") for model in MODELS),
                                         *(("codessm-hybrid", kind) for kind in KINDS if kind != "mlm")])
def test_a_step_stays_on_its_device(model, kind, make_case, monkeypatch):
    """Nothing is made on the CPU and copied, nor read back: a CUDA graph could record neither."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())  # it does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)
    case = make_case(kind, d=64, model=model)
    objective = case.objective.to("meta").train()
    objective.encoder.chunk, objective.bag_of_words = 16, 1.0
    tensors = {name: tensor.to("meta") for name, tensor in objective.prepare(case.train[0]).items()}
    with Devices() as devices:
        objective(tensors)[0].backward()
    assert devices.on_cpu == set()


@pytest.mark.parametrize("model", MODELS)
def test_weights_rounded_once_are_those_rounded_each_time(model, monkeypatch):
    monkeypatch.setattr(tasks, "bf16", lambda device: True)
    objective, tensors = tasks.MLM(encoder(model), None).eval(), dict(ids=torch.randint(50, (3, 40)),
                                                                      lengths=torch.tensor([40, 17, 33]))
    frozen, weights = objective.frozen(), objective.state_dict()
    with torch.no_grad():
        ours, theirs = (tasks.compute(one, one.encoder, tensors) for one in (objective, frozen))
    linear = {f"{name}.weight" for name, part in objective.named_modules() if isinstance(part, torch.nn.Linear)}
    assert torch.equal(ours, theirs) and {value.dtype for value in weights.values()} == {torch.float32}
    rounded = {name for name, value in frozen.state_dict().items() if value.dtype == torch.bfloat16}
    assert rounded == linear - {"dense.weight"} == {
        name for name, value in frozen.state_dict().items() if value.data_ptr() != weights[name].data_ptr()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["codessm", "codessm-8k", "codessm-hf", "codessm-hybrid"])
def test_a_frozen_copy_makes_kernels_once_a_length(model, device, monkeypatch):
    """The next copy, whose weights may be others, makes its own; a GPU records with them."""
    objective, made, original = tasks.MLM(encoder(model), None).to(device).eval(), [], codessm.make_kernels
    monkeypatch.setattr(codessm, "make_kernels", lambda *args: made.append(args) or original(*args))
    batches = [{"ids": torch.randint(50, (3, L))} for L in (40, 24, 40, 40, 24, 40)]
    with torch.no_grad():
        for _ in range(2):
            frozen = objective.frozen()
            run = tasks.Recorder(frozen, partial(tasks.compute, frozen, frozen.encoder))
            found = list(map(run, batches))
            assert len(made) == 2 and len(run.recorded) == (device == "cuda") and objective.encoder.kernel_cache is None
            for batch, ours in zip(batches, found):
                theirs = tasks.compute(objective, objective.encoder, batch)
                assert (ours - theirs).norm() <= (1e-2 if device == "cuda" else 0) * theirs.norm()
            disturb(objective)
            for parameter in objective.parameters():
                parameter.mul_(1.1)
            made.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("model", MODELS)
def test_its_steps_can_be_recorded(model, tokenizer):
    """On a GPU, compiled: of two lengths both are, and the loss of what is learned by heart falls."""
    rng = np.random.default_rng(0)
    batches = [data.Batch(rng.integers(4, tokenizer.vocab, (8, L)).astype(np.int32), np.full(8, L - 3, np.int32),
                          np.arange(8)[:, None]) for L in (24, 40)]
    task = tasks.MLM(Encoder(tokenizer.vocab, d=64, layers=4, model=model, ctx=40), tokenizer).cuda()
    assert tasks.compile_objective(task, True)
    stepper = tasks.Stepper(task, tasks.adamw(task, 3e-3))
    losses = [float(sums[0] / sums[2]) for sums in (stepper(batches[step % 2]) for step in range(40))]
    assert len(stepper.recorder.recorded) == 2 and sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_within_five_per_cent_of_190_million(model):
    with torch.device("meta"):
        made = tasks.MLM(Encoder(32100, **SIZES["base"], model=model, ctx=256), None)
    expected = {"codessm": (197.6e6, 197.8e6), "rocoder": (185.0e6, 185.2e6), "zamba": (184e6, 188e6)}
    low, high = expected.get(model, (0.95 * 190e6, 1.05 * 190e6))
    assert low < sum(p.numel() for p in made.parameters()) < high


@pytest.mark.parametrize("model, owner, function, dtypes", [
    ("codessm", codessm.Convolution, "apply", "bbbff"), ("zamba", codessm, "ssd", "bfbb")])
def test_under_autocast_decays_stay_in_float32(model, owner, function, dtypes, monkeypatch):
    """A of u, TO, E, A and P, and a of x, a, B and C; the rest is bfloat16, whatever the mask. Float32 comes out."""
    made, original, seen = encoder(model), getattr(owner, function), []

    def spy(*args):
        names = {torch.float32: "f", torch.bfloat16: "b"}
        seen.append("".join(names[arg.dtype] for arg in args if isinstance(arg, torch.Tensor)))
        return original(*args)

    monkeypatch.setattr(owner, function, spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = made(torch.randint(50, (2, 600)), torch.tensor([600, 4]))
    assert seen == [dtypes] * len(made.layers) and hidden.dtype == torch.float32


# ---- the compared models ----------------------------------------------------------------------------

def attention_reference(q, k, v, scale, causal=False):
    """softmax(q k^T scale) v of each head of 64; q, k and v (L, 64 heads)."""
    q, k, v = (x.reshape(len(x), -1, 64).swapaxes(0, 1) for x in (q, k, v))
    scores = np.exp(q @ k.swapaxes(1, 2) * scale)
    scores = np.tril(scores) if causal else scores
    return (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


def rotated_reference(x):
    """x (L, 64 heads), each pair (x_e, x_(e + 32)) of a head as a complex number that is turned."""
    i, x = np.arange(len(x))[:, None, None], x.reshape(len(x), -1, 2, 32)
    turned = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * i * 10_000 ** (-np.arange(32) / 32))
    return np.stack([turned.real, turned.imag], 2).reshape(len(x), -1)


@pytest.mark.parametrize("rotary", [False, True])
def test_a_transformer_layer_equals_its_equations(rotary):
    """Devlin et al. 2019 and Vaswani et al. 2017, section 3; rotary, Su et al. 2021, equations 14 and 34."""
    layer, Xi, found = TransformerLayer(128, rotary=rotary), torch.randn(1, 19, 128), []
    disturb(layer)
    x, p = Xi[0].double().numpy(), numbers(layer)
    q, k, v = np.split(affine(p, "qkv", x), 3, 1)
    Y = attention_reference(*map(rotated_reference, (q, k)) if rotary else (q, k), v, 1 / 8)
    x = layer_norm_reference(x + affine(p, "out", Y)) * p["norm1.weight"] + p["norm1.bias"]
    x = layer_norm_reference(x + affine(p, "down", gelu_reference(affine(p, "up", x))))
    for layer.plain in (False, True):
        found.append(layer(Xi, codessm.rotation(Xi) if rotary else None))
        assert relative_error(found[-1][0], x * p["norm2.weight"] + p["norm2.bias"]) < 1e-5
    assert not torch.equal(*found)  # they are two ways


@pytest.mark.parametrize("window", [3, 6, 7, 8, 22, 23, 256])
def test_the_hybrids_attention_layer_equals_its_equations(window, monkeypatch):
    """Pre-norm, without positions, over the tokens of a window; the padding of rows and chunks takes no part."""
    def attention(*args, attn_mask, original=torch.nn.functional.scaled_dot_product_attention):
        assert attn_mask.any(-1).all()  # as kernels may need it
        return original(*args, attn_mask=attn_mask)

    made = encoder("codessm-hybrid", layers=12)
    assert [type(layer).__name__ for layer in made.layers] == [*["BiGSLayer"] * 6, "AttentionLayer", *["BiGSLayer"] * 5]
    layer, n, c, lengths = made.layers[6], 3, 8, (24, 5, 1)
    assert layer.scale.shape == (1, 1, 1) and layer.scale.item() * np.log(128) == pytest.approx(1)
    disturb(layer)
    monkeypatch.setattr(codessm.AttentionLayer, "WINDOW", window)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    X, R, p = torch.randn(3, 24, 64), torch.randn(3, 24, 64), numbers(layer)
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None])[..., None]
    ours = layer(*(codessm.in_chunks(part, (n, c)) for part in (X, R)), None, codessm.in_chunks(mask, (n, c)))
    ours = codessm.from_chunks(sum(ours))
    for row, L in enumerate(lengths):
        x = (X + R)[row, :L].double().numpy()
        q, k, v = np.split(affine(p, "qkv", layer_norm_reference(x) * p["norm1.weight"] + p["norm1.bias"]), 3, 1)
        scale = p["scale"].item() * np.log(min(L, 2 * window + 1)) / 8
        y = [attention_reference(q[i:i + 1], *(part[max(0, i - window):i + window + 1] for part in (k, v)), scale)
             for i in range(L)]
        x = x + affine(p, "out", np.concatenate(y))
        inner = affine(p, "up", layer_norm_reference(x) * p["norm2.weight"] + p["norm2.bias"])
        assert relative_error(ours[row, :L], x + affine(p, "down", gelu_reference(inner))) < 1e-5
    assert ours.isfinite().all()


@pytest.mark.parametrize("L", [600, 900])
def test_the_hybrids_attention_reads_256_tokens_to_either_side(L):
    X = torch.randn(1, L, 128, requires_grad=True)
    codessm.AttentionLayer(128).attend(X, None, None)[0, 300].sum().backward()
    assert X.grad[0].any(1).nonzero().flatten().tolist() == list(range(44, 557))


def test_rotations_are_right_far_out():
    """To 1e-6 up to position 40,000, which angles in float32 do not keep; what is rotated too."""
    x = torch.randn(1, 1, 40_001, 64)
    rotation, angles = codessm.rotation(x[0]), np.arange(40_001)[:, None] * 10_000 ** (-np.arange(32) / 32)
    assert rotation.dtype == torch.float32
    assert np.abs(rotation.numpy() - [np.cos(angles), np.sin(angles)]).max() < 1e-6
    assert np.abs(np.cos(angles.astype(np.float32)) - np.cos(angles)).max() > 1e-4
    assert relative_error(codessm.rotate(x, rotation)[0, 0], rotated_reference(x[0, 0].double().numpy())) < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_learned_positions_are_added_before_the_norm_and_bound_the_length(model):
    made, ids, bound = encoder(model, layers=2, ctx=24), torch.randint(50, (1, 25)), MODELS[model].positions
    p = numbers(made)
    embedded = layer_norm_reference(p["embedding.weight"][ids[0, :24]] + (p["positions.weight"] if bound else 0))
    assert relative_error(made.embed(ids[:, :24])[0], embedded) < 1e-5 and made.config["ctx"] == (24 if bound else None)
    assert made(ids[:, :24]).shape == (1, 24, 64) and (bound or made(ids).shape == (1, 25, 64))
    if bound:
        with pytest.raises(data.Problem, match=f"{model} .*24 tokens"):
            made(ids)
        with pytest.raises(ValueError, match=f"{model} has learned positions"):
            Encoder(50, d=64, layers=2, model=model)


def ssd_reference(x, a, B, C):
    """y (L, H, P) by the recurrence, a state at a time."""
    h, y = np.zeros((x.shape[1], B.shape[1], x.shape[2])), []
    for x_t, a_t, B_t, C_t in zip(x, a, B, C):
        h = np.exp(a_t)[:, None, None] * h + B_t[None, :, None] * x_t[:, None]
        y.append(np.einsum("hnp,n->hp", h, C_t))
    return np.array(y)


@pytest.mark.parametrize("L", [1, 7, 64, 300])
def test_the_chunked_form_equals_the_recurrence_and_has_its_gradients(L, monkeypatch):
    monkeypatch.setattr(codessm, "GROUP", 2)
    x, B, C = torch.randn(1, L, 2, 5), torch.randn(1, L, 3), torch.randn(1, L, 3)
    a = -torch.rand(1, L, 2) * torch.tensor([0.02, 1.5])  # one head forgets slowly
    expected = ssd_reference(*(t[0].double().numpy() for t in (x, a, B, C)))
    for c in (16, 64, 512):
        assert relative_error(codessm.ssd(x, a, B, C, c)[0], expected) < 1e-5, c
    low = codessm.ssd(*(t.bfloat16() if t is not a else t for t in (x, a, B, C)), 16)[0]
    assert relative_error(low, expected) < 2e-2
    inputs = [t[:, :8].double().requires_grad_() for t in (x, a, B, C)]
    assert torch.autograd.gradcheck(lambda *t: codessm.ssd(*t, 2), inputs)


def rms_norm_reference(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * weight


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
    u = silu(short_convolution_reference(u, p, "convolution"))
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    heads = u[:, :2 * d].reshape(len(u), -1, 64)
    y = ssd_reference(heads * dt[..., None], -np.exp(p["A_log"]) * dt, u[:, 2 * d:2 * d + 8], u[:, 2 * d + 8:])
    y = (y + p["D"][:, None] * heads).reshape(len(u), -1)
    return x + affine(p, "out", rms_norm_reference(y * silu(z), p["gated_norm.weight"]))


def test_zamba_equals_its_equations_step_by_step():
    """Fourteen layers, of which the third, sixth, ninth and twelfth call two shared blocks in turn; two chunks."""
    made, ids = encoder("zamba", layers=12), torch.randint(50, (1, 90))
    for module in (*made.layers, *made.shared):
        disturb(module)
    blocks, p = [numbers(block) for block in made.shared], numbers(made)
    embedding = x = layer_norm_reference(p["embedding.weight"][ids[0]])
    for i, layer in enumerate(made.layers, 1):
        block = {3: 0, 6: 1, 9: 0, 12: 1}.get(i)
        x = zamba_reference(x, numbers(layer), None if block is None else (embedding, blocks[block]))
    assert len(made.layers) == 14 and len(blocks) == 2
    assert relative_error(made(ids)[0] - made.embed(ids)[0], x - embedding) < 1e-5
