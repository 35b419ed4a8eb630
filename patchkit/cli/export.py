"""`patchkit export`: a patch for other runtimes."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import note, quiet_transformers, stdout


@click.command("export")
@click.argument("patch")
@click.option("--format", "kind", type=click.Choice(["peft"]), default="peft", show_default=True)
@click.option("--out", metavar="DIR", help="The adapter's folder [default: <name of PATCH>-peft].")
@click.option("--model", metavar="M", help="The base; only its config.json is read [default: as PATCH says].")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Cut every update to rank N; says what that loses.")
@click.option("--all-layers", is_flag=True, help="Zeros for the layers PATCH leaves alone, for servers that want all.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    patch: str,
    kind: str,
    out: str | None,
    model: str | None,
    rank: int | None,
    all_layers: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Write PATCH as a LoRA adapter for PEFT, vLLM, TGI and llama.cpp, exact up to rounding unless --rank cuts it."""
    from patchkit.export.peft import VLLM_RANKS, export_peft
    from patchkit.patch.patch import Patch

    quiet_transformers()
    folder = Path(out) if out else Path(f"{Path(patch).name}-{kind}")
    done = export_peft(Patch.load(patch), folder, model, rank=rank, all_layers=all_layers, dtype=dtype)
    if as_json:
        summary = done.model_dump(mode="json", exclude={"parents"})
        stdout.print_json(data={"adapter": str(folder), "max_lora_rank": done.vllm_rank, **summary})
        return
    for weight in done.weights:
        stdout.print(f"{weight.weight}: rank {weight.rank}, off by {weight.error:.2g} of its change")
    stdout.print(f"adapter: {folder} (rank {done.rank}; PeftModel.from_pretrained(model, {str(folder)!r}))")
    if done.vllm_rank:
        stdout.print(f"vLLM: --enable-lora --max-lora-rank {done.vllm_rank}")
    else:
        note(f"rank {done.rank} is more than vLLM serves ({VLLM_RANKS[-1]}); --rank {VLLM_RANKS[-1]} cuts it to that")
