"""nbval over the notebooks: progress bars and the HTML twin of a table are no part of the comparison."""

import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in the kernel they would be widgets among the outputs


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html")
