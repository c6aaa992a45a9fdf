"""kmem's models in EleutherAI's lm-evaluation-harness, under the name `kmem`; it needs
`pip install 'lm-eval>=0.4.9,<0.5' accelerate`.

    python -m kmem.eval.harness --model kmem --model_args checkpoint=runs/bank --tasks lambada_openai

The harness's own `--model hf` runs exports, too, but it calls the model on context and continuation together, so a bank
would fetch for both.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kmem.checkpoint.bank.options import bank_options
from kmem.checkpoint.controls import parse_controls
from kmem.config import UserError
from kmem.eval.request_contexts import fetches, preceding, score_by_leaf
from kmem.hf.loading import load

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise UserError(f"lm-evaluation-harness: {error}; pip install 'lm-eval>=0.4.9,<0.5' accelerate") from error

Request = tuple[Any, list[int], list[int]]
"""(key in the harness's cache, token ids of the context, token ids to score)."""


@register_model("kmem")
class KmemLM(HFLM):
    """A run, one step of it, or a Hugging Face folder, on one device.

    A bank fetches for the context alone when log-likelihoods are computed, and for the prompt when text is generated.
    For a window of a document it fetches for the tokens before the window; for the first window the context is only the
    token that stands for the beginning.

    Args:
        checkpoint: as in `kmem generate`.
        control: as `--control`, such as `control=bank=generic`; several are joined by `;`, since commas separate the
            arguments.
        tree, bank_levels, blocked: as in `kmem generate`; several levels or clusters are joined by `;`.
        device: default: a GPU if there is one.
        dtype: dtype of the weights, such as bfloat16; default: as stored.
        options: options of the harness's `HFLM`, such as batch_size and max_length.
    """

    def __init__(
        self,
        checkpoint: str,
        tree: str | None = None,
        control: str | None = None,
        bank_levels: str | int | None = None,
        blocked: str | int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        controls = parse_controls([] if control is None else control.split(";"), "control")
        options_of_bank = bank_options(
            _joined("bank_levels", bank_levels),
            _joined("blocked", blocked),
            None if tree is None else Path(tree),
            controls.get("bank"),
        )
        model, tokenizer = load(Path(checkpoint), controls, options_of_bank)
        if tokenizer("")["input_ids"]:  # as documents began in training
            options.setdefault("add_bos_token", True)
        if dtype not in (None, "auto"):
            model = model.to(getattr(torch, str(dtype)))
        if not torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
            logging.getLogger(__name__).info("no GPU: the model is on the CPU")
            device = "cpu"  # the harness names a GPU if its user names no device
        model = model.to(device or "cuda")
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def _loglikelihood_tokens(self, requests: Sequence[Request], *arguments: Any, **options: Any) -> list[Any]:
        return self._scored(requests, [context for _, context, _ in requests], *arguments, **options)

    def _scored(
        self, requests: Sequence[Request], contexts: Sequence[Sequence[int]], *arguments: Any, **options: Any
    ) -> list[Any]:
        """(log-likelihood, whether greedy) of requests whose blocks are fetched for these contexts."""
        score = super()._loglikelihood_tokens
        if not fetches(self.model):
            return list(score(list(requests), *arguments, **options))
        return score_by_leaf(
            self.model,
            contexts,
            lambda numbers: score([requests[number] for number in numbers], *arguments, **options),
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole documents, in windows of the model's length."""
        if not fetches(self.model):
            return list(super().loglikelihood_rolling(requests, disable_tqdm))
        windows: list[Request] = []
        contexts: list[list[int]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            of_text = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += of_text
            sizes = [len(scored) for *_, scored in of_text]
            contexts += preceding(tokens, sizes, self.max_length, self.prefix_token_id)
            counts.append(len(of_text))
        scores = iter(self._scored(windows, contexts, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals


def _joined(name: str, value: str | int | float | None) -> str | None:
    """The value of an argument, joined by commas instead of `;`.

    Raises:
        UserError: the harness has read a path as a number with a fraction, which cannot tell 7.1 from 7.10.
    """
    if isinstance(value, float):
        raise UserError(f"{name}={value}: was read as a number; write a path with a closing semicolon, such as 7.2;")
    return None if value is None else str(value).strip(";").replace(";", ",")


if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
