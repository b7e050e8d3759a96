"""A model's chat format: its template, its one BOS, the tokens that end its turn."""

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.choices import SystemMessage
from align.files import fingerprint
from align.say import UserError


def read_template(key: str, value: str) -> str:
    """Return the template that the knob `key` holds, or that of the file which it names, or raise `UserError`."""
    if "{" in value:
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={value} is neither a template nor a file that holds one")
    return file.read_text()


def merge_system_message(messages: list[dict[str, str]], policy: SystemMessage) -> list[dict[str, str]]:
    """Return the conversation; under `merge` a leading system message is moved into the first user turn."""
    if policy is SystemMessage.template or len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def with_one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return prompt ids with one BOS in front if the template or the tokenizer writes one, else without any."""
    bos = tokenizer.bos_token_id
    if bos is None or not (ids[:1] == [bos] or tokenizer("a").input_ids[:1] == [bos]):
        return ids
    while ids[:1] == [bos]:
        ids = ids[1:]
    return [bos, *ids]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: the tokenizer's eos, and the one with which its template closes a turn."""
    ids = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        end = end_of_turn(tokenizer)[0]
        ids += [i for i in tokenizer(end, add_special_tokens=False).input_ids if i not in ids][-1:]
    return ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Split the text that the chat template writes after an answer: (up to its last special token, the rest).

    Gemma: ("<end_of_turn>", "\\n"). The rest is never generated, so it is not part of a response. If the template
    does not close a turn, the first part is the tokenizer's eos token; `UserError` if it writes no such turn.
    """
    probe = "a probe of the template"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": probe}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # Jinja raises whatever the template's author chose
        raise UserError(f"the chat template fails on one user and one assistant turn: {error}") from error
    assert isinstance(text, str)
    _, found, tail = text.rpartition(probe)
    if not found:
        raise UserError("the chat template does not write the assistant's turn: give model.chat_template one that does")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    end = max((tail.rfind(token) + len(token) for token in special if token in tail), default=0)
    return (tail[:end], tail[end:]) if end else (str(tokenizer.eos_token), tail)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a key that changes if a text would be tokenised, or a conversation rendered, otherwise."""
    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return fingerprint(backend, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)


def prompt_ids(prompt: list[dict[str, str]] | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt: a conversation goes through the chat template; a plain text gets its BOS."""
    text: Any = prompt
    if not isinstance(prompt, str):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return with_one_bos(tokenizer(text, add_special_tokens=False).input_ids, tokenizer)
