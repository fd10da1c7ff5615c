// Every x86-64 (SSE2) and every aarch64 (NEON).
#if defined(__aarch64__)
#define FM_ISA neon
#else
#define FM_ISA baseline
#endif
#define FM_VECTOR_BYTES 16
#define FM_TABLE kBaselineTable
#include "body.h"
