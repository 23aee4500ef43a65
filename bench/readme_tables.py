"""Render every measured figure of README.md and docs/papers.md, and the text beside each result, from the results.

    python bench/readme_tables.py            # names what differs, and fails if anything does
    python bench/readme_tables.py --write    # puts it right

A document has blocks between `<!-- figures: NAME -->` and `<!-- end -->`, and `readme_blocks.BLOCKS` says what stands
in each. A row that is marked `later` is left out, and named, until its result is recorded.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from figures import RESULTS, ROOT, MissingError, Prose, Table, read
from readme_blocks import BLOCKS

TEXTS = {
    "adapters_cpu": "bench_adapters",
    "batcher": "bench_batcher",
    "compile_cpu": "bench_compile",
    "demo_cpu": "bench_demo",
    "demo_small_cpu": "bench_demo",
    "int8": "int8_distance",
    "ipo_md_step_cpu": "bench_train",
    "kernels_cpu": "bench_kernels",
    "one_chip": "one_chip",
    "packing_cpu": "bench_packing",
    "pairs_cpu": "bench_pairs",
    "peers_cpu": "bench_peers",
    "rounding": "rounding",
    "tpu_compiled": "tpu_report",
}
"""The module whose `text` writes the Markdown of each result, recorded or not yet."""


def rows(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{' --- |' * len(table.columns)}"
    for row in table.rows:
        try:
            yield f"| {' | '.join([row.what, *(''.join(map(str, cell)) for cell in row.cells)])} |"
        except MissingError:
            if not row.later:
                raise


def unrecorded() -> list[str]:
    """Rows that are left out until their result is recorded."""
    missing = []
    for table in (block for block in BLOCKS.values() if isinstance(block, Table)):
        for row in table.rows:
            try:
                [str(part) for cell in row.cells for part in cell]
            except MissingError as error:
                missing.append(f"{row.what}: nothing at {error}")
    return missing


def rendered(name: str) -> str:
    block = BLOCKS[name]
    if isinstance(block, Table):
        return "\n".join(rows(block))
    return "".join(map(str, block.parts)) if isinstance(block, Prose) else block()


MARKED = re.compile(r"<!-- figures: ([\w-]+) -->(\n?)(.*?)\n?<!-- end -->", re.DOTALL)


def filled(document: str) -> str:
    """A document with every block as the results have it: on lines of its own, or within a sentence."""

    def fill(found: re.Match[str]) -> str:
        name, newline, _ = found.groups()
        text = rendered(name)
        if newline and isinstance(BLOCKS[name], Prose):
            text = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
        return f"<!-- figures: {name} -->{newline}{text}{newline}<!-- end -->"

    return MARKED.sub(fill, document)


def documents() -> Iterator[tuple[Path, str]]:
    """Every file that is written here, and what it should hold."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield path, filled(path.read_text(encoding="utf-8"))
    for result, module in TEXTS.items():
        if not (RESULTS / f"{result}.json").exists():
            continue
        yield RESULTS / f"{result}.md", import_module(module).text(read(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put right what differs")
    options = parser.parse_args()
    differs = [(path, text) for path, text in documents() if path.read_text(encoding="utf-8") != text]
    for path, text in differs:
        print(f"{path.relative_to(ROOT)} {'written' if options.write else 'differs from the results'}")
        if options.write:
            path.write_text(text, encoding="utf-8")
    print("\n".join(f"left out, not recorded yet: {row}" for row in unrecorded()))
    return 1 if differs and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
