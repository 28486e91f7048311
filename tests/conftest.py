import sys

import pytest
import torch

from chat import Chat

torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first


@pytest.fixture(scope="session")
def bundled():
    return Chat.from_pretrained("tiny/llava", dtype=torch.float32)


@pytest.fixture
def chat(bundled):
    """The bundled model in a conversation, and with a cache, of its own."""
    return Chat(bundled.model, bundled.tokenizer, bundled.processor)


@pytest.fixture(autouse=True)
def what_was_compiled_is_forgotten():
    """torch.compile keeps few variants of a function, and those of one test would count in the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
