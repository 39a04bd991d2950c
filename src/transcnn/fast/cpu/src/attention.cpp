// The two steps of H-MHSA for inference: attention inside each grid, and of every position to the merged tokens. And attention of
// all positions to each other, where there is only one step.
//
// The first two compute Q (and K, V) of some positions, the attention and the sums while all of that is in a core's L2 cache.

#include <algorithm>

#include "attend.h"
#include "grids.h"
#include "gemm.h"

namespace {

template <class T>
void local_attention(const T* x, const T* normed, T* out, const T* qkv, const float* bias, const float* scale, Grids s, long threads) {
    constexpr long ROWS = Tile<T>::ROWS;
    const long channels = s.channels, head_dim = s.head_dim, most = s.max_positions();
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < s.count(); i++) {
            const Grid grid(s, i);
            const long n = grid.positions(), padded = round_up(n, PANEL);
            Scratch& memory = scratch();
            if (!memory.begin(most * (channels * 4 + head_dim + round_up(head_dim, PANEL)) * sizeof(T) + 1024)) continue;
            T* own = memory.take<T>(n * channels);
            T* three = memory.take<T>(n * 3 * channels);
            T* keys = memory.take<T>(most * head_dim);
            T* values = memory.take<T>(most * round_up(head_dim, PANEL));
            grid.copy(normed, channels, own);
            multiply(own, channels, n, qkv, channels, channels, 3 * channels,
                     [&](long row, long count, long column, long some, const float* c) {
                         for (long i = row; i < row + count; i++, c += PANEL)
                             for (long j = 0; j < some; j += LANES)
                                 store(three + i * 3 * channels + column + j, load(c + j) + load(bias + column + j));
                     });
            for (long head = 0; head < channels; head += head_dim) {
                const T* q = three + head;
                pack_transposed(q + channels, 3 * channels, n, padded, head_dim, keys);
                pack(q + 2 * channels, 3 * channels, n, padded, head_dim, values);
                for (long first = 0; first < n; first += ROWS)
                    attend(q + first * 3 * channels, 3 * channels, std::min(ROWS, n - first), 1, keys, values, n, padded,
                           head_dim, [&](long row, long count, long column, long some, const float* c, const float* factor) {
                               for (long i = row; i < row + count; i++, c += PANEL) {
                                   const long at = grid.position(first + i) * channels;
                                   for (long j = 0; j < some; j += LANES) {
                                       const long channel = head + column + j;
                                       Vec value = load(x + at + channel);
                                       if (scale) value *= load(scale + channel);
                                       store(out + at + channel, value + load(c + j) * factor[i]);
                                   }
                               }
                           });
            }
        }
    }
}

// The output of a further local step: a map of (⌈height/ratio⌉, ⌈width/ratio⌉) tokens per image.
struct Level {
    const void* map;
    long ratio;
};

template <class T>
void global_attention(T* a1, const T* residual, const T* q, const float* q_bias, const T* kv, const T* proj,
            const float* proj_bias, const Level* maps, long levels, T* packed, long batch, long height, long width,
            long channels, long head_dim, long tokens, long threads) {
    constexpr long ROWS = Tile<T>::ROWS, AT_ONCE = 64 / ROWS * ROWS, MAX_ROWS = AT_ONCE * 3 / 2;  // whole tiles, and a remainder
    const long padded = round_up(tokens, PANEL), n = height * width, heads = channels / head_dim;
    const long chunks = std::max<long>(1, (n + AT_ONCE / 2) / AT_ONCE), each = padded * (head_dim + round_up(head_dim, PANEL));
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < batch * heads; i++) {
            const T* k = kv + i / heads * tokens * 2 * channels + i % heads * head_dim;
            T* keys = packed + i * each;
            pack_transposed(k, 2 * channels, tokens, padded, head_dim, keys);
            pack(k + channels, 2 * channels, tokens, padded, head_dim, keys + padded * head_dim);
        }
#pragma omp for schedule(dynamic)
        for (long chunk = 0; chunk < batch * chunks; chunk++) {
            const long image = chunk / chunks, start = chunk % chunks * AT_ONCE;
            const long count = chunk % chunks == chunks - 1 ? n - start : AT_ONCE;
            T* a = a1 + (image * n + start) * channels;
            Scratch& memory = scratch();
            if (!memory.begin(2 * MAX_ROWS * channels * sizeof(T) + 1024)) continue;
            T* queries = memory.take<T>(MAX_ROWS * channels);
            T* sum = memory.take<T>(MAX_ROWS * channels);
            multiply(a, channels, count, q, channels, channels, channels,
                     [&](long row, long rows, long column, long some, const float* c) {
                         for (long i = row; i < row + rows; i++, c += PANEL)
                             for (long j = 0; j < some; j += LANES)
                                 store(queries + i * channels + column + j, load(c + j) + load(q_bias + column + j));
                     });
            for (long head = 0; head < heads; head++) {
                const T* keys = packed + (image * heads + head) * each;
                for (long first = 0; first < count; first += ROWS)
                    attend(queries + first * channels + head * head_dim, channels, std::min(ROWS, count - first), 1, keys,
                           keys + padded * head_dim, tokens, padded, head_dim,
                           [&](long row, long rows, long column, long some, const float* c, const float* factor) {
                               for (long i = row; i < row + rows; i++, c += PANEL) {
                                   const long token = first + i, y = (start + token) / width, x = (start + token) % width;
                                   for (long j = 0; j < some; j += LANES) {
                                       const long channel = head * head_dim + column + j;
                                       Vec value = load(c + j) * factor[i] + load(a + token * channels + channel);
                                       for (long s = 0; s < levels; s++) {
                                           const long r = maps[s].ratio, w = (width + r - 1) / r;
                                           const long at = (image * ((height + r - 1) / r) + y / r) * w + x / r;
                                           value += load(static_cast<const T*>(maps[s].map) + at * channels + channel);
                                       }
                                       store(sum + token * channels + channel, value);
                                   }
                               }
                           });
            }
            const T* before = residual ? residual + (image * n + start) * channels : nullptr;
            multiply(sum, channels, count, proj, channels, channels, channels,
                     [&](long row, long rows, long column, long some, const float* c) {
                         for (long i = row; i < row + rows; i++, c += PANEL)
                             for (long j = 0; j < some; j += LANES) {
                                 const long at = i * channels + column + j;
                                 Vec value = load(c + j) + load(proj_bias + column + j);
                                 store(a + at, before ? value + load(before + at) : value);
                             }
                     });
        }
    }
}

// softmax(Q·Kᵀ)·V of each head, (batch, tokens, 3·channels) -> (batch, tokens, channels); Q is scaled.
template <class T>
void full_attention(const T* qkv, T* out, long batch, long tokens, long channels, long head_dim, long threads) {
    constexpr long ROWS = Tile<T>::ROWS;
    const long padded = round_up(tokens, PANEL), heads = channels / head_dim, stride = 3 * channels;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < batch * heads; i++) {
            const long head = i % heads * head_dim;
            const T* q = qkv + i / heads * tokens * stride + head;
            T* own = out + i / heads * tokens * channels + head;
            Scratch& memory = scratch();
            if (!memory.begin(padded * (head_dim + round_up(head_dim, PANEL)) * sizeof(T) + 1024)) continue;
            T* keys = memory.take<T>(padded * head_dim);
            T* values = memory.take<T>(padded * round_up(head_dim, PANEL));
            pack_transposed(q + channels, stride, tokens, padded, head_dim, keys);
            pack(q + 2 * channels, stride, tokens, padded, head_dim, values);
            for (long first = 0; first < tokens; first += ROWS)
                attend(q + first * stride, stride, std::min(ROWS, tokens - first), 1, keys, values, tokens, padded, head_dim,
                       [&](long row, long rows, long column, long some, const float* c, const float* factor) {
                           put(own + (first + row) * channels + column, channels, rows, some, c, factor + row);
                       });
        }
    }
}

}  // namespace

#define ATTENTION(SUFFIX, T)                                                                                            \
    extern "C" void local_attention_##SUFFIX(const T* x, const T* normed, T* out, const T* qkv, const float* bias,               \
                                   const float* scale, long batch, long height, long width, long channels,             \
                                   long head_dim, long size, long threads) {                                           \
        local_attention(x, normed, out, qkv, bias, scale, Grids{batch, height, width, channels, head_dim, size}, threads);       \
    }                                                                                                                   \
    extern "C" void global_attention_##SUFFIX(T* a1, const T* residual, const T* q, const float* q_bias, const T* kv,           \
                                    const T* proj, const float* proj_bias, const Level* maps, long levels, T* packed, \
                                    long batch, long height, long width, long channels, long head_dim, long tokens,    \
                                    long threads) {                                                                     \
        global_attention(a1, residual, q, q_bias, kv, proj, proj_bias, maps, levels, packed, batch, height, width, channels,  \
               head_dim, tokens, threads);                                                                              \
    }                                                                                                                   \
    extern "C" void full_attention_##SUFFIX(const T* qkv, T* out, long batch, long tokens, long channels,               \
                                            long head_dim, long threads) {                                              \
        full_attention(qkv, out, batch, tokens, channels, head_dim, threads);                                           \
    }

ATTENTION(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
ATTENTION(bf16, bf16)
#endif
