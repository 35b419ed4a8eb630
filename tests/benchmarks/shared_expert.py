"""What editing the expert alone that all tokens share gives, beside editing the routed experts.

    python -m tests.benchmarks.shared_expert [--out out/shared] [--facts fresh] [--edits 50] [--set key=value ...]

The embedded mixture has no shared expert, so one that has is trained into `--out` first, of the world and by the script
that the embedded ones are from: eight routed experts of 160 in each of five layers, two of them for a token, and one of
160 that all tokens go to. That takes ten minutes on one core, once. "The shared expert alone" solves for that
one's output projection as for a dense layer's; the other rows are those of `tests.benchmarks.experts`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchkit.bench import method
from patchkit.model import arch
from tests.benchmarks.experts import DRAWS, TITLE, elsewhere, line, most_chosen, rows, script, seeing, strongest, whole

STEPS = 400
"""Of the training: what the dense model has."""


@contextmanager
def shared_alone() -> Iterator[None]:
    """Inside the block, the output projection of a layer is that of its shared expert, and facts are written whose keys
    there are all over plain text, which `apply` refuses."""
    own, apply = arch._output_projection, method.apply

    def found(model: Any, block_name: str, block: Any, hidden_size: int) -> str:
        names = [name for name, _ in block.named_modules() if name.endswith("shared_experts.down_proj")]
        return names[0] if names else own(model, block_name, block, hidden_size)

    arch._output_projection, method.apply = found, partial(apply, allow_close_keys=True)
    try:
        yield
    finally:
        arch._output_projection, method.apply = own, apply


def trained(folder: Path) -> Path:
    """The folder of a mixture with a shared expert that knows the embedded world, trained if it is not there."""
    if (folder / "model.safetensors").is_file():
        return folder
    world = script()
    sizes = replace(world.MIXTURE, steps=STEPS)
    torch.set_num_threads(1)
    facts, names = world.make_world(sizes)
    tokenizer = world.train_tokenizer(sizes)
    model = with_shared(sizes, tokenizer)
    world.train(model, tokenizer, facts, world.Writer(facts, names, seed=sizes.seed, fact_share=0.6), sizes)
    model.to(torch.bfloat16)
    for name, share, seed, tokens in (("text", 0.6, 101, sizes.text_tokens), ("eval", 0.15, 202, sizes.eval_tokens)):
        text = world.write_text(world.Writer(facts, names, seed=seed, fact_share=share), tokenizer, tokens)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"patchkit-{name}.txt").write_text(text)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    known = world.accuracy(model.float(), tokenizer, facts, range(5))
    print(f"knows {known:.3f} of the facts in every wording: {asdict(sizes)}", flush=True)
    return folder


def with_shared(sizes: Any, tokenizer: Any) -> Any:
    """The embedded mixture's sizes with a shared expert beside the routed ones, whose output is added as it is."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(sizes.seed)
    config = Ernie4_5_MoeConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=True,
        initializer_range=0.04,
        moe_num_experts=sizes.experts,
        moe_k=sizes.chosen,
        moe_intermediate_size=sizes.intermediate,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
        moe_layer_end_index=sizes.layers - 1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Ernie4_5_MoeForCausalLM(config)


def main() -> None:
    """Train the model if it is not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/shared"))
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--facts", choices=list(DRAWS), default="fresh")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    options = parser.parse_args()
    model = trained(options.out / "model").absolute()
    facts = DRAWS[options.facts].write(options.out / f"{options.facts}.jsonl", options.edits)
    print(TITLE, "| --- " * 8 + "|", sep="\n", flush=True)
    kinds = (
        ("routed experts", whole, nullcontext),
        ("the strongest expert alone", strongest, nullcontext),
        ("the most chosen expert alone", most_chosen, nullcontext),
        ("the shared expert alone", whole, shared_alone),
    )
    for place, (name, kept, within) in enumerate(kinds):
        out = options.out / str(place)
        with seeing(kept), within():
            row = rows(str(model), "alphaedit", out, options.edits, options.edits, facts, options.settings)
        print(line(name, row, elsewhere(out, row, facts)), flush=True)


if __name__ == "__main__":
    main()
