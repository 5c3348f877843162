import pytest

from rsafe_plugins.backends.base import Message
from rsafe_plugins.backends.chat_template import ChatTemplate
from rsafe_plugins.errors import BackendError, BackendUnavailable

CHAT = (Message("system", "Be <brief> & kind."), Message("user", "Hi"))

ALTERNATING = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- raise_exception('No system role') }}
    {%- endif %}
[{{ message.role }}] {{ message.content | tojson }}
    {%- if loop.last %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{% endif %}
"""


def test_content_stands_in_the_prompt_as_it_is() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")

    assert template.render(CHAT) == "system: Be <brief> & kind.\nuser: Hi\n"


def test_the_answer_begins_at_the_end() -> None:
    template = ChatTemplate(ALTERNATING, bos_token="<s>")

    assert template.render(CHAT[1:]) == '<s>[user] "Hi"[assistant]\n'


def test_arguments_reach_the_template_and_cannot_replace_the_chat() -> None:
    template = ChatTemplate("{{ guideline }} {{ messages[0].content }}{{ add_generation_prompt }}")
    given = {"guideline": "No theft.", "messages": [], "add_generation_prompt": False}
    assert template.render(CHAT[1:], given) == "No theft. HiTrue"


def test_arguments_that_the_template_has_no_use_for_are_an_error() -> None:
    with pytest.raises(BackendError, match="has no use for guideline"):
        ChatTemplate(ALTERNATING).render(CHAT[1:], {"guideline": "No theft."})


def test_rendering_agrees_with_transformers() -> None:
    from transformers.utils import chat_template_utils as utils

    chat = [{"role": message.role, "content": message.content} for message in CHAT[1:]]
    theirs, _ = utils.render_jinja_template(
        [chat], chat_template=ALTERNATING, add_generation_prompt=True, bos_token="<s>"
    )

    assert [ChatTemplate(ALTERNATING, bos_token="<s>").render(CHAT[1:])] == theirs


def test_a_chat_that_the_template_refuses_is_an_error_without_its_content() -> None:
    with pytest.raises(BackendError, match=r"refuses a chat of the roles \['system', 'user'\]") as caught:
        ChatTemplate(ALTERNATING).render(CHAT)

    assert "brief" not in str(caught.value)


def test_a_template_that_is_no_jinja_makes_the_model_unusable() -> None:
    with pytest.raises(BackendUnavailable, match="chat template can't be used"):
        ChatTemplate("{% for %}")


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(BackendError, match="SecurityError"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render(CHAT)
