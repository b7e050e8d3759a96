"""Servers that speak OpenAI's completions protocol and take token ids: vLLM, SGLang, and hosts that run one of them.

A request is one response with its own seed; the server's prefix cache computes a prompt once. Sampling is spelled out
in full, since servers fill what is missing from the model's generation_config. Token ids come back where the server can
return them (`return_token_ids`); else the text is encoded again, which may split it otherwise.
A server that decodes greedily whatever it is asked is refused, after a probe.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config import SamplingConfig
from align.model.chat import stop_token_ids
from align.onpolicy.samplers.base import Prompt, Sample, Sampler, Settings, as_sample
from align.onpolicy.samplers.servers import Body, Send, Servers, in_threads
from align.say import UserError

_PROBES = 8  # responses at a temperature at which no model gives so many alike
_PROBE = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 16}


def openai_sampler(tokenizer: PreTrainedTokenizerBase, cfg: SamplingConfig, path: str | None = None) -> Sampler:
    """Return a sampler of the model that the servers at `cfg.urls` serve, whose tokenizer this is.

    `path` is the policy's, with whose last two parts the model's name must end, where servers may hold the one before.
    """
    stops = stop_token_ids(tokenizer)

    def check(url: str, send: Send, body: Body) -> None:
        choices = (_choice(send("/completions", {**body, **_PROBE, "seed": seed})) for seed in range(_PROBES))
        answers = ((choice.get("text"), choice.get("token_ids")) for choice in choices)
        first = next(answers)
        if all(answer == first for answer in answers):
            raise UserError(
                f"{url} gives {_PROBES} equal answers at temperature {_PROBE['temperature']:g}: it decodes greedily, "
                "whatever it is asked; serve the policy with vLLM or SGLang"
            )

    servers = Servers(cfg.urls, "sampling.urls", check)

    def sample(prompts: Sequence[Prompt], settings: Settings) -> list[list[Sample]]:
        rest: Body = {"n": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        rest |= {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens}
        rest |= {"stop_token_ids": stops, "model": cfg.served_model or _first_model(servers)}
        if path is not None and not rest["model"].rstrip("/").endswith("/".join(Path(path).parts[-2:])):
            raise UserError(
                f"sampling.urls: the server holds {rest['model']}, and these are to be answers of {path}: serve it under "
                f"that name (vllm serve {path}), then the same command goes on"
            )
        jobs = [{**rest, "prompt": list(p.token_ids), "seed": seed} for p in prompts for seed in p.seeds]

        def draw(body: Body, over: threading.Event) -> Sample:
            choice = _choice(servers.ask("/completions", body, over))
            ids = choice.get("token_ids")
            if ids is None:
                ids = tokenizer(choice["text"], add_special_tokens=False).input_ids
            by = choice.get("stop_reason", choice.get("matched_stop"))
            return as_sample(ids, tokenizer, stops, choice["finish_reason"] == "stop", by)

        drawn = iter(in_threads(draw, jobs, cfg.requests_at_once))
        return [[next(drawn) for _ in prompt.seeds] for prompt in prompts]

    return sample


def _first_model(servers: Servers) -> str:
    listed = servers.ask("/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise UserError("sampling.urls: the server lists no model; name it with sampling.served_model=") from None


def _choice(answer: Any) -> Body:
    """Return the one response of an answer, or raise `UserError` where it is none, or was ended by the server."""
    try:
        choice: Body = answer["choices"][0]
        reason = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"sampling.urls: this is no answer to a completion: {str(answer)[:200]}") from None
    if reason not in ("stop", "length"):
        raise UserError(f"sampling.urls: the server ended a response because of {reason!r}")
    return choice
