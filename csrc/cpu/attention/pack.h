// Copies rows of q, k, v, dout into the layouts that gemm.h reads, converting the element type on the way.
//
//   rows      [n, depth] -> [n, units]                    as they are, padded with zeros: operand A of q k^T, out of one tile block
//   columns   [n, depth] -> [depth units, n padded]       transposed: operand B of q k^T and dout v^T, one kPanel of keys at a time
//   stacked   [n, depth] -> [n / pair, depth padded]      n runs along k: operand B of p v, ds k, p^T dout, ds^T q
#pragma once

#include <utility>

#include "contract/attention.h"
#include "core/dispatch.h"
#include "cpu/simd/gemm.h"

namespace foveate::cpu::FOVEATE_ISA {

// Where the rows of one (batch, head) lie: contiguous in steps of `stride`, or in pages.
struct RowSource {
  const char* base = nullptr;
  int64_t stride = 0;  // bytes
  const int32_t* pages = nullptr;
  int64_t page_size = 0, page_stride = 0;  // page_stride in bytes
  DType dtype = DType::kFloat32;
  int64_t first = 0;  // rows before it are zeros and not read: what lies there may be gone

  [[gnu::always_inline]] const char* row(int64_t j) const {
    if (!pages) return base + j * stride;
    return base + pages[j / page_size] * page_stride + j % page_size * stride;
  }
};

// One row converted to the units of M: `units` * kPair elements, zeros behind `depth`.
template <class M>
FOVEATE_INLINE void convert_row(const RowSource& s, int64_t j, int64_t depth, typename M::Unit* dst, int64_t units) {
  using Element = std::conditional_t<M::kPair == 2, bf16, typename M::Acc>;
  using Acc = typename M::Acc;
  constexpr int w = kWidth<M>;
  if (j < s.first) {
    std::memset(static_cast<void*>(dst), 0, units * sizeof(typename M::Unit));
    return;
  }
  const char* row = s.row(j);
  Element* out = reinterpret_cast<Element*>(dst);
  visit_float(s.dtype, [&]<class T>(std::type_identity<T>) {
    const T* in = reinterpret_cast<const T*>(row);
    if constexpr (std::is_same_v<T, Element>) {
      if (depth > 0) std::memcpy(out, in, depth * sizeof(T));  // an empty tensor has no address
    } else {
      int64_t d = 0;
      for (; d + w <= depth; d += w) store(out + d, load<Acc>(in + d));
      for (; d < depth; ++d) from_float(out + d, static_cast<Acc>(to_float(in[d])));
    }
  });
  for (int64_t d = depth; d < units * M::kPair; ++d) from_float(out + d, Acc{0});
}

// One step of the butterfly that transposes a kN x kN tile: blocks of size kStep change places between rows i and i + kStep.
template <int kStep, class V, size_t... kJ>
FOVEATE_INLINE void exchange(V& a, V& b, std::index_sequence<kJ...>) {
  constexpr int n = sizeof...(kJ);
  const V low = __builtin_shufflevector(a, b, ((kJ & kStep) ? n + kJ - kStep : kJ)...);
  b = __builtin_shufflevector(a, b, ((kJ & kStep) ? n + kJ : kJ + kStep)...);
  a = low;
}
template <int kN, int kStep, class V>
FOVEATE_INLINE void transpose_steps(V (&rows)[kN]) {
  if constexpr (kStep < kN) {
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i)
      if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kN>{});
    transpose_steps<kN, kStep * 2>(rows);
  }
}

// dst[unit * dst_stride + key] = src[key * src_stride + unit] for one tile of kWidth keys and `units` units.
template <class M>
FOVEATE_INLINE void transpose_panel(const typename M::Unit* src, int64_t src_stride, int64_t units, typename M::Unit* dst,
                                    int64_t dst_stride) {
  using Unit = typename M::Unit;
  constexpr int w = kWidth<M>;
  using U = vec<Unit, w>;
  int64_t u = 0;
  for (; u + w <= units; u += w) {
    U rows[w];
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) rows[i] = load_raw<U>(src + i * src_stride + u);
    transpose_steps<w, 1>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) store_raw(dst + (u + i) * dst_stride, rows[i]);
  }
  for (; u < units; ++u)
    for (int i = 0; i < w; ++i) dst[u * dst_stride + i] = src[i * src_stride + u];
}

// "columns": keys [begin, end) in panels of kPanel keys, each panel [units][kPanel]. Keys at or beyond `end` become zeros, up to a multiple
// of kKeyAlign.
// temp: kWidth * units.
template <class M>
FOVEATE_INLINE void pack_columns(const RowSource& s, int64_t begin, int64_t end, int64_t depth, int64_t units, typename M::Unit* dst,
                                 typename M::Unit* temp) {
  constexpr int w = kWidth<M>, panel = kPanel<M>;
  const int64_t padded = round_up<int64_t>(end - begin, kKeyAlign<M>);
  for (int64_t j = 0; j < padded; j += w) {
    typename M::Unit* out = dst + j / panel * panel * units + j % panel;
    for (int i = 0; i < w; ++i) {
      if (begin + j + i < end)
        convert_row<M>(s, begin + j + i, depth, temp + i * units, units);
      else
        std::memset(static_cast<void*>(temp + i * units), 0, units * sizeof(typename M::Unit));
    }
    transpose_panel<M>(temp, units, units, out, panel);
  }
}

// "stacked": rows [begin, end), padded with zero rows up to `padded` (a multiple of kPair). temp: 2 * width elements.
template <class M>
FOVEATE_INLINE void pack_stacked(const RowSource& s, int64_t begin, int64_t end, int64_t padded, int64_t depth, int64_t width,
                                 typename M::Unit* dst, typename M::Unit* temp) {
  if constexpr (M::kPair == 1) {
    for (int64_t j = 0; j < padded; ++j) {
      if (begin + j < end)
        convert_row<M>(s, begin + j, depth, dst + j * width, width);
      else
        std::memset(static_cast<void*>(dst + j * width), 0, width * sizeof(typename M::Unit));
    }
  } else {
    // Rows j and j + 1 become the low and high half of each unit.
    bf16* rows = reinterpret_cast<bf16*>(temp);
    for (int64_t j = 0; j < padded; j += 2) {
      for (int64_t i = 0; i < 2; ++i) {
        if (begin + j + i < end)
          convert_row<M>(s, begin + j + i, depth, temp + i * (width / 2), width / 2);
        else
          std::memset(static_cast<void*>(temp + i * (width / 2)), 0, width * sizeof(bf16));
      }
      typename M::Unit* out = dst + j / 2 * width;
      for (int64_t d = 0; d < width; ++d) out[d] = static_cast<uint32_t>(rows[d].bits) | static_cast<uint32_t>(rows[width + d].bits) << 16;
    }
  }
}

// The sources of one (batch, KV head), and of one query head.
FOVEATE_INLINE RowSource kv_source(const AttentionParams& p, const Rows& t, int64_t b, int64_t h) {
  const int64_t size = size_of(p.dtype), first = p.cu_k ? p.cu_k[b] : 0;
  RowSource s;
  s.dtype = p.dtype;
  s.stride = t.seq * size;
  s.base = static_cast<const char*>(t.data) + (t.head * h + t.seq * first + (p.block_table ? 0 : t.batch * b)) * size;
  if (p.block_table) {
    s.pages = p.block_table + p.block_table_stride * b;
    s.page_size = p.page_size;
    s.page_stride = t.batch * size;
  }
  return s;
}

FOVEATE_INLINE char* q_row(const AttentionParams& p, const Rows& t, int64_t b, int64_t h, int64_t i) {
  const int64_t first = p.cu_q ? p.cu_q[b] : 0;
  return static_cast<char*>(t.data) + (t.batch * b + t.head * h + t.seq * (first + i)) * size_of(p.dtype);
}

FOVEATE_INLINE RowSource q_source(const AttentionParams& p, const Rows& t, int64_t b, int64_t h) {
  RowSource s;
  s.dtype = p.dtype;
  s.stride = t.seq * size_of(p.dtype);
  s.base = q_row(p, t, b, h, 0);
  return s;
}

}  // namespace foveate::cpu::FOVEATE_ISA
