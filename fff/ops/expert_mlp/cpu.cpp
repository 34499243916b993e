// Hard routes on a CPU: greedy descent and chosen experts, each weight read once per group of rows.
//
// T rows, D input width, O output width, E experts, L expert width, H = L or (gated units) 2 L rows of w_in, K chosen
// experts per row, P parallel trees, d depth, N = 2^d - 1 nodes of one tree.
//
// Method. A row walks down its tree by d dot products. Choices (row, expert) are sorted by expert, by radix, so nothing
// costs time in proportion to E. The rows of one expert form a group, which passes both layers in tiles of up to
// MAX_ROWS rows: a register tile of dot products over D against a few units of w_in, activation, a register tile of
// axpys over L against a few vectors of w_out, gate, and the store to the rows' own places in y. Hidden units never
// leave the cache, no row is copied, a group of a few rows reads its expert once.
//
// Every sum of a row is taken in an order that depends on D, L and K alone. So a row's result has the same bits in any
// batch, whatever the number of threads and whichever rows share its tile.
//
// Limits. Forward: float32, or bfloat16 weights and rows with float32 sums. Backward: float32, once; the autograd functions
// around it are in cpu.py. Contiguous weights; T K and E < 2^31.

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t VL = Vec::size();
#define UNROLL _Pragma("GCC unroll 32")

// Rows and accumulators of a register tile: what 32 registers of 512 bits, or 16 smaller ones, hold.
constexpr int MAX_ROWS = VL == 16 ? 8 : 4;
constexpr int ACCUMULATORS = VL == 16 ? 24 : 12;
// Rows of a group that take a block of units in turn; the units of a block, at most this many bytes, stay in the cache.
constexpr int64_t GROUP_ROWS = 64, UNIT_BLOCK_BYTES = 256 * 1024;
// Columns of D per register tile: MAX_ROWS rows of them stay in the first-level cache.
constexpr int64_t D_BLOCK = 1024;
// An expert is fetched into the cache while the one before computes, unless it is larger than this.
constexpr int64_t FETCH_BYTES = 512 * 1024;
// Work, in multiply-adds, below which a second thread does not pay.
constexpr int64_t GRAIN = 100'000;
// What opening a group costs, as a number of rows: for an even share between threads.
constexpr int64_t GROUP_COST = 4;
constexpr int64_t INT32_LIMIT = int64_t(1) << 31;

// ---- loads

// One register. Vec is for functions (erf, exp); in arrays of it GCC spills the accumulators.
typedef float Lanes __attribute__((vector_size(VL * sizeof(float))));

inline Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Lanes load(const BFloat16* p) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
  Lanes v;
  for (int64_t i = 0; i < VL; ++i) v[i] = p[i];
  return v;
#endif
}

// The first n < VL numbers, then zeros.
template <class W>
inline Lanes load(const W* p, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<W, float>) return _mm512_maskz_loadu_ps((1 << n) - 1, p);
#endif
  std::array<W, VL> padded{};
  std::memcpy(padded.data(), p, n * sizeof(W));
  return load(padded.data());
}

// n numbers as float32: where they are, or converted into `room`.
inline const float* as_float(const float* p, int64_t, float*) { return p; }
inline const float* as_float(const BFloat16* p, int64_t n, float* room) {
  at::vec::convert(p, room, n);
  return room;
}

// a * b + c, rounded once where the processor can: left to the compiler, product and sum are fused in some tiles only.
inline Lanes fused(Lanes a, float b, Lanes c) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c);
#else
  return a * b + c;
#endif
}

inline float sum(Lanes v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  for (int64_t n = VL / 2; n; n /= 2)
    for (int64_t i = 0; i < n; ++i) v[i] += v[i + n];
  return v[0];
#endif
}

// ---- the two register tiles

// out[r][u] += x[r] . w[u], r < R, u < U, over n columns; what lies `ahead` of w is fetched into the cache.
template <int R, int U, class W>
[[gnu::noinline]] void dots(
    const float* const* x, const W* w, int64_t stride, int64_t n, float* out, int64_t out_stride, int64_t ahead) {
  Lanes acc[R][U] = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    Lanes unit[U];
    UNROLL for (int u = 0; u < U; ++u) {
      unit[u] = load(w + u * stride + i);
      __builtin_prefetch(w + ahead + u * stride + i, 0, 2);
    }
    UNROLL for (int r = 0; r < R; ++r) {
      Lanes row = load(x[r] + i);
      UNROLL for (int u = 0; u < U; ++u) acc[r][u] += row * unit[u];
    }
  }
  if (i < n) {
    Lanes unit[U];
    UNROLL for (int u = 0; u < U; ++u) unit[u] = load(w + u * stride + i, n - i);
    UNROLL for (int r = 0; r < R; ++r) {
      Lanes row = load(x[r] + i, n - i);
      UNROLL for (int u = 0; u < U; ++u) acc[r][u] += row * unit[u];
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int u = 0; u < U; ++u) out[r * out_stride + u] += sum(acc[r][u]);
}

struct Row {
  float* y;    // (O,)
  float gate;  // multiplies what is written
};

// y[r] (+)= gate[r] * (bias + sum over l < L of hidden[r][l] * w[l]) in V vectors of columns, the last one of `last`.
// `whole`: last = VL.
template <int R, int V, bool whole, class W>
[[gnu::noinline]] void axpys(
    const float* hidden, int64_t L, const W* w, int64_t stride, const W* bias, const Row* rows, bool add,
    int64_t column, int64_t last, int64_t ahead) {
  Lanes acc[R][V];
  UNROLL for (int v = 0; v < V; ++v) {
    const W* p = bias + column + v * VL;
    Lanes start = !bias ? Lanes{} : whole || v + 1 < V ? load(p) : load(p, last);
    UNROLL for (int r = 0; r < R; ++r) acc[r][v] = start;
  }
  for (int64_t l = 0; l < L; ++l) {
    const W* p = w + l * stride + column;
    Lanes unit[V];
    UNROLL for (int v = 0; v < V; ++v) {
      unit[v] = whole || v + 1 < V ? load(p + v * VL) : load(p + v * VL, last);
      __builtin_prefetch(p + ahead + v * VL, 0, 2);
    }
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int v = 0; v < V; ++v) acc[r][v] += hidden[r * L + l] * unit[v];
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < V; ++v) {
      float* y = rows[r].y + column + v * VL;
      const bool full = whole || v + 1 < V;
      Lanes before = !add ? Lanes{} : full ? load(y) : load(y, last);
      Lanes value = fused(acc[r][v], rows[r].gate, before);
      if (full)
        std::memcpy(y, &value, sizeof value);
      else
        std::memcpy(y, &value, last * sizeof(float));
    }
}

// Calls f with a compile-time integer: n itself, for 1 <= n <= N.
template <int N, class F>
inline void with_constant(int n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(std::integral_constant<int, N>{});
}

// ---- activations

// Of the approximate gelu: sqrt(2 / pi), and the share of the cube.
constexpr float GELU_SLOPE = float(M_2_SQRTPI * M_SQRT1_2), GELU_CUBE = 0.044715f;

enum class Activation { relu, gelu, gelu_tanh, silu, relu2, identity };

Activation parse(c10::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "relu2") return Activation::relu2;
  TORCH_CHECK_VALUE(name == "identity", "activation='", name, "' is none of gelu, gelu_tanh, identity, relu, relu2, silu");
  return Activation::identity;
}

// tanh(u) of v / 2 * (1 + tanh(u)), the approximate gelu.
inline Vec tanh_of_gelu(const Vec& v) {
  return (v * (Vec(GELU_SLOPE) + Vec(GELU_SLOPE * GELU_CUBE) * v * v)).tanh();
}

inline Vec apply(Activation activation, const Vec& v) {
  switch (activation) {
    case Activation::relu:
      return at::vec::clamp_min(v, Vec(0.f));
    case Activation::gelu:
      return Vec(0.5f) * v * (Vec(1.f) + (v * Vec(float(M_SQRT1_2))).erf());
    case Activation::gelu_tanh:
      return Vec(0.5f) * v * (Vec(1.f) + tanh_of_gelu(v));
    case Activation::silu:
      return v / (Vec(1.f) + v.neg().exp());
    case Activation::relu2: {
      Vec positive = at::vec::clamp_min(v, Vec(0.f));
      return positive * positive;
    }
    default:
      return v;
  }
}

// hidden (L,) = act(pre (L,)), or act(pre[:L]) * pre[L:] for gated units; the two may be the same memory.
inline void activate(Activation activation, bool glu, const float* pre, float* hidden, int64_t L) {
  for (int64_t i = 0; i < L; i += VL) {
    int64_t n = std::min(VL, L - i);
    Vec v = apply(activation, Vec::loadu(pre + i, n));
    if (glu) v = v * Vec::loadu(pre + L + i, n);
    v.store(hidden + i, n);
  }
}

// ---- experts

template <class W>
struct Experts {
  const W* w_in;   // (E, H, D)
  const W* b_in;   // (E, H) or null
  const W* w_out;  // (E, L, O)
  const W* b_out;  // (E, O) or null
  int64_t E, H, L, D, O;
  Activation activation;
  bool glu;
};

template <class W>
const W* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<W>() : nullptr;
}

// One chosen expert of one row.
struct Choice {
  int32_t expert, place;  // place = row * K + choice; expert = E: left out
};

// Stable sort by expert, in time proportional to the number of choices.
void sort_by_expert(std::vector<Choice>& choices, int64_t num_experts) {
  size_t n = choices.size();
  if (n <= 16) {
    for (size_t i = 1; i < n; ++i)
      for (size_t j = i; j && choices[j].expert < choices[j - 1].expert; --j) std::swap(choices[j], choices[j - 1]);
    return;
  }
  std::vector<Choice> other(n);
  for (int shift = 0; num_experts >> shift; shift += 8) {
    std::array<uint32_t, 257> offset{};
    for (const Choice& c : choices) ++offset[((c.expert >> shift) & 255) + 1];
    for (int b = 0; b < 256; ++b) offset[b + 1] += offset[b];
    for (const Choice& c : choices) other[offset[(c.expert >> shift) & 255]++] = c;
    choices.swap(other);
  }
}

template <class W>
struct Call {
  Experts<W> experts;
  const W* x;         // (T, D)
  const float* gate;  // (T, K) or null
  int64_t K;
  float* y;  // (T, O), zeros where K is not 1
};

// Scratch of one thread.
struct Scratch {
  std::vector<float> hidden;  // (GROUP_ROWS, H)
  std::vector<float> rows;    // (GROUP_ROWS, D), for rows that are not float32
};

// The choices [first, last) of one expert, at most GROUP_ROWS; the expert that comes `ahead` experts later is fetched.
template <class W>
void run_group(const Call<W>& call, const Choice* first, const Choice* last, int64_t ahead, Scratch& scratch) {
  const Experts<W>& e = call.experts;
  const int64_t n = last - first, expert = first->expert;
  float* hidden = scratch.hidden.data();
  std::array<const float*, GROUP_ROWS> x;
  std::array<Row, GROUP_ROWS> rows;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = first[i].place / call.K;
    rows[i] = {call.y + row * e.O, call.gate ? call.gate[first[i].place] : 1.f};
    x[i] = as_float(call.x + row * e.D, e.D, scratch.rows.data() + i * e.D);
    for (int64_t u = 0; u < e.H; ++u) hidden[i * e.H + u] = e.b_in ? float(e.b_in[expert * e.H + u]) : 0.f;
  }
  // Tiles of equal size, so that none is left with a single row where it can be helped; f(R, first row, is first tile).
  const int64_t tiles = (n + MAX_ROWS - 1) / MAX_ROWS;
  auto for_each_tile = [&](const auto& f) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t start = t * n / tiles, end = (t + 1) * n / tiles;
      with_constant<MAX_ROWS>(int(end - start), [&](auto R) { f(R, start, t == 0); });
    }
  };

  const W* w_in = e.w_in + expert * e.H * e.D;
  const int64_t column_blocks = std::max<int64_t>(1, (e.D + D_BLOCK - 1) / D_BLOCK);
  const int64_t block = ((e.D + column_blocks - 1) / column_blocks + VL - 1) / VL * VL;
  const int64_t unit_block =
      std::max<int64_t>(ACCUMULATORS, UNIT_BLOCK_BYTES / int64_t(sizeof(W)) / std::max<int64_t>(e.D, 1));
  for (int64_t begin = 0; begin < e.H; begin += unit_block) {
    const int64_t end = std::min(e.H, begin + unit_block);
    for_each_tile([&](auto R, int64_t start, bool fetch) {
      constexpr int U = std::min(8, ACCUMULATORS / R.value);
      for (int64_t k = 0; k < e.D; k += block) {
        std::array<const float*, R.value> at;
        for (int r = 0; r < R.value; ++r) at[r] = x[start + r] + k;
        for (int64_t u = begin; u < end; u += U)
          with_constant<U>(int(std::min<int64_t>(U, end - u)), [&](auto count) {
            dots<R.value, count.value>(
                at.data(), w_in + u * e.D + k, e.D, std::min(block, e.D - k), hidden + start * e.H + u, e.H,
                fetch ? ahead * e.H * e.D : 0);
          });
      }
    });
  }

  for (int64_t i = 0; i < n; ++i) activate(e.activation, e.glu, hidden + i * e.H, hidden + i * e.L, e.L);

  const W* w_out = e.w_out + expert * e.L * e.O;
  const W* b_out = e.b_out ? e.b_out + expert * e.O : nullptr;
  for_each_tile([&](auto R, int64_t start, bool fetch) {
    constexpr int V = ACCUMULATORS / R.value;
    for (int64_t column = 0; column < e.O; column += V * VL) {
      const int64_t columns = std::min<int64_t>(V * VL, e.O - column), vectors = (columns + VL - 1) / VL;
      const int64_t last = columns - (vectors - 1) * VL;
      with_constant<V>(int(vectors), [&](auto count) {
        auto tile = last == VL ? axpys<R.value, count.value, true, W> : axpys<R.value, count.value, false, W>;
        tile(hidden + start * e.L, e.L, w_out, e.O, b_out, &rows[start], call.K > 1, column, last,
             fetch ? ahead * e.L * e.O : 0);
      });
    }
  });
}

// Sorted choices.
template <class W>
void run_choices(const Call<W>& call, const Choice* first, const Choice* last) {
  const Experts<W>& e = call.experts;
  const int64_t rows = std::min<int64_t>(GROUP_ROWS, last - first);
  const bool fetch = int64_t(sizeof(W)) * (e.H * e.D + e.L * e.O) <= FETCH_BYTES;
  Scratch scratch;
  scratch.hidden.resize(rows * e.H);
  if (!std::is_same_v<W, float>) scratch.rows.resize(rows * e.D);
  while (first != last) {
    const Choice* end = first;
    while (end != last && end->expert == first->expert && end - first < GROUP_ROWS) ++end;
    if (first->expert < e.E)
      run_group(call, first, end, fetch && end != last && end->expert < e.E ? end->expert - first->expert : 0, scratch);
    else if (call.K == 1)
      for (const Choice* c = first; c != end; ++c) std::fill_n(call.y + c->place * e.O, e.O, 0.f);
    first = end;
  }
}

std::vector<Choice> collect(const int64_t* index, int64_t begin, int64_t end, int64_t K, int64_t E) {
  std::vector<Choice> choices;
  choices.reserve((end - begin) * K);
  for (int64_t i = begin * K; i < end * K; ++i) {
    TORCH_CHECK_INDEX(index[i] >= -1 && index[i] < E, "index ", index[i], " is none of ", E, " experts");
    choices.push_back({int32_t(index[i] < 0 ? E : index[i]), int32_t(i)});
  }
  sort_by_expert(choices, E);
  return choices;
}

template <class W>
void run(const Call<W>& call, const int64_t* index, int64_t T) {
  const Experts<W>& e = call.experts;
  const int64_t work = std::max<int64_t>(1, call.K * (e.H * e.D + e.L * e.O));
  const int64_t grain = std::max<int64_t>(1, GRAIN / work);
  if (call.K != 1) {
    // A row belongs to one thread, which adds up its experts in their order.
    at::parallel_for(0, T, grain, [&](int64_t begin, int64_t end) {
      std::vector<Choice> choices = collect(index, begin, end, call.K, e.E);
      run_choices(call, choices.data(), choices.data() + choices.size());
    });
    return;
  }
  std::vector<Choice> choices = collect(index, 0, T, 1, e.E);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (T + grain - 1) / grain);
  if (threads <= 1) return run_choices(call, choices.data(), choices.data() + T);
  // Neighbours in the order of experts go to one thread, in shares of about the same cost.
  auto cost = [&](int64_t i) { return 1 + (i && choices[i].expert == choices[i - 1].expert ? 0 : GROUP_COST); };
  int64_t total = 0, passed = 0;
  for (int64_t i = 0; i < T; ++i) total += cost(i);
  std::vector<int64_t> share{0};
  for (int64_t i = 0; i < T; ++i) {
    if (passed * threads >= total * int64_t(share.size())) share.push_back(i);
    passed += cost(i);
  }
  share.push_back(T);
  at::parallel_for(0, int64_t(share.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) run_choices(call, choices.data() + share[s], choices.data() + share[s + 1]);
  });
}

// ---- backward of the experts
//
// For a choice with pre-activations p = w_in x + b_in, hidden units h = act(p) and g = gate * dL/dy:
//   dL/dh = w_out g,  dL/dp = dL/dh act'(p),  dL/dx += w_in^T dL/dp,  dL/dgate = dL/dy . (w_out^T h + b_out),
//   dL/dw_out += h g^T,  dL/db_out += g,  dL/dw_in += dL/dp x^T,  dL/db_in += dL/dp.
// p is computed again rather than kept. All choices of an expert belong to one thread, which adds them up in their
// order; where a row has several experts its own gradient is added up in a second pass, row by row.

// out[r] (+)= sum over k < n of coef[r * by_row + k * by_term] * src[k], in V vectors of columns, the last one of `last`.
template <int R, int V, bool whole>
[[gnu::noinline]] void combine(
    const float* coef, int64_t by_row, int64_t by_term, int64_t n, const float* const* src, float* const* out, bool add,
    int64_t column, int64_t last) {
  Lanes acc[R][V] = {};
  for (int64_t k = 0; k < n; ++k) {
    Lanes term[V];
    UNROLL for (int v = 0; v < V; ++v)
      term[v] = whole || v + 1 < V ? load(src[k] + column + v * VL) : load(src[k] + column + v * VL, last);
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int v = 0; v < V; ++v) acc[r][v] += coef[r * by_row + k * by_term] * term[v];
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < V; ++v) {
      float* p = out[r] + column + v * VL;
      Lanes value = acc[r][v];
      if (whole || v + 1 < V) {
        if (add) value += load(p);
        std::memcpy(p, &value, sizeof value);
      } else {
        if (add) value += load(p, last);
        std::memcpy(p, &value, last * sizeof(float));
      }
    }
}

// The same for any number of rows, in columns [begin, end).
void combine_rows(
    const float* coef, int64_t by_row, int64_t by_term, int64_t n, const float* const* src, float* const* out,
    int64_t rows, bool add, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; r += MAX_ROWS)
    with_constant<MAX_ROWS>(int(std::min<int64_t>(MAX_ROWS, rows - r)), [&](auto R) {
      constexpr int V = std::min(12, ACCUMULATORS / R.value);
      for (int64_t column = begin; column < end; column += V * VL) {
        const int64_t columns = std::min<int64_t>(V * VL, end - column), vectors = (columns + VL - 1) / VL;
        const int64_t last = columns - (vectors - 1) * VL;
        with_constant<V>(int(vectors), [&](auto count) {
          auto tile = last == VL ? combine<R.value, count.value, true> : combine<R.value, count.value, false>;
          tile(coef + r * by_row, by_row, by_term, n, src, out + r, add, column, last);
        });
      }
    });
}

// out[r * rows_apart + u] += row[r] . unit[u], for any numbers of rows and units.
void dot_rows(
    const float* const* row, int64_t rows, const float* unit, int64_t units, int64_t stride, int64_t n, float* out,
    int64_t rows_apart) {
  for (int64_t r = 0; r < rows; r += MAX_ROWS)
    with_constant<MAX_ROWS>(int(std::min<int64_t>(MAX_ROWS, rows - r)), [&](auto R) {
      constexpr int U = std::min(8, ACCUMULATORS / R.value);
      for (int64_t u = 0; u < units; u += U)
        with_constant<U>(int(std::min<int64_t>(U, units - u)), [&](auto count) {
          dots<R.value, count.value>(
              row + r, unit + u * stride, stride, n, out + r * rows_apart + u, rows_apart, 0);
        });
    });
}

// d act(v) / dv.
inline Vec slope(Activation activation, const Vec& v) {
  const Vec zero(0.f), one(1.f);
  switch (activation) {
    case Activation::relu:
      return Vec::blendv(one, zero, v <= zero);  // a nan passes, as in PyTorch
    case Activation::gelu: {
      Vec below = Vec(0.5f) * (one + (v * Vec(float(M_SQRT1_2))).erf());
      return below + v * Vec(float(M_2_SQRTPI * M_SQRT1_2 / 2)) * (Vec(-0.5f) * v * v).exp();
    }
    case Activation::gelu_tanh: {
      const Vec turn = tanh_of_gelu(v), steep = Vec(GELU_SLOPE) + Vec(3 * GELU_SLOPE * GELU_CUBE) * v * v;
      // Far out, 1 - tanh^2 is 0 and the square of v may be infinite.
      const Vec bend = v * (one - turn * turn) * at::vec::minimum(steep, Vec(1e4f));
      return Vec(0.5f) * (one + turn + bend);
    }
    case Activation::silu: {
      Vec share = one / (one + v.neg().exp());
      return share * (one + v * (one - share));
    }
    case Activation::relu2:
      return Vec(2.f) * at::vec::clamp_min(v, zero);
    default:
      return one;
  }
}

// From dL/dh (L,) to dL/dp (H,), in the place of the pre-activations p.
inline void deactivate(Activation activation, bool glu, float* pre, const float* grad_hidden, int64_t L) {
  for (int64_t i = 0; i < L; i += VL) {
    const int64_t n = std::min(VL, L - i);
    Vec v = Vec::loadu(pre + i, n), grad = Vec::loadu(grad_hidden + i, n);
    if (glu) {
      Vec other = Vec::loadu(pre + L + i, n);
      (grad * apply(activation, v)).store(pre + L + i, n);
      grad = grad * other;
    }
    (grad * slope(activation, v)).store(pre + i, n);
  }
}

// Where a gradient goes; null: it is not asked for. grad_y (T, O) is that of the result.
struct Gradients {
  const float* grad_y;
  float *x, *gate, *w_in, *b_in, *w_out, *b_out;
  float* pre;  // (T, K, H): dL/dp of every choice, where the gradient of the rows is left to a second pass
};

struct BackwardScratch {
  std::vector<float> pre, hidden, grad_hidden;
};

// The choices [first, last) of one expert, at most GROUP_ROWS; `add`: some came before.
void run_group_backward(
    const Call<float>& call, const Gradients& grad, const Choice* first, const Choice* last, bool add,
    BackwardScratch& scratch) {
  const Experts<float>& e = call.experts;
  const int64_t n = last - first, expert = first->expert;
  float *pre = scratch.pre.data(), *hidden = scratch.hidden.data(), *grad_hidden = scratch.grad_hidden.data();
  std::array<const float*, GROUP_ROWS> x, grad_y;
  std::array<float, GROUP_ROWS> gate;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = first[i].place / call.K;
    x[i] = call.x + row * e.D;
    grad_y[i] = grad.grad_y + row * e.O;
    gate[i] = call.gate ? call.gate[first[i].place] : 1.f;
    for (int64_t u = 0; u < e.H; ++u) pre[i * e.H + u] = e.b_in ? e.b_in[expert * e.H + u] : 0.f;
  }
  dot_rows(x.data(), n, e.w_in + expert * e.H * e.D, e.H, e.D, e.D, pre, e.H);
  for (int64_t i = 0; i < n; ++i) activate(e.activation, e.glu, pre + i * e.H, hidden + i * e.L, e.L);

  // grad_hidden without the gate first: with the hidden units it gives the gate's own gradient.
  std::fill_n(grad_hidden, n * e.L, 0.f);
  dot_rows(grad_y.data(), n, e.w_out + expert * e.L * e.O, e.L, e.O, e.O, grad_hidden, e.L);
  const float* b_out = e.b_out ? e.b_out + expert * e.O : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    float* of_hidden = grad_hidden + i * e.L;
    if (grad.gate) {
      float total = 0.f;
      for (int64_t l = 0; l < e.L; ++l) total += hidden[i * e.L + l] * of_hidden[l];
      if (b_out)
        for (int64_t o = 0; o < e.O; ++o) total += grad_y[i][o] * b_out[o];
      grad.gate[first[i].place] = total;
    }
    for (int64_t l = 0; l < e.L; ++l) of_hidden[l] *= gate[i];
    for (int64_t l = 0; l < e.L; ++l) hidden[i * e.L + l] *= gate[i];  // from here on for w_out alone
    deactivate(e.activation, e.glu, pre + i * e.H, of_hidden, e.L);
    if (grad.pre) std::copy_n(pre + i * e.H, e.H, grad.pre + first[i].place * e.H);
  }

  std::vector<float*> out(std::max(e.H, n));
  if (grad.w_out) {
    for (int64_t l = 0; l < e.L; ++l) out[l] = grad.w_out + (expert * e.L + l) * e.O;
    combine_rows(hidden, 1, e.L, n, grad_y.data(), out.data(), e.L, add, 0, e.O);
  }
  if (grad.b_out) {
    out[0] = grad.b_out + expert * e.O;
    combine_rows(gate.data(), 0, 1, n, grad_y.data(), out.data(), 1, add, 0, e.O);
  }
  if (grad.w_in) {
    for (int64_t u = 0; u < e.H; ++u) out[u] = grad.w_in + (expert * e.H + u) * e.D;
    combine_rows(pre, 1, e.H, n, x.data(), out.data(), e.H, add, 0, e.D);
  }
  if (grad.b_in)
    for (int64_t u = 0; u < e.H; ++u) {
      float total = add ? grad.b_in[expert * e.H + u] : 0.f;
      for (int64_t i = 0; i < n; ++i) total += pre[i * e.H + u];
      grad.b_in[expert * e.H + u] = total;
    }
  if (grad.x && call.K == 1) {
    std::vector<const float*> unit(e.H);
    for (int64_t u = 0; u < e.H; ++u) unit[u] = e.w_in + (expert * e.H + u) * e.D;
    for (int64_t i = 0; i < n; ++i) out[i] = grad.x + first[i].place * e.D;
    combine_rows(pre, e.H, 1, e.H, unit.data(), out.data(), n, false, 0, e.D);
  }
}

// Weight gradients start as zeros, and so does that of the rows.
void run_backward(const Call<float>& call, const Gradients& grad, const int64_t* index, int64_t T) {
  const Experts<float>& e = call.experts;
  std::vector<Choice> choices = collect(index, 0, T, call.K, e.E);
  while (!choices.empty() && choices.back().expert == e.E) choices.pop_back();  // left out
  const int64_t total = int64_t(choices.size());
  const int64_t work = std::max<int64_t>(1, 3 * (e.H * e.D + e.L * e.O)), grain = std::max<int64_t>(1, GRAIN / work);
  // Shares of about the same number of choices, that end where an expert ends.
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), (total + grain - 1) / grain));
  std::vector<int64_t> share{0};
  for (int64_t i = 1; i < total; ++i)
    if (choices[i].expert != choices[i - 1].expert && i * threads >= total * int64_t(share.size())) share.push_back(i);
  share.push_back(total);
  at::parallel_for(0, int64_t(share.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    const int64_t rows = std::min<int64_t>(GROUP_ROWS, total);
    BackwardScratch scratch;
    scratch.pre.resize(rows * e.H);
    scratch.hidden.resize(rows * e.L);
    scratch.grad_hidden.resize(rows * e.L);
    const Choice *first = choices.data() + share[begin], *stop = choices.data() + share[end], *before = nullptr;
    while (first != stop) {
      const Choice* last = first;
      while (last != stop && last->expert == first->expert && last - first < GROUP_ROWS) ++last;
      run_group_backward(call, grad, first, last, before && before->expert == first->expert, scratch);
      before = first;
      first = last;
    }
  });
  if (!grad.x || call.K == 1) return;
  at::parallel_for(0, T, grain, [&](int64_t begin, int64_t end) {
    std::vector<Choice> own = collect(index, begin, end, call.K, e.E);
    std::vector<float> coef(GROUP_ROWS * e.H);
    std::vector<const float*> unit(e.H);
    std::array<float*, GROUP_ROWS> out;
    for (const Choice *first = own.data(), *stop = first + own.size(); first != stop && first->expert < e.E;) {
      int64_t n = 0;
      const int64_t expert = first->expert;
      for (; first != stop && first->expert == expert && n < GROUP_ROWS; ++first, ++n) {
        std::copy_n(grad.pre + first->place * e.H, e.H, coef.data() + n * e.H);
        out[n] = grad.x + first->place / call.K * e.D;
      }
      for (int64_t u = 0; u < e.H; ++u) unit[u] = e.w_in + (expert * e.H + u) * e.D;
      combine_rows(coef.data(), e.H, 1, e.H, unit.data(), out.data(), n, true, 0, e.D);
    }
  });
}

// ---- descent

template <class W>
struct Tree {
  const W* weight;             // (P, N, D)
  const W* bias;               // (P, N) or null
  const float* decision_bias;  // (P, N) or null; decides only
  int64_t P, N, D;
  int depth;
};

constexpr int WALKERS = 4;  // rows that step side by side, so that no dot product waits for the one before

// One step of R rows, each at its own node: out[r] = x[r] . w[r].
template <int R, class W>
[[gnu::noinline]] void step(const float* const* x, const W* const* w, int64_t n, float* out) {
  constexpr int CHAINS = 4;
  Lanes acc[R][CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * VL <= n; i += CHAINS * VL)
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int c = 0; c < CHAINS; ++c) acc[r][c] += load(x[r] + i + c * VL) * load(w[r] + i + c * VL);
  for (; i < n; i += VL)
    UNROLL for (int r = 0; r < R; ++r)
      acc[r][0] += i + VL <= n ? load(x[r] + i) * load(w[r] + i) : load(x[r] + i, n - i) * load(w[r] + i, n - i);
  UNROLL for (int r = 0; r < R; ++r) out[r] = sum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
}

// index (T, P): leaf of each row, counted over all trees.  logit (T, P, d): on the way to it.
template <class W>
void descend(const Tree<W>& tree, const W* x, int64_t T, int64_t* index, float* logit) {
  const int64_t work = std::max<int64_t>(1, tree.P * tree.depth * tree.D);
  at::parallel_for(0, T, std::max<int64_t>(1, GRAIN / work), [&](int64_t begin, int64_t end) {
    std::vector<float> converted(std::is_same_v<W, float> ? 0 : WALKERS * tree.D);
    std::array<const float*, WALKERS> row;
    std::array<const W*, WALKERS> weight;
    std::array<int64_t, WALKERS> node;
    std::array<float, WALKERS> value;
    for (int64_t first = begin; first < end; first += WALKERS) {
      const int rows = int(std::min<int64_t>(WALKERS, end - first));
      for (int r = 0; r < rows; ++r) row[r] = as_float(x + (first + r) * tree.D, tree.D, converted.data() + r * tree.D);
      for (int64_t p = 0; p < tree.P; ++p) {
        node.fill(0);
        for (int level = 0; level < tree.depth; ++level) {
          for (int r = 0; r < rows; ++r) weight[r] = tree.weight + (p * tree.N + node[r]) * tree.D;
          with_constant<WALKERS>(
              rows, [&](auto R) { step<R.value>(row.data(), weight.data(), tree.D, value.data()); });
          for (int r = 0; r < rows; ++r) {
            const int64_t at = p * tree.N + node[r];
            float decision = value[r] + (tree.bias ? float(tree.bias[at]) : 0.f);
            logit[((first + r) * tree.P + p) * tree.depth + level] = decision;
            if (tree.decision_bias) decision += tree.decision_bias[at];
            node[r] = 2 * node[r] + 1 + (decision >= 0.f);  // a nan goes left
          }
        }
        for (int r = 0; r < rows; ++r) index[(first + r) * tree.P + p] = node[r] - tree.N + p * (tree.N + 1);
      }
    }
  });
}

// ---- backward of the descent

// From the gradients of the logits on the way, (T, P, d), to those of nodes and rows; null: not asked for. weight and
// bias start as zeros. The rows of a node are neighbours once they are sorted by leaf, so a node is written once.
void descend_backward(
    const Tree<float>& tree, const float* x, int64_t T, const int64_t* index, const float* grad, float* grad_x,
    float* grad_weight, float* grad_bias) {
  const int64_t leaves = tree.N + 1, step = tree.P * tree.depth;
  auto node_at = [&](int64_t leaf, int level) { return ((leaf + leaves) >> (tree.depth - level)) - 1; };
  for (int64_t p = 0; p < tree.P; ++p) {
    std::vector<Choice> order(T);
    for (int64_t i = 0; i < T; ++i) order[i] = {int32_t(index[i * tree.P + p] - p * leaves), int32_t(i)};
    sort_by_expert(order, leaves);
    if (grad_bias)
      for (const Choice& c : order)
        for (int level = 0; level < tree.depth; ++level)
          grad_bias[p * tree.N + node_at(c.expert, level)] += grad[c.place * step + p * tree.depth + level];
    if (!grad_weight) continue;
    std::vector<const float*> row(T);
    std::vector<float> coef(T * tree.depth);
    for (int64_t i = 0; i < T; ++i) {
      row[i] = x + order[i].place * tree.D;
      for (int level = 0; level < tree.depth; ++level)
        coef[level * T + i] = grad[order[i].place * step + p * tree.depth + level];
    }
    const int64_t work = std::max<int64_t>(1, T * tree.depth);
    at::parallel_for(0, tree.D, std::max<int64_t>(4 * VL, GRAIN / work), [&](int64_t begin, int64_t end) {
      for (int level = 0; level < tree.depth; ++level)
        for (int64_t first = 0, last; first < T; first = last) {
          const int64_t node = node_at(order[first].expert, level);
          for (last = first + 1; last < T && node_at(order[last].expert, level) == node;) ++last;
          float* out = grad_weight + (p * tree.N + node) * tree.D;
          combine_rows(
              coef.data() + level * T + first, 0, 1, last - first, row.data() + first, &out, 1, false, begin, end);
        }
    });
  }
  if (!grad_x) return;
  const int64_t work = std::max<int64_t>(1, step * tree.D);
  at::parallel_for(0, T, std::max<int64_t>(1, GRAIN / work), [&](int64_t begin, int64_t end) {
    std::vector<const float*> weight(step);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t p = 0; p < tree.P; ++p)
        for (int level = 0; level < tree.depth; ++level)
          weight[p * tree.depth + level] =
              tree.weight + (p * tree.N + node_at(index[i * tree.P + p] - p * leaves, level)) * tree.D;
      float* out = grad_x + i * tree.D;
      combine_rows(grad + i * step, 0, 1, step, weight.data(), &out, 1, false, 0, tree.D);
    }
  });
}

// ---- operators

template <class F>
auto with_weight_type(at::ScalarType type, const F& f) {
  if (type == at::kFloat) return f(float{});
  TORCH_CHECK_TYPE(type == at::kBFloat16, "weights have dtype ", type, ", but the native op needs float32 or bfloat16");
  return f(BFloat16{});
}

void check_like(const char* name, const std::optional<Tensor>& t, at::IntArrayRef shape, at::ScalarType type) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->sizes() == shape, name, " has shape ", t->sizes(), ", not ", shape);
  TORCH_CHECK_TYPE(t->scalar_type() == type, name, " has dtype ", t->scalar_type(), ", not ", type);
  TORCH_CHECK_VALUE(t->device().is_cpu(), name, " is on ", t->device(), ", not on the CPU");
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) { return t ? t->contiguous() : t; }

struct Weights {
  Tensor w_in;
  std::optional<Tensor> b_in;
  Tensor w_out;
  std::optional<Tensor> b_out;

  Weights(const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2)
      : w_in(w1.contiguous()), b_in(contiguous(b1)), w_out(w2.contiguous()), b_out(contiguous(b2)) {}
};

// Checks all but the index.
template <class W>
Experts<W> experts_of(const Tensor& x, const Weights& w, c10::string_view activation, bool glu) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && w.w_in.dim() == 3 && w.w_out.dim() == 3, "x, w_in, w_out have ", x.dim(), ", ", w.w_in.dim(), ", ",
      w.w_out.dim(), " dimensions, not 2, 3, 3");
  const int64_t E = w.w_out.size(0), L = w.w_out.size(1), O = w.w_out.size(2), H = glu ? 2 * L : L, D = x.size(1);
  const at::ScalarType type = w.w_in.scalar_type();
  TORCH_CHECK_TYPE(x.scalar_type() == type, "x has dtype ", x.scalar_type(), ", but the weights ", type);
  check_like("w_in", w.w_in, {E, H, D}, type);
  check_like("b_in", w.b_in, {E, H}, type);
  check_like("w_out", w.w_out, {E, L, O}, type);
  check_like("b_out", w.b_out, {E, O}, type);
  return {
      w.w_in.const_data_ptr<W>(),  data_or_null<W>(w.b_in), w.w_out.const_data_ptr<W>(),
      data_or_null<W>(w.b_out),    E, H, L, D, O, parse(activation), glu};
}

// Sums are taken in float32; the result has the rows' type.
template <class W>
Tensor apply_experts(const Experts<W>& experts, const Tensor& x, const Tensor& index, const std::optional<Tensor>& gate) {
  const int64_t T = x.size(0), K = index.size(1);
  TORCH_CHECK_VALUE(T * K < INT32_LIMIT, T, " rows with ", K, " choices are too many for one call");
  TORCH_CHECK_VALUE(experts.E < INT32_LIMIT, experts.E, " experts are too many");
  auto options = x.options().dtype(at::kFloat);
  Tensor y = K == 1 ? at::empty({T, experts.O}, options) : at::zeros({T, experts.O}, options);
  Tensor weight = gate ? gate->to(at::kFloat).contiguous() : Tensor();
  Call<W> call{
      experts, x.const_data_ptr<W>(), gate ? weight.const_data_ptr<float>() : nullptr, K, y.mutable_data_ptr<float>()};
  run(call, index.const_data_ptr<int64_t>(), T);
  return std::is_same_v<W, float> ? y : y.to(x.scalar_type());
}

Tensor expert_mlp(
    const Tensor& x, const Tensor& index, const std::optional<Tensor>& gate, const Tensor& w_in,
    const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    c10::string_view activation, bool glu) {
  TORCH_CHECK_VALUE(
      index.dim() == 2 && index.size(0) == x.size(0) && at::isIntegralType(index.scalar_type(), /*includeBool=*/false),
      "index must be (", x.size(0), ", K) of integers, not ", index.sizes(), " ", index.scalar_type());
  TORCH_CHECK_VALUE(!gate || gate->sizes() == index.sizes(), "gate must have the shape of index");
  return with_weight_type(w_in.scalar_type(), [&](auto type) {
    Tensor rows = x.contiguous();
    Weights weights(w_in, b_in, w_out, b_out);
    auto experts = experts_of<decltype(type)>(rows, weights, activation, glu);
    return apply_experts(experts, rows, index.to(at::kLong).contiguous(), gate);
  });
}

// Gradients of expert_mlp for x, gate, w_in, b_in, w_out, b_out; an empty tensor for each that is not needed.
std::vector<Tensor> expert_mlp_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& index, const std::optional<Tensor>& gate, const Tensor& w_in,
    const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    c10::string_view activation, bool glu, const c10::List<bool>& need) {
  TORCH_CHECK_TYPE(w_in.scalar_type() == at::kFloat, "weights have dtype ", w_in.scalar_type(), ", not float32");
  TORCH_CHECK_VALUE(need.size() == 6, "need has ", need.size(), " entries, not 6");
  Tensor rows = x.contiguous(), chosen = index.to(at::kLong).contiguous(), grad = grad_y.contiguous();
  Weights w(w_in, b_in, w_out, b_out);
  auto experts = experts_of<float>(rows, w, activation, glu);
  const int64_t T = x.size(0), K = index.dim() == 2 ? index.size(1) : 0;
  check_like("index", chosen, {T, K}, at::kLong);
  check_like("gate", gate, {T, K}, at::kFloat);
  TORCH_CHECK_VALUE(T * K < INT32_LIMIT, T, " rows with ", K, " choices are too many for one call");
  check_like("grad_y", grad, {T, experts.O}, at::kFloat);
  Tensor weight = gate ? gate->contiguous() : Tensor();
  std::vector<Tensor> found;
  for (const auto& [i, like] : {std::pair(0, &rows), {1, &weight}, {2, &w.w_in}, {3, w.b_in ? &*w.b_in : nullptr},
                                {4, &w.w_out}, {5, w.b_out ? &*w.b_out : nullptr}})
    found.push_back(need.get(i) && like && like->defined() ? at::zeros_like(*like) : at::empty({0}, rows.options()));
  auto out = [&](int i) { return need.get(i) ? found[i].mutable_data_ptr<float>() : nullptr; };
  Tensor pre = need.get(0) && K > 1 ? at::empty({T, K, experts.H}, rows.options()) : Tensor();
  Call<float> call{
      experts, rows.const_data_ptr<float>(), gate ? weight.const_data_ptr<float>() : nullptr, K, nullptr};
  Gradients gradients{
      grad.const_data_ptr<float>(), out(0), out(1), out(2), out(3), out(4), out(5),
      pre.defined() ? pre.mutable_data_ptr<float>() : nullptr};
  run_backward(call, gradients, chosen.const_data_ptr<int64_t>(), T);
  return found;
}

template <class W>
Tree<W> tree_of(
    const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& shift, int64_t num_trees, int64_t depth) {
  const int64_t nodes = (int64_t(1) << depth) - 1, D = weight.size(1);
  check_like("node_weight", weight, {num_trees * nodes, D}, c10::CppTypeToScalarType<W>::value);
  check_like("node_bias", bias, {num_trees * nodes}, c10::CppTypeToScalarType<W>::value);
  TORCH_CHECK_VALUE(!shift.defined() || shift.numel() == num_trees * nodes, "decision_bias must have one number per node");
  return {
      weight.const_data_ptr<W>(), data_or_null<W>(bias), shift.defined() ? shift.const_data_ptr<float>() : nullptr,
      num_trees, nodes, D, int(depth)};
}

Tensor shift_of(const std::optional<Tensor>& decision_bias) {
  return decision_bias ? decision_bias->to(at::kFloat).contiguous() : Tensor();
}

void check_tree(const Tensor& x, const Tensor& node_weight, int64_t num_trees, int64_t depth) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && node_weight.dim() == 2 && x.size(1) == node_weight.size(1), "x ", x.sizes(), " does not fit nodes ",
      node_weight.sizes());
  TORCH_CHECK_VALUE(depth >= 0 && depth < 31 && num_trees >= 1, num_trees, " trees of depth ", depth);
  TORCH_CHECK_VALUE(x.size(0) * num_trees < INT32_LIMIT, x.size(0), " rows are too many for one call");
}

std::tuple<Tensor, Tensor> descend_rows(
    const Tensor& x, const Tensor& node_weight, const std::optional<Tensor>& node_bias,
    const std::optional<Tensor>& decision_bias, int64_t num_trees, int64_t depth) {
  check_tree(x, node_weight, num_trees, depth);
  check_like("x", x, x.sizes(), at::kFloat);
  Tensor rows = x.contiguous(), weight = node_weight.contiguous(), shift = shift_of(decision_bias);
  std::optional<Tensor> bias = contiguous(node_bias);
  Tree<float> tree = tree_of<float>(weight, bias, shift, num_trees, depth);
  Tensor index = at::empty({x.size(0), num_trees}, x.options().dtype(at::kLong));
  Tensor logit = at::empty({x.size(0), num_trees, 1, depth}, x.options());
  descend(
      tree, rows.const_data_ptr<float>(), x.size(0), index.mutable_data_ptr<int64_t>(), logit.mutable_data_ptr<float>());
  return {index, logit};
}

// Gradients of the logits for x, node_weight, node_bias; an empty tensor for each that is not needed.
std::tuple<Tensor, Tensor, Tensor> descend_rows_backward(
    const Tensor& grad_logit, const Tensor& x, const Tensor& node_weight, const Tensor& index, int64_t num_trees,
    int64_t depth, bool need_x, bool need_weight, bool need_bias) {
  check_tree(x, node_weight, num_trees, depth);
  check_like("x", x, x.sizes(), at::kFloat);
  check_like("grad_logit", grad_logit, {x.size(0), num_trees, 1, depth}, at::kFloat);
  check_like("index", index, {x.size(0), num_trees}, at::kLong);
  Tensor rows = x.contiguous(), weight = node_weight.contiguous(), grad = grad_logit.contiguous();
  Tensor chosen = index.contiguous();
  Tree<float> tree = tree_of<float>(weight, std::nullopt, Tensor(), num_trees, depth);
  auto room = [&](bool need, at::IntArrayRef shape) {
    return need ? at::zeros(shape, rows.options()) : at::empty({0}, rows.options());
  };
  Tensor grad_x = room(need_x, rows.sizes()), grad_weight = room(need_weight, weight.sizes());
  Tensor grad_bias = room(need_bias, {weight.size(0)});
  descend_backward(
      tree, rows.const_data_ptr<float>(), x.size(0), chosen.const_data_ptr<int64_t>(), grad.const_data_ptr<float>(),
      need_x ? grad_x.mutable_data_ptr<float>() : nullptr, need_weight ? grad_weight.mutable_data_ptr<float>() : nullptr,
      need_bias ? grad_bias.mutable_data_ptr<float>() : nullptr);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> tree_mlp(
    const Tensor& x, const Tensor& node_weight, const std::optional<Tensor>& node_bias,
    const std::optional<Tensor>& decision_bias, int64_t num_trees, int64_t depth, const Tensor& w_in,
    const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    c10::string_view activation, bool glu) {
  return with_weight_type(w_in.scalar_type(), [&](auto type) {
    using W = decltype(type);
    Tensor rows = x.contiguous(), node_rows = node_weight.contiguous();
    std::optional<Tensor> node_shift = contiguous(node_bias);
    Weights weights(w_in, b_in, w_out, b_out);
    auto experts = experts_of<W>(rows, weights, activation, glu);
    TORCH_CHECK_VALUE(
        depth >= 0 && depth < 31 && num_trees >= 1 && num_trees <= experts.E && experts.E == num_trees << depth, experts.E,
        " experts are not the leaves of ", num_trees, " trees of depth ", depth);
    check_tree(x, node_rows, num_trees, depth);
    Tensor shift = shift_of(decision_bias);
    Tree<W> tree = tree_of<W>(node_rows, node_shift, shift, num_trees, depth);
    Tensor index = at::empty({x.size(0), num_trees}, x.options().dtype(at::kLong));
    Tensor logit = at::empty({x.size(0), num_trees, 1, depth}, x.options().dtype(at::kFloat));
    descend(tree, rows.const_data_ptr<W>(), x.size(0), index.mutable_data_ptr<int64_t>(), logit.mutable_data_ptr<float>());
    return std::tuple(apply_experts(experts, rows, index, std::nullopt), index, logit);
  });
}

// Under autocast nothing is cast but rows and result: sums are in float32 anyway, and weights stay where they are.
Tensor expert_mlp_autocast(
    const Tensor& x, const Tensor& index, const std::optional<Tensor>& gate, const Tensor& w_in,
    const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    c10::string_view activation, bool glu) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fff::native_expert_mlp", "")
                       .typed<decltype(expert_mlp)>();
  Tensor y = op.call(x.to(w_in.scalar_type()), index, gate, w_in, b_in, w_out, b_out, activation, glu);
  return y.to(at::autocast::get_autocast_dtype(at::kCPU));
}

std::tuple<Tensor, Tensor, Tensor> tree_mlp_autocast(
    const Tensor& x, const Tensor& node_weight, const std::optional<Tensor>& node_bias,
    const std::optional<Tensor>& decision_bias, int64_t num_trees, int64_t depth, const Tensor& w_in,
    const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    c10::string_view activation, bool glu) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fff::native_tree_mlp", "").typed<decltype(tree_mlp)>();
  auto [y, index, logit] = op.call(
      x.to(w_in.scalar_type()), node_weight, node_bias, decision_bias, num_trees, depth, w_in, b_in, w_out, b_out,
      activation, glu);
  return {y.to(at::autocast::get_autocast_dtype(at::kCPU)), index, logit};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fff, library) {
  library.def(
      "native_expert_mlp(Tensor x, Tensor index, Tensor? gate, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
      "str activation, bool glu) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "native_tree_mlp(Tensor x, Tensor node_weight, Tensor? node_bias, Tensor? decision_bias, int num_trees, int depth, "
      "Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str activation, bool glu) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "native_expert_mlp_backward(Tensor grad_y, Tensor x, Tensor index, Tensor? gate, Tensor w_in, Tensor? b_in, "
      "Tensor w_out, Tensor? b_out, str activation, bool glu, bool[] need) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "native_descend(Tensor x, Tensor node_weight, Tensor? node_bias, Tensor? decision_bias, int num_trees, int depth) "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "native_descend_backward(Tensor grad_logit, Tensor x, Tensor node_weight, Tensor index, int num_trees, int depth, "
      "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fff, CPU, library) {
  library.impl("native_expert_mlp_backward", &expert_mlp_backward);
  library.impl("native_descend", &descend_rows);
  library.impl("native_descend_backward", &descend_rows_backward);
  library.impl("native_expert_mlp", &expert_mlp);
  library.impl("native_tree_mlp", &tree_mlp);
}

TORCH_LIBRARY_IMPL(fff, AutocastCPU, library) {
  library.impl("native_expert_mlp", &expert_mlp_autocast);
  library.impl("native_tree_mlp", &tree_mlp_autocast);
}
