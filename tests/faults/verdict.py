"""What the person at the graph may be told: a sentence that says what to do. Anything else is a fault of ours."""

from __future__ import annotations

import re

# What we raise: ValueError and its kin, OSError and its kin. Never the types that Python or torch stumble with.
OURS = re.compile(r"(^|\.)(ValueError|CheckpointError|BadChunk|OSError|FileNotFoundError|PermissionError)$")
LONGEST = 5000
ADVICE = re.compile(
    r"\b(expected|must|connect|disconnect|load|set|choose|download|put|make|save|give|correct|take|write|shorten|"
    r"lengthen|switch|free|move|convert|repair|encode|remove|use|decode|run|leave|install|rename|replace|delete)\b",
    re.I,
)
RAW = re.compile(
    "|".join(
        (
            r"\w+Error\b|\bError:",  # KeyError('x'), RuntimeError: ...
            r"\[Errno",
            r"\bindex out of range|indices must be|object is not|object has no|has no attribute|not subscriptable",
            r"unsupported operand|'NoneType'|division by zero|takes \d+ positional|unexpected keyword|unhashable",
            r"not supported between|invalid literal|could not convert|cannot convert|argument of type|must be real",
            r"size mismatch|shapes? cannot|shape '\[|sizes? of tensor|mat1 and mat2|invalid for input|dimension",
            r"expected \w+ type|not implemented for|enforce fail|DefaultCPUAllocator|create a primitive",
            r"avcodec|libx264|Invalid argument|0x[0-9a-f]{6,}|<[\w.]+ object at|Traceback",
            r"surrogates not allowed|not enough values|too many values|maximum recursion",
        )
    )
)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def flaw(kind: str, message: str) -> str | None:
    """What is wrong with an error of this type (its full name) as something to tell a person; None if nothing is."""
    text = message.strip()
    if not OURS.search(kind):
        return "a bare error"
    if found := RAW.search(text):
        return f"words of a library ({found[0]!r})"
    if CONTROL.search(text):
        return "characters that cannot be shown"
    if len(text) > LONGEST:
        return f"{len(text)} characters"
    if len(text.split()) < 5 or not text.endswith((".", ".)")):
        return "no sentence"
    if not ADVICE.search(text):
        return "nothing to do"
    return None
