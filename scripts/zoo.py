"""Write the tables of docs/zoo.md from rubiks/evaluation/zoo.csv: python scripts/zoo.py"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "rubiks/evaluation/zoo.csv"
DOCUMENT = ROOT / "docs/zoo.md"
FOLDERS = {"ssv2": "/data/ssv2", "kinetics": "/data/k400"}
START, END = "<!-- tables: written by scripts/zoo.py -->", "<!-- end of tables -->"


def read() -> list[dict[str, str]]:
    """The rows of the CSV, by column."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def command(row: dict[str, str]) -> str:
    """The command that evaluates a row's network under its protocol."""
    data = row["data"]
    return f"rubiks eval data={data} data.root={FOLDERS[data]} protocol={row['protocol']} ckpt={row['file']}"


def experiment(row: dict[str, str]) -> str:
    """The preset that trains a row's network."""
    return f"{row['data']}_{row['tier']}{'_aq' if row['budget'] else ''}"


def tables(rows: list[dict[str, str]]) -> str:
    """The networks under their protocols, and their files."""
    lines = [
        "| data | tier | variant | protocol | published top-1 / top-5 | measured here | command |",
        "|---|---|---|---|---|---|---|",
    ]
    files = ["| file | to train it | SHA-256 | Git's hash |", "|---|---|---|---|"]
    for row in rows:
        variant = row["variant"] + (f", budget {row['budget']}" if row["budget"] else "")
        accuracy = f"{row['top1']} / {row['top5']}" if row["top1"] else "not stated in the sources"
        cells = [row["data"], row["tier"], variant, row["protocol"], accuracy, row["measured"] or "not measured"]
        lines.append(f"| {' | '.join(cells)} | `{command(row)}` |")
        sha256 = row["sha256"] or "not known"
        line = f"| {row['file']} | `experiment={experiment(row)}` | {sha256} | {row['git_blob']} |"
        if line not in files:
            files.append(line)
    return "\n".join([*lines, "", *files])


def with_tables(document: str, rows: list[dict[str, str]]) -> str:
    """The document with its tables replaced."""
    before, after = document.split(START)[0], document.split(END)[1]
    return f"{before}{START}\n\n{tables(rows)}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), read()), encoding="utf-8")
