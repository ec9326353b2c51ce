"""Runs a golden case through mono-jax and prints how much the numbers differ.

A case is a .safetensors file made by running another implementation (such as the public PyTorch release)
on the weights of --model_dir. Its keys show which kind of case it is:

  forward     input_ids, ..., logits, loss, hidden_states.i, attentions.i, grad.NAME
  generate    input_ids, pixel_values, generated, step_logits
  train       step0.input_ids, ..., losses, grad_norms, final.NAME  (AdamW; needs --stage, or a file name with it)

Everything runs in float32. Differences are maximum absolute differences unless their name ends in _rel.
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli

SETTINGS = {  # AdamW settings of the golden trajectories
    "learning_rate": ("peak learning rate", 1e-3),
    "b1": ("AdamW's first beta", 0.9),
    "b2": ("AdamW's second beta", 0.999),
    "eps": ("AdamW's epsilon", 1e-8),
    "weight_decay": ("on tensors with more than one dimension", 0.01),
    "clip_norm": ("largest global gradient norm, 0 = no clipping", 1.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        __doc__, "example:\n  python experiments/parity.py --model_dir=DIR --case=forward.safetensors --json"
    )
    parser.add_argument("--model_dir", required=True, help="Hugging Face folder: config.json and *.safetensors")
    parser.add_argument("--case", required=True, help="the case's .safetensors file")
    parser.add_argument("--stage", help="stage of a trajectory (default: read from the file name)")
    parser.add_argument("--image_token_id", type=int, help="id of <IMG_CONTEXT> if no tokenizer is found (default 100)")
    for field, (what, default) in SETTINGS.items():
        parser.add_argument(f"--{field}", type=float, default=default, help=f"{what} (default {default})")
    args = parser.parse_args(argv)
    cli.alone("parity.py")
    from mono_jax.evaluation.parity import golden_optim, run_case  # after parsing: --help needs none of it

    settings = golden_optim(**{name: getattr(args, name) for name in SETTINGS})
    result = run_case(
        args.model_dir, args.case, stage=args.stage, settings=settings, image_token_id=args.image_token_id
    )
    if args.json:
        cli.json_line(result)
    else:
        for name, value in result.items():
            print(f"{name:22} {value}")


if __name__ == "__main__":
    cli.run(main)
