"""A language model as judge, over any OpenAI-compatible endpoint: which of two responses is better, in both orders.

The judge answers with one of two letters, m for the first response and M for the second, as AlpacaEval 2's does
(https://arxiv.org/abs/2404.04475): one token each, in no order, and no figure a judge might like. Where the server
gives log-probabilities, P(first) = p(m) / (p(m) + p(M)) at the token of the verdict; else the letter in the text
decides; a text without one clear letter counts as 1/2, and as `unreadable_verdicts`. Judges favour a place, so
P(A beats B) = (P(A | A first) + 1 - P(B | B first)) / 2. Equal texts are not asked about.
Left out: judging a response alone, batch files, and what a server that died had charged for answers that never came.
"""

import math
import re
import threading
from collections.abc import Sequence
from typing import Any

from align.config import ScorerConfig
from align.launch.rank import Rank
from align.model.chat import read_template
from align.onpolicy.samplers.servers import Servers, in_threads
from align.onpolicy.scorers.base import Identity, Item, Kind, Scores, as_text
from align.say import UserError

FIRST, SECOND = "m", "M"  # {first} is called m, {second} M
PLACES = ("{prompt}", "{first}", "{second}")

TEMPLATE = '''Two assistants were given the same prompt. Decide whose output a careful person would prefer: the one that \
does what was asked, is right, and says no more than helps. Neither the order nor the length of the outputs counts.

"prompt": """{prompt}"""

{"model": "m", "output": """{first}"""}

{"model": "M", "output": """{second}"""}

Answer with one letter and nothing else: m if the output of model m is better, M if that of model M is.'''

_ASK = {"temperature": 0.0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}


Verdict = tuple[float, dict[str, int]]  # P(first), and the counts of `_TIE`
_TIE: Verdict = (0.5, {"prompt_tokens": 0, "completion_tokens": 0, "unreadable_verdicts": 0})


class JudgeScorer:
    """P(a beats b) by a model behind `judge.urls`. `counts` are per response that stood first."""

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        if cfg.judge.served_model is None:
            raise UserError(
                "scorer.name=llm_judge needs scorer.judge.served_model, the name that its server knows it by"
            )
        self._cfg = cfg.judge
        self._servers = Servers(cfg.judge.urls, "scorer.judge.urls")
        self._template = TEMPLATE if cfg.template is None else read_template("scorer.template", cfg.template)
        if missing := [place for place in PLACES if place not in self._template]:
            raise UserError(
                f"scorer.template lacks {', '.join(missing)}; it must ask for {FIRST} if the first is better, else {SECOND}"
            )
        self._request = {key: value for key, value in {**_ASK, **cfg.judge.request}.items() if value is not None}
        self.identity = Identity(
            kind=Kind.pairwise,
            name=f"llm_judge:{cfg.judge.served_model}",
            revision=cfg.revision or "as served",
            template=self._template,
            settings={"request": self._request},
        )

    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """Return [K][K] P(i beats j) for each item."""
        asked = {
            (number, i, j): fill(self._template, as_text(item.prompt), first, second)
            for number, item in enumerate(items)
            for i, first in enumerate(item.responses)
            for j, second in enumerate(item.responses)
            if first != second
        }
        answers = in_threads(self._ask, list(asked.values()), self._cfg.requests_at_once)
        verdicts: dict[tuple[int, int, int], Verdict] = dict(zip(asked, answers, strict=True))
        return [
            _scores([[verdicts.get((number, i, j), _TIE) for j in range(count)] for i in range(count)])
            for number, count in enumerate(len(item.responses) for item in items)
        ]

    def _ask(self, text: str, over: threading.Event) -> Verdict:
        """Return the verdict on one filled template."""
        message = {"role": "user", "content": text}
        body = {"model": self._cfg.served_model, "messages": [message], **self._request}
        try:
            return read_answer(self._servers.ask("/chat/completions", body, over))
        except UserError as error:
            if not {"logprobs", "top_logprobs"} & body.keys() or "logprob" not in str(error).lower():
                raise
        # This server refuses to give them: the text of the verdict decides, from here on.
        self._request = {key: value for key, value in self._request.items() if key not in ("logprobs", "top_logprobs")}
        return self._ask(text, over)


def fill(template: str, prompt: str, first: str, second: str) -> str:
    """Return the judge's message. In one pass: a response may itself speak of {second}."""
    values = dict(zip(PLACES, (prompt, first, second), strict=True))
    return re.sub("|".join(map(re.escape, PLACES)), lambda place: values[place[0]], template)


def read_answer(answer: Any) -> Verdict:
    """Return the verdict in a chat completion."""
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text = choice["message"]["content"] or ""
        first_wins = _by_logprobs((choice.get("logprobs") or {}).get("content") or [])
        if first_wins is None:
            first_wins = _by_text(text)
        spent = {name: int(usage.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")}
        return 0.5 if first_wins is None else first_wins, {**spent, "unreadable_verdicts": int(first_wins is None)}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the judge answers with no chat completion: {str(answer)[:200]!r}; is scorer.judge.urls the address of an "
            "OpenAI-compatible server, with its /v1?"
        ) from error


def _by_logprobs(tokens: list[dict[str, Any]]) -> float | None:
    """Return P(first) at the first token that is a verdict; None where none is."""
    token = next((token for token in tokens if token["token"].strip() in (FIRST, SECOND)), None)
    if token is None:
        return None
    options = {option["token"]: option for option in [*(token.get("top_logprobs") or []), token]}.values()
    first, second = (  # "m" and " m" are one verdict
        sum(math.exp(option["logprob"]) for option in options if option["token"].strip() == letter)
        for letter in (FIRST, SECOND)
    )
    return first / (first + second) if first + second > 0 else None


def _by_text(text: str) -> float | None:
    """Return 1 or 0 by the one letter that stands alone in the text; None where there is none, or both."""
    letters = set(re.findall(rf"(?<![\w'])[{FIRST}{SECOND}](?!\w)", text))
    return float(letters == {FIRST}) if len(letters) == 1 else None


def _scores(verdicts: list[list[Verdict]]) -> Scores:
    """Return the K x K matrix of one item; `verdicts[i][j]` is that on responses i, j in this order."""
    p = [[first_wins for first_wins, _ in row] for row in verdicts]
    wins = [[(p[i][j] + 1 - p[j][i]) / 2 for j in range(len(p))] for i in range(len(p))]
    spent = [{name: sum(counts[name] for _, counts in row) for name in _TIE[1]} for row in verdicts]
    return Scores(values=wins, counts=spent)
