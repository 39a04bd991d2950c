// The attention of H-MHSA in training: inside each grid, and of every position to the merged tokens.
//
// Neither keeps a matrix of scores: the backward pass recomputes them, one head and some queries at a time. With S the scaled
// scores, P their softmax and O = P·V:
//
//     dV = Pᵀ·dO,   dP = dO·Vᵀ,   dS = P ∘ (dP - rowsum(P ∘ dP)),   dQ = scale·dS·K,   dK = scale·dSᵀ·Q

#include <algorithm>

#include "attend.h"
#include "grids.h"
#include "gemm.h"

namespace {

constexpr long QUERIES = 64;  // per block

// Transposes (rows, columns), both multiples of 16, to (columns, rows), rounded to T.
template <class T>
void transpose_all(const float* x, long ldx, long rows, long columns, T* to) {
    alignas(64) int32_t block[16 * 16];
    for (long i = 0; i < rows; i += 16)
        for (long j = 0; j < columns; j += 16) {
            transpose(reinterpret_cast<const int32_t*>(x + i * ldx + j), ldx, block, 16);
            for (long k = 0; k < 16; k++)
                for (long lane = 0; lane < 16; lane += LANES)
                    store(to + (j + k) * rows + i + lane, load(reinterpret_cast<const float*>(block + k * 16 + lane)));
        }
}

// One head's keys and values, and their gradients.
template <class T>
class Head {
  public:
    static size_t bytes(long padded, long head_dim) {
        const long wide = round_up(head_dim, PANEL);
        return 4 * (2 * padded * head_dim + 2 * QUERIES * padded) +
               sizeof(T) * (3 * padded * wide + 2 * QUERIES * wide + 3 * QUERIES * padded) + 1024;
    }

    Head(Scratch& memory, long padded, long head_dim) : padded(padded), head_dim(head_dim) {
        const long wide = round_up(head_dim, PANEL);
        dk = memory.take<float>(padded * head_dim);
        dv = memory.take<float>(padded * head_dim);
        probs = memory.take<float>(QUERIES * padded);
        dprobs = memory.take<float>(QUERIES * padded);
        keys_transposed = memory.take<T>(padded * head_dim);
        values_transposed = memory.take<T>(padded * head_dim);
        keys = memory.take<T>(padded * wide);
        queries_packed = memory.take<T>(QUERIES * wide);
        grads_packed = memory.take<T>(QUERIES * wide);
        ds = memory.take<T>(QUERIES * padded);
        probs_transposed = memory.take<T>(QUERIES * padded);
        ds_transposed = memory.take<T>(QUERIES * padded);
    }

    void begin(const T* k, const T* v, long stride, long count) {
        n = count;
        pack_transposed(k, stride, n, padded, head_dim, keys_transposed);
        pack_transposed(v, stride, n, padded, head_dim, values_transposed);
        pack(k, stride, n, padded, head_dim, keys);
        std::memset(dk, 0, padded * head_dim * sizeof(float));
        std::memset(dv, 0, padded * head_dim * sizeof(float));
    }

    // Accumulates dK and dV from ``rows`` queries and their outputs' gradients; calls take(row, rows, column, columns, c) with dQ.
    template <class Take>
    void add(const T* q, long ldq, const T* grad, long ldg, long rows, float scale, Take take) {
        const long filled = round_up(rows, PANEL);
        const auto keep = [&](float* to, float factor) {
            return [=, this](long row, long count, long column, long, const float* c) {
                for (long i = row; i < row + count; i++, c += PANEL)
                    for (long j = 0; j < PANEL; j += LANES) store(to + i * padded + column + j, load(c + j) * factor);
            };
        };
        multiply(q, ldq, rows, keys_transposed, head_dim, head_dim, padded, keep(probs, scale));
        multiply(grad, ldg, rows, values_transposed, head_dim, head_dim, padded, keep(dprobs, 1));
        for (long i = 0; i < rows; i++) softmax_backward(probs + i * padded, dprobs + i * padded, ds + i * padded, scale);
        std::memset(probs + rows * padded, 0, (filled - rows) * padded * sizeof(float));
        std::memset(dprobs + rows * padded, 0, (filled - rows) * padded * sizeof(float));
        multiply(ds, padded, rows, keys, padded, padded, head_dim, take);

        transpose_all(probs, padded, filled, padded, probs_transposed);
        transpose_all(dprobs, padded, filled, padded, ds_transposed);
        pack(q, ldq, rows, filled, head_dim, queries_packed);
        pack(grad, ldg, rows, filled, head_dim, grads_packed);
        const auto sum = [&](float* to) {
            return [=, this](long row, long count, long column, long columns, const float* c) {
                for (long i = row; i < row + count; i++, c += PANEL)
                    for (long j = 0; j < columns; j += LANES) {
                        float* p = to + i * head_dim + column + j;
                        store(p, load(p) + load(c + j));
                    }
            };
        };
        multiply(probs_transposed, filled, n, grads_packed, filled, filled, head_dim, sum(dv));
        multiply(ds_transposed, filled, n, queries_packed, filled, filled, head_dim, sum(dk));
    }

    float *dk, *dv;  // (n, head_dim)

  private:
    // Turns one query's scores and dP into the softmax and scale·dS, the latter also rounded to T.
    void softmax_backward(float* prob, float* dprob, T* rounded, float scale) const {
        for (long j = n; j < padded; j++) prob[j] = -__builtin_inff();
        Vec high = load(prob);
        for (long j = LANES; j < padded; j += LANES) high = larger(load(prob + j), high);
        const float top = largest(high);
        Vec sum{}, products{};
        for (long j = 0; j < padded; j += LANES) {
            Vec p = exponential<T>(load(prob + j) - top);
            if (j + LANES > n)
                for (long lane = std::max<long>(0, n - j); lane < LANES; lane++) p[lane] = 0;
            sum += p;
            products += p * load(dprob + j);
            store(prob + j, p);
        }
        const float factor = 1 / total(sum), mean = total(products) * factor;
        for (long j = 0; j < padded; j += LANES) {
            Vec p = load(prob + j) * factor, d = p * (load(dprob + j) - mean) * scale;
            store(prob + j, p);
            store(dprob + j, d);
            store(rounded + j, d);
        }
    }

    long padded, head_dim, n = 0;
    float *probs, *dprobs;
    T *keys_transposed, *values_transposed, *keys, *queries_packed, *grads_packed, *ds, *probs_transposed, *ds_transposed;
};

template <class T>
void grid_forward(const T* qkv, const T* residual, T* out, float scale, Grids s, long threads) {
    constexpr long ROWS = Tile<T>::ROWS;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(static)
        for (long i = 0; i < s.count(); i++) {
            const Grid grid(s, i);
            const long n = grid.positions(), padded = round_up(n, PANEL), three = 3 * s.channels;
            Scratch& memory = scratch();
            if (!memory.begin(s.max_positions() * (three + s.head_dim + round_up(s.head_dim, PANEL)) * sizeof(T) + 1024)) continue;
            T* own = memory.take<T>(n * three);
            T* keys = memory.take<T>(padded * s.head_dim);
            T* values = memory.take<T>(padded * round_up(s.head_dim, PANEL));
            grid.copy(qkv, three, own);
            for (long head = 0; head < s.channels; head += s.head_dim) {
                pack_transposed(own + s.channels + head, three, n, padded, s.head_dim, keys);
                pack(own + 2 * s.channels + head, three, n, padded, s.head_dim, values);
                for (long first = 0; first < n; first += ROWS)
                    attend(own + first * three + head, three, std::min(ROWS, n - first), scale, keys, values, n, padded,
                           s.head_dim, [&](long row, long rows, long column, long columns, const float* c, const float* factor) {
                               for (long i = row; i < row + rows; i++, c += PANEL) {
                                   const long at = grid.position(first + i) * s.channels + head + column;
                                   put(out + at, 0, 1, columns, c, factor + i, residual ? residual + at : nullptr);
                               }
                           });
            }
        }
    }
}

template <class T>
void grid_backward(const T* qkv, const T* grad, T* dqkv, float scale, Grids s, long threads) {
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(static)
        for (long i = 0; i < s.count(); i++) {
            const Grid grid(s, i);
            const long n = grid.positions(), padded = round_up(n, PANEL), three = 3 * s.channels;
            Scratch& memory = scratch();
            if (!memory.begin(Head<T>::bytes(padded, s.head_dim) + n * 4 * s.channels * sizeof(T))) continue;
            Head<T> work(memory, padded, s.head_dim);
            T* own = memory.take<T>(n * three);
            T* up = memory.take<T>(n * s.channels);
            grid.copy(qkv, three, own);
            grid.copy(grad, s.channels, up);
            for (long head = 0; head < s.channels; head += s.head_dim) {
                work.begin(own + s.channels + head, own + 2 * s.channels + head, three, n);
                for (long first = 0; first < n; first += QUERIES)
                    work.add(own + first * three + head, three, up + first * s.channels + head, s.channels,
                             std::min(QUERIES, n - first), scale,
                             [&](long row, long rows, long column, long columns, const float* c) {
                                 for (long i = row; i < row + rows; i++, c += PANEL)
                                     put(dqkv + grid.position(first + i) * three + head + column, 0, 1, columns, c);
                             });
                for (long token = 0; token < n; token++)
                    for (long j = 0; j < s.head_dim; j += LANES) {
                        T* to = dqkv + grid.position(token) * three + head + j;
                        store(to + s.channels, load(work.dk + token * s.head_dim + j));
                        store(to + 2 * s.channels, load(work.dv + token * s.head_dim + j));
                    }
            }
        }
    }
}

struct Global {
    long batch, positions, tokens, channels, head_dim;

    long heads() const { return channels / head_dim; }
};

// q and residual (B, positions, C), kv (B, tokens, 2C); residual is null where there is none
template <class T>
void global_forward(const T* q, const T* kv, const T* residual, T* out, float scale, Global s, long threads) {
    constexpr long ROWS = Tile<T>::ROWS;
    const long padded = round_up(s.tokens, PANEL), wide = round_up(s.head_dim, PANEL);
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(static)
        for (long i = 0; i < s.batch * s.heads(); i++) {
            const long image = i / s.heads(), head = i % s.heads() * s.head_dim;
            Scratch& memory = scratch();
            if (!memory.begin(padded * (s.head_dim + wide) * sizeof(T) + 1024)) continue;
            T* keys = memory.take<T>(padded * s.head_dim);
            T* values = memory.take<T>(padded * wide);
            const T* k = kv + image * s.tokens * 2 * s.channels + head;
            pack_transposed(k, 2 * s.channels, s.tokens, padded, s.head_dim, keys);
            pack(k + s.channels, 2 * s.channels, s.tokens, padded, s.head_dim, values);
            const long start = image * s.positions * s.channels + head;
            for (long first = 0; first < s.positions; first += ROWS)
                attend(q + start + first * s.channels, s.channels, std::min(ROWS, s.positions - first), scale, keys,
                       values, s.tokens, padded, s.head_dim,
                       [&](long row, long rows, long column, long columns, const float* c, const float* factor) {
                           const long at = start + (first + row) * s.channels + column;
                           put(out + at, s.channels, rows, columns, c, factor + row, residual ? residual + at : nullptr);
                       });
        }
    }
}

template <class T>
void global_backward(const T* q, const T* kv, const T* grad, T* dq, T* dkv, float scale, Global s, long threads) {
    const long padded = round_up(s.tokens, PANEL);
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(static)
        for (long i = 0; i < s.batch * s.heads(); i++) {
            const long image = i / s.heads(), head = i % s.heads() * s.head_dim;
            Scratch& memory = scratch();
            if (!memory.begin(Head<T>::bytes(padded, s.head_dim))) continue;
            Head<T> work(memory, padded, s.head_dim);
            const long there = image * s.tokens * 2 * s.channels + head, start = image * s.positions * s.channels + head;
            work.begin(kv + there, kv + there + s.channels, 2 * s.channels, s.tokens);
            for (long first = 0; first < s.positions; first += QUERIES) {
                const long at = start + first * s.channels;
                work.add(q + at, s.channels, grad + at, s.channels, std::min(QUERIES, s.positions - first), scale,
                         [&](long row, long rows, long column, long columns, const float* c) {
                             put(dq + at + row * s.channels + column, s.channels, rows, columns, c);
                         });
            }
            for (long token = 0; token < s.tokens; token++)
                for (long j = 0; j < s.head_dim; j += LANES) {
                    T* to = dkv + there + token * 2 * s.channels + j;
                    store(to, load(work.dk + token * s.head_dim + j));
                    store(to + s.channels, load(work.dv + token * s.head_dim + j));
                }
        }
    }
}

inline float scale_of(long head_dim) { return 1 / __builtin_sqrtf(static_cast<float>(head_dim)); }

}  // namespace

#define TRAINING(SUFFIX, T)                                                                                          \
    extern "C" void grid_forward_##SUFFIX(const T* qkv, const T* residual, T* out, long batch, long height,         \
                                          long width, long channels, long head_dim, long size, long threads) {      \
        Grids shape{batch, height, width, channels, head_dim, size};                                                 \
        grid_forward(qkv, residual, out, scale_of(head_dim), shape, threads);                                        \
    }                                                                                                                \
    extern "C" void grid_backward_##SUFFIX(const T* qkv, const T* grad, T* dqkv, long batch, long height,           \
                                           long width, long channels, long head_dim, long size, long threads) {     \
        Grids shape{batch, height, width, channels, head_dim, size};                                                 \
        grid_backward(qkv, grad, dqkv, scale_of(head_dim), shape, threads);                                          \
    }                                                                                                                \
    extern "C" void global_forward_##SUFFIX(const T* q, const T* kv, const T* residual, T* out, long batch,         \
                                            long positions, long tokens, long channels, long head_dim,              \
                                            long threads) {                                                          \
        Global shape{batch, positions, tokens, channels, head_dim};                                                  \
        global_forward(q, kv, residual, out, scale_of(head_dim), shape, threads);                                    \
    }                                                                                                                \
    extern "C" void global_backward_##SUFFIX(const T* q, const T* kv, const T* grad, T* dq, T* dkv, long batch,     \
                                             long positions, long tokens, long channels, long head_dim,             \
                                             long threads) {                                                         \
        Global shape{batch, positions, tokens, channels, head_dim};                                                  \
        global_backward(q, kv, grad, dq, dkv, scale_of(head_dim), shape, threads);                                   \
    }

TRAINING(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
TRAINING(bf16, bf16)
#endif
