"""`kmem generate`: continue a prompt with a trained model."""

import argparse
import sys
from typing import Any

from kmem.checkpoint.actions import add_checkpoint_argument
from kmem.checkpoint.bank.options import add_bank_arguments, bank_options
from kmem.checkpoint.controls import add_control_arguments, parse_controls
from kmem.config import UserError
from kmem.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser, "PATH", "run, one step of a run, or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from the most likely tokens up to this total")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_control_arguments(parser)
    add_bank_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: at least 1")
    if arguments.temperature and not 1e-3 <= arguments.temperature <= 1e3:
        raise UserError(f"--temperature {arguments.temperature}: 0, or from 0.001 to 1000")
    if not 0 <= arguments.seed < 1 << 63:
        raise UserError(f"--seed {arguments.seed}: from 0 to 2^63 - 1")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p {arguments.top_p}: above 0 and at most 1")
    from kmem.hf.loading import load

    controls = parse_controls(arguments.control, "--control")
    bank = bank_options(arguments.bank_levels, arguments.blocked, arguments.tree, controls.get("bank"))
    model, tokenizer = load(arguments.checkpoint, controls, bank, verify=not arguments.no_verify)
    if arguments.no_verify:
        print(f"{arguments.checkpoint}: not verified", file=sys.stderr)
    print(
        continue_text(
            model,
            tokenizer,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    )
    return 0


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The prompt and its continuation. An empty prompt starts a document.

    Raises:
        UserError: prompt and continuation would be longer than `max_position_embeddings`.
    """
    import torch

    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        ids = [tokenizer.eos_token_id]  # documents follow an end of text
    longest = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > longest:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: the prompt has {counted(len(ids), 'token')} and the model takes "
            f"{longest} at most"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.tensor([ids], device=device)
    output = model.to(device).generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
