// A program for test_neon.py: loss_grad of a ReLU network and a SIREN by the baseline table.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>
#include "cpu/isa.h"
using namespace fastmeta;
using Row = std::vector<double>;

Arena::~Arena() { release(); }
void Arena::release() { std::free(block_); }
char* Arena::reserve(int64_t bytes) {
  release();
  size_ = (bytes + 63) / 64 * 64;
  block_ = static_cast<char*>(std::aligned_alloc(64, size_));
  if (!block_) throw std::bad_alloc();
  return block_;
}

constexpr int64_t kTasks = 3, kPoints = 37;  // on two threads: one task each, and one for both

Row uniform(int64_t count, double scale) {
  static uint32_t state = 1;
  Row r(count);
  for (double& v : r) v = ((state = state * 1664525u + 1013904223u) / 2147483648.0 - 1.0) * scale;
  return r;
}
template <class T>
double loss_grad(const Network& net, const Row& params, const Row& x, const Row& y, Row& grad) {
  const std::vector<T> p(params.begin(), params.end()), xs(x.begin(), x.end()), ys(y.begin(), y.end());
  std::vector<T> g(params.size()), loss(kTasks);
  Job job;
  job.op = Op::k_loss_grad;
  job.threads = 2;
  job.net = net;
  job.data.tasks = kTasks;
  job.data.points = kPoints;
  job.data.x = xs.data();
  job.data.x_stride = kPoints * net.in;
  job.data.y = ys.data();
  job.params = p.data();
  job.params_stride = static_cast<int64_t>(p.size()) / kTasks;
  job.loss = loss.data();
  job.grad = g.data();
  Arena arena;
  kBaselineTable.run[sizeof(T) == sizeof(double)](job, arena);
  grad.assign(g.begin(), g.end());
  double total = 0;
  for (T l : loss) total += l;
  return total;
}
double error(const Row& a, const Row& b) {
  double wrong = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) wrong += (a[i] - b[i]) * (a[i] - b[i]), size += b[i] * b[i];
  return std::sqrt(wrong / size);
}
bool check(Activation activation, double w0) {
  Network net;
  net.in = 2, net.out = 3, net.width = 13, net.depth = 3;  // no multiple of a vector
  net.activation = activation;
  net.w0 = net.w0_first = w0;
  const Row x = uniform(kTasks * kPoints * 2, 1), y = uniform(kTasks * kPoints * 3, 1);
  Row params = uniform(kTasks * (3 * 13 + 14 * 13 + 14 * 3), 0.3), narrow, wide, unused, slopes;
  const double l32 = loss_grad<float>(net, params, x, y, narrow), l64 = loss_grad<double>(net, params, x, y, wide);
  for (double& p : params) {
    const double at = p, h = 1e-6;
    p = at + h;
    const double up = loss_grad<double>(net, params, x, y, unused);
    p = at - h;
    slopes.push_back((up - loss_grad<double>(net, params, x, y, unused)) / (2 * h));
    p = at;
  }
  const double loss = std::fabs(l32 - l64) / l64, single = error(narrow, wide), exact = error(wide, slopes);
  std::printf("%s w0 %g: loss %.1e, float %.1e, double %.1e\n", kBaselineTable.name, w0, loss, single, exact);
  return loss < 1e-5 && single < 1e-5 && exact < 1e-6;  // NaN is no success
}
int main() {
  const bool relu = check(Activation::k_relu, 1), siren = check(Activation::k_sine, 20);
  std::puts(relu && siren ? "OK" : "WRONG");
}
