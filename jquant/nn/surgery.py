"""Surgery by path: replaces the modules that a pattern names, once each, wherever they are shared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from flax import nnx

from jquant.core.errors import InputError

Path = str  # "blocks.0.attn.q_proj"


def named_modules(
    model: nnx.Module, kind: type[nnx.Module] | tuple[type[nnx.Module], ...]
) -> Iterator[tuple[Path, nnx.Module]]:
    """Every module of the kind with its dotted path, in the model's order; a shared one under its first path."""
    seen: set[int] = set()
    for path, module in nnx.iter_graph(model):
        if isinstance(module, kind) and id(module) not in seen:
            seen.add(id(module))
            yield ".".join(str(part) for part in path), module


def select(paths: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The paths that a pattern matches, in their own order.

    A pattern is a regular expression searched for in the path, as in r"attn\\.[qkv]_proj$".

    Raises:
        InputError: a pattern is malformed or matches nothing.
    """
    chosen: set[Path] = set()
    for pattern in patterns:
        matching = matches(pattern, paths)
        if not matching:
            shown = ", ".join(paths[:8]) + (", …" if len(paths) > 8 else "")
            raise InputError(f"layer pattern '{pattern}' matches nothing; there are {len(paths)} layers: {shown}")
        chosen.update(matching)
    return [path for path in paths if path in chosen]


def matches(pattern: str, paths: Sequence[Path]) -> list[Path]:
    """The paths in which a regular expression is found. Raises InputError where it is none."""
    try:
        return [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise InputError(f"layer pattern '{pattern}' is no regular expression: {error}") from None


def first_matches(rules: Sequence[Sequence[str]], paths: Sequence[Path]) -> dict[Path, int]:
    """Of every path that a rule's patterns match, the first such rule, in the order of the paths.

    Raises:
        InputError: a pattern matches nothing, or a rule is never the first to match: it would do nothing.
    """
    first: dict[Path, int] = {}
    for index, patterns in enumerate(rules):
        matching = select(paths, patterns)
        left = [path for path in matching if path not in first]
        if not left:
            raise InputError(
                f"rule {', '.join(patterns)}: earlier rules take all {len(matching)} layers that it matches; "
                "put it before them, or leave it out"
            )
        first |= dict.fromkeys(left, index)
    return {path: first[path] for path in paths if path in first}


def replace(model: nnx.Module, replacements: dict[Path, nnx.Module]) -> None:
    """Puts the given modules at the given paths, in place; a module shared by several paths is replaced for all.

    Raises:
        InputError: a path names no module of the model.
    """
    by_identity = {id(module_at(model, path)): module for path, module in replacements.items()}
    for _, parent in list(nnx.iter_graph(model)):
        if not isinstance(parent, nnx.Module):
            continue
        for name, child in list(vars(parent).items()):
            if id(child) in by_identity:
                setattr(parent, name, by_identity[id(child)])
        if isinstance(parent, nnx.List):
            for index, child in enumerate(parent):
                if id(child) in by_identity:
                    parent[index] = by_identity[id(child)]


def module_at(model: nnx.Module, path: Path) -> nnx.Module:
    """The module at a dotted path. Raises InputError where there is none."""
    node: object = model
    for part in path.split("."):
        try:
            node = node[int(part)] if isinstance(node, nnx.List) else getattr(node, part)
        except (AttributeError, IndexError, ValueError):
            raise InputError(f"no module at {path!r}: {part!r} is not in {type(node).__name__}") from None
    if not isinstance(node, nnx.Module):
        raise InputError(f"{path!r} is a {type(node).__name__}, not a module")
    return node
