// AVX2 with FMA: x86-64-v3.
#define FM_ISA avx2
#define FM_VECTOR_BYTES 32
#define FM_TABLE kAvx2Table
#include "body.h"
