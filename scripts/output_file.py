"""What the converters share: the file they make, which is there whole or not at all, and how they end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from helios_core.regular_file import CheckpointError, put_in_place


def check_target(target: Path, force: bool) -> None:
    """Raise CheckpointError where the file cannot or must not be made; force: it may be there."""
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target} must end in .safetensors, or ComfyUI does not list it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"The folder {target.parent} does not exist. Make it, or choose another target.")
    check_unused(target, force)


def check_unused(file: Path, force: bool) -> None:
    """Raise CheckpointError where there is such a file; force: it may be there."""
    if not file.exists():
        return
    if not force:
        raise CheckpointError(f"{file} exists. Choose another name, or overwrite it with --force.")
    try:
        os.replace(file, file)  # does nothing, but on Windows, where another program has it open, it fails
    except PermissionError as error:
        raise CheckpointError(
            f"{file} cannot be overwritten ({error.strerror}): a program may have it open, as ComfyUI has the models "
            "that it has loaded. End that, or choose another name."
        ) from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to: what is there takes the target's place when the context ends, and is gone after an error."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield partial
        put_in_place(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def run(convert: Callable[[], str]) -> int:
    """Convert and say what was made, or why nothing was; returns the program's exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # which, into a file on Windows, takes few of the letters in names
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(convert())
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was left behind", file=sys.stderr)
        return 130
    return 0
