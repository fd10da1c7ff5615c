// What crosses the border between Python and the kernels: plain structs and the lists that both sides expand.
//
// No torch header is included anywhere below csrc: pointers cross as integers. fastmeta/spec.py holds the same lists
// in the same order; a test compares them, and a worker's number for a name is its place here.
#pragma once

// Hidden activations φ(z); sine is sin(w0 z), gelu the exact one (erf), none the identity.
#define FM_ACTIVATIONS(X) \
  X(relu)                 \
  X(sine)                 \
  X(tanh)                 \
  X(sigmoid)              \
  X(softplus)             \
  X(gelu)                 \
  X(silu)                 \
  X(none)

// Output activations; linear is the identity.
#define FM_OUTPUTS(X) \
  X(linear)           \
  X(relu)             \
  X(tanh)             \
  X(sigmoid)          \
  X(softplus)

namespace fastmeta {

#define FM_NAME(name) k_##name,
enum class Activation : int { FM_ACTIVATIONS(FM_NAME) };
enum class Output : int { FM_OUTPUTS(FM_NAME) };
#undef FM_NAME

}  // namespace fastmeta
