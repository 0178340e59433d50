"""Hooks of mkdocs: pages link to pictures and records outside docs/, as a forge shows them; the site gets copies.

A link that leaves docs/ leads, on the site, to a copy of the file; one to a folder becomes plain text.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")
COPIES = "files"


def on_files(files: Files, config: Any) -> Files:
    """Adds what the pages link to outside docs/."""
    pages = [file for file in files if file.src_uri.endswith(".md")]
    outside = {found[3] for page in pages for found in OUTSIDE.finditer(page.content_string)}
    for path in sorted(outside):
        if (ROOT / path).is_file():
            files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_given: Any) -> str:
    """Turns those links to the copies."""

    def copied(found: re.Match[str]) -> str:
        mark, text, path = found[1], found[2], found[3]
        return f"{mark}[{text}]({COPIES}/{path})" if (ROOT / path).is_file() else text

    return OUTSIDE.sub(copied, markdown)
