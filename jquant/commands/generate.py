"""The command that lets a model write."""

from __future__ import annotations

from jquant.commands.options import parsed_scheme, round_layers
from jquant.models.generate_config import GenerateConfig


def generate_command(config: GenerateConfig) -> None:
    schemes = parsed_scheme(config.scheme)

    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.generate import Sampling, generate
    from jquant.nn.mesh import make_mesh

    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    checkpoint = open_checkpoint(config.model)
    if schemes is None:
        checkpoint = checkpoint.packed()
    tokenizer = checkpoint.tokenizer()
    model = checkpoint.model(dtype=config.dtype, mesh=make_mesh(config.mesh))
    round_layers(model, schemes)
    prompt = tokenizer.encode(config.prompt, add_eos=False)
    tokens: list[int] = []
    shown = tokenizer.decode(prompt)
    print(shown, end="", flush=True)
    # A token may be a part of a character: what is shown is always the decoding of all tokens so far.
    for token in generate(model, prompt, max_tokens=config.max_tokens, sampling=sampling, stop_ids=tokenizer.eos_ids):
        tokens.append(token)
        text = tokenizer.decode([*prompt, *tokens])
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode([*prompt, *tokens])[len(shown) :], flush=True)
