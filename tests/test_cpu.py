"""What a CPU does faster: each product of one row beside float64, attention of one query, and models with and without numba."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from hardware import cpu
from hardware.cpu import (
    SixteenBitLinear,
    attention_in_two_products,
    attention_of_one,
    row_times_4_bits,
    row_times_8_bits,
    row_times_16_bits,
)
from hardware.device import choose_dtype, cpu_words, is_amd, multiplies_bfloat16
from llama import KVCache, attention
from llava import Llava
from tests.compare import FAMILIES, FIXTURES, load
from tests.test_generate import generated, prompt
from weights import load as loading
from weights.quantize import GROUPS, QuantizedLinear, dequantize, pack, quantize_int4

NUMBA = pytest.mark.skipif(not cpu.has_kernels(), reason="the kernels need numba and a CPU with AVX2")
ODD = [(1, 1), (2, 5), (7, 40), (129, 333), (64, 2049)]  # rows and columns that no width of a vector divides


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def numba(monkeypatch):
    """As if the tiny models were large, so that they get the kernels."""
    if not cpu.has_kernels():
        pytest.skip("the kernels need numba and a CPU with AVX2")
    monkeypatch.setattr(loading, "SMALL", 0)


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setattr(loading, "SMALL", 0)
    monkeypatch.setattr(cpu, "has_kernels", lambda: False)
    monkeypatch.setattr(loading, "is_amd", lambda: True)


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def test_numba_takes_as_many_threads_as_pytorch():
    pytest.importorskip("numba")
    code = "import torch; torch.set_num_threads(1); from hardware import cpu; cpu.kernels(); import numba; "
    code += "print(torch.get_num_threads(), numba.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "1"], done.stderr


# One row


@NUMBA
@pytest.mark.parametrize("N, K", ODD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_times_16_bits_is_that_of_float64(N, K, dtype, threads):
    weight, x = random(N, K).to(dtype), random(1, K, seed=1)
    expected = x.double() @ weight.double().T
    y = row_times_16_bits(x, weight)
    assert y.shape == (1, N) and y.dtype == torch.float32
    assert (y - expected).abs().max() < 1e-6 * K**0.5 * expected.abs().max()


@NUMBA
@pytest.mark.parametrize("N, K", ODD)
def test_a_row_times_8_bits_is_that_of_float64(N, K, threads):
    q = torch.randint(-127, 128, (N, K), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales, x = random(N, seed=1).bfloat16(), random(1, K, seed=2)
    expected = x.double() @ q.double().T * scales.double()
    assert (row_times_8_bits(x, q, scales) - expected).abs().max() < 1e-6 * K**0.5 * expected.abs().max()


@NUMBA
@pytest.mark.parametrize("N, K", [(64, 128), (192, 384), (320, 1152)])
@pytest.mark.parametrize("scheme", ["int4", "int4-32", "int4-128"])
@pytest.mark.parametrize("rows", [32, 64])  # packed together: for AVX2 and for AVX-512
def test_a_row_times_4_bits_is_that_of_float64(N, K, scheme, rows, threads):
    group = GROUPS[scheme]
    x, weight = random(1, K, seed=2) * (1 + torch.arange(K) % 7), random(N, K)
    q, scales = quantize_int4(weight, group)
    packed = pack(q, rows)
    expected = x.double() @ dequantize(packed, scales, torch.float64).T
    steps = x.view(-1, group).abs().amax(1) / 32767  # x is rounded to a multiple of its group's step, so it errs by half of that
    at_most = (scales[..., 0].double().T * q.view(N, -1, group).sum(2) * steps / 2).sum(1)
    assert ((row_times_4_bits(x, packed, scales) - expected).abs() < at_most + 1e-6 * expected.abs().max()).all()
    assert row_times_4_bits(x * 0, packed, scales).abs().max() == 0
    assert row_times_4_bits(x.bfloat16(), packed, scales).dtype == torch.bfloat16


@NUMBA
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value):
    for dtype in (torch.bfloat16, torch.float16):
        weight, x = random(5, 9).to(dtype), random(1, 9, seed=1).abs()
        weight[3, 7] = value
        y = row_times_16_bits(x, weight)
        torch.testing.assert_close(y, x @ weight.float().T, equal_nan=True)
    layer, x = QuantizedLinear.of(random(4, 64), "int8"), random(1, 64, seed=1)
    x[0, 5] = value
    assert not row_times_8_bits(x, layer.weight, layer.scales).isfinite().any()
    q, scales = quantize_int4(random(64, 64), 32)
    assert not row_times_4_bits(x, pack(q, 32), scales).isfinite().any()


@NUMBA
@pytest.mark.parametrize("misplaced", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_memory_may_begin_anywhere(misplaced, dtype, tmp_path):
    """As that of a file that is mapped does."""
    weight = (random(7, 24) * 30).to(dtype)
    size = weight.nbytes
    (tmp_path / "weights").write_bytes(bytes(64 + misplaced) + bytes(weight.view(torch.uint8).flatten().tolist()))
    mapped = torch.from_file(str(tmp_path / "weights"), size=64 + misplaced + size, dtype=torch.uint8)[64 + misplaced :]
    same = torch.frombuffer(mapped.numpy(), dtype=dtype).view(7, 24)
    assert same.data_ptr() % 16 == misplaced % 16 and torch.equal(same, weight)
    x = random(1, 24, seed=1)
    y = row_times_8_bits(x, same, torch.ones(7)) if dtype == torch.int8 else row_times_16_bits(x, same)
    torch.testing.assert_close(y, x @ weight.float().T)


@NUMBA
@pytest.mark.parametrize("misplaced", [4, 12])
def test_packed_memory_may_begin_anywhere(misplaced):
    q, scales = quantize_int4(random(64, 128), 64)
    packed, x = pack(q, 32), random(1, 128, seed=1)
    places = [torch.zeros(tensor.nbytes + misplaced, dtype=torch.uint8) for tensor in (packed, scales)]
    moved = [place[misplaced:].view(tensor.dtype).view(tensor.shape).copy_(tensor) for place, tensor in zip(places, (packed, scales))]
    assert torch.equal(row_times_4_bits(x, *moved), row_times_4_bits(x, packed, scales))


@NUMBA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, H, K, S, E", [(1, 4, 4, 1, 8), (3, 4, 2, 37, 24), (2, 6, 2, 300, 64)])
def test_attention_of_one_query_is_that_of_float64(dtype, B, H, K, S, E, threads):
    q, k, v = random(B, H, 1, E), random(B, K, S + 9, E, seed=1).to(dtype)[:, :, :S], random(B, K, S + 9, E, seed=2).to(dtype)[:, :, :S]
    mask = torch.zeros(B, 1, 1, S)
    mask[-1, ..., : S // 3] = -torch.inf
    expected = attention(q.double(), k.double(), v.double(), mask.double())
    assert (attention_of_one(q, k, v, mask) - expected).abs().max() < 2e-6
    separate = k.transpose(1, 2).contiguous().transpose(1, 2)  # as without a cache: a slot's heads lie together
    assert (attention_of_one(q, separate, v, mask) - expected).abs().max() < 2e-6
    assert (attention_in_two_products(q.to(dtype), k, v, mask).float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


# The layer


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@NUMBA
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2,), (2, 11), (64,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_in_float32_are_the_float32_layer(rows, dtype):
    weight, bias, x = random(2 * cpu.PART + 3, 37).to(dtype), random(2 * cpu.PART + 3, seed=1), random(*rows, 37, seed=2)
    layer = SixteenBitLinear(linear(weight, bias), row_times_16_bits)
    torch.testing.assert_close(layer(x), F.linear(x, weight.float(), bias), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, weight.float().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


class Watch(TorchFunctionMode):
    """Notes of each product whether oneDNN may be used for it, and its number of rows and type."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.products.append((torch.backends.mkldnn.enabled, args[0].shape[:-1].numel(), args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 512, 577])
def test_bfloat16_without_numba(native, rows, monkeypatch):
    """One row without oneDNN; many rows filled up to what it multiplies fast, or in float32 where the CPU cannot multiply bfloat16."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    weight, bias, x = random(48, 64).bfloat16(), random(48, seed=1).bfloat16(), random(1, rows, 64, seed=2).bfloat16()
    layer = SixteenBitLinear(linear(weight, bias), cpu.row_by_pytorch)
    with Watch() as watch:
        y = layer(x)
    filled = rows + -rows % 8 if rows >= 512 and native else rows
    assert watch.products == [(rows > 1, filled, torch.bfloat16 if native or rows == 1 else torch.float32)]
    assert torch.backends.mkldnn.enabled and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=0.02, atol=0.05)


# Models


def decode_both_ways(model, reference, rows):
    """The logits of one step with what is faster on a CPU and with the plain forms."""
    mask = reference["attention_mask"][:rows].bool()
    token, alive, logits = torch.arange(5, 5 + rows), torch.ones(rows, dtype=torch.bool), []
    suited = [block.self_attn.attend for block in model.language_model.layers]
    for attend in (suited, [attention] * len(suited)):
        cache = KVCache(model.config.text, rows, mask.shape[1] + 5, dtype=model.dtype)
        with torch.no_grad():
            model(inputs_embeds=model.language_model.embed(reference["input_ids"][:rows]), attention_mask=mask, cache=cache)
            for block, form in zip(model.language_model.layers, attend):
                block.self_attn.attend = form
            logits.append(model.decode_step(token, alive, cache))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", ["numba", "no_numba"])
def test_attention_of_one_in_a_model_computes_the_same(family, rows, way, request):
    request.getfixturevalue(way)
    model, reference = load(family, torch.bfloat16)
    fast, plain = decode_both_ways(model, reference, rows)
    assert 0 < (fast - plain).abs().max() < 0.02 * plain.abs().max()


def stored_as(dtype, family, folder):
    """A copy of a family's checkpoint with its weights in dtype."""
    for file in (FIXTURES / family).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapped", [True, False])
def test_16_bits_that_stay_16_bits_are_the_float32_model(family, dtype, mapped, tmp_path, numba, monkeypatch):
    folder, reference = stored_as(dtype, family, tmp_path), load(family)[1]
    model = Llava.from_pretrained(folder, dtype=torch.float32, mapped=mapped)
    with monkeypatch.context() as context:
        context.setattr(loading, "SMALL", 1e9)
        plain = Llava.from_pretrained(folder, dtype=torch.float32)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(type(layer) is SixteenBitLinear and layer.weight.dtype == dtype for layer in layers) and model.dtype == torch.float32
    assert all(layer.weight.dtype == torch.float32 for layer in plain.modules() if isinstance(layer, nn.Linear))
    inputs = {name: reference.get(name) for name in ("input_ids", "pixel_values", "attention_mask")}
    with torch.no_grad():
        logits, expected = model(**inputs).logits, plain(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (logits - expected)[real].abs().max() < 1e-5 * expected[real].abs().max()
    assert torch.equal(generated(model, prompt(reference), max_new_tokens=20), generated(plain, prompt(reference), max_new_tokens=20))


def test_without_numba_float32_is_float32(no_numba, tmp_path):
    model = Llava.from_pretrained(stored_as(torch.float16, "llava", tmp_path), dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    assert all(block.self_attn.attend is attention for block in model.language_model.layers)


def test_a_small_model_stays_as_it_is():
    model = Llava.from_pretrained("tiny/llava", dtype=torch.float32)
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_packing_without_a_kernel_has_none():
    q, _ = quantize_int4(random(64, 64), 64)
    assert [loading.one_quantized_row(pack(q, rows)) for rows in (2, 32, 64)] == [None, row_times_4_bits, row_times_4_bits]


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-32"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_quantised_layers_get_their_kernel(scheme, capability, numba, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with monkeypatch.context() as context:
        context.setattr(loading, "SMALL", 1e9)
        plain = Llava.from_pretrained("tiny/llava", dtype=torch.float32, quantize=scheme)
    model = Llava.from_pretrained("tiny/llava", dtype=torch.float32, quantize=scheme)
    block = model.language_model.layers[0]
    assert model.language_model.lm_head.one_row is row_times_8_bits
    assert block.mlp.up_proj.one_row is (row_times_8_bits if scheme == "int8" else row_times_4_bits)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            other = plain.get_submodule(name)
            expected = dequantize(other.weight, other.scales, torch.float32)
            assert torch.equal(dequantize(layer.weight, layer.scales, torch.float32), expected)
            for rows in (1, 5, 40):
                x = random(rows, layer.in_features)
                assert (layer(x) - x @ expected.T).abs().max() < 0.02 * (x @ expected.T).abs().max()


@pytest.mark.parametrize("way", ["numba", "no_numba"])
@pytest.mark.parametrize("dtype, scheme", [(torch.bfloat16, None), (torch.float32, None), (torch.float32, "int8"), (torch.float32, "int4")])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_compiled_step_gives_the_same_tokens(rows, way, dtype, scheme, request, monkeypatch):
    request.getfixturevalue(way)
    if scheme == "int4":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = Llava.from_pretrained("tiny/llava", dtype=dtype, quantize=scheme)
    ids = torch.arange(3, 20).repeat(rows, 1)
    expected = generated(model, dict(input_ids=ids), max_new_tokens=8, eos_ids=())
    model.decode_step = torch.compile(model.decode_step, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(generated(model, dict(input_ids=ids), max_new_tokens=8, eos_ids=()), expected)


# The choice


@pytest.mark.parametrize("capability, flags, expected", [
    ("AVX512", "avx2 avx512_bf16", torch.bfloat16),
    ("AVX512", "avx2 avx512f", torch.float32),
    ("AVX2", "avx2 avx512_bf16", torch.float32),
])  # fmt: skip
def test_the_type_follows_what_the_cpu_multiplies(capability, flags, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"flags : {flags}\n")
    for function in (cpu_words, multiplies_bfloat16):
        function.cache_clear()
    try:
        assert choose_dtype("cpu", 7e9) == expected and choose_dtype("cpu", 1e6) == torch.float32
    finally:
        for function in (cpu_words, multiplies_bfloat16):
            function.cache_clear()


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_without_numba_only_amd_gets_other_forms(vendor, no_numba, monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"vendor_id : {vendor}\n")
    cpu_words.cache_clear()
    amd = is_amd()
    monkeypatch.undo()
    cpu_words.cache_clear()
    assert amd == (vendor == "AuthenticAMD")
    monkeypatch.setattr(cpu, "has_kernels", lambda: False)
    monkeypatch.setattr(loading, "is_amd", lambda: amd)
    block = Llava.from_pretrained("tiny/llava", dtype=torch.bfloat16).language_model.layers[0]
    assert block.self_attn.q_proj.one_row is (cpu.row_by_pytorch if amd else F.linear)
    assert (block.self_attn.attend is attention) != amd


def test_on_a_cpu_with_avx2_alone():
    """Some of this file once more, in a process in which PyTorch uses no AVX-512."""
    code = "import sys, pytest; sys.exit(pytest.main(['-q', '-x', 'tests/test_cpu.py', '-k', 'of_float64 or quantised or without_numba']))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:]
