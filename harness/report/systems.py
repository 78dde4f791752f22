"""Pages of the rebuilt systems and of the claims, systems/*.md of a results folder, each with its picture."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from castpoint.harness.report import claims, engine, four_bit, jax, parallel

SECTION = "The systems of five reports"
# name -> a module with page(folder), Markdown of the newest run, drawing its picture into plots/, empty without rows;
# and HEADING and headline(folder), a sentence with the figure that a reader of ten seconds wants.
PAGES: dict[str, ModuleType] = {
    "claims": claims,
    "parallel": parallel,
    "jax": jax,
    "engine": engine,
    "four-bit": four_bit,
}


def section(folder: Path) -> str:
    """Of report.md, after writing every page; empty where no system was studied."""
    lines = []
    for name, module in PAGES.items():
        if text := module.page(folder):
            path = folder / "systems" / f"{name}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.rstrip() + "\n")
            lines.append(f"- **[{module.HEADING}](systems/{name}.md)**: {module.headline(folder)}")
    return f"## {SECTION}\n\n" + "\n".join(lines) if lines else ""
