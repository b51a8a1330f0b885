"""The transformers side of speed.py, in an interpreter that has torch: requests and answers are lines of JSON."""

import json
import sys
import time

import torch
import transformers


class Clock(transformers.StoppingCriteria):
    """Notes when each token came; never stops."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **_):
        """Called after every token."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def run(model, prompts: list[list[int]], new_tokens: int) -> dict:
    """Seconds of one run, as in speed.py."""
    ids, clock, start = torch.tensor(prompts), Clock(), time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
    assert out.shape[1] == ids.shape[1] + new_tokens
    first, end = clock.times[0], clock.times[-1]
    return {"prefill": first - start, "decode": end - first, "overall": end - start}


def main() -> None:
    """The first line says which model, every other one brings prompts to run."""
    request = json.loads(sys.stdin.readline())
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["checkpoint"], dtype=getattr(torch, request["dtype"])
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answer = {"version": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line), request["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
