"""How adapters are made, and a frozen base in few bits."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraArgs:
    """LoRA and QLoRA, with --lora_enable. What they mean: docs/engine.md."""

    lora_target: str = flag(
        "llm_attn",
        "Matrices that get an adapter, by comma: llm_attn, llm_all, mot_und, mot_gen (the experts apart), vit, connector, flow, "
        "box, mask; or re:PATTERN for names of modules.",
    )
    lora_r: int = flag(16, "Rank of the adapters.", low=1)
    lora_alpha: int = flag(32, "What an adapter adds is multiplied by alpha / rank.", low=1)
    lora_dropout: float = flag(
        0.05, "Share of an adapter's inputs that training leaves out.", low=0, high=0.99
    )
    lora_use_rslora: bool = flag(False, "Multiply by alpha / sqrt(rank) instead.")
    lora_resume_path: str | None = flag(
        None, "Begin with the adapters of this PEFT directory; None: with ones that change nothing."
    )
    load_in_4bit: bool = flag(False, "Keep the matrices of --quant_target in 4 bits (QLoRA; bitsandbytes).")
    load_in_8bit: bool = flag(False, "Keep the matrices of --quant_target in 8 bits (bitsandbytes).")
    quant_target: str = flag("llm_all", "Matrices in few bits, named as for --lora_target.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag("nf4", "The 16 values of 4 bits.")
    bnb_4bit_use_double_quant: bool = flag(True, "With 4 bits: keep the blocks' scales in 8 bits as well.")

    @property
    def bits(self) -> int:
        """Of the matrices of `quant_target`; 0: as they are."""
        return 4 * self.load_in_4bit or 8 * self.load_in_8bit
