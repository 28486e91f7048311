"""The decode step: the same tokens in every form it can run in."""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from generate import compiled, one_behind, run_step
from llama import KVCache
from tests.compare import FAMILIES, load
from tests.test_generate import generated, prompt

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
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
        model.decode_step = compiled(model)
    else:
        model.decode_step = torch.compile(model.decode_step, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(generated(model, prompt(reference), max_new_tokens=40), expected)


@GPU
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_gives_the_same_tokens(family, compiled):
    model, reference = load(family)
    expected = generated(model, prompt(reference), max_new_tokens=40)
    model.to("cuda")
    if compiled:
        model.decode_step = compiled(model)
    inputs = {name: value.cuda() for name, value in prompt(reference).items()}
    cache = KVCache(model.config.text, len(expected), inputs["attention_mask"].shape[1] + 60, "cuda")
    for _ in range(2):  # the second prompt replays what the first one captured
        graph = cache.graph
        cache.truncate(0)
        assert torch.equal(generated(model, inputs, max_new_tokens=40, cache=cache), expected)
    assert cache.graph is graph is not None


def test_the_first_token_comes_at_once_and_the_others_one_step_behind():
    asked = []
    items = one_behind(asked.append(n) or n for n in range(4))
    assert [(item, len(asked)) for item in items] == [(0, 1), (1, 3), (2, 4), (3, 4)]


class Watch(TorchFunctionMode):
    """Notes which of the two functions are called, and whether oneDNN may be used by then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, F.scaled_dot_product_attention):
            self.calls.append((function, torch.backends.mkldnn.enabled))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows, dtype", [(1, torch.bfloat16), (2, torch.bfloat16), (1, torch.float32)])
def test_bfloat16_on_a_cpu_takes_other_kernels(rows, dtype):
    model, reference = load("llava", dtype)
    with Watch() as watch:
        steps = model.generate(reference["text_ids"].repeat(rows, 1), max_new_tokens=2, eos_ids=())
        next(steps)
        watch.calls.clear()
        next(steps)
    linear = [enabled for function, enabled in watch.calls if function is F.linear]
    fused = [function for function, _ in watch.calls if function is not F.linear]
    layers = model.config.text.num_hidden_layers
    assert linear == [not (rows == 1 and dtype == torch.bfloat16)] * (7 * layers + 1) and torch.backends.mkldnn.enabled
    assert len(fused) == (layers if dtype == torch.float32 else 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_other_kernels_compute_the_same(family, rows):
    model, reference = load(family, torch.bfloat16)
    mask = reference["attention_mask"][:rows].bool()
    token, alive = torch.arange(5, 5 + rows), torch.ones(rows, dtype=torch.bool)
    logits = []
    for step in (model.decode_step, partial(run_step, model.decode_step)):
        cache = KVCache(model.config.text, rows, mask.shape[1] + 5, dtype=torch.bfloat16)
        with torch.no_grad():
            model(inputs_embeds=model.language_model.embed(reference["input_ids"][:rows]), attention_mask=mask, cache=cache)
            logits.append(step(token, alive, cache))
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()


@pytest.mark.parametrize(
    "device, family", [("cpu", "llava"), pytest.param("cpu", "bakllava", marks=SHARED), pytest.param("cuda", "bakllava", marks=GPU)]
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
