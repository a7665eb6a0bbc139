"""Run every benchmark in a process of its own, then draw the figure: `make bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ORDER = """
    storage training_step harvest_speed short_convolution replacement closed_form attribution many_cells
    growth gpu plan figure
"""

for name in ORDER.split():
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *sys.argv[1:]], check=True)
