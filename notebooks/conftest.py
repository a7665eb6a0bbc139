"""nbval over the notebooks: their profile, and what is no part of the comparison (progress bars, a table as HTML)."""

import os
import tempfile
from pathlib import Path

from replication.commands.kernel import neutralise

neutralise(os.environ, Path(tempfile.mkdtemp()))


def pytest_addoption(parser):
    parser.addoption("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html")


def pytest_collection_modifyitems(config, items):
    profile = config.getoption("--profile", "mini")
    for cell in (item.cell for item in items if hasattr(item, "cell")):
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\nprofile = {profile!r}"
