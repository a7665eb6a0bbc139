"""nbval over the notebooks: progress bars and the HTML twin of a table are no part of the comparison."""

import os
import tempfile
from pathlib import Path

from replication.commands.kernel import neutralise

neutralise(os.environ, Path(tempfile.mkdtemp()))


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html")
