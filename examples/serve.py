"""Serves completions over HTTP with sparse attention, one at a time: python examples/serve.py [MODEL] [PORT]

POST /v1/completions takes {"prompt": ..., "max_tokens": ...} and answers as OpenAI's interface does.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from eval_tasks.models import LoadedModel, load_model
from nc_patch import patch_model


def complete(loaded: LoadedModel, prompt: str, max_tokens: int = 16, **_: object) -> dict:
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    begin, length = time.perf_counter(), inputs["input_ids"].shape[1]
    output = loaded.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, length:]
    usage = {"prompt_tokens": length, "completion_tokens": len(output), "seconds": time.perf_counter() - begin}
    text = loaded.tokenizer.decode(output, skip_special_tokens=True)
    return {"object": "text_completion", "choices": [{"index": 0, "text": text}], "usage": usage}


def server(loaded: LoadedModel, port: int) -> HTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = 200, complete(loaded, **request)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    patch_model(model.model)
    server(model, int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
