"""A LoRA adapter as llama.cpp and Ollama load it, beside the base as GGUF, however that is quantized.

my-adapter/
  Modelfile     for `ollama create`
  adapter.gguf  <tensor>.lora_a (r, d_in) and .lora_b (d_out, r), with the rank as alpha: scaling 1; of a layer's
                experts (E, r, d_in) and (E, d_out, r)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from patchkit.errors import InputError
from patchkit.export.formats import exporter
from patchkit.export.gguf_names import architecture, in_gguf_order, library, stack_name, tensor_name
from patchkit.export.job import Exported, Job
from patchkit.export.lora import lora_factors
from patchkit.patch.card import base_name

FILE, MODELFILE = "adapter.gguf", "Modelfile"


def _commands(exported: Exported) -> Sequence[str]:
    return (
        f"llama-server -m BASE.gguf --lora {{title}}/{FILE}  # BASE.gguf: {{base}} as GGUF, in any quantization",
        f"ollama create NAME -f {{title}}/{MODELFILE}  # its FROM line names the base",
    )


@exporter(
    "gguf",
    files=(MODELFILE, FILE),
    library="llama.cpp",
    commands=_commands,
    takes=("rank", "gguf_base"),
    dtypes=("float32", "float16"),
)
def gguf(job: Job, into: Path) -> Exported:
    """A LoRA adapter for llama.cpp and Ollama."""
    package, config = library(), job.tree.config
    factors = lora_factors(job, all_layers=False)
    exported = job.exported("gguf", factors.rank, factors.weights, ())
    arch = architecture(config)
    named = dict(_named(arch, config, factors.padded()))
    for stack, each in factors.stacks.items():
        name = stack_name(arch, config.get_text_config().num_hidden_layers, job.tree, stack, each.place.count)
        named[name] = each.padded(factors.rank)
    if job.options.gguf_base:
        _check_base(job.options.gguf_base, arch, named)
    writer = package.GGUFWriter(into / FILE, arch)
    writer.add_type(package.GGUFType.ADAPTER)
    writer.add_string(package.Keys.Adapter.TYPE, "lora")
    writer.add_float32(package.Keys.Adapter.LORA_ALPHA, float(factors.rank))
    writer.add_name(job.title)
    for name, (a, b) in named.items():
        writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = Path(job.options.gguf_base).absolute() if job.options.gguf_base else "./BASE.gguf"
    (into / MODELFILE).write_text(
        f"# {base_name(exported.base.name)} as a GGUF file, or its name in Ollama\nFROM {base}\nADAPTER ./{FILE}\n",
        encoding="utf-8",
    )
    return exported


def _named(
    arch: str, config: object, factors: Iterator[tuple[str, Tensor, Tensor]]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    layers = config.get_text_config().num_hidden_layers  # type: ignore[attr-defined]
    for module, a, b in factors:
        name = tensor_name(arch, layers, module)
        yield name, (a, in_gguf_order(arch, name, b, config))


def _check_base(file: str, arch: str, named: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Raises InputError where the GGUF file is not that of the base, as far as architecture and shapes tell."""
    try:
        reader = library().GGUFReader(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--gguf-base {file}: cannot be read: {error}") from None
    field = reader.get_field("general.architecture")
    if field is None or field.contents() != arch:
        found = field.contents() if field else "no architecture"
        raise InputError(f"--gguf-base {file}: holds {found}, the patch is for {arch}; give the base's own file")
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    for name, (a, b) in named.items():
        wanted = (*b.shape[:-1], a.shape[-1])
        if shapes.get(name) != wanted:
            there = shapes.get(name, "not there")
            raise InputError(f"--gguf-base {file}: {name} is {there}, not {wanted}; it is another model")
