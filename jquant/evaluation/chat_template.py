"""A conversation in the words of a model's own chat template.

Templates are Jinja with what Hugging Face adds for them: `raise_exception`, `strftime_now`, a `tojson` that escapes no
HTML, `break` and `continue`, and `{% generation %}`, which marks what to train on and shows nothing here. They come
with checkpoints, from anybody: they run in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jquant.core.errors import InputError
from jquant.io.tokenizer import one_line

_MARK = "«the message goes on here»"  # stands where a last message ends


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], *, to_answer: bool, bos_token: str = "", eos_token: str = ""
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: each a role and its content.
        to_answer: whether the model's answer begins after the last message. Otherwise that message is its own
            beginning of an answer and is left open, without what the template writes after a message.
        bos_token: text of the token that templates name so.
        eos_token: likewise.

    Raises:
        InputError: the template is damaged, refuses the conversation, or changes a message that is to be left open.
        ImportError: jinja2 is missing.
    """
    written = [dict(message) for message in messages]
    if is_open := not to_answer and bool(written):
        written[-1]["content"] += _MARK + " "
    try:
        text = _compiled(template).render(
            messages=written,
            tools=None,
            documents=None,
            add_generation_prompt=to_answer,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except ImportError:
        raise
    except Exception as error:  # a template is a program of someone else's
        roles = ", ".join(message.get("role", "?") for message in written)
        raise InputError(f"the model's chat template fails on messages of {roles}: {one_line(error)}") from error
    if not is_open:
        return text
    before, found, after = text.rpartition(_MARK)
    if not found:
        raise InputError("the model's chat template leaves out the beginning of the answer that the task gives it")
    return before if after.startswith(" ") else before.rstrip()  # the template strips what it is given


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError, ext, nodes  # pyright: ignore[reportMissingImports]
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # pyright: ignore[reportMissingImports]

    class Generation(ext.Extension):  # pyright: ignore[reportUntypedBaseClass]
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
