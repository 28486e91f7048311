"""The decode step: the same tokens in every form it can run in."""

import gc
import shutil
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import llama
from hardware import gpu, step
from hardware.step import compiled, one_behind
from llama import KVCache
from llava import Llava
from tests.compare import FAMILIES, FIXTURES, load
from tests.test_generate import generated, prompt
from weights.load import suit

ALL = dict(temperature=0.0, top_k=None, top_p=None)
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
AMPERE = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="flash attention needs a GPU of capability 8 or more",
)
SHARED = pytest.mark.skipif(torch.__version__ < "2.9", reason="before PyTorch 2.9, flash attention on a CPU cannot share key/value heads")


@pytest.mark.parametrize(
    "family, backend", [*((family, "aot_eager") for family in FAMILIES), pytest.param("bakllava", "inductor", marks=COMPILER)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, in its compiler
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # likewise, of 2.6
def test_compiled_gives_the_same_tokens(family, backend):
    """As one whole graph: a value read back from the device would break it."""
    model, reference = load(family)
    expected = generated(model, prompt(reference), max_new_tokens=40)
    if backend == "inductor":
        model.decode_step = compiled(model.decode_step, model.device)
    else:
        model.decode_step = torch.compile(model.decode_step, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(generated(model, prompt(reference), max_new_tokens=40), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_more_cache_sizes_than_the_compiler_keeps_by_default(monkeypatch):
    model, reference = load("llava")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, options, **more: compile(step, backend="eager", **more))
    model.decode_step = compiled(model.decode_step, model.device)
    ids = reference["text_ids"]
    for size in range(20, 30):
        cache = KVCache(model.config.text, 1, size)
        assert len([*model.generate(ids, max_new_tokens=3, eos_ids=(), cache=cache)]) == 3


def captured_generation(model, reference, device):
    """Twice the same prompt in one cache, the second time by what the first one captured: (tokens, what is captured) of each."""
    inputs = {name: value.to(device) for name, value in prompt(reference).items()}
    rows, length = inputs["attention_mask"].shape
    cache = KVCache(model.config.text, rows, length + 60, device)
    for _ in range(2):
        cache.truncate(0)
        yield generated(model, inputs, max_new_tokens=40, cache=cache), step._graphs.get(cache)


@GPU
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuned", [False, True])
def test_a_captured_step_gives_the_same_tokens(family, tuned):
    model, reference = load(family)
    expected = generated(model, prompt(reference), max_new_tokens=40)
    model.to("cuda")
    if tuned:
        model.decode_step = compiled(model.decode_step, model.device)
    (first, graph), (second, again) = captured_generation(model, reference, "cuda")
    assert torch.equal(first, expected) and torch.equal(second, expected) and graph is again is not None


class FakeGraph:
    """What CUDA does at capture and replay, on a CPU: the call is recorded, not run, and its result written to one place."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for run, result in self.calls:
            result.copy_(run())


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as step.Graph uses it, and a CPU's steps captured as if on CUDA. Notes the streams of captures."""
    log = SimpleNamespace(streams=[], capturing=None)

    @contextmanager
    def capture(graph, stream=None):
        log.streams.append(stream)
        log.capturing = graph
        yield
        log.capturing = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def recorded(model, log):
    """The model's decode step, which a fake capture records with the very tensors it was called with."""
    real = model.decode_step

    def decode_step(token, alive, cache):
        if log.capturing is None:
            return real(token, alive, cache)
        result = torch.zeros(len(token), model.config.text.vocab_size)
        log.capturing.calls.append((lambda: real(token, alive, cache), result))
        return result

    return decode_step


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_is_replayed_with_new_tokens(family, fake_cuda, monkeypatch):
    """The life of a captured step without a GPU: capture, replay in a second prompt, capture anew when weights have moved."""
    model, reference = load(family)
    expected = generated(model, prompt(reference), max_new_tokens=40)
    model.decode_step = recorded(model, fake_cuda)
    monkeypatch.setattr(generate, "fastest", step.captured)
    (first, graph), (second, again) = captured_generation(model, reference, "cpu")
    assert torch.equal(first, expected) and torch.equal(second, expected) and graph is again
    assert len(fake_cuda.streams) == 1 and fake_cuda.streams[0] is not None


@pytest.mark.parametrize("change", ["weights", "step", "cache"])
def test_a_graph_of_other_weights_is_captured_anew(change, fake_cuda, monkeypatch):
    model, reference = load("llava")
    model.decode_step = recorded(model, fake_cuda)
    monkeypatch.setattr(generate, "fastest", step.captured)
    ids, cache = reference["text_ids"], KVCache(model.config.text, 1, 60)
    generated(model, dict(input_ids=ids, cache=cache), max_new_tokens=5)
    if change == "weights":
        model.language_model.norm.weight = torch.nn.Parameter(-model.language_model.norm.weight)
    elif change == "step":
        before = model.decode_step
        model.decode_step = lambda *inputs: -before(*inputs)
    else:
        cache.grow(80)
    cache.truncate(0)
    changed = generated(model, dict(input_ids=ids, cache=cache), max_new_tokens=5)
    assert len(fake_cuda.streams) == 2
    other = KVCache(model.config.text, 1, 60)
    assert torch.equal(changed, generated(model, dict(input_ids=ids, cache=other), max_new_tokens=5)) and len(fake_cuda.streams) == 3


def test_where_capturing_fails_the_answer_is_given_all_the_same(fake_cuda, monkeypatch, capsys):
    model, reference = load("llava")
    expected = generated(model, prompt(reference), max_new_tokens=40)

    @contextmanager
    def refuse(graph, stream=None):
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(generate, "fastest", step.captured)
    (first, _), (second, _) = captured_generation(model, reference, "cpu")
    assert torch.equal(first, expected) and torch.equal(second, expected)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "operation not permitted" in said and "slower" in said


def test_a_graph_goes_with_its_cache(fake_cuda):
    model, _ = load("llava")
    cache = KVCache(model.config.text, 1, 20)
    run = step.captured(lambda token, alive, cache: torch.zeros(1, 5), model, cache)
    run(torch.zeros(1), torch.ones(1))
    assert cache in step._graphs
    gone = weakref.ref(cache)
    del cache, run
    gc.collect()
    assert gone() is None


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a value, or shapes that depend on values."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "multinomial", "masked_select", "unique2"), name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=0.8, top_k=5, top_p=0.9)])
def test_no_step_after_the_first_reads_from_the_device(options, monkeypatch):
    model, reference = load("bakllava")
    monkeypatch.setattr(KVCache, "extent", lambda cache: cache.max_length)  # as on any device but a CPU
    random = torch.Generator().manual_seed(0)
    x, _ = model.embed(reference["text_ids"])
    cache = KVCache(model.config.text, 1, 40)
    choose = partial(generate.sample, **ALL | options, random=random)
    repetition = generate.Repetition(reference["text_ids"], model.config.text.vocab_size, 1.2)
    launched = generate.launch(model, x, None, cache, 4, choose, torch.tensor([2]), repetition)
    with torch.no_grad():
        next(launched)
        with NoReading():
            assert len([*launched]) == 3
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        int(torch.ones(1))


def test_a_decode_step_is_whole_on_a_device_without_memory():
    """On the meta device nothing can be read, and a tensor made on another device is an error."""
    model, _ = load("bakllava")
    model.to("meta")
    cache = KVCache(model.config.text, 2, 32, "meta")
    token, alive = torch.zeros(2, dtype=torch.long, device="meta"), torch.ones(2, dtype=torch.bool, device="meta")
    with torch.no_grad():
        assert model.decode_step(token, alive, cache).shape == (2, model.config.text.vocab_size)


class Kernels(TorchDispatchMode):
    """Counts what a GPU would launch: each operation that is no mere view."""

    VIEWS = {
        "view",
        "_unsafe_view",
        "transpose",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "expand",
        "split_with_sizes",
        "t",
        "alias",
        "detach",
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names += [operation._overloadpacket.__name__]
        return operation(*args, **(kwargs or {}))

    def count(self):
        return len([name for name in self.names if name not in self.VIEWS])


def test_a_block_has_few_kernels_outside_attention(monkeypatch):
    model, _ = load("llava")
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)  # one kernel on a GPU; here it would fall into parts
    model.to("meta")
    suit(model)
    (block, *_), counts = model.language_model.layers, []
    block.self_attn.attend = lambda q, k, v, mask: q
    token, alive = torch.zeros(1, dtype=torch.long, device="meta"), torch.ones(1, dtype=torch.bool, device="meta")
    for blocks in (1, 2):
        model.language_model.layers = torch.nn.ModuleList([block] * blocks)
        with Kernels() as kernels, torch.no_grad():
            model.decode_step(token, alive, KVCache(model.config.text, 1, 32, "meta"))
        counts.append(kernels.count())
    assert 15 < counts[1] - counts[0] <= 22, kernels.names


def test_the_two_forms_of_rms_norm_are_the_same():
    norm = llama.RMSNorm(64, 1e-5)
    norm.weight.data.normal_()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        norm.weight.data = norm.weight.data.to(dtype)
        torch.testing.assert_close(norm(x), gpu.fused_norm(norm)(x), rtol=tolerance, atol=tolerance)


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch):
    from weights import load as loading

    monkeypatch.setattr(loading, "fill", lambda model, *arguments, copy, keep: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    load("llava")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(Llava, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    Llava.from_pretrained(FIXTURES / "llava", "cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_first_token_comes_at_once_and_the_others_one_step_behind():
    asked = []
    items = one_behind(asked.append(n) or n for n in range(4))
    assert [(item, len(asked)) for item in items] == [(0, 1), (1, 3), (2, 4), (3, 4)]


@pytest.mark.parametrize(
    "device, family", [("cpu", "llava"), pytest.param("cpu", "bakllava", marks=SHARED), pytest.param("cuda", "bakllava", marks=AMPERE)]
)
def test_prefill_without_padding_goes_to_flash_attention(device, family):
    """With any other kernel forbidden it still runs; with padding, on a GPU, it could not."""
    model, reference = load(family)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(reference["text_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_copied_for_queries_that_share_it(family, monkeypatch):
    model, reference = load(family)
    shapes = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, shared = model.config.text.num_attention_heads, model.config.text.num_key_value_heads

    def spy(q, k, v, **options):
        shapes.append((k.shape[1], q.shape[1]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    generated(model, dict(input_ids=reference["text_ids"]), max_new_tokens=3)
    assert [k for k, _ in shapes] == [shared] * 3 * model.config.text.num_hidden_layers  # in three passes
    if shared < heads:  # under a mask, as in the two passes of one token, only as many query heads
        assert [q for _, q in shapes] == [heads] * model.config.text.num_hidden_layers + [shared] * 2 * model.config.text.num_hidden_layers
