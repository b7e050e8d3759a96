"""A small server of OpenAI's completions protocol over a tiny model, with the faults that real servers have.

    python tests/onpolicy/openai_server.py MODEL_FOLDER PORT        prints the port that it listens on (0: a free one)

GET /v1/models, POST /v1/completions with token ids, and POST /test {"mode": ..., "token_ids": ...}, which answers with
the number of completions so far and changes how it behaves from then on:

    normal    as asked
    errors    every third request gets status 500
    slow      every fourth request gets its answer after eight seconds
    greedy    the most probable token, whatever the temperature
    wants_key requests without "Bearer secret" get status 401
    refuses   status 400
    redirects status 307 to another address
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from align.config import SamplingConfig
from align.onpolicy.samplers import Prompt, hf_sampler

LOCK = threading.Lock()  # one forward at a time: a tiny model is not worth two threads


class State:
    """What the server does, and what it has been asked."""

    mode = "normal"
    token_ids = True  # whether it returns them
    requests = 0
    completions = 0
    elsewhere = ""  # where it redirects to


class Handler(BaseHTTPRequestHandler):
    """A request."""

    sample = None  # of the model
    name = ""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/v1/models":
            return self.answer(200, {"object": "list", "data": [{"id": self.name, "object": "model"}]})
        return self.answer(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/test":
            for name, value in body.items():
                setattr(State, name, value)
            return self.answer(200, {"completions": State.completions})
        if self.path != "/v1/completions":
            return self.answer(404, {"error": {"message": f"no {self.path}"}})
        with LOCK:
            State.requests += 1
            number = State.requests
        if State.mode == "errors" and number % 3 == 0:
            return self.answer(500, {"error": {"message": "the engine is out of breath"}})
        if State.mode == "slow" and number % 4 == 0:
            time.sleep(8)
        if State.mode == "wants_key" and self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, {"error": {"message": f"wrong key {self.headers['Authorization']}"}})
        if State.mode == "refuses":
            return self.answer(400, {"error": {"message": f"bad request with {self.headers['Authorization']}"}})
        if State.mode == "redirects":
            return self.answer(307, {}, Location=State.elsewhere)
        return self.answer(200, self.completion(body))

    def completion(self, body):
        assert all(isinstance(token, int) for token in body["prompt"]), "prompts are token ids"
        assert (body["model"], body["n"], body["top_k"]) == (self.name, 1, -1)
        with LOCK, torch.inference_mode():
            drawn = type(self).sample(
                [Prompt(token_ids=body["prompt"], seeds=[body["seed"]])],
                SamplingConfig(
                    temperature=1e-6 if State.mode == "greedy" else body["temperature"],
                    top_p=body["top_p"],
                    max_new_tokens=body["max_tokens"],
                ),
            )[0][0]
            State.completions += 1
        choice = {"index": 0, "text": drawn.text, "finish_reason": "stop" if drawn.finished else "length"}
        if State.token_ids and body["return_token_ids"]:
            choice["token_ids"] = drawn.response_ids
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def answer(self, status, body, **headers):
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # nobody waits any more
            pass


def main():
    folder, port = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    Handler.sample = staticmethod(hf_sampler(model, AutoTokenizer.from_pretrained(folder)))
    Handler.name = Path(folder).name
    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
