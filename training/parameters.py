"""What a stage trains, in which number types, and what is kept of it for the update."""

from contextlib import nullcontext
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from hardware.processes import Alone
from llava import Llava
from training.lora import adapted, add_adapter
from weights.original import load_projector, projector_names


def load_model(args, source, group):
    """The model to be trained, with an adapter if there is to be one; on the CPU where several processes will share it."""
    model = Llava.from_pretrained(source, args.device if group.size == 1 else "cpu", quantize=args.quantize)
    if model.config.quantized and not args.lora:
        raise ValueError(f"{source} is quantised: train an adapter of it (--stage 2 --lora 16), or the checkpoint it was made from")
    if args.projector is not None:
        load_projector(model.projector, args.projector)
    if args.save_projector:
        projector_names(model.projector)  # raises for one that could not be saved in the end
    if args.lora:
        add_adapter(model, args.lora, args.lora_alpha or 2 * args.lora, args.lora_dropout)
        model.train(args.lora_dropout > 0)  # nothing else in it asks whether it is trained
    return model


def make_trainable(model, stage, dtype, checkpoint_activations, device=None, processes=None):
    """Give what the stage trains float32 and gradients, and the rest dtype. Returns the trained parameters, their optimiser
    and the context in which a forward pass computes in dtype.

    The optimiser has a group of parameters for the projector and, in stage 2, one for the language model or its adapter.
    checkpoint_activations: the backward pass finds each block's input only, and runs the block again for all else
    (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
    processes: those that share what is trained; the model, until then on the CPU, goes to `device`. None: there is one.
    """
    processes = processes or Alone()
    adapter = [part for layer in adapted(model).values() for part in (layer.lora_A, layer.lora_B)]
    learners = [model.projector]
    if stage == 2:
        learners += adapter or [model.language_model]
    for module in learners:
        module.requires_grad_(True)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}

    done = set()
    for module in (*model.language_model.layers, model):  # block by block: whole in float32 each is large
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter not in done]
        for parameter in trained:  # float32: in 16 bits a step of the optimiser would round to nothing
            parameter.data = parameter.data.float().clone()
        if trained:
            # The embeddings stay float32: what is added to them block after block takes their type.
            processes.shard(module, frozen, device, torch.float32 if module is model else dtype)
        done |= {parameter for parameter in module.parameters() if parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(device, dtype)

    if checkpoint_activations:
        for block in model.language_model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameters, make_optimizer(model, parameters), autocast(model.device, dtype)


def make_optimizer(model, parameters):
    """AdamW without weight decay, as LLaVA has it, in groups that may have learning rates of their own."""
    projector = list(model.projector.parameters())
    of_projector = set(projector)
    rest = [parameter for parameter in parameters if parameter not in of_projector]
    groups = [{"params": group} for group in (projector, rest) if group]
    # One tensor after the other: all at once, as is usual on a GPU, would take 4 more bytes a parameter for a moment.
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, foreach=False)


def autocast(device, dtype):
    """The context in which float32 parameters compute in dtype."""
    if dtype == torch.float32:
        return nullcontext()
    # A pass uses each weight once: to keep its 16-bit copy for another use would only take memory.
    return torch.autocast(device.type, dtype, cache_enabled=False)


class GradientScaler:
    """Keeps small gradients of float16 from rounding to 0: the loss is multiplied by `scale` before the backward pass and the
    gradients are divided by it afterwards (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2).

    The scale is as large as it can be. A step whose gradients overflow is left out and halves it; 2,000 good ones double it. The
    norm of all gradients, the same in every process, shows an overflow in any. Only float16 wants this; other types have scale 1.
    """

    PATIENCE = 2000  # good steps before a larger scale is tried

    def __init__(self, dtype):
        self.wanted = dtype == torch.float16
        self.state = torch.tensor([2.0**16 if self.wanted else 1.0, 0.0], dtype=torch.float64)  # the scale, good steps since it changed

    @property
    def scale(self):
        return self.state[0].item()

    def unscale(self, parameters):
        if self.wanted:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)

    def fits(self, norm):
        """Whether a step with gradients of this norm may be taken. Adjusts the scale."""
        if not self.wanted:
            return True
        fits = bool(norm.isfinite())
        if not fits:
            self.state[0] /= 2
        self.state[1] = self.state[1] + 1 if fits else 0
        if self.state[1] == self.PATIENCE:
            self.state[0] *= 2
            self.state[1] = 0
        return fits


def trained_tensors(model, dtype, processes):
    """{name: the whole tensor, in dtype on the CPU} of what is trained, in the first process; the others get nothing. All must ask."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = processes.whole(parameter)
            if processes.rank == 0:
                tensors[name] = whole.to("cpu", dtype)
    return tensors
