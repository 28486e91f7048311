"""The benchmark's own arithmetic, and that ours goes through it; transformers, which it needs beside, is not needed here."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import SPEED, Worker, as_markdown, count_weights, in_turn
from bench.limits import decode_bytes, prefill_operations
from bench.memory import training_memory
from bench.shapes import write_configs
from llava import Llava
from tests.test_train import forward_pass
from train import make_trainable
from training.lora import add_adapter
from weights.config import LlavaConfig


@pytest.mark.parametrize("pictures, words", [(1, 20), (0, 200)])
def test_the_least_operations_of_a_prefill_are_what_pytorch_counts(pictures, words):
    model = Llava.from_pretrained("tiny/llava", dtype=torch.float32)
    config, P = model.config, model.config.features_per_image
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        ids = torch.tensor([[config.image_id] * pictures + [5] * words])
        next(model.generate(ids, torch.randn(1, 3, 112, 112) if pictures else None))
    tokens = words + pictures * P
    text = config.text
    # PyTorch counts the whole square of causal attention, of which half is needed.
    half = 4 * (tokens * (tokens - 1) / 2) * (text.num_hidden_layers - 1) * text.num_attention_heads * text.head_dim
    expected = prefill_operations(config, count_weights(config), pictures, 0, tokens)
    assert counter.get_total_flops() == pytest.approx(expected + half, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("width, layers", [(192, 4), (256, 3)])
def test_the_memory_of_training_without_memory_is_that_with_it(width, layers, stage, checkpointed):
    """What a forward pass saves, to the byte, when the whole step is run on tensors that have none."""
    config, rows, tokens = LlavaConfig.from_pretrained("tiny/llava"), 2, 100
    text = replace(
        config.text, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32
    )
    config = replace(config, text=text)
    held, saved, peak = training_memory(config, stage, checkpointed, rows, tokens)

    ids = torch.tensor([[config.image_id] * 64 + [5] * (tokens - 64)] * rows)
    model = Llava(config).requires_grad_(False).bfloat16()
    parameters, _, autocast = make_trainable(model, stage, torch.bfloat16, checkpointed)
    trained, frozen = sum(parameter.numel() for parameter in parameters), sum(p.numel() for p in model.parameters() if not p.requires_grad)
    pixels = torch.ones(rows, 3, 112, 112)
    assert held - 16 * trained - 2 * frozen == ids.nbytes + pixels.nbytes + 4 * len(parameters)  # AdamW counts steps in 4 bytes each
    loss, expected = forward_pass(model, autocast, ids, pixels)
    expected += loss.nbytes - ids.nbytes * (stage == 2)  # the word embeddings' gradient needs the ids, held already
    expected += 2 * ids.numel() * text.head_dim * (2 * stage) * checkpointed  # RoPE's tables wait, in the blocks' type, unsaved
    expected += 8 * tokens * checkpointed  # and so do the tokens' slots
    assert saved == expected and peak > held + saved


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_of_training_on_quantised_weights_is_that_of_packed_ones(checkpointed):
    config, rows, tokens = LlavaConfig.from_pretrained("tiny/llava"), 2, 100
    held, saved, peak = training_memory(config, 2, checkpointed, rows, tokens, lora=4, scheme="int4")
    ids, pixels = torch.tensor([[config.image_id] * 64 + [5] * (tokens - 64)] * rows), torch.ones(rows, 3, 112, 112)
    model = Llava.from_pretrained("tiny/llava", dtype=torch.bfloat16, quantize="int4")
    add_adapter(model, 4, 8)
    parameters, _, autocast = make_trainable(model, 2, torch.bfloat16, checkpointed)
    trained, packed = sum(parameter.numel() for parameter in parameters), sum(buffer.nbytes for buffer in model.buffers())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    assert held == 16 * trained + 2 * frozen + packed + ids.nbytes + pixels.nbytes + 4 * len(parameters)
    loss, expected = forward_pass(model, autocast, ids, pixels)
    expected += loss.nbytes + 2 * ids.numel() * config.text.head_dim * 2 * checkpointed  # the loss, and RoPE's tables as above
    expected += 8 * tokens * checkpointed
    assert saved == expected and peak > held + saved


def test_what_a_decode_step_reads_of_the_7b(tmp_path):
    write_configs("7b", tmp_path)
    config = LlavaConfig.from_pretrained(tmp_path)
    weights = count_weights(config)
    assert weights["all"] == 7_063_427_072  # of the published checkpoint
    text = weights["all"] - weights["vision"] - weights["projector"] - 32064 * 4096
    assert decode_bytes(config, weights, 1, 0, torch.bfloat16) == 2 * text
    assert decode_bytes(config, weights, 8, 100, torch.bfloat16) == 2 * text + 8 * 100 * 524_288


def test_ours_goes_through_the_benchmark():
    worker = Worker("ours", "tiny/llava", "cpu", "float32")
    try:
        first, each = worker("generate", batch=2, length=0, tokens=4)
        assert 0 < each < first
        first, second, answer = worker("turns")
        assert first > 0 and second > 0 and answer.startswith("A ")
        assert worker("memory")[0] > 1e8
    finally:
        worker.close()


def test_runs_take_turns_and_give_medians():
    order, numbers = [], iter([1, 10, 3, 30, 2, 20])

    class Bar:
        def update(self):
            order.append("bar")

    def run(name):
        return lambda: order.append(name) or [next(numbers)]

    assert in_turn({"a": run("a"), "b": run("b")}, 3, Bar()) == {"a": [2], "b": [20]}
    assert order == ["a", "bar", "b", "bar"] * 3


def test_table():
    record = {
        "figures": {
            "first, s": {"ours": 2.0, "transformers": 4.0},
            "decode, tokens/s": {"ours": 30.0, "transformers": 10.0},
            "load, s": {"ours": 1.0, "transformers": 2.0},
        },
        "limits": {"first, s": 1.0, "decode, tokens/s": 40.0},
    }
    assert as_markdown(record).splitlines()[2:] == [
        "| first, s | 2 | 4 | 0.50 | 1 | 50 % |",
        "| decode, tokens/s | 30 | 10 | 3.00 | 40 | 75 % |",
        "| load, s | 1 | 2 | 0.50 |  |  |",
    ]


def test_quantised_libraries_stand_below_the_plain_ones():
    rows = {"ours": 30.0, "transformers": 10.0, "ours, int8": 45.0}
    assert as_markdown({"figures": {SPEED: rows}, "limits": {}}).splitlines()[2:] == [
        "| ours | 30 | 3.00 |", "| transformers | 10 | 1.00 |", "| ours, int8 | 45 | 4.50 |",
    ]  # fmt: skip


@pytest.mark.parametrize("module, package", [("bench", "transformers"), ("bench.plot", "matplotlib")])
def test_a_package_that_is_missing_is_one_line(module, package):
    code = f"import sys, runpy; sys.modules['{package}'] = None; sys.argv = ['']; runpy.run_module('{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"pip install {package}" in done.stderr and done.stderr.count("\n") == 1
