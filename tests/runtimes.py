"""Every runtime that a patch goes to, asked for its logits; `python -m tests.runtimes` writes the table of them.

Each entry of `RUNTIMES` gets a Llama on disk and a patch for it, and gives the logits (n, vocabulary) of `TOKENS`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import ceil, log10
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchkit import InputError, Patch
from patchkit.export.formats import export
from patchkit.export.merge import merge
from patchkit.export.merge_gguf import merge_gguf
from patchkit.maths.updates import delta_of
from patchkit.model.arch import inspect_model
from patchkit.model.weights import oriented, read_weight
from tests import zoo
from tests.gguf_model import write_gguf
from tests.helpers import patch_of_kind

PAGE = Path(__file__).parent.parent / "docs" / "runtimes.md"
KINDS = ("delta", "sparse", "rotation", "full")
TOKENS = list(range(3, 15))
LLAMA = importlib.util.find_spec("llama_cpp") is not None


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    return found


def changed(base: Path, patch: Patch) -> Tensor:
    """Logits of a model whose weights were written over in float64 and rounded once: what all others should give."""
    model = load(base)
    sites = {site.weight_name: site for site in inspect_model(model).sites}
    for name, chain in patch.updates.items():
        weight = read_weight(sites[name])
        delta = delta_of(chain, lambda w=weight: w.double())  # type: ignore[misc]
        weight.copy_(weight.double() + delta.to(torch.float64).dense())
    return logits(model)


def live(base: Path, patch: Patch, folder: Path) -> Tensor:
    model = load(base)
    with patch.attached(model):
        return logits(model)


def merged(base: Path, patch: Patch, folder: Path) -> Tensor:
    merge([patch], base, folder)
    return logits(load(folder))


def peft(base: Path, patch: Patch, folder: Path) -> Tensor:
    export(patch, folder)
    return logits(PeftModel.from_pretrained(load(base), folder))


def shira(base: Path, patch: Patch, folder: Path) -> Tensor:
    export(patch, folder, "shira")
    return logits(PeftModel.from_pretrained(load(base), folder))


def llama_cpp(base: Path, patch: Patch, folder: Path) -> Tensor:
    export(patch, folder, "gguf")
    return ask_llama(write_gguf(load(base), folder / "base.gguf"), folder / "adapter.gguf")


def llama_cpp_merged(base: Path, patch: Patch, folder: Path) -> Tensor:
    folder.mkdir()
    merge_gguf([patch], write_gguf(load(base), folder / "base.gguf"), folder / "merged.gguf")
    return ask_llama(folder / "merged.gguf")


def ask_llama(model: Path, adapter: Path | None = None, tokens: Sequence[int] = TOKENS) -> Tensor:
    """The logits (n, vocabulary) of llama.cpp itself."""
    from llama_cpp import Llama

    options = {"logits_all": True, "n_ctx": 64, "n_threads": 1, "verbose": False}
    float32 = {"type_k": 0, "type_v": 0}  # of the KV cache, which is float16 by default
    loaded = Llama(str(model), lora_path=adapter and str(adapter), **options, **float32)
    loaded.eval(list(tokens))
    return torch.from_numpy(loaded._scores.copy())


def mlx(base: Path, patch: Patch, folder: Path) -> Tensor:
    model = load(base)
    export(patch, folder, "mlx")
    attach_mlx(model, model.get_submodule("model.layers"), folder, "model.layers")
    return logits(model)


def attach_mlx(model: PreTrainedModel, layers: nn.Module, folder: Path, before: str) -> int:
    """Put the adapter on `model` by mlx_lm's rules (tuner/utils.py: load_adapters); returns how many modules have it.

    A LoRA goes on every module of the last num_layers layers that has one of the keys' names in its layer. Then the
    tensors are loaded by their names in the tree, `before` being the layers'.
    """
    assert isinstance(layers, nn.ModuleList)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    lora, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    first = len(layers) - config["num_layers"]
    made = {
        f"{before}.{index}.{key}": module
        for index, layer in enumerate(layers)
        for key, module in layer.named_modules()
        if index >= first and key in lora["keys"]
    }
    assert {name.rsplit(".", 1)[0] for name in tensors} == made.keys()
    for name, module in made.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        shape = oriented(module, module.weight).shape
        assert (a.shape, b.shape) == ((shape[1], lora["rank"]), (lora["rank"], shape[0]))
        module.register_forward_hook(lambda _, x, y, a=a, b=b: y + lora["scale"] * ((x[0] @ a) @ b))
    return len(made)


RUNTIMES: dict[str, Callable[[Path, Patch, Path], Tensor]] = {
    "live": live,
    "merged, transformers": merged,
    "PEFT": peft,
    "PEFT, SHiRA": shira,
    "llama.cpp": llama_cpp,
    "llama.cpp, merged": llama_cpp_merged,
    "MLX layout": mlx,
}


def measure(runtime: str, kind: str, folder: Path) -> float | str:
    """The largest difference of logits from the changed weights, or why there is none."""
    base = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), folder / "base")
    patch = patch_of_kind(load(base), str(base), kind)
    wanted = changed(base, patch)
    assert (wanted - logits(load(base))).abs().max() > 0.5
    try:
        return float((RUNTIMES[runtime](base, patch, folder / "out") - wanted).abs().max())
    except InputError as error:
        return (
            str(error).partition(": ")[2].partition(";")[0].replace("100% of its entries change", "every entry changes")
        )


def table() -> dict[str, dict[str, str]]:
    """The cells of docs/runtimes.md, by runtime and kind of update."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _lines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def _lines() -> list[str]:
    found = re.search(r"<!-- runtimes -->\n(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].splitlines()


def _cell(found: float | str) -> str:
    return found if isinstance(found, str) else f"{10.0 ** ceil(log10(found)):.0e}" if found else "0"


def main() -> None:
    """Measure all cells and write them into the page; llama.cpp has to be installed."""
    assert LLAMA, "pip install llama-cpp-python"
    lines = [f"| largest difference of logits | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for runtime in RUNTIMES:
        cells = []
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                cells.append(_cell(measure(runtime, kind, Path(folder))))
        lines.append(f"| {runtime} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"(<!-- runtimes -->\n).*?(<!-- end -->)", rf"\1{text}\2", page, flags=re.DOTALL), "utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
