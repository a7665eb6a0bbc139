"""The command line of the method: `python -m writesae check MODEL` examines a model before any work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable


def texts(path: str | None) -> Iterable[str]:
    """Return the documents of a corpus, by default the topics of Python's own reference."""
    if path:
        from writesae.text import Corpus

        return Corpus(path=path).documents()
    from pydoc_data.topics import topics

    return topics.values()


def check(options: argparse.Namespace) -> int:
    import torch
    import transformers

    from writesae.evaluate.check import examine
    from writesae.hosts.load import load_host
    from writesae.text import cut_windows

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    places = dict(device=options.device, device_map=options.device_map)
    host = load_host(options.model, dtype=dtype, tokenizer=options.tokenizer, **places)
    beginnings = (text[: 8 * options.length] for text in texts(options.text))  # a window or two of each text
    windows = cut_windows(host.tokenizer, beginnings, options.length, options.windows)
    examination = examine(host, windows, options.cells)
    print(examination)
    if options.out:
        written = examination.save(options.out)
        print(f"\nWritten: {', '.join(map(str, written))}")
        if len(written) == 1:
            print("There is no figure, since matplotlib is not installed: pip install 'writesae[check]'.")
    return 0 if examination.passed else 1


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m writesae", description="The method, on any model.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    line = "examine a model: is it supported and computed rightly, which cells are worth an SAE, what will it take"
    command = commands.add_parser("check", help=line, description=f"{line[0].upper()}{line[1:]}.")
    command.add_argument("model", metavar="MODEL", help="a folder, or an id of the Hub")
    command.add_argument("--out", help="a folder for check.json and check.png")
    command.add_argument("--text", help="text to run: a .jsonl, a folder of .txt (default: Python's reference)")
    command.add_argument("--tokenizer", help="a folder or Hub id, for models without a tokenizer")
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    command.add_argument("--device-map", help="auto: spread the model over all GPUs (needs accelerate)")
    command.add_argument("--windows", type=int, default=4, help="windows of text (default: %(default)s)")
    command.add_argument("--length", type=int, default=256, help="tokens per window (default: %(default)s)")
    command.add_argument("--cells", type=int, help="cells to examine (default: as many as take about a minute)")
    return main


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a comparison of this project differs or after an error, else 0."""
    options = parser().parse_args(arguments)
    try:
        return check(options)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"check failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
