"""8 and 4 bits: the grids, their errors, the packed form, the fast products, and checkpoints that are quantised or become so."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import convert
from bench.quality import divergence, expected_error, own_answers
from chat import Chat
from hardware import packed
from hardware.packed import few_rows_on_a_gpu
from llava import Llava
from weights import checkpoint, quantize
from weights.config import LlavaConfig
from weights.load import outline
from weights.memory import weight_bytes
from weights.quantize import GROUPS, QuantizedLinear, dequantize, pack, quantize_int4, quantize_int8, unpack

SCHEMES = [*GROUPS]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def row_product(layer):
    """The product of a row with a layer's packed weights, as it is written for a GPU's compiler."""
    return layer.layout.products.row


def layer(scheme, N=192, K=256, seed=0, bias=None):
    weight = random(N, K, seed=seed) * 0.02
    return weight, QuantizedLinear.of(weight, scheme, bias)


# The grids


def test_int8_is_the_nearest_of_255_steps_on_either_side_of_0():
    weight = torch.tensor([[-1.27, 0.5, 0.0049, 0.0], [0.0, 2.54, -0.029, -2.54], [0.0, 0.0, 0.0, 0.0]])
    q, scales = quantize_int8(weight)
    torch.testing.assert_close(scales[:2].float(), torch.tensor([0.01, 0.02]), rtol=2**-8, atol=0)
    assert q.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert q.tolist() == [[-127, 50, 0, 0], [0, 127, -1, -127], [0, 0, 0, 0]]
    assert torch.equal(dequantize(q, scales, torch.float32)[2], torch.zeros(4))


def test_int4_uses_all_16_steps_in_each_group():
    weight = torch.cat([torch.arange(32.0) / 31 * 15, torch.arange(32.0) / 31 * 30 - 60, torch.full((32,), 3.0)])[None]
    q, scales = quantize_int4(weight, 32)
    assert scales.shape == (3, 1, 2) and scales[:, 0].tolist()[:2] == [[1, 8], [2, -44]] and scales[2, 0, 1] == 3
    first = [int(n / 31 * 15 + 0.5) for n in range(32)]
    assert q[0, :32].tolist() == first and q[0, 32:64].tolist() == first
    shifted = dequantize(pack(q.repeat(2, 1), 2), scales.repeat(1, 2, 1), torch.float32)
    assert torch.equal(shifted[0, 64:], torch.full((32,), 3.0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_errs_by_half_a_step_at_most_and_by_a_twelfth_of_its_square_in_the_mean(scheme):
    weight, quantized = layer(scheme, 128, 1024)
    error = (dequantize(quantized.weight, quantized.scales, torch.float32) - weight).abs()
    if scheme == "int8":
        steps = quantized.scales.float()[:, None].expand_as(weight)
    else:
        steps = quantized.scales[..., 0].float().T.repeat_interleave(GROUPS[scheme], 1)
    assert (error / steps).max() < 0.5 + 8 * 2**-8  # the ends of a grid lie off by the rounding of its scale and its zero
    assert (error / steps).pow(2).mean().sqrt() == pytest.approx(12**-0.5, rel=0.03)
    assert error.norm() / weight.norm() == pytest.approx(expected_error(scheme, 1024), rel=0.03)


def test_a_damaged_weight_does_not_become_a_good_one():
    for scheme in SCHEMES:
        for value in (torch.nan, torch.inf):
            weight = random(64, 128)
            weight[3, 5] = value
            quantized = QuantizedLinear.of(weight, scheme)
            assert not quantized(random(1, 128)).isfinite().all() and not quantized(random(50, 128)).isfinite().all()


@pytest.mark.parametrize("rows", [2, 32, 64])
def test_packing_and_back(rows):
    q = torch.randint(0, 16, (128, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(q, rows)
    assert packed.shape == (128 // rows, 96, rows // 2) and packed.is_contiguous() and torch.equal(unpack(packed), q)
    assert packed[0, 5, 0] == q[0, 5] + 16 * q[rows // 2, 5]


# The products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_way_to_multiply_gives_the_product_with_the_unpacked_weight(scheme, rows, dtype):
    bias = random(192, seed=3)
    weight, quantized = layer(scheme, bias=bias.to(dtype))
    x = random(1, rows, 256, seed=1).to(dtype)
    plain = dequantize(quantized.weight, quantized.scales, torch.float32)
    expected = F.linear(x.float(), plain, bias)
    y = quantized(x)
    assert y.dtype == dtype and y.shape == expected.shape
    assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()
    exact = torch.stack([row_product(quantized)(row, quantized.weight, quantized.scales) for row in x[0]])
    torch.testing.assert_close(exact + bias, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheme, name", [("int8", "_weight_int8pack_mm"), ("int4", "_weight_int4pack_mm_for_cpu"), ("int4-32", "_weight_int4pack_mm_for_cpu")]
)
def test_few_rows_go_to_pytorchs_kernels_and_many_do_not(scheme, name, monkeypatch):
    if scheme != "int8" and packed.rows_of_the_kernel(pack) == 2:
        pytest.skip("PyTorch packs 4 bits otherwise on this CPU")
    calls, kernel = [], getattr(torch.ops.aten, name)
    monkeypatch.setattr(torch.ops.aten, name, lambda *args: calls.append(len(args[0])) or kernel(*args))
    _, quantized = layer(scheme)
    for rows in (1, 8, 33):
        quantized(random(rows, 256))
    assert calls == [1, 8]


@pytest.mark.parametrize("N, K, scheme", [(7, 40, "int8"), (5, 7, "int8"), (30, 64, "int4"), (96, 32, "int4-32")])
@pytest.mark.parametrize("rows", [1, 5])
def test_sizes_that_the_kernels_cannot_do(N, K, scheme, rows):
    _, quantized = layer(scheme, N, K)
    x = random(rows, K)
    expected = x @ dequantize(quantized.weight, quantized.scales, torch.float32).T
    assert (quantized(x) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_parts_of_a_large_layer_make_the_whole(scheme):
    weight, quantized = layer(scheme, 2 * quantize.TOGETHER + 128, 64)
    whole = dequantize(quantized.weight, quantized.scales, torch.float32)
    assert (whole - weight).abs().max() < 0.01
    torch.testing.assert_close(quantized(random(40, 64)), random(40, 64) @ whole.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gradient_is_that_of_the_plain_layer_and_keeps_packed_weights_only(scheme, rows, dtype):
    bias, kept = random(640, seed=3).to(dtype), []
    _, quantized = layer(scheme, 640, 256, bias=bias)
    plain = nn.Linear(256, 640).requires_grad_(False).to(dtype)
    plain.weight.data, plain.bias.data = dequantize(quantized.weight, quantized.scales, dtype), bias
    results = []
    for module in (plain, quantized):
        x = random(2, rows, 256, seed=1).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            y = module(x)
        (y * random(*y.shape, seed=2).to(dtype)).sum().backward()
        results.append((y.detach(), x.grad))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=(1e-5 if dtype == torch.float32 else 0.01) * float(expected.abs().max()))
    packed = {tensor.data_ptr() for tensor in (quantized.weight, quantized.scales)}
    layers = [tensor for tensor in kept if tensor.numel() >= 640 * 256 / 2 or tensor.data_ptr() in packed]
    assert [tensor.data_ptr() for tensor in layers[-2:]] == [quantized.weight.data_ptr(), quantized.scales.data_ptr()]
    assert len(layers) == 3 and layers[0].data_ptr() == plain.weight.data_ptr()  # the plain layer's own, and no unpacked one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_old_gpus_compiler_is_handed_no_bfloat16(scheme, dtype, monkeypatch):
    """Inductor skips what has an input in bfloat16 below compute capability 8: neither scales nor x may be such."""
    handed = []

    def compiled(product, device):
        def row(x, weight, scales):
            handed.extend((x.dtype, scales.dtype))
            return product(x, weight, scales)

        return row

    weight, quantized = layer(scheme)
    product = row_product(quantized)
    x = random(3, 256, seed=1).to(dtype)
    expected = torch.stack([product(row, quantized.weight, quantized.scales) for row in x])
    monkeypatch.setattr(packed, "compiled", compiled)
    assert torch.equal(few_rows_on_a_gpu(product, x, quantized.weight, quantized.scales), expected)
    assert handed == [dtype, torch.bfloat16] * 3  # a newer one takes both as they are
    handed.clear()
    for module in (packed, quantize):
        monkeypatch.setattr(module, "lacks_bfloat16", lambda device: True)
    quantized.settle()
    y = few_rows_on_a_gpu(product, x, quantized.weight, quantized.scales)
    assert len(handed) == 6 and torch.bfloat16 not in handed
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "device, capability, lacks", [("cuda", (7, 5), True), ("cuda:1", (8, 0), False), ("cuda", (9, 0), False), ("cpu", None, False)]
)
def test_which_gpus_lack_bfloat16(device, capability, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    packed.lacks_bfloat16.cache_clear()
    assert packed.lacks_bfloat16(torch.device(device)) == lacks
    packed.lacks_bfloat16.cache_clear()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_row_product_is_one_graph(scheme):
    _, quantized = layer(scheme)
    x = random(256, seed=1)
    product = torch.compile(row_product(quantized), fullgraph=True, dynamic=False, backend="aot_eager")
    expected = row_product(quantized)(x, quantized.weight, quantized.scales)
    torch.testing.assert_close(product(x, quantized.weight, quantized.scales), expected)


# Models


def load(scheme, dtype=torch.float32, folder="tiny/llava"):
    return Llava.from_pretrained(folder, dtype=dtype, quantize=scheme)


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_language_model_is_quantised_and_nothing_else(scheme, bundled):
    plain, model = linears(bundled.model), linears(load(scheme))
    assert plain.keys() == model.keys()
    for name, module in model.items():
        assert isinstance(module, QuantizedLinear) == name.startswith("language_model."), name
        if isinstance(module, QuantizedLinear):
            four = scheme == "int4" and not name.endswith("lm_head")
            assert module.weight.dtype == (torch.uint8 if four else torch.int8)
            error = dequantize(module.weight, module.scales, torch.float32) - plain[name].weight
            assert error.norm() / plain[name].weight.norm() < (0.12 if four else 0.02)
    for name, parameter in load(scheme, None).named_parameters():
        assert parameter.dtype == torch.float16, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_stays_and_the_divergence_grows_as_bits_fall(dtype, bundled):
    chats = {scheme: Chat(load(scheme, dtype), bundled.tokenizer, bundled.processor) for scheme in ("int8", "int4-32", "int4")}
    batches = own_answers(bundled, count=12)
    divergences = {scheme: divergence(batches, chat)[0] for scheme, chat in chats.items()}
    assert 0 < 3 * divergences["int8"] < min(divergences["int4-32"], divergences["int4"]) < 0.05


def test_a_compiled_step_gives_the_same_tokens():
    model = load("int4", torch.bfloat16)  # its head is in 8 bits
    ids = torch.arange(3, 20)[None]
    expected = torch.stack([*model.generate(ids, max_new_tokens=8, eos_ids=())])
    model.decode_step = torch.compile(model.decode_step, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(torch.stack([*model.generate(ids, max_new_tokens=8, eos_ids=())]), expected)


def test_a_tied_head_has_8_bits_and_its_embeddings_keep_theirs(tmp_path):
    folder = shutil.copytree("tiny/llava", tmp_path / "tied")
    say(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    run([str(folder), str(tmp_path / "written"), "--quantize", "int4"])
    model, again = (load(scheme, folder=f).language_model for scheme, f in (("int4", folder), (None, tmp_path / "written")))
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    weight = model.embed_tokens.weight
    assert weight.dtype == torch.float32 and model.lm_head.weight.dtype == torch.int8
    assert (dequantize(model.lm_head.weight, model.lm_head.scales, torch.float32) - weight).norm() < 0.02 * weight.norm()


def test_the_memory_of_loading_is_the_quantised_model_and_little_more(monkeypatch):
    """No weight is kept beside what was made of it: when the next one is read, the one before is gone."""
    import weakref

    alive, read = [], checkpoint.Stored.read
    most = []

    def watched(self, device="cpu"):
        most.append(sum(ref() is not None for ref in alive))
        tensor = read(self, device)
        if self.name.endswith("_proj.weight") and "language_model" in self.name:
            alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(checkpoint.Stored, "read", watched)
    load("int4", None)
    assert len(alive) == 28 and max(most) <= 1


# Checkpoints


@pytest.fixture(scope="module", params=["int8", "int4"])
def written(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantised") / "model"
    run(["tiny/llava", str(out), "--quantize", request.param])
    return request.param, out


def run(arguments):
    argv, sys.argv = sys.argv, ["convert.py", *arguments]
    try:
        convert.main()
    finally:
        sys.argv = argv


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[1], tmp_path / "copy")


def test_a_written_checkpoint_is_the_model_that_was_quantised_while_loading(written):
    scheme, folder = written
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["quantized.safetensors"]
    stored, loaded = load(scheme, None).state_dict(), Llava.from_pretrained(folder).state_dict()
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
    counted = weight_bytes(outline(Llava, LlavaConfig.from_pretrained(folder), scheme), torch.float16)  # as sample.py says it
    assert counted < (folder / "quantized.safetensors").stat().st_size < 1.01 * counted + 20_000  # its header
    dtypes = {parameter.dtype for parameter in Llava.from_pretrained(folder, dtype=torch.bfloat16).parameters()}
    assert dtypes == {torch.bfloat16}


def test_nothing_else_loads_it(written):
    _, folder = written
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("misplaced", range(1, 16, 5))
def test_mapped_memory_that_begins_anywhere_is_fit_for_the_kernel(misplaced):
    """PyTorch's kernel for 8 bits ends the process on a weight that does not begin at a multiple of 16 bytes."""
    memory = torch.zeros(64 * 128 + 64, dtype=torch.int8)
    start = -memory.data_ptr() % 64 + misplaced
    q, scales = quantize_int8(random(64, 128))
    weight = memory[start : start + q.numel()].view_as(q).copy_(q)
    quantized = QuantizedLinear(weight, scales)
    quantized.settle()
    assert quantized.weight.data_ptr() % 16 == 0 and torch.equal(quantized.weight, q)


def edit(folder, change):
    tensors = load_file(folder / "quantized.safetensors")
    change(tensors)
    save_file(tensors, folder / "quantized.safetensors")


def say(folder, **fields):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))


SCALES = "language_model.model.layers.0.mlp.up_proj.scales"
BROKEN = [
    (lambda folder: edit(folder, lambda t: t.pop(SCALES)), ["1 missing", "up_proj.scales"]),
    (lambda folder: edit(folder, lambda t: t.update({SCALES: t[SCALES][:1]})), ["1 of a wrong shape", SCALES]),
    (lambda folder: edit(folder, lambda t: t.update({SCALES: t[SCALES].float()})), ["not quantised as", SCALES, "F32", "bfloat16"]),
    (lambda folder: say(folder, quantization_config={"quant_method": "llava.py", "scheme": "int4-32"}), ["wrong shape"]),
    (lambda folder: say(folder, quantization_config={"quant_method": "llava.py", "scheme": "int3"}), ["int3", "int8, int4"]),
    (lambda folder: say(folder, quantization_config={"quant_method": "gptq", "bits": 4}), ["quantization_config", "gptq", "--quantize"]),
    (lambda folder: say(folder, quantization_config=None), ["no model.safetensors"]),
    (lambda folder: os.remove(folder / "quantized.safetensors"), ["no quantized.safetensors"]),
]


@pytest.mark.parametrize("damage, words", BROKEN, ids=[" ".join(words) for _, words in BROKEN])
def test_a_broken_quantised_checkpoint(folder, damage, words):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Llava.from_pretrained(folder)
    assert all(word in str(error.value) for word in words), error.value


def test_what_is_quantised_is_not_quantised_again_nor_trained(written):
    scheme, folder = written
    with pytest.raises(ValueError, match=f"quantised already, to {scheme}"):
        Llava.from_pretrained(folder, quantize="int8")
    command = ["train.py", "--stage", "1", "--model", folder, "--data", "x", "--images", "x", "--out", "x", "--device", "cpu"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stderr.startswith("train.py: ") and "quantised" in done.stderr


def test_schemes_that_there_are_not_and_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="'int2' is no scheme.*int8, int4"):
        load("int2")
    with pytest.raises(ValueError, match="groups of 128.*192 inputs and 192 outputs"):
        load("int4-128")
    with pytest.raises(ValueError, match="outputs in pairs.*7 outputs"):
        QuantizedLinear.of(torch.zeros(7, 64), "int4")


@pytest.mark.parametrize("arguments, words", [(["absent", "new"], "absent"), (["tiny/llava", "tiny"], "tiny exists")])
def test_a_mistake_is_one_line(arguments, words):
    done = subprocess.run([sys.executable, "convert.py", *arguments, "--quantize", "int8"], capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stderr.startswith("convert.py: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_a_disk_that_is_full_is_one_line_and_leaves_no_checkpoint(monkeypatch, tmp_path):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SystemExit, match=r"^convert.py: .*quantized.safetensors could not be written \(.*No space left"):
        run(["tiny/llava", str(tmp_path / "new"), "--quantize", "int8"])
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    run(["tiny/llava", str(tmp_path / "new"), "--quantize", "int8"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not list((tmp_path / "new").glob("*.partial"))


@pytest.mark.parametrize(
    "command, words",
    [
        ("sample.py --model FOLDER --quantize int8", "is quantised already, to"),
        ("sample.py --quantize int4-128", "groups of 128"),
        ("sample.py --quantize int3", "'int3'"),
        ("sample.py --quantize int8 --adapter FOLDER", "has no adapter_config.json"),
        ("convert.py FOLDER FOLDER/new --quantize int8", "is quantised already, to"),
        ("convert.py tiny/llava FOLDER/new --quantize int4-128", "groups of 128"),
        ("lessons.page --model FOLDER", "the page holds 16-bit weights"),
        ("bench.quality --model FOLDER", "is quantised already"),
        ("bench.quality --model nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_what_cannot_be_quantised_or_is_already_is_one_line(command, words, written, monkeypatch, capsys):
    program, *arguments = command.replace("FOLDER", str(written[1])).split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program.removesuffix(".py")).main()
    error = f"{stop.value}\n{capsys.readouterr().err}"
    assert words in error and "Traceback" not in error and not (written[1] / "new").exists()
