"""What the Triton worker's kernels may cost, as ``triton_aot.over_budget`` reads it.

No kernel spills, except those listed: bytes of local memory a thread, measured under Triton 3.9 and
3.6 and rounded up to 64. Products run on tensor
cores, nothing in double, and before sm_90 blocks of 16-bit operands reach registers by ldmatrix
(LDSM).
"""

from __future__ import annotations

from typing import Any

# Reasons; nearly all of these kernels stand at 255 registers.
SPLIT = "three products of split operands: their halves live beside two accumulators"
DUAL = "value and tangent of a tile, of its slope and of its accumulators live at once"
HELD = "sums of all layers' weights stay in registers over all points"
WIDE = "a tile's sums alone, 128 × 256 in float32, are 128 registers a thread"
ENCODED = "features, their cosines and tangents are made again beside two accumulators"

# (label, kernel, architecture): (bytes under 3.9, under 3.6, reason); the first match counts.
SPILLS: dict[tuple[str, str, int], tuple[int, int, str]] = {
    ("* loss", "back", 80): (0, 0, DUAL),
    ("* loss", "back", 90): (0, 0, DUAL),
    ("* loss", "back", 100): (0, 0, DUAL),
    ("siren H16 fp32 both", "weigh", 80): (0, 64, SPLIT),
    ("siren H256 fp32 plain", "back", 80): (0, 64, SPLIT),
    ("siren H256 bf16 x", "back", 80): (0, 64, WIDE),
    ("nerf H256 fp32 double", "weigh", 80): (0, 64, ENCODED),
    ("* points plain", "resident", 80): (0, 64, HELD),
    ("siren H64 fp32 *", "ahead", 80): (64, 0, SPLIT),
    ("siren H512 fp32 hvp", "ahead", 80): (64, 0, SPLIT),
    ("nerf H256 fp32 double", "ahead", 80): (64, 64, ENCODED),
    ("siren H256 tf32 plain", "ahead", 80): (64, 64, SPLIT),
    ("* hvp", "back", 80): (64, 64, DUAL),
    ("* both", "back", 80): (64, 64, DUAL),
    ("* double", "back", 80): (64, 128, DUAL),
    ("* points dual", "back", 80): (64, 0, DUAL),
    ("siren H16 fp32 plain", "resident", 80): (256, 256, HELD),
    ("siren H32 fp32 plain", "resident", 80): (384, 448, HELD),
    ("siren H64 *", "resident", 80): (64, 64, HELD),
    ("siren H64 fp32 both", "weigh", 80): (448, 512, SPLIT),
    ("siren H256 fp32 both", "weigh", 80): (576, 384, SPLIT),
    ("siren H64 *", "weigh", 80): (128, 128, DUAL),
    ("deep H64 *", "weigh", 80): (128, 128, DUAL),
    ("nerf H64 *", "weigh", 80): (64, 0, DUAL),
    ("* H256 *16 *", "weigh", 80): (0, 64, ENCODED),
    ("siren H512 bf16 plain", "back", 90): (0, 64, WIDE),
    ("deep H64 fp32 hvp", "ahead", 90): (0, 128, SPLIT),
    ("nerf H64 fp32 *", "weigh", 90): (0, 128, ENCODED),
    ("nerf H64 fp32 hvp", "ahead", 90): (0, 64, ENCODED),
    ("nerf H256 bf16 *", "weigh", 90): (0, 64, ENCODED),
    ("siren H256 *16 *", "ahead", 90): (0, 128, WIDE),
    ("fourier H256 fp32 hvp", "ahead", 90): (192, 256, ENCODED),
    ("nerf H256 bf16 double", "ahead", 90): (512, 576, ENCODED),
    ("nerf H256 fp32 double", "ahead", 90): (384, 384, ENCODED),
    ("nerf H256 fp32 hvp", "ahead", 90): (128, 256, ENCODED),
    ("siren H* fp32 *", "ahead", 90): (64, 320, SPLIT),
    ("siren H16 fp32 *", "back", 90): (256, 192, SPLIT),
    ("siren H128 fp32 hvp", "back", 90): (128, 64, SPLIT),
    ("siren H32 fp32 hvp", "back", 90): (128, 64, SPLIT),
    ("* fp32 *", "back", 90): (64, 128, SPLIT),
    ("* hvp", "back", 90): (64, 64, DUAL),
    ("* both", "back", 90): (64, 64, DUAL),
    ("* double", "back", 90): (64, 64, DUAL),
    ("siren H16 fp32 plain", "resident", 90): (384, 192, HELD),
    ("siren H32 fp32 plain", "resident", 90): (448, 448, HELD),
    ("*", "resident", 90): (64, 64, HELD),
    ("nerf H256 fp32 double", "weigh", 90): (512, 384, ENCODED),
    ("siren H256 fp32 both", "weigh", 90): (384, 320, SPLIT),
    ("siren H64 fp32 both", "weigh", 90): (128, 64, SPLIT),
    ("siren H* fp32 *", "weigh", 90): (64, 64, SPLIT),
    ("siren H32 bf16 hvp", "weigh", 90): (64, 0, DUAL),
    ("siren H16 bf16 *", "back", 100): (0, 64, DUAL),
    ("siren H16 bf16 both", "weigh", 100): (0, 64, DUAL),
    ("siren H512 fp32 hvp", "weigh", 100): (0, 64, SPLIT),
    ("nerf H64 bf16 hvp", "weigh", 100): (0, 64, ENCODED),
    ("nerf H256 bf16 *", "weigh", 100): (64, 64, ENCODED),
    ("fourier H256 fp32 *", "weigh", 100): (128, 128, ENCODED),
    ("nerf H256 fp32 double", "weigh", 100): (512, 192, ENCODED),
    ("nerf H* fp32 *", "weigh", 100): (128, 128, ENCODED),
    ("deep H64 bf16 hvp", "ahead", 100): (64, 0, DUAL),
    ("siren H64 bf16 *", "ahead", 100): (64, 0, DUAL),
    ("* H16 fp32 *", "back", 100): (256, 128, SPLIT),
    ("* H32 fp32 *", "back", 100): (256, 64, SPLIT),
    ("* H64 fp32 *", "back", 100): (256, 128, SPLIT),
    ("* fp32 *", "back", 100): (64, 64, SPLIT),
    ("siren H256 *", "back", 100): (192, 128, DUAL),
    ("siren H64 tf32 hvp", "back", 100): (192, 64, DUAL),
    ("siren H64 bf16 double", "back", 100): (64, 64, DUAL),
    ("nerf H256 bf16 *", "back", 100): (64, 192, DUAL),
    ("fourier H256 bf16 *", "back", 100): (64, 128, DUAL),
    ("siren H512 *", "back", 100): (128, 128, DUAL),
    ("siren H16 fp32 plain", "resident", 100): (320, 256, HELD),
    ("siren H32 fp32 plain", "resident", 100): (448, 384, HELD),
    ("siren H16 bf16 plain", "resident", 100): (64, 64, HELD),
}

PRODUCTS = ("resident", "ahead", "back", "weigh")
OTHERS = ("shade", "gather", "advance", "march", "add_parts", "draw_points", "draw_rays")
OTHERS += ("_project", "_adjoint")
# A block of fewer than 64 rows is not wgmma's (HGMMA) or tcgen05's (UTCMMA).
WARPGROUP = {90: "HGMMA", 100: "UTCMMA"}


def _limits(label: str, kernel: str, arch: int, stack: int) -> dict[str, Any]:
    # the range of a uniform draw is put together from two halves
    limits: dict[str, Any] = {"registers": 255, "stack": stack, "F64": 0}
    if kernel == "draw_rays":
        limits["F64"] = 2
    least = {}
    products = not (kernel == "back" and label.endswith(" loss"))
    if kernel in ("ahead", "back") and arch in WARPGROUP and products:
        least[WARPGROUP[arch]] = 1
    if kernel in PRODUCTS and arch == 80 and products:
        least["HMMA"] = 1
        if kernel != "resident" and ("bf16" in label or "fp16" in label):
            least["LDSM"] = 1
    return limits | {"at_least": least}


def budgets(old: bool) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Of the installed Triton, or of 3.6."""
    table = {}
    for (label, kernel, arch), (new, before, _) in SPILLS.items():
        table[label, kernel, arch] = _limits(label, kernel, arch, before if old else new)
    for arch in (80, 90, 100):
        for kernel in (*PRODUCTS, *OTHERS):
            for label in ("* loss", "* bf16 *", "* fp16 *", "*"):
                table.setdefault((label, kernel, arch), _limits(label, kernel, arch, 0))
    return table
