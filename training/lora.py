"""LoRA, adapters of low rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685): the weights stay as they are, and beside each
matrix a small change to it is learnt. A 7B that wants 109 GB to be trained in full is then trained on one card of 24 GB.

    python train.py --stage 2 --lora 16 --model MODEL --data … --images … --out ADAPTER     # train one
    python sample.py --model MODEL --adapter ADAPTER "What is this?"                        # use it
    python convert.py MODEL OUT --adapter ADAPTER                                           # a checkpoint like any other

An adapter is stored as PEFT stores it, with the projector, which is trained whole, in the same file: PEFT's
`modules_to_save`. So `peft` reads ours onto the model of `transformers`, and we read those that it made.

As no gradient is wanted for the weights themselves, they may be quantised: `--quantize int4` with `train.py --lora`, and then with
`sample.py --adapter` too (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; its 4-bit grid is another one).

The model knows nothing of this: its linear layers are exchanged for others.
"""

import hashlib
import json
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from weights.checkpoint import checkpoint_folder, our_name, read_json, write_tensors
from weights.config import REAL, SIZE, check, only

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all linear layers of a Llama's block
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT = "base_model.model."  # what PEFT puts before the name that a tensor has in transformers


def _pattern(field):
    """A table {pattern of layer names: value of the field}, or null."""
    fits, expected = field
    return lambda value: value is None or isinstance(value, dict) and all(map(fits, value.values())), f"an object, each value {expected}"


FIELDS = {  # of adapter_config.json; each variant that computes something else is refused by its name
    "peft_type": only("LORA"),
    "r": SIZE,
    "lora_alpha": REAL,
    "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"),
    "bias": only("none"),
    "init_lora_weights": only(True, False, "gaussian"),  # others begin by changing the base
    "use_rslora": only(True, False, None),
    "rank_pattern": _pattern(SIZE),
    "alpha_pattern": _pattern(REAL),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"), only(False, None)),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens"), only(None, {}, [])),
}


class LoRALinear(nn.Module):
    """A linear layer W, frozen, and the change to it that is learnt: (…, in) -> (…, out), by section 4.1 of the paper

        h = W x + (α / r) · B A x

    A is (r, in) and B (out, r). A begins at random and B at zero, so an adapter that has learnt nothing changes nothing.
    Dividing by r lets the learning rate stay when the rank is changed.

    base: what maps (…, in) to (…, out) and says its in_features and out_features: an nn.Linear, or quantised weights.
    dropout: the share of x that A does not see, in training alone. Raises ValueError for numbers that make no adapter.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        check("LoRA", {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}, FIELDS)
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.requires_grad_(False)  # until they are trained, as all weights here

    def forward(self, x):
        change = self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))
        return self.base(x) + change * (self.alpha / self.rank)


def adapted(model):
    """The layers that have an adapter: {name: LoRALinear}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_adapter(model, rank, alpha, dropout=0.0, layers=LAYERS):
    """Give these layers of each of the Llama's blocks an adapter that has learnt nothing yet. Raises ValueError for layers that
    no block has, and for a model that has an adapter."""
    if unknown := [layer for layer in layers if layer not in LAYERS]:
        raise ValueError(f"{unknown[0]!r} is no linear layer of a block; expected some of {', '.join(LAYERS)}")
    blocks = model.language_model.layers.named_modules(prefix="language_model.layers")
    _exchange(model, {name: (rank, alpha) for name, _ in blocks if name.endswith(tuple(layers))}, dropout)


def _exchange(model, layers, dropout):
    """layers: {name: (rank, alpha)}."""
    if adapted(model):
        raise ValueError("the model has an adapter already; merge it first")
    for name, (rank, alpha) in layers.items():
        parent, _, leaf = name.rpartition(".")
        with torch.device(model.device):
            layer = LoRALinear(model.get_submodule(name), rank, alpha, dropout)
        setattr(model.get_submodule(parent), leaf, layer.train(model.training))


def save_adapter(model, out, base, dtype, trained=None):
    """Write the adapter that `add_adapter` made, and the projector, into the folder `out`.

    base: the name or folder of the checkpoint that it is for, to be written down. trained: {name: tensor} of both, where the
    model's own parameters are not whole.
    """
    layers, trained = adapted(model), trained or dict(model.named_parameters())
    first = next(iter(layers.values()))
    tensors = {}
    for name in layers:
        for part in ("lora_A", "lora_B"):
            tensors[f"{name}.{part}.weight"] = trained[f"{name}.{part}.weight"]
    for name, _ in model.projector.named_parameters():
        tensors[f"multi_modal_projector.{name}"] = trained[f"projector.{name}"]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "bias": "none",
        "target_modules": [f"model.{name}" for name in layers],  # in full: "q_proj" alone would be the vision tower's too
        "modules_to_save": ["multi_modal_projector"],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    write_tensors({f"{PEFT}model.{name}": tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}, out / WEIGHTS)


def load_adapter(model, adapter):
    """Put an adapter in PEFT's format on the model, which is changed only if all of it fits.

    adapter: its folder, or a name on the hub. Which layers it changes its tensors' names say; a projector that is stored
    with it takes the place of the model's. Raises FileNotFoundError or ValueError for what is missing, damaged, of a
    kind that computes something else, or of another model.
    """
    folder = checkpoint_folder(adapter)
    config, stored = _read_adapter(folder)
    tensors = {our_name(name): tensor for name, tensor in stored.items()}
    layers = {}
    for name in stored:
        layer, is_lora, _ = name.rpartition(".lora_")
        if is_lora:
            layers[our_name(layer)] = rank_and_alpha(layer, config)
    if not layers:
        raise ValueError(f"{folder / WEIGHTS} holds no adapter: none of its tensors is a lora_A or a lora_B")
    found, expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, _shapes(model, layers, tensors)
    if wrong := sorted({name for name, _ in found.items() ^ expected.items()}):
        first = f"its {wrong[0]} is {found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'none')}"
        why = "it is of another model, or holds more than changes of linear layers and a projector"
        raise ValueError(f"{folder} does not fit in {len(wrong)} tensors ({why}): {first}")
    _exchange(model, layers, config["lora_dropout"])
    for name, tensor in tensors.items():
        model.get_parameter(name).data = tensor.to(model.device, model.dtype)


def _read_adapter(folder):
    """The config, checked, and the tensors by the names that they have in transformers."""
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: an adapter is an {CONFIG} and an {WEIGHTS}")
    config = {"peft_type": None, "r": None, "lora_alpha": None, "lora_dropout": 0.0} | read_json(folder / CONFIG)
    check(f"{folder}: {CONFIG}", config, FIELDS)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(field) or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{folder}: {CONFIG} has {pattern!r} in {field}, which is no regular expression ({error})") from None
    try:
        stored = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut short ({error}); fetch it again") from None
    return config, {name.removeprefix(PEFT): tensor for name, tensor in stored.items()}


def rank_and_alpha(layer, config):
    """Of a layer, by the name that it has in transformers: the adapter's own rank and α, unless a pattern says otherwise.

    The first pattern counts that is a regular expression for the whole name or for its end after a dot. rsLoRA divides by √r in
    place of r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): the same as an α that is √r times as large.
    """
    rank = _of_pattern(config.get("rank_pattern"), layer, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    return rank, alpha


def _of_pattern(patterns, layer, otherwise):
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return otherwise


def _shapes(model, layers, tensors):
    """{our name: shape} of what an adapter of these layers holds, and of a projector if there is one among the tensors."""
    expected = {}
    if any(name.startswith("projector.") and ".lora_" not in name for name in tensors):
        expected = {f"projector.{name}": tuple(parameter.shape) for name, parameter in model.projector.named_parameters()}
    for name, module in model.named_modules():
        if name in layers and hasattr(module, "in_features"):
            rank, _ = layers[name]
            expected[f"{name}.lora_A.weight"] = (rank, module.in_features)
            expected[f"{name}.lora_B.weight"] = (module.out_features, rank)
    return expected


@torch.no_grad()
def merge(model):
    """Add the change to the weights, W + (α / r) · B A, and take the adapter away: as fast as a model that never had one.

    In 16 bits the sum is rounded once more. Raises ValueError where there is no adapter, or quantised weights.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError("there is no adapter to merge: none is on the model, or it is merged already")
    for name, layer in layers.items():
        if not isinstance(layer.base, nn.Linear):
            why = "on the coarse grid of quantised weights a small change is rounded away"
            raise ValueError(f"{name} is a {type(layer.base).__name__}: {why}; merge into the 16-bit checkpoint, then quantise that")
    for name, layer in layers.items():
        change = layer.lora_B.weight.float() @ layer.lora_A.weight.float() * (layer.alpha / layer.rank)
        weight, (parent, _, leaf) = layer.base.weight, name.rpartition(".")
        weight.data = (weight.float() + change).to(weight.dtype)
        setattr(model.get_submodule(parent), leaf, layer.base)


def fingerprint(adapter):
    with open(checkpoint_folder(adapter) / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_merged(source, adapter):
    """Raises ValueError if the checkpoint in the folder `source` has this adapter in its weights: it would count twice."""
    if fingerprint(adapter) in read_json(source / "config.json").get("merged_adapters", []):
        raise ValueError(f"{adapter} is merged into {source} already; use that without it")
