"""Test that a run survives kill -9: `python tests/kill_run.py --kills 20 --pages 00_hosts,01_harvest`.

The test uses two clones of the last commit in a scratch folder. In the first, `make` runs the pages
undisturbed. In the second, it is killed at random moments (seeded) and restarted at once, until it finishes.
Half of the kills hit all processes; the others hit only the process group of make, and the kernel of the
notebook lives a moment longer. After each kill, every table under results/ must have a valid sidecar. At the
end, every table must equal that of the undisturbed run (except times), and no unfinished file may be left.
tests/records/kill_run.csv has one row per kill.

An undisturbed run of the same commit in the scratch folder is reused. With `--reference` its tables come from
another folder: `--profile mini --mean 90 --reference results/mini` tests `make all` against the committed
tables, in 50 minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import yaml

from replication.commands.order import notebooks
from replication.commands.verify import verify
from replication.study.paths import ROOT
from replication.study.stages import write_table
from writesae.files import ArtifactError, read_sidecar

REFUSED = "Another run with this profile is at work"


def clone(folder: Path) -> None:
    """Clone the last commit into `folder`, unless it is already there."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    git = ["git", "-C", folder]
    if folder.exists():
        there = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        if there == commit:
            return
        shutil.rmtree(folder)
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    subprocess.run([*git, "checkout", "-q", commit.strip()], check=True)


def keep_main_host(profile: Path) -> None:
    """Remove all hosts except the first from a profile."""
    content = yaml.safe_load(profile.read_text())
    content["hosts"] = dict(list(content["hosts"].items())[:1])
    profile.write_text(yaml.safe_dump(content, sort_keys=False))


def start(folder: Path, profile: str, pages: list[str], log: Path) -> subprocess.Popen:
    """Start `make` in a new process session."""
    handed_down = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "WRITESAE_OUTPUT")
    environment = {k: v for k, v in os.environ.items() if k not in handed_down} | {"PYTHONPATH": str(folder)}
    command = ["make", f"PROFILE={profile}", f"PY={sys.executable}", *pages]
    with open(log, "w") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill(process: subprocess.Popen, everything: bool) -> None:
    """Kill the process group of make and, if `everything`, also the kernel and its workers."""
    below = psutil.Process(process.pid).children(recursive=True) if everything else []
    os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        if child.is_running():
            child.kill()
    process.wait()


def tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.csv"))


def half_written(folder: Path) -> list[str]:
    """Return the names of the tables without a valid sidecar."""
    invalid = []
    for path in tables(folder):
        try:
            read_sidecar(path)
        except ArtifactError:
            invalid.append(path.name)
    return invalid


def tables_of_pages(folder: Path, profile: str) -> list[Path]:
    """Return the paths of the tables that all pages together make."""
    names = {name.format(profile=profile) for page in notebooks(folder).values() for name in page.makes}
    return sorted(folder / name for name in names if name.endswith(".csv"))


def page_of(log: Path) -> str:
    """Return the page that was running, from the log of make."""
    return (re.findall(r"^(\d\d_\w+) \(\w+\)$", log.read_text(), re.MULTILINE) or ["make"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill `make` at random moments and compare its tables.")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--pages", default="all", help="targets of make, separated by commas (default: %(default)s)")
    parser.add_argument(
        "--main-host", action="store_true", help="run only the first host of the profile (a third of the time)"
    )
    parser.add_argument("--reference", type=Path, help="tables of an undisturbed run (default: do one)")
    parser.add_argument(
        "--after", help="a page to finish before the first kill (00_hosts reads the corpus at each start)"
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--mean", type=float, default=30, help="mean seconds from a start to a kill (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "kill_run")
    parser.add_argument("--record", type=Path, default=ROOT / "tests" / "records" / "kill_run.csv")
    given = parser.parse_args()
    pages, draw, began = given.pages.split(","), random.Random(given.seed), time.monotonic()
    calm, killed = (given.scratch.resolve() / name for name in ("calm", "killed"))
    log = given.scratch.resolve() / "make.log"
    wanted = given.reference.resolve() if given.reference else calm / "results" / given.profile
    shutil.rmtree(killed, ignore_errors=True)
    for folder in [killed] if given.reference else [calm, killed]:
        clone(folder)
        if given.main_host:
            keep_main_host(folder / "profiles" / f"{given.profile}.yaml")
    for path in tables_of_pages(killed, given.profile):  # the clone has committed tables
        path.unlink(missing_ok=True)
    if not given.reference and start(calm, given.profile, pages, log).wait():
        print(f"The undisturbed run failed:\n{log.read_text()}", file=sys.stderr)
        return 1
    if given.after and start(killed, given.profile, [given.after], log).wait():
        print(f"{given.after} failed:\n{log.read_text()}", file=sys.stderr)
        return 1
    lines, rounds, failures = [], 0, []
    while True:
        process, at = start(killed, given.profile, pages, log), time.monotonic()
        try:
            code = process.wait(draw.uniform(0, 2 * given.mean) if len(lines) < given.kills else None)
        except subprocess.TimeoutExpired:
            seconds, everything = time.monotonic() - at, draw.random() < 0.5
            kill(process, everything)
            results = killed / "results" / given.profile
            bad = half_written(results)
            lines.append(
                dict(
                    kill=len(lines) + 1,
                    page=page_of(log),
                    seconds=seconds,
                    killed="all processes" if everything else "process group",
                    tables=len(tables(results)),
                    half_written=" ".join(bad) or "none",
                )
            )
            print(lines[-1], flush=True)
            continue
        if code and REFUSED in log.read_text():
            print("refused: the kernel of the killed run is still at work", flush=True)
            continue
        if code:
            failures.append(f"make failed:\n{log.read_text()}")
            break
        report, rounds = verify(wanted, killed / "results" / given.profile, [], exact=True), rounds + 1
        print(report, flush=True)
        left = [str(path) for path in killed.rglob(".partial-*")]
        failures += ["the tables differ from those of the undisturbed run"] if report.failures else []
        failures += [f"left over: {', '.join(left)}"] if left else []
        wanted_tables = tables_of_pages(killed, given.profile) if given.pages == "all" else []
        missed = [path.name for path in wanted_tables if not path.is_file()]
        failures += [f"not made by this run: {', '.join(missed)}"] if missed else []
        if len(lines) >= given.kills or failures:
            break
        for folder in (
            killed / "build",
            killed / "results" / given.profile,
        ):  # it finished before the last kill: run again
            shutil.rmtree(folder)
    failures += [f"half-written after kill {x['kill']}" for x in lines if x["half_written"] != "none"]
    told = dict(pages=given.pages, main_host=given.main_host, kills=len(lines), rounds=rounds, failures=failures)
    provenance = dict(profile=given.profile, config=given.pages, host="all", seed=given.seed)
    write_table(pd.DataFrame(lines), given.record, provenance | told | dict(seconds=time.monotonic() - began))
    print(
        "\n".join(failures)
        or f"{len(lines)} kills, {rounds} complete runs; every table equals that of the undisturbed run"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
