// The attention kernels against a plain double-precision loop, without Python: for instruction sets that this machine can only emulate.
//   usage: attention_check; prints the largest error of each case, exits 1 if one is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/dispatch/target.h"
#include "ops/attention.h"

using namespace foveate;

namespace {

uint32_t state = 1;
float uniform() {  // -1..1
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}
float bf16_to_float(uint16_t bits) {
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// A [b, s, h, d] tensor in `dtype` together with its values as double.
struct Tensor {
  int64_t b, s, h, d;
  std::vector<float> f32;
  std::vector<uint16_t> b16;
  std::vector<double> value;
  DType dtype;

  Tensor(int64_t b, int64_t s, int64_t h, int64_t d, DType dtype, bool random) : b(b), s(s), h(h), d(d), dtype(dtype) {
    const int64_t n = b * s * h * d;
    value.resize(n), f32.resize(n), b16.resize(n);
    for (int64_t i = 0; i < n && random; ++i) {
      f32[i] = uniform();
      uint32_t u;
      std::memcpy(&u, &f32[i], 4);
      b16[i] = static_cast<uint16_t>(u >> 16);
      value[i] = dtype == DType::kBFloat16 ? bf16_to_float(b16[i]) : f32[i];
    }
  }
  double at(int64_t ib, int64_t is, int64_t ih, int64_t id) const { return value[((ib * s + is) * h + ih) * d + id]; }
  double result(int64_t i) const { return dtype == DType::kBFloat16 ? bf16_to_float(b16[i]) : f32[i]; }
  TensorView view() {
    TensorView v;
    v.data = dtype == DType::kBFloat16 ? static_cast<void*>(b16.data()) : f32.data();
    v.dtype = dtype, v.ndim = 4;
    v.shape = {b, s, h, d}, v.stride = {s * h * d, h * d, d, 1};
    return v;
  }
};

bool run(DType dtype, int64_t sq, int64_t skv, int64_t hq, int64_t hkv, int64_t d, int64_t dv, bool causal, double softcap) {
  const int64_t batch = 2;
  Tensor q(batch, sq, hq, d, dtype, true), k(batch, skv, hkv, d, dtype, true), v(batch, skv, hkv, dv, dtype, true),
      dout(batch, sq, hq, dv, dtype, true);
  Tensor out(batch, sq, hq, dv, dtype, false), dq(batch, sq, hq, d, dtype, false), dk(batch, skv, hkv, d, dtype, false),
      dv_(batch, skv, hkv, dv, dtype, false);
  std::vector<float> lse_data(batch * hq * sq);
  TensorView lse;
  lse.data = lse_data.data(), lse.ndim = 3, lse.shape = {batch, hq, sq}, lse.stride = {hq * sq, sq, 1};
  AttentionOperands o;
  o.q = q.view(), o.k = k.view(), o.v = v.view();
  o.max_q = sq, o.max_k = skv, o.causal = causal, o.scale = 1 / std::sqrt(static_cast<double>(d)), o.softcap = softcap;
  // Both kernels: that for few rows, with two splits of the keys, and the blocked one.
  DecodePlan plan;
  plan.rows_per_task = sq * (hq / hkv), plan.num_splits = std::min<int64_t>(2, skv);
  plan.blocked = plan.rows_per_task > 16 || dtype == DType::kFloat64;
  attention_forward(o, {}, out.view(), lse, plan, Threads(2));
  AttentionGradOperands grads;
  grads.q = dq.view(), grads.k = dk.view(), grads.v = dv_.view();
  attention_backward(o, {}, dout.view(), {}, out.view(), lse, grads, {}, Threads(2));

  std::vector<double> e_out(out.value.size()), e_dq(dq.value.size()), e_dk(dk.value.size()), e_dv(dv_.value.size());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < hq; ++h)
      for (int64_t i = 0; i < sq; ++i) {
        const int64_t kh = h / (hq / hkv), end = causal ? std::min(skv, std::max<int64_t>(0, i + skv - sq + 1)) : skv;
        std::vector<double> p(end), slope(end, 1.0), dp(end);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < end; ++j) {
          double s = 0;
          for (int64_t c = 0; c < d; ++c) s += q.at(b, i, h, c) * k.at(b, j, kh, c);
          s *= o.scale;
          if (softcap > 0) {
            const double t = std::tanh(s / softcap);
            s = softcap * t, slope[j] = 1 - t * t;
          }
          sum += p[j] = std::exp(s);
        }
        for (int64_t j = 0; j < end; ++j) {
          p[j] /= sum;
          for (int64_t c = 0; c < dv; ++c) {
            const double g = dout.at(b, i, h, c);
            e_out[((b * sq + i) * hq + h) * dv + c] += p[j] * v.at(b, j, kh, c);
            e_dv[((b * skv + j) * hkv + kh) * dv + c] += p[j] * g;
            dp[j] += g * v.at(b, j, kh, c);
          }
          delta += p[j] * dp[j];
        }
        for (int64_t j = 0; j < end; ++j) {
          const double ds = p[j] * (dp[j] - delta) * slope[j] * o.scale;
          for (int64_t c = 0; c < d; ++c) {
            e_dq[((b * sq + i) * hq + h) * d + c] += ds * k.at(b, j, kh, c);
            e_dk[((b * skv + j) * hkv + kh) * d + c] += ds * q.at(b, i, h, c);
          }
        }
      }
  const auto error = [](const Tensor& t, const std::vector<double>& exact) {
    double most = 0, size = 1e-30;
    for (size_t i = 0; i < exact.size(); ++i)
      most = std::max(most, std::abs(t.result(i) - exact[i])), size = std::max(size, std::abs(exact[i]));
    return most / size;
  };
  const double errors[4] = {error(out, e_out), error(dq, e_dq), error(dk, e_dk), error(dv_, e_dv)};
  const double limit = dtype == DType::kBFloat16 ? 2e-2 : 2e-6;
  bool ok = true;
  for (double e : errors) ok = ok && e <= limit;
  std::printf("%s %s Sq %ld Skv %ld Hq %ld Hkv %ld D %ld Dv %ld causal %d softcap %g: out %.1e dq %.1e dk %.1e dv %.1e\n",
              ok ? "ok  " : "FAIL", name(dtype), long(sq), long(skv), long(hq), long(hkv), long(d), long(dv), causal, softcap, errors[0],
              errors[1], errors[2], errors[3]);
  return ok;
}

}  // namespace

int main() {
  std::printf("target %s\n", cpu::active_target().name);
  bool ok = true;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (bool causal : {false, true}) {
      ok &= run(dtype, 1, 1, 1, 1, 8, 8, causal, 0);
      ok &= run(dtype, 37, 70, 4, 2, 32, 32, causal, 0);
      ok &= run(dtype, 130, 300, 2, 1, 40, 72, causal, 0);
      ok &= run(dtype, 64, 65, 2, 2, 64, 24, causal, 5);
    }
  return ok ? 0 : 1;
}
