"""What the tests of checkpoints and of scripts/convert_checkpoint.py share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import make_official_shards
from support.scripts import as_module


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The program, as a module."""
    with as_module("convert_checkpoint") as module:
        yield module


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an official repository."""
    folder = tmp_path_factory.mktemp("official")
    make_official_shards(folder)
    return folder
