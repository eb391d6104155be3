"""Serves completions over HTTP as OpenAI's interface does, many at once: python examples/serve.py [MODEL] [PORT]"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import ContinuousBatchingConfig, ContinuousBatchingManager

from eval_tasks.models import LoadedModel, load_model
from nc_patch import patch_model


def server(loaded: LoadedModel, manager: ContinuousBatchingManager, port: int) -> ThreadingHTTPServer:
    def complete(prompt: str, max_tokens: int = 16, **_: object) -> dict:
        begin, ids = time.perf_counter(), loaded.tokenizer(prompt or None)["input_ids"]
        new = next(manager.request_id_iter(manager.add_request(ids, max_new_tokens=max_tokens))).generated_tokens
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new), "seconds": time.perf_counter() - begin}
        text = loaded.tokenizer.decode(new, skip_special_tokens=True)
        return {"object": "text_completion", "choices": [{"index": 0, "text": text}], "usage": usage}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                status, answer = 200, complete(**json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    room = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=64)}  # of 256 tokens, for all together
    with patch_model(model.model, decode="block").continuous_batching_context_manager(**room) as batching:
        server(model, batching, int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
