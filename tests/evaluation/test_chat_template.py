"""Conversations by template. What is expected was written by transformers 5.17 (`render_jinja_template`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jquant.benchmark_run import answerer
from jquant.core.errors import InputError
from jquant.evaluation.chat_template import render_chat
from tests.tiny_checkpoint import byte_tokenizer, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.lm_eval]  # jinja2 comes with lm-eval

CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TRIMMED = "{{ bos_token }}{% for message in messages %}[{{ message['content'] | trim }}]{% endfor %}"
EXTRAS = """\
{% for message in messages %}
  {% if loop.index > 1 %}
    {%- break %}
  {% endif %}
{% generation %}{{ message | tojson(indent=1) }}{% endgeneration %}
{% endfor %}
{{ tools is none }} {{ documents is none }} {{ strftime_now('%Y') | length }} {{ undefined_name is defined }}"""
NO_SYSTEM = """\
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}<{{ message['content'] }}>{% endfor %}"""

ASKED = [{"role": "user", "content": "Is <b> é?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "It is:\n```python\n"}]


@pytest.mark.parametrize(
    ("template", "messages", "to_answer", "expected"),
    [
        (CHATML, ASKED, True, "<|im_start|>user\nIs <b> é?<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, BEGUN, False, "<|im_start|>user\nIs <b> é?<|im_end|>\n<|im_start|>assistant\nIt is:\n```python\n"),
        (TRIMMED, ASKED, True, "<s>[Is <b> é?]"),
        (TRIMMED, BEGUN, False, "<s>[Is <b> é?][It is:\n```python"),
        (EXTRAS, BEGUN, True, '{\n "role": "user",\n "content": "Is <b> é?"\n}True True 4 False'),
        (NO_SYSTEM, BEGUN, False, "<Is <b> é?><It is:\n```python\n"),
    ],
)
def test_as_transformers_writes_it(template: str, messages: Any, to_answer: bool, expected: str) -> None:
    assert render_chat(template, messages, to_answer=to_answer, bos_token="<s>") == expected
    assert messages in (ASKED, BEGUN)  # as they were


def test_what_a_template_refuses_is_said() -> None:
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(InputError, match="fails on messages of system, user: System role not supported"):
        render_chat(NO_SYSTEM, [system, *ASKED], to_answer=True)
    with pytest.raises(InputError, match=r"chat template fails on messages of user: .*endfor"):
        render_chat("{% for message in messages %}", ASKED, to_answer=True)
    with pytest.raises(InputError, match="leaves out the beginning of the answer"):
        render_chat("{{ messages[0]['content'] }}", BEGUN, to_answer=False)
    with pytest.raises(InputError, match=r"unsafe|access"):
        render_chat("{{ ''.__class__.__mro__[1].__subclasses__() }}", ASKED, to_answer=True)


def test_a_system_message_that_a_template_refuses_is_left_out() -> None:
    ask = answerer(tiny_model(), dataclasses.replace(byte_tokenizer(), chat_template=NO_SYSTEM))
    assert ask.chat([{"role": "system", "content": "Be brief."}, *ASKED]) == "<Is <b> é?>"
