"""Cost of merging an adapter into a full checkpoint, at two sizes, also relative to mergekit.

    python examples/benchmarks/merge_into.py [--layers 2,8] [--mergekit PATH/TO/mergekit-yaml]

A random Llama in bfloat16, in shards, and a LoRA of rank 16 on q and v. Each job is a process of its own, from
files to files. Its time is that of the whole command, including imports. Its memory is the peak of the whole process,
for pimerge above that of its imports alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANK = 16


def main() -> None:
    """Print a line per size and tool."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", default="2,8")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mergekit", default="", help="path of mergekit-yaml in its own environment")
    arguments = parser.parse_args()
    for layers in map(int, arguments.layers.split(",")):
        with tempfile.TemporaryDirectory(prefix="merge-into-") as name:
            folder = Path(name)
            size = make(folder, layers, arguments.width)
            command = [sys.executable, "-m", "pimerge", "merge", "adapter", "--into", "base", "--head", "none", "-q"]
            nothing = run(
                [
                    sys.executable,
                    "-c",
                    "import pimerge.cli.merge.show, pimerge.adapters.merge_into\nimport pimerge.adapters.writer",
                ],
                folder,
            )
            own = run([*command, "-o", "merged"], folder)
            line = f"{layers} layers, {size / 1e9:.2f} GB: pimerge {own[0]:.1f} s, "
            line += f"{own[1] - nothing[1]:.0f} MB above imports"
            if arguments.mergekit:
                (folder / "config.yml").write_text(
                    "merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: ./base+./adapter\n"
                )
                peer = run([arguments.mergekit, "config.yml", "theirs", "--lora-merge-cache", "cache"], folder)
                line += f"; mergekit {peer[0]:.1f} s ({peer[0] / own[0]:.1f} ×), {peer[1]:.0f} MB in all"
                line += f"; largest difference {difference(folder):.1e}"
            print(line, flush=True)


def make(folder: Path, layers: int, width: int) -> int:
    """The base and the adapter; the base's size in bytes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(folder / "adapter")
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of a command."""
    script = (
        "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "sys.exit(done.stderr) if done.returncode else "
        "print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, json.loads(done.stdout)


def difference(folder: Path) -> float:
    """The largest difference of two merged checkpoints."""
    from safetensors.torch import load_file

    found = {}
    for name in ("merged", "theirs"):
        tensors = {}
        for file in sorted((folder / name).glob("*.safetensors")):
            tensors |= load_file(file)
        found[name] = tensors
    return max(
        float((found["merged"][key].float() - found["theirs"][key].float()).abs().max()) for key in found["theirs"]
    )


if __name__ == "__main__":
    main()
