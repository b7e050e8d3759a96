"""An OpenAI-compatible judge as a process (`Server` starts it): it prefers the longer output, and a little the one that stands first.

    python judge_server.py <port, 0 for any> <log file> [mode ...]

It prints its port. The log has a line per answer that was sent: [key header, request, first, second]. Modes:

    text          answers with a sentence and gives no log-probabilities
    refuses       status 400 to a request for log-probabilities, then as `text`
    chatty        an answer from which no verdict can be read
    flaky         status 500 to the first request about every pair
    slow          a second before every answer
    hangs         half a minute before the first answer
    locked        status 401, repeating the key, to everybody
    other         JSON that is no chat completion
"""

import http.server
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

KEY = "sk-a-key-that-nobody-may-read"
BIAS = 0.7  # for the one that stands first, on the scale of the logit
TOKENS = (11, 2)  # of the prompt and of the completion, in every answer


def first_wins(first: str, second: str) -> float:
    """P(first) by this judge."""
    return 1 / (1 + math.exp(-((len(first) - len(second)) / 10 + BIAS)))


def read(text: str) -> list[str]:
    """The two outputs in a request."""
    return re.findall(r'"output": """(.*?)"""', text, re.DOTALL)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    log, modes, seen, lock = "", set(), set(), threading.Lock()

    def log_message(self, *args):
        pass

    def send(self, status: int, answer) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "")
        first, second = read(body["messages"][-1]["content"])
        with self.lock:
            new, earlier = (first, second) not in self.seen, bool(self.seen)
            self.seen.add((first, second))
        if self.path != "/v1/chat/completions":
            return self.send(404, {"error": f"no {self.path}"})
        if "locked" in self.modes:
            return self.send(401, {"error": {"message": f"Incorrect API key provided: {key.split()[-1]}"}})
        if "flaky" in self.modes and new:
            return self.send(500, {"error": "try again"})
        if "hangs" in self.modes and not earlier:
            time.sleep(30)
        if "slow" in self.modes:
            time.sleep(1)
        if "other" in self.modes:
            return self.send(200, {"hello": "world"})
        if "refuses" in self.modes and "logprobs" in body:
            return self.send(400, {"error": {"message": "logprobs is not supported by this model"}})
        answer = self.answer(first_wins(first, second), body)
        with self.lock, Path(self.log).open("a") as file:  # first: who has the answer may count the lines
            file.write(json.dumps([key, body, first, second]) + "\n")
        self.send(200, answer)
        return None

    def answer(self, p: float, body) -> dict:
        verdict = "m" if p > 0.5 else "M"
        said = verdict if body.get("logprobs") else f"I'd say: {verdict}, and I'm sure of it."
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        if "chatty" in self.modes:
            choice["message"]["content"] = "Both have their strengths."
        elif body.get("logprobs") and not self.modes & {"text", "refuses"}:
            top = [("m", 0.75 * p), (" m", 0.15 * p), ("M", 0.9 * (1 - p)), ("The", 0.1)]  # 0.1 to no verdict
            tops = [{"token": token, "logprob": math.log(mass)} for token, mass in top]
            chosen = next(option for option in tops if option["token"] == verdict)
            choice["logprobs"] = {"content": [{**chosen, "top_logprobs": tops}]}
        usage = dict(zip(("prompt_tokens", "completion_tokens"), TOKENS, strict=True))
        return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


class Server:
    """A judge's process, which can be ended and started again at the same address."""

    def __init__(self, log: Path, *modes: str, port: int = 0) -> None:
        self.log, self.modes = log, modes
        log.touch()
        line = [sys.executable, __file__, str(port), str(log), *modes]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> list[list]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        self.process.stdout.close()


if __name__ == "__main__":
    Handler.log, Handler.modes = sys.argv[2], set(sys.argv[3:])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
