// What crosses the border between Python and the kernels: plain structs and the lists that both
// sides expand.
//
// No torch header is included anywhere below csrc: pointers cross as integers. fastmeta/spec.py,
// batch.py and rules.py hold the same lists in the same order; a test compares them, and a worker's
// number for a name is its place here.
#pragma once

#include <cstdint>

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

#define FM_LOSSES(X) \
  X(mse)             \
  X(l1)

// What a network is measured by: its values at points, a CT projection of its image, compositing
// along rays.
#define FM_MEASURES(X) \
  X(none)              \
  X(project)           \
  X(march)

#define FM_RULES(X) \
  X(sgd)            \
  X(momentum)       \
  X(adam)           \
  X(meta_sgd)

// What a call computes, under the names of the passes in fastmeta/reference.py.
#define FM_OPS(X) \
  X(mlp)          \
  X(mlp_grad)     \
  X(mlp_dual)     \
  X(loss)         \
  X(loss_grad)    \
  X(loss_hvp)     \
  X(adapt)        \
  X(maml)

namespace fastmeta {

#define FM_NAME(name) k_##name,
enum class Activation : int { FM_ACTIVATIONS(FM_NAME) };
enum class Output : int { FM_OUTPUTS(FM_NAME) };
enum class Loss : int { FM_LOSSES(FM_NAME) };
enum class Measure : int { FM_MEASURES(FM_NAME) };
enum class RuleKind : int { FM_RULES(FM_NAME) };
enum class Op : int { FM_OPS(FM_NAME) };
#undef FM_NAME

constexpr int kMaxDepth = 64;  // linear layers

// Arrays are dense, of one scalar type (float or double) throughout a call; counts and seeds are
// int64. A stride is the distance between tasks in elements; 0 where all tasks share one row.

struct Network {
  int64_t in = 0, out = 0, width = 0, depth = 0;
  Activation activation = Activation::k_relu;
  Output output = Output::k_linear;
  double w0 = 1, w0_first = 1, shift = 0;
  // h_0 = q in the first `identity` columns and sin(q) in the others, q = x basis + phase; encoded
  // = 0: h_0 = x
  int64_t encoded = 0, identity = 0;
  const void* basis = nullptr;  // [in, encoded]
  const void* phase = nullptr;  // [encoded]
};

struct March {
  int64_t samples = 0;
  double last_interval = 0;
  int white = 0, softplus = 0;
};

// T tasks of N points or rays, as fastmeta.Batch describes them.
struct Data {
  int64_t tasks = 0, points = 0, per_step = 0;  // per_step: drawn anew at each step; 0: all
  const void* x = nullptr;                      // [T or 1, N, in]
  int64_t x_stride = 0;
  const void* y = nullptr;          // [T, N, C], [T, R, 3] or [T, A, W]
  const int64_t* counts = nullptr;  // [T]; null: all N
  const int64_t* seed = nullptr;    // [T]
  Loss loss = Loss::k_mse;
  double clamp = 0;  // of l1; 0: none
  Measure measure = Measure::k_none;
  March march;
  const void* origins = nullptr;     // [T, R, 3]
  const void* directions = nullptr;  // [T, R, 3]
  const void* near = nullptr;        // [T]
  const void* far = nullptr;         // [T]
  const int32_t* pixels = nullptr;   // [T, A, W, W], −1 outside
  int64_t angles = 0, size = 0;      // A, W
  // the entries (a, r, c) of pixels sorted by pixel: a W + c [T, A W W], and where those of each
  // pixel begin [T, W W + 1]; the CUDA kernels alone read them
  const int32_t *order = nullptr, *starts = nullptr;
};

struct Rule {
  RuleKind kind = RuleKind::k_sgd;
  int nesterov = 0;
  double mu = 0, weight_decay = 0, beta1 = 0, beta2 = 0, eps = 0;
};

struct Job {
  Op op = Op::k_mlp;
  int threads = 1;
  Network net;
  Data data, query;  // query.tasks = 0: the data themselves
  const void* params = nullptr;
  int64_t params_stride = 0;
  const void* v = nullptr;  // tangent of the weights, for mlp_dual and loss_hvp
  int64_t v_stride = 0;
  const void* w = nullptr;  // tangent of the coordinates, for mlp_dual; null: none
  int64_t w_stride = 0;
  const void* gy = nullptr;  // [T, N, C]
  int64_t step = 0;          // of the draw, for loss, loss_grad, loss_hvp
  // results; null: not wanted
  void* y = nullptr;     // [T, N, C]; ẏ for mlp_dual
  void* loss = nullptr;  // [T]; [K, T] for adapt
  void* grad = nullptr;  // [T, P]; p̄̇ for mlp_dual; [P], summed over tasks, for maml
  void* hv = nullptr;    // [T, P]
  void* gx = nullptr;    // [T, N, in]
  // inner loop
  int64_t steps = 0;
  Rule rule;
  const void* lr = nullptr;
  int64_t lr_stride[3] = {0, 0, 0};  // of [K, T, P]; the last one 0 or 1
  void* theta = nullptr;             // [T, P]
  void* thetas = nullptr;            // [K+1, T, P]
  int order = 2;
  void* rates = nullptr;  // gradient of the rates, [K or 1, T or 1, P or 1], summed over what is 1
  int64_t rates_size[3] = {0, 0, 0};
  int64_t budget =
      0;  // bytes of activations kept between the passes of a meta-gradient or a projection
};

// composite alone. raw [R, S, 4], t [R, S]; vraw and vt null: plain. Forward writes rgb [R, 3],
// depth [R], acc [R]; given the adjoints g*, backward writes graw and gt; with tangents all outputs
// are tangents.
struct CompositeJob {
  March march;
  int threads = 1;
  int64_t rays = 0;
  const void *raw = nullptr, *t = nullptr, *vraw = nullptr, *vt = nullptr;
  const void *grgb = nullptr, *gdepth = nullptr, *gacc = nullptr;
  void *rgb = nullptr, *depth = nullptr, *acc = nullptr, *graw = nullptr, *gt = nullptr;
};

// project alone, or its adjoint: image [T, W, W], pixels [T, A, W, W], sinogram [T, A, W]; order and
// starts as in Data.
struct ProjectJob {
  int threads = 1;
  int64_t tasks = 0, angles = 0, size = 0;
  const int32_t *pixels = nullptr, *order = nullptr, *starts = nullptr;
  const void* from = nullptr;
  void* to = nullptr;
  int adjoint = 0;
};

}  // namespace fastmeta
