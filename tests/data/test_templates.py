"""Templates: the exact text of every kind of example, and which part of it is trained."""

import pytest
from tokenizers.processors import TemplateProcessing

from jaxrl_llm.data import Instruction, Message, Segment, character_tokenizer, render_example, render_prompt
from tests.data.chat import MARKED

EOS = "<|endoftext|>"
SYSTEM, USER = Message("system", "Be kind."), Message("user", "Hi")
ASSISTANT, MORE, BYE = Message("assistant", "Hello"), Message("user", "Bye"), Message("assistant", "See you")


def text(segments):
    return "".join(segment.text for segment in segments)


def trained(segments):
    return [segment.text for segment in segments if segment.train]


def test_the_instruction_template_is_the_guides(gpt2):
    with_input = render_example(Instruction("Translate", "幸福"), "happiness", gpt2)
    assert text(with_input) == f"### Instruction:\nTranslate\n### Input:\n幸福\n### Response:\nhappiness{EOS}"
    assert trained(with_input) == [f"happiness{EOS}"]
    without_input = render_example(Instruction("Sing"), "la", gpt2)
    assert text(without_input) == f"### Instruction:\nSing\n### Response:\nla{EOS}"


def test_the_chat_template_is_the_guides(gpt2):
    segments = render_example((), (USER, ASSISTANT, MORE, BYE), gpt2)
    assert text(segments) == (
        f"### User:\nHi\n### Assistant:\nHello{EOS}\n### User:\nBye\n### Assistant:\nSee you{EOS}\n"
    )
    assert trained(segments) == [f"Hello{EOS}", f"See you{EOS}"]


def test_a_system_message_stands_first(gpt2):
    assert text(render_prompt((SYSTEM, USER), gpt2)) == "### System:\nBe kind.\n### User:\nHi\n### Assistant:\n"


def test_text_is_verbatim_and_ends_with_one_eos(gpt2):
    assert render_example("3+4=", "7", gpt2) == [Segment("3+4=", False), Segment(f"7{EOS}", True)]
    assert text(render_example("", f"Once{EOS}", gpt2)) == f"Once{EOS}"
    assert render_prompt("3+4=", gpt2) == [Segment("3+4=", False)]


def test_assistant_messages_of_the_prompt_are_not_trained(gpt2, chatml):
    for tokenizer in (gpt2, chatml):
        segments = render_example((USER, ASSISTANT, MORE), (BYE,), tokenizer)
        assert trained(segments) == [f"See you{tokenizer.eos_token}"]
        assert text(segments) == text(render_example((), (USER, ASSISTANT, MORE, BYE), tokenizer))


@pytest.mark.parametrize("prompt", [(USER,), (SYSTEM, USER), (USER, ASSISTANT, MORE), Instruction("Add", "1 2"), "Hi"])
def test_the_segments_of_a_prompt_begin_every_example_of_it(gpt2, chatml, prompt):
    completion = (BYE,) if isinstance(prompt, tuple) else "See you"
    for tokenizer in (gpt2, chatml):
        given = render_prompt(prompt, tokenizer)
        segments = render_example(prompt, completion, tokenizer)
        if prompt == (USER, ASSISTANT, MORE):
            assert [segment.text for segment in render_example((), (*prompt, BYE), tokenizer)][:3] == [
                segment.text for segment in given
            ]
        assert segments[: len(given)] == given
        assert segments[len(given)] == Segment(f"See you{tokenizer.eos_token}", True)


def test_the_tokenizers_own_template_wins(chatml):
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    segments = render_example((SYSTEM, USER), (ASSISTANT,), chatml)
    assert text(segments) == turn("system", "Be kind.") + turn("user", "Hi") + turn("assistant", "Hello")
    assert trained(segments) == ["Hello<|im_end|>"]
    assert segments[-1] == Segment("\n", False)
    instruction = render_example(Instruction("Add", "1 2"), "3", chatml)
    assert text(instruction) == turn("user", "Add\n1 2") + turn("assistant", "3")
    assert text(render_prompt(Instruction("Add"), chatml)) == turn("user", "Add") + "<|im_start|>assistant\n"


def test_the_last_response_gets_an_eos_that_the_template_lacks(chatml):
    chatml.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    segments = render_example((), (USER, ASSISTANT, MORE, BYE), chatml)
    assert text(segments) == "[Hi][Hello][Bye][See you]<|im_end|>"
    assert trained(segments) == ["[Hello]", "[See you]<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters(chatml):
    chatml.chat_template = "{{ messages | length }}:{{ messages[-1].content }}<|im_end|>"
    with pytest.raises(ValueError, match=r"rewrites earlier turns: the text up to message 1 .*Train on the last turn"):
        render_example((), (USER, ASSISTANT, MORE, BYE), chatml)


OUTSIDE = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
SPACED = MARKED.replace("{% generation %}", "{%- generation -%}").replace(
    "{% endgeneration %}", "{%- endgeneration -%}"
)


@pytest.mark.parametrize("template", [MARKED, OUTSIDE, SPACED], ids=["eos marked", "eos not marked", "stripped"])
def test_marks_of_the_template_say_what_is_trained_and_eos_belongs_to_it(chatml, template):
    conversation = (SYSTEM, USER, ASSISTANT, MORE, BYE)
    unmarked = render_example((), conversation, chatml), render_prompt(conversation[:4], chatml)
    chatml.chat_template = template
    segments = render_example((), conversation, chatml)
    assert trained(segments) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert (segments, render_prompt(conversation[:4], chatml)) == unmarked
    assert trained(render_example(conversation[:4], (BYE,), chatml)) == ["See you<|im_end|>"]
    assert trained(render_example((), conversation[:4], chatml)) == ["Hello<|im_end|>"]


def test_marks_allow_a_template_that_rewrites_earlier_turns(chatml):
    chatml.chat_template = "{{ messages | length }} turns: " + MARKED
    assert trained(render_example((), (USER, ASSISTANT, MORE, BYE), chatml)) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert text(render_prompt((USER,), chatml)).startswith("1 turns: <|im_start|>user")


def test_the_last_marked_response_gets_an_eos_that_the_template_lacks(chatml):
    mark = "{% generation %}{{ message.content }}{% endgeneration %}"
    chatml.chat_template = f"{{% for message in messages %}}[{mark}]{{% endfor %}}"
    segments = render_example((), (ASSISTANT,), chatml)
    assert (text(segments), trained(segments)) == ("[Hello<|im_end|>]", ["Hello<|im_end|>"])


@pytest.mark.parametrize(
    ("condition", "count"), [("false", 0), ("loop.last and message.role == 'assistant'", 1)], ids=["none", "the last"]
)
def test_marks_that_do_not_tell_the_turns_apart_are_refused(chatml, condition, count):
    mark = "{% generation %}{{ message.content }}{% endgeneration %}"
    inner = f"{{% if {condition} %}}{mark}{{% else %}}{{{{ message.content }}}}{{% endif %}}"
    chatml.chat_template = f"{{% for message in messages %}}{inner}{{% endfor %}}"
    with pytest.raises(
        ValueError, match=rf"marks {count} texts by {{% generation %}} .* with 2 turns of the assistant"
    ):
        render_example((USER, ASSISTANT, MORE), (BYE,), chatml)


def test_bos_is_kept_where_the_tokenizer_adds_one():
    tokenizer = character_tokenizer("Hi# :UserAsistan\n")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert text(render_prompt("Hi", tokenizer)) == "Hi"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert text(render_prompt("Hi", tokenizer)) == "<bos>Hi"
    assert text(render_prompt("<bos>Hi", tokenizer)) == "<bos>Hi"
    assert text(render_prompt((USER,), tokenizer)) == "<bos>### User:\nHi\n### Assistant:\n"
    assert text(render_example("", "Hi", tokenizer)) == "<bos>Hi<eos>"
