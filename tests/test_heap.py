"""What a pass frees, the next one takes: counted in pages that the system had to give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from flexctl import heap

PROGRAM = """
import json, re, resource
from pathlib import Path
from flexctl.heap import reusing_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

def passes(number):
    before = faults()
    for _ in range(number):
        large, small = bytearray(40 << 20), bytearray(8 << 20)
        large[:] = b"1" * len(large)
        del large, small
    return faults() - before

passes(1)
usual, before = passes(4), resident()
with reusing_memory():
    with reusing_memory():
        passes(1)
    inside, held = passes(4), resident()
print(json.dumps([usual, inside, held - before, resident() - before, passes(4)]))
"""

PAGES_OF_A_PASS = (40 << 20) // 4096


def pages(**environment: str) -> list[int]:
    """Return page faults before and inside, MiB more inside and afterwards, page faults afterwards."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**plain, **environment}
    )
    figures: list[int] = json.loads(done.stdout)
    return figures


@pytest.mark.skipif(sys.platform != "linux" or heap._glibc() is None, reason="needs glibc's malloc as it comes")
def test_inside_no_page_is_given_twice_and_afterwards_they_are_given_back() -> None:
    usual, inside, more_inside, more_afterwards, afterwards = pages()
    assert usual > 4 * PAGES_OF_A_PASS
    assert inside < PAGES_OF_A_PASS / 10
    assert more_inside >= 40
    assert more_afterwards <= 4
    assert afterwards > 4 * PAGES_OF_A_PASS


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")],
)
def test_thresholds_that_somebody_has_set_stay_as_they_are(name: str, value: str) -> None:
    usual, inside, more_inside, _, _ = pages(**{name: value})
    assert inside > 0.9 * usual
    assert more_inside <= 4


@pytest.mark.parametrize(
    ("name", "value", "stays"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000", True),
        ("MALLOC_MMAP_MAX_", "0", True),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.top_pad=9", True),
        ("MALLOC_ARENA_MAX", "2", False),
        ("MALLOC_CONF", "background_thread:true", False),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2", False),
    ],
)
def test_what_counts_as_set(name: str, value: str, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in [each for each in os.environ if each.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(each)
    if heap._glibc() is None:
        pytest.skip("needs glibc")
    monkeypatch.setenv(name, value)
    assert (heap._glibc() is None) == stays


def test_the_last_to_leave_sets_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> None:
            told.append((name, value))

        def malloc_trim(self, kept: int) -> None:
            told.append((0, kept))

    monkeypatch.setattr(heap, "_glibc", Library)
    entered, leave = threading.Event(), threading.Event()

    @heap.reusing_memory()
    def other() -> None:
        entered.set()
        leave.wait(10)

    @heap.reusing_memory()
    def fails() -> None:
        thread.start()
        assert entered.wait(10)
        raise KeyError

    thread = threading.Thread(target=other)
    with pytest.raises(KeyError):
        fails()
    assert told == [(heap._MMAP_MAX, 0), (heap._TRIM_THRESHOLD, -1)]
    leave.set()
    thread.join()
    assert told[2:] == [*heap._USUAL.items(), (0, 0)]
