"""Several processes with their shares of a model compute what one process computes with all of it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from bench.parallel import peak
from hardware.parallel import Processes
from llama import KVCache
from llava import Llava
from tests.compare import FAMILIES, FIXTURES, relative
from tests.test_sample import ROOT, asked
from weights.checkpoint import save_checkpoint
from weights.config import LlavaConfig
from weights.shares import check_size, split

CASES = [(family, size) for family in FAMILIES for size in (2, 4)]


def random_model(family):
    """A fixture's model with four key/value heads and four heads in the vision tower; BakLLaVA's with a vocabulary that does
    not divide, ViP-LLaVA's tied. The same in every process."""
    config = LlavaConfig.from_pretrained(FIXTURES / family)
    heads = dict(num_attention_heads=8 if family == "bakllava" else 4, num_key_value_heads=4, head_dim=6)
    text = replace(config.text, **heads, vocab_size=97 if family == "bakllava" else 96, tie_word_embeddings=family == "vip")
    random = torch.Generator().manual_seed(5)
    model = Llava(replace(config, text=text, vision=replace(config.vision, num_attention_heads=4))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=random).add_(name.endswith("norm.weight"))
    return model


def inputs(config):
    """Two rows, the first padded, the second with a picture."""
    ids = torch.tensor([[95, 95, 1, 5, 6], [1, config.image_id, 7, 8, 9]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1] * 5]))


class Reading(TorchDispatchMode):
    """Counts the elements of all tensors that are read: of the inputs of all operations that do more than look at them otherwise."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and not result.is_meta:
            self.count += sum(tensor.numel() for tensor in args if isinstance(tensor, torch.Tensor))
        return result


def compare(family, mesh):
    """What one process's share of a model does, beside the whole model."""
    whole, model = random_model(family), random_model(family)
    with Reading() as read:
        split(model, mesh, "cpu", torch.float32)
    given, result = inputs(model.config), {"read": read.count}
    with torch.no_grad():
        result["logits"] = relative(model(**given).logits[:, -3:], whole(**given).logits[:, -3:])
        with CommDebugMode() as vision:
            model.encode_images(given["pixel_values"])
        cache = KVCache(model.config.text, 2, 90)
        options = dict(max_new_tokens=64, eos_ids=())
        result["tokens"] = torch.stack(list(model.generate(**given, **options, cache=cache)), 1)
        result["expected"] = torch.stack(list(whole.generate(**given, **options)), 1)
        with CommDebugMode() as step:
            model.decode_step(torch.tensor([5, 6]), torch.tensor([True, True]), cache)
    for name, comm in (("vision", vision), ("step", step)):
        counts = {str(operation).split(".")[-1]: count for operation, count in comm.get_comm_counts().items()}
        result[name] = counts.get("all_reduce", 0), counts.get("all_gather_into_tensor", 0)
    depth = whole.config.vision.num_hidden_layers
    result["blocks"] = max(layer % (depth + 1) for layer in whole.config.vision_layers), len(whole.language_model.layers)
    result["heads"] = cache.layers[0].keys.shape[1]
    numel = lambda parameters: sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    result["own"] = numel(model.parameters())
    result["share"] = numel(p for p in model.parameters() if p.ndim == 2) / numel(p for p in whole.parameters() if p.ndim == 2)
    return result


def wide_model(folder):
    """The bundled model's files with wide layers in the language model, 109 MB in float32. Its weights are never used."""
    copytree("tiny/llava", folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    (folder / "config.json").write_text(json.dumps(raw))
    save_checkpoint(Llava(LlavaConfig.from_pretrained(folder)), folder, folder, torch.float32)


def memory_to_load(folder, mesh):
    """How far sample.py's loading of one process's share lifts the most memory that the process ever had, in bytes."""
    args = sample.argument_parser("", "").parse_args(["--model", str(folder), "--dtype", "float32"])
    processes = SimpleNamespace(size=mesh.size(), device=lambda name: "cpu", mesh=lambda device: mesh)
    before = peak()
    chat = sample.load(args, 0, processes)
    assert chat.model.language_model.layers[0].mlp.up_proj.weight.shape == (1376, 512)
    return peak() - before


def work(rank, folder):
    """One of four processes: in pairs, and then all four together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 4), rank=rank, world_size=4)
    pair, four = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "within"))["within"], init_device_mesh("cpu", (4,))
    of_pair = FAMILIES[::2] if rank < 2 else FAMILIES[1::2]  # the pairs share the work
    results = {
        (family, mesh.size()): compare(family, mesh) for mesh, families in ((pair, of_pair), (four, FAMILIES)) for family in families
    }
    results["memory"] = memory_to_load(Path(folder) / "wide", four)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(family, size): what `compare` returns, of each process}, and "memory": what `memory_to_load` returns."""
    folder = tmp_path_factory.mktemp("processes")
    wide_model(folder / "wide")
    multiprocessing.spawn(work, (folder,), nprocs=4)
    of_ranks = [torch.load(folder / f"{rank}.pt") for rank in range(4)]
    return {case: [of_rank[case] for of_rank in of_ranks if case in of_rank] for case in (*CASES, "memory")}


every = pytest.mark.parametrize("case", CASES, ids=str)


@every
def test_the_same_logits(case, results):
    assert len(results[case]) == case[1] and max(result["logits"] for result in results[case]) < 1e-5


@every
def test_the_same_tokens_in_every_process(case, results):
    expected = results[case][0]["expected"]
    assert expected.shape == (2, 64) and len(expected.unique()) > 20
    assert all(torch.equal(result["tokens"], expected) for result in results[case])


@every
def test_two_all_reduces_a_block(case, results):
    """And one for the embeddings, one for the projector; the logits are gathered."""
    for result in results[case]:
        vision, text = result["blocks"]
        assert result["step"] == (2 * text + 1, 1)
        assert result["vision"] == (2 * vision + 1, 0)


@every
def test_a_process_holds_its_share(case, results):
    for result in results[case]:
        assert result["heads"] == 4 // case[1]
        assert abs(result["share"] - 1 / case[1]) < 0.03  # positions are everywhere; of 97 words the last process has fewer


@every
def test_a_process_reads_its_share(case, results):
    for result in results[case]:
        assert result["read"] == result["own"]


def test_a_process_needs_the_memory_of_its_share(results):
    """A quarter of 109 MB, and one tensor's pages at a time."""
    assert len(results["memory"]) == 4 and 25e6 < min(results["memory"]) and max(results["memory"]) < 40e6


@pytest.mark.parametrize("size, what", [(3, "32 key/value heads"), (32, "16 heads of the vision tower"), (64, "32 key/value heads")])
def test_numbers_that_do_not_divide(size, what):
    config = LlavaConfig.from_pretrained(FIXTURES / "llava")
    text = replace(config.text, num_attention_heads=32, num_key_value_heads=32, hidden_size=4096, intermediate_size=11008)
    config = replace(config, text=text, vision=replace(config.vision, num_attention_heads=16, intermediate_size=4096))
    with pytest.raises(ValueError, match=f"{size} processes cannot share {what} evenly; --nproc-per-node 1 or 2 or 4 or 8 or 16 works"):
        check_size(config, size)


def test_all_draw_alike_without_a_seed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # to be put back
    store, drawn = dist.HashStore(), []
    for rank in range(2):
        process = Processes.__new__(Processes)
        process.store, process.rank, process.asked = store, rank, 0
        sample.hear_together(process)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def torchrun(*command, stdin=""):
    """Two processes by torchrun, at a port that is free; returns (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        input=stdin.encode(), capture_output=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_command_line_speaks_once_and_hears_for_all():
    questions = ["How many things are there?", "Where is the star?"]
    status, out, err = torchrun("sample.py", "--chat", stdin="\n".join(questions))
    assert (status, out.splitlines()) == (0, asked(*questions))
    assert err.count("shared by 2 processes") == 1


def test_a_mistake_is_one_line():
    status, out, err = torchrun("sample.py", "--max-new-tokens", "0")
    assert status and not out
    assert [line for line in err.splitlines() if line.startswith("sample.py:")] == ["sample.py: max_new_tokens is 0; expected at least 1"]


@pytest.fixture
def waiting():
    """A chat in two processes that wait for a question: torchrun, and the processes it has started."""
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py", "--chat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as chat:  # fmt: skip
        said = b""
        while not said.endswith(b"\n> "):
            said += chat.stderr.read(1)
            assert chat.poll() is None, said.decode()
        yield chat, [int(pid) for pid in Path(f"/proc/{chat.pid}/task/{chat.pid}/children").read_text().split()]
        chat.kill()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_who_ends_torchrun_ends_all(sign, waiting):
    """By Ctrl-C, which it hands on, or at once."""
    torchrun, workers = waiting
    torchrun.send_signal(sign)
    start = time.monotonic()
    assert torchrun.wait(timeout=25)  # after 30 seconds torchrun kills what does not end
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() - start < 25
        time.sleep(0.1)
