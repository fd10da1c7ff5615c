// AVX-512 (F, BW, DQ, VL): x86-64-v4.
#define FM_ISA avx512
#define FM_VECTOR_BYTES 64
#define FM_TABLE kAvx512Table
#include "body.h"
