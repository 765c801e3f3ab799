"""What pytest is not to import when it looks for doctests, and which tests may run side by side."""

import pytest

# Programs that tests start.
collect_ignore = ["elastic_job.py", "flower_job", "grace_job.py"]

# Files whose tests start several processes each: one after the other, in one of pytest's workers.
PROCESSES = {
    "test_ddp",
    "test_exchange",
    "test_flower_benchmarks",
    "test_flower_engine",
    "test_grace",
    "test_horovod",
    "test_link",
    "test_uses",
}


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.path.stem
        group = "processes" if name in PROCESSES else name
        item.add_marker(pytest.mark.xdist_group(group))
