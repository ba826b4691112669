"""Products of matrices on a CPU, fp32, by whichever of torch's two libraries is faster there.

torch multiplies fp32 by MKL, which uses AVX-512 on Intel's processors alone: on those of AMD that have it oneDNN takes
half to nine tenths of the time. torch takes oneDNN for all products where it may round their factors to bf16. oneDNN
does so in units for bf16 (AMX) and nowhere else: where there are none it multiplies in fp32. Whether it does is looked
at, not believed. The choice depends on the processor and on nothing measured: a run can be repeated bit for bit.
"""

import torch


def use_faster_library() -> bool:
    """Have oneDNN do all fp32 products of this process on the CPU, if it is the faster one there; True if it is.

    Where torch's matmul precision was set to anything already, that stands.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest" or not is_amd_with_avx512():
        return False
    torch.set_float32_matmul_precision("medium")
    if keeps_fp32():
        return True
    torch.set_float32_matmul_precision(before)
    return False


def onednn_multiplies() -> bool:
    """Whether torch takes oneDNN for its fp32 products on the CPU."""
    return torch.get_float32_matmul_precision() == "medium"


def is_amd_with_avx512() -> bool:
    cpu = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and "AMD" in cpu.get("cpu_name", "") and cpu.get("avx512_f", False)


def keeps_fp32() -> bool:
    """Whether products keep the last digit of their factors."""
    digit = torch.full((64, 64), 1 + 2**-23)
    one = torch.eye(64)
    return all(torch.equal(found, digit) for found in (digit @ one, one @ digit, torch.bmm(digit[None], one[None])[0]))
