"""The device that tests of a card run on: the CPU where there is none, which rehearses them."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Torch allows TensorFloat-32 in convolutions, which has the range of float32 and the precision of float16."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
