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
// Limits. Forward only; float32, or bfloat16 weights and rows with float32 sums; contiguous weights; T K < 2^31.

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
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
      Lanes value = acc[r][v] * rows[r].gate;
      if (whole || v + 1 < V) {
        if (add) value += load(y);
        std::memcpy(y, &value, sizeof value);
      } else {
        if (add) value += load(y, last);
        std::memcpy(y, &value, last * sizeof(float));
      }
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

enum class Activation { relu, gelu, silu, relu2, identity };

Activation parse(c10::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "silu") return Activation::silu;
  if (name == "relu2") return Activation::relu2;
  TORCH_CHECK_VALUE(name == "identity", "activation='", name, "' is none of gelu, identity, relu, relu2, silu");
  return Activation::identity;
}

inline Vec apply(Activation activation, const Vec& v) {
  switch (activation) {
    case Activation::relu:
      return at::vec::clamp_min(v, Vec(0.f));
    case Activation::gelu:
      return Vec(0.5f) * v * (Vec(1.f) + (v * Vec(float(M_SQRT1_2))).erf());
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
  float* y;  // (T, O), zeros where K > 1
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
  if (call.K > 1) {
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
  TORCH_CHECK_VALUE(T * K < (int64_t(1) << 31), T, " rows with ", K, " choices are too many for one call");
  auto options = x.options().dtype(at::kFloat);
  Tensor y = K == 1 ? at::empty({T, experts.O}, options) : at::zeros({T, experts.O}, options);
  Tensor weight = gate ? gate->to(at::kFloat).contiguous() : Tensor();
  Call<W> call{
      experts, x.const_data_ptr<W>(), gate ? weight.const_data_ptr<float>() : nullptr, K, y.mutable_data_ptr<float>()};
  run(call, index.const_data_ptr<int64_t>(), T);
  return y.to(x.scalar_type());
}

Tensor expert_mlp(
    const Tensor& x, const Tensor& index, const std::optional<Tensor>& gate, const Tensor& w_in,
    const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    c10::string_view activation, bool glu) {
  TORCH_CHECK_VALUE(
      index.dim() == 2 && index.size(0) == x.size(0) && index.scalar_type() == at::kLong,
      "index must be (", x.size(0), ", K) int64, not ", index.sizes(), " ", index.scalar_type());
  TORCH_CHECK_VALUE(!gate || gate->sizes() == index.sizes(), "gate must have the shape of index");
  return with_weight_type(w_in.scalar_type(), [&](auto type) {
    Tensor rows = x.contiguous();
    Weights weights(w_in, b_in, w_out, b_out);
    auto experts = experts_of<decltype(type)>(rows, weights, activation, glu);
    return apply_experts(experts, rows, index.contiguous(), gate);
  });
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
        depth >= 0 && depth < 31 && num_trees >= 1 && experts.E == num_trees << depth, experts.E,
        " experts are not the leaves of ", num_trees, " trees of depth ", depth);
    const int64_t nodes = (int64_t(1) << depth) - 1;
    check_like("node_weight", node_weight, {num_trees * nodes, experts.D}, w_in.scalar_type());
    check_like("node_bias", node_bias, {num_trees * nodes}, w_in.scalar_type());
    Tensor shift = decision_bias ? decision_bias->to(at::kFloat).contiguous() : Tensor();
    TORCH_CHECK_VALUE(!decision_bias || shift.numel() == num_trees * nodes, "decision_bias must have one number per node");
    Tree<W> tree{
        node_rows.const_data_ptr<W>(),
        data_or_null<W>(node_shift),
        decision_bias ? shift.const_data_ptr<float>() : nullptr,
        num_trees, nodes, experts.D, int(depth)};
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
}

TORCH_LIBRARY_IMPL(fff, CPU, library) {
  library.impl("native_expert_mlp", &expert_mlp);
  library.impl("native_tree_mlp", &tree_mlp);
}

TORCH_LIBRARY_IMPL(fff, AutocastCPU, library) {
  library.impl("native_expert_mlp", &expert_mlp_autocast);
  library.impl("native_tree_mlp", &tree_mlp_autocast);
}
