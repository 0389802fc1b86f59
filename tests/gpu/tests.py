"""The tests marked ``gpu``, in pytest; with ``--small`` on the CPU."""

from __future__ import annotations

import os
import sys

import pytest

from tests.gpu.section import Section


class _Outcomes:
    def __init__(self, section: Section) -> None:
        self.section = section

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Where the time is short, what starts processes is cut off first.
        items.sort(key=lambda item: "test_nccl" in item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            said = {} if report.passed else {"failed": str(report.longrepr)[-400:]}
            self.section.put(name=report.nodeid, outcome=report.outcome, seconds=report.duration, **said)


def main() -> None:
    """Run them."""
    section = Section()
    # Warnings are errors where versions are pinned; here they are whatever the image has.
    arguments = [
        "-m",
        "gpu",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-q",
        "--durations=10",
        "tests/gpu",
    ]
    if section.small:
        os.environ["GPU_TESTS_ON"] = "cpu"
    sys.exit(pytest.main(arguments, plugins=[_Outcomes(section)]))


if __name__ == "__main__":
    main()
