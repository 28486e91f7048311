"""This process alone, or among those that torchrun started: a command asks both for the same things.

What PyTorch has for several takes longer to import than all else, and some builds lack it (AMD's for Windows, NVIDIA's for
Jetson). So hardware/parallel.py is imported only where torchrun has started several processes. Imports nothing of ours but that.
"""

import os
import signal

from hardware.device import choose_device


def are_several():
    """Whether torchrun started this process together with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"


def processes():
    """The `Processes` that torchrun started, or `Alone`."""
    if not are_several():
        return Alone()
    from hardware.parallel import Processes

    return Processes()


class Alone:
    """One process. Each method does what the method of the same name in `hardware.parallel.Processes` does for several."""

    rank, size = 0, 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def silence_others(self):
        pass

    def device(self, name):
        return choose_device(name)

    def first_says(self, number):
        return number

    def total(self, number):
        return number

    def anyone(self, flags):
        return flags

    def raise_together(self, error):
        if error is not None:
            raise error

    def first_makes(self, make):
        make()

    def shard(self, module, frozen, device, dtype):
        pass

    def exchange_gradients(self, model, now):
        pass

    def reshard(self, model):
        pass

    def own_rows(self, tensor):
        return tensor, 0

    def whole(self, parameter):
        return parameter.detach()


class Interrupts:
    """While it lasts, Ctrl-C sets `asked` and ends nothing, so that a step can be finished and saved. A second one ends a single
    process at once; of several, each may hear the first one twice: from the terminal, and from torchrun."""

    def __init__(self, size):
        self.size, self.asked = size, False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def ask(self, *_):
        if self.asked and self.size == 1:
            raise KeyboardInterrupt
        self.asked = True


def ignore_interrupts(*_):
    """For a process that reads pictures: the one that computes still needs them for the step under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
