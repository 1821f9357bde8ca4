r"""Prompt templates: from an example to text in segments, of which only the responses are trained.

Text prompts are verbatim. Instructions and messages go through the tokenizer's own chat template if it has one, and
else through the plain one:

    ### Instruction:\n{instruction}\n  [### Input:\n{input}\n]  ### Response:\n{output}{eos}
    ### User:\n{content}\n   ### Assistant:\n{content}{eos}\n   (### System:\n{content}\n)

In a chat template the responses are what stands between `{% generation %}` and `{% endgeneration %}`, with the EOS
that follows. Without these marks they are what comes after the generation prompt, which needs a template that leaves
earlier turns as they are.

The segments alternate: context, response, context, response …, cut exactly where generation begins and ends. So the
segments of a prompt are the first segments of every example that has this prompt, and tokenizing one by one gives the
same ids in training as in generation (`jaxrl_llm.data.tokenization`).
"""

import re
from typing import Any, NamedTuple

from jaxrl_llm.data.examples import Completion, Instruction, Message, Messages, Prompt
from jaxrl_llm.data.tokenizers import Tokenizer


class Segment(NamedTuple):
    """A piece of text that is tokenized by itself."""

    text: str
    train: bool
    """Whether the loss falls on it."""


def render_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[Segment]:
    r"""Renders a prompt up to the point where the response begins; nothing of it is trained.

    Example:
        >>> from jaxrl_llm.data.tokenizers import load_tokenizer
        >>> render_prompt(Instruction("Add.", "1 2"), load_tokenizer("gpt2"))
        [Segment(text='### Instruction:\nAdd.\n### Input:\n1 2\n### Response:\n', train=False)]
    """
    if isinstance(prompt, str):
        return [Segment(_beginning(prompt, tokenizer), False)]
    if isinstance(prompt, Instruction):
        if tokenizer.chat_template is None:
            return [Segment(_beginning(_instruction_text(prompt), tokenizer), False)]
        prompt = _as_messages(prompt)
    return _render_chat(prompt, tokenizer, train_from=len(prompt), ask=True)


def render_example(prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> list[Segment]:
    r"""Renders a prompt with its completion. Every response ends with EOS, which is trained too.

    Args:
        prompt: The context. Assistant messages in it are not trained.
        completion: A string after a text or an instruction; after messages, messages, of which those of the assistant
            are trained.
        tokenizer: Gives `eos_token` and the chat template.

    Raises:
        ValueError: If the chat template rewrites earlier turns, so that what was generated is not in the final text;
            if its `{% generation %}` marks do not tell which text is the assistant's.

    Example:
        >>> from jaxrl_llm.data.tokenizers import load_tokenizer
        >>> render_example("3+4=", "7", load_tokenizer("gpt2"))
        [Segment(text='3+4=', train=False), Segment(text='7<|endoftext|>', train=True)]
    """
    if isinstance(completion, str):
        if not isinstance(prompt, Instruction) or tokenizer.chat_template is None:
            return [*render_prompt(prompt, tokenizer), Segment(_ended(completion, tokenizer), True)]
        prompt, completion = _as_messages(prompt), (Message("assistant", completion),)
    context: Messages = prompt if isinstance(prompt, tuple) else ()
    return _render_chat((*context, *completion), tokenizer, train_from=len(context), ask=False)


def _instruction_text(prompt: Instruction) -> str:
    middle = f"### Input:\n{prompt.input}\n" if prompt.input else ""
    return f"### Instruction:\n{prompt.instruction}\n{middle}### Response:\n"


def _as_messages(prompt: Instruction) -> Messages:
    return (Message("user", f"{prompt.instruction}\n{prompt.input}" if prompt.input else prompt.instruction),)


def _beginning(text: str, tokenizer: Tokenizer) -> str:
    """Puts the BOS in front that the tokenizer would add by itself (Llama does, GPT-2 does not)."""
    bos = tokenizer.bos_token
    if bos is None or text.startswith(bos) or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return text
    return bos + text


def _ended(text: str, tokenizer: Tokenizer) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _render_chat(messages: Messages, tokenizer: Tokenizer, *, train_from: int, ask: bool) -> list[Segment]:
    if tokenizer.chat_template is None:
        return _render_plain_chat(messages, tokenizer, train_from=train_from, ask=ask)
    is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
    render = _render_marked_chat if is_marked else _render_native_chat
    return render(messages, tokenizer, train_from=train_from, ask=ask)


def _render_plain_chat(messages: Messages, tokenizer: Tokenizer, *, train_from: int, ask: bool) -> list[Segment]:
    segments, context = [], _beginning("", tokenizer)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            response = Segment(_ended(message.content, tokenizer), index >= train_from)
            segments += [Segment(f"{context}### Assistant:\n", False), response]
            context = "\n"
        else:
            context += f"### {message.role.capitalize()}:\n{message.content}\n"
    return [*segments, Segment(f"{context}### Assistant:\n" if ask else context, False)]


def _render_native_chat(messages: Messages, tokenizer: Tokenizer, *, train_from: int, ask: bool) -> list[Segment]:
    def render(count: int, ask: bool) -> str:
        turns = [message._asdict() for message in messages[:count]]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)

    whole, segments, position = render(len(messages), ask), [], 0
    for index, message in enumerate(messages):
        if message.role == "assistant":
            before, after = render(index, True), render(index + 1, False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"The tokenizer's chat template rewrites earlier turns: the text up to message {index} is not the "
                    "beginning of the whole. Train on the last turn alone (`prompt` + `completion`)."
                )
            response = _until_eos(after[len(before) :], tokenizer, last=index == len(messages) - 1)
            segments += [Segment(whole[position : len(before)], False), Segment(response, index >= train_from)]
            position = min(len(before) + len(response), len(after))
    return [*segments, Segment(whole[position:], False)]


def _render_marked_chat(messages: Messages, tokenizer: Tokenizer, *, train_from: int, ask: bool) -> list[Segment]:
    """Takes the responses from the template's own marks, so that it may rewrite earlier turns.

    `apply_chat_template(return_assistant_tokens_mask=True)` marks whole tokens of the whole text; cutting the text at
    the same places first keeps the ids of prompts.
    """
    whole, spans = _render_marks(messages, tokenizer, ask)
    roles = [message.role for message in messages]
    skipped = 0 if ask else roles[:train_from].count("assistant")
    if not ask and (not spans or (skipped and len(spans) != roles.count("assistant"))):
        raise ValueError(
            f"The tokenizer's chat template marks {len(spans)} texts by {{% generation %}} in a conversation with "
            f"{roles.count('assistant')} turns of the assistant; expected one for each. Correct the template."
        )
    segments, position = [], 0
    for index, (start, end) in enumerate(spans):
        end += len(tokenizer.eos_token) if whole.startswith(tokenizer.eos_token, end) else 0
        last = index == len(spans) - 1 and roles[-1] == "assistant"
        response = _until_eos(whole[start:end], tokenizer, last=last)
        segments += [Segment(whole[position:start], False), Segment(response, not ask and index >= skipped)]
        position = min(start + len(response), end)
    return [*segments, Segment(whole[position:], False)]


def _render_marks(messages: Messages, tokenizer: Tokenizer, ask: bool) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and where in it the template's `{% generation %}` blocks stand."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # apply_chat_template gives away the blocks of tokens alone, not those of the text that it makes them from.
    rendered: Any = render_jinja_template(
        [[message._asdict() for message in messages]],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=ask,
        **tokenizer.special_tokens_map,
    )
    return rendered[0][0], rendered[1][0]


def _until_eos(response: str, tokenizer: Tokenizer, *, last: bool) -> str:
    """Cuts what a chat template writes after EOS; the last response gets an EOS if the template writes none."""
    text, eos, _ = response.rpartition(tokenizer.eos_token)
    if eos:
        return text + eos
    return response + tokenizer.eos_token if last else response
