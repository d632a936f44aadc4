"""Commands on what is stored: results that travel, and disk that can be had back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

_Results = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Folder of all results.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_DEFAULT = Path("results")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("import")(import_folder)
    app.command("export-results")(export_results)
    app.command("gc")(gc)


def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder, or what export-results wrote.")],
    results: _Results = _DEFAULT,
    as_json: _Json = False,
) -> int:
    """Merge results made elsewhere, checksums and keys verified, as if they had been made here."""
    from dataclasses import asdict

    from fffsweep.sweeps.import_results import import_results, to_lines

    imported = import_results(folder, results)
    if as_json:
        print(json.dumps({"schema": "fffsweep.import/1", **asdict(imported)}, indent=1))
    else:
        print("\n".join(to_lines(imported)))
    return 1 if imported.problems else 0


def export_results(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    without_weights: Annotated[
        bool, typer.Option("--without-weights", help="Leave tensors and prepared data behind; the manifests say so.")
    ] = False,
    results: _Results = _DEFAULT,
) -> None:
    """Write a study's record and results to a folder that `fffsweep import` reads elsewhere."""
    from fffsweep.sweeps.import_results import export_results as export

    num_runs = export(study, results, folder, without_weights)
    print(f"{num_runs} stage runs of {study} in {folder}{', without their weights' if without_weights else ''}")


def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is shown.")] = False,
    unused: Annotated[bool, typer.Option("--unused", help="Also results that no study refers to.")] = False,
    results: _Results = _DEFAULT,
    as_json: _Json = False,
) -> None:
    """Show what of the results folder can go; with --yes, delete it. Results, and checkpoints of unfinished stage runs, stay."""
    from fffsweep.sweeps.gc import collect, find

    found = collect(results, unused) if yes else find(results, unused)
    num_bytes = sum(entry.num_bytes for entry in found)
    if as_json:
        rows = [{"path": str(entry.path), "num_bytes": entry.num_bytes, "why": entry.why} for entry in found]
        print(json.dumps({"schema": "fffsweep.gc/1", "deleted": yes, "num_bytes": num_bytes, "found": rows}, indent=1))
        return
    for entry in found[:20]:
        print(f"{entry.num_bytes / 1e6:10.1f} MB  {entry.why}: {entry.path}")
    if len(found) > 20:
        print(f"and {len(found) - 20} more: " + ", ".join(f"{n} {why}" for why, n in Counter(e.why for e in found[20:]).items()))
    what = f"{len(found)} files and folders, {num_bytes / 1e6:.1f} MB"
    print(f"deleted {what}" if yes else f"{what}: --yes deletes them" if found else "nothing to delete")
