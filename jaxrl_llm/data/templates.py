r"""Prompt templates: from an example to text in segments, of which only the responses are trained.

Text prompts are verbatim. Instructions and messages go through the tokenizer's own chat template if it has one, and
else through the plain one:

    ### Instruction:\n{instruction}\n  [### Input:\n{input}\n]  ### Response:\n{output}{eos}
    ### User:\n{content}\n   ### Assistant:\n{content}{eos}\n   (### System:\n{content}\n)

The segments alternate: context, response, context, response …, cut exactly where generation begins and ends. So the
segments of a prompt are the first segments of every example that has this prompt, and tokenizing one by one gives the
same ids in training as in generation (`jaxrl_llm.data.tokenization`).
"""

from typing import NamedTuple

from jaxrl_llm.data.formats import Completion, Instruction, Message, Messages, Prompt
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
    render = _render_plain_chat if tokenizer.chat_template is None else _render_native_chat
    return render(prompt, tokenizer, train_from=len(prompt), ask=True)


def render_example(prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> list[Segment]:
    r"""Renders a prompt with its completion. Every response ends with EOS, which is trained too.

    Args:
        prompt: The context. Assistant messages in it are not trained.
        completion: A string after a text or an instruction; after messages, messages, of which those of the assistant
            are trained.
        tokenizer: Gives `eos_token` and the chat template.

    Raises:
        ValueError: If the chat template rewrites earlier turns, so that what was generated is not in the final text.

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
    render = _render_plain_chat if tokenizer.chat_template is None else _render_native_chat
    return render((*context, *completion), tokenizer, train_from=len(context), ask=False)


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


def _until_eos(response: str, tokenizer: Tokenizer, *, last: bool) -> str:
    """Cuts what a chat template writes after EOS; the last response gets an EOS if the template writes none."""
    text, eos, _ = response.rpartition(tokenizer.eos_token)
    if eos:
        return text + eos
    return response + tokenizer.eos_token if last else response
