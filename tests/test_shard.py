"""Training in several processes: the curve, the result and the saved states of one."""

import json
import os
import re
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file

import train
from llava import Llava
from tests.test_train import interrupted, many
from tiny.world import write
from weights.checkpoint import save_checkpoint
from weights.config import LlavaConfig
from weights.original import PROJECTOR, read_projector

ALIGNING, BFLOAT16, FLOAT16 = ("--stage", "1"), ("--dtype", "bfloat16", "--checkpoint-activations"), ("--dtype", "float16")
ADAPTER, ON_INT8 = ("--lora", "4"), ("--lora", "4", "--quantize", "int8")
PHASES = [  # each: {the ranks, of four, that train together: (the run's name, its options)}
    {(0, 1): ("two", ("--held-out", "HELD OUT")), (2,): ("one", ()), (3,): ("one aligning", ALIGNING)},
    {(0, 1, 2, 3): ("four", ("--save-every", "1e-9"))},
    {(0, 1): ("resumed", ()), (2, 3): ("two aligning", (*ALIGNING, "--save-projector"))},
    {(0, 1): ("two in bfloat16", BFLOAT16), (2,): ("one in bfloat16", BFLOAT16), (3,): ("one with an adapter", ADAPTER)},
    {(0, 1): ("two with an adapter", ADAPTER), (2, 3): ("two with an adapter of int8", ON_INT8)},
    {(0,): ("one with an adapter of int8", ON_INT8), (1,): ("one in float16", FLOAT16), (2, 3): ("two in float16", FLOAT16)},
]


def small_model(folder):
    """The bundled model's files with two narrow layers in each tower, and random weights in float32."""
    copytree("tiny/llava", folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"] |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    raw["text_config"] |= dict(hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2)
    (folder / "config.json").write_text(json.dumps(raw))
    model, random = Llava(LlavaConfig.from_pretrained(folder)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=random).add_("norm" in name and name.endswith("weight"))
    save_checkpoint(model, folder, folder, torch.float32)


def training_run(folder, phase, ranks, rank, name, options):
    """train.py as one of the processes that torchrun would have started; returns the losses of its steps."""
    store, losses = dist.FileStore(f"{folder}/{phase} {ranks}", len(ranks)), []
    dist.rendezvous = lambda *_, **__: iter([(store, ranks.index(rank), len(ranks))])
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(len(ranks)), "LOCAL_WORLD_SIZE": str(len(ranks))}

    def record(*arguments, forward_backward=train.forward_backward):
        losses.append(forward_backward(*arguments))
        return losses[-1]

    def save(state, out, step, group, save_state=train.save_state):
        save_state(state, out, step, group)
        if step == 3 and rank == 0:
            copytree(out, folder / "resumed" / "training-state")  # what a kill at this moment would leave
            (folder / "resumed" / "training-state" / "9").mkdir()  # and, of a state that was being written
            (folder / "resumed" / "training-state" / "9" / "0-of-2.pt").write_bytes(b"half a file")

    command = f"train.py --stage 2 --model {folder}/model --data {folder}/instruct.json --images {folder} --batch-size 4 --accumulate 2"
    sys.argv = [*command.split(), "--lr", "1e-2", "--epochs", "3", "--device", "cpu", "--out", str(folder / name)]
    sys.argv += [str(folder / "instruct.json") if option == "HELD OUT" else option for option in options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "forward_backward", record)
        patch.setattr(train, "save_state", save)
        train.main()
    return losses


def work(rank, folder):
    torch.set_num_threads(1)
    for number, phase in enumerate(PHASES):
        for ranks, (name, options) in phase.items():
            if rank in ranks:
                losses = training_run(folder, number, ranks, rank, name, options)
                torch.save(losses, folder / f"{name} {ranks.index(rank)}.pt")
        # The next phase's processes meet in files of its own; who comes first waits for the others.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (the losses that each process knew, the weights)}."""
    folder = tmp_path_factory.mktemp("runs")
    small_model(folder / "model")
    write(folder, 12, seed=5)
    records = json.loads((folder / "instruct.json").read_text())
    text = {"conversations": [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "A colour."}]}
    (folder / "instruct.json").write_text(json.dumps([*records, text, text]))  # 14 records: in fours, with two left
    multiprocessing.spawn(work, (folder,), nprocs=4)
    named = [(name, len(ranks)) for phase in PHASES for ranks, (name, _) in phase.items()]
    curves = {name: [torch.load(folder / f"{name} {n}.pt") for n in range(size)] for name, size in named}
    return {name: (curves[name], result(folder / name), folder / name) for name, _ in named}


def result(folder):
    """The tensors that a run has written."""
    if (folder / PROJECTOR).is_file():
        return read_projector(folder / PROJECTOR)
    return load_file(next(folder.glob("*model.safetensors")))


def differences(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    "name, reference, tolerance",
    [
        ("two", "one", 1e-4), ("four", "one", 1e-4), ("two aligning", "one aligning", 1e-4),
        ("two with an adapter", "one with an adapter", 1e-4), ("two in bfloat16", "one in bfloat16", 0.05),
        ("two in float16", "one in float16", 0.01),
        ("two with an adapter of int8", "one with an adapter of int8", 1e-4),
    ],
)  # fmt: skip
def test_the_curve_and_the_result_of_one_process(name, reference, tolerance, runs):
    curves, weights, _ = runs[name]
    (expected,), expected_weights, _ = runs[reference]
    assert len(expected) == (5 if "aligning" in name else 6) and expected[0] > expected[-1] + 0.5
    for curve in curves:
        assert curve == pytest.approx(expected, abs=tolerance)
    if name == "two aligning":  # which writes the projector alone
        expected_weights = {tensor: expected_weights[tensor] for tensor in expected_weights if tensor.startswith("multi_modal_projector.")}
    assert weights.keys() == expected_weights.keys()
    assert differences(weights, expected_weights) < 10 * tolerance


def test_a_killed_run_goes_on_in_another_number_of_processes(runs):
    """Of four, in two."""
    curves, weights, _ = runs["resumed"]
    (expected,), expected_weights, _ = runs["one"]
    for curve in curves:
        assert curve == pytest.approx(expected[3:], abs=1e-4)
    assert differences(weights, expected_weights) < 1e-3


def test_a_finished_run_leaves_its_result_alone(runs):
    for _, _, folder in runs.values():
        files = {file.name for file in Path(folder).iterdir()}
        assert files & {"model.safetensors", "adapter_model.safetensors", PROJECTOR} and "training-state" not in files


def test_ctrl_c_stops_all_after_the_same_step(tmp_path):
    command = [*many(tmp_path), "--device", "cpu"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    _, said = interrupted(together)
    (line,) = re.findall(r"^train\.py: stopped after step (\d+) of 200; the same command goes on from there$", said, re.MULTILINE)
    state = tmp_path / "out" / "training-state" / line
    assert {file.name for file in state.iterdir()} == {"0-of-2.pt", "1-of-2.pt", "complete.json"}


def test_a_share_of_nothing_is_refused(tmp_path):
    class Four:
        rank, size = 0, 4

    class Arguments:
        out, batch_size = tmp_path, 2
        lora = lora_alpha = lora_dropout = projector_lr = quantize = style = system = save_projector = None
        stage, format = 2, "chat"

    with pytest.raises(ValueError, match="--batch-size is 2, to be shared by 4 processes; give at least 4"):
        train.train(Arguments, Four)
