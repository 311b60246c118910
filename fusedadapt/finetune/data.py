"""Code search over the Python standard library: real (description, function) pairs that are on every machine.

A pair is the first paragraph of a function's docstring and the function's source without that docstring, its name replaced by ``f``
wherever it stands. Nothing is downloaded or cached; the same Python gives the same pairs in the same order on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import FinetuneError

# Tests describe themselves, the other folders are not the library or (site-packages) differ from machine to machine.
SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
HIDDEN = "f"
MIN_TEXT, MIN_CODE = 12, 40  # characters; below, a description or a body says nothing ("See above.", "pass")


@dataclass(frozen=True)
class Pair:
    """``text`` describes ``code``; ``name`` (module:function) is for people, no model sees it."""

    name: str
    text: str
    code: str

    @property
    def key(self) -> str:
        return hashlib.blake2b(f"{self.text}\0{self.code}".encode(), digest_size=16).hexdigest()


def library_files(root: Path | None = None, limit: int | None = None) -> list[Path]:
    """Source files of the standard library, sorted, at most ``limit``."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts[:-1]))
    if not files:
        raise FinetuneError(f"finetune: expected the sources of the standard library; {root} has no .py file; use a Python that ships them")
    return files[:limit]


def collect(files: list[Path]) -> list[Pair]:
    """All pairs of the files in file order; of equal texts or equal codes only the first is kept."""
    pairs, texts, codes = [], set(), set()
    for path in files:
        module = path.parent.name if path.stem == "__init__" else path.stem
        for pair in functions(module, path.read_text(encoding="utf-8", errors="replace")):
            if pair.text.casefold() not in texts and pair.code not in codes:
                texts.add(pair.text.casefold())
                codes.add(pair.code)
                pairs.append(pair)
    return pairs


def functions(module: str, source: str) -> Iterator[Pair]:
    """Pairs of one source text; a file this Python cannot parse (templates, bad-syntax samples) has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old library files
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    lines = [line + "\n" for line in source.split("\n")]  # not splitlines: it also breaks at form feeds, which the parser does not
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or re.fullmatch("__.*__", node.name):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2:
            continue
        text = " ".join(doc.split("\n\n")[0].split())
        code = hide(node, lines)
        if len(text) >= MIN_TEXT and len(code) >= MIN_CODE:
            yield Pair(f"{module}:{node.name}", text, code)


def hide(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Source of ``node`` without decorators, docstring and name. Offsets in the tree count UTF-8 bytes."""
    doc = node.body[0]
    assert node.end_lineno is not None and doc.end_lineno is not None and doc.end_col_offset is not None
    before = [*lines[node.lineno - 1 : doc.lineno - 1], lines[doc.lineno - 1].encode()[: doc.col_offset].decode().rstrip() + "\n"]
    rest = lines[doc.end_lineno - 1].encode()[doc.end_col_offset :].decode().strip("; \t\r\n")
    after = ([" " * doc.col_offset + rest + "\n"] if rest else []) + lines[doc.end_lineno : node.end_lineno]
    # Not textwrap.dedent: text inside a triple-quoted string may stand further left than the function.
    source = "".join(re.sub(rf"^ {{0,{node.col_offset}}}", "", line) for line in before + after if line.strip())
    return re.sub(rf"\b{re.escape(node.name)}\b", HIDDEN, source.rstrip())


def split(pairs: list[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held-out) by hash: independent of file order, and a pair added elsewhere moves no other across the border by much."""
    if len(pairs) <= 2 * held_out:
        raise FinetuneError(f"finetune: expected more than {2 * held_out} pairs; found {len(pairs)}; the standard library's sources seem incomplete")
    by_hash = sorted(pairs, key=lambda pair: pair.key)
    return by_hash[held_out:], by_hash[:held_out]


def digest(*parts: list[Pair]) -> str:
    """Fingerprint of the data: a resumed run must see the same pairs."""
    return hashlib.blake2b("".join(pair.key for part in parts for pair in part).encode(), digest_size=8).hexdigest()


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of batch ``step`` (from 0): epochs of a seeded shuffle, a pure function of the arguments. The rest of an epoch is dropped."""
    per_epoch = count // batch
    if per_epoch == 0:
        raise FinetuneError(f"finetune: expected --batch of at most {count} (the training pairs); got {batch}; use a smaller batch")
    epoch, position = divmod(step, per_epoch)
    order = list(range(count))
    random.Random(seed * 1_000_003 + epoch).shuffle(order)
    return order[position * batch : (position + 1) * batch]
