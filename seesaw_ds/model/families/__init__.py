"""The model families, by the ``architectures`` entry of their configs. Plain data, no torch."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family
from seesaw_ds.model.families.gemma2 import GEMMA2
from seesaw_ds.model.families.gemma3 import GEMMA3
from seesaw_ds.model.families.granite import GRANITE
from seesaw_ds.model.families.llama import LLAMA
from seesaw_ds.model.families.mistral import MISTRAL
from seesaw_ds.model.families.mixtral import MIXTRAL
from seesaw_ds.model.families.olmo2 import OLMO2
from seesaw_ds.model.families.phi3 import PHI3
from seesaw_ds.model.families.qwen2 import QWEN2
from seesaw_ds.model.families.qwen3 import QWEN3
from seesaw_ds.model.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GRANITE, OLMO2, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE)
}
