"""The results as a research object (RO-Crate 1.1): what each table is, and which code, profile and seed made it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from replication.study.paths import ROOT

NAME = "ro-crate-metadata.json"
PAPER = "https://arxiv.org/abs/2605.12770"
PUBLISHED = ("bench", "full", "host-seeds", "mini")  # the numbers of smoke mean nothing


def crate(results: Path) -> dict:
    """Return the metadata of all tables in the folders PUBLISHED of `results`, from their sidecars."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tables = [path for folder in PUBLISHED for path in sorted(results.glob(f"{folder}/*.csv"))]
    records = {path: json.loads(Path(f"{path}.json").read_text(encoding="utf-8")) for path in tables}
    files = [
        {
            "@id": path.relative_to(results).as_posix(),
            "@type": "File",
            "encodingFormat": "text/csv",
            "contentSize": str(path.stat().st_size),
            "sha256": record["sha256"],
            "dateCreated": record["created"],
            "description": f"{record['rows']} rows; profile {record['profile']}, seed {record['seed']}, host {record['host']}",
            "version": record["commit"],
        }
        for path, record in records.items()
    ]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": "WriteSAE, replicated: results",
        "description": project["description"],
        "license": {"@id": "https://spdx.org/licenses/MIT"},
        "datePublished": max(record["created"] for record in records.values()),
        "version": project["version"],
        "isBasedOn": {"@id": PAPER},
        "hasPart": [{"@id": file["@id"]} for file in files],
    }
    about = {"@id": NAME, "@type": "CreativeWork", "about": {"@id": "./"}}
    about["conformsTo"] = {"@id": "https://w3id.org/ro/crate/1.1"}
    paper = {"@id": PAPER, "@type": "ScholarlyArticle", "name": "WriteSAE: Sparse Autoencoders for Recurrent State"}
    graph = [about, root, paper, *files]
    return {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": graph}


def write_crate(results: Path) -> None:
    text = json.dumps(crate(results), indent=1, ensure_ascii=False)
    (results / NAME).write_text(text + "\n", encoding="utf-8")
