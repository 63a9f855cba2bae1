// Which experts a token goes through, and their weights: models/experts.py, Router, defines the meaning.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder/step.h"

namespace foveate {
namespace {

constexpr float kOut = -std::numeric_limits<float>::infinity();

// The index of the largest score; the first of equal ones, and 0 where all are NaN.
int64_t largest(const float* score, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (score[i] > score[best] || std::isnan(score[best])) best = i;
  return best;
}

// exp(x - max) of all, and their sum.
float exponentials(float* x, int64_t n) {
  const float top = x[largest(x, n)];
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
  return sum;
}

// Experts of groups that are not among the best `top_groups` are out: by their best expert's score, or the sum of the best two.
void keep_best_groups(const Router& r, float* choice, int64_t count) {
  const int64_t size = count / r.groups;
  std::vector<float> groups(r.groups);
  for (int64_t g = 0; g < r.groups; ++g) {
    const float* scores = choice + g * size;
    const int64_t best = largest(scores, size);
    float second = kOut;
    for (int64_t i = 0; i < size; ++i)
      if (i != best) second = std::max(second, scores[i]);
    groups[g] = scores[best] + (r.kind == RouterKind::kSigmoid && size > 1 ? second : 0.0f);
  }
  std::vector<bool> kept(r.groups);
  for (int64_t i = 0; i < r.top_groups; ++i) {
    const int64_t g = largest(groups.data(), r.groups);
    kept[g] = true;
    groups[g] = kOut;
  }
  for (int64_t i = 0; i < count; ++i)
    if (!kept[i / size]) choice[i] = kOut;
}

}  // namespace

void choose_experts(const Router& r, float* scores, int32_t* chosen, float* weights) {
  const int64_t count = r.weight.out;
  if (r.kind == RouterKind::kSoftmax) {
    const float sum = exponentials(scores, count);
    for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
  } else if (r.kind == RouterKind::kSigmoid) {
    for (int64_t i = 0; i < count; ++i) scores[i] = 1 / (1 + std::exp(-scores[i]));
  }
  std::vector<float> choice(scores, scores + count);
  if (r.choice_bias)
    for (int64_t i = 0; i < count; ++i) choice[i] += r.choice_bias[i];
  if (r.groups > 1) keep_best_groups(r, choice.data(), count);
  std::vector<bool> taken(count);
  for (int64_t k = 0; k < r.per_token; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
      if (!taken[i] && (best < 0 || choice[i] > choice[best] || std::isnan(choice[best]))) best = i;
    taken[best] = true;
    chosen[k] = static_cast<int32_t>(best);
    weights[k] = scores[best];
  }
  float sum = 0;
  if (r.kind == RouterKind::kTop) {
    sum = exponentials(weights, r.per_token);
  } else if (r.normalize) {
    for (int64_t k = 0; k < r.per_token; ++k) sum += weights[k];
    if (r.kind == RouterKind::kSigmoid) sum += 1e-20f;
  }
  for (int64_t k = 0; k < r.per_token; ++k) {
    if (sum != 0) weights[k] /= sum;
    weights[k] *= r.scale;
  }
}

}  // namespace foveate
