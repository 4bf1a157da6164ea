"""Whatever is spoilt, a person at the graph reads a sentence that says what to do, or gets a right result."""

import math
import os

import pytest

from faults.verdict import flaw
from faults.watch import fuzz
from harness.tiny import make_official_folder

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # 0: CASES, which are the same on every machine
CASES = 150
SEED = os.environ.get("FUZZ_SEED", "helios")
FAMILY = os.environ.get("FUZZ_FAMILY")  # such as sockets
CASE = os.environ.get("FUZZ_CASE")  # one case of a seed again
AGAIN = "FUZZ_SEED={} FUZZ_CASE={} make fuzz"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "Helios-Good"
    make_official_folder(folder, "distilled", shards=True)  # with index files, as the published ones
    return folder


@pytest.mark.timeout(SECONDS + 900)
def test_every_fault_ends_in_a_sentence_or_a_right_result(good):
    if CASE:
        report = fuzz(good, SEED, 600, first=int(CASE), last=int(CASE))
    elif SECONDS:
        report = fuzz(good, SEED, SECONDS, family=FAMILY)
    else:
        report = fuzz(good, SEED, math.inf, family=FAMILY, last=CASES - 1)
    print(f"{report.cases} cases of seed {SEED!r}")
    faults = "\n".join(f"{fault}\n    again: {AGAIN.format(SEED, n)}" for n, fault in sorted(report.faults.items()))
    assert not report.faults, f"{len(report.faults)} of {report.cases} cases:\n{faults}"
    assert report.cases >= (1 if CASE else 10)


@pytest.mark.timeout(900)
def test_planted_faults_are_found(good):
    report = fuzz(good, SEED, 1e9, planted=True, last=5, hang=2)
    assert set(report.faults) == {0, 1, 2, 3, 4}
    assert "a bare error: KeyError" in report.faults[0]
    assert "hangs for more than" in report.faults[1]
    assert "MiB" in report.faults[2]
    assert "the process ends with -7" in report.faults[3]
    assert "the next good graph gives other latents" in report.faults[4]


SENTENCES = (
    ("ValueError", "`fps` is NaN; expected a number from 1 to 120. Correct the widget."),
    ("OSError", "There is no room for the video in /tmp (No space left on device). Free some space and run it again."),
    ("comfyui_helios.helios_core.safetensors_file.CheckpointError", "x.safetensors is empty. Download it again."),
)
NO_SENTENCES = {
    "a bare error": ("KeyError", "'samples'"),
    "words of a library": ("ValueError", "Sizes are wrong: tuple index out of range. Download it again."),
    "characters that cannot be shown": ("ValueError", "The file \x1b[31m cannot be read. Download it again."),
    "5001 characters": ("ValueError", "x" * 5001),
    "no sentence": ("ValueError", "expected a number"),
    "nothing to do": ("ValueError", "The file is not what it should be."),
}


@pytest.mark.parametrize("kind, message", SENTENCES)
def test_a_sentence_that_says_what_to_do_passes(kind, message):
    assert flaw(kind, message) is None


@pytest.mark.parametrize("expected", NO_SENTENCES)
def test_anything_else_is_a_fault(expected):
    assert flaw(*NO_SENTENCES[expected]).startswith(expected)
