"""``asr-parity merge``: the reports of several machines about the same checkpoint and data as one."""

from __future__ import annotations

from pathlib import Path

import click

from asr_export.cli import handle_errors


@click.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_file", required=True, type=click.Path(path_type=Path), help="Write the merged report here.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write it here as one page.")
@handle_errors
def merge(reports: tuple[Path, ...], json_file: Path, html_file: Path | None) -> None:
    """Merge the JSON reports of several hosts into one."""
    from parity import merge as merging
    from parity import report

    merged = merging.merge([(str(file), merging.read(file)) for file in reports])
    report.write_json(json_file, merged)
    if html_file:
        from parity import page

        page.write_html(html_file, merged)
    click.echo(f"{json_file}: {len(merged['rows'])} rows of {len(merged['hosts'])} hosts")
